"""Commands of the stages, started from the page: they outlive the server and stop as by hand.

What it teaches: a training run must not die with the web server that started it, nor be lost to
it. So each job is a process group of its own, all that is known of it is in files, and a server
that starts anew reads them:

    out/11_serve/jobs/<id>/job.json   what was asked for, the process, what it is wanted to be
                           log.txt    what it prints;   exit   its exit code, written by a shell
                           work/      its working directory: a plain word names no file of ours

A pid alone does not name a process, as pids are used again; a pid with the time of its start does.
And a page that starts processes is a door: stage, command and flags must be ones that --help lists,
each value is one argument, `--name=value`, never part of a shell's text, and a value that is a path
must lie in out/. What a stage could run or fetch (file.py:name, a URL) does not get through.

Parent: none
New: everything

Read in this order: WRAPPER, Jobs.start, _launch, _describe, _end, _checked; then stages.
"""

import codecs
import contextlib
import json
import math
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runs import load_json

from common import atomic

# It waits for `go`, which comes once job.json names it: no process is ever without a record.
# SIGTERM goes to the whole group; with the trap the shell waits and keeps the exit code.
WRAPPER = """trap : TERM; read go || exit; folder=$1; shift
"$@" </dev/null; echo $? >"$folder/.exit" && mv "$folder/.exit" "$folder/exit" """
# All help texts of a stage from one process, as importing torch is what takes the time.
HELP = """
import contextlib, io, json, os, runpy, sys
path = sys.argv[1]
sys.path.insert(0, os.path.dirname(path))
def ask(*words):
    sys.argv = [path, *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        runpy.run_path(path, run_name="__main__")
    return text.getvalue()
names = ask().partition("{")[2].partition("}")[0].split(",")
print(json.dumps({name: ask(name) for name in names}))
"""
FLAG = r"(?m)^  --(\w+)(, --no-\w+)?(?: [A-Z_\d]+)?\s+(.*?)(?: \(default: (.*?)\))?"
FLAG += r"(?: \(default: ==SUPPRESS==\))?$"  # which Python 3.10 adds
INTERACTIVE = ("chat", "ask", "serve")
# What names a file or may: no wildcards, no URL, no code. And what is only ever text.
FILES = set("data model tokenizer tokens store upcycle reference to run draft reward watch".split())
FILES |= {"true", "proxy", "tree"}
TEXTS = {"prompt", "text", "replies", "stop", "system"}


