"""Does each stage earn its place? 03, 04 and 05 train in turn on the same text for the same time.

A short run of each, twice and in turn, says how many steps it does in the seconds given; then it
trains that many, with its own schedule. What counts is the time spent in training steps: starting,
evaluations, checkpoints and samples do not. Runs and ladder.json are under out/ladder.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from readme import cell

from common import OUT, atomic, build, main

ROOT = Path(__file__).resolve().parents[1]
STAGES = ["03_gpt", "04_modern", "05_scaling"]


@dataclass
class Options:
    seconds: float = 130.0  # of training steps, each run
    seeds: int = 1  # runs of each stage, with seeds 1, 2, ...
    probe_steps: int = 60  # steps of each of the short runs


def train(stage, name, steps, seed):
    """Run a stage; returns (its lines of metrics, its result)."""
    command = [sys.executable, ROOT / stage / "run.py", "train", "--fresh", "--run", name]
    command += ["--steps", steps, "--seed", seed, "--tokenizer", OUT / "01_tokenizer" / "latest"]
    env = os.environ | {"OUT": str(OUT / "ladder")}
    done = subprocess.run([str(word) for word in command], env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{stage} failed: {(done.stderr.strip() or done.stdout)[-300:]}")
    home = OUT / "ladder" / stage / "latest"
    lines = [json.loads(line) for line in open(home / "metrics.jsonl")]
    return lines, json.loads((home / "run.json").read_text())["result"]


def step_seconds(lines):
    """Seconds of each step."""
    tokens = [b["tokens"] - a["tokens"] for a, b in zip(lines, lines[1:])]
    return [n / line["tokens_per_s"] for n, line in zip(tokens, lines[1:])]


def ladder(given):
    """train 03, 04 and 05 for the same seconds and compare bits per byte"""
    o, rows, probes = build(Options, given), [], {stage: [] for stage in STAGES}
    for _ in range(2):
        for stage in STAGES:
            seconds = step_seconds(train(stage, "probe", o.probe_steps, 1)[0])
            probes[stage].append(statistics.median(seconds))
    steps = {stage: round(o.seconds / statistics.mean(found)) for stage, found in probes.items()}
    print("| stage | seed | steps | tokens | seconds | bits per byte |\n" + "| --- " * 6 + "|")
    for seed in range(1, o.seeds + 1):
        for stage in STAGES:
            lines, result = train(stage, "ladder", steps[stage], seed)
            row = dict(stage=stage, seed=seed, steps=len(lines), tokens=lines[-1]["tokens"])
            row |= dict(seconds=round(sum(step_seconds(lines)), 1), val_bpb=result["val_bpb"])
            rows.append(row)
            print("| " + " | ".join(map(cell, row.values())) + " |", flush=True)
    mean = [statistics.mean(r["val_bpb"] for r in rows if r["stage"] == s) for s in STAGES]
    falls = all(a > b for a, b in zip(mean, mean[1:]))
    print("each stage is below the one before" if falls else "NOT each is below the one before")
    with atomic(OUT / "ladder" / "ladder.json", "w") as file:
        json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main({"ladder": (ladder, Options)})
