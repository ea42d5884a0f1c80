"""Fine-tuning: a base model learns to answer, or to sort texts. README.md says more."""

import json
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import ablation
import forms
import lora
import numpy as np
import reports
import scores
import sft
import sorting
import torch
import transformer
from optimizers import compiled
from sources import (
    CONTEXT,
    PRESETS,
    Source,
    before_tuning,
    begin_run,
    find_model,
    load_model,
    matrix_flops,
    peak_memory,
    read,
    record,
    tested,
    version,
    with_template,
)

from common import OUT, atomic, build, main, pick_device, plot_loss, progress

HERE = Path(__file__).resolve().parent


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
class ChooseOptions:
    data: str = ""  # JSONL with question, choices and answer, or a CSV in MMLU's layout


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
    base = begin_lora(model, how, path, added) if how.lora_rank else None
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
    kinds = "-".join(kind.strip() for kind in source.kinds.split(",") if kind.strip())
    link = f"latest-{kinds}" if kinds else "latest"  # what answers some kinds only is kept apart
    run = begin_run(link, sft.__file__, plan, options.run, options.fresh)
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

    c = model.config
    attention = 12 * c.n_layers * c.n_heads * c.head_dim * context
    flops = attention + (6 * trained + 4 * n if how.lora_rank else 6 * n)  # of a token
    tell_and_train(model, loader, loss_of, validate, save, how, run, device, dtype, flops)
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


def begin_lora(model, how, path, added):
    """Adds LoRA to a model; returns the directory that has the model without it, for peft."""
    base = path
    if added or path is None or path.is_file():  # peft needs a directory
        base = OUT / "07_sft" / "base" / sha256(repr(version(path)).encode()).hexdigest()[:8]
        model.save_pretrained(base)
    size = (how.lora_rank, how.lora_alpha, how.lora_dropout)
    lora.add_lora(model, *size, how.lora_targets, how.lora_layers)
    if added:  # their rows have to be learned
        model.token_embedding.requires_grad_(True)
        model.output.requires_grad_(True)
    return base


def tell_and_train(model, loader, loss_of, validate, save, how, run, device, dtype, flops):
    """sft.train with a bar, trackers and, after a few steps, what it will take; flops: of a token,
    forward and backward."""
    log = reports.trackers(run, how)
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

    hooks = dict(on_step=on_step, peak_flops=matrix_flops(device, dtype), flops_per_token=flops)
    try:
        sft.train(model, loader, loss_of, validate, save, how, run, device, dtype, **hooks)
    except torch.OutOfMemoryError:
        raise ValueError("out of GPU memory: give a smaller --micro_batch") from None
    finally:
        bar.close()


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


if __name__ == "__main__":
    main(
        {
            "train": (train, Source, Options, Questions, sft.TrainConfig),
            "eval": (evaluate, ModelOptions, EvalOptions, Questions),
            "ask": (ask, ModelOptions, AskOptions),
            "show": (show, Source, ShowOptions),
            "classify": (sorting.classify, sorting.ClassifyOptions),
            "choose": (choose, ModelOptions, ChooseOptions),
            "ablate": (ablation.ablate, ablation.AblateOptions),
        }
    )
