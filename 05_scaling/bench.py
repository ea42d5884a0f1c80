"""Ours against the field: training speed (transformers' Trainer), loss at equal time (nanoGPT).

Speed: one Llama configuration of 10M parameters, batches of one size, AdamW in float32, ours and
transformers' Trainer in turn in one process; the median time of a step. Eager and compiled.

Quality: the reference is nanoGPT's CPU quick start (GPT-2: 4 layers, d 128, context 64, batch 12,
2000 steps, lr 1e-3 to 1e-4), transformers' GPT-2 on bytes of tinyshakespeare, split 90/10. Ours
gets the seconds that it took, seed by seed; compiling and evaluation do not count. Loss is the mean
over the whole held-out tenth in non-overlapping windows of the model's own context.

Memory: the most bytes of tensors in a training step, with all logits at once, with the loss in
chunks, and with checkpointed activations, beside what planner.py says.

On a GPU: MFU of GPT-2's size, eager and compiled, and 1.1B parameters with 24 GB.
"""

import copy
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import planner
import torch
from scaling import TokenLoader, TrainConfig, Trainer, TransformerConfig, TransformerLM, evaluate
from torch.nn import functional as F

from common import OUT, atomic, build, download, main

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHARED = Path(__file__).resolve().parents[2] / "shared/data/text/tinyshakespeare.txt"
REFERENCE = dict(n_layer=4, n_head=4, n_embd=128, n_positions=64, vocab_size=257)
LLAMA_10M = dict(vocab_size=8192, context_length=256, d_model=256, n_layers=10, n_heads=8)
LLAMA_10M |= dict(n_kv_heads=4, d_ff=768, qk_norm=False)
WIDE = dict(vocab_size=50304, context_length=512, d_model=256, n_layers=6, n_heads=8)
GPT2 = dict(vocab_size=50304, context_length=1024)
BILLION = GPT2 | dict(d_model=2048, n_layers=20, n_heads=16, d_ff=5632)


@dataclass
class Options:
    parts: str = "speed,quality,memory,gpu"  # what to measure, commas between
    rounds: int = 5  # times that each trains in speed, at least 3
    speed_steps: int = 6  # timed steps of each of these
    rows: int = 8  # sequences of 256 tokens in a step of speed
    compile: bool = True  # speed: both compiled, too; a minute more for each
    seeds: int = 3  # runs of each in quality, with seeds 1, 2, ...
    steps: int = 2000  # steps of the reference
    text: str | None = None  # tinyshakespeare; None: ../shared/data, else fetched with its checksum
    shape: str = "96x3x128"  # quality: d_model, layers and context of ours
    ours_batch: int = 12  # quality: sequences in a step of ours
    ours_max_lr: float = 1e-2  # quality: learning rate of ours after the warm-up


def random_tokens(vocab_size, n):
    return np.random.default_rng(0).integers(0, vocab_size, n).astype(np.int64)


def new_trainer(config, tokens, rows, device="cpu", seed=1, **settings):
    """A Trainer without a run directory or checkpoints."""
    torch.manual_seed(seed)
    model = TransformerLM(config).to(device)
    settings = dict(tokens_per_step=rows * config.context_length, seed=seed) | settings
    train_config = TrainConfig(**settings)
    loader = TokenLoader([tokens], config.context_length, rows, seed, device=device)
    return Trainer(model, loader, None, train_config, None, None, device)


# ---- speed


def their_steps(model, tokens, rows, context, steps, compile):
    """Seconds of each step of transformers' Trainer."""
    import transformers

    class Windows(torch.utils.data.Dataset):
        def __len__(self):
            return len(tokens) // context

        def __getitem__(self, i):
            ids = torch.from_numpy(tokens[i * context : (i + 1) * context])
            return dict(input_ids=ids, labels=ids)

    times = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] = time.perf_counter() - times[-1]

    with tempfile.TemporaryDirectory() as home:
        arguments = transformers.TrainingArguments(
            home, per_device_train_batch_size=rows, max_steps=steps, learning_rate=1e-3,
            weight_decay=0.1, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
            logging_strategy="no", torch_compile=compile,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=Windows())
        trainer.add_callback(Clock())
        trainer.train()
    return times


