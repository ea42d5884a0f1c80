"""Ours against TRL's RewardTrainer: pairs/s and the accuracy reached, on comparisons of the plays.

Both start from the same weights (07's newest, else 05's or 04's, else random ones) with a head of
zeros and one block more, get the same tokenised pairs once, about as many a step, AdamW, learning
rates and clipping in float32. Each round trains both from the start, in turn, in one process; data
and set-up do not count. Ours reads a prompt once for all of its replies; a third run has each pair
by itself, its two replies after one prompt. Held-out pairs are judged by each. The machine's plain
matrix product is measured beside.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import figures
import inputs
import numpy as np
import preferences
import reward
import torch

from common import EOT, OUT, atomic, build, main

HOME = OUT / "08_reward" / "bench"
TRAIN = dict(max_lr=1e-3, warmup_steps=5, eval_every=10**9, centre=0.0)


@dataclass
class Options:
    rounds: int = 3  # times that each trains, with seeds 1, 2, ...
    pairs: int = 1536  # that each trains on, once
    batch: int = 32  # pairs in a step
    test_pairs: int = 900  # held-out pairs that are judged
    context_length: int = 384  # tokens in a row of ours


def ours(o, seed, encoded):
    """(pairs/s, accuracy's judge) of our training on these examples."""
    model = reward.RewardModel.from_pretrained(HOME / "start")
    per_pair = sum(len(ids) for ids, _ in encoded) / o.pairs
    tokens = round(o.batch * per_pair / o.context_length) * o.context_length
    loader = reward.ExampleLoader(
        encoded, o.context_length, tokens, None, True, None, seed, reward.compared
    )
    config = reward.TrainConfig(steps=len(loader.epoch(0)), seed=seed, **TRAIN)
    clock, counts = [], []

    def loss_of(rows, total):
        return reward.preference_loss(model, rows, total, config)

    def log(**line):
        clock.append(time.perf_counter())
        counts.append(line["targets"])

    run = SimpleNamespace(dir=HOME / "ours", resume=False, log=log)
    nothing = dict(val_loss=0.0)
    torch.manual_seed(seed)
    reward.train(model, loader, loss_of, lambda: nothing, lambda directory: None, config, run)
    return sum(counts[3:-1]) / (clock[-2] - clock[2]), model


def trl(o, seed, rows):
    """The same of TRL's RewardTrainer."""
    import datasets
    import transformers
    from trl import RewardConfig, RewardTrainer

    transformers.logging.set_verbosity_error()
    start = HOME / "start"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        start, dtype=torch.float32
    )
    config = RewardConfig(
        output_dir=str(HOME / "trl"), num_train_epochs=1, per_device_train_batch_size=o.batch,
        learning_rate=TRAIN["max_lr"], lr_scheduler_type="linear", warmup_steps=5, seed=seed,
        logging_steps=1, weight_decay=0.0, adam_beta2=0.99, max_grad_norm=1.0, max_length=None,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    clock = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            clock.append(time.perf_counter())

    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    tokenizer.pad_token = EOT  # not what ends a reply: the last token that is no padding counts
    trainer = RewardTrainer(
        model=model, args=config, train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(HOME / "theirs")
    n = len(clock) - 4  # neither the first three nor the last, which can be smaller
    return n * o.batch / (clock[-2] - clock[2]), reward.RewardModel.from_pretrained(HOME / "theirs")


def prepare(o):
    """The model directory both start from; pairs as ours, one by one, and as TRL's; test pairs."""
    torch.manual_seed(0)
    trunk = inputs.load_model(inputs.find_model(None), torch.device("cpu"))
    tokenizer, template, _ = inputs.with_template(trunk, "auto")
    trunk.config.context_length = max(trunk.config.context_length, o.context_length)
    reward.deepen(trunk, 2)
    reward.RewardModel(trunk).save_pretrained(HOME / "start")
    learned, held_out = preferences.dataset()
    if not 6 * o.batch <= o.pairs <= len(learned):
        raise ValueError(f"--pairs is from six batches to {len(learned):,}")
    learned = learned[: o.pairs]
    text = (tokenizer, template, o.context_length)
    together, apart = reward.encode_all(learned, *text)[0], []
    for pair in learned:
        apart += reward.encode_all([pair], *text)[0]
    rows = []
    for ids, (branches, _) in apart:
        ids, branches = np.array(ids), np.array(branches)
        texts = (ids[(branches == 0) | (branches == n)].tolist() for n in (1, 2))
        rows.append(dict(zip(("chosen_ids", "rejected_ids"), texts)))
    test = held_out[: o.test_pairs]
    return together, apart, rows, test, reward.encode_all(test, *text)[0]


def bench(given):
    """pairs/s and accuracy against TRL's RewardTrainer"""
    o = build(Options, given)
    if o.rounds < 1 or o.test_pairs < 1 or o.batch < 1:
        raise ValueError("--rounds, --test_pairs and --batch are at least 1")
    together, apart, rows, test, examples = prepare(o)
    result = dict(threads=torch.get_num_threads(), options=given)
    result["gflops"] = inputs.matrix_flops(torch.device("cpu"), torch.float32) / 1e9
    print(f"a plain matrix product does {result['gflops']:.0f} GFLOP/s", flush=True)
    found = {}
    for seed in range(1, o.rounds + 1):
        for who, train, data in (
            ("ours", ours, together), ("ours, pair by pair", ours, apart), ("TRL", trl, rows),
        ):  # fmt: skip
            rate, model = train(o, seed, data)
            judged = reward.evaluate(examples, reward.score(model, examples), test)
            share = figures.accuracy(judged)[0]
            found.setdefault(who, []).append((rate, share))
            print(f"seed {seed}, {who:18} {rate:6.1f} pairs/s, {share:.1%} in order", flush=True)
    theirs = found["TRL"]
    for who in ("ours", "ours, pair by pair"):
        ratio = statistics.median(a / b for (a, _), (b, _) in zip(found[who], theirs))
        ahead = statistics.mean(a - b for (_, a), (_, b) in zip(found[who], theirs))
        result[who] = dict(runs=found[who], ratio=ratio, ahead=ahead)
        print(f"{who}: {ratio:.2f} times TRL's pairs/s, {100 * ahead:+.1f} points in accuracy")
    result["TRL"] = theirs
    ratio, ahead = result["ours"]["ratio"], result["ours"]["ahead"]
    met = ratio >= 1.3 and ahead > -0.02
    print(
        f"{'met' if met else 'missed'}: goal 1.3 times at the same accuracy (within 2 points); "
        f"{ratio:.2f} times, {100 * ahead:+.1f} points"
    )
    with atomic(OUT / "08_reward" / "bench.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
