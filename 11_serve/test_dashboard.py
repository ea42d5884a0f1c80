"""Runs, jobs and the live channel, over a real server on loopback; S3 by moto's, in this process.

What is waited for has generous deadlines; what must not happen is asked after what must has.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

for needed in ("fastapi", "uvicorn", "httpx", "websockets"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

import dashboard  # noqa: E402
import httpx  # noqa: E402
import jobs as jobs_module  # noqa: E402
import runs as runs_module  # noqa: E402
import uvicorn  # noqa: E402
from fastapi import FastAPI  # noqa: E402
from jobs import Jobs  # noqa: E402
from remote import Remote  # noqa: E402
from runs import Tail  # noqa: E402
from websockets.exceptions import ConnectionClosed  # noqa: E402
from websockets.sync.client import connect  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
SECRET = "wJalrXUtnFEMI-not-to-be-printed"
SMALL = dict(d_model=16, n_layers=1, n_heads=2, context_length=16, device="cpu", seed=1)
ALONE = dict(proxy=None, ping_interval=None)  # no pings but those of the contract
# A stage that does nothing, in the ways a stage can: it ends, fails, goes on, or will not stop.
STAGE = '''"""A stage for tests."""
import signal, sys, time
from dataclasses import dataclass
from common import OUT, Run, build, main

@dataclass
class Options:
    data: str = "plays"  # text
    reward: str | None = None  # of whom
    prompt: str = "What is to be?"  # said first
    rate: float = 0.1  # of learning
    steps: int = 10  # steps
    how: str = "end"  # end, fail, wait or refuse
    fresh: bool = False  # begin again
    run: str = "run"  # first part of the name

def train(given):
    """train nothing"""
    o = build(Options, given)
    print("argv", sys.argv[1:], flush=True)
    if o.how == "fail":
        raise ValueError("the data is gone")
    if o.how == "refuse":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("deaf", flush=True)
    while o.how != "end":
        time.sleep(0.05)
    run = Run(__file__, {"steps": o.steps}, o.run, o.fresh)
    run.log(step=1, train_loss=1.0)
    run.finish({"val_loss": 1.0})

def chat(given):
    """talk"""

if __name__ == "__main__":
    main({"train": (train, Options), "chat": (chat, Options)})
'''


needs_03 = pytest.mark.skipif(not (ROOT / "03_gpt").exists(), reason="no 03_gpt in this fork")


def until(condition, what, seconds=60):
    """Wait for a condition and return what it is."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} seconds: {what}")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository with a stage 20_tiny and the real 03_gpt; `helps`, what its stages can do."""
    root = tmp_path_factory.mktemp("root")
    (root / "20_tiny").mkdir()
    (root / "20_tiny" / "run.py").write_text(STAGE)
    for name in ("common", "03_gpt"):
        (root / name).symlink_to(ROOT / name)
    (root / "11_serve").mkdir()
    (root / "11_serve" / "run.py").write_text("")
    os.environ["OMP_NUM_THREADS"] = "1"
    Jobs(root, root / "helps").stages()
    return root


@pytest.fixture
def out(root, tmp_path):
    shutil.copytree(root / "helps", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def jobs(root, out):
    """Jobs of `root`, none of which outlives the test."""
    made = Jobs(root, out)
    yield made
    for path in out.glob("11_serve/jobs/*/job.json"):
        job = json.loads(path.read_text())
        if jobs_module.birth(job["pid"]) == job["birth"]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job["pid"], signal.SIGKILL)


class Server:
    """The routes behind a real uvicorn on a free port."""

    def __init__(self, jobs, out, **settings):
        app, limits = (
            FastAPI(),
            {k: settings.pop(k) for k in [*settings] if hasattr(dashboard.Live, k)},
        )
        limits |= {k: v for k, v in dict(every=0.05, listing=0.1).items() if k not in limits}
        api = dashboard.router(jobs, out, **settings)
        self.live = api.live
        for name, value in limits.items():
            if name != "sample":
                setattr(self.live, name, value)
        app.include_router(api)
        sock = socket.socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        config = uvicorn.Config(
            app, log_level="error", ws_ping_interval=None, timeout_graceful_shutdown=1
        )
        self.server = uvicorn.Server(config)
        run = dict(target=self.server.run, kwargs=dict(sockets=[sock]), daemon=True)
        self.thread = threading.Thread(**run)
        self.thread.start()
        until(lambda: self.server.started, "uvicorn")
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}/api", timeout=60)

    def get(self, path, status=200):
        answer = self.http.get(path)
        assert answer.status_code == status, answer.text
        return answer.json()

    def post(self, path, body=None, status=200):
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    def page(self, key=None, hello=True, **options):
        page = Page(f"ws://127.0.0.1:{self.port}/api/live", options)
        if hello:
            page.send(type="hello", key=key)
            assert page.next("hello")
        return page

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self.thread.join(10)


class Page:
    """What a browser does: it keeps the rows of each run in the order in which they came."""

    def __init__(self, url, options):
        self.socket = connect(url, max_size=None, open_timeout=30, **ALONE, **options)
        self.socket = self.socket.__enter__()
        self.rows, self.resets, self.seen = [], 0, []

    def send(self, **message):
        self.socket.send(json.dumps(message))

    def next(self, kind, seconds=60, until=lambda message: True):
        """The next message of a kind for which `until` holds; the others are kept, too."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                message = json.loads(self.socket.recv(timeout=left))
            except TimeoutError:
                break
            self.seen.append(message)
            if message["type"] == "ping":
                self.send(type="pong")
            if message["type"] == "rows":
                if message["reset"]:
                    self.rows, self.resets = [], self.resets + 1
                self.rows += message["rows"]
            if message["type"] == kind and until(message):
                return message
        raise AssertionError(f"no {kind}; last {self.seen[-3:]}")

    def steps(self, last, run=None):
        """All steps that have come once the step `last` has."""
        while not self.rows or self.rows[-1]["step"] != last:
            self.next("rows")
        return [row["step"] for row in self.rows]

    def closed(self, seconds=60):
        """The code with which the server closes."""
        end = time.monotonic() + seconds
        with contextlib.suppress(TimeoutError):
            while time.monotonic() < end:
                try:
                    self.socket.recv(timeout=end - time.monotonic())
                except ConnectionClosed as error:
                    return error.rcvd and error.rcvd.code
        raise AssertionError("the server does not close")

    def close(self):
        self.socket.close()


