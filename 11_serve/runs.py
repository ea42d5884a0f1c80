"""What runs have left under out/, read while they write it.

What it teaches: how to follow a file that another process writes. The last line may be half there,
so only whole lines count; a byte offset says what is new, and the file's inode, size and the bytes
before the offset whether it is still the same file. A resumed run logs steps again, so a step names
the last line that has it. The rows stay on disk: in memory is where each of them begins.

All names from outside are checked here: a run is two plain words under out/, also once symbolic
links are followed, and only its own files are read. Nothing of a run is ever unpickled.

Parent: none
New: everything

Read in this order: find, Tail.read, Tail.since, runs, detail, resolve.
"""

import contextlib
import itertools
import json
import math
import os
import re
import stat
import threading
import time
from pathlib import Path

WORD = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,200}")
MODEL = "model.safetensors"
LIVES = itertools.count(1)  # a number for each file that metrics.jsonl has been
PART = 1000  # rows in a message


def parse(text):
    """A JSON object as a dict, NaN and infinity in it None; None where it is damaged."""

    def finite(digits):
        return number if math.isfinite(number := float(digits)) else None

    with contextlib.suppress(ValueError, RecursionError):
        data = json.loads(text, parse_constant=lambda _: None, parse_float=finite)
        return data if isinstance(data, dict) else None


LOADED = {}  # path: (inode, size, time), what it held


def load_json(path):
    """The object in a file, read again when that has changed; {} where there is none, or a link."""
    try:
        found = os.lstat(path)
        key = (found.st_ino, found.st_size, found.st_mtime_ns)
        if not stat.S_ISREG(found.st_mode):
            return {}
        if LOADED.get(path, (None,))[0] != key:
            LOADED[path] = key, parse(Path(path).read_bytes()) or {}
        return LOADED[path][1]
    except OSError:
        LOADED.pop(path, None)
        return {}


def inside(out, run_id):
    """The directory out/<run_id>. ValueError for what is no id, LookupError if it is elsewhere."""
    parts = run_id.split("/")
    if len(parts) != 2 or not all(map(WORD.fullmatch, parts)):
        raise ValueError(f"{run_id[:100]!r} is not the id of a run")
    path, home = (Path(out) / run_id).resolve(), Path(out).resolve()
    if path.parent.parent != home or not path.is_dir():
        raise LookupError(f"there is no {run_id} under out/")
    return path


def find(out, run_id):
    """The directory of a run. ValueError for what is no id, LookupError where there is no run."""
    path = inside(out, run_id)
    stage = re.match(r"\d\d_", path.parent.name)
    if not stage or not any(own(path / name) for name in ("run.json", "metrics.jsonl")):
        raise LookupError(f"there is no run {run_id}")
    return path


def own(path):
    """Whether it is a file, and not a link to one that may be anywhere."""
    return path.is_file() and not path.is_symlink()


