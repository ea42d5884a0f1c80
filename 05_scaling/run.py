"""Training at scale: train, sample, tokenise, plan on paper, checkpoints. README.md says more."""

import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import layout
import numpy as np
import planner
import scaling
import shards
import sweep
import torch
import torch.distributed as dist
import tracking
from store import CheckpointStore

from common import EOT, OUT, Run, Tokenizer, atomic, build, main, pick_device, plot_loss, progress

HERE = Path(__file__).resolve().parent
# What a preset changes in TransformerConfig and TrainConfig. tiny takes 2 minutes on 2 cores; the
# others are for GPUs: GPT-2's size with the batch of its reproductions, and 1.1B parameters that
# train on one card of 24 GB.
TINY = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128, qk_norm=False)
TINY |= dict(steps=850, tokens_per_step=2048, max_lr=7e-3, warmup_steps=40, eval_every=170)
TINY |= dict(eval_tokens=20_000, loss_chunk=512)  # 512: as much as stays in a cache
GPT2 = dict(context_length=1024, tokens_per_step=2**19, max_lr=2e-3, warmup_steps=300)
GPT2 |= dict(beta2=0.95, eval_every=250, eval_tokens=2**20, patience=4)
BILLION = GPT2 | dict(d_model=2048, n_layers=20, n_heads=16, d_ff=5632, max_lr=1e-3)
BILLION |= dict(checkpointing=True, state_dtype="bfloat16", micro_batch=16)
PRESETS = {"tiny": TINY, "gpt2-124m": GPT2, "1b-24gb": BILLION}


@dataclass
class Options:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    sha256: str | None = None  # checksum of --data where that is a URL
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes
    tokens: str | None = None  # directory or s3:// prefix of token shards, read instead of text
    skip_corrupt: bool = False  # leave damaged shards out and count them, in place of refusing
    preset: str = "auto"  # tiny, gpt2-124m or 1b-24gb; auto: tiny, on a GPU gpt2-124m
    store: str | None = None  # directory or s3://bucket/prefix of checkpoints; None: the run's own
    keep_last: int = 3  # newest checkpoints that stay
    keep_best: int = 1  # checkpoints of lowest held-out loss that stay
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class TokenizeOptions:
    to: str | None = None  # directory for the shards; None: one under out/tokens
    shard_tokens: int = 2**26  # tokens in a shard
    workers: int | None = None  # processes; None: one for each core


@dataclass
class PlanOptions:
    preset: str = "1b-24gb"  # tiny, gpt2-124m or 1b-24gb
    on: str = "rtx3090"  # rtx3090, rtx4090, a100, h100, h200 or cpu
    ranks: int = 1  # number of such devices
    mfu: float = 0.4  # share of the device's peak FLOP/s that training reaches
    tokens: float | None = None  # tokens to train on; None: 20 for each parameter
    memory: float | None = None  # GiB that one process may use; None: the device's
    price: float | None = None  # dollars an hour of one device; None: a low one of March 2026
    check: bool = False  # measure a step on this machine and compare


@dataclass
class CheckpointOptions:
    store: str = str(OUT / "05_scaling" / "latest" / "checkpoints")  # directory or s3:// prefix
    download: int | None = None  # step to fetch into --to; -1: the newest
    to: str = "checkpoint"  # where to


@dataclass
class SweepOptions:
    shapes: str = "32x2,64x3,96x3,128x4"  # d_model x n_layers of each size
    rates: str = "0.007,0.014,0.028"  # learning rates tried for each; the best counts
    budgets: str = "131072,262144,524288,1048576"  # tokens to train each on
    context: int = 128  # of all, tokens
    step: int = 2048  # tokens per step
    sweep_seed: int = 1  # of weights and batches


@dataclass
class SampleOptions:
    model: str = str(OUT / "05_scaling" / "latest")  # a model directory
    prompt: str = "\n"  # text to go on from
    max_new_tokens: int = 200  # length, tokens
    temperature: float = 0.8  # below 1: likelier tokens
    seed: int = 1  # of the draw
    device: str = "auto"  # auto, cpu, cuda or cuda:1