@pytest.fixture
def serve(jobs, out):
    """serve(**settings) is a Server over `jobs` and `out`."""
    made = []

    def start(of=jobs, **settings):
        made.append(Server(of, out, **settings))
        return made[-1]

    yield start
    for server in made:
        server.close()


def run_of(out, name="run-aaaaaa", steps=(), stage="03_gpt", result=None):
    """A run's directory with a row for each step."""
    path = out / stage / name
    path.mkdir(parents=True)
    (path / "run.json").write_text(json.dumps({"config": {"steps": 10}, "result": result}))
    write(path, *steps)
    return path


def write(path, *steps, **more):
    with open(path / "metrics.jsonl", "a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "train_loss": 1 / step} | more) + "\n")


# ---- jobs


@needs_03
def test_a_real_run_is_followed_paused_and_resumed_across_a_server_that_dies(root, out, serve):
    text = out / "corpus" / "own.txt"
    text.parent.mkdir()
    text.write_text("A small text about nothing much,\nrepeated until it will do.\n" * 100)
    flags = SMALL | dict(data=str(text), steps=400, tokens_per_step=1024, eval_every=200)
    server = serve()
    body = dict(stage="03_gpt", command="train", flags=flags | dict(fresh=True))
    page, job = server.page(), server.post("/jobs", body)["job"]
    assert job["status"] in ("starting", "running") and job["exit_code"] is None
    found = page.next("jobs", 60, lambda m: m["jobs"] and m["jobs"][0]["run"])["jobs"][0]
    run = found["run"]
    assert run.startswith(f"03_gpt/web-{job['id']}-")
    page.send(type="follow", runs={run: -1})
    page.next("rows")
    assert page.next("log")["text"]
    paused = server.post(f"/jobs/{job['id']}/pause")["job"]
    assert paused["status"] in ("stopping", "paused")
    # Another server, which knows only what is in the files, takes over in the middle of that.
    server.close()
    before, again = page.rows, serve(Jobs(root, out))
    until(lambda: again.get("/jobs")["jobs"][0]["status"] == "paused", "paused")
    row = next(row for row in again.get("/runs")["runs"] if row["id"] == run)
    assert (row["status"], row["job"], row["steps"]) == ("paused", job["id"], 400)
    assert 0 < row["step"] < 400 and row["last"]["train_loss"] > 0
    page, two = again.page(), again.page()
    page.rows = list(before)
    page.send(type="follow", runs={run: before[-1]["step"]})
    two.send(type="follow", runs={run: -1})
    assert again.post(f"/jobs/{job['id']}/resume")["job"]["status"] in ("starting", "running")
    assert page.steps(400) == two.steps(400) == list(range(1, 401))
    done = until(lambda: (j := again.get("/jobs")["jobs"][0])["exit_code"] is not None and j, "end")
    assert (done["status"], done["exit_code"], done["error"]) == ("finished", 0, None)
    more = again.get(f"/runs/{run}")
    assert more["status"] == "finished" and more["config"]["d_model"] == 16
    assert more["plots"] == ["loss.png"] and more["result"]["val_loss"] > 0
    assert [c["model"] for c in more["checkpoints"]] == [run] and more["has_model"]
    picture = again.http.get(f"/runs/{run}/plots/loss.png")
    assert picture.content[:4] == b"\x89PNG" and picture.headers["content-type"] == "image/png"
    assert [r["step"] for r in again.get(f"/runs/{run}/metrics?after=397")["rows"]] == [
        398,
        399,
        400,
    ]
    assert runs_module.resolve(out, None, run) == out / run
    text = again.get(f"/jobs/{job['id']}/log")
    assert "going on" in text["text"]  # it went on, and --fresh was not given again
    rest = again.get(f"/jobs/{job['id']}/log?offset={text['offset']}")
    assert rest == {"text": "", "offset": text["offset"]}
    again.post(f"/jobs/{job['id']}/resume", status=409)  # there is nothing to go on with


@needs_03
def test_stages_lists_commands_flags_and_kinds_but_nothing_interactive(serve):
    stages = {stage["stage"]: stage for stage in serve().get("/stages")["stages"]}
    assert stages.keys() == {"03_gpt", "20_tiny"} and stages["03_gpt"]["title"] == "GPT"
    assert [c["name"] for c in stages["20_tiny"]["commands"]] == ["train"]
    train = next(c for c in stages["03_gpt"]["commands"] if c["name"] == "train")
    flags = {flag["name"]: (flag["kind"], flag["default"]) for flag in train["flags"]}
    assert flags["steps"] == ("int", "1000") and flags["max_lr"] == ("float", "0.001")
    assert flags["fresh"] == ("bool", "False") and flags["tokens"] == ("str", None)
    assert flags["bias"] == ("bool", "True") and "run" not in flags
    assert next(f for f in train["flags"] if f["name"] == "steps")["help"] == "optimizer steps"


def test_a_job_gets_what_was_given_as_one_argument_each(jobs, out):
    evil = "--run=other $(touch hacked); `id` 'x' \"y\" & | > z"
    job = jobs.start("20_tiny", "train", dict(prompt=evil, steps=3, rate=0.5, fresh=False))
    until(lambda: jobs.get(job["id"])["status"] == "finished", "end")
    text = jobs.log(job["id"])["text"]
    argv = eval(text.partition("argv ")[2].splitlines()[0])
    wanted = ["train", f"--run=web-{job['id']}", f"--prompt={evil}", "--steps=3", "--rate=0.5"]
    assert argv == [*wanted, "--no-fresh"]
    assert not list(out.rglob("hacked")) and jobs.get(job["id"])["run"].startswith("20_tiny/web-")


def test_a_failed_job_says_why_and_can_be_resumed(jobs):
    job = jobs.start("20_tiny", "train", dict(how="fail"))
    done = until(lambda: (j := jobs.get(job["id"]))["exit_code"] is not None and j, "end")
    assert (done["status"], done["exit_code"]) == ("failed", 2)
    assert done["error"] == "error: the data is gone"
    jobs.resume(job["id"])
    until(lambda: jobs.log(job["id"])["text"].count("data is gone") == 2, "second end")


def test_stop_kills_what_does_not_end_and_no_zombie_stays(root, out, jobs):
    jobs.grace = 0.5
    job = jobs.start("20_tiny", "train", dict(how="refuse"))
    until(lambda: "deaf" in jobs.log(job["id"])["text"], "deaf")
    pid = json.loads((out / "11_serve" / "jobs" / job["id"] / "job.json").read_text())["pid"]
    assert jobs.stop(job["id"])["status"] == "stopping"
    until(lambda: not Path(f"/proc/{pid}").exists(), "killed and reaped")
    assert jobs.get(job["id"])["status"] == "stopped"
    with pytest.raises(RuntimeError, match="stopped already"):
        jobs.pause(job["id"])


def test_pause_before_anything_is_saved_and_a_stop_of_what_is_paused(jobs):
    job = jobs.start("20_tiny", "train", dict(how="wait"))
    until(lambda: jobs.get(job["id"])["status"] == "running", "running")
    jobs.pause(job["id"])
    done = until(lambda: (j := jobs.get(job["id"]))["status"] == "paused" and j, "paused")
    assert done["exit_code"] == 143
    assert jobs.stop(job["id"])["status"] == "stopped"


def test_no_more_jobs_at_once_than_allowed(jobs):
    first, second = (jobs.start("20_tiny", "train", dict(how="wait")) for _ in range(2))
    with pytest.raises(RuntimeError, match="2 jobs run at once"):
        jobs.start("20_tiny", "train", {})
    jobs.stop(first["id"])
    until(lambda: jobs.get(first["id"])["status"] == "stopped", "stopped")
    third = jobs.start("20_tiny", "train", dict(how="wait"))
    with pytest.raises(RuntimeError, match="at once"):
        jobs.resume(first["id"])
    assert {j["id"] for j in jobs.list()} == {first["id"], second["id"], third["id"]}


def test_a_pid_that_another_process_has_by_now_is_not_signalled(jobs, out):
    job = jobs.start("20_tiny", "train", {})
    until(lambda: jobs.get(job["id"])["status"] == "finished", "end")
    path = out / "11_serve" / "jobs" / job["id"] / "job.json"
    record = json.loads(path.read_text())
    (path.parent / "exit").unlink()  # as after a power cut
    shutil.rmtree(out / "20_tiny")
    path.write_text(json.dumps(record | {"pid": os.getpid()}))
    found = jobs.get(job["id"])
    assert found["status"] == "failed" and "machine went down" in found["error"]
    with pytest.raises(RuntimeError, match="failed already"):
        jobs.stop(job["id"])  # or this test would be ended


def test_a_process_starts_only_once_its_record_is_kept(jobs, monkeypatch, out):
    def full(path, mode):
        raise OSError("disk full")

    monkeypatch.setattr(jobs_module, "atomic", full)
    with pytest.raises(OSError, match="disk full"):
        jobs.start("20_tiny", "train", {})
    monkeypatch.undo()
    (log,) = out.glob("11_serve/jobs/*/log.txt")
    time.sleep(1)  # time in which it would print
    assert log.read_text() == "" and jobs.list() == []


def test_a_log_is_read_on_in_whole_characters(jobs):
    job = jobs.start("20_tiny", "train", {})
    until(lambda: jobs.get(job["id"])["status"] == "finished", "end")
    path = jobs.home / job["id"] / "log.txt"
    path.write_bytes("aé".encode()[:2])
    assert jobs.log(job["id"]) == {"text": "a", "offset": 1}
    path.write_bytes("aéb".encode())
    assert jobs.log(job["id"], 1) == {"text": "éb", "offset": 4}
    assert jobs.log(job["id"], -1)["text"] == "b" and jobs.log(job["id"], 99)["text"] == ""


@pytest.mark.parametrize(
    "flags",
    [
        {"reward": "evil.py:steal"}, {"prompt": "two\nlines"}, {"prompt": "nul\0"},
        {"prompt": "x" * 501}, {"data": "../../secret.txt"}, {"data": "/etc/passwd"},
        {"data": "http://169.254.169.254/latest"}, {"data": "file:///etc/passwd"},
        {"data": "s3://other/prefix"}, {"data": "s3://bucket/prefix-of-others/x"},
        {"data": "s3://bucket/prefix/../other"}, {"data": "out/link/passwd"}, {"data": "~root"},
        {"data": "{out}/link/passwd"},
        {"data": "*"}, {"data": "..\\x"}, {"how": "/etc/passwd"}, {"how": "x.py:f"},
        {"data": "out/11_serve/jobs/x/job.json"}, {"steps": [1]}, {"steps": None},
        {"rate": float("inf")}, {"steps": True}, {"fresh": "yes"}, {"fresh": 1}, {"run": "mine"},
        {"--data": "x"}, {"data=x --how": "x"}, {"": "x"}, {"nothing": 1}, ["data"], "data",
    ],
    ids=lambda flags: repr(flags)[:40],
)  # fmt: skip
def test_flags_that_may_not_be_given(root, jobs, out, flags):
    jobs.store = "s3://bucket/prefix"
    if not (root / "out").exists():
        (root / "out").symlink_to(out)
    (out / "link").symlink_to("/etc")
    if isinstance(flags, dict) and str(flags.get("data")).startswith("{out}"):
        flags = {"data": flags["data"].format(out=out)}
    with pytest.raises(ValueError):
        jobs.start("20_tiny", "train", flags)
    (root / "out").unlink()
    assert jobs.list() == []


def test_flags_that_may_be_given(jobs, out, tmp_path):
    jobs.store, jobs.allow = "s3://bucket/prefix", [out, tmp_path / "more"]
    (out / "link").symlink_to(out / "corpus")
    for given, passed in [
        ("s3://bucket/prefix/run", None), ("plays", None), (f"{out}/link/a", f"{out}/corpus/a"),
        (f"{tmp_path}/more/../more/a", f"{tmp_path}/more/a"),
    ]:  # fmt: skip
        job = dict(id="0", stage="20_tiny", command="train", flags={"data": given})
        assert jobs._argv(job)[-1] == f"--data={passed or given}"


def test_only_commands_of_stages_are_started(serve, jobs):
    server = serve()
    for stage, command in [
        ("11_serve", "serve"), ("20_tiny", "chat"), ("20_tiny", "--help"), ("../20_tiny", "train"),
        ("99_none", "train"), ("common", "train"), (None, "train"), ("20_tiny", ["train"]),
        ("20_tiny/../20_tiny", "train"), ("20_tiny\n", "train"),
    ]:  # fmt: skip
        body = dict(stage=stage, command=command, flags={})
        error = server.post("/jobs", body, 400)["error"]
        assert set(error) == {"message", "type", "param", "code"} and error["message"]
    for body in (
        None,
        [],
        {"stage": "20_tiny"},
        {"stage": "20_tiny", "command": "train", "flags": 1},
    ):
        server.post("/jobs", body, 400)
    assert jobs.list() == []


# ---- metrics


def test_a_half_written_line_waits_and_a_damaged_one_is_passed_over(out):
    path = run_of(out, steps=(1, 2))
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "train_loss": NaN, "x": [1e999, -Infinity, 2]}\nrubbish\n[4]\n')
        file.write("[" * 100_000 + '\n{"step": 5, "tra')
    tail = Tail(path / "metrics.jsonl").read()
    assert tail.after(1) == [
        {"step": 2, "train_loss": 0.5},
        {"step": 3, "train_loss": None, "x": [None, None, 2]},
    ]
    rows, reset, cursor = tail.since((None, 3, None))
    assert (rows, reset) == ([], False) and tail.last["train_loss"] == 0.5
    with open(path / "metrics.jsonl", "a") as file:
        file.write('in_loss": 7}\n{"step": 6}\n')
    rows, reset, cursor = tail.read().since(cursor)
    assert (rows, reset) == ([{"step": 5, "train_loss": 7}, {"step": 6}], False)
    assert tail.since(cursor)[0] == []


