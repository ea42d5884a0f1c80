"""Reinforcement learning from rewards, and DPO from pairs. README.md says more."""

import json
import sys
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import begin
import curves
import numpy as np
import rewards
import rlhf
import tasks
import torch
import turns

from common import OUT, Run, atomic, build, main, pick_device, progress

HERE = Path(__file__).resolve().parent
# What a reward changes in RLConfig, for a small model and for a real one.
SUMS = dict(max_new_tokens=6)
LINES = dict(max_new_tokens=32, prompts_per_step=16, steps=60)
SMALL = dict(sums=SUMS, metre=LINES, stop_in_time=LINES)
LARGE = dict(max_lr=1e-5, micro_prompts=4, prompts_per_step=16, max_new_tokens=128, eval_prompts=64)
# And an algorithm: one pass on what was just drawn, without a clip, or several with.
ALGORITHMS = dict(
    reinforce=dict(epochs=1, minibatches=1),
    rloo=dict(epochs=1, minibatches=1),
    ppo=dict(),
    grpo=dict(),
    dpo=dict(),
)
EXACT = ("sums", "gsm8k")  # rewards that are 0 or 1: the share of replies that are right
LEAST = 0.05  # share that has to be right before there is anything to learn from


@dataclass
class Task:
    reward: str = "sums"  # sums, metre, stop_in_time, gsm8k, model, a directory, file.py:function
    data: str | None = None  # .json or .jsonl with prompts, dpo: pairs; None: what the reward asks
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 07, or 05, 04
    template: str = "auto"  # own, chatml or alpaca; auto: the model's own, else chatml


@dataclass
class Options:
    reference: str | None = None  # directory of the model to stay near; None: what it begins as
    buffer: bool = False  # write what is drawn, with its rewards, to <run>/rollouts.jsonl
    pairs: int = 2000  # pairs that dpo makes of drawn replies where --data gives none
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class ShowOptions:
    run: str = str(OUT / "09_rlhf" / "latest")  # directory of a run with --buffer
    step: int | None = None  # of this step; None: of the last
    n: int = 12  # replies to show, from the best to the worst


@dataclass
class EvalOptions:
    n: int = 200  # held-out prompts
    show: int = 8  # replies to print
    max_new_tokens: int = 32  # longest reply, tokens
    device: str = "auto"  # auto, cpu, cuda or cuda:1


def ask(task):
    """(training prompts, held-out prompts, {prompt: answer}, what to say of them)."""
    if task.data is not None:
        learned, held_out, answers = tasks.of_file(task.data)
        return learned, held_out, answers, f"{task.data}"
    if task.reward == "sums":
        return *tasks.of_sums(), {}, "sums of numbers of one and two digits"
    if task.reward == "gsm8k":
        raise ValueError("--reward gsm8k needs --data, a file with question and answer")
    return *tasks.of_plays(), {}, "passages of the plays"


def encode(prompts, tokenizer, template, most):
    """(messages, ids) of the prompts that have at most `most` tokens."""
    bar = progress(iterable=prompts, desc="encoding", disable=len(prompts) < 2000)
    found = [(messages, turns.encode_prompt(messages, tokenizer, template)) for messages in bar]
    return [(messages, ids) for messages, ids in found if len(ids) <= most]


def start(task, given, device):
    """(model, tokenizer, template, stop tokens, path) to begin from."""
    path = begin.find_model(task.model, "latest-sum" if task.reward == "sums" else None)
    torch.manual_seed(given.get("seed", 1))
    lm = begin.load_model(path, device)
    tokenizer, template, added = begin.with_template(lm, task.template)
    if added:
        print(f"tokens added for the {template.name} template: {' '.join(added)}")
    return lm, tokenizer, template, turns.stop_tokens(lm, tokenizer, template), path


def texts_of(drawn, tokenizer, stops):
    """The replies of a Rollout as text, without what ends them."""
    rows = zip(drawn.ids.tolist(), drawn.mask.sum(1).tolist())
    rows = [ids[:n] for ids, n in rows]
    return [tokenizer.decode(ids[:-1] if ids[-1] in stops else ids).strip() for ids in rows]


def train(given):
    """teach a model from rewards, or from pairs (--algorithm dpo), and test it before and after"""
    task, options = build(Task, given), build(Options, given)
    build(rlhf.RLConfig, given)  # says what is wrong before anything is read
    device, dtype, reason = pick_device(options.device)
    of_pairs = given.get("algorithm") == "dpo" and task.data is not None
    judge_texts, answers = None, {}
    if of_pairs:
        learned, held_out = tasks.pairs_of(task.data)
        said = f"{task.data}, pairs"
    else:
        learned, held_out, answers, said = ask(task)
    if not of_pairs or task.reward != "sums":
        judge_texts = rewards.named(task.reward, answers, device)
    lm, tokenizer, template, stops, path = start(task, given, device)
    size = sum(p.numel() for p in lm.parameters())
    changes = LARGE if size > 5e7 else SMALL.get(task.reward, LINES)
    changes = changes | ALGORITHMS[given.get("algorithm", "grpo")]
    how = build(rlhf.RLConfig, given, **changes)
    most = lm.config.context_length - how.max_new_tokens
    if most < 1:
        raise ValueError(
            f"--max_new_tokens {how.max_new_tokens} leaves no room for a prompt in the context of "
            f"{lm.config.context_length} tokens"
        )
    text = (tokenizer, template)
    if of_pairs:
        prompts, left_out = encode_pairs(learned, *text, lm.config.context_length)
        asked = encode([messages for messages, *_ in held_out], *text, most)
    else:
        train_prompts = encode(learned, *text, most)
        left_out, prompts = len(learned) - len(train_prompts), [ids for _, ids in train_prompts]
        asked = encode(held_out, *text, most)
    asked = asked[: how.eval_prompts]
    if not prompts or not asked:
        raise ValueError(
            f"no prompt has at most {most} tokens, what the context of {lm.config.context_length} "
            f"leaves beside --max_new_tokens {how.max_new_tokens}"
        )
    plan = asdict(how) | asdict(task) | dict(model=begin.version(path), device=device.type)
    plan |= dict(reference=options.reference, template=template.name, pairs=options.pairs)
    plan |= dict(prompts=sha256(json.dumps([prompts, asked]).encode()).hexdigest()[:8])
    code = b"".join((HERE / f"{m}.py").read_bytes() for m in ("policy", "descent", "rewards"))
    plan |= dict(code=sha256(code).hexdigest()[:8])
    run = Run(rlhf.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * how.steps}, or begin again with --fresh")
    reference = begin.load_model(Path(options.reference), device) if options.reference else None
