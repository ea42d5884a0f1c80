"""Mixture of experts: train one, watch its routers, see them collapse. README.md says more."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import charts
import convert
import generation
import moe
import numpy as np
import torch
import torch.distributed as dist
import training

from common import (
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
# What a preset changes in MoEConfig and TrainConfig. small takes 3 minutes on 2 cores; medium is
# for one GPU; 8x124m is GPT-2's size with 8 experts and the batch of its reproductions.
SMALL = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128, qk_norm=False)
SMALL |= dict(steps=850, tokens_per_step=2048, max_lr=7e-3, warmup_steps=40, eval_every=170)
SMALL |= dict(eval_tokens=20_000)
MEDIUM = dict(d_model=384, n_layers=6, n_heads=6, n_kv_heads=2, context_length=512, dropout=0.2)
MEDIUM |= dict(steps=2500, tokens_per_step=32768, max_lr=3e-3, eval_every=250, patience=4)
LARGE = dict(tokens_per_step=2**19, max_lr=2e-3, warmup_steps=300, beta2=0.95, eval_every=250)
LARGE |= dict(eval_tokens=2**20, patience=4, micro_batch=16)
PRESETS = {"small": SMALL, "medium": MEDIUM, "8x124m": LARGE}


@dataclass
class Options:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    sha256: str | None = None  # checksum of --data where that is a URL
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes
    tokens: str | None = None  # directory with train.bin, val.bin and meta.json in place of --data
    upcycle: str | None = None  # start from this dense model, a directory of 04 or 05
    preset: str = "auto"  # small, medium or 8x124m; auto: small, on a GPU medium
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class SampleOptions:
    model: str = str(OUT / "06_moe" / "latest")  # a model directory
    prompt: str = "\n"  # text to go on from
    max_new_tokens: int = 100  # length, tokens
    temperature: float = 0.7  # 0 always takes the likeliest token
    top_k: int | None = None  # draw from the k likeliest tokens
    top_p: float | None = 0.95  # draw from the likeliest tokens that make up this probability
    min_p: float | None = None  # draw from tokens with this share of the likeliest probability
    repetition_penalty: float = 1.0  # above 1: what was seen is less likely
    seed: int | None = 1  # of the draw
    stop: str | None = None  # end before this text
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class MapOptions:
    model: str = str(OUT / "06_moe" / "latest")  # a model directory
    text: str | None = None  # the passage; None: the start of the held-out plays
    to: str | None = None  # the picture; None: experts.png in the model directory


@dataclass
class CollapseOptions:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    steps: int = 300  # optimizer steps of each variant
    tokens: int = 2048  # tokens in a step
    n_experts: int = 8  # experts in each layer
    top_k: int = 1  # experts that a token uses: with one collapse is plainest
    max_lr: float = 7e-3  # learning rate after the warm-up
    seed: int = 1  # of weights and batches


def start_ranks(options, n_experts):
    """(rank, world, device, dtype, reason) of this process, which torchrun may have started with
    others: then experts are spread over them."""
    device, dtype, reason = pick_device(options.device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device, dtype, reason
    if n_experts % world:  # said before the ranks wait for one another
        raise ValueError(f"{n_experts} experts cannot be shared out over {world} ranks evenly")
    if device.type == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"torchrun started rank {local} of this machine, which has "
                f"{torch.cuda.device_count()} GPUs: lower --nproc_per_node"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), world, device, dtype, reason


def first(rank, world, function, *args):
    """function(...), on the first rank before the others, for which it finds its work done."""
    problem = [None]
    if rank == 0:
        try:
            result = function(*args)
        except (ValueError, OSError) as error:
            problem = [error]
    if world > 1:
        dist.broadcast_object_list(problem)
    if problem[0]:
        raise problem[0]
    return result if rank == 0 else function(*args)


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


def open_text(options, rank=0, world=1):
    """(tokenizer, its directory or None, token directory, training and held-out tokens, meta)."""
    newest = OUT / "01_tokenizer" / "latest"
    directory = options.tokenizer or (newest if (newest / "tokenizer.json").exists() else None)
    upcycle = getattr(options, "upcycle", None)
    if upcycle and not options.tokenizer:  # a model goes with its own tokenizer
        found = (Path(upcycle) / "tokenizer.json").exists()
        directory = upcycle if found else None
    tokenizer = Tokenizer(directory)
    if directory is None:
        print("no tokenizer given or found: working on bytes (make 01 trains one)")
    home = getattr(options, "tokens", None)
    home = home or first(rank, world, prepare_tokens, options.data, options.sha256, tokenizer)
    return tokenizer, directory, Path(home), *open_tokens(Path(home), tokenizer)


def make_model(options, given, preset, tokenizer):
    """A new MoETransformerLM, random or made of a dense model."""
    if options.upcycle is None:
        config = build(moe.MoEConfig, given, **dict(vocab_size=tokenizer.vocab_size) | preset)
        if config.vocab_size < tokenizer.vocab_size:
            raise ValueError(
                f"--vocab_size {config.vocab_size} is less than the tokenizer's "
                f"{tokenizer.vocab_size}"
            )
        return moe.MoETransformerLM(config)
    known = {field.name for field in fields(moe.MoEConfig)}
    asked = {name: value for name, value in given.items() if name in known}
    model = moe.MoETransformerLM.from_dense(options.upcycle, **asked)
    if model.config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the dense model {options.upcycle} does not fit: it knows {model.config.vocab_size} "
            f"tokens, the tokenizer {tokenizer.vocab_size}"
        )
    return model


def check_preset(name):
    if name not in (*PRESETS, "auto"):
        raise ValueError(f"--preset {name} is none of {', '.join(PRESETS)}")


def train(given):
    """train a mixture, print samples, plot loss and routing, draw which expert takes what"""
    try:
        train_rank(given)
    except (ValueError, OSError):
        if int(os.environ.get("RANK", 0)) == 0:
            raise
        sys.exit(2)  # the first rank says what is wrong
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train_rank(given):
    options = build(Options, given)
    rank, world, device, dtype, reason = start_ranks(
        options, given.get("n_experts", moe.MoEConfig.n_experts)
    )
    if rank:
        sys.stdout = open(os.devnull, "w")
    check_preset(options.preset)
    if options.upcycle and not (Path(options.upcycle) / "config.json").exists():
        raise ValueError(f"--upcycle {options.upcycle} holds no model: make 05 trains one")
    auto = "medium" if device.type == "cuda" else "small"
    name = auto if options.preset == "auto" else options.preset
    tokenizer, directory, home, train_tokens, val_tokens, meta = open_text(options, rank, world)
    preset = PRESETS[name]
    if "steps" not in preset:  # four passes over the text, at most the 10B tokens of a reproduction
        passes = 4 * len(train_tokens) // preset["tokens_per_step"]
        preset = preset | dict(steps=min(max(passes, 200), 19073))
    how = build(training.TrainConfig, given, **preset)
    torch.manual_seed(how.seed)  # the same weights on every rank
    model = make_model(options, given, preset, tokenizer)
    config = model.config
    model.spread(rank, world).to(device)
    for split, ids in (("training", train_tokens), ("held-out", val_tokens)):
        if len(ids) <= config.context_length:
            raise ValueError(
                f"the {split} text has {len(ids)} tokens, not more than context_length "
                f"{config.context_length}: take more text or a shorter context"
            )
    sequences = max(1, how.tokens_per_step // config.context_length)
    text = ([train_tokens], config.context_length, sequences, how.seed, rank, world, device)
    loader = training.TokenLoader(*text)
    rows = sequences // world
    micro = how.micro_batch = min(rows, how.micro_batch or rows)
    plan = asdict(config) | asdict(how) | dict(tokens_dir=str(home.resolve()), device=device.type)
    plan |= dict(code=sha256(Path(training.__file__).read_bytes()).hexdigest()[:8])
    plan |= dict(world=world, upcycle=options.upcycle and str(Path(options.upcycle).resolve()))
    run = SimpleNamespace(dir=None, result=None, resume=False)
    if rank == 0:
        run = Run(moe.__file__, plan, options.run, options.fresh)
    if world > 1:
        found = [(run.dir, run.result, run.resume)]
        dist.broadcast_object_list(found)
        run.dir, run.result, run.resume = found[0]
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * how.steps}, or begin again with --fresh")
    if directory:
        model.tokenizer_files = convert.tokenizer_files(Path(directory))
    torch.manual_seed(how.seed + rank)  # and dropout of its own
    total, active = model.counts()
    step_tokens, kind = sequences * config.context_length, convert.kind_of(config)
    print(f"model: {total:,} parameters, {active:,} of them active ({active / total:.0%}), {name}")
    print(
        f"experts: {config.n_experts} of width {config.d_expert} in {sum(config.sparse)} of "
        f"{config.n_layers} layers, {config.top_k} a token, {config.n_shared} shared; balance "
        f"{config.balance}, dispatch {config.dispatch}; {model.flops_per_token():,} FLOPs a token"
    )
    if kind == convert.OWN:
        print("layout: our own, as no layout of transformers has these features together")
    print(f"text: {home.name}, {len(train_tokens):,} tokens, vocabulary {tokenizer.vocab_size:,}")
    print(f"device: {device} ({reason}), {dtype}, {torch.get_num_threads()} threads")
    print(
        f"steps: {how.steps:,} of {step_tokens:,} tokens = {micro} sequences of "
        f"{config.context_length} x {-(-rows // micro)} accumulated x {world} rank(s); "
        f"{how.steps * step_tokens / len(train_tokens):.1f} passes over the text"
    )
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    bar = progress(total=how.steps, desc="step", disable=rank > 0)
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        shown = f"loss {line['train_loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
        if "load" in line:
            busiest = max(max(load) for load in line["load"]) * config.n_experts
            shown += f", busiest expert x{busiest:.1f}, balance {max(line['balance_loss']):.2f}"
            shown += f", dropped {line['dropped']:.0%}"
        bar.set_postfix_str(shown, False)
        bar.update(line["step"] - bar.n)
        if line["step"] == 10:
            minutes = how.steps * line["time"] / 10 / 60
            say(f"about {minutes:.1f} minutes in all, {peak_memory(device):.2f} GiB of memory")
        if line["val_loss"] is not None:
            say(f"step {line['step']:,}: training {line['train_loss']:.3f}, {summary(line)}")
            for text in charts.summary(line):
                say(f"  {text}")
            charts.plot_routing(run.dir)

    peak = matrix_flops(device, dtype) * (world if device.type == "cuda" else 1)
    hooks = dict(val_bytes=meta["bytes"]["val"], peak_flops=peak, on_step=on_step)
    try:
        training.train(model, loader, val_tokens, how, run, device, dtype, **hooks)
    except torch.OutOfMemoryError:
        raise ValueError(f"out of GPU memory: give a --micro_batch under {micro}") from None
    finally:
        bar.close()
    if rank == 0:
        finish(run, name, options, val_tokens, meta["bytes"]["val"], device, peak, tokenizer)


def summary(result):
    return (
        f"held out {result['val_loss']:.3f} nats per token, {result['val_bpb']:.3f} bits per byte"
    )


def finish(run, preset, options, val_tokens, val_bytes, device, peak, tokenizer):
    """Result on all held-out text, plots, map, samples, what to expect and what to try next."""
    plot_loss(run.dir)
    charts.plot_routing(run.dir)
    lines = [json.loads(line) for line in open(run.dir / "metrics.jsonl")]
    evaluated = [line for line in lines if line["val_loss"] is not None]
    best, last = min(evaluated, key=lambda line: line["val_loss"]), lines[-1]
    model = moe.MoETransformerLM.from_pretrained(run.dir, device)
    loss = training.evaluate(model, val_tokens, model.config.context_length, device=device)
    bpb, (total, active) = loss * len(val_tokens) / val_bytes / math.log(2), model.counts()
    result = dict(preset=preset, data=options.data, steps=last["step"], val_loss=loss, val_bpb=bpb)
    result |= dict(parameters=total, active=active, minutes=round(last["time"] / 60, 2))
    result |= dict(tokens_per_s=round(float(np.median([line["tokens_per_s"] for line in lines]))))
    result |= dict(peak_gib=round(peak_memory(device), 2))
    result |= dict(seed=json.load(open(run.dir / "run.json"))["config"]["seed"])
    run.finish(result)
    if options.record:
        record(result, device)
    if model.mixtures():
        tell_experts(model, tokenizer, val_tokens)
        ids = torch.from_numpy(val_tokens[: min(300, model.config.context_length)].astype(np.int64))
        charts.draw_map(model, tokenizer, ids.to(device), run.dir / "experts.png")
    length = min(120, model.config.context_length - 1)
    for i in (1, 2, 3):
        print(f"--- sample {i}")
        sample(dict(model=str(run.dir), device=device.type, seed=i, max_new_tokens=length))
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
        f"{summary(result)}. Model, loss.png, routing.png, experts.png and metrics are in "
        f'{run.dir}; next: python 06_moe/run.py sample --prompt "ROMEO:", or run.py collapse'
    )


def tell_experts(model, tokenizer, val_tokens):
    """What each expert of the first and the last mixture is best at."""
    found = charts.specialities(model, tokenizer, val_tokens[:20_000])
    for i in sorted({0, len(found) - 1}):
        print(f"mixture {i}: tokens that the expert takes first")
        for e, (share, tokens) in enumerate(found[i][:16]):
            print(f"  {e:3} {share:4.0%}  {' '.join(tokens)}")


def record(result, device):
    """Append a line to results.jsonl."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cores = f"{os.cpu_count()} CPU cores"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cores
    line = dict(commit=commit, machine=machine, command=" ".join(sys.argv)) | result
    with open(HERE / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def load(path, device):
    """(model, tokenizer) of a model directory."""
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"{path} holds no model yet: make 06 trains one, --model names another")
    model = moe.MoETransformerLM.from_pretrained(path, device).eval()
    return model, Tokenizer(path if (path / "tokenizer.json").exists() else None)