def test_steps_logged_again_replace_the_earlier_ones(out):
    path = run_of(out, steps=range(1, 11))
    tail = Tail(path / "metrics.jsonl").read()
    cursor = tail.since((None, 8, None))[2]
    write(path, 9, 10, 11, again=1)
    rows, reset, _ = tail.read().since(cursor)
    assert [r["step"] for r in rows] == [9, 10, 11] and not reset
    assert [(r["step"], r.get("again")) for r in tail.after(7)] == [
        (8, None),
        (9, 1),
        (10, 1),
        (11, 1),
    ]
    assert [r["step"] for r in runs_module.metrics(out, "03_gpt/run-aaaaaa", 9)] == [10, 11]


def test_a_file_begun_anew_is_noticed_however_it_comes_about(out):
    path = run_of(out, steps=range(1, 11)) / "metrics.jsonl"
    tail = Tail(path).read()

    def anew(text, replaced):
        cursor = tail.since((None, 5, None))[2]
        new = path.with_name("new") if replaced else path
        new.write_text(text)
        new.replace(path)
        return tail.read().since(cursor)

    assert anew('{"step": 1}\n', False)[:2] == ([{"step": 1}], True)  # it shrank
    longer = "".join(f'{{"step": {step}, "second": 1}}\n' for step in range(1, 30))
    assert len(anew(longer, False)[0]) == 29  # longer, in place
    assert len(anew(longer + '{"step": 30}\n', True)[0]) == 30  # another inode
    # and who comes with a later step than there is saw an earlier file
    assert tail.since((None, 31, None))[1] and not tail.since((None, 30, None))[1]


