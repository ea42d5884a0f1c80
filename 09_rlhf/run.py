"""Reinforcement learning from rewards, and DPO from pairs. README.md says more."""

import copy
import json
import math
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
import study
import tasks
import torch
import turns

from common import OUT, Run, atomic, build, main, pick_device, progress

HERE = Path(__file__).resolve().parent
# What a reward changes in RLConfig for a small model, what a real one does, and an algorithm.
FAST = dict(optimizer="muon", max_lr=3e-3, epochs=1, minibatches=2, prompts_per_step=192)
FAST |= dict(group_size=4, steps=110)
LINES = FAST | dict(max_new_tokens=40, prompts_per_step=32, steps=50, max_lr=1.5e-3, kl_coef=0.15)
SMALL = dict(sums=FAST | dict(max_new_tokens=6))
LARGE = dict(max_lr=1e-5, micro_prompts=4, prompts_per_step=16, max_new_tokens=128, eval_prompts=64)
ON_POLICY = dict(epochs=1, minibatches=1)  # what has no clip learns once from what was just drawn
ALGORITHMS = dict(reinforce=ON_POLICY, rloo=ON_POLICY, ppo=dict(value_coef=2.0, lam=1.0))
EXACT = ("sums", "gsm8k")  # rewards that are 0 or 1: the share of replies that are right
LEAST = 0.05  # share that has to be right before there is anything to learn from


@dataclass
class Task:
    reward: str | None = None  # sums, metre, stop_in_time, gsm8k, model, path, file.py:name (sums)
    data: str | None = None  # .json, .jsonl, .csv of prompts, dpo: pairs; None: the reward's own
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 07, or 05, 04
    template: str = "auto"  # own, chatml or alpaca; auto: the model's own, else chatml


@dataclass
class Options:
    reference: str | None = None  # directory of the model to stay near; None: what it begins as
    pairs: int = 2000  # prompts that dpo draws replies to, to make pairs, where --data has none
    watch: str | None = None  # a reward that is only watched, such as the true one of a proxy
    buffer: bool = False  # write what is drawn, with its rewards, to <run>/rollouts.jsonl
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class PairOptions:
    to: str = str(OUT / "09_rlhf" / "pairs.jsonl")  # the file to write
    n: int = 2000  # prompts to draw replies to
    device: str = "auto"  # auto, cpu, cuda or cuda:1


@dataclass
class ShowOptions:
    run: str = str(OUT / "09_rlhf" / "latest")  # directory of a run with --buffer
    step: int | None = None  # of this step; None: of the last
    n: int = 12  # replies to show, the best first


@dataclass
class EvalOptions:
    reference: str | None = None  # directory of the model to compare with; None: no KL
    prompts: int = 200  # held-out prompts
    max_new_tokens: int = 32  # longest reply, tokens
    samples: int = 8  # replies to print
    device: str = "auto"  # auto, cpu, cuda or cuda:1


# ---- what is asked and who answers


def ask(task):
    """(training prompts, held-out prompts, {prompt: answer}, what to say of them)."""
    if task.data is not None:
        *parts, answers = tasks.of_file(task.data)
    elif task.reward == "gsm8k":
        raise ValueError("--reward gsm8k needs --data, a file with question and answer")
    else:
        parts, answers = (tasks.of_sums() if task.reward == "sums" else tasks.of_plays()), {}
    what = task.data or ("sums" if task.reward == "sums" else "passages of the plays")
    return *parts, answers, f"{what}: {len(parts[0]):,} prompts, {len(parts[1]):,} held out"


def begin_with(task, device, seed=1):
    """(model, tokenizer, template, ids that end a reply, path) to begin from."""
    path = begin.find_model(task.model, "latest-sum" if task.reward == "sums" else None)
    torch.manual_seed(seed)
    lm = begin.load_model(path, device)
    tokenizer, template, added = begin.with_template(lm, task.template)
    if added:
        print(f"tokens added for the {template.name} template: {' '.join(added)}")
    return lm, tokenizer, template, turns.stop_tokens(lm, tokenizer, template), path


def room(lm, n):
    """How many tokens a prompt may have beside a reply of n; ValueError where that is none."""
    if lm.config.context_length <= n:
        raise ValueError(
            f"--max_new_tokens {n} leaves no room for a prompt in the context of "
            f"{lm.config.context_length} tokens"
        )
    return lm.config.context_length - n