def start_ranks(options):
    """(rank, world, device) of this process, which torchrun may have started with others."""
    device, _, reason = pick_device(options.device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device, reason
    local = int(os.environ["LOCAL_RANK"])
    if device.type == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started rank {local} of this machine, which has "
                f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device, reason


def first(rank, world, function, *args, **kwargs):
    """function(...), on the first rank before the others, for which it finds its work done."""
    for turn in (True, False):
        if (rank == 0) == turn:
            result = function(*args, **kwargs)
        if world > 1:
            dist.barrier()
    return result


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


def settings(given, options, device, vocab_size, n_tokens=None):
    """(name of the preset, TransformerConfig, TrainConfig) of the flags given."""
    auto = "gpt2-124m" if device.type == "cuda" else "tiny"
    name = auto if options.preset == "auto" else options.preset
    if name not in PRESETS:
        raise ValueError(f"--preset {name} is none of {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if "steps" not in preset:  # four passes over the text, at most the 10B tokens of a reproduction
        passes = 4 * (n_tokens or 10**12) // preset["tokens_per_step"]
        preset = preset | dict(steps=min(max(passes, 200), 19073))
    config = build(scaling.TransformerConfig, given, **dict(vocab_size=vocab_size) | preset)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"--vocab_size {config.vocab_size} is less than the tokenizer's {vocab_size}"
        )
    return name, config, build(scaling.TrainConfig, given, **preset)


def open_store(options, run, rank):
    """The CheckpointStore of this rank, None where another keeps it for this one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    url = options.store or str(run.dir / "checkpoints")
    if (local if "://" in url else rank) > 0:
        return None
    node, nodes = 0, 1
    if "://" in url:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        node, nodes = rank // ranks, int(os.environ.get("WORLD_SIZE", 1)) // ranks
    keep = (options.keep_last, options.keep_best)
    store = CheckpointStore(url, run.dir / "staging", *keep, node, nodes)
    if options.fresh and options.store and store.latest() is not None:
        raise ValueError(f"--fresh, but {url} holds checkpoints: give another --store")
    return store


def train(given):
    """train a model, print samples, plot the loss"""
    options = build(Options, given)
    rank, world, device, reason = start_ranks(options)
    if rank:
        sys.stdout = open(os.devnull, "w")
    newest = OUT / "01_tokenizer" / "latest"
    directory = options.tokenizer or (newest if (newest / "tokenizer.json").exists() else None)
    tokenizer = Tokenizer(directory)
    if directory is None:
        print("no tokenizer given or found: working on bytes (make 01 trains one)")
    home = options.tokens or first(
        rank, world, shards.tokenize, options.data, tokenizer, sha256=options.sha256
    )
    opened = (home, tokenizer, options.skip_corrupt)
    tokens, meta = first(rank, world, shards.open_shards, *opened)
    n_tokens = sum(map(len, tokens["train"]))
    name, config, training = settings(given, options, device, tokenizer.vocab_size, n_tokens)
    val_tokens = np.concatenate(tokens["val"])
    if len(val_tokens) <= config.context_length:
        raise ValueError(
            f"the held-out text has {len(val_tokens)} tokens, not more than context_length "
            f"{config.context_length}: take more text or a shorter context"
        )
    sequences = max(1, training.tokens_per_step // config.context_length)
    text = (tokens["train"], config.context_length, sequences, training.seed, rank, world, device)
    eot = tokenizer.eot if training.whole_documents else None
    loader = scaling.TokenLoader(*text, eot=eot)
    rows = sequences // world
    kind = planner.device_name(device)
    fits = training.micro_batch or planner.largest_micro_batch(config, training, kind, world)
    micro = training.micro_batch = max(1, min(rows, fits))
    plan = asdict(config) | asdict(training) | dict(tokens_dir=str(home), device=device.type)
    run = SimpleNamespace(dir=None, result=None, resume=False)
    if rank == 0:
        run = Run(scaling.__file__, plan, options.run, options.fresh)
    if world > 1:
        found = [(run.dir, run.result)]
        dist.broadcast_object_list(found)
        run.dir, run.result = found[0]
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * training.steps}, or begin again with --fresh")
    torch.manual_seed(training.seed)  # the same weights on every rank
    model = scaling.TransformerLM(config).to(device)
    if directory:
        model.tokenizer_files = layout.tokenizer_files(Path(directory))
    torch.manual_seed(training.seed + rank)  # and dropout of its own
    store = open_store(options, run, rank)
    peak = matrix_flops(device, scaling.choose_precision(training.precision, device)[0])
    if world > 1 and device.type == "cpu":
        peak /= world  # they share the cores
    accumulated = -(-rows // micro)
    planned = planner.plan(config, training, kind, world, micro)
    n = sum(p.numel() for p in model.parameters())
    print(f"model: {n:,} parameters ({name}), {model.flops_per_token():,} FLOPs a token")
    print(f"text: {home}, {n_tokens:,} tokens in {len(tokens['train'])} shards")
    bar = progress(total=training.steps, desc="step", disable=rank > 0)
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        bar.set_postfix_str(
            f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s", False
        )
        bar.update(line["step"] - bar.n)
        if line["step"] == first_step + 10:
            minutes = (training.steps - line["step"]) * (line["time"] - began) / 10 / 60
            say(f"about {minutes:.1f} minutes left, {line['memory_gib']:.2f} GiB of memory")
        if line["val_loss"] is not None:
            say(f"step {line['step']:,}: training {line['train_loss']:.3f}, {summary(line)}")

    hooks = dict(val_bytes=meta["bytes"]["val"], peak_flops=peak * world, on_step=on_step)
    try:
        trainer = scaling.Trainer(model, loader, val_tokens, training, run, store, device, **hooks)
        first_step, began = trainer.step, trainer.seconds
        bar.update(first_step)
        threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
        print(f"device: {device} ({reason}{threads}); precision: {trainer.precision}")
        print(
            f"steps: {training.steps:,} of {sequences * config.context_length:,} tokens = {micro} "
            f"sequences of {config.context_length} x {accumulated} accumulated x {world} ranks"
            f"{f' ({training.parallel})' * (world > 1)}; "
            f"{training.steps * sequences * config.context_length / n_tokens:.1f} passes over it"
        )
        print(f"memory on paper: {planned['process'] / 2**30:.2f} GiB a process at most")
        going = f" (going on from step {first_step})" if first_step else ""
        print(f"run: {run.dir}{going}; checkpoints: {options.store or 'there'}", flush=True)
        trainer.fit()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        advice = planner.out_of_memory_advice(config, training, kind, world, micro)
        raise ValueError(
            f"out of memory with {micro} sequences at once: {advice}; the last checkpoint is kept "
            f"in {options.store or run.dir}"
        ) from None
    finally:
        bar.close()
        if store:
            store.settle()  # whatever ends a run, what it has committed stays
    if rank == 0:
        finish(run, name, options, val_tokens, meta["bytes"]["val"], device, peak, tokenizer)
    if world > 1:
        dist.destroy_process_group()


def summary(result):
    return (
        f"held out {result['val_loss']:.3f} nats per token, {result['val_bpb']:.3f} bits per byte"
    )


def finish(run, preset, options, val_tokens, val_bytes, device, peak, tokenizer):
    """Result on all held-out text, plots, samples, what to expect and what to try next."""
    plot_loss(run.dir)
    if (run.dir / "layers.jsonl").exists():
        tracking.plot_layers(run.dir / "layers.jsonl")
    lines = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
    evaluated = [line for line in lines if line["val_loss"] is not None]
    best, last = min(evaluated, key=lambda line: line["val_loss"]), lines[-1]
    model = scaling.TransformerLM.from_pretrained(run.dir, device)
    loss = scaling.evaluate(model, val_tokens, model.config.context_length, device=device)
    bpb = loss * len(val_tokens) / val_bytes / math.log(2)
    result = dict(preset=preset, data=options.data, steps=last["step"], val_loss=loss, val_bpb=bpb)
    result |= dict(minutes=round(last["time"] / 60, 2))
    result |= dict(tokens_per_s=round(float(np.median([line["tokens_per_s"] for line in lines]))))
    result |= dict(peak_gib=round(last["memory_gib"], 2))
    result |= dict(seed=json.load(open(run.dir / "run.json"))["config"]["seed"])
    run.finish(result)
    if options.record:
        record(result, device)
    for i in (1, 2, 3):
        print(f"--- sample {i}\n{write(model, tokenizer, chr(10), 120, 0.8, i)}")
    mfu = float(np.median([line["mfu"] for line in lines]))
    print(
        f"---\n{mfu * peak / 1e9:,.0f} GFLOP/s, {mfu:.0%} of a plain matrix product's "
        f"{peak / 1e9:,.0f}"
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
        f"{summary(result)}. Model, loss.png, metrics and checkpoints are in {run.dir}; next: "
        'python 05_scaling/run.py sample --prompt "ROMEO:", or --steps for more'
    )


def record(result, device):
    """Append a line to results.jsonl."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cores = f"{os.cpu_count()} CPU cores"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cores
    line = dict(commit=commit, machine=machine, command=" ".join(sys.argv)) | result
    with open(HERE / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


@torch.inference_mode()
def write(model, tokenizer, prompt, n, temperature, seed):
    """The text that a model writes after a prompt, up to an end of text. To see how far training
    is: it has no cache; 04_modern/run.py reads the same directory and is faster."""
    ids = torch.tensor([tokenizer.encode(prompt)], device=model.frequencies.device)
    generator = torch.Generator(ids.device).manual_seed(seed)
    model.eval()
    for _ in range(n):
        logits = model(ids[:, -model.config.context_length :])[:, -1].float()
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new], dim=1)
    return tokenizer.decode(ids[0].tolist()).split(EOT)[0].strip()