def test_a_long_run_comes_in_parts_without_gap_while_it_grows(out):
    path = run_of(out, steps=range(1, 2501))
    tail, cursor, rows = Tail(path / "metrics.jsonl").read(), (None, 0, None), []
    for turn in range(5):
        part, reset, cursor = tail.read().since(cursor)
        assert len(part) <= runs_module.PART and not reset
        rows += [row["step"] for row in part]
        write(path, *range(2501 + turn, 2502 + turn))
    assert rows == list(range(1, 2505))


def test_only_what_was_added_is_read(out, monkeypatch):
    path = run_of(out, steps=range(1, 101))
    tail, parsed = Tail(path / "metrics.jsonl").read(), []
    plain = runs_module.parse
    monkeypatch.setattr(runs_module, "parse", lambda line: parsed.append(line) or plain(line))
    write(path, 101)
    assert tail.read().step == 101 and tail.read() and len(parsed) == 1


def test_status_of_runs_without_a_job(out):
    old, new = run_of(out, "run-old", [1]), run_of(out, "run-new", [1, 2])
    run_of(out, "run-done", [10], result={"val_loss": 1})
    os.utime(old / "metrics.jsonl", (1e9, 1e9))
    os.utime(old / "run.json", (1e9, 1e9))
    (out / "03_gpt" / "latest").symlink_to(new)
    (out / "03_gpt" / "notes").mkdir()
    found = {run["name"]: run for run in runs_module.runs(out)}
    assert {k: v["status"] for k, v in found.items()} == {
        "run-old": "idle", "run-new": "running", "run-done": "finished",
    }  # fmt: skip
    assert runs_module.runs(out)[-1]["name"] == "run-old" and found["run-new"]["step"] == 2