def speed(o):
    """Median step of transformers' Trainer and of ours, float32 on the CPU."""
    import transformers

    transformers.logging.set_verbosity_error()
    config, rows = TransformerConfig(**LLAMA_10M), {}
    tokens = random_tokens(config.vocab_size, 400_000)
    with tempfile.TemporaryDirectory() as home:
        TransformerLM(config).save_pretrained(home)
        theirs = transformers.LlamaForCausalLM.from_pretrained(home, attn_implementation="sdpa")
    n = sum(p.numel() for p in theirs.parameters())
    size, seconds = o.rows * config.context_length, {}
    for compile in (False, True)[: 2 if o.compile else 1]:
        kind = ", compiled" * compile
        settings = dict(optimizer="adamw", max_lr=1e-3, steps=10**6, loss_chunk=512)
        trainer = new_trainer(config, tokens, o.rows, compile=compile, **settings)
        for _ in range(o.rounds):
            times = []
            for i in range(o.speed_steps + 2):
                began = time.perf_counter()
                trainer.train_step()
                times += [time.perf_counter() - began] if i > 1 else []
            seconds.setdefault("ours" + kind, []).append(statistics.median(times))
            args = (theirs, tokens, o.rows, config.context_length, o.speed_steps + 2, compile)
            times = their_steps(*args)[2:]
            seconds.setdefault("transformers" + kind, []).append(statistics.median(times))
        trainer.loader.close()
    flops = trainer.model.flops_per_token() * size
    a = torch.randn(1024, 1024)
    began = time.perf_counter()
    for _ in range(20):
        a @ a
    floor = 20 * 2 * 1024**3 / (time.perf_counter() - began)
    for name, found in seconds.items():
        median = statistics.median(found)
        theirs = seconds[name.replace("ours", "transformers")]
        ratio = statistics.median(a / b for a, b in zip(theirs, found))  # of neighbours in time
        rows[name] = dict(tokens_per_s=size / median, ratio=ratio, rounds=found)
        rows[name] |= dict(share_of_matrix_product=flops / median / floor)
        print(
            f"{name}: {size / median:,.0f} tokens/s, ratio {ratio:.2f}, "
            f"{flops / median / 1e9:,.0f} GFLOP/s, {flops / median / floor:.0%} of a plain product"
        )
    print(f"{n:,} parameters, {o.rows} sequences of {config.context_length} tokens a step, AdamW")
    return dict(rows=rows, parameters=n)


# ---- quality at equal time


