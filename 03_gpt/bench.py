"""Ours against the field: loss at equal time (nanoGPT's quick start), speed (transformers).

Quality: the reference is nanoGPT's CPU quick start (4 layers, d 128, context 64, batch 12, 2000
steps, lr 1e-3 to 1e-4) in this repository's code, on bytes of tinyshakespeare, split 90/10. Ours
gets the seconds that the reference took, seed by seed in the same process; evaluation does not
count. Loss is the mean over the whole held-out tenth in non-overlapping windows of the model's own
context. The reference is not compiled (nor is nanoGPT's), ours is; compiling does not count.

Speed: a training step of the reference's shape, ours and transformers' GPT-2 in turn.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gpt
import numpy as np
import torch

from common import OUT, atomic, build, download, main

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHARED = Path(__file__).resolve().parents[2] / "shared/data/text/tinyshakespeare.txt"
BYTES = dict(vocab_size=257, context_length=64)
REFERENCE = dict(n_layers=4, n_heads=4, d_model=128, gelu="tanh") | BYTES
# A quarter of the weights, and so several times the tokens in the same time: at 0.8M parameters
# and 1.5M tokens the reference is far from the 20 tokens a parameter of Hoffmann et al. 2022.
OURS = dict(n_layers=3, n_heads=3, d_model=96, gelu="exact") | BYTES


@dataclass
class Options:
    seeds: int = 3  # runs of each, with seeds 1, 2, ...
    steps: int = 2000  # steps of the reference
    text: str | None = None  # tinyshakespeare; None: ../shared/data, else fetched with its checksum
    ours_batch: int = 12  # sequences in a step of ours
    ours_max_lr: float = 6e-3  # learning rate of ours after the warm-up
    speed_steps: int = 60  # steps of each in the comparison of speed


def step(model, optimizer, ids, targets):
    """One step of either model; returns the loss."""
    loss = model(ids, targets)
    loss.backward()
    gpt.clip_gradients(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def train(shape, tokens, held_out, seed, batch, max_lr, min_lr, steps=None, seconds=None):
    """Train for some steps or, compiled, some seconds; returns seconds, steps, held-out loss."""
    torch.manual_seed(seed)
    config = gpt.GPTConfig(**shape)
    model = gpt.GPT(config)
    optimizer = gpt.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    forward = gpt.compiled(model, wanted=seconds is not None)
    for _ in range(3):  # compiles, and does not count
        forward(*gpt.get_batch(tokens, batch, config.context_length)).backward()
    optimizer.zero_grad()
    began, done, n = time.perf_counter(), 0.0, 0
    while done < 1:  # the share of the budget that is spent; the schedule follows it
        n += 1
        optimizer.param_groups[0]["lr"] = gpt.lr_schedule(done + 5e-4, max_lr, min_lr, 0.05, 1.0)
        step(forward, optimizer, *gpt.get_batch(tokens, batch, config.context_length))
        done = n / steps if steps else (time.perf_counter() - began) / seconds
    seconds = time.perf_counter() - began
    return seconds, n, gpt.evaluate(model, held_out, config.context_length, batch_size=64)


def speed(steps):
    """Milliseconds of a step, ours and transformers', with GPT-2's GELU and with the exact one."""
    import transformers

    class Theirs(torch.nn.Module):
        def __init__(self, activation):
            super().__init__()
            shape = dict(vocab_size=257, n_positions=64, n_embd=128, n_layer=4, n_head=4)
            quiet = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
            ids = dict(bos_token_id=None, eos_token_id=None)
            config = transformers.GPT2Config(
                **shape, **quiet, **ids, activation_function=activation
            )
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, ids, targets):
            logits = self.model(ids).logits
            return torch.nn.functional.cross_entropy(logits.view(-1, 257), targets.reshape(-1))

    ids, targets = torch.randint(257, (2, 12, 64))
    rows = {}
    for gelu, activation in (("tanh", "gelu_new"), ("exact", "gelu")):
        shape = gpt.GPTConfig(**REFERENCE | dict(gelu=gelu))
        models = {"transformers": Theirs(activation), "ours": gpt.GPT(shape)}
        models["ours compiled"] = gpt.compiled(gpt.GPT(shape), wanted=True)
        times = {name: [] for name in models}
        optimizers = {name: gpt.AdamW(model.parameters()) for name, model in models.items()}
        optimizers["transformers"] = torch.optim.AdamW(models["transformers"].parameters())
        for i in range(steps + 5):
            for name, model in models.items():
                began = time.perf_counter()
                step(model, optimizers[name], ids, targets)
                if i >= 5:
                    times[name].append(1000 * (time.perf_counter() - began))
        rows[gelu] = {name: statistics.median(seen) for name, seen in times.items()}
        for name in ("ours", "ours compiled"):
            print(
                f"step, {gelu} GELU: {name} {rows[gelu][name]:.1f} ms, transformers "
                f"{rows[gelu]['transformers']:.1f} ms: "
                f"{rows[gelu]['transformers'] / rows[gelu][name]:.2f} times as fast"
            )
    return rows


def machine():
    n = 2048
    a = torch.randn(n, n)
    best = min(timed(lambda: a @ a) for _ in range(5))
    return 2 * n**3 / best


def timed(function):
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def bench(given):
    """quality at equal time, and speed"""
    options = build(Options, given)
    path = options.text or (SHARED if SHARED.exists() else download(URL, SHA256))
    text = np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)
    tokens, held_out = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    peak = machine()
    print(f"plain matrix product: {peak / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} threads")
    result = dict(peak_gflops=peak / 1e9, speed=speed(options.speed_steps), runs=[])
    for seed in range(1, options.seeds + 1):
        pair = {}
        for name, shape, *settings in (
            ("reference", REFERENCE, 12, 1e-3, 1e-4),
            ("ours", OURS, options.ours_batch, options.ours_max_lr, 0.0),
        ):
            budget = (
                dict(seconds=pair["reference"]["seconds"]) if pair else dict(steps=options.steps)
            )
            seconds, steps, loss = train(shape, tokens, held_out, seed, *settings, **budget)
            with torch.device("meta"):
                model = gpt.GPT(gpt.GPTConfig(**shape))
            rate = steps * settings[0] * shape["context_length"] / seconds
            share = rate * model.flops_per_token() / peak
            pair[name] = dict(seed=seed, seconds=seconds, steps=steps, loss=loss, mfu=share)
            print(
                f"seed {seed} {name:9}: {seconds:.0f} s, {steps} steps, {rate:,.0f} tokens/s "
                f"({share:.0%} of the matrix product): {loss:.4f} nats per byte",
                flush=True,
            )
        result["runs"].append(pair)
    for name in ("reference", "ours"):
        losses = [pair[name]["loss"] for pair in result["runs"]]
        spread = (max(losses) - min(losses)) / 2
        print(f"{name:9}: {statistics.mean(losses):.4f} ± {spread:.4f} nats per byte")
    with atomic(OUT / "03_gpt" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