# ---- models and names


def model_in(path, **files):
    path.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (path / name).write_text(files.get(name, "{}"))
    return path


def checkpoint_of(path, step, metric=1.0, nodes=1, node=0):
    """A checkpoint as 05_scaling/store.py writes it, with a model."""
    folder = path / f"step-{step:08d}"
    model_in(folder / "model", **{"model.safetensors": f"weights {step}"})
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {s}}}\n' for s in range(1, step + 1)))
    files = [p for p in folder.rglob("*") if p.is_file() and "manifest" not in p.name]
    entries = {
        p.relative_to(folder).as_posix(): {
            "bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest(),
        }
        for p in files
    }  # fmt: skip
    manifest = dict(
        step=step, metric=metric, node=node, nodes=nodes, time=1e9 + step, files=entries
    )
    (folder / f"manifest-{node}.json").write_text(json.dumps(manifest))
    return folder


def test_checkpoints_and_their_models(out):
    run = run_of(out, stage="05_scaling", result={"val_loss": 2.5})
    whole = checkpoint_of(run / "checkpoints", 20)
    checkpoint_of(run / "checkpoints", 30, nodes=2)  # the other node's part is not there
    checkpoint_of(run / "checkpoints", 40)
    (run / "checkpoints" / "step-00000040" / "manifest-0.json").write_text("{")
    found = runs_module.detail(out, "05_scaling/run-aaaaaa")
    assert [(c["step"], c["model"]) for c in found["checkpoints"]] == [
        (20, "05_scaling/run-aaaaaa@20")
    ]
    assert found["has_model"] and found["checkpoints"][0]["bytes"] > 10
    assert runs_module.resolve(out, None, "05_scaling/run-aaaaaa@20") == whole / "model"
    model_in(run)
    assert runs_module.resolve(out, None, "05_scaling/run-aaaaaa") == run
    last = runs_module.detail(out, "05_scaling/run-aaaaaa")["checkpoints"][-1]
    assert (last["model"], last["metric"]) == ("05_scaling/run-aaaaaa", 2.5)


@pytest.mark.parametrize(
    "model",
    [
        "x", "03_gpt/none", "../out/03_gpt/run-aaaaaa", "03_gpt/../03_gpt/run-aaaaaa",
        "/etc/passwd", "03_gpt/run-aaaaaa", "03_gpt/run-aaaaaa@7", "03_gpt/run-aaaaaa@../..",
        "03_gpt/run-aaaaaa@-1", "s3:run@1", "s3:../run@1", "03_gpt/link", "corpus/x", "smollm2",
        "03_gpt/half",
    ],
)  # fmt: skip
def test_what_is_no_model(out, tmp_path, model):
    run_of(out, steps=[1])
    model_in(tmp_path / "elsewhere" / "run")
    (tmp_path / "elsewhere" / "run" / "run.json").write_text("{}")
    (out / "03_gpt" / "link").symlink_to(tmp_path / "elsewhere" / "run")
    half = model_in(run_of(out, "half"))
    (half / "tokenizer.json").unlink()
    (half / "tokenizer.json").symlink_to("/etc/passwd")
    with pytest.raises(ValueError):
        runs_module.resolve(out, None, model)