def sample(given):
    """print text that the model writes"""
    o = build(SampleOptions, given)
    device, *_ = pick_device(o.device)
    settings = dict(temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, min_p=o.min_p)
    generation.next_probs(torch.zeros(1, 2), **settings)  # says now if one makes no sense
    settings |= dict(repetition_penalty=o.repetition_penalty, seed=o.seed)
    model, tokenizer = load(o.model, device)
    ids = tokenizer.encode(o.prompt) or [tokenizer.eot]
    ends = () if tokenizer.eot is None else (tokenizer.eot,)
    stop = (o.stop,) if o.stop else ()
    print(o.prompt.lstrip("\n"), end="")
    args = (model, tokenizer, ids, o.max_new_tokens, stop, ends)
    for piece in generation.stream_text(*args, **settings):
        print(piece, end="", flush=True)
    print()


def draw(given):
    """draw which expert takes which token of a passage"""
    o = build(MapOptions, given)
    model, tokenizer = load(o.model, torch.device("cpu"))
    if not model.mixtures():
        raise ValueError(f"{o.model} is a dense model: it has no experts to draw")
    text = o.text or (corpus() / "val.txt").read_text(encoding="utf-8")[:1000]
    ids = tokenizer.encode(text)[: min(300, model.config.context_length)]
    if not ids:
        raise ValueError("--text holds no token")
    path = Path(o.to) if o.to else Path(o.model) / "experts.png"
    charts.draw_map(model, tokenizer, torch.tensor(ids), path)
    print(f"{len(ids)} tokens, {len(model.mixtures())} mixtures: {path}")