def sample(given):
    """print text that a model writes"""
    o = build(SampleOptions, given)
    device, *_ = pick_device(o.device)
    if not (Path(o.model) / "config.json").exists():
        raise ValueError(f"{o.model} holds no model yet: make 05 trains one, --model names another")
    if o.temperature <= 0 or o.max_new_tokens < 1 or not o.prompt:
        raise ValueError("temperature is above 0, max_new_tokens at least 1, a prompt not empty")
    found = (Path(o.model) / "tokenizer.json").exists()
    model = scaling.TransformerLM.from_pretrained(o.model, device)
    tokenizer = Tokenizer(o.model if found else None)
    print(write(model, tokenizer, o.prompt, o.max_new_tokens, o.temperature, o.seed))


def tokenize(given):
    """turn text into token shards, in parallel; a run that was stopped is gone on with"""
    options, how = build(Options, given), build(TokenizeOptions, given)
    newest = OUT / "01_tokenizer" / "latest"
    directory = options.tokenizer or (newest if (newest / "tokenizer.json").exists() else None)
    home = how.to and Path(how.to)
    args = (home, how.shard_tokens, how.workers, options.sha256)
    home = shards.tokenize(options.data, Tokenizer(directory), *args)
    tokens, meta = shards.open_shards(home)
    for split, found in tokens.items():
        n, size = sum(map(len, found)), meta["bytes"][split]
        print(f"{split}: {n:,} tokens of {size:,} bytes in {len(found)} shards")
    print(f"in {home}; next: python 05_scaling/run.py train --tokens {home}")