def test_no_route_leaves_out(serve, out, tmp_path):
    run = run_of(out, steps=[1])
    (tmp_path / "secret.png").write_text("secret")
    (tmp_path / "run.json").write_text('{"config": {"secret": 1}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "secret": 1}\n')
    (run / "notes.txt").write_text("secret")
    (run / ".hidden.png").write_text("secret")
    (run / "sub").mkdir()
    (run / "sub" / "x.png").write_text("secret")
    (run / "evil.png").symlink_to(tmp_path / "secret.png")
    (out / "03_gpt" / "away").symlink_to(tmp_path)
    there = run_of(tmp_path / "other", "run-other", [1])  # just what a run looks like
    (out / "03_gpt" / "other").symlink_to(there)
    (out / "04_modern").symlink_to(there.parent)
    (out / "03_gpt" / "links").mkdir()
    for name in ("run.json", "metrics.jsonl"):
        (out / "03_gpt" / "links" / name).symlink_to(tmp_path / name)
    server, good = serve(), "/runs/03_gpt/run-aaaaaa"
    tried = [
        "/runs/%2e%2e/out", "/runs/03_gpt/%2e%2e", "/runs/03_gpt/%2e%2e%2f..", "/runs/.../x",
        "/runs/03_gpt/..%5c..", "/runs/03_gpt/away", "/runs/03_gpt/away/metrics",
        "/runs/03_gpt/links", "/runs/03_gpt/links/metrics", "/runs/11_serve/jobs",
        "/runs/03_gpt/run-aaaaaa%00", "/runs/03_gpt/run-aaaaaa%0a", "/runs/s3/x",
        *(f"{good}/plots/{x}" for x in ("evil.png", "notes.txt", ".hidden.png", "none.png")),
        *(f"{good}/plots/{x}" for x in ("sub%2fx.png", "%2e%2e%2fsecret.png", "x.png%00")),
        f"{good}/plots/%2e%2e", "/runs/03_gpt/other", "/runs/04_modern/run-other",
        "/jobs/..%2f..%2fx/log", "/jobs/%2e%2e/log", "/jobs/00000000/log",
        f"{good}/metrics?after=x",
    ]  # fmt: skip
    for path in tried:
        # as raw bytes, or the client would tidy the path before it asks
        url = httpx.URL(f"http://127.0.0.1:{server.port}").copy_with(
            raw_path=f"/api{path}".encode()
        )
        answer = server.http.get(url)
        assert answer.status_code in (400, 404), (path, answer.text)
        assert "secret" not in answer.text and "root:" not in answer.text
    assert server.get(good)["plots"] == []
    assert [run["name"] for run in server.get("/runs")["runs"]] == ["run-aaaaaa"]
    server.post("/jobs/00000000/pause", status=404)
    server.post("/jobs/00000000/explode", status=404)


def test_nothing_here_can_unpickle():
    for name in ("runs.py", "dashboard.py", "jobs.py", "remote.py"):
        text = Path(__file__).with_name(name).read_text()
        assert (
            "import torch" not in text and "import pickle" not in text and "shell=True" not in text
        )


# ---- live


def test_a_page_that_was_cut_off_gets_exactly_what_it_lacks(serve, out):
    path, server = run_of(out, steps=range(1, 6)), serve()
    page, other = server.page(), server.page()
    for one in (page, other):
        one.send(type="follow", runs={"03_gpt/run-aaaaaa": -1})
        assert one.steps(5) == [1, 2, 3, 4, 5]
    page.socket.socket.shutdown(socket.SHUT_RDWR)  # no goodbye
    write(path, 6, 7)
    assert other.steps(7) == list(range(1, 8))
    back = server.page()
    back.send(type="follow", runs={"03_gpt/run-aaaaaa": 5})
    write(path, 8)
    assert back.steps(8) == [6, 7, 8] and other.steps(8) == list(range(1, 9))
    # more runs are asked for: what was followed goes on, and is not sent again
    run_of(out, "run-bbbbbb", [1])
    other.send(type="follow", runs={"03_gpt/run-aaaaaa": 3, "03_gpt/run-bbbbbb": -1})
    other.next("rows", until=lambda m: m["run"] == "03_gpt/run-bbbbbb")
    write(path, 9)
    assert other.steps(9) == [*range(1, 9), 1, 9] and other.resets == 0
    other.send(
        type="follow", runs={"03_gpt/run-aaaaaa": -1}
    )  # it has forgotten all: from the start
    assert other.next("rows")["reset"] and other.steps(9) == list(range(1, 10))


def test_lists_are_sent_when_they_change_and_nothing_is_polled_for_nobody(serve, out):
    server = serve()
    time.sleep(0.3)
    assert server.live.poller is None
    page = server.page()
    assert page.next("runs")["runs"] == [] and page.next("jobs")["jobs"] == []
    path = run_of(out, steps=[1])
    assert page.next("runs")["runs"][0]["step"] == 1
    time.sleep(0.5)
    before = len(page.seen)
    write(path, 2)
    page.next("runs", until=lambda m: m["runs"][0]["step"] == 2)
    assert len(page.seen) - before <= 3  # and not one with each look
    page.close()
    until(lambda: server.live.poller.done(), "the poller ends")


def test_a_follow_while_the_disk_is_read_is_not_lost(serve, out, monkeypatch):
    run_of(out, steps=[1, 2])
    run_of(out, "run-bbbbbb", [7])
    server = serve()
    look = server.live.look
    monkeypatch.setattr(server.live, "look", lambda ready: (look(ready), time.sleep(0.4))[0])
    page = server.page()
    page.next("runs")
    for runs in ({"03_gpt/run-aaaaaa": -1}, {"03_gpt/run-aaaaaa": -1, "03_gpt/run-bbbbbb": -1}):
        page.send(type="follow", runs=runs)
        time.sleep(0.2)
    assert page.steps(7) == [1, 2, 7]


def test_a_reset_reaches_the_page_and_a_relogged_step_comes_again(serve, out):
    path, server = run_of(out, steps=[1, 2, 3]), serve()
    page = server.page()
    page.send(type="follow", runs={"03_gpt/run-aaaaaa": -1})
    page.steps(3)
    write(path, 2, 3, 4, again=1)
    assert page.steps(4) == [1, 2, 3, 2, 3, 4]
    (path / "new").write_text('{"step": 1}\n')
    os.replace(path / "new", path / "metrics.jsonl")
    assert page.steps(1) == [1] and page.resets == 1
    page.close()
    later = server.page()  # one that was away while the file was begun anew
    later.send(type="follow", runs={"03_gpt/run-aaaaaa": 4})
    assert later.steps(1) == [1] and later.resets == 1