def describe(given):
    """parameters, total and active, of a model"""
    options = build(Options, given)
    check_preset(options.preset)
    preset = PRESETS["small" if options.preset == "auto" else options.preset]
    config = build(moe.MoEConfig, given, **preset)
    with torch.device("meta"):
        model = moe.MoETransformerLM(config)
    share = config.top_k / config.n_experts
    rows = {}
    for name, p in model.named_parameters():
        kinds = "experts router shared attention mlp embedding output".split()
        kind = "norms" if "norm" in name else next(k for k in kinds if k in name)
        all_of, active = rows.get(kind, (0, 0))
        used = p.numel() * share if kind == "experts" else p.numel()
        rows[kind] = (all_of + p.numel(), active + round(used))
    print(f"{'':12} {'parameters':>14} {'active':>14}")
    for kind, numbers in (rows | {"all": model.counts()}).items():
        print(f"{kind:12} {numbers[0]:14,} {numbers[1]:14,}")
    print(f"training: {model.flops_per_token():,} FLOPs a token (6 N active + 12 L d T)")


# ---- the collapse of a router, and two cures

VARIANTS = dict(none="nothing", switch="Switch loss", bias="nudged bias")


def collapse(given):
    """train without balancing, with the Switch loss and with the nudged bias; plot the loads"""
    o = build(CollapseOptions, given)
    tokenizer, _, _, train_tokens, val_tokens, meta = open_text(build(Options, dict(data=o.data)))
    bits = len(val_tokens) / meta["bytes"]["val"] / math.log(2)
    home, rows = OUT / "06_moe" / "collapse", {}
    for balance, name in VARIANTS.items():
        torch.manual_seed(o.seed)
        shape = SMALL | dict(n_experts=o.n_experts, top_k=o.top_k, d_expert=SMALL["d_model"])
        shape |= dict(balance=balance, z_weight=0.0, vocab_size=tokenizer.vocab_size)
        config = build(moe.MoEConfig, shape)
        settings = dict(steps=o.steps, max_lr=o.max_lr, seed=o.seed, eval_every=o.steps)
        how = build(training.TrainConfig, SMALL | settings | dict(tokens_per_step=o.tokens))
        model = moe.MoETransformerLM(config)
        context = config.context_length
        loader = training.TokenLoader([train_tokens], context, max(1, o.tokens // context), o.seed)
        out = home / balance
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)

        def log(out=out, **line):
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")

        bar = progress(total=o.steps, desc=name)
        run = SimpleNamespace(dir=out, resume=False, log=log)
        try:
            update = lambda line, bar=bar: bar.update(line["step"] - bar.n)  # noqa: E731
            training.train(model, loader, val_tokens, how, run, on_step=update)
        except SystemExit:
            print("(collapse begins anew next time)")
            raise
        finally:
            bar.close()
        lines = charts.routing_lines(out / "metrics.jsonl")
        load = np.array([line["load"] for line in lines[-50:]]).mean(0)  # (mixtures, E)
        entropy = -(load * np.log(load.clip(1e-9))).sum(1) / math.log(o.n_experts)
        loss = training.evaluate(model, val_tokens, context, 100_000) * bits
        used = (load > 0.1 / o.n_experts).sum(1)  # more than a tenth of an even share
        rows[name] = dict(val_bpb=loss, used=used.tolist(), busiest=load.max(1).tolist())
        rows[name] |= dict(load_entropy=entropy.tolist())
        print(
            f"{name:12} {loss:.3f} bits per byte; experts in use {used.tolist()} of "
            f"{o.n_experts}, share of the busiest {np.round(load.max(1), 2).tolist()}",
            flush=True,
        )
    charts.plot_collapse(home, VARIANTS)
    with atomic(home / "collapse.json", "w") as file:
        json.dump(rows, file, indent=1)
    print(f"collapse.png and the figures are in {home}")


if __name__ == "__main__":
    main(
        {
            "train": (train, Options, moe.MoEConfig, training.TrainConfig),
            "sample": (sample, SampleOptions),
            "map": (draw, MapOptions),
            "describe": (describe, Options, moe.MoEConfig),
            "collapse": (collapse, CollapseOptions),
        }
    )
