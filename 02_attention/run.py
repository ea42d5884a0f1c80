"""Attention variants: what each costs in memory and time, and what a model loses by it; README.md
says more."""

import contextlib
import copy
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import attention
import safetensors
import safetensors.torch
import torch
from attention import (
    Cache,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    SlidingWindowAttention,
)
from einops import repeat
from matplotlib.figure import Figure
from torch import nn
from torch.nn import functional as F

from common import OUT, Run, Tokenizer, atomic, build, corpus, main, pick_device, progress

HERE = Path(__file__).resolve().parent
HOME = OUT / "02_attention"


@dataclass
class MeasureOptions:
    d_model: int = 256  # width of the tokens
    n_heads: int = 8  # query heads
    n_kv_heads: int = 2  # key heads of gqa
    kv_rank: int | None = None  # latent width of mla; None: 4 head dims
    window: int = 256  # tokens that the sliding window sees
    sinks: int = 4  # first tokens that it sees as well
    min_context: int = 256  # shortest context, tokens; doubled up to the longest
    max_context: int = 8192  # longest context, tokens
    repeats: int = 3  # timed runs of each, the median counts; one run where it takes over 2 s
    seed: int = 1  # of weights and inputs
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class HeatOptions:
    text: str = "To be, or not to be: that is the question."  # the sentence to look at
    model: str = str(OUT / "03_gpt" / "latest")  # a GPT-2 directory in Hugging Face's layout


@dataclass
class QualityOptions:
    variants: str = "all"  # or some of mha-learned,mha-sinusoidal,mha,gqa,mqa,mla,window
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes
    d_model: int = 128  # width of the model
    n_layers: int = 4  # blocks
    n_heads: int = 4  # query heads
    n_kv_heads: int = 2  # key heads of gqa
    kv_rank: int | None = None  # latent width of mla; None: 4 head dims
    context_length: int = 128  # tokens in a sequence
    window: int = 32  # tokens that the sliding window sees
    sinks: int = 4  # first tokens that it sees as well
    steps: int = 240  # optimizer steps of each run
    tokens_per_step: int = 1024  # batch size, tokens
    max_lr: float = 2e-3  # learning rate after the warm-up, falling to 0
    seeds: int = 2  # runs of each variant, with seeds 1, 2, ...
    eval_tokens: int = 100_000  # held-out tokens that count, from the start
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    fresh: bool = False  # train again what an earlier call with these settings has trained
    record: bool = False  # append a line for each variant to results.jsonl


def variants(o, kernel="fused"):
    """{name: function that makes the layer}, all with rotary positions."""
    shape, theta = (o.d_model, o.n_heads), 10_000.0
    window = dict(window=o.window, sinks=o.sinks, kernel=kernel)
    return {
        "mha": lambda: MultiHeadAttention(*shape, theta, kernel),
        "gqa": lambda: GroupedQueryAttention(*shape, o.n_kv_heads, theta, kernel),
        "mqa": lambda: GroupedQueryAttention(*shape, 1, theta, kernel),
        "mla": lambda: MultiHeadLatentAttention(*shape, o.kv_rank, kernel=kernel),
        "window": lambda: SlidingWindowAttention(*shape, **window),
    }


def check(makes):
    """Bad sizes are refused here, before anything runs."""
    with torch.device("meta"):
        for make in makes.values():
            make()


# ---- measure


@contextlib.contextmanager
def quiet():
    """Without what C++ writes to stderr: PyTorch's profiler announces itself there."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(null)


def peak_bytes(function, device):
    """The most that `function` had allocated at once, on top of what was there before.

    On a CPU the profiler's list of all allocations and releases of PyTorch's allocator, added up:
    exact, the same each time, and it sees what kernels allocate inside. The size of the process
    would show what the allocator keeps for later, too."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with quiet(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def median_ms(function, repeats, device):
    """Median time of `function` in ms, after one run that does not count unless it is slow."""
    times = []
    for i in range(repeats + 1):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
        if times[-1] > 2000:
            break
    return statistics.median(times[1:] or times)


def forked(cache):
    """A cache that can be written to without changing this one: its tensors are never changed."""
    other = copy.copy(cache)
    other.kept = dict(cache.kept)
    return other