def test_a_page_that_does_not_read_is_dropped_and_costs_no_memory(serve, out):
    path, server = run_of(out), serve(patience=1, room=16, silence=600)
    slow = server.page(max_queue=1)
    slow.socket.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    fast = server.page()
    for page in (slow, fast):
        page.send(type="follow", runs={"03_gpt/run-aaaaaa": -1})
    (client,) = [
        c for c in server.live.clients if c.socket.client.port == slow.socket.local_address[1]
    ]
    step = 0
    end = time.monotonic() + 60
    while client in server.live.clients and time.monotonic() < end:
        write(
            path, *range(step + 1, step + 51), pad=os.urandom(10_000).hex()
        )  # deflate cannot help
        step += 50
        assert fast.steps(step) == list(range(1, step + 1))  # the others do not suffer
        assert client.queue.qsize() <= 16
    assert client not in server.live.clients and server.live.clients


def test_a_full_queue_drops_the_client():
    async def go():
        client = dashboard.Client(None, 2)
        for _ in range(3):
            client.put({"type": "ping"})
        return client.full.is_set(), client.queue.qsize()

    assert asyncio.run(go()) == (True, 2)


def test_a_malformed_message_closes(serve):
    server = serve()
    for message, code in [
        ("x" * 70_000, 1009), ("rubbish", 1008), ("[]", 1008), (b"{}", 1008),
        ('{"type": "x"}', 1008),
        ('{"type": "follow"}', 1008), ('{"type": "follow", "runs": {"a": -1}}', 1008),
        ('{"type": "follow", "runs": {"../x": -1}}', 1008),
        ('{"type": "follow", "runs": {"03_gpt/../..": -1}}', 1008),
        ('{"type": "follow", "runs": {"03_gpt/x": "1"}}', 1008),
        (json.dumps({"type": "follow", "runs": {f"a/{i}": 1 for i in range(51)}}), 1008),
    ]:  # fmt: skip
        page = server.page()
        page.socket.send(message)
        assert page.closed() == code, message[:50]
    assert server.page().next("runs")


def test_hello_first_with_the_key_and_in_time(serve):
    asked = []
    server = serve(hello=1, guard=lambda socket, key: asked.append(key) or key == "right")
    for first in ({"type": "follow", "runs": {}}, {"type": "hello", "key": 7}):
        page = server.page(hello=False)
        page.send(**first)
        assert page.closed() == 1008
    assert asked == []
    for key in (None, "wrong"):
        page = server.page(hello=False)
        page.send(type="hello", key=key)
        assert page.closed() == 1008
        assert [m["type"] for m in page.seen] == [] and asked[-1] == key
    silent = server.page(hello=False)
    assert silent.closed() == 1008
    assert server.page(key="right").next("runs") and not server.live.open > 1


def test_pings_must_be_answered(serve):
    server = serve(ping=0.2, silence=1.5)
    good, bad = server.page(), server.page()
    for _ in range(12):
        good.next("ping")
    assert bad.closed() == 1008  # it reads pings and says nothing
    assert len(server.live.clients) == 1


def test_no_more_connections_than_allowed(serve):
    server = serve(most=2)
    pages = [server.page(), server.page()]
    assert server.page(hello=False).closed() == 1013
    pages[0].close()
    until(lambda: server.live.open == 1, "the place is free")
    assert server.page().next("runs")


def test_a_sample_is_drawn_when_the_model_changes_and_never_two_at_once(serve, out):
    path, drawn, now, most = run_of(out, steps=[1]), [], [0], [0]
    other = run_of(out, "run-bbbbbb", steps=[4])

    async def sample(run, directory):
        now[0] += 1
        most[0] = max(most[0], now[0])
        await asyncio.sleep(0.3)
        now[0] -= 1
        drawn.append((run, directory))
        if run.endswith("b"):
            raise ValueError("no such model")
        return f"text {len(drawn)}"

    server = serve(sample=sample, drawing=1, ping=0.2)
    page = server.page()
    page.send(type="follow", runs={"03_gpt/run-aaaaaa": -1, "03_gpt/run-bbbbbb": -1})
    page.steps(4)
    assert drawn == []
    (path / "model.safetensors").write_text("weights")
    found = page.next("sample")
    assert found == dict(type="sample", run="03_gpt/run-aaaaaa", step=1, text="text 1")
    time.sleep(1)  # both may be drawn again, and change at once
    (other / "model.safetensors").write_text("weights")
    (path / "model.safetensors").write_text("others")
    page.next("ping", until=lambda _: sum(m["type"] in ("sample", "error") for m in page.seen) == 3)
    codes = [m["error"]["code"] for m in page.seen if m["type"] == "error"]
    assert codes == ["no_sample"]
    assert most == [1]
    shown = server.get("/runs/03_gpt/run-aaaaaa")["samples"]
    assert shown[0] == {"step": 1, "text": "text 1"} and len(shown) == 2
    assert drawn[0] == ("03_gpt/run-aaaaaa", path)


# ---- S3


@pytest.fixture(scope="module")
def moto():
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3.DEFAULT_SESSION = None
    server = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(moto, tmp_path):
    """A client, with an empty bucket `s3.bucket` and `s3.put(prefix, folder)`."""
    import boto3

    keys = dict(aws_access_key_id="someone", aws_secret_access_key=SECRET, region_name="us-east-1")
    client = boto3.client("s3", endpoint_url=moto, **keys)
    client.bucket = f"bucket-{os.urandom(4).hex()}"
    client.create_bucket(Bucket=client.bucket)

    def put(prefix, folder):
        for path in folder.rglob("*"):
            if path.is_file():
                key = f"{prefix}/{path.relative_to(folder.parent).as_posix()}"
                client.put_object(Bucket=client.bucket, Key=key, Body=path.read_bytes())

    client.put = put
    return client