def plan(given):
    """parameters, memory, speed, hours and cost of training, on paper"""
    how = build(PlanOptions, given)
    cpu = torch.device("cpu")
    _, config, training = settings(given, how, cpu, 50304 if "vocab_size" not in given else 0)
    flops = matrix_flops(cpu, torch.float32) if how.on == "cpu" else None
    numbers = (how.mfu, how.tokens, how.memory, how.price, flops)
    print(planner.format_plan(planner.plan(config, training, how.on, how.ranks, None, *numbers)))
    if how.on in ("rtx3090", "rtx4090"):
        print("\n" + planner.explain_1b(how.on))
    if how.check:
        check(config, training)


def check(config, training):
    """Compare the planned memory of a step with what is measured on this machine."""
    device, *_ = pick_device()
    kind = planner.device_name(device)
    micro = min(
        training.micro_batch or 4, max(1, training.tokens_per_step // config.context_length)
    )
    training.tokens_per_step, training.micro_batch = micro * config.context_length, micro
    model = scaling.TransformerLM(config).to(device)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 4 * training.tokens_per_step)
    loader = scaling.TokenLoader([tokens], config.context_length, micro, device=device)
    trainer = scaling.Trainer(model, loader, tokens, training, None, None, device)
    trainer.train_step()
    states = [x for s in trainer.optimizer.state.values() for x in s.values() if torch.is_tensor(x)]
    held = [*model.parameters(), *model.buffers(), *states]
    measured = planner.measured_peak(trainer.train_step, held, device)
    loader.close()
    planned = planner.peak_bytes(config, training, kind, 1, micro)
    print(
        f"\nmeasured here with {micro} sequences: {measured / 2**20:,.1f} MiB of tensors at most, "
        f"planned {planned / 2**20:,.1f} ({planned / measured - 1:+.1%})"
    )


