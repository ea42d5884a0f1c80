"""Ours against TRL's GRPOTrainer: replies and updates per second, and the reward reached.

Both start from the same weights (07's, tuned on sums), are given the same prompts in the same
order, draw the same number of replies to each with the same longest length, judge them by the same
function, and take one AdamW step of GRPO a round, with the same rate, clipping and KL to a
reference, in float32. Each round of the benchmark trains both from the start, in turn, in one
process; loading does not count. The machine's plain matrix product is measured beside.
"""

import copy
import json
import statistics
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import begin
import numpy as np
import rewards
import rlhf
import tasks
import torch
import turns

from common import OUT, atomic, build, main

HOME = OUT / "09_rlhf" / "bench"


@dataclass
class Options:
    reward: str = "sums"  # sums, or metre: passages to go on with, in up to 40 tokens
    rounds: int = 3  # times that each trains, with seeds 1, 2, ...
    steps: int = 50  # updates, each on replies that were just drawn
    prompts: int = 64  # in a step
    group_size: int = 8  # replies to each
    max_new_tokens: int | None = None  # longest reply, tokens; None: 6 for sums, 40 for metre
    max_lr: float = 5e-4  # learning rate
    kl_coef: float = 0.02  # price of a nat of KL
    test_prompts: int = 200  # held-out prompts


def text_of(conversations):
    return [messages[-1]["content"] for messages in conversations]


