"""What a training run will need, on paper: memory part by part, tokens/s, hours and dollars.

What it teaches: where the memory of a training step goes and when there is most of it. The figures
are added up from the shapes in scaling.py, tensor by tensor as autograd keeps them, and hold within
10% of what is measured on a CPU (test_planner.py; `run.py plan --check` on the machine at hand). A
compiled model keeps less, so that for GPUs they are on the safe side.

Parent: none
New: everything

Papers
- FLOPs a token: Chowdhery et al. 2022, arXiv 2204.02311, appendix B
- 20 tokens for each parameter: Hoffmann et al. 2022, arXiv 2203.15556
- Checkpointed activations: Chen et al. 2016, arXiv 1604.06174

Letters: C = d_model, D head dim, H heads, K heads of keys and values, F = d_ff, V vocab, T time.
"""

import copy
import math
import os

import torch

GIB = 2**30
# memory: GiB that one process can have, what the driver reports less what it keeps and a desktop
# takes; flops: bfloat16 FLOP/s of the tensor cores, summed in float32, dense (data sheets print
# twice that, with sparsity); bandwidth: bytes/s of memory; price: dollars an hour, the low end of
# RunPod's list of March 2026: others ask 2 to 3 times as much.
DEVICES = {
    # NVIDIA's GA102 whitepaper, appendix A: 24 GB, 71 TFLOP/s, 936 GB/s
    "rtx3090": dict(memory=22.5, flops=71e12, bandwidth=936e9, price=0.22),
    # NVIDIA's Ada whitepaper, appendix A: 24 GB, 165.2 TFLOP/s, 1,008 GB/s
    "rtx4090": dict(memory=22.5, flops=165.2e12, bandwidth=1008e9, price=0.34),
    # NVIDIA's A100 data sheet, 80 GB SXM: 312 TFLOP/s, 2,039 GB/s
    "a100": dict(memory=78.0, flops=312e12, bandwidth=2039e9, price=1.39),
    # NVIDIA's H100 data sheet, SXM: 80 GB, 1,979 TFLOP/s with sparsity, 3.35 TB/s
    "h100": dict(memory=78.0, flops=989e12, bandwidth=3.35e12, price=2.69),
    # NVIDIA's H200 data sheet, SXM: 141 GB (of 10^9 bytes), 1,979 with sparsity, 4.8 TB/s
    "h200": dict(memory=128.0, flops=989e12, bandwidth=4.8e12, price=3.59),
    # This machine, which costs nothing more: its FLOP/s are measured and passed in.
    "cpu": dict(memory=None, flops=None, bandwidth=None, price=0.0),
}
# On top of the tensors: the CUDA context, cuBLAS's workspace and loaded kernels, and blocks that
# the allocator has cut so that nothing fits.
CONTEXT, FRAGMENTS = 0.8 * GIB, 1.06


def device_name(device):
    """The name in DEVICES of a torch.device, "cuda" for a GPU that is not in it."""
    if device.type != "cuda":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    return next((known for known in DEVICES if known in name), "cuda")


def about(device):
    """The entry of DEVICES; ValueError where there is none."""
    if device == "cpu":
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return DEVICES["cpu"] | dict(memory=size / GIB)
    if device == "cuda" and torch.cuda.is_available():
        size = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        return dict(memory=0.94 * size / GIB, flops=None, bandwidth=None, price=0.0)
    if device not in DEVICES:
        raise ValueError(f"device {device} is none of {', '.join(DEVICES)}")
    return DEVICES[device]


def changed(config, **values):
    """A copy with other values, whatever its class."""
    config = copy.copy(config)
    vars(config).update(values)
    return config


# ---- counting parameters


