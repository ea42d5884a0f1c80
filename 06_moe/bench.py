"""Ours against the field: the layer's speed (transformers' Mixtral block), and dense against MoE.

Speed: forward and backward pass of one layer, 2,048 tokens, d 256, experts of width 512, 2 a token
and the same weights, in turn in one process: ours in three ways, transformers' block with its eager
loop and with its grouped product, and a dense SwiGLU of as many FLOPs. Ratios are of neighbours in
time, their median counts. On a GPU in bfloat16, too.

Quality: on the plays, a dense model and a mixture that has as many active parameters, the same
attention, optimizer, learning rates and batches: held-out bits per byte after the same tokens, and
after the same seconds (the dense model gets the mixture's, its schedule stretched to them). Several
seeds; evaluation does not count as time. The machine's plain matrix product is measured beside.
"""

import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moe
import numpy as np
import torch
import training

from common import OUT, Tokenizer, atomic, build, corpus, main

SHAPE = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128, qk_norm=False)
TRAIN = dict(tokens_per_step=2048, max_lr=7e-3, warmup_steps=40, eval_every=10**9)
WIDTHS = dict(d_model=256, d_expert=512, top_k=2, n_heads=4)


@dataclass
class Options:
    parts: str = "speed,quality"  # what to measure, commas between
    rounds: int = 15  # times that each layer runs in speed
    seeds: int = 3  # runs of each model in quality, with seeds 1, 2, ...
    steps: int = 850  # steps of 2,048 tokens in quality
    n_experts: int = 8  # experts of the mixture in quality
    top_k: int = 2  # experts that a token uses


# ---- speed


def matrix_flops(device, dtype):
    """FLOP/s of a plain matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def layers(E, device, dtype):
    """{name: function of x (1, N, C)} and all their parameters: ours three times and transformers'
    twice with the same weights, and a dense SwiGLU."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    torch.manual_seed(0)
    config = moe.MoEConfig(n_experts=E, **WIDTHS)
    ours = moe.MoE(config).to(device, dtype)
    hf = MixtralConfig(
        hidden_size=config.d_model, intermediate_size=config.d_expert, num_local_experts=E,
        num_experts_per_tok=config.top_k,
    )  # fmt: skip
    theirs = MixtralSparseMoeBlock(hf).to(device, dtype)
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.experts.gate, ours.experts.up], dim=1))
        theirs.experts.down_proj.copy_(ours.experts.down)
    dense = moe.SwiGLU(moe.MoEConfig(**WIDTHS | dict(d_ff=config.top_k * config.d_expert)))

    def our(way):
        def run(x):
            ours.experts.dispatch = way
            return ours(x)

        return run

    def their(way):
        def run(x):
            hf._experts_implementation = way
            return theirs(x)

        return run

    runs = {f"ours, {way}": our(way) for way in ("segments", "grouped", "loop")}
    runs |= {"transformers, grouped": their("grouped_mm"), "transformers, eager": their("eager")}
    runs |= {"dense": dense.to(device, dtype)}
    return runs, [p for m in (ours, theirs, dense) for p in m.parameters()]


def speed(o, device, dtype=torch.float32, N=2048):
    """Tokens/s of each layer, and ours over theirs."""
    result = {}
    for E in (8, 32):
        runs, parameters = layers(E, device, dtype)
        x = torch.randn(1, N, WIDTHS["d_model"], device=device, dtype=dtype, requires_grad=True)
        upstream, times, outputs = torch.randn_like(x), {name: [] for name in runs}, {}
        for i in range(o.rounds + 3):
            for name, run in runs.items():
                for p in [x, *parameters]:
                    p.grad = None
                if device.type == "cuda":
                    torch.cuda.synchronize()
                began = time.perf_counter()
                y = run(x)
                y.backward(upstream)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if i >= 3:
                    times[name].append(time.perf_counter() - began)
                outputs[name] = y.detach()
        for name in set(runs) - {"dense"}:  # in bfloat16 near ties go to another expert
            off = (outputs[name] - outputs["ours, loop"]).abs().amax(-1) > 1e-3
            if off.float().mean() > (0 if dtype == torch.float32 else 0.05):
                raise ValueError(
                    f"{name} gives something else for {off.float().mean():.1%} of tokens"
                )
        rows = result[f"{E} experts"] = {}
        best = "ours, segments" if device.type == "cpu" else "ours, grouped"
        flops = 6 * 3 * WIDTHS["d_model"] * WIDTHS["d_expert"] * WIDTHS["top_k"]  # a token's
        peak = matrix_flops(device, dtype)
        for name, found in times.items():
            seconds = statistics.median(found)
            ratio = statistics.median(a / b for a, b in zip(found, times[best]))
            rows[name] = dict(tokens_per_s=N / seconds, ours_over_it=ratio)
            rows[name] |= dict(share_of_matrix_product=flops * N / seconds / peak)
            print(
                f"{E:2} experts  {name:22} {N / seconds:9,.0f} tokens/s, {ratio:5.2f} times slower "
                f"than {best}; {flops * N / seconds / peak:.0%} of a plain product's FLOP/s",
                flush=True,
            )
    return result