class Bench:
    """What both share: the start, prompts, the judge."""

    def __init__(self, o):
        self.o = o
        path = begin.find_model(None, "latest-sum" if o.reward == "sums" else None)
        self.reward = dict(sums=rewards.sums, metre=rewards.metre)[o.reward]
        lm = begin.load_model(path, torch.device("cpu"))
        self.tokenizer, self.template, _ = begin.with_template(lm, "auto")
        self.stops = turns.stop_tokens(lm, self.tokenizer, self.template)
        lm.token_ids["pad_token_id"] = self.tokenizer.eot
        lm.save_pretrained(HOME / "start")
        learned, held_out = tasks.of_sums() if o.reward == "sums" else tasks.of_plays()
        self.learned, self.test = learned[: o.steps * o.prompts], held_out[: o.test_prompts]

    def encode(self, conversations):
        return [turns.encode_prompt(m, self.tokenizer, self.template) for m in conversations]

    def judge(self, conversations, drawn):
        rows = [ids[mask].tolist() for ids, mask in zip(drawn.ids, drawn.mask)]
        rows = [row[:-1] if row[-1] in self.stops else row for row in rows]
        texts = [self.tokenizer.decode(row) for row in rows]
        return rewards.each(self.reward)(text_of(conversations), texts)[0]

    def reached(self, lm):
        """Mean reward of drawn and of the likeliest replies to held-out prompts."""
        torch.manual_seed(0)
        start = begin.load_model(HOME / "start", torch.device("cpu"))
        config = rlhf.RLConfig(max_new_tokens=self.o.max_new_tokens)

        def judged(drawn):
            return {"": self.judge(self.test, drawn)}

        asked = self.encode(self.test)
        found = rlhf.evaluate(rlhf.ActorCritic(lm), start, asked, self.stops, judged, config)
        return found["val_drawn"], found["val_reward"]

    def ours(self, seed):
        """(seconds a step, median, of which drawing; the model)."""
        o = self.o
        lm = begin.load_model(HOME / "start", torch.device("cpu"))
        reference = copy.deepcopy(lm).requires_grad_(False)
        config = rlhf.RLConfig(
            steps=o.steps, prompts_per_step=o.prompts, group_size=o.group_size, epochs=1,
            minibatches=1, max_new_tokens=o.max_new_tokens, max_lr=o.max_lr, kl_coef=o.kl_coef,
            warmup_steps=1, beta2=0.999, eval_every=10**9, seed=seed, skip_equal=False,
        )  # fmt: skip
        asked, clock = self.encode(self.learned), []

        def judge(step, numbers, drawn):
            conversations = [self.learned[i] for i in numbers for _ in range(o.group_size)]
            return self.judge(conversations, drawn), []

        def log(**line):
            clock.append((time.perf_counter(), line.get("draw_seconds", 0.0)))

        run = SimpleNamespace(dir=HOME / "ours", resume=False, log=log)
        run.dir.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        rlhf.train(
            rlhf.ActorCritic(lm), reference, asked, judge, dict, lambda directory: None, config,
            run, self.stops,
        )  # fmt: skip
        times = np.diff([moment for moment, _ in clock])
        return statistics.median(times[1:-1]), statistics.median(x for _, x in clock[2:]), lm

    def trl(self, seed):
        """The same of TRL's GRPOTrainer; how long it draws it does not say."""
        import datasets
        import transformers
        from trl import GRPOConfig, GRPOTrainer

        o = self.o
        transformers.logging.set_verbosity_error()
        model = transformers.AutoModelForCausalLM.from_pretrained(
            HOME / "start", dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(HOME / "start")
        tokenizer.pad_token_id = self.tokenizer.eot
        config = GRPOConfig(
            output_dir=str(HOME / "trl"), max_steps=o.steps, seed=seed,
            per_device_train_batch_size=o.prompts * o.group_size, steps_per_generation=1,
            num_generations=o.group_size, max_completion_length=o.max_new_tokens, beta=o.kl_coef,
            temperature=1.0, epsilon=0.2, loss_type="grpo", scale_rewards="group",
            learning_rate=o.max_lr, lr_scheduler_type="linear", warmup_steps=1, weight_decay=0.0,
            adam_beta2=0.999, max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
            use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
            shuffle_dataset=False,
        )  # fmt: skip
        clock = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                clock.append(time.perf_counter())

        def reward(prompts, completions, **_):
            return [
                self.reward(prompt[-1]["content"], completion[0]["content"])
                for prompt, completion in zip(prompts, completions)
            ]

        numbers = [
            i for step in range(1, o.steps + 1)
            for i in rlhf.batch_of(len(self.learned), o.prompts, seed, step)
        ]  # fmt: skip
        rows = [dict(prompt=self.learned[i]) for i in numbers]
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=config, processing_class=tokenizer,
            train_dataset=datasets.Dataset.from_list(rows), callbacks=[Clock()],
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        model.save_pretrained(HOME / "theirs")
        tokenizer.save_pretrained(HOME / "theirs")
        lm = begin.load_model(HOME / "theirs", torch.device("cpu"))
        return statistics.median(np.diff(clock)[:-1]), None, lm


def bench(given):
    """replies and updates per second and the reward reached, against TRL's GRPOTrainer"""
    o = build(Options, given)
    if o.rounds < 1 or o.steps < 4 or min(o.prompts, o.test_prompts) < 1 or o.group_size < 2:
        raise ValueError("--rounds from 1, --steps from 4, --group_size from 2")
    if o.reward not in ("sums", "metre"):
        raise ValueError(f"--reward {o.reward} is none of sums and metre")
    o.max_new_tokens = o.max_new_tokens or (6 if o.reward == "sums" else 40)
    warnings.filterwarnings("ignore")
    both = Bench(o)
    result = dict(threads=torch.get_num_threads(), options=given)
    result["gflops"] = begin.matrix_flops(torch.device("cpu"), torch.float32) / 1e9
    print(f"a plain matrix product does {result['gflops']:.0f} GFLOP/s", flush=True)
    drawn, likeliest = both.reached(begin.load_model(HOME / "start", torch.device("cpu")))
    print(f"start: mean reward {drawn:.3f} of drawn replies, {likeliest:.3f} of the likeliest")
    found, n = {"ours": [], "TRL": []}, o.prompts * o.group_size
    for seed in range(1, o.rounds + 1):
        for who, train in (("ours", both.ours), ("TRL", both.trl)):
            seconds, drawing, lm = train(seed)
            reached = both.reached(lm)
            found[who].append((n / seconds, 1 / seconds, *reached))
            print(
                f"seed {seed}, {who:5} {n / seconds:7.1f} replies/s, {1 / seconds:.2f} updates/s"
                + (f" ({drawing / seconds:.0%} of it drawing)" if drawing else "")
                + f"; held out {reached[0]:.3f} drawn, {reached[1]:.3f} likeliest",
                flush=True,
            )
    ratio = statistics.median(a[0] / b[0] for a, b in zip(found["ours"], found["TRL"]))
    ahead = statistics.mean(a[2] - b[2] for a, b in zip(found["ours"], found["TRL"]))
    result |= found | dict(ratio=ratio, ahead=ahead)
    met = ratio >= 1.5 and ahead > -0.03
    print(
        f"{'met' if met else 'missed'}: goal 1.5 times TRL's replies/s at the same reward (within "
        f"3 points); {ratio:.2f} times, {100 * ahead:+.1f} points"
    )
    with atomic(OUT / "09_rlhf" / f"bench-{o.reward}.json", "w") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main({"bench": (bench, Options)})