def encode(prompts, tokenizer, template, most):
    """[(messages, ids), ...] of the prompts that have at most `most` tokens."""
    bar = progress(iterable=prompts, desc="encoding", disable=len(prompts) < 10_000)
    found = [(messages, turns.encode_prompt(messages, tokenizer, template)) for messages in bar]
    kept = [(messages, ids) for messages, ids in found if len(ids) <= most]
    if not kept:
        raise ValueError(
            f"none of {len(prompts)} prompts has at most {most} tokens, what the model's context "
            "leaves beside --max_new_tokens"
        )
    return kept


def encode_pairs(pairs, tokenizer, template, context):
    """[(prompt, chosen, rejected), ...] as ids, of the pairs whose two texts fit the context."""
    kept = []
    for messages, *replies in pairs:
        prompt = turns.encode_prompt(messages, tokenizer, template)
        said = [[*messages, dict(role="assistant", content=reply)] for reply in replies]
        ids = [turns.encode_reply(one, tokenizer, template) for one in said]
        if len(prompt) + max(map(len, ids)) <= context:
            kept.append((prompt, *ids))
    if not kept:
        raise ValueError(f"none of {len(pairs)} pairs fits into a context of {context} tokens")
    return kept


def texts_of(drawn, tokenizer, stops):
    """The replies of a Rollout as text, without what ends them."""
    rows = zip(drawn.ids.tolist(), drawn.mask.sum(1).tolist())
    rows = [ids[:n] for ids, n in rows]
    return [tokenizer.decode(ids[:-1] if ids[-1] in stops else ids).strip() for ids in rows]