# ---- quality


def open_plays():
    """(training tokens, held-out tokens, bytes held out, vocabulary size), by 01's tokenizer."""
    newest = OUT / "01_tokenizer" / "latest"
    tokenizer = Tokenizer(newest if (newest / "tokenizer.json").exists() else None)
    home, found = corpus(), []
    for split in ("train", "val"):
        text = (home / f"{split}.txt").read_text(encoding="utf-8")
        found.append(np.array(tokenizer.encode(text)))
    return *found, len(text.encode()), tokenizer.vocab_size


def run(text, seed, steps, **shape):
    """Train once; seconds of training and held-out bits per byte."""
    train_tokens, val_tokens, val_bytes, vocab_size = text
    torch.manual_seed(seed)
    model = moe.MoETransformerLM(moe.MoEConfig(vocab_size=vocab_size, **SHAPE | shape))
    model.save_pretrained = lambda path: None
    how = training.TrainConfig(steps=steps, seed=seed, eval_tokens=2000, **TRAIN)
    rows = TRAIN["tokens_per_step"] // SHAPE["context_length"]
    loader = training.TokenLoader([train_tokens], SHAPE["context_length"], rows, seed)
    lines, out = [], OUT / "06_moe" / "bench"
    keeper = SimpleNamespace(dir=out, resume=False, log=lambda **line: lines.append(line))
    training.train(model, loader, val_tokens, how, keeper)
    loss = training.evaluate(model, val_tokens, SHAPE["context_length"])
    seconds = sum(line["tokens"] / line["step"] / line["tokens_per_s"] for line in lines)
    total, active = model.counts()
    bpb = loss * len(val_tokens) / val_bytes / math.log(2)
    return dict(seed=seed, steps=steps, seconds=seconds, bpb=bpb, total=total, active=active)


def quality(o):
    """Dense against mixture: the same tokens, then the same seconds."""
    text, result = open_plays(), {}
    mixture = dict(n_experts=o.n_experts, top_k=o.top_k)
    for seed in range(1, o.seeds + 1):
        for name in ("dense", "mixture", "dense, same seconds"):
            steps, shape = o.steps, mixture if name == "mixture" else dict(moe_layers="none")
            if name == "dense, same seconds":
                dense, other = result["dense"][-1], result["mixture"][-1]
                steps = max(1, round(o.steps * other["seconds"] / dense["seconds"]))
            row = run(text, seed, steps, **shape)
            result.setdefault(name, []).append(row)
            print(
                f"seed {seed}, {name:19} {row['bpb']:.4f} bits per byte, {row['steps']} steps in "
                f"{row['seconds']:.0f} s, {row['total']:,} parameters, {row['active']:,} active",
                flush=True,
            )
    summary = {}
    for name, rows in result.items():
        found = [row["bpb"] for row in rows]
        summary[name] = (statistics.mean(found), (max(found) - min(found)) / 2)
        print(f"{name:19} {summary[name][0]:.4f} ± {summary[name][1]:.4f} bits per byte")
    for name, what in (("dense", "tokens"), ("dense, same seconds", "seconds")):
        gain = 1 - summary["mixture"][0] / summary[name][0]
        won = "the mixture wins" if gain > 0 else "the dense model wins"
        print(f"at equal active parameters and equal {what} {won} by {abs(gain):.1%}")
        result[f"gain at equal {what}"] = gain
    return result


def goals(result):
    """Each goal, its figure and whether it is met, of the parts that were measured."""
    lines = []
    for E, least in (("8 experts", (1.1, 2.0)), ("32 experts", (1.3, 5.0))):
        for other, goal in zip(("grouped", "eager"), least):
            if "speed" in result:
                ratio = result["speed"][E][f"transformers, {other}"]["ours_over_it"]
                what = f"layer against transformers' {other}, {E}"
                lines.append((what, f"{goal} times", f"{ratio:.2f}", ratio >= goal))
    if "quality" in result:
        gain = result["quality"]["gain at equal tokens"]
        lines.append(("mixture against dense, same tokens", "2%", f"{gain:.1%}", gain >= 0.02))
    return lines


def bench(given):
    """speed of the layer against transformers' Mixtral block, quality against a dense model"""
    o, result = build(Options, given), dict(threads=torch.get_num_threads(), options=given)
    if unknown := set(o.parts.split(",")) - {"speed", "quality"}:
        raise ValueError(f"--parts {min(unknown)}: there are speed and quality")
    if o.rounds < 3 or o.seeds < 1:
        raise ValueError("--rounds is at least 3, --seeds at least 1")
    if "speed" in o.parts:
        result["speed"] = speed(o, torch.device("cpu"))
        if torch.cuda.is_available():
            result["speed, GPU"] = speed(o, torch.device("cuda"), torch.bfloat16, 16384)
        else:
            print("skipped the GPU: torch sees no CUDA device")
    if "quality" in o.parts:
        result["quality"] = quality(o)
    result["goals"] = goals(result)
    for what, goal, figure, met in result["goals"]:
        print(f"{'met   ' if met else 'missed'} {what:50} goal {goal:10} {figure}")
    with atomic(OUT / "06_moe" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