class Jobs:
    """Jobs of the stages in `root` that write to `out`, at most `most` at once. Values of flags
    may be paths in `out` or one of `allow`, or begin with `store`, an s3://bucket/prefix. One that
    is to stop has `grace` seconds. LookupError: no such job; RuntimeError: not now; ValueError."""

    def __init__(self, root, out, most=2, store=None, allow=(), grace=60):
        self.root, self.out, self.most = Path(root).resolve(), Path(out).resolve(), most
        self.home, self.store, self.grace = self.out / "11_serve" / "jobs", store, grace
        self.allow = [self.out, *(Path(path).resolve() for path in allow)]
        self.lock, self.help_locks = threading.RLock(), {}

    def start(self, stage, command, flags):
        """Start a command with {flag: value}; its job, as the contract has it."""
        job = dict(id=secrets.token_hex(4), stage=stage, command=command, flags=flags)
        self._argv(job)
        with self.lock:
            self._room()
            (self.home / job["id"] / "work").mkdir(parents=True)
            self._launch(job | dict(started=time.time()))
            return self.get(job["id"])

    def list(self):
        """All jobs, the newest first."""
        jobs = [load_json(path) for path in self.home.glob("*/job.json")]
        jobs = [self._describe(job) for job in jobs if job.get("id")]
        return sorted(jobs, key=lambda job: -job["started"])

    def get(self, id):
        return self._describe(self._load(id))

    def pause(self, id):
        """SIGTERM: it saves and ends, and resume goes on from there."""
        return self._end(id, "paused")

    def stop(self, id):
        """As pause; one that has not ended after `grace` seconds is killed."""
        return self._end(id, "stopped")

    def resume(self, id):
        """Start the same command again: the stage finds its saved state and goes on."""
        with self.lock:
            if (status := self.get(id)["status"]) not in ("paused", "stopped", "failed"):
                raise RuntimeError(f"job {id} is {status}: only one that has stopped can go on")
            self._room()
            self._launch(self._load(id), again=True)
            return self.get(id)

    def log(self, id, offset=0, size=1 << 16):
        """{"text", "offset"}: at most `size` bytes of its log from `offset`, where below 0 from the
        end, and where to go on reading. Half of a character waits for its other half."""
        self._load(id)
        with open(self.home / id / "log.txt", "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(at := max(0, min(offset, end) if offset >= 0 else end + offset))
            data, decoder = file.read(size), codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(data)
        return {"text": text, "offset": at + len(data) - len(decoder.getstate()[0])}

    # ---- processes

    def _load(self, id):
        job = load_json(self.home / id / "job.json") if re.fullmatch("[0-9a-f]{8}", id) else {}
        if not job:
            raise LookupError(f"there is no job {id[:50]!r}")
        return dict(job)

    def _save(self, job):
        with atomic(self.home / job["id"] / "job.json", "w") as file:
            json.dump(job, file, indent=1)

    def _room(self):
        active = [
            j["id"] for j in self.list() if j["status"] in ("starting", "running", "stopping")
        ]
        if len(active) >= self.most:
            raise RuntimeError(
                f"{len(active)} jobs run at once, as many as may ({', '.join(active)}): stop one"
            )

    def _launch(self, job, again=False):
        # Checked again on a resume: the rules, or the stage's flags, may have changed since.
        argv, folder = self._argv(job, again), self.home / job["id"]
        (folder / "exit").unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k != "API_KEY"}  # the server's own
        env |= {"PYTHONPATH": str(self.root), "PYTHONUNBUFFERED": "1", "OUT": str(self.out)}
        with open(folder / "log.txt", "ab") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", WRAPPER, "job", str(folder), *argv],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=folder / "work", env=env,
                start_new_session=True,
            )  # fmt: skip
        with process.stdin as pipe:  # closed without `go` where job.json cannot be written
            job |= dict(wanted="running", pid=process.pid, birth=birth(process.pid))
            self._save(job)
            pipe.write(b"go\n")
        threading.Thread(target=process.wait, daemon=True).start()  # or it stays a zombie

    def _describe(self, job):
        """A job as the contract has it: from its record, its process and what that has written."""
        folder, wanted, finished = self.home / job["id"], job["wanted"], None
        alive = job["birth"] is not None and birth(job["pid"]) == job["birth"]
        if alive and wanted == "stopped" and time.time() - job["asked"] > self.grace:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job["pid"], signal.SIGKILL)
        code, run, error = None, self._run(job), None
        with contextlib.suppress(OSError, ValueError):
            code = None if alive else int((folder / "exit").read_text())
        if run:  # None where the command keeps no run
            finished = load_json(self.out / run / "run.json").get("result") is not None
        if alive:
            begun = run or (folder / "log.txt").stat().st_size
            status = "stopping" if wanted != "running" else "running" if begun else "starting"
        elif wanted != "running" and not finished and code in (0, None, 137, 143):
            status = wanted  # 143: by SIGTERM, before it had anything to save
        elif code == 0:
            status = "stopped" if finished is False else "finished"
        else:
            status, error = "failed", "it was killed, or the machine went down: resume goes on"
            if code is not None:
                lines = self.log(job["id"], -4000)["text"].replace("\r", "\n").splitlines()
                error = next(
                    (line for line in reversed(lines) if line.strip()), f"exit code {code}"
                )
        shown = {key: job[key] for key in ("id", "stage", "command", "flags", "started")}
        return shown | dict(run=run, status=status, exit_code=code, error=error and error[:500])

    def _run(self, job):
        """The id of its run, which --run web-<id> has named."""
        folders = (self.out / job["stage"]).glob(f"web-{job['id']}-*")
        folders = [p for p in folders if re.fullmatch(r"web-\w+-[0-9a-f]{6}", p.name)]
        newest = max(folders, key=lambda p: p.lstat().st_mtime, default=None)
        return newest and f"{job['stage']}/{newest.name}"

    def _end(self, id, wanted):
        with self.lock:
            status, job = self.get(id)["status"], self._load(id)
            if status not in ("starting", "running", "stopping", "paused"):
                raise RuntimeError(f"job {id} is {status} already")
            self._save(job | dict(wanted=wanted, asked=time.time()))
            if status in ("starting", "running"):  # a second SIGTERM would end it in mid-save
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(job["pid"], signal.SIGTERM)
            if wanted == "stopped":  # get kills it where it is late
                (timer := threading.Timer(self.grace + 0.1, self.get, [id])).daemon = True
                timer.start()
            return self.get(id)

    # ---- what may be started

    def _argv(self, job, again=False):
        known = {c["name"]: c for c in self._stage(str(job["stage"]))["commands"]}
        command, flags = known.get(str(job["command"])), job["flags"]
        if not command:
            raise ValueError(f"{job['stage']} has no command {str(job['command'])[:50]!r} for here")
        kinds = {flag["name"]: flag["kind"] for flag in command["flags"]}
        argv = [sys.executable, str(self.root / job["stage"] / "run.py"), command["name"]]
        argv += [f"--run=web-{job['id']}"] * command["keeps_run"]
        if not isinstance(flags, dict) or flags.keys() - kinds.keys():
            raise ValueError(f"not all of these are flags of {command['name']}: {flags!r}"[:300])
        for name, value in flags.items():
            if (kinds[name] == "bool") != isinstance(value, bool):
                raise ValueError(
                    f"--{name} {'takes' if kinds[name] == 'bool' else 'is not'} a bool"
                )
            if kinds[name] == "bool":
                argv += [f"--{name}" if value else f"--no-{name}"] * (not again or name != "fresh")
            else:
                argv.append(f"--{name}={self._checked(name, value)}")
        return argv

    def _checked(self, name, value):
        """The text of a flag's value; a path resolved. ValueError for what may not be given."""
        if not isinstance(value, str | int | float) or value in (math.inf, -math.inf):
            raise ValueError(f"--{name}: a value is a text, a number or a bool")
        text = str(value)
        if len(text) > 500 or any(ord(c) < 32 or c == "\x7f" for c in text):
            raise ValueError(f"--{name}: at most 500 characters, on one line")
        if name in TEXTS:
            return text
        if "://" in text:
            if not self.store or ".." in text or not f"{text}/".startswith(f"{self.store}/"):
                raise ValueError(f"--{name}: no URLs, but for s3:// below the server's own --store")
            return text
        if name in FILES and re.search(r"[*?\[:]", text) or ".py:" in text:
            raise ValueError(f"--{name}: no wildcards, and no file.py:name, as that would run code")
        if not re.search(r"[/\\]|\.\.|^~", text):
            return text  # a plain word: at most a file of the job's own, empty directory
        path = (self.root / text).resolve()
        own = path.is_relative_to(self.out / "11_serve")
        if "\\" in text or own or not any(path.is_relative_to(home) for home in self.allow):
            raise ValueError(f"--{name}: a path must lie in {self.out}, and not in its 11_serve")
        return str(path)

    def stages(self):
        """What can be started, for /api/stages. The first time it takes seconds a stage."""
        names = sorted(path.parent.name for path in self.root.glob("[0-9][0-9]_*/run.py"))
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(self._stage, [name for name in names if name != "11_serve"]))

    def _stage(self, name, timeout=120):
        """One stage of these; kept on disk until one of its Python files changes."""
        if not re.fullmatch(r"\d\d_[a-z]+", name) or name == "11_serve":
            raise ValueError(f"{name[:50]!r} is not a stage")
        if not (script := self.root / name / "run.py").exists():
            raise ValueError(f"there is no stage {name}")
        files = sorted([*script.parent.glob("*.py"), *self.root.glob("common/*.py")])
        files = [[str(p), p.stat().st_mtime_ns, p.stat().st_size] for p in files] + [sys.version]
        kept = self.out / "11_serve" / "stages" / f"{name}.json"
        with self.help_locks.setdefault(name, threading.Lock()):
            if (known := load_json(kept)).get("files") == files:
                return known["stage"]
            env = os.environ | {"PYTHONPATH": str(self.root), "COLUMNS": "9999"}  # a line a flag
            argv = [sys.executable, "-c", HELP, str(script)]
            try:
                how = dict(cwd=self.root, env=env, capture_output=True, timeout=timeout, check=True)
                helps = json.loads(subprocess.run(argv, stdin=subprocess.DEVNULL, **how).stdout)
            except (OSError, ValueError, subprocess.SubprocessError):
                helps = {}  # it does not start: a package may be missing
            readme = script.with_name("README.md")
            title = re.match(r"# (?:\d+: )?(.*)", readme.read_text() if readme.exists() else "")
            commands = [parse_help(*item) for item in helps.items() if item[0] not in INTERACTIVE]
            stage = dict(stage=name, title=title[1] if title else name, commands=commands)
            if commands:
                with atomic(kept, "w") as file:
                    json.dump(dict(files=files, stage=stage), file)
            return stage


def parse_help(name, text):
    """A command and its flags, from what argparse prints; kinds guessed from the defaults."""
    about, flags = text.partition("\n\n")[2].partition("\n\n")[0], []
    for flag, negation, words, default in re.findall(FLAG, text.partition("\noptions:\n")[2]):
        kind = "bool" if negation else "str"
        for guess, pattern in (("int", r"-?\d+"), ("float", r"-?\d+\.?\d*(e-?\d+)?")):
            kind = guess if kind == "str" and re.fullmatch(pattern, default) else kind
        default = None if default in ("", "None") else default
        flags.append(dict(name=flag, kind=kind, default=default, help=words))
    # --run that names a new run is the server's to give; in 09 it is also a directory to read
    named = [flag for flag in flags if flag["name"] == "run" and "/" not in flag["default"]]
    flags = [flag for flag in flags if flag not in named]
    return dict(name=name, help=" ".join(about.split()), flags=flags, keeps_run=bool(named))


def birth(pid):
    """When a process began, in ticks since the machine did; None where it is gone or a zombie."""
    with contextlib.suppress(OSError):
        # The name, in brackets, may hold anything; what follows is state, parent, ...
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19]) if fields[0] != "Z" else None
