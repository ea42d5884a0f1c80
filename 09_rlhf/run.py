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
FAST = dict(optimizer="muon", max_lr=2.5e-3, epochs=1, minibatches=2, prompts_per_step=192)
FAST |= dict(group_size=4, steps=140)
LINES = FAST | dict(max_new_tokens=40, prompts_per_step=32, steps=40, max_lr=1.5e-3, kl_coef=0.15)
DPO = dict(beta=1.0, prompts_per_step=64, steps=30, max_lr=3e-4, warmup_steps=3)
SMALL = dict(sums=FAST | dict(max_new_tokens=6))
LARGE = dict(max_lr=1e-5, micro_prompts=4, prompts_per_step=16, max_new_tokens=128, eval_prompts=64)
ON_POLICY = dict(epochs=1, minibatches=1)  # what has no clip learns once from what was just drawn
ALGORITHMS = dict(reinforce=ON_POLICY, rloo=ON_POLICY, ppo=dict(value_coef=2.0, lam=1.0))
EXACT = ("sums", "gsm8k")  # rewards that are 0 or 1: the share of replies that are right
LEAST = 0.05  # share that has to be right before there is anything to learn from


@dataclass
class Task:
    reward: str | None = None  # sums, last_number, metre, stop_in_time, gsm8k, model, file.py:name
    data: str | None = None  # .json, .jsonl, .csv of prompts, dpo: pairs; None: the reward's own
    watch: str | None = None  # a reward that is only watched, such as the true one of a proxy
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 07, or 05, 04
    template: str = "auto"  # own, chatml or alpaca; auto: the model's own, else chatml


@dataclass
class Options:
    reference: str | None = None  # directory of the model to stay near; None: what it begins as
    pairs: int = 2000  # prompts whose replies dpo makes pairs of, without pairs in --data
    buffer: bool = False  # write what is drawn, with its rewards, to <run>/rollouts.jsonl
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class PairOptions:
    to: str = str(OUT / "09_rlhf" / "pairs.jsonl")  # the file to write
    n: int = 2000  # prompts to draw replies to
    group_size: int = 4  # replies to each
    max_new_tokens: int = 32  # longest reply, tokens
    seed: int = 1  # of the draws
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


def about_sums(task):
    asked = {"sums", "last_number"} & {task.reward, task.watch}
    return bool(asked) and task.data is None


def ask(task):
    """(training prompts, held-out prompts, {question: answer}, what to say of them)."""
    if task.data is not None:
        *parts, answers = tasks.of_prompts(task.data)
    elif task.reward == "gsm8k":
        raise ValueError("--reward gsm8k needs --data, a file with question and answer")
    else:
        parts, answers = (tasks.of_sums() if about_sums(task) else tasks.of_plays()), {}
    what = task.data or ("sums" if about_sums(task) else "passages of the plays")
    return *parts, answers, f"{what}: {len(parts[0]):,} prompts, {len(parts[1]):,} held out"


def judges(task, answers, device):
    """{"": the judge of what is learned from, "_watched": of what is watched}, those there are."""
    found = {"": task.reward, "_watched": task.watch}
    return {k: rewards.named(name, answers, device) for k, name in found.items() if name}


def begin_with(task, device, seed=1):
    """(model, tokenizer, template, ids that end a reply, path) to begin from."""
    path = begin.find_model(task.model, "latest-sum" if about_sums(task) else None)
    torch.manual_seed(seed)
    lm = begin.load_model(path, device)
    tokenizer, template, added = begin.with_template(lm, task.template)
    if added:
        print(f"tokens added for the {template.name} template: {' '.join(added)}")
    return lm, tokenizer, template, turns.stop_tokens(lm, tokenizer, template), path


def reference_of(name, lm, device):
    """The model in a directory, to stay near to, or of None a copy of lm."""
    reference = lm
    if name is not None:
        reference = begin.load_model(begin.find_model(name, flag="--reference"), device)
        files = [one.tokenizer_files.get("tokenizer.json") for one in (lm, reference)]
        if files[0] != files[1] or reference.config.vocab_size != lm.config.vocab_size:
            raise ValueError(
                f"--reference {name} has another tokenizer than the model: what it thinks of the "
                "model's tokens would mean nothing"
            )
    return copy.deepcopy(reference).eval().requires_grad_(False)