def make_pairs(policy, prompts, judged, how, stops, path):
    """Pairs for DPO of the policy's own replies to prompts, (messages, ids) each: the best and the
    worst of a group where their rewards differ. They are written to `path`, as text."""
    pairs, lines, G = [], [], max(2, how.group_size)
    for start in progress(iterable=range(0, len(prompts), 256), desc="drawing"):
        some = prompts[start : start + 256]
        drawn = rlhf.rollout(
            policy, [ids for _, ids in some], how.max_new_tokens, stops, G, **how.draw
        )
        found, texts = judged([messages for messages, _ in some for _ in range(G)], drawn)
        rows = [ids[:n] for ids, n in zip(drawn.ids.tolist(), drawn.mask.sum(1).tolist())]
        for i, (messages, ids) in enumerate(some):
            group = [b for b in range(i * G, i * G + G) if not found[""][b].isnan()]
            group.sort(key=found[""].__getitem__)
            if group and found[""][group[-1]] > found[""][group[0]]:
                best, worst = group[-1], group[0]
                pairs.append((ids, rows[best], rows[worst]))
                said = dict(chosen=texts[best], rejected=texts[worst])
                lines.append(dict(prompt=messages[-1]["content"]) | said)
    with atomic(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    if not pairs:
        raise ValueError("all replies to each prompt were equally good: there are no pairs to make")
    return pairs


# ---- training


def train(given):
    """teach a model from rewards, or from pairs (--algorithm dpo), and test it before and after"""
    task, options = build(Task, given), build(Options, given)
    build(rlhf.RLConfig, given)  # says what is wrong before anything is read
    device, dtype, reason = pick_device(options.device)
    algorithm = given.get("algorithm", rlhf.RLConfig.algorithm)
    of_pairs = algorithm == "dpo" and task.data is not None
    if options.pairs < 1:
        raise ValueError(f"--pairs {options.pairs}: it must be at least 1")
    task.reward = task.reward or (None if of_pairs else "sums")
    if of_pairs:
        (learned, held_out), answers = tasks.pairs_of(task.data), {}
        said = f"{task.data}: {len(learned):,} pairs, {len(held_out):,} held out"
    else:
        learned, held_out, answers, said = ask(task)
    judge = rewards.named(task.reward, answers, device) if task.reward else None
    lm, tokenizer, template, stops, path = begin_with(task, device, given.get("seed", 1))
    size = sum(p.numel() for p in lm.parameters())
    changes = LARGE if size > 5e7 else SMALL.get(task.reward, LINES)
    changes = changes | ALGORITHMS.get(algorithm, {})
    how = build(rlhf.RLConfig, given, **changes)
    most, text = room(lm, how.max_new_tokens), (tokenizer, template)
    test = encode([x[0] for x in held_out] if of_pairs else held_out, *text, most)
    test, held_pairs = test[: how.eval_prompts], []
    if of_pairs:
        examples = encode_pairs(learned, *text, lm.config.context_length)
        held_pairs = encode_pairs(held_out, *text, lm.config.context_length)
    else:
        asked = encode(learned, *text, most)
        examples = [ids for _, ids in asked]
    reference = lm
    if options.reference is not None:
        reference = begin.load_model(begin.find_model(options.reference), device)
        files = [one.tokenizer_files.get("tokenizer.json") for one in (lm, reference)]
        if files[0] != files[1] or reference.config.vocab_size != lm.config.vocab_size:
            raise ValueError(
                f"--reference {options.reference} has another tokenizer than the model: what it "
                "thinks of the model's tokens would mean nothing"
            )
    reference = copy.deepcopy(reference).eval().requires_grad_(False)
    plan = asdict(how) | asdict(task) | dict(model=begin.version(path), device=device.type)
    plan |= dict(reference=options.reference, template=template.name, drawn=options.pairs)
    plan |= dict(texts=sha256(json.dumps([examples, test]).encode()).hexdigest()[:8])
    code = b"".join((HERE / f"{m}.py").read_bytes() for m in ("policy", "descent", "rewards"))
    plan |= dict(code=sha256(code).hexdigest()[:8])
    run = Run(rlhf.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print(f"go on with --steps {2 * how.steps}, or begin again with --fresh")
    policy = rlhf.ActorCritic(lm)

    watched = {"": judge} if judge else {}
    if options.watch is not None:
        watched["_watched"] = rewards.named(options.watch, answers, device)

    def judged(messages, drawn):
        """{name: rewards (B,)} of replies to these conversations, and the replies as text."""
        texts, questions = (
            texts_of(drawn, tokenizer, stops),
            [one[-1]["content"] for one in messages],
        )
        return {name: one(questions, texts)[0].to(device) for name, one in watched.items()}, texts

    def judge_round(step, numbers, drawn):
        messages = [asked[i][0] for i in numbers for _ in range(how.group_size)]
        texts = texts_of(drawn, tokenizer, stops)
        found, failures = judge([one[-1]["content"] for one in messages], texts)
        if failures:
            say(f"step {step}: {len(failures)} replies left out; the first: {failures[0]}")
        if options.buffer:
            keep_rollout(run.dir / "rollouts.jsonl", step, messages, texts, found, drawn)
        return found.to(device), failures

    rows, ids = map(list, zip(*test))

    def validate():
        found = rlhf.evaluate(policy, reference, ids, stops, lambda x: judged(rows, x)[0], how)
        if held_pairs:
            with torch.no_grad():
                _, chosen, rejected = rlhf.judge_pairs(policy, reference, held_pairs, how)
            found["val_in_order"] = (chosen > rejected).float().mean().item()
        return found

    def replies():
        """What the policy answers to some of the held-out prompts, with rewards."""
        drawn = rlhf.rollout(policy.lm, ids[:8], how.max_new_tokens, stops, temperature=0)
        found, texts = judged(rows[:8], drawn)
        values = found.get("", torch.full((len(texts),), math.nan)).tolist()
        return [dict(reply=text, reward=value) for text, value in zip(texts, values)]

    if algorithm == "dpo" and not of_pairs:
        kept = run.dir / "pairs.jsonl"
        drawn_from = asked[: options.pairs]
        examples = make_pairs(lm, drawn_from, judged, how, stops, kept)
        said += f"; {len(examples):,} pairs of the best and worst of its own replies in {kept}"
    print(f"model: {path or 'random'}, {size:,} parameters; reference: {options.reference or 'it'}")
    print(f"prompts: {said}; {len(examples):,} fit beside a reply of {how.max_new_tokens} tokens")
    print(f"device: {device} ({reason}), {dtype}, {torch.get_num_threads()} threads")
    print(f"steps: {how.steps:,}, {algorithm}; {plan_of(how, len(examples))}")
    print(f"run: {run.dir}" + (" (going on)" if run.resume else ""), flush=True)
    if how.algorithm in ("ppo", "grpo") and how.epochs * how.minibatches == 1:
        print("one optimizer step a round: the ratio is 1 and the clip never acts")
    before = run.dir / "before.json"
    if not before.exists():
        with atomic(before, "w") as file:
            json.dump(replies(), file)
    bar = progress(total=how.steps, desc="step")
    say = bar.write if sys.stderr.isatty() else print

    def on_step(line):
        bar.update(line["step"] - bar.n)
        if "reward" in line:
            rate = f"{line['replies_per_s']:,.0f} replies/s"
            bar.set_postfix_str(f"reward {line['reward']:.3f}, KL {line['kl']:.2f}, {rate}", False)
        if line["step"] == 5:
            minutes = how.steps * line["time"] / 5 / 60
            say(f"about {minutes:.1f} minutes in all, {begin.peak_memory(device):.2f} GiB")
        if "val_kl" in line:
            say(f"step {line['step']}: {summary(line)}")
        right = line.get("val_drawn", 1.0)
        if line["step"] == 0 and task.reward in EXACT and right < LEAST:
            raise ValueError(
                f"only {right:.1%} of the drawn replies are right, too few to learn from: "
                + (
                    "make sums trains a start"
                    if task.reward == "sums"
                    else "train on answers first"
                )
            )

    try:
        rlhf.train(
            policy, reference, examples, judge_round, validate, lm.save_pretrained, how, run, stops,
            device, dtype, on_step,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise ValueError("out of GPU memory: give a smaller --micro_prompts") from None
    finally:
        bar.close()
    lines = curves.read(run.dir)
    curves.plot({algorithm: [lines]}, run.dir / "curves.png")
    curves.samples(rows, json.loads(before.read_text()), replies(), run.dir / "samples.md")
    first, last = lines[0], lines[-1]
    result = dict(reward=task.reward, algorithm=algorithm, steps=last["step"], seed=how.seed)
    names = dict(before="val_reward", before_drawn="val_drawn")
    result |= {name: round(first[key], 4) for name, key in names.items() if key in first}
    for name in ("val_reward", "val_drawn", "val_reward_watched", "val_in_order", "val_kl"):
        if name in last:
            result[name.removeprefix("val_")] = round(last[name], 4)
    result |= dict(minutes=round(last["time"] / 60, 2), peak_gib=begin.peak_memory(device))
    result["peak_gib"] = round(result["peak_gib"], 2)
    result["replies_per_s"] = round(np.median([x.get("replies_per_s", 0) for x in lines[1:]]))
    run.finish(result)
    if options.record:
        begin.record(result, device)
    print(f"{summary(last)}, from {summary(first)}")
    print(f"model, curves.png, samples.md and metrics are in {run.dir}")


def plan_of(how, n):
    """What a step consists of, as text."""
    if how.algorithm == "dpo":
        return f"{min(n, how.prompts_per_step)} of {n:,} pairs in a step"
    P, G = min(n, how.prompts_per_step), how.group_size
    return (
        f"{P} of {n:,} prompts x {G} replies, {how.epochs} x {how.minibatches} optimizer steps in "
        f"each, {min(P, how.micro_prompts or P)} prompts at once"
    )


def keep_rollout(path, step, messages, texts, found, drawn):
    """Append what was drawn in a round to a JSONL file."""
    log_probs = (drawn.log_probs * drawn.mask).sum(1).tolist()
    rows = zip(messages, texts, found.tolist(), drawn.mask.sum(1).tolist(), log_probs)
    with open(path, "a") as file:
        for (message, text, value, n, nats), ended in zip(rows, drawn.ended.tolist()):
            row = dict(step=step, prompt=message[-1]["content"], completion=text)
            row |= dict(reward=None if math.isnan(value) else value, tokens=n, ended=ended)
            file.write(json.dumps(row | dict(log_prob=round(nats, 4))) + "\n")


def summary(line):
    """The held-out figures of a line of metrics or a result, as text."""
    found = {name.removeprefix("val_"): value for name, value in line.items()}
    said = []
    if "reward" in found and not isinstance(found["reward"], str):
        said.append(f"held out {found['reward']:.3f}")
    if "drawn" in found:
        said.append(f"drawn {found['drawn']:.3f}")
    if "reward_watched" in found:
        said.append(f"watched {found['reward_watched']:.3f}")
    if "in_order" in found:
        said.append(f"{found['in_order']:.1%} of held-out pairs in order")
    return ", ".join([*said, f"KL {abs(found['kl']):.2f} nats a reply"])


# ---- looking


def pairs(given):
    """draw replies and write the best and the worst of each group to a file, for 08 or dpo"""
    task, options, how = build(Task, given), build(PairOptions, given), build(rlhf.RLConfig, given)
    if options.n < 1:
        raise ValueError(f"--n {options.n}: it must be at least 1")
    device, _, _ = pick_device(options.device)
    task.reward = task.reward or "sums"
    learned, _, answers, said = ask(task)
    judge = rewards.named(task.reward, answers, device)
    lm, *text, stops, path = begin_with(task, device, how.seed)
    how = build(rlhf.RLConfig, given, **SMALL.get(task.reward, LINES))
    asked = encode(learned, *text, room(lm, how.max_new_tokens))[: options.n]

    def judged(messages, drawn):
        texts = texts_of(drawn, text[0], stops)
        return {"": judge([one[-1]["content"] for one in messages], texts)[0]}, texts

    found = make_pairs(lm, asked, judged, how, stops, Path(options.to))
    print(f"model: {path}; {said}; {len(found):,} pairs in {options.to}")


def evaluate(given):
    """answer held-out prompts, judge the replies and print some"""
    task, options = build(Task, given), build(EvalOptions, given)
    if min(options.prompts, options.max_new_tokens) < 1 or options.samples < 0:
        raise ValueError("--prompts and --max_new_tokens are at least 1, --samples at least 0")
    device, _, _ = pick_device(options.device)
    task.reward = task.reward or "sums"
    if task.model is None:
        task.model = str(OUT / "09_rlhf" / "latest")
    _, held_out, answers, said = ask(task)
    judge = rewards.named(task.reward, answers, device)
    lm, *text, stops, path = begin_with(task, device)
    test = encode(held_out, *text, room(lm, options.max_new_tokens))
    rows, ids = map(list, zip(*test[: options.prompts]))
    reference = lm
    if options.reference is not None:
        reference = begin.load_model(begin.find_model(options.reference), device)
    how = rlhf.RLConfig(max_new_tokens=options.max_new_tokens)

    def judged(drawn):
        texts = texts_of(drawn, text[0], stops)
        return {"": judge([messages[-1]["content"] for messages in rows], texts)[0].to(device)}

    print(f"model: {path}; {said}, {len(rows)} are asked")
    print(summary(rlhf.evaluate(rlhf.ActorCritic(lm), reference, ids, stops, judged, how)))
    drawn = rlhf.rollout(lm, ids, options.max_new_tokens, stops, temperature=0)
    found = zip(rows, texts_of(drawn, text[0], stops), judged(drawn)[""].tolist())
    for messages, reply, value in list(found)[: options.samples]:
        print(f"--- {value:.3f}\n{messages[-1]['content']}\n> {reply}")


def show(given):
    """print replies that a run with --buffer has drawn, from the best to the worst"""
    how = build(ShowOptions, given)
    path = Path(how.run) / "rollouts.jsonl"
    if not path.exists():
        raise ValueError(f"{path} is not there: train with --buffer")
    lines = [json.loads(line) for line in open(path)]
    step = lines[-1]["step"] if how.step is None else how.step
    lines = [line for line in lines if line["step"] == step]
    if not lines or how.n < 1:
        raise ValueError(f"{path} has nothing of step {step}, or --n {how.n} is below 1")
    lines.sort(key=lambda line: -math.inf if line["reward"] is None else -line["reward"])
    right = [line["reward"] for line in lines if line["reward"] is not None]
    print(f"step {step}: {len(lines)} replies, mean reward {sum(right) / len(right):.3f}")
    for i in np.linspace(0, len(lines) - 1, min(how.n, len(lines))).astype(int):
        line = lines[i]
        print(f"--- reward {line['reward']}, log-probability {line['log_prob']}")
        print(f"{line['prompt']}\n> {line['completion']}")


if __name__ == "__main__":
    main(
        {
            "train": (train, Task, Options, rlhf.RLConfig),
            "seeds": (study.seeds, study.SeedOptions),
            "hack": (study.hack, study.HackOptions),
            "pairs": (pairs, Task, PairOptions, rlhf.RLConfig),
            "eval": (evaluate, Task, EvalOptions),
            "show": (show, ShowOptions),
        }
    )