def run_sweep(given):
    """train several sizes, learning rates and budgets; fit the scaling law to them"""
    options, how = build(Options, given), build(SweepOptions, given)
    try:
        shapes = [tuple(map(int, shape.split("x"))) for shape in how.shapes.split(",")]
        rates, budgets = ([float(x) for x in y.split(",")] for y in (how.rates, how.budgets))
        assert min(map(len, shapes)) == max(map(len, shapes)) == 2 and min(rates + budgets) > 0
    except (ValueError, AssertionError):
        raise ValueError(
            "--shapes is like 64x3,128x4, --rates like 0.005,0.01, --budgets like 100000,200000"
        ) from None
    newest = OUT / "01_tokenizer" / "latest"
    directory = options.tokenizer or (newest if (newest / "tokenizer.json").exists() else None)
    tokenizer = Tokenizer(directory)
    home = options.tokens or shards.tokenize(options.data, tokenizer, sha256=options.sha256)
    tokens, meta = shards.open_shards(home, tokenizer, options.skip_corrupt)
    val_tokens, out = np.concatenate(tokens["val"]), OUT / "05_scaling" / "sweep"
    out.mkdir(parents=True, exist_ok=True)
    base = dict(text=Path(home).name, context_length=how.context, tokens_per_step=how.step)
    base |= dict(seed=how.sweep_seed, optimizer="muon", schedule="wsd", compile=False)
    where = out / "runs.jsonl"
    print(f"{len(shapes) * len(rates) * len(budgets)} runs; those in {where} are not done again")
    args = (shapes, rates, budgets, base, tokens["train"], val_tokens, tokenizer.vocab_size, where)
    rows = sweep.sweep(*args, say=lambda text: print(text, flush=True))
    points = sweep.best(rows)
    print(
        "\n| N | D | best learning rate | nats per token | bits per byte |\n" + "| --- " * 5 + "|"
    )
    bits = len(val_tokens) / meta["bytes"]["val"] / math.log(2)
    for r in points:
        cells = f"{r['N']:,} | {r['D']:,} | {r['key']['max_lr']:g} | {r['loss']:.4f}"
        print(f"| {cells} | {r['loss'] * bits:.4f} |")
    law = sweep.fit(*([r[k] for r in points] for k in ("N", "D", "loss")))
    terms = ", ".join(f"{k} = {law[k][0]:.4g} ± {law[k][1]:.2g}" for k in "EABab")
    share, error = law["split"]
    print(f"\nL(N, D) = E + A / N^a + B / D^b: {terms}; residuals {law['rms']:.4f} nats")
    print(f"best split of a budget C: N grows with C^{share:.2f} ± {error:.2f}")
    sweep.plot(rows, law, out / "sweep.png")
    with atomic(out / "law.json", "w") as file:
        json.dump(law, file, indent=1)
    if options.record:
        values = {k: "{:.3g} ± {:.2g}".format(*law[k]) for k in ("E", "A", "B", "a", "b", "split")}
        record(dict(data=options.data, runs=len(rows), **values), torch.device("cpu"))
    print(f"runs, law.json and sweep.png are in {out}")


def checkpoints(given):
    """list the checkpoints of a store, or download one"""
    o = build(CheckpointOptions, given)
    if "://" not in o.store and not Path(o.store).is_dir():
        raise ValueError(f"--store {o.store}: there is no such directory")
    store = CheckpointStore(o.store, OUT / "05_scaling" / "downloads", writer=False)
    if o.download is not None:
        found = store.download(None if o.download < 0 else o.download)
        shutil.copytree(found, o.to)
        return print(f"{found.name} is in {o.to}")
    for row in store.list():
        loss = "" if row["metric"] is None else f", held out {row['metric']:.4f}"
        print(f"{row['name']}: {row['bytes'] / 2**20:,.1f} MiB{loss}")


if __name__ == "__main__":
    models = (scaling.TransformerConfig, scaling.TrainConfig)
    main(
        {
            "train": (train, Options, *models),
            "sample": (sample, SampleOptions),
            "tokenize": (tokenize, Options, TokenizeOptions),
            "plan": (plan, PlanOptions, *models),
            "checkpoints": (checkpoints, CheckpointOptions),
            "sweep": (run_sweep, Options, SweepOptions),
        }
    )