class Tail:
    """metrics.jsonl as it grows: `index`, where the newest line of each step begins; `last`, the
    latest value of each metric; `step`, of the last line. The rows themselves stay on disk."""

    def __init__(self, path):
        self.path, self.lock, self.known = path, threading.Lock(), None
        self.begin()

    def begin(self):
        self.life, self.index, self.last, self.step = next(LIVES), {}, {}, None
        self.offset, self.mark = 0, b""

    def read(self):
        """Take in what was added since. Only whole lines: the last may be half-written."""
        with self.lock:
            if not own(self.path):
                if self.known:
                    self.begin()
                self.known = None
                return self
            with open(self.path, "rb") as file:
                now = os.fstat(file.fileno())
                if (now.st_ino, now.st_size, now.st_mtime_ns) == self.known:
                    return self
                file.seek(self.offset - len(self.mark))
                same = self.known and self.known[0] == now.st_ino and now.st_size >= self.offset
                if self.known and not (same and file.read(len(self.mark)) == self.mark):
                    self.begin()
                self.known = now.st_ino, now.st_size, now.st_mtime_ns
                file.seek(self.offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    row = parse(line) or {}  # a damaged line is passed over
                    if type(row.get("step")) is int:
                        self.step = row["step"]
                        self.index[self.step] = self.offset
                    self.last |= {k: v for k, v in row.items() if v is not None and k != "step"}
                    self.offset, self.mark = self.offset + len(line), line[-64:]
        return self

    def rows(self, offsets):
        with contextlib.suppress(OSError), open(self.path, "rb") as file:
            if os.fstat(file.fileno()).st_ino == (self.known or [None])[0]:
                for offset in offsets:
                    file.seek(offset)
                    if type((row := parse(file.readline()) or {}).get("step")) is int:
                        yield row

    def after(self, step):
        """The rows of later steps, each step once, in order."""
        with self.lock:
            wanted = sorted(s for s in self.index if s > step)
            return list(self.rows([self.index[s] for s in wanted]))

    def since(self, cursor):
        """(rows, whether the file was begun anew, next cursor), at most PART rows. A cursor is
        (life, step, offset): first the steps above `step` in the lines before `offset`; once these
        are sent `step` is None, and the lines from `offset` on follow as they are written. (None,
        step, None) begins."""
        with self.lock:
            life, step, offset = cursor
            # A page that knows later steps than there are saw an earlier file of this run.
            reset = step > max(self.index, default=-1) if life is None else life != self.life
            if reset or life is None:
                life, step, offset = self.life, -1 if reset else step, self.offset
            if step is None:
                rows, at = [], offset
                with contextlib.suppress(OSError), open(self.path, "rb") as file:
                    file.seek(at)
                    while at < self.offset and len(rows) < PART and (line := file.readline()):
                        at, row = at + len(line), parse(line) or {}
                        rows += [row] if type(row.get("step")) is int else []
                return rows, reset, (life, None, at)
            wanted = sorted(s for s, at in self.index.items() if s > step and at < offset)
            rows = list(self.rows([self.index[s] for s in wanted[:PART]]))
            return rows, reset, (life, wanted[PART - 1] if len(wanted) > PART else None, offset)


TAILS = {}  # one for each run that was looked at


def tail(path):
    return TAILS.setdefault(path, Tail(path)).read()


def runs(out, jobs=(), remote=None, wait=0):
    """All runs, the newest first, as the contract has it; `jobs` are the jobs that Jobs lists."""
    found = [summary(path, jobs) for path in Path(out).resolve().glob("[0-9][0-9]_*/*")
             if WORD.fullmatch(path.name) and path.is_dir() and path.resolve() == path
             and any(own(path / name) for name in ("run.json", "metrics.jsonl"))]  # fmt: skip
    for row in remote.runs(wait) if remote else []:
        found.append({k: v for k, v in row.items() if k != "checkpoints"})
    return sorted(found, key=lambda row: -row["updated"])


def summary(path, jobs):
    """A run in the list."""
    lines, info = tail(path / "metrics.jsonl"), load_json(path / "run.json")
    run_id, config = f"{path.parent.name}/{path.name}", info.get("config") or {}
    written = lines.known[2] / 1e9 if lines.known else 0
    updated = max([written] + [p.stat().st_mtime for p in [path / "run.json"] if p.exists()])
    job = next((job for job in jobs if job["run"] == run_id), None)  # the newest of them
    status = (
        {"starting": "running", "stopping": "running"}.get(job["status"], job["status"])
        if job
        else None
    )
    if status != "running" and info.get("result") is not None:
        status = "finished"
    elif not status:
        status = "running" if time.time() - written < 30 else "idle"
    model = own(path / MODEL) or any(path.glob(f"checkpoints/step-*/model/{MODEL}"))
    return dict(
        id=run_id, stage=path.parent.name, name=path.name, where="local", status=status,
        step=lines.step, steps=config.get("steps"), updated=updated, last=dict(lines.last),
        has_model=model, job=job and job["id"], error=job and job["error"],
    )  # fmt: skip


def detail(out, run_id, jobs=(), remote=None):
    """A run with its config, result, plots, checkpoints and samples."""
    if run_id.startswith("s3/"):
        row = (
            next((row for row in remote.runs(10) if row["id"] == run_id), None) if remote else None
        )
        if not row:
            raise LookupError(f"there is no run {run_id}")
        return row | dict(config={}, result=None, plots=[], samples=samples(out, run_id))
    path = find(out, run_id)
    info = load_json(path / "run.json")
    plots = sorted(p.name for p in path.glob("*.png") if own(p) and WORD.fullmatch(p.name))
    more = dict(config=info.get("config") or {}, result=info.get("result"), plots=plots)
    more |= dict(checkpoints=checkpoints(path, run_id, more["result"]))
    return summary(path, jobs) | more | dict(samples=samples(out, run_id))


def checkpoints(path, run_id, result):
    """The model of a run and its complete checkpoints: those with the manifests of all nodes."""
    found = []
    for step in sorted(path.glob("checkpoints/step-*")):
        manifests = [load_json(p) for p in step.glob("manifest-*.json")]
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):  # damaged
            if {m["nodes"] for m in manifests} == {len(manifests)}:
                size = sum(e["bytes"] for m in manifests for e in m["files"].values())
                metric = min(
                    (m["metric"] for m in manifests if m["metric"] is not None), default=None
                )
                number = int(manifests[0]["step"])
                model = f"{run_id}@{number}" if own(step / "model" / MODEL) else None
                when = max(m["time"] for m in manifests)
                found.append(dict(step=number, metric=metric, bytes=size, time=when, model=model))
    if own(path / MODEL):
        now, loss = (
            (path / MODEL).stat(),
            result.get("val_loss") if isinstance(result, dict) else None,
        )
        one = dict(step=None, metric=loss, bytes=now.st_size, time=now.st_mtime, model=run_id)
        found.append(one)
    return [entry | dict(where="local") for entry in found]