def parameters(c):
    """({name: (rows, columns, parts)} of a block's matrices, numbers in a block's vectors, shapes
    outside of the blocks); parts are those that Muon orthogonalises each alone."""
    D = c.d_model // c.n_heads
    heads = [c.n_heads * D, c.n_kv_heads * D, c.n_kv_heads * D]
    matrices = dict(
        qkv=(sum(heads), c.d_model, heads),
        out=(c.d_model, c.d_model, [c.d_model]),
        gate_up=(2 * c.d_ff, c.d_model, [c.d_ff, c.d_ff]),
        down=(c.d_model, c.d_ff, [c.d_model]),
    )
    outside = [(c.vocab_size, c.d_model)] * (1 if c.tie_embeddings else 2) + [(c.d_model,)]
    return matrices, 2 * c.d_model + (2 * D if c.qk_norm else 0), outside


def count(c):
    """(parameters in all, those in matrix products, those in one block)."""
    matrices, vectors, outside = parameters(c)
    inside = sum(rows * columns for rows, columns, _ in matrices.values())
    total = c.n_layers * (inside + vectors) + sum(math.prod(shape) for shape in outside)
    return total, c.n_layers * inside + c.vocab_size * c.d_model, inside + vectors


def state_bytes(c, t):
    """Bytes of optimizer states over all ranks, as the init methods of scaling.py make them."""
    matrices, vectors, outside = parameters(c)
    wide = 2 if t.state_dtype == "bfloat16" else 4
    adam = c.n_layers * vectors + sum(math.prod(shape) for shape in outside)
    total = 2 * wide * adam
    for rows, columns, _ in matrices.values():
        small, long = sorted((rows, columns))
        size = 2 * wide * rows * columns
        if t.optimizer == "muon":
            size //= 2
        elif t.optimizer == "galore" and small > t.galore_rank:
            size = t.galore_rank * (2 * wide * long + 4 * small)
        total += c.n_layers * size
    return total


# ---- memory


def product_bytes(t, device):
    """Bytes of a number inside matrix products."""
    return 2 if t.precision in ("bf16", "fp16") or t.precision == "auto" and device != "cpu" else 4


def block_bytes(c, t, device, e, r):
    """What autograd keeps of a block, in bytes a token: (for its attention, for its MLP). e and r
    are the bytes of a number in products and in the residual stream.

    Each part is a tensor that the backward pass of an operation asks for."""
    C, D, cpu = c.d_model, c.d_model // c.n_heads, device == "cpu"
    q, kv = (c.n_heads + c.n_kv_heads) * D, (c.n_heads + 2 * c.n_kv_heads) * D
    norm = 4 * C + r * C + e * C + 4  # input in float32, scaled, times the weight; and the scale
    attention = norm + e * kv + e * q + e * C + 4 * c.n_heads  # v, rotated q and k, y, logsumexp
    if c.qk_norm:
        copies = 4 * q if e < 4 else 0  # q and k in float32, where they are not that already
        attention += copies + e * q + 4 * (c.n_heads + c.n_kv_heads)  # and scaled; the scales
        attention += e * C  # y again: attention's output has the layout of q, now another
    if c.dropout and cpu:  # no fused kernel: scores, their mask and the result, q, k, v in float32
        attention += 12 * c.n_heads * c.context_length + (4 * C if e < 4 else 0)
    if t.whole_documents:  # the mask again, as numbers that are added to the scores
        attention += e * c.context_length
    mask = C * (e if cpu else 1) if c.dropout else 0
    return attention + mask, norm + 4 * e * c.d_ff + mask  # gate, up, silu(gate), their product


