"""GPT-2: train one, sample from it, follow a sentence through it. README.md says more."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import gpt
import numpy as np
import torch

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
# What a preset changes in GPTConfig and TrainConfig. small takes 3 minutes on 2 cores; medium is
# for one GPU; 124m and its larger kin are GPT-2 as published, with the batch of its reproductions.
SMALL = dict(d_model=128, n_layers=4, n_heads=4, context_length=128, gelu="exact")
SMALL |= dict(steps=1600, tokens_per_step=1024, max_lr=5e-3, min_lr=0.0, warmup_steps=80)
SMALL |= dict(eval_every=200, eval_tokens=20_000)
MEDIUM = dict(d_model=384, n_layers=6, n_heads=6, context_length=256, dropout=0.2)
MEDIUM |= dict(steps=5000, tokens_per_step=16384, max_lr=1e-3, eval_every=250, patience=6)
LARGE = dict(tokens_per_step=2**19, max_lr=6e-4, min_lr=6e-5, warmup_steps=700, beta2=0.95)
LARGE |= dict(eval_every=250, eval_tokens=2**20, patience=4)
PRESETS = {"small": SMALL, "medium": MEDIUM}
PRESETS |= {name: shape | LARGE for name, shape in gpt.PRESETS.items()}


@dataclass
class Options:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    sha256: str | None = None  # checksum of --data where that is a URL
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes
    tokens: str | None = None  # directory with train.bin, val.bin and meta.json in place of --data
    preset: str = "auto"  # small, medium, 124m, 355m, 774m or 1558m; auto: small, on a GPU medium
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class SampleOptions:
    model: str = str(OUT / "03_gpt" / "latest")  # a GPT-2 directory in Hugging Face's layout
    prompt: str = "\n"  # text to go on from
    n: int = 3  # number of samples
    max_new_tokens: int = 150  # length of each, tokens
    temperature: float = 0.8  # 0 always takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float | None = 0.95  # draw from the likeliest tokens that make up this probability
    seed: int = 1  # of the draw
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class TraceOptions:
    text: str = "To be, or not to be"  # the sentence to follow
    model: str = str(OUT / "03_gpt" / "latest")  # a GPT-2 directory; a random small one if missing


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
    config = build(gpt.GPTConfig, given, **dict(vocab_size=tokenizer.vocab_size) | preset)
    training = build(gpt.TrainConfig, given, **preset)
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
    plan = asdict(config) | asdict(training) | dict(tokens_dir=home.name, device=device.type)
    run = Run(gpt.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * training.steps}, or begin again with --fresh")
    torch.manual_seed(training.seed)
    model = gpt.GPT(config).to(device)
    sequences = max(1, training.tokens_per_step // config.context_length)
    micro = gpt.micro_batch_size(config, config.context_length, sequences, device)
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
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if directory and (Path(directory) / file).exists():
            run.dir.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(directory) / file, run.dir / file)
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
        gpt.train(model, train_tokens, val_tokens, training, run, device, dtype, **hooks)
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
    model = gpt.GPT.from_pretrained(run.dir).to(device)
    loss = gpt.evaluate(model, val_tokens, model.config.context_length, device=device)
    bpb = loss * len(val_tokens) / val_bytes / np.log(2)
    result = dict(preset=preset, data=options.data, steps=last["step"], val_loss=loss, val_bpb=bpb)
    result["minutes"] = round(last["time"] / 60, 2)
    result |= dict(tokens_per_s=round(float(np.median([line["tokens_per_s"] for line in lines]))))
    result |= dict(
        peak_gib=round(peak_memory(device), 2),
        seed=json.load(open(run.dir / "run.json"))["config"]["seed"],
    )
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
    for i, text in enumerate(samples(SampleOptions(model=str(run.dir), device=device.type)), 1):
        print(f"--- sample {i}\n{text}")
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
    print(
        f"{summary(result)}. Model, loss.png and metrics are in {run.dir}; next: "
        'make sample PROMPT="ROMEO:", or python 03_gpt/run.py trace'
    )


def load(path, device="cpu"):
    if not Path(path, "config.json").exists():
        raise ValueError(f"{path} holds no model yet: make 03 trains one, --model names another")
    tokenizer = Tokenizer(path if (Path(path) / "tokenizer.json").exists() else None)
    return gpt.GPT.from_pretrained(path).to(device).eval(), tokenizer


def samples(options):
    device, _, _ = pick_device(options.device)
    model, tokenizer = load(options.model, device)
    prompt = tokenizer.encode(options.prompt) or [tokenizer.eot]
    ids = torch.tensor([prompt] * options.n, device=device)
    stops = () if tokenizer.eot is None else (tokenizer.eot,)
    settings = (options.temperature, options.top_k, options.top_p, stops, options.seed)
    for row in model.generate(ids, options.max_new_tokens, *settings).tolist():
        yield tokenizer.decode(row).split(EOT)[0].strip()


def sample(given):
    """print text that the model writes"""
    options = build(SampleOptions, given)
    for i, text in enumerate(samples(options), 1):
        print(f"--- sample {i}\n{text}" if options.n > 1 else text)


def trace(given):
    """follow one sentence through the model: each shape and a few values"""
    options = build(TraceOptions, given)
    if Path(options.model, "config.json").exists():
        model, tokenizer = load(options.model)
    else:
        print(f"no model in {options.model}: a small random one (make 03 trains one)")
        config = gpt.GPTConfig(257, context_length=64, d_model=32, n_layers=2, n_heads=2)
        model, tokenizer = gpt.GPT(config).eval(), Tokenizer()
    ids = tokenizer.encode(options.text)[: model.config.context_length] or [tokenizer.eot]
    print("tokens", " ".join(f"{i}={tokenizer.decode([i])!r}" for i in ids))

    def shape(tensor):
        return str(tuple(tensor.shape))

    def show(name):
        def hook(module, inputs, output):
            values = " ".join(f"{x:+.3f}" for x in output[0, -1, :4].tolist())
            print(f"{name:28} {shape(inputs[0]):16} -> {shape(output):16} {values} ...")

        return hook

    for name, module in model.named_modules():
        if name and not isinstance(module, torch.nn.ModuleList | torch.nn.Dropout):
            module.register_forward_hook(show(name))
    with torch.no_grad():
        probs = model(torch.tensor([ids]))[0, -1].softmax(-1)
    for p, i in zip(*(x.tolist() for x in probs.topk(5))):
        print(f"next {tokenizer.decode([i])!r:20} {p:.3f}")


def describe(given):
    """parameters, FLOPs and memory of a model by component"""
    options = build(Options, given)
    config = build(gpt.GPTConfig, given, **PRESETS.get(options.preset, {}))
    with torch.device("meta"):
        model = gpt.GPT(config)
    c, rows = config, {}
    for name, p in model.named_parameters():
        part = "attention" if "attention" in name else "MLP" if "mlp" in name else "embeddings"
        part = "layer norms" if "norm" in name else part
        rows[part] = rows.get(part, 0) + p.numel()
    total = sum(rows.values())
    flops = {
        "attention": 2 * 4 * c.n_layers * c.d_model**2
        + 4 * c.n_layers * c.d_model * c.context_length
    }
    flops |= {
        "MLP": 4 * c.n_layers * c.d_model * c.d_ff,
        "embeddings": 2 * c.d_model * c.vocab_size,
    }
    print(f"{'component':14} {'parameters':>14} {'share':>6} {'forward FLOPs/token':>20}")
    for part, n in rows.items():
        print(f"{part:14} {n:14,} {n / total:6.1%} {flops.get(part, 0):20,}")
    print(f"{'all':14} {total:14,} {'':6} {sum(flops.values()):20,}")
    print(f"training: {model.flops_per_token():,} FLOPs a token (6N + 12 L d T)")
    print(f"memory: {4 * total / 2**30:.2f} GiB of weights, as much of gradients, twice of AdamW")


def check(given):
    """test whatever gpt.py now holds: causality, initial loss, gradients, overfitting, ..."""
    import check_gpt

    sys.exit(check_gpt.main())


if __name__ == "__main__":
    main(
        {
            "train": (train, Options, gpt.GPTConfig, gpt.TrainConfig),
            "sample": (sample, SampleOptions),
            "trace": (trace, TraceOptions),
            "describe": (describe, Options, gpt.GPTConfig),
            "check": (check,),
        }
    )