def preset(task, algorithm, large=False):
    """What changes in RLConfig."""
    changes = SMALL.get("sums" if about_sums(task) else task.reward, LINES)
    changes = LARGE if large else changes | (DPO if algorithm == "dpo" else {})
    return changes | ALGORITHMS.get(algorithm, {})


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


def prompt_of(messages):
    """What a judge is told was asked: the text, or all messages where there are several."""
    return messages[0]["content"] if len(messages) == 1 else messages


def make_pairs(policy, prompts, judge, how, tokenizer, stops, path):
    """Pairs for DPO of the policy's own replies to prompts, (messages, ids) each: the best and the
    worst of a group where their rewards differ. They are written to `path`, as text and as ids."""
    lines, G, bar = [], max(2, how.group_size), progress(total=len(prompts), desc="drawing")
    for start in range(0, len(prompts), how.prompts_per_step):
        some = prompts[start : start + how.prompts_per_step]
        asked = [ids for _, ids in some]
        drawn = rlhf.rollout(policy, asked, how.max_new_tokens, stops, G, **how.draw)
        texts = texts_of(drawn, tokenizer, stops)
        found = judge([prompt_of(messages) for messages, _ in some for _ in range(G)], texts)[0]
        rows = [ids[:n] for ids, n in zip(drawn.ids.tolist(), drawn.mask.sum(1).tolist())]
        for i, (messages, ids) in enumerate(some):
            group = [b for b in range(i * G, i * G + G) if not found[b].isnan()]
            group.sort(key=found.__getitem__)
            if group and found[group[-1]] > found[group[0]]:
                best, worst = group[-1], group[0]
                line = dict(prompt=prompt_of(messages), chosen=texts[best], rejected=texts[worst])
                lines.append(line | dict(ids=[ids, rows[best], rows[worst]]))
        bar.update(len(some))
    bar.close()
    if not lines:
        raise ValueError("all replies to each prompt were equally good: there are no pairs to make")
    with atomic(path, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


# ---- training


def train(given):
    """teach a model from rewards, or from pairs (--algorithm dpo), and test it before and after"""
    task, options = build(Task, given), build(Options, given)
    algorithm = given.get("algorithm", rlhf.RLConfig.algorithm)
    of_pairs = algorithm == "dpo" and task.data is not None and task.reward is None
    if task.data is not None and task.reward is None and not of_pairs:
        raise ValueError("--data needs a --reward for the replies, or --algorithm dpo and pairs")
    task.reward = task.reward or (None if of_pairs else "sums")
    build(rlhf.RLConfig, given, **preset(task, algorithm))  # says what is wrong before it reads
    device, dtype, reason = pick_device(options.device)
    if options.pairs < 1:
        raise ValueError(f"--pairs {options.pairs}: it must be at least 1")
    if of_pairs:
        (learned, held_out), answers = tasks.of_pairs(task.data), {}
        said = f"{task.data}: {len(learned):,} pairs, {len(held_out):,} held out"
    else:
        learned, held_out, answers, said = ask(task)
    judged_by = judges(task, answers, device)
    lm, tokenizer, template, stops, path = begin_with(task, device, given.get("seed", 1))
    size = sum(p.numel() for p in lm.parameters())
    how = build(rlhf.RLConfig, given, **preset(task, algorithm, size > 5e7))
    most, text = room(lm, how.max_new_tokens), (tokenizer, template)
    test = encode([x[0] for x in held_out] if of_pairs else held_out, *text, most)
    test, held_pairs = test[: how.eval_prompts], []
    if of_pairs:
        examples = encode_pairs(learned, *text, lm.config.context_length)
        held_pairs = encode_pairs(held_out, *text, lm.config.context_length)[: how.eval_prompts]
    else:
        asked = encode(learned, *text, most)
        examples = [ids for _, ids in asked]
    reference = reference_of(options.reference, lm, device)
    plan = asdict(how) | asdict(task) | dict(model=begin.version(path), device=device.type)
    plan |= dict(template=template.name, drawn=options.pairs)
    plan |= dict(reference=options.reference and begin.version(Path(options.reference)))
    plan |= dict(rewards=[rewards.version(name) for name in (task.reward, task.watch) if name])
    plan |= dict(texts=sha256(json.dumps([examples, test, answers]).encode()).hexdigest()[:8])
    code = b"".join((HERE / f"{m}.py").read_bytes() for m in ("policy", "descent", "rewards"))
    plan |= dict(code=sha256(code).hexdigest()[:8])
    run = Run(rlhf.__file__, plan, options.run, options.fresh)
    if run.result:
        print(f"{run.dir} is finished: {result_text(run.result)}")
        return print(f"go on with --steps {2 * how.steps}, or begin again with --fresh")
    policy = rlhf.ActorCritic(lm)

    def judged(messages, drawn):
        """{name: rewards (B,)} of replies to these conversations, and the replies as text."""
        texts, prompts = texts_of(drawn, tokenizer, stops), list(map(prompt_of, messages))
        return {name: one(prompts, texts)[0].to(device) for name, one in judged_by.items()}, texts

    def judge_round(step, numbers, drawn):
        messages = [asked[i][0] for i in numbers for _ in range(how.group_size)]
        texts = texts_of(drawn, tokenizer, stops)
        found, failures = judged_by[""](list(map(prompt_of, messages)), texts)
        if failures:
            say(f"step {step}: {len(failures)} replies left out; the first: {failures[0]}")
        if options.buffer:
            keep_rollout(run.dir / "rollouts.jsonl", step, messages, texts, found, drawn)
        return found.to(device), failures

    rows, ids = map(list, zip(*test))

    def validate():
        found = rlhf.evaluate(policy, reference, ids, stops, lambda x: judged(rows, x)[0], how)
        n, ahead = how.micro_prompts or len(held_pairs), []
        for start in range(0, len(held_pairs), max(n, 1)):
            with torch.no_grad():
                some = held_pairs[start : start + n]
                _, chosen, rejected = rlhf.judge_pairs(policy, reference, some, how)
            ahead.append(chosen > rejected)
        return found | (dict(val_in_order=torch.cat(ahead).float().mean().item()) if ahead else {})

    def replies():
        """What the policy answers to some of the held-out prompts, with rewards."""
        drawn = rlhf.rollout(policy.lm, ids[:8], how.max_new_tokens, stops, temperature=0)
        found, texts = judged(rows[:8], drawn)
        values = found.get("", torch.full((len(texts),), math.nan)).tolist()
        return [dict(reply=text, reward=value) for text, value in zip(texts, values)]

    def say(text):
        (bar.write if sys.stderr.isatty() else print)(text)
        sys.stdout.flush()

    said += f"; {len(examples):,} of them fit"
    if algorithm == "dpo" and not of_pairs:
        kept = run.dir / "pairs.jsonl"
        if not kept.exists():
            some = asked[: options.pairs]
            make_pairs(lm, some, judged_by[""], how, tokenizer, stops, kept)
        examples = [json.loads(line)["ids"] for line in open(kept)]
        said += f"; {len(examples):,} pairs of the best and worst of its own replies in {kept}"
    print(f"model: {path or 'random'}, {size:,} parameters; reference: {options.reference or 'it'}")
    print(f"prompts: {said}")
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
                + ("make sums trains a start" if task.model is None else "give another --model")
            )

    torch.manual_seed(how.seed)
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
    for name, line, key in (
        ("before", first, "val_reward"), ("before_drawn", first, "val_drawn"),
        ("after", last, "val_reward"), ("after_drawn", last, "val_drawn"),
        ("watched", last, "val_reward_watched"), ("in_order", last, "val_in_order"),
        ("kl", last, "val_kl"),
    ):  # fmt: skip
        if key in line:
            result[name] = round(line[key], 4)
    result |= dict(minutes=round(last["time"] / 60, 2), peak_gib=begin.peak_memory(device))
    result["peak_gib"] = round(result["peak_gib"], 2)
    rates = [line["replies_per_s"] for line in lines if "replies_per_s" in line]
    result |= dict(replies_per_s=round(np.median(rates))) if rates else {}
    run.finish(result)
    if options.record:
        begin.record(result, device)
    print(f"{summary(last)}; before: {summary(first)}")
    print(f"model, curves.png, samples.md and metrics are in {run.dir}")