def reference(module, x):
    """The plain formula in float64 with the module's weights: each head its own keys, one mask."""
    module, x = copy.deepcopy(module).double(), x.double()
    heads = getattr(module, "heads", module)
    q, *rest = heads.project(x)
    k, v = module.expand(*rest) if isinstance(module, MultiHeadLatentAttention) else rest
    k, v = (repeat(y, "B G T D -> B (G n) T D", n=q.shape[1] // y.shape[1]) for y in (k, v))
    at = torch.arange(x.shape[1], device=x.device)
    window = getattr(module, "window", x.shape[1])
    see = attention.window_mask(at, at, window, getattr(module, "sinks", 0))
    y = attention.scaled_dot_product_attention(q, k, v, see)  # (B, H, T, D)
    return heads.out(y.transpose(1, 2).flatten(2))


@torch.no_grad()
def measure_variant(make, o, device, lengths, tick):
    """Sizes, difference from the formula, and time and memory at each context."""
    torch.manual_seed(o.seed)
    module = make().to(device)
    for p in module.parameters():
        if p.ndim == 2:  # large enough for attention that is far from even
            nn.init.normal_(p, std=p.shape[1] ** -0.5)
    x = torch.randn(1, lengths[-1] + 1, o.d_model, device=device)
    short = x[:, : min(512, lengths[-1])]
    row = dict(parameters=sum(p.numel() for p in module.parameters()), contexts={})
    row["difference"] = (module(short) - reference(module, short)).abs().max().item()
    cache = Cache()
    module(x[:, :1], cache)
    row["cache_bytes_per_token"] = cache.nbytes()
    if cache.nbytes() != module.cache_numbers * x.element_size():
        raise ValueError("the cache does not hold what the formula says")
    cache = Cache()
    for T in lengths:
        for piece in x[:, cache.length : T].split(256, dim=1):
            module(piece, cache)
        values = dict(cache_bytes=cache.nbytes())
        step = x[:, T : T + 1]
        values["decode_ms"] = median_ms(lambda: module(step, forked(cache)), 5, device)  # noqa: B023
        values["decode_bytes"] = peak_bytes(lambda: module(step, forked(cache)), device)  # noqa: B023
        values["forward_ms"] = median_ms(lambda: module(x[:, :T]), o.repeats, device)  # noqa: B023
        values["peak_bytes"] = peak_bytes(lambda: module(x[:, :T]), device)  # noqa: B023
        row["contexts"][T] = values
        tick(T)
    return row


# Published shapes (heads, key heads, head dim; latent and rotary widths for MLA).
PUBLISHED = {
    "Llama 2 7B, multi-head": lambda: MultiHeadAttention(4096, 32),
    "Llama 3 8B, grouped-query": lambda: GroupedQueryAttention(4096, 32, 8),
    "Llama 3 70B, grouped-query": lambda: GroupedQueryAttention(8192, 64, 8),
    "DeepSeek-V2 with multi-head": lambda: MultiHeadAttention(128 * 128, 128),
    "DeepSeek-V2 with 8 key heads": lambda: GroupedQueryAttention(128 * 128, 128, 8),
    "DeepSeek-V2, latent": lambda: MultiHeadLatentAttention(
        5120, 128, 512, 1536, head_dim=128, rope_dim=64, v_dim=128
    ),
}


def measure(given):
    """cache, memory and time of each variant against context; plots; heat maps"""
    o = build(MeasureOptions, given)
    device, _, reason = pick_device(o.device, o.seed)
    if not 1 <= o.min_context <= o.max_context:
        raise ValueError(f"--min_context {o.min_context} is not in 1 to {o.max_context}")
    if o.repeats < 1:
        raise ValueError(f"--repeats {o.repeats} is less than 1")
    fused = variants(o)  # and multi-head attention in all three kernels
    makes = {f"mha {kernel}": variants(o, kernel)["mha"] for kernel in attention.KERNELS[:2]}
    makes |= {"mha fused": fused.pop("mha")} | fused
    check(makes)
    lengths = [o.min_context]
    while 2 * lengths[-1] <= o.max_context:
        lengths.append(2 * lengths[-1])
    print(f"device: {device} ({reason}), float32, {torch.get_num_threads()} threads, batch 1")
    print(
        f"layer: d_model {o.d_model}, {o.n_heads} heads, {o.n_kv_heads} key heads in gqa, "
        f"window {o.window} with {o.sinks} sinks; contexts {lengths}",
        flush=True,
    )
    bar, rows = progress(total=len(makes) * len(lengths), desc="measured"), {}
    for name, make in makes.items():

        def tick(T, name=name):
            bar.set_postfix_str(f"{name}, context {T}", False)
            bar.update()

        rows[name] = measure_variant(make, o, device, lengths, tick)
    bar.close()
    long = lengths[-1]
    print(f"\n{'':12}{'cache':>8}{'less':>7}{'cache at':>10}{'para-':>9}{'differ-':>9}")
    print(f"{'':12}{'B/token':>8}{'':7}{long:>6} MiB{'meters':>9}{'ence':>9}")
    whole = rows["mha fused"]["cache_bytes_per_token"]
    for name, row in rows.items():
        size = row["cache_bytes_per_token"]
        kept = row["contexts"][long]["cache_bytes"] / 2**20
        print(f"{name:12}{size:8,}{whole / size:6.2f}x{kept:10.2f}{row['parameters']:9,}", end="")
        print(f"{row['difference']:9.0e}")
    for key, title, unit in (
        ("peak_bytes", "peak memory of a forward pass, MiB", 2**20),
        ("forward_ms", "time of a forward pass, ms", 1),
        ("decode_bytes", "peak memory of decoding one more token, MiB (copies the cache)", 2**20),
        ("decode_ms", "time of decoding one more token, ms", 1),
    ):
        print(f"\n{title}\n{'context':12}" + "".join(f"{T:>9,}" for T in lengths))
        for name, row in rows.items():
            cells = (row["contexts"][T][key] / unit for T in lengths)
            print(f"{name:12}" + "".join(f"{cell:9,.{1 if cell > 10 else 2}f}" for cell in cells))
    print("\nnumbers in the cache for a token and layer, published shapes")
    for name, make in PUBLISHED.items():
        with torch.device("meta"):
            print(f"{name:30}{make().cache_numbers:8,}")
    with atomic(HOME / "measure.json", "w") as file:
        json.dump(dict(options=asdict(o), device=str(device), rows=rows), file, indent=1)
    plot_measured(rows, lengths)
    print(f"\n{HOME / 'measure.json'} and measure.png hold these")
    heat({})


def plot_measured(rows, lengths):
    """measure.png: memory, time and cache against context."""
    figure = Figure(figsize=(15, 4.8))
    panels = figure.subplots(1, 3)
    for axes, key, title, unit in zip(
        panels,
        ("peak_bytes", "forward_ms", "cache_bytes"),
        ("peak memory of a forward pass (MiB)", "time of a forward pass (ms)", "cache (MiB)"),
        (2**20, 1, 2**20),
    ):
        for i, (name, row) in enumerate(rows.items()):
            if key == "cache_bytes" and i < 2:
                continue  # the kernel does not change the cache
            values = [row["contexts"][T][key] / unit for T in lengths]
            axes.plot(lengths, values, "osD^vPX"[i % 7] + "-", color=f"C{i}", label=name, ms=5)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{T:,}" for T in lengths], minor=False)
        axes.set(xlabel="context (tokens)", title=title)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.subplots_adjust(bottom=0.27, wspace=0.22)
    figure.savefig(HOME / "measure.png", dpi=120, bbox_inches="tight")


# ---- heat maps


@torch.no_grad()
def gpt2_weights(path, ids):
    """Attention weights of a GPT-2 in Hugging Face's layout: for each layer (H, T, T)."""
    try:
        config = json.loads((path / "config.json").read_text())
        w = safetensors.torch.load_file(path / "model.safetensors")
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a whole model directory: {error}") from None
    if config.get("model_type") != "gpt2":
        raise ValueError(f"{path} holds a {config.get('model_type')}, not a GPT-2")
    w = {name.removeprefix("transformer."): tensor for name, tensor in w.items()}
    gelu = "tanh" if config["activation_function"].startswith("gelu_") else "none"

    def norm(x, name):
        eps = config["layer_norm_epsilon"]
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def linear(x, name):  # Hugging Face keeps GPT-2's matrices as (d_in, d_out)
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    ids = torch.tensor(ids[: config["n_positions"]])
    T, result = len(ids), []
    x = w["wte.weight"][ids] + w["wpe.weight"][:T]  # (T, C)
    for i in range(config["n_layer"]):
        qkv = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (config["n_head"], -1)).transpose(0, 1) for y in qkv)
        weights = attention.attention_weights(q, k, attention.causal_mask(T, T))  # (H, T, T)
        result.append(weights)
        x = x + linear((weights @ v).transpose(0, 1).flatten(1), f"h.{i}.attn.c_proj")
        y = F.gelu(linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc"), approximate=gelu)
        x = x + linear(y, f"h.{i}.mlp.c_proj")
    return result


def heat(given):
    """heat maps of the attention weights of each head, of a trained GPT where there is one"""
    o = build(HeatOptions, given)
    path = Path(o.model)
    if not o.text:
        raise ValueError("--text is empty: give a sentence")
    if (path / "config.json").exists():
        tokenizer = Tokenizer(path if (path / "tokenizer.json").exists() else None)
        ids = tokenizer.encode(o.text)[:48]
        layers = gpt2_weights(path, ids)
    else:
        print(f"no model in {path}: weights of a small random one (make 03 trains one)")
        tokenizer, module = Tokenizer(), MultiHeadAttention(32, 4, theta=10_000.0)
        ids = tokenizer.encode(o.text)[:48]
        torch.manual_seed(1)
        for p in module.parameters():
            nn.init.normal_(p, std=0.3)
        with torch.no_grad():
            q, k, _ = module.project(torch.randn(257, 32)[torch.tensor(ids)][None])
            see = attention.causal_mask(len(ids), len(ids))
            layers = list(attention.attention_weights(q, k, see))
    labels = [tokenizer.decode([i]).replace(" ", "\u00b7").replace("\n", "\\n") for i in ids]
    rows, columns = len(layers), layers[0].shape[0]
    side = max(2.2, 0.16 * len(ids))  # inches: room for a label a token
    figure = Figure(figsize=(side * columns + 1.4, side * rows + 1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for i, j in ((i, j) for i in range(rows) for j in range(columns)):
        image = panels[i][j].imshow(layers[i][j], vmin=0, vmax=1, cmap="viridis")
        panels[i][j].set_title(f"layer {i + 1}, head {j + 1}", fontsize=9)
        panels[i][j].set_xticks(range(len(ids)), labels, rotation=90, fontsize=7)
        panels[i][j].set_yticks(range(len(ids)), labels, fontsize=7)
    figure.supxlabel("token looked at")
    figure.supylabel("token that looks")
    figure.colorbar(image, ax=panels, label="attention weight", shrink=0.6)
    with atomic(HOME / "heat.png") as file:
        figure.savefig(file, format="png", dpi=110)
    print(f"{HOME / 'heat.png'}: weights of {rows} x {columns} heads over {len(ids)} tokens")


# ---- quality


class Block(nn.Module):
    """Attention, then an MLP, each on the normalised stream and added back to it."""

    def __init__(self, d_model, layer):
        super().__init__()
        up, down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        self.norm1, self.attention = nn.LayerNorm(d_model), layer
        self.norm2, self.mlp = nn.LayerNorm(d_model), nn.Sequential(up, nn.GELU(), down)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # (B, T, C)


class LanguageModel(nn.Module):
    """The same for all variants but for the attention layer and how positions get in: "learned",
    "sinusoidal" or, inside the layer, "rotary"."""

    def __init__(self, o, vocab_size, make, positions):
        super().__init__()
        self.embedding = attention.Embedding(vocab_size, o.d_model)
        self.positions = nn.Identity()
        if positions == "learned":
            self.positions = attention.LearnedPositions(o.context_length, o.d_model)
        # Sinusoids as large as the token embedding at the start, or the tokens would drown in them.
        size = 0.02 * math.sqrt(2) if positions == "sinusoidal" else 0.0
        table = size * attention.sinusoidal_positions(o.context_length, o.d_model)
        self.register_buffer("table", table)
        self.blocks = nn.Sequential(*(Block(o.d_model, make()) for _ in range(o.n_layers)))
        self.norm = nn.LayerNorm(o.d_model)

    def forward(self, ids, targets):
        """int64 (B, T) and (B, T) to the sum of the losses in nats."""
        x = self.positions(self.embedding(ids)) + self.table[: ids.shape[1]]
        logits = self.norm(self.blocks(x)) @ self.embedding.weight.T  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def train_one(o, make, positions, seed, train, val, vocab_size, device, tick):
    """Train one model; returns it, its median rate in tokens/s and the held-out nats in all."""
    torch.manual_seed(seed)
    model = LanguageModel(o, vocab_size, make, positions).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), o.max_lr, (0.9, 0.99), weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)  # the same batches for each variant
    T, seconds = o.context_length, []
    shape, steps = (max(1, o.tokens_per_step // T), 1), torch.arange(T + 1)
    for step in range(1, o.steps + 1):
        began = time.perf_counter()
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 1) / o.steps))
        optimizer.param_groups[0]["lr"] = o.max_lr * min(step / 20, cosine)
        windows = train[torch.randint(len(train) - T, shape, generator=generator) + steps]
        windows = windows.to(device)  # (B, T + 1)
        loss = model(windows[:, :-1], windows[:, 1:]) / (shape[0] * T)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tick(loss.item())  # which waits for a GPU, too
        seconds.append(time.perf_counter() - began)
    with torch.no_grad():
        pairs = zip(val[:-1].view(-1, T).split(32), val[1:].view(-1, T).split(32))
        nats = sum(model(x.to(device), y.to(device)).item() for x, y in pairs)
    return model, shape[0] * T / statistics.median(seconds), nats


