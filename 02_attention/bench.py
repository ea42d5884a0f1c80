"""Ours against PyTorch's fused attention and against the plain formula: forward, and forward with
backward, causal, float32, in turn in one process; medians. Above 1 ours is faster."""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import attention
import torch

from common import OUT, atomic, build, main, pick_device


@dataclass
class Options:
    lengths: str = "256,1024,4096"  # contexts, tokens, with commas between
    n_heads: int = 8  # heads
    head_dim: int = 64  # width of a head
    window: int = 256  # tokens that the sliding window sees
    repeats: int = 5  # timed runs of each, at least 3; the median counts
    device: str = "auto"  # auto, cpu, cuda or cuda:1


def forms(o):
    """{name: function of q, k, v}; the formula ends at contexts whose weights take over 1 GiB."""
    return {
        "fused": lambda q, k, v: attention.fused_attention(q, k, v, causal=True),
        "flash": lambda q, k, v: attention.flash_attention(q, k, v),
        "formula": lambda q, k, v: attention.causal_attention(q, k, v, "plain"),
        "window": lambda q, k, v: attention.sliding_window_attention(
            q, k, v, o.window, kernel="fused"
        ),
    }


def timed(function, inputs, backward, device):
    """Milliseconds of one run."""
    began = time.perf_counter()
    if backward:
        y = function(*inputs)
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    else:
        with torch.no_grad():
            function(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def matrix_flops(device):
    """FLOP/s of a plain float32 matrix product, the floor."""
    a = torch.randn(2048, 2048, device=device)
    with torch.no_grad():
        times = [timed(torch.matmul, (a, a), False, device) for _ in range(5)]
    return 2 * 2048**3 / (min(times) / 1000)


def bench(given):
    """ours against PyTorch's fused attention and the plain formula"""
    o = build(Options, given)
    device, _, reason = pick_device(o.device)
    lengths = [int(T) for T in o.lengths.split(",")]
    if min(*lengths, o.n_heads, o.head_dim, o.window) < 1 or o.repeats < 3:
        raise ValueError("lengths and sizes are at least 1, --repeats at least 3")
    peak = matrix_flops(device)
    print(
        f"device: {device} ({reason}), {torch.get_num_threads()} threads; {o.n_heads} heads of "
        f"{o.head_dim}; plain matrix product {peak / 1e9:,.0f} GFLOP/s"
    )
    if device.type == "cuda":
        print("flash, forward: " + ("Triton" if attention.triton else "tiles in PyTorch"))
    result = dict(options=asdict(o), peak_gflops=peak / 1e9, rows=[])
    for T in lengths:
        shape = (1, o.n_heads, T, o.head_dim)
        inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
        for backward in (False, True):
            here = {k: f for k, f in forms(o).items() if k != "formula" or o.n_heads * T**2 < 2**28}
            times = {name: [] for name in here}
            for i in range(o.repeats + 1):  # the first does not count
                for name, function in here.items():
                    times[name].append(timed(function, inputs, backward, device))
            ms = {name: statistics.median(seen[1:]) for name, seen in times.items()}
            # Two products forward, five more backward, each 2 T^2 D, half of it hidden.
            flops = (7 if backward else 2) * o.n_heads * T**2 * o.head_dim
            row = dict(context=T, backward=backward, ms=ms)
            row["flash_share_of_peak"] = flops / (ms["flash"] / 1000) / peak
            result["rows"].append(row)
            what = "forward and backward" if backward else "forward"
            print(f"context {T:,}, {what}: ours (flash) {ms['flash']:.1f} ms, ", end="")
            print(f"{row['flash_share_of_peak']:.0%} of the matrix product")
            for name in here:
                if name != "flash":
                    ratio = ms[name] / ms["flash"]
                    print(f"    {name:8} {ms[name]:9.1f} ms, ratio {ratio:.2f}", flush=True)
    with atomic(OUT / "02_attention" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