def result_text(result):
    """The figures of a finished run, as text."""
    names = ("before", "after", "after_drawn", "watched", "in_order", "kl")
    return ", ".join(f"{name} {result[name]:.3f}" for name in names if name in result)


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
            row = dict(step=step, prompt=prompt_of(message), completion=text)
            row |= dict(reward=None if math.isnan(value) else value, tokens=n, ended=ended)
            file.write(json.dumps(row | dict(log_prob=round(nats, 4))) + "\n")


def summary(line):
    """The held-out figures of a line of metrics, as text."""
    names = dict(reward="held out", drawn="drawn", reward_watched="watched", in_order="in order")
    found = {said: line[f"val_{name}"] for name, said in names.items() if f"val_{name}" in line}
    said = [f"{name} {value:.3f}" for name, value in found.items()]
    return ", ".join([*said, f"KL {line['val_kl']:.2f} nats a reply"]).replace("-0.00", "0.00")


# ---- looking


def pairs(given):
    """draw replies and write the best and the worst of each group to a file, for 08 or dpo"""
    task, options = build(Task, given), build(PairOptions, given)
    if min(options.n, options.group_size, options.max_new_tokens) < 1 or options.seed < 0:
        raise ValueError("--n, --group_size and --max_new_tokens are at least 1, --seed at least 0")
    if task.data is not None and task.reward is None:
        raise ValueError("--data needs a --reward for the replies")
    device, _, _ = pick_device(options.device)
    task.reward = task.reward or "sums"
    learned, _, answers, said = ask(task)
    judge = judges(task, answers, device)[""]
    lm, *text, stops, path = begin_with(task, device, options.seed)
    sizes = dict(max_new_tokens=options.max_new_tokens, group_size=options.group_size)
    asked = encode(learned, *text, room(lm, options.max_new_tokens))[: options.n]
    make_pairs(lm, asked, judge, rlhf.RLConfig(**sizes), text[0], stops, Path(options.to))
    n = len(Path(options.to).read_text().splitlines())
    print(f"model: {path}; {said}; {n:,} pairs in {options.to}")