def metrics(out, run_id, after=-1, remote=None, wait=5):
    """The rows of a run with step > after."""
    path = metrics_path(out, run_id, remote, wait)
    return tail(path).after(after) if path else []


def metrics_path(out, run_id, remote, wait=0):
    if run_id.startswith("s3/"):
        return remote and remote.metrics(run_id.partition("/")[2], wait)
    return find(out, run_id) / "metrics.jsonl"


def samples(out, run_id):
    """The last texts that were drawn of a run while somebody watched."""
    path = Path(out) / "11_serve" / "samples" / f"{run_id}.jsonl"
    lines = path.read_bytes().splitlines()[-50:] if own(path) else []
    return [row for row in map(parse, lines) if row]


def resolve(out, remote, model_id):
    """The local directory of a model: stage/run, stage/run@step or s3:run@step, which is fetched
    where need be. ValueError where there is none, or a file of it is a link that leaves out/."""
    run_id, at, step = model_id.partition("@")
    if at and not re.fullmatch("[0-9]{1,12}", step):
        raise ValueError(f"{model_id[:100]!r}: a step is a number")
    if run_id.startswith("s3:"):
        if not remote or not at or not WORD.fullmatch(run_id[3:]):
            raise ValueError(f"there is no model {model_id[:100]!r}: s3:<run>@<step>, with --store")
        return remote.fetch(run_id[3:], int(step))
    try:
        path = inside(out, run_id)
    except LookupError as error:
        raise ValueError(str(error)) from None
    path = path / "checkpoints" / f"step-{int(step):08d}" / "model" if at else path
    if not (path / MODEL).is_file() or not (path / "config.json").is_file():
        raise ValueError(f"{model_id} holds no model: config.json and {MODEL}")
    if not all(p.resolve().is_relative_to(Path(out).resolve()) for p in path.iterdir()):
        raise ValueError(f"{model_id} has a file that lies elsewhere")
    return path
