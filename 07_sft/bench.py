"""Ours against TRL's SFTTrainer: examples/s and the loss curve, on the plays' questions.

Both start from the same weights (05's newest, else 04's, else random ones), get the
same tokenised examples, pack them best fit first into rows of one length, take as many rows a step,
AdamW, learning rates and clipping in float32, and learn the answers only. Each round trains both
from the start, in turn, in one process; data and set-up do not count. TRL without packing and ours
without are a second pair. The machine's plain matrix product is measured beside.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import checkpoints
import numpy as np
import questions
import sft
import templates
import torch
import transformer

from common import OUT, Tokenizer, atomic, build, main

IGNORE = -100
RATE = 2e-3


@dataclass
class Options:
    rounds: int = 3  # times that each trains
    steps: int = 60  # optimizer steps in a round
    rows: int = 8  # packed rows in a step
    context_length: int = 256  # tokens in a row
    examples: int = 6000  # examples to draw from


def matrix_flops(n=1024):
    """FLOP/s of a plain matrix product."""
    a, b = torch.randn(2, n, n)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def ours(o, home, examples, packing, steps):
    """(seconds of each step, losses, examples of each step)."""
    model = transformer.TransformerLM.from_pretrained(home)
    model.config.context_length = max(model.config.context_length, o.context_length)
    how = sft.TrainConfig(steps=steps, max_lr=RATE, warmup_steps=5, eval_every=10**9)
    tokens = o.rows * o.context_length
    loader = sft.ExampleLoader(examples, o.context_length, tokens, None, packing)
    loader.epoch(0)
    sizes, lines, clock = [], [], []

    def loss_of(rows, total):
        sizes.append(sum(map(len, rows)))
        return sft.sft_loss(model, *sft.collate(rows), total)

    def log(**line):
        lines.append(line)
        clock.append(time.perf_counter())

    run = SimpleNamespace(dir=OUT / "07_sft" / "bench", resume=False, log=log)
    nothing = dict(val_loss=0.0)
    began = time.perf_counter()
    sft.train(model, loader, loss_of, lambda: nothing, lambda directory: None, how, run)
    seconds = np.diff([began, *clock]).tolist()
    return seconds[:-1], [line["train_loss"] for line in lines][:-1], sizes[:-1]


def trl(o, home, examples, packing, steps):
    """The same of TRL's SFTTrainer."""
    import datasets
    import transformers
    from trl import SFTConfig, SFTTrainer

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32)
    rows = [
        dict(input_ids=ids, labels=[i if m else IGNORE for i, m in zip(ids, mask)])
        for ids, mask in examples
    ]
    config = SFTConfig(
        output_dir=str(OUT / "07_sft" / "bench-trl"), max_steps=steps, packing=packing,
        per_device_train_batch_size=o.rows if packing else 2 * o.rows, learning_rate=RATE,
        max_length=o.context_length, lr_scheduler_type="linear", warmup_steps=5, logging_steps=1,
        weight_decay=0.0, adam_beta2=0.99, max_grad_norm=1.0, save_strategy="no", report_to=[],
        use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False, seed=1,
    )  # fmt: skip
    clock, sizes = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock.append([time.perf_counter()])

        def on_step_end(self, *args, **kwargs):
            clock[-1].append(time.perf_counter())

    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    tokenizer.pad_token = tokenizer.eos_token
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counting(features):
        batch = collate(features)
        sizes.append(sum(len(f.get("seq_lengths", [1])) for f in features))
        return batch

    trainer.data_collator = counting
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return [stop - start for start, stop in clock], losses, sizes[:steps]


def prepare(o):
    """A model directory with the chat tokens, and the examples encoded for it."""
    torch.manual_seed(0)
    newest = [OUT / stage / "latest" for stage in ("05_scaling", "04_modern")]
    found = next((path for path in newest if (path / "model.safetensors").exists()), None)
    if found:
        model = transformer.TransformerLM.from_pretrained(found)
    else:
        shape = dict(vocab_size=257, d_model=128, n_layers=3, n_heads=4, n_kv_heads=2)
        model = transformer.TransformerLM(transformer.TransformerConfig(**shape))
    template, home = templates.choose("chatml"), OUT / "07_sft" / "bench" / "base"
    model.tokenizer_files, _ = checkpoints.add_tokens(model.tokenizer_files, template)
    for name, text in model.tokenizer_files.items():
        with atomic(home / name, "w") as file:
            file.write(text)
    tokenizer = Tokenizer(home)
    checkpoints.resize(model, tokenizer.vocab_size)
    model.config.context_length = max(model.config.context_length, o.context_length)
    model.save_pretrained(home)
    conversations = questions.dataset()[0][: o.examples]
    return home, sft.encode_all(conversations, tokenizer, template, o.context_length)[0]


def bench(given):
    """examples/s and loss curve against TRL's SFTTrainer"""
    o = build(Options, given)
    if o.rounds < 1 or o.steps < 10:
        raise ValueError("--rounds is at least 1, --steps at least 10")
    home, examples = prepare(o)
    result = dict(threads=torch.get_num_threads(), options=given, gflops=matrix_flops() / 1e9)
    print(f"a plain matrix product does {result['gflops']:.0f} GFLOP/s", flush=True)
    for packing in (True, False):
        name = "packed" if packing else "not packed"
        rates, curves = {}, {}
        for i in range(o.rounds):
            for who, train in (("ours", ours), ("TRL", trl)):
                seconds, losses, sizes = train(o, home, examples, packing, o.steps)
                warm = slice(3, None)
                n = min(len(seconds), len(sizes))
                rate = sum(sizes[warm][: n - 3]) / sum(seconds[:n][warm])
                rates.setdefault(who, []).append(rate)
                curves.setdefault(who, []).append(losses)
                end = statistics.mean(losses[-10:])
                print(f"{name}, {who:5} {rate:8.1f} examples/s, last losses {end:.3f}", flush=True)
        ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["TRL"]))
        ends = {who: [statistics.mean(c[-10:]) for c in found] for who, found in curves.items()}
        result[name] = dict(rates=rates, ratio=ratio, curves=curves, ends=ends)
        print(f"{name}: ours {ratio:.2f} times TRL")
    met = result["packed"]["ratio"] >= 1.3
    print(f"{'met' if met else 'missed'}: goal 1.3 times, {result['packed']['ratio']:.2f}")
    with atomic(OUT / "07_sft" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