def step_bytes(c, t, device, shard):
    """The most that an optimizer step allocates, for one parameter after another, of which each
    rank holds 1 / shard."""
    matrices, _, outside = parameters(c)
    # In bfloat16 m and v are widened, then rounded by chance.
    adam = 18 if t.state_dtype == "bfloat16" else 8
    sizes = [adam * max(math.prod(shape) for shape in outside) / shard]
    for rows, columns, parts in matrices.values():
        k, (small, long) = rows * columns, sorted((rows, columns))
        if t.optimizer == "muon":
            together = min(c.n_layers, max(1, 2**24 // k))  # as many as Muon.together allows
            done, w = 0, 4 if device == "cpu" else 2
            for part in parts:
                s, n = min(part, columns), part * columns
                inside = w * max(5 * n, 2 * n + 4 * s * s)
                sizes.append(together * (4 * k + 4 * done + inside))
                done += n
            sizes.append(together * 12 * k)  # momenta, the parts of the step, the same joined
        elif t.optimizer == "galore" and small > t.galore_rank:
            rank = t.galore_rank
            svd = 8 * k + 4 * small * small  # a copy and the factors
            sizes += [rank * long * (8 + adam), 4 * k + 4 * rank * long, svd]
        else:
            sizes.append(adam * k / shard)
    return max(sizes)


def step_memory(c, t, device="rtx3090", world=1, micro_batch=1):
    """{moment of a step: {part: bytes}} for one rank. The fullest moment is the peak of the run.

    Moments: the loss with its gradient; its backward pass; the backward pass of the last block, for
    which most activations are there, and of the first, for which most gradients are; that of the
    embedding; the optimizer's step. ValueError where the device is unknown."""
    about(device)
    e, T, C, V, L = product_bytes(t, device), c.context_length, c.d_model, c.vocab_size, c.n_layers
    sharded = world > 1 and t.parallel == "fsdp"
    shard, rows = world if sharded else 1, max(1, t.tokens_per_step // (T * world))
    micro = min(micro_batch, rows)
    n, several = micro * T, micro < rows
    matrices, _, outside = parameters(c)
    total, _, block = count(c)
    inside, D = sum(r * k for r, k, _ in matrices.values()), C // c.n_heads
    table, F = V * C, c.d_ff
    # Sharded parameters are gathered in bfloat16, and so is the stream that begins with them;
    # otherwise weights are float32, cast for each product, and products keep the cast.
    r, cast = (e, 0) if sharded else (4, e if e < 4 else 0)
    w = e if sharded else 4  # bytes of a gradient as the backward pass makes it
    attention, mlp = block_bytes(c, t, device, e, r)
    inputs = n * C * r
    whole = n * (attention + mlp) + cast * inside
    common = 8 * T * D + (2 * n * T if t.whole_documents else 0)  # cos and sin; who sees whom
    common += n * C * (r if device == "cpu" else 1) if c.dropout else 0
    norm = n * (4 * C + r * C + 4)
    kept = L * (inputs if t.checkpointing else whole)
    # ids and targets, int64: the batch, the loader's 4 ahead, and the one that it is making
    always = dict(weights=4 * total / shard, states=state_bytes(c, t) / shard)
    always |= dict(batch=6 * 8 * rows * (T + 1))
    # FSDP gathers the outer weights for both passes and those of this block, the next and one
    # arriving, and sends a block's gradients from a float32 copy.
    outer = e * (total - L * block) if sharded else 0
    on_the_way = (3 * e + w + 4) * block if sharded else 0
    # Until the last micro-batch sends them, accumulated gradients are whole on every rank.
    gradients = 4 * total / (1 if several else shard)
    held = gradients if several or world > shard else 0  # DDP's are views of buckets that stay

    def moment(gradients=held, ranks=outer, **parts):
        return always | dict(gradients=gradients, ranks=ranks) | parts

    chunk = min(t.loss_chunk, n)
    dx, dw = n * C * r, table * w
    # Logits are cast before the softmax; a share of dw is made, then added, on a CPU cast before.
    share = e * table + (4 * table if cast and device == "cpu" else 0)
    wide = 4 * chunk * V if e < 4 else 0
    loss = dx + dw + cast * table + chunk * V * (4 + e) + max(share, wide)
    moments = {"loss": moment(activations=kept + common + norm + inputs, loss=loss)}
    moments["loss backward"] = moment(activations=kept + common + norm, loss=2 * (dx + dw))
    # The output layer's gradient waits for the embedding's where they share a weight.
    waits = dw if c.tie_embeddings or not several else 0
    # A block's is highest when silu(gate) * up is undone: the gradients of the stream and of both.
    # Only with d_ff below d_model is the rotation's higher.
    backward = n * (attention + mlp + r * C + 2 * e * F) + cast * (inside - C * F) + w * C * F
    stored = (L - 1) * (inputs if t.checkpointing else whole)
    stored += inputs if t.checkpointing and r < 4 else 0  # else the block's own first tensor
    rest = dict(ranks=outer + on_the_way, loss=waits, block=backward)
    moments["last block"] = moment(activations=stored + common, **rest)
    grown = held or (L - 1) * 4 * block / shard
    moments["first block"] = moment(grown, activations=common, **rest)
    again = w * table if c.tie_embeddings or several else 0  # made whole, then added
    moments["embedding"] = moment(gradients, loss=waits * several + again)
    step = 4 * total / shard
    moments["step"] = moment(step, 0, step=step_bytes(c, t, device, shard))
    return {k: {p: round(b) for p, b in parts.items() if b} for k, parts in moments.items()}


def peak_bytes(c, t, device="rtx3090", world=1, micro_batch=1):
    """Bytes of tensors on one rank at the fullest moment of a step."""
    return max(sum(m.values()) for m in step_memory(c, t, device, world, micro_batch).values())


def process_bytes(peak, device):
    """With what is no tensor: see CONTEXT."""
    return round(peak * (1 if device == "cpu" else FRAGMENTS) + CONTEXT)


def largest_micro_batch(c, t, device="rtx3090", world=1, memory=None):
    """The most sequences at once, at most those of a step, for which the process stays within
    `memory` GiB (the device's); 0 where not even one does."""
    limit = (memory or about(device)["memory"]) * GIB
    rows = max(1, t.tokens_per_step // (c.context_length * world))

    def fits(micro):
        return process_bytes(peak_bytes(c, t, device, world, micro), device) <= limit

    if fits(rows):  # by itself: without accumulation no gradients are held in the forward pass
        return rows
    low, high = 0, rows
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measured_peak(step, tensors, device="cpu"):
    """The most bytes of tensors during step(): on a CPU those of `tensors` (all that is there
    before: weights, optimizer states, batch) and every allocation and release that PyTorch's
    profiler sees, added up; on a GPU the allocator's own figure."""
    device, stores = torch.device(device), {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    for x in tensors:
        storage = x.untyped_storage()
        stores[storage.data_ptr()] = storage.nbytes()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)  # the profiler's notes on stderr
    os.dup2(null, 2)
    try:
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            step()
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(null)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = sum(stores.values())
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


# ---- the plan


def plan(
    model_config, train_config, device="rtx3090", world=1, micro_batch=None, mfu=0.4, tokens=None,
    memory=None, price=None, flops=None,
):  # fmt: skip
    """What training will need on `world` devices, a dict that format_plan prints.

    micro_batch: sequences at once, None: train_config's or else the largest that fits. mfu: share
    of the peak FLOP/s that go into 6N + 12 L d T FLOPs a token. tokens: how many to train on, None:
    20 for each parameter. memory (GiB a process), price (dollars an hour) and flops (FLOP/s) stand
    in for the device's. Bytes are those of one rank; rates and cost, of all, are None without
    FLOP/s. ValueError for an unknown device, and for world, mfu or micro_batch that are not above
    0."""
    c, t, known = model_config, train_config, about(device)
    for name, x in (("world", world), ("mfu", mfu), ("micro_batch", micro_batch or 1)):
        if x <= 0:
            raise ValueError(f"{name} is {x}: it must be above 0")
    limit, flops = memory or known["memory"], flops or known["flops"]
    price = known["price"] if price is None else price
    rows = max(1, t.tokens_per_step // (c.context_length * world))
    largest = largest_micro_batch(c, t, device, world, limit)
    micro = min(micro_batch or t.micro_batch or largest or 1, rows)
    moments = step_memory(c, t, device, world, micro)
    when = max(moments, key=lambda k: sum(moments[k].values()))
    peak = sum(moments[when].values())
    total, products, block = count(c)
    token = 6 * products + 12 * c.n_layers * c.d_model * c.context_length
    again = token / 3 - 2 * c.vocab_size * c.d_model if t.checkpointing else 0  # the blocks forward
    tokens = tokens or 20 * total
    rate = mfu * flops * world / token if flops else None
    hours = tokens / rate / 3600 if flops else None
    savings = []  # (setting, bytes with it, bytes without)
    for text, on, off in (
        ("checkpointing", dict(checkpointing=True), dict(checkpointing=False)),
        (
            f"loss_chunk {t.loss_chunk}, not all logits",
            {},
            dict(loss_chunk=rows * c.context_length),
        ),
        ("state_dtype bfloat16", dict(state_dtype="bfloat16"), dict(state_dtype="float32")),
        (f"fsdp over {world} ranks, not ddp", dict(parallel="fsdp"), dict(parallel="ddp")),
    ):
        if world > 1 or "fsdp" not in text:
            pair = [peak_bytes(c, changed(t, **s), device, world, micro) for s in (on, off)]
            savings.append((text, *pair))
    pair = [peak_bytes(c, t, device, world, size) for size in (1, rows)]
    savings.append((f"micro_batch 1, not all {rows}", *pair))
    found = dict(device=device, world=world, parallel=t.parallel, limit=round(limit * GIB))
    found |= dict(parameters=total, matrix_parameters=products, block_parameters=block)
    found |= dict(flops_per_token=token, flops_computed=round(token + again))
    found |= dict(precision="float32" if product_bytes(t, device) == 4 else "16 bits")
    found |= dict(micro_batch=micro, accumulation=-(-rows // micro), largest_micro_batch=largest)
    found |= dict(moments=moments, when=when, memory=moments[when], peak=peak, savings=savings)
    process = process_bytes(peak, device)
    found |= dict(process=process, fits=process <= limit * GIB, optimizer=t.optimizer)
    found |= dict(mfu=mfu, flops=flops, tokens_per_s=rate, tokens=tokens, hours=hours)
    found |= dict(cost=hours and hours * price * world)
    # 6 N FLOPs for each of 20 N tokens
    found |= dict(optimal_in_a_day=flops and round(math.sqrt(86400 * flops * world * mfu / 120)))
    return found


def explain_1b(device="rtx3090"):
    """In numbers, how many tokens/s a model of 1B parameters can train at; a text.

    ValueError for a device that is unknown or whose FLOP/s are."""
    flops = about(device)["flops"]
    if not flops:
        raise ValueError(f"the FLOP/s of {device} are not known: take one of the GPUs by name")
    most, fewest = flops / 6e9, flops / 8e9
    low, high = 10_000 * 6e9 / flops, 15_000 * 8e9 / flops
    verdict = "is more than its tensor cores can do" if high > 1 else "is within its reach"
    return (
        f"1B parameters cost 6 GFLOP a token, 8 with checkpointed activations. {device} does "
        f"{flops / 1e12:g} TFLOP/s at\nmost: {fewest:,.0f} to {most:,.0f} tokens/s at 100% of its "
        f"peak. 10,000 to 15,000 would be {low:.0%} to {high:.0%}\nof it, which {verdict}; at 35 "
        f"to 50% it reaches {0.35 * fewest:,.0f} to {0.5 * most:,.0f}."
    )


def out_of_memory_advice(c, t, device, world, micro_batch):
    """One line: the settings to change and the GiB that each saves alone, most first."""
    now = peak_bytes(c, t, device, world, micro_batch)
    tries = [("--checkpointing", dict(checkpointing=True), micro_batch)]
    tries += [("--state_dtype bfloat16", dict(state_dtype="bfloat16"), micro_batch)]
    tries += [(f"--loss_chunk {k}", dict(loss_chunk=k), micro_batch) for k in (2048, 512)]
    tries += [(f"--optimizer {k}", dict(optimizer=k), micro_batch) for k in ("muon", "galore")]
    if micro_batch > 1:
        tries += [(f"--micro_batch {micro_batch // 2}", {}, micro_batch // 2)]
    if world > 1:
        tries += [("--parallel fsdp", dict(parallel="fsdp"), micro_batch)]
    saved = []
    for text, settings, micro in tries:
        larger = settings.get("loss_chunk", 0) > t.loss_chunk
        if larger or settings.get("optimizer") == "galore" and t.parallel == "fsdp":
            continue  # the trainer refuses galore with fsdp
        gain = now - peak_bytes(c, changed(t, **settings), device, world, micro)
        if gain > 0.005 * now:
            saved.append((gain / GIB, text))
    saved = [f"{text} saves {gain:.2g} GiB" for gain, text in sorted(saved, reverse=True)]
    return ", ".join(saved) or "no setting saves more: lower --d_model, --n_layers or the context"


def format_plan(p):
    """The plan as text, lines of less than 100 characters."""
    c, ranks = p["flops_computed"] / p["flops_per_token"], f" ({p['parallel']})" * (p["world"] > 1)
    lines = [
        f"{p['parameters']:,} parameters, {p['matrix_parameters']:,} of them in matrix products",
        f"{p['flops_per_token'] / 1e9:.3g} GFLOP a token; {c:.2f} times that computed",
        f"{p['world']} x {p['device']}{ranks}, {p['precision']}, {p['optimizer']}; "
        f"{p['micro_batch']} sequences x {p['accumulation']} accumulated; "
        f"largest that fits: {p['largest_micro_batch']}",
        "",
        "GiB a rank by moment of a step",
    ]
    names = list(dict.fromkeys(name for parts in p["moments"].values() for name in parts))
    rows = [["moment", *names, "sum"]]
    for moment, parts in p["moments"].items():
        sizes = [f"{parts[n] / GIB:.2f}" if n in parts else "" for n in names]
        mark = " <-" if moment == p["when"] else ""
        rows.append([moment, *sizes, f"{sum(parts.values()) / GIB:.2f}{mark}"])
    lines += aligned(rows)
    room = f"{p['process'] / GIB:.2f} of {p['limit'] / GIB:.1f} GiB"
    lines += [f"with CUDA context and fragmentation: {room}"] * (p["device"] != "cpu")
    lines += [] if p["fits"] else [f"does not fit: {room}"]
    rows = [["saving", "with", "without", "saves"]]
    for text, on, off in p["savings"]:
        rows.append([text, *(f"{x / GIB:.2f}" for x in (on, off, off - on))])
    lines += ["", "GiB a rank, the rest as above", *aligned(rows), ""]
    if p["tokens_per_s"]:
        lines += [
            f"at {p['mfu']:.0%} of {p['flops'] / 1e12:,.3g} TFLOP/s: {p['tokens_per_s']:,.0f} "
            f"tokens/s; {p['tokens'] / 1e9:,.3g}B tokens in {p['hours']:,.1f} hours, "
            f"${p['cost']:,.2f}",
            f"a day of it trains {p['optimal_in_a_day'] / 1e6:,.0f}M parameters on 20 tokens each",
        ]
    return "\n".join(lines)


def aligned(rows):
    """Rows of strings as lines, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        rest = "  ".join(x.rjust(w) for x, w in zip(row[1:], widths[1:]))
        yield f"  {row[0].ljust(widths[0])}  {rest}".rstrip()
