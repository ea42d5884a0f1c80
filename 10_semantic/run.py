"""Four studies: concepts, meaning in context, hyperbolic space, bytes. README.md says more."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import bytes_study
import concept_scores
import concept_study
import draw_bytes
import draw_concepts
import draw_hyperbolic
import hyperbolic_study
import report
import torch

from common import OUT, Run, Tokenizer, build, corpus, main

HERE = Path(__file__).resolve().parent
DONE = re.compile(r"^result: | is finished: ")  # the line of a study that has its result


@dataclass
class Options:
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl
    threads: int = 1  # threads of torch: these models are too small to share out


@dataclass
class TextOptions:
    data: str = "plays"  # plays, a file, a directory, a glob or a URL
    tokenizer: str | None = None  # directory with tokenizer.json; None: newest of 01, else bytes


@dataclass
class AllOptions:
    data: str = "plays"  # plays, or other text for concept and bytes: a file, a directory, a URL
    fresh: bool = False  # begin again even if these runs are there
    record: bool = False  # append the results to results.jsonl


# ---- one study


def begin(name, options, plan):
    """The Run of a study, and whether there is anything to do; says how it stands."""
    if options.threads < 1:
        raise ValueError(f"--threads {options.threads}: it must be at least 1")
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # what is fitted is kept by then
    code = b"".join(
        path.read_bytes() for path in sorted(HERE.glob("*.py")) if path.name[:4] != "test"
    )
    run = Run(
        HERE / "semantic.py", plan | dict(code=sha256(code).hexdigest()[:8]), name, options.fresh
    )
    if run.result is not None:
        print(f"run: {run.dir} is finished: {said(run.result)}; --fresh begins again")
    else:
        print(f"run: {run.dir}{' (going on)' if run.resume else ''}")
        print(f"device: cpu, threads: {options.threads}, as the models are small")
    return run


def said(result):
    """The figures of a result, as text."""
    return ", ".join(f"{key} {value}" for key, value in result.items())


def finish(run, options, details, result, begun):
    """Keep what was measured, record it, and renew the report."""
    with open(run.dir / "details.json", "w") as file:
        json.dump(details, file, indent=1)
    result["minutes"] = round((time.perf_counter() - begun) / 60, 2)
    result["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    run.finish(result)
    if options.record:
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        command = " ".join([f"{HERE.name}/run.py", *sys.argv[1:]])
        line = dict(commit=commit, machine=f"{os.cpu_count()} CPU cores", command=command)
        with open(HERE / "results.jsonl", "a") as file:
            file.write(json.dumps(line | result) + "\n")
    print(f"result: {said(result)}\nplots and details are in {run.dir}")
    report.write(OUT / "10_semantic")


def with_tokenizer(path):
    """The tokenizer in a directory, or of None the newest of 01, else bytes."""
    newest = OUT / "01_tokenizer" / "latest"
    if path is None and (newest / "tokenizer.json").exists():
        path = newest
    print(f"tokenizer: {path or 'bytes (none given, none of 01 here)'}")
    return Tokenizer(path)


def read_concepts(o):
    """The models of studies 1 and 2, not yet trained, with the lines they read."""
    m = concept_study.Concepts(o, with_tokenizer(o.tokenizer))
    names = "semantic blocks concept_study fitting lines".split()
    key = [o.flops, o.seed, m.tokenizer.hash, m.lines.text, m.held.text]
    key += [(HERE / f"{name}.py").read_text() for name in names]
    m.home = OUT / "10_semantic" / f"models-{sha256(json.dumps(key).encode()).hexdigest()[:6]}"
    return m


def train_concepts(m):
    """Train them, or load what is done; returns the concepts of the held-out lines."""
    print(f"{len(m.lines):,} lines to train on, {len(m.held):,} held out; models in {m.home}")
    for name, model in m.models().items():
        print(f"{name:12} {sum(p.numel() for p in model.parameters()):12,} parameters")
    print(f"about {4 * m.options.flops / 6e10 / 60:.1f} minutes where one thread does 60 GFLOP/s")
    m.train()
    print(f"{'fit':16}{'steps':>7}{'TFLOP':>8}{'seconds':>9}")
    for name, cost in m.costs.items():
        print(f"{name:16}{cost['steps']:7,}{cost['flops'] / 1e12:8.2f}{cost['seconds']:9.0f}")
    return m.encode_all(m.held_ids)[0]


def concept(given):
    """a model of the next line's concept, beside 04's model of the next token at the same FLOPs"""
    o, options = build(concept_study.ConceptOptions, given), build(Options, given)
    begun, m = time.perf_counter(), read_concepts(o)
    run = begin("concept", options, asdict(o) | dict(models=m.home.name))
    if run.result is not None:
        return
    near = train_concepts(m)
    picks = concept_scores.pick(m, near, o)
    bits, speed = concept_scores.bits(m, near, o), concept_scores.speed(m, near)
    for name, (share, error) in picks.items():
        print(f"picks the next line among 32: {name:28} {share:6.1%} +- {error:.1%}")
    print(f"bits per byte: {said(bits)}\nbytes a second, 16 texts at once: {said(speed)}")
    draw_concepts.draw_picks(picks, run.dir / "picks.png")
    result = dict(study="concept", measures="true next line picked among 32", seed=o.seed)
    result |= dict(ours=picks["contrast"][0], baseline=picks["tokens, gain"][0])
    finish(run, options, dict(picks=picks, bits=bits, speed=speed, costs=m.costs), result, begun)


def context(given):
    """the same lines read in their context, and thought units: draw several, keep the best"""
    o, options = build(concept_study.ConceptOptions, given), build(Options, given)
    if o.data != "plays":
        raise ValueError(f"--data {o.data} has no scenes and speakers: context reads the plays")
    begun, m = time.perf_counter(), read_concepts(o)
    run = begin("context", options, asdict(o) | dict(models=m.home.name))
    if run.result is not None:
        return
    near = train_concepts(m)
    readings, retrieval = concept_scores.readings(m, near), {}
    for what in ("scene", "speaker"):
        label = getattr(m.held, what)
        retrieval[what] = {
            name: concept_scores.neighbours(m, vectors, label) for name, vectors in readings.items()
        }
        for name, (precision, score, chance) in retrieval[what].items():
            print(f"same {what:8} {name:34} P@10 {precision:.3f}, MAP {score:.4f} ({chance:.4f})")
    moved = concept_scores.moved(m, readings["in context, what it leads to"])
    wins, written, samples = concept_scores.thoughts(m, near, o)
    print(f"cosine of what a line leads to: {said(moved)}")
    for kind, win in wins.items():
        print(f"thought units of {kind} win {win['win_rate']:.1%} +- {win['error']:.1%}")
    draw_concepts.draw_context(retrieval, written, run.dir / "context.png")
    details = dict(retrieval=retrieval, moved=moved, wins=wins, written=written, samples=samples)
    result = dict(study="context", measures="thought units of codes that win", seed=o.seed)
    result |= dict(ours=wins["codes"]["win_rate"], baseline=0.5)
    finish(run, options, details, result, begun)


def hyperbolic(given):
    """trees in flat and in hyperbolic space: how many dimensions do they need?"""
    o, options = build(hyperbolic_study.HyperbolicOptions, given), build(Options, given)
    begun, trees = time.perf_counter(), hyperbolic_study.read_trees(o)
    plan = asdict(o) | dict(trees=sha256(json.dumps(trees).encode()).hexdigest()[:8])
    run = begin("hyperbolic", options, plan)
    if run.result is not None:
        return
    print("about 2 minutes on one core with the defaults; rows that are done are kept")
    found = hyperbolic_study.compare(trees, o, print, run.dir / "rows.jsonl")
    draw_hyperbolic.draw_curves(found["results"], run.dir / "curves.png")
    draw_hyperbolic.draw_disc(*found["disc"], run.dir / "disc.png")
    dims = sorted({row["dim"] for row in found["results"]})
    few, more = dims[1:2] or dims, dims[2:3] or dims[-1:]  # 5 and 10, unless other ones are given

    def maps(geometry, some):
        rows = found["results"]
        return [r["map"] for r in rows if r["geometry"] == geometry and r["dim"] in some]

    measures = f"MAP: Poincaré at {few[0]} (the worst tree), Euclidean at {more[0]} (the best)"
    result = dict(study="hyperbolic", measures=measures, seed=o.seed)
    result |= dict(ours=min(maps("poincare", few)), baseline=max(maps("euclidean", more)))
    finish(run, options, dict(results=found["results"], trees=found["trees"]), result, begun)


def of_bytes(given):
    """bytes in patches, beside plain bytes and BPE at the same FLOPs"""
    o, text = build(bytes_study.BytesOptions, given), build(TextOptions, given)
    options = build(Options, given)
    begun, home, tokenizer = time.perf_counter(), corpus(text.data), with_tokenizer(text.tokenizer)
    train, held = ((home / f"{n}.txt").read_text(encoding="utf-8") for n in ("train", "val"))
    plan = asdict(o) | asdict(text) | dict(corpus=home.name, hash=tokenizer.hash)
    run = begin("bytes", options, plan)
    if run.result is not None:
        return
    print(
        f"{o.flops:.2g} FLOPs for each of 5 models, about {6 * o.flops / 1.5e10 / 60:.0f} minutes"
    )
    found = bytes_study.compare(train, held, tokenizer, o, run.dir)
    for name, row in found["results"].items():
        print(f"{name:8} " + ", ".join(f"{key} {row[key]:.3f}" for key in draw_bytes.TITLES))
    draw_bytes.draw_scores(found["results"], run.dir / "scores.png")
    draw_bytes.draw_patches(found.pop("lines"), found["threshold"], run.dir / "patches.png")
    rows = found["results"]
    result = dict(study="bytes", measures="bits per byte: entropy patches, BPE", seed=o.seed)
    result |= dict(ours=rows["entropy"]["clean"], baseline=rows["bpe"]["clean"])
    finish(run, options, found, result, begun)


# ---- all of them


def together(ways):
    """Run each way's commands, lists of words for run.py, one behind the other, the ways side by
    side. Raises ValueError with the error of one that fails; Ctrl-C and SIGTERM go to all."""
    going, logs = {}, OUT / "10_semantic" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", OUT=str(OUT))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while any(ways) or going:
            for waiting in ways:
                if id(waiting) in going:
                    name, log, process = going[id(waiting)]
                    if process.poll() is None:
                        continue
                    del going[id(waiting)]
                    lines = log.read_text().strip().splitlines() or [""]
                    if process.returncode or not any(DONE.search(line) for line in lines):
                        why = lines[-1].removeprefix("error: ")
                        raise ValueError(f"{name} did not finish: {why} ({log})")
                    print(f"{name}: {next(filter(DONE.search, lines))}", flush=True)
                if waiting:
                    words = waiting.pop(0)
                    log = logs / f"{words[0]}.log"
                    print(f"{words[0]} begins: tail -f {log}", flush=True)
                    command = [sys.executable, str(HERE / "run.py"), *words]
                    with open(log, "w") as file:
                        process = subprocess.Popen(command, stdout=file, stderr=file, env=env)
                    going[id(waiting)] = words[0], log, process
            time.sleep(0.3)
    except KeyboardInterrupt:
        print("stopped: what is fitted is kept, the same command goes on")
        raise
    finally:
        for _, _, process in going.values():
            process.terminate()
        for _, _, process in going.values():
            process.wait()


def everything(given):
    """all four studies, two at a time, and one page about them: the main job"""
    o, begun = build(AllOptions, given), time.perf_counter()
    flags = ["--fresh"] * o.fresh + ["--record"] * o.record
    text = ["--data", o.data]
    first = [["concept", *text, *flags], ["context", *flags]]
    if o.data != "plays":
        first.pop()
        print("context is left out: it needs scenes and speakers")
    together([first, [["hyperbolic", *flags], ["bytes", *text, *flags]]])
    report.write(OUT / "10_semantic")
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes in all")


def report_again(given):
    """write the report page again from the studies that are done"""
    if not report.write(OUT / "10_semantic"):
        raise ValueError("no study is done here: make 10 runs all four")


if __name__ == "__main__":
    main(
        {
            "measure": (everything, AllOptions),
            "concept": (concept, concept_study.ConceptOptions, Options),
            "context": (context, concept_study.ConceptOptions, Options),
            "hyperbolic": (hyperbolic, hyperbolic_study.HyperbolicOptions, Options),
            "bytes": (of_bytes, TextOptions, bytes_study.BytesOptions, Options),
            "report": (report_again,),
        }
    )
