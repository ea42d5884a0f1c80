"""Runs side by side, each a `run.py train` of its own: algorithms and seeds; a hacked proxy.

Parent: none
New: everything

Read in this order: together, seeds, hack.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import begin
import curves
import torch

import common

HERE = Path(__file__).resolve().parent
GOAL = 0.9  # of held-out sums right, in each seed
KL_BOUND = 5.0  # nats a reply that no seed passes


@dataclass
class SeedOptions:
    algorithms: str = "ppo,grpo"  # which to compare on sums
    seeds: int = 3  # runs of each
    metre: bool = True  # then the metre, by grpo
    jobs: int | None = None  # runs at once; None: one a core, up to 2; on CUDA 1
    steps: int | None = None  # rounds of each run; None: run.py's
    fresh: bool = False  # begin again even if these runs are there
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 07, or 05, 04
    record: bool = False  # append the results to results.jsonl

    def __post_init__(self):
        if self.seeds < 1 or (self.jobs is not None and self.jobs < 1):
            raise ValueError("--seeds and --jobs are at least 1")


@dataclass
class HackOptions:
    proxy: str = "newest"  # reward model of 08 to learn from; newest: of make proxy
    true: str = "sums"  # the reward that is meant, and only watched
    prices: str = "0,0.3"  # prices of a nat of KL to compare
    steps: int = 100  # rounds of each run
    max_lr: float = 2e-3  # learning rate after the warm-up
    fresh: bool = False  # begin again even if these runs are there
    device: str = "auto"  # auto, cpu, cuda or cuda:1
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 07, or 05, 04


def together(runs, jobs):
    """Run {label: flags of `run.py train`}, `jobs` at once; returns {label: run directory}.

    What each says goes to out/09_rlhf/logs/<label>.log. Raises ValueError with the error of one
    that fails; Ctrl-C and SIGTERM go to all, they save, and the same command goes on."""
    logs, waiting, going, found = common.OUT / "09_rlhf" / "logs", dict(runs), {}, {}
    logs.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    env = os.environ | dict(OMP_NUM_THREADS=threads, OUT=str(common.OUT), PYTHONUNBUFFERED="1")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                label = next(iter(waiting))
                flags = waiting.pop(label)
                words = [sys.executable, str(HERE / "run.py"), "train", "--run", label]
                for name, value in flags.items():
                    words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
                log = open(logs / f"{label}.log", "w")  # noqa: SIM115
                print(f"{label} begins: tail -f {log.name}", flush=True)
                going[label] = subprocess.Popen(words, stdout=log, stderr=log, env=env)
            time.sleep(0.5)
            for label, process in list(going.items()):
                if process.poll() is None:
                    continue
                del going[label]
                said = (logs / f"{label}.log").read_text().strip().splitlines() or [""]
                why = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
                if process.returncode:
                    raise ValueError(f"{label} failed: {(why or said)[-1]}")
                where = [re.match(r"(?:run: )?(\S+?)(?: \(going| is finished|$)", s) for s in said]
                where = [Path(m[1]) for m in where if m and f"/{label}-" in m[1]]
                if not where or not json.loads((where[-1] / "run.json").read_text())["result"]:
                    raise ValueError(f"{label} was stopped: the same command goes on")
                found[label] = where[-1]
                last = [line for line in said if "KL " in line or " is finished" in line]
                print(f"{label}: {last[-1]}", flush=True)
    except KeyboardInterrupt:
        print("stopped: the runs have saved, the same command goes on from there")
        raise
    finally:
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return found


def seeds(given):
    """compare algorithms on sums over seeds, then the metre: the main job"""
    o = common.build(SeedOptions, given)
    algorithms = [name.strip() for name in o.algorithms.split(",") if name.strip()]
    if not algorithms:
        raise ValueError("--algorithms names none")
    jobs = o.jobs or (1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1))
    shared = dict(device=o.device) | (dict(fresh=True) if o.fresh else {})
    shared |= {} if o.model is None else dict(model=o.model)
    runs = {"grpo-metre-1": dict(reward="metre", algorithm="grpo", seed=1)} if o.metre else {}
    reward = "last_number" if o.model == "smollm2" else "sums"  # SmolLM2 answers in sentences
    for seed in range(1, o.seeds + 1):
        for name in algorithms:
            runs[f"{name}-sums-{seed}"] = dict(reward=reward, algorithm=name, seed=seed)
    if o.steps is not None:
        shared["steps"] = o.steps
    began = time.perf_counter()
    homes = together({label: flags | shared for label, flags in runs.items()}, jobs)
    minutes, home = (time.perf_counter() - began) / 60, common.OUT / "09_rlhf"
    lines = {label: curves.read(path) for label, path in homes.items()}
    groups = {name: [lines[f"{name}-sums-{s + 1}"] for s in range(o.seeds)] for name in algorithms}
    curves.plot(groups, home / "sums.png", GOAL)
    if o.metre:
        groups["grpo, metre"] = [lines["grpo-metre-1"]]
        curves.plot(dict(grpo=groups["grpo, metre"]), home / "metre.png")
    print(f"{'':14}{'before':>16}{'after':>24}{'drawn':>16}{'largest KL':>12}{'minutes':>9}")
    for name, some in groups.items():
        first, last = some[0][0], [run[-1] for run in some]
        right = [line["val_reward"] for line in last]
        kl = max(line.get(k, 0.0) for run in some for line in run for k in ("val_kl", "kl"))
        drawn = sum(line["val_drawn"] for line in last) / len(last)
        print(
            f"{name:14}{first['val_reward']:8.3f} ({first['val_drawn']:.3f}){'':4}"
            f"{sum(right) / len(right):8.3f} ({min(right):.3f} to {max(right):.3f})"
            f"{drawn:12.3f}{kl:12.2f}{max(line['time'] for line in last) / 60:9.1f}"
        )
        result = dict(reward="metre" if "metre" in name else "sums", algorithm=name.split(",")[0])
        result |= dict(seeds=len(some), before=round(first["val_reward"], 4))
        result |= dict(before_drawn=round(first["val_drawn"], 4))
        result |= dict(worst=round(min(right), 4), mean=round(sum(right) / len(right), 4))
        result |= dict(drawn=round(drawn, 4), largest_kl=round(kl, 3), steps=last[0]["step"])
        result |= dict(minutes=round(max(line["time"] for line in last) / 60, 2))
        if "metre" not in name:
            met = min(right) >= GOAL and kl <= KL_BOUND
            print(
                f"{'':14}{'met' if met else 'missed'}: at least {GOAL:.0%} in each seed, KL never "
                f"above {KL_BOUND} nats a reply"
            )
        if o.record:
            begin.record(result, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{minutes:.1f} minutes in all; plots in {home}, samples.md in each run's directory")


def hack(given):
    """learn from a poor reward model and watch the true reward: over-optimisation"""
    o = common.build(HackOptions, given)
    proxy = o.proxy
    if proxy == "newest":
        homes = common.OUT.glob("08_reward/proxy-??????/model.safetensors")
        newest_first = sorted(homes, key=lambda path: -path.stat().st_mtime)
        if not newest_first:
            raise ValueError("no proxy here: make proxy trains one, or give --proxy a model of 08")
        proxy = newest_first[0].parent
    try:
        prices = [float(price) for price in o.prices.split(",")]
    except ValueError:
        raise ValueError(f"--prices {o.prices}: numbers with commas between are wanted") from None
    shared = dict(reward=proxy, watch=o.true, steps=o.steps, max_lr=o.max_lr)
    shared |= dict(eval_every=5, max_kl=1000)
    shared |= dict(device=o.device) | (dict(fresh=True) if o.fresh else {})
    shared |= {} if o.model is None else dict(model=o.model)
    runs = {f"hack-{price:g}": shared | dict(kl_coef=price) for price in prices}
    jobs = 1 if torch.cuda.is_available() else min(2, os.cpu_count() or 1)
    homes = together(runs, jobs)
    lines = {f"price {label[5:]}": curves.read(path) for label, path in homes.items()}
    curves.hack(lines, common.OUT / "09_rlhf" / "hack.png")
    for label, some in lines.items():
        some = [line for line in some if "val_drawn_watched" in line]
        best = max(some, key=lambda line: line["val_drawn_watched"])
        print(f"{label}:")
        for what, line in (("begins", some[0]), ("is best", best), ("ends", some[-1])):
            print(
                f"  {what:8} step {line['step']:4}, KL {abs(line['val_kl']):6.2f}, proxy "
                f"{line['val_drawn']:7.3f}, true {line['val_drawn_watched']:.3f}"
            )
    print(f"plot in {common.OUT / '09_rlhf' / 'hack.png'}")
    with common.atomic(common.OUT / "09_rlhf" / "hack.json", "w") as file:
        json.dump(lines, file)