def test_runs_on_s3_are_listed_and_a_model_is_fetched_and_checked(s3, tmp_path, out, serve):
    s3.put("pre/one", checkpoint_of(tmp_path / "up", 10, 3.0))
    s3.put("pre/one", checkpoint_of(tmp_path / "up", 20, 2.0))
    s3.put("pre/one", checkpoint_of(tmp_path / "up", 30, nodes=2))  # half there
    s3.put("pre", checkpoint_of(tmp_path / "up", 5, None))  # the prefix is a run itself
    s3.put("elsewhere/two", checkpoint_of(tmp_path / "up", 7))
    there = Remote(f"s3://{s3.bucket}/pre", out / "11_serve" / "downloads", s3)
    server = serve(remote=there)
    found = {run["id"]: run for run in server.get("/runs")["runs"]}
    assert found.keys() == {"s3/one", "s3/pre"}
    one = found["s3/one"]
    assert (one["step"], one["where"], one["last"]) == (20, "s3", {"val_loss": 2.0})
    assert "checkpoints" not in one and one["has_model"] and one["error"] is None
    detail = server.get("/runs/s3/one")
    assert [(c["step"], c["model"]) for c in detail["checkpoints"]] == [
        (10, "s3:one@10"),
        (20, "s3:one@20"),
    ]
    assert [r["step"] for r in server.get("/runs/s3/one/metrics?after=17")["rows"]] == [18, 19, 20]
    folder = runs_module.resolve(out, there, "s3:one@20")
    assert (folder / "model.safetensors").read_text() == "weights 20"
    assert sorted(p.name for p in folder.parent.iterdir()) == ["files.json", "model"]
    assert folder.is_relative_to(out / "11_serve" / "downloads" / "one")
    key = "pre/one/step-00000010/model/model.safetensors"
    s3.put_object(Bucket=s3.bucket, Key=key, Body=b"weights 99")
    for model in ("s3:one@10", "s3:one@30", "s3:none@1"):
        with pytest.raises(ValueError, match="damaged|no complete"):
            runs_module.resolve(out, there, model)
    assert not list(out.rglob("step-00000010")) and not list(out.rglob(".step-*"))
    page = server.page()
    page.send(type="follow", runs={"s3/one": 18})
    assert page.steps(20) == [19, 20]


def test_names_on_s3_cannot_leave_the_cache(s3, tmp_path, out):
    folder = checkpoint_of(tmp_path / "up", 10)
    manifest = json.loads((folder / "manifest-0.json").read_text())
    names = ("../../../../evil", "..", "a/../../../evil", ".hidden", "a\\b", "a//b")
    entry = dict(bytes=4, sha256=hashlib.sha256(b"evil").hexdigest())
    evil = {f"model/{name}": entry for name in names}
    evil["/tmp/evil"] = evil["model/../evil"] = evil["model/.."]
    manifest["files"] |= evil
    (folder / "manifest-0.json").write_text(json.dumps(manifest))
    s3.put("pre/one", folder)
    s3.put("pre/..", folder)
    for name in evil:
        with contextlib.suppress(Exception):  # some names even S3 refuses
            key = f"pre/one/step-00000010/{name}"
            s3.put_object(Bucket=s3.bucket, Key=key, Body=b"evil")
    there = Remote(f"s3://{s3.bucket}/pre", out / "cache", s3)
    assert [run["id"] for run in there.runs(30)] == ["s3/one"]
    found = there.fetch("one", 10)
    assert sorted(p.name for p in found.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert not [p for p in tmp_path.rglob("*") if "evil" in p.name]
    entry = dict(bytes=1, sha256="")
    with pytest.raises(ValueError, match="elsewhere"):
        there._download("pre/", 1, "x", entry, out / "cache" / ".." / "x")


def test_an_error_of_s3_is_one_line_without_secrets(s3, out, monkeypatch):
    there = Remote(f"s3://{s3.bucket}-none/pre", out / "cache", s3)
    (row,) = there.runs(30)
    assert "there is no such bucket" in row["error"] and row["where"] == "s3"
    assert row in runs_module.runs(out, (), there, 5) or runs_module.runs(out, (), there, 5)
    with pytest.raises(ValueError, match="no such bucket"):
        there.fetch("one", 1)

    class Broken:
        def get_paginator(self, name):
            raise ConnectionError(f"https://user:{SECRET}@host?X-Amz-Signature={SECRET}")

    (row,) = Remote("s3://b/pre", out / "cache", Broken()).runs(30)
    assert row["error"] == "s3://b/pre: ConnectionError"
    for url in (f"s3://me:{SECRET}@bucket/x", "http://169.254.169.254/", "s3://", "file:///etc"):
        with pytest.raises(ValueError) as error:
            Remote(url, out / "cache")
        assert SECRET not in str(error.value)


def test_s3_is_asked_at_most_every_30_seconds_and_only_when_somebody_looks(out):
    asked = []

    class Client:
        def get_paginator(self, name):
            asked.append(name)
            raise TimeoutError

    there = Remote("s3://b/pre", out / "cache", Client())
    time.sleep(0.1)
    assert asked == []
    for _ in range(5):
        there.runs(10)
    assert len(asked) == 1
    there.looked -= 31
    there.runs(10)
    assert len(asked) == 2


def test_files_that_vanish_while_they_are_read_are_read_again():
    tries = []

    def twice():
        tries.append(1)
        if len(tries) < 3:
            raise FileNotFoundError("step-00000010")
        return {"tries": len(tries)}

    assert json.loads(dashboard.plainly(twice)().body) == {"tries": 3}

    def never():
        raise FileNotFoundError("step-00000010")

    assert dashboard.plainly(never)().status_code == 404