def reference(data, held_out, seed, steps):
    """nanoGPT's CPU quick start; returns seconds, steps, loss."""
    import transformers

    shape = REFERENCE | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(config)
    decays = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [dict(params=decays), dict(params=rest, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, 1e-3, (0.9, 0.99), weight_decay=0.1)

    def loss_of(ids, targets, _=None):
        logits = model(ids, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    began = time.perf_counter()
    for step in range(1, steps + 1):
        starts = np.random.randint(len(data) - 65, size=12)
        windows = torch.from_numpy(np.stack([data[i : i + 65] for i in starts]).astype(np.int64))
        loss_of(windows[:, :-1], windows[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = max(0, step - 100) / max(1, steps - 100)
        lr = 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, step / 100)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began

    class Called(torch.nn.Module):
        forward = staticmethod(loss_of)

    model.eval()
    return dict(seed=seed, seconds=seconds, steps=steps, loss=evaluate(Called(), held_out, 64))


def ours(data, held_out, seed, seconds, o):
    """As many steps of Muon as fit into `seconds`; the schedule follows the clock."""
    width, layers, context = map(int, o.shape.split("x"))
    config = TransformerConfig(257, context, width, layers, width // 32, qk_norm=False)
    settings = dict(max_lr=o.ours_max_lr, warmup_steps=40, compile=True, steps=10**6)
    trainer = new_trainer(config, data, o.ours_batch, seed=seed, **settings)
    start = copy.deepcopy(trainer.model.state_dict())
    for _ in range(3):  # compiles, and does not count
        trainer.train_step()
    trainer.model.load_state_dict(start)
    trainer.optimizer.state.clear()
    trainer.step = 0
    began, spent = time.perf_counter(), 0.0
    while spent < seconds:
        rate = spent / max(1, trainer.step)  # seconds a step
        trainer.config.steps = trainer.step + 1 + round((seconds - spent) / (rate or 0.03))
        trainer.train_step()
        spent = time.perf_counter() - began
    trainer.loader.close()
    loss = evaluate(trainer.model, held_out, context, batch_size=64)
    return dict(seed=seed, seconds=spent, steps=trainer.step, loss=loss)


def quality(o):
    path = o.text or (SHARED if SHARED.exists() else download(URL, SHA256))
    text = np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)
    data, result = (text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]), {}
    for seed in range(1, o.seeds + 1):
        np.random.seed(seed)
        first = reference(*data, seed, o.steps)
        for name, row in (
            ("reference", first),
            ("ours", ours(*data, seed, first["seconds"], o)),
        ):
            result.setdefault(name, []).append(row)
            spent = f"{row['seconds']:.0f} s, {row['steps']} steps"
            print(f"seed {seed}, {name}: {spent}: {row['loss']:.4f} nats per byte", flush=True)
    for name, rows in list(result.items()):
        losses = [row["loss"] for row in rows]
        mean, spread = statistics.mean(losses), (max(losses) - min(losses)) / 2
        result |= {f"{name}_mean": mean, f"{name}_spread": spread}
        print(f"{name}: {mean:.4f} ± {spread:.4f} nats per byte")
    return result


# ---- memory


def memory(o):
    """Peak of a training step in four ways, measured on this machine and on paper."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, rows = TransformerConfig(**WIDE), {}
    tokens, n = random_tokens(config.vocab_size, 50_000), 8 * config.context_length
    for name, settings in (
        ("all logits", dict(loss_chunk=n)),
        ("loss in chunks of 512", dict(loss_chunk=512)),
        ("all logits, checkpointed", dict(loss_chunk=n, checkpointing=True)),
        ("both", dict(loss_chunk=512, checkpointing=True)),
    ):
        settings |= dict(optimizer="muon", compile=False, steps=100)
        trainer = new_trainer(config, tokens, 8, device, **settings)
        trainer.train_step()
        states = [x for s in trainer.optimizer.state.values() for x in s.values()]
        held = [*trainer.model.parameters(), *filter(torch.is_tensor, states)]
        peak = planner.measured_peak(trainer.train_step, held, device)
        began = time.perf_counter()
        trainer.train_step()
        seconds = time.perf_counter() - began
        trainer.loader.close()
        planned = planner.peak_bytes(config, trainer.config, device.type, 1, 8)
        rows[name] = dict(bytes=peak, planned=planned, seconds=seconds)
        print(
            f"{name}: {peak / 2**20:,.0f} MiB at most (planned {planned / 2**20:,.0f}), "
            f"{seconds:.2f} s a step",
            flush=True,
        )
    return rows


# ---- a GPU


def rate(trainer, steps):
    """Tokens/s of the median step; two before it warm up."""
    times = []
    for _ in range(steps + 2):
        began = time.perf_counter()
        trainer.train_step()  # waits for the device: its loss becomes a number
        times.append(time.perf_counter() - began)
    return trainer.loader.batch_size * trainer.T / statistics.median(times[2:])


def gpu(device="cuda", shape=GPT2, large=BILLION, rows=64, steps=10):
    """MFU of a model of GPT-2's size, eager and compiled, and of 1.1B parameters in 24 GB."""
    device, found = torch.device(device), {}
    cuda = device.type == "cuda"
    peak = planner.about(planner.device_name(device))["flops"] if cuda else None
    peak = peak or 1e12  # not in the table: MFU is then TFLOP/s
    for name, compile in (("eager", False), ("compiled", True)):
        config = TransformerConfig(**shape)
        tokens = random_tokens(config.vocab_size, 4 * rows * config.context_length)
        trainer = new_trainer(config, tokens, rows, device, compile=compile, beta2=0.95)
        tokens_per_s = rate(trainer, steps)
        mfu = tokens_per_s * trainer.model.flops_per_token() / peak
        found[name] = dict(tokens_per_s=tokens_per_s, mfu=mfu, precision=trainer.precision)
        print(f"gpt2-124m, {name}: {tokens_per_s:,.0f} tokens/s, MFU {mfu:.1%}", flush=True)
        trainer.loader.close()
        del trainer
    config, micro = TransformerConfig(**large), 16 if cuda else 1
    if cuda:  # PyTorch gets what a card of 24 GB has
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(22.5 * 2**30 / total)
        torch.cuda.reset_peak_memory_stats()
    settings = dict(micro_batch=micro, checkpointing=True, state_dtype="bfloat16", beta2=0.95)
    tokens = random_tokens(config.vocab_size, 10 * micro * config.context_length)
    trainer = new_trainer(config, tokens, 4 * micro, device, **settings)
    tokens_per_s = rate(trainer, max(2, steps // 3))
    row = dict(tokens_per_s=tokens_per_s, mfu=tokens_per_s * trainer.model.flops_per_token() / peak)
    if cuda:
        row |= dict(gib=torch.cuda.max_memory_reserved() / 2**30)
        torch.cuda.set_per_process_memory_fraction(1.0)
    found["1b-24gb"] = row
    print(
        f"1b-24gb: {tokens_per_s:,.0f} tokens/s, MFU {row['mfu']:.1%}, {row.get('gib', 0):.1f} GiB"
    )
    trainer.loader.close()
    return found


def goals(result):
    """Each goal, its figure and whether it is met, of the parts that were measured."""
    lines = []
    if "speed" in result:
        rows = result["speed"]["rows"]
        for kind in ("", ", compiled")[: len(rows) // 2]:
            ratio = rows["ours" + kind]["ratio"]
            what = "against transformers" + (" (both compiled)" if kind else "")
            lines.append((f"tokens/s {what}", "1.2 times", f"{ratio:.2f}", ratio >= 1.2))
    if "quality" in result:
        mean, spread = result["quality"]["ours_mean"], result["quality"]["ours_spread"]
        lines.append(("nats per byte", "at most 1.58", f"{mean:.4f} ± {spread:.4f}", mean <= 1.58))
    if "gpu" in result:
        mfu = result["gpu"]["compiled"]["mfu"]
        lines.append(("MFU of gpt2-124m, compiled", "40%", f"{mfu:.1%}", mfu >= 0.4))
    return lines


def bench(given):
    """speed against transformers' Trainer, quality at equal time, peak memory, a GPU's MFU"""
    o, result = build(Options, given), dict(threads=torch.get_num_threads(), options=given)
    measures = dict(speed=speed, quality=quality, memory=memory)
    if unknown := set(o.parts.split(",")) - {*measures, "gpu"}:
        raise ValueError(f"--parts {min(unknown)}: there are {', '.join(measures)} and gpu")
    if o.rounds < 3:
        raise ValueError("--rounds is at least 3")
    result |= {part: measures[part](o) for part in measures if part in o.parts.split(",")}
    if "gpu" in o.parts.split(",") and torch.cuda.is_available():
        result["gpu"] = gpu()
    elif "gpu" in o.parts.split(","):
        print("skipped gpu: torch sees no CUDA device")
    result["goals"] = goals(result)
    for what, goal, figure, met in result["goals"]:
        print(f"{'met   ' if met else 'missed'} {what:46} goal {goal:14} {figure}")
    with atomic(OUT / "05_scaling" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