def peak_memory(device):
    """Largest memory so far in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def quality(given):
    """each variant in the same small language model: held-out bits per byte at equal tokens"""
    o = build(QualityOptions, given)
    device, _, reason = pick_device(o.device)
    for name in ("seeds", "steps", "n_layers", "context_length", "tokens_per_step", "eval_tokens"):
        if getattr(o, name) < 1:
            raise ValueError(f"--{name} is {getattr(o, name)}: it must be at least 1")
    makes = variants(o)
    makes |= {f"mha-{p}": unrotated(o) for p in ("learned", "sinusoidal")}
    order = "mha-learned mha-sinusoidal mha gqa mqa mla window".split()
    names = order if o.variants == "all" else o.variants.split(",")
    if set(names) - set(order):
        raise ValueError(f"--variants {o.variants}: choose from {','.join(order)}")
    check(makes)
    newest = OUT / "01_tokenizer" / "latest"
    directory = o.tokenizer or (newest if (newest / "tokenizer.json").exists() else None)
    tokenizer, text, T = Tokenizer(directory), corpus(o.data), o.context_length
    if directory is None:
        print("no tokenizer given or found: working on bytes (make 01 trains one)")
    train, val = (
        torch.tensor(tokenizer.encode((text / f"{split}.txt").read_text(encoding="utf-8")))
        for split in ("train", "val")
    )
    val = val[: min(o.eval_tokens, len(val) - 1) // T * T + 1]  # whole windows and one target more
    if len(train) <= T or len(val) <= T:
        raise ValueError(f"the text is shorter than context_length {T}: take more text")
    n_bytes = sum(len(tokenizer.tokens[i]) for i in val[1:].tolist())
    tokens = o.steps * max(1, o.tokens_per_step // T) * T
    print(f"device: {device} ({reason}), float32, {torch.get_num_threads()} threads")
    print(f"text: {text.name}, {len(train):,} tokens, vocabulary {tokenizer.vocab_size:,}")
    print(
        f"model: {o.n_layers} layers, d_model {o.d_model}, {o.n_heads} heads, context {T}; each of "
        f"{len(names)} variants x {o.seeds} seeds sees {tokens:,} tokens, is held to {n_bytes:,} "
        "bytes",
        flush=True,
    )
    plan = {k: v for k, v in asdict(o).items() if k not in ("variants", "seeds", "fresh", "record")}
    plan |= dict(text=text.name, tokenizer=tokenizer.hash, steps_of_each=o.steps)
    plan["code"] = zlib.crc32(Path(__file__).read_bytes())  # the model and its training are here
    run = Run(attention.__file__, plan, "quality", o.fresh)
    log = run.dir / "metrics.jsonl"
    done = [json.loads(line) for line in open(log)] if log.exists() else []
    done = {(line["variant"], line["seed"]): line for line in done}
    pairs = [(seed, name) for seed in range(1, o.seeds + 1) for name in names]
    todo = [(seed, name) for seed, name in pairs if (name, seed) not in done]
    if len(todo) < len(pairs):
        print(f"{len(pairs) - len(todo)} of {len(pairs)} are in {run.dir} already (--fresh: again)")
    bar = progress(total=len(todo) * o.steps, desc="step")
    for seed, name in todo:  # in turn, so that a slower minute does not fall on one variant

        def tick(loss, what=f"{name}, seed {seed}"):
            bar.set_postfix_str(f"{what}, loss {loss:.3f}", False)
            bar.update()

        began = time.perf_counter()
        positions = name.partition("-")[2] or "rotary"
        args = (seed, train, val, tokenizer.vocab_size, device, tick)
        model, rate, nats = train_one(o, makes[name], positions, *args)
        if not math.isfinite(nats):
            raise ValueError(f"{name}, seed {seed}: the loss is {nats}: lower --max_lr")
        layer, line = model.blocks[0].attention, dict(variant=name, seed=seed)
        line |= dict(val_bpb=nats / n_bytes / math.log(2), tokens_per_s=rate)
        kept = layer.sinks + layer.window if name == "window" else T
        size = 4 * layer.cache_numbers * o.n_layers
        line |= dict(cache_bytes_per_token=size, cache_bytes_at_context=size * min(T, kept))
        line |= dict(parameters=sum(p.numel() for p in model.parameters()))
        line |= dict(minutes=(time.perf_counter() - began) / 60, peak_gib=peak_memory(device))
        run.log(**line)
        done[name, seed] = line
    bar.close()
    print(f"\n{'':16}{'cache':>8}{'cache at':>10}{'para-':>11}{'':>10}{'held-out bits':>18}")
    print(f"{'':16}{'B/token':>8}{T:>6} KiB{'meters':>11}{'tokens/s':>10}{'per byte':>18}")
    rows = {}
    for name in names:
        lines = [done[name, seed] for seed in range(1, o.seeds + 1)]
        bpb = [line["val_bpb"] for line in lines]
        row = rows[name] = lines[0] | dict(val_bpb=statistics.mean(bpb), bpb=bpb)
        row["spread"] = (max(bpb) - min(bpb)) / 2
        row["tokens_per_s"] = round(statistics.median(line["tokens_per_s"] for line in lines))
        row["minutes"] = round(sum(line["minutes"] for line in lines), 2)
        print(f"{name:16}{row['cache_bytes_per_token']:8,}", end="")
        print(f"{row['cache_bytes_at_context'] / 1024:10,.0f}{row['parameters']:11,}", end="")
        print(f"{row['tokens_per_s']:10,}{row['val_bpb']:10.4f} \u00b1 {row['spread']:.4f}")
    with atomic(run.dir / "quality.json", "w") as file:
        json.dump(dict(options=asdict(o), bytes=n_bytes, rows=rows), file, indent=1)
    plot_quality(rows, run.dir)
    print(f"\n{run.dir / 'quality.json'} and quality.png hold these")
    if o.record:
        record(o, rows, device)


def unrotated(o):
    return lambda: MultiHeadAttention(o.d_model, o.n_heads, None, "fused")


def plot_quality(rows, home):
    """quality.png: held-out bits per byte of each variant against the size of its cache."""
    axes = (figure := Figure(figsize=(7.5, 4.8))).subplots()
    for i, (name, row) in enumerate(rows.items()):
        size = row["cache_bytes_at_context"] / 1024
        style = dict(fmt="osD^vPX"[i % 7], color=f"C{i}", capsize=4, ms=8)
        axes.errorbar(size, row["val_bpb"], row["spread"], label=name, **style)
    axes.set(xlabel="cache at the end of the context (KiB)", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(home / "quality.png", dpi=120, bbox_inches="tight")


def record(o, rows, device):
    """A line for each variant in results.jsonl."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cpu = f"{os.cpu_count()} CPU cores"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    how = dict(commit=commit, machine=machine, command=" ".join(sys.argv))
    with open(HERE / "results.jsonl", "a") as file:
        for row in rows.values():
            keys = "variant cache_bytes_per_token parameters tokens_per_s val_bpb spread minutes"
            line = how | {key: row[key] for key in keys.split()}
            line |= dict(steps=o.steps, max_lr=o.max_lr, seed=f"1 to {o.seeds}")
            line["peak_gib"] = round(row["peak_gib"], 2)
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(
        {
            "measure": (measure, MeasureOptions),
            "heat": (heat, HeatOptions),
            "quality": (quality, QualityOptions),
        }
    )