def evaluate(given):
    """answer held-out prompts, judge the replies and print some"""
    task, options = build(Task, given), build(EvalOptions, given)
    if min(options.prompts, options.max_new_tokens) < 1 or options.samples < 0:
        raise ValueError("--prompts and --max_new_tokens are at least 1, --samples at least 0")
    device, _, _ = pick_device(options.device)
    if task.model is None:
        task.model = str(OUT / "09_rlhf" / "latest")
    if task.reward is None:  # what it was trained on, where that is known
        file = Path(task.model) / "run.json"
        config = json.loads(file.read_text())["config"] if file.exists() else {}
        task.reward, task.data = config.get("reward") or "sums", task.data or config.get("data")
    _, held_out, answers, said = ask(task)
    judged_by = judges(task, answers, device)
    lm, *text, stops, path = begin_with(task, device)
    test = encode(held_out, *text, room(lm, options.max_new_tokens))
    rows, ids = map(list, zip(*test[: options.prompts]))
    reference = reference_of(options.reference, lm, device)
    how = rlhf.RLConfig(max_new_tokens=options.max_new_tokens)

    def judged(drawn):
        texts, prompts = texts_of(drawn, text[0], stops), list(map(prompt_of, rows))
        return {name: one(prompts, texts)[0].to(device) for name, one in judged_by.items()}

    print(f"model: {path}; {said}, {len(rows)} are asked; reward {task.reward}")
    print(summary(rlhf.evaluate(rlhf.ActorCritic(lm), reference, ids, stops, judged, how)))
    if options.reference is None:
        print("(the KL is to itself: --reference says to what else)")
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
    per_round = Path(how.run) / "run.json"  # a step that was drawn again after a stop: the last
    if per_round.exists():
        config = json.loads(per_round.read_text())["config"]
        lines = lines[-config["prompts_per_step"] * config["group_size"] :]
    if not lines or how.n < 1:
        raise ValueError(f"{path} has nothing of step {step}, or --n {how.n} is below 1")
    lines.sort(key=lambda line: math.inf if line["reward"] is None else -line["reward"])
    right = [line["reward"] for line in lines if line["reward"] is not None]
    mean = f"mean reward {sum(right) / len(right):.3f}" if right else "none with a reward"
    print(f"step {step}: {len(lines)} replies, {mean}")
    for i in np.linspace(0, len(lines) - 1, min(how.n, len(lines))).astype(int):
        line = lines[i]
        print(f"--- reward {line['reward']}, log-probability {line['log_prob']}")
        print(f"{rewards.question(line['prompt'])}\n> {line['completion']}")


if __name__ == "__main__":
    main(
        {
            "train": (train, Task, Options, rlhf.RLConfig),
            "seeds": (study.seeds, study.SeedOptions),
            "hack": (study.hack, study.HackOptions),
            "pairs": (pairs, Task, PairOptions),
            "eval": (evaluate, Task, EvalOptions),
            "show": (show, ShowOptions),
        }
    )
