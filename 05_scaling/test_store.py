"""CheckpointStore on a disk and against an S3 server on loopback, with what goes wrong there.

The proxy in front of moto is where 500s, delays and cut connections come from: boto3 and the store
see them as they would see them of the real thing.
"""

import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import store as module
from store import CheckpointStore

boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
pytestmark = [
    pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.skipif("IN_FORK" in os.environ, reason="tested in the original"),
]
SECRET = "wJalrXUtnFEMI-not-to-be-printed"


class Proxy(ThreadingHTTPServer):
    """Forwards to moto. `rule(method, path)` says what happens to a request: None, a status, a
    status as a string for an answer without a body, an Event to wait for, "cut request", "cut
    answer" (half-way) or "cut at its body" (after the headers). `seen` lists all of them."""

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.seen, self.rule = target, [], lambda method, path: None
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self):
        size, action = int(self.headers.get("Content-Length") or 0), None
        self.server.seen.append((self.command, self.path))
        action = self.server.rule(self.command, self.path)
        if action == "cut request":
            self.rfile.read(size // 2)
            return self.cut()
        body = self.rfile.read(size)
        if isinstance(action, threading.Event):
            action.wait(30)
        if isinstance(action, int) or str(action).isdigit():
            text = b"<Error><Code>Injected</Code><Message>on purpose</Message></Error>"
            text = b"" if isinstance(action, str) or self.command == "HEAD" else text
            return self.answer(int(action), {"Content-Length": str(len(text))}, text)
        link = http.client.HTTPConnection(self.server.target, timeout=30)
        link.request(self.command, self.path, body, dict(self.headers))
        response = link.getresponse()
        text, headers = response.read(), dict(response.headers)
        if action in ("cut answer", "cut at its body"):
            headers |= {"Content-Length": str(len(text) + 1)}
            text = text[: len(text) // 2] if action == "cut answer" else b""
            self.answer(response.status, headers, text)
            return self.cut()
        if self.command != "HEAD":
            headers = {k: v for k, v in headers.items() if k.lower() != "transfer-encoding"}
            headers |= {"Content-Length": str(len(text))}
        self.answer(response.status, headers, text)

    def answer(self, status, headers, text):
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def cut(self):
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    boto3.DEFAULT_SESSION = None
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    yield ":".join(map(str, server.get_host_and_port()))
    server.stop()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """A proxy, with a client of its own past it, `s3.plain`, and an empty bucket `s3.bucket`."""
    proxy = Proxy(server)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    backoff = "botocore.retries.standard.ExponentialBackoff.delay_amount"
    monkeypatch.setattr(backoff, lambda self, context: 0.001)
    monkeypatch.setattr(CheckpointStore, "pause", 0.001)
    monkeypatch.setattr(module, "DAY", 1e12)  # moto says of all uploads that they are of 2010
    proxy.plain = boto3.client("s3", endpoint_url=f"http://{server}")
    proxy.bucket = f"bucket-{os.urandom(4).hex()}"
    proxy.plain.create_bucket(Bucket=proxy.bucket)
    yield proxy
    proxy.rule = lambda method, path: None
    proxy.shutdown()
    proxy.server_close()


@pytest.fixture
def new(s3, tmp_path):
    """new() is a store in s3.bucket as a new process would make one."""

    def make(staging="staging", url=None, **options):
        unlock()
        url = url or f"s3://{s3.bucket}/run/one"
        made.append(CheckpointStore(url, tmp_path / staging, **options))
        return made[-1]

    made = []
    yield make
    for store in made:
        with contextlib.suppress(ValueError):
            store.wait(5)


def unlock():
    for key in list(module.LOCKS):
        module.LOCKS.pop(key).close()


def write(store, step, metric=None, **files):
    part = store.begin(step)
    for name, data in (files or {"model.bin": f"weights {step}".encode()}).items():
        path = part / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    store.commit(step, metric)


def steps(store):
    return [entry["step"] for entry in store.list()]


def names(s3, prefix="run/one/"):
    pages = s3.plain.get_paginator("list_objects_v2").paginate(Bucket=s3.bucket, Prefix=prefix)
    return {item["Key"][len(prefix) :] for page in pages for item in page.get("Contents", [])}


def pointer(s3):
    return json.loads(
        s3.plain.get_object(Bucket=s3.bucket, Key="run/one/latest.json")["Body"].read()
    )


def sealed(directory):
    return sorted(int(path.name[5:]) for path in Path(directory).glob("step-*"))


def until(condition):
    end = time.time() + 20
    while not condition():
        assert time.time() < end
        time.sleep(0.005)


# ---- round trips


@pytest.mark.parametrize("where", ["local", "s3"])
def test_files_come_back_as_they_were(where, new, s3, tmp_path):
    big = os.urandom(12_000_000)
    url = f"s3://{s3.bucket}/run/one" if where == "s3" else str(tmp_path / "staging")
    store = new(url=url, part_bytes=5 * 2**20)
    assert store.latest() is None and store.best() is None and store.list() == []
    write(store, 7, 1.5, big=big, optimizer__rank__0=b"zero", empty=b"")
    store.wait(20)
    if where == "s3":
        parts = [path for method, path in s3.seen if method == "PUT" and "partNumber" in path]
        assert len(parts) == 3
        assert names(s3) == {"latest.json"} | {
            f"step-00000007/{n}" for n in ("big", "empty", "optimizer/rank/0", "manifest-0.json")
        }
    other = new("elsewhere" if where == "s3" else "staging", url=url)
    (entry,) = other.list()
    assert abs(entry.pop("time") - time.time()) < 60
    place = "s3://" + s3.bucket + "/run/one" if where == "s3" else str(tmp_path / "staging")
    assert entry == {
        "step": 7, "metric": 1.5, "bytes": 12_000_004, "name": "step-00000007",
        "where": f"{place}/step-00000007",
    }  # fmt: skip
    path = other.download()
    assert (path / "big").read_bytes() == big and (path / "empty").read_bytes() == b""
    assert (path / "optimizer" / "rank" / "0").read_bytes() == b"zero"
    assert path == other.download(7) and other.latest() == other.best() == 7
    with pytest.raises(ValueError, match="lacks a complete checkpoint 8: .*7"):
        other.download(8)


def test_a_download_goes_on_with_the_files_it_has(new, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    store = new()
    write(store, 1, a=b"a" * 1000, b=b"b" * 1000)
    store.wait(20)
    reader = new("elsewhere")
    s3.rule = lambda method, path: 500 if method == "GET" and path.endswith("/b") else None
    with pytest.raises(ValueError, match="on purpose"):
        reader.download()
    assert sealed(tmp_path / "elsewhere") == []
    s3.rule = lambda method, path: 500 if method == "GET" and path.endswith("/a") else None
    assert (new("elsewhere").download() / "b").read_bytes() == b"b" * 1000


# ---- retention


@pytest.mark.parametrize("where", ["local", "s3"])
def test_the_last_and_the_best_are_kept(where, new, s3, tmp_path):
    url = f"s3://{s3.bucket}/run/one" if where == "s3" else str(tmp_path / "staging")
    store = new(url=url, keep_last=2, keep_best=1)
    for step, metric in enumerate([None, 3.0, 1.0, 2.0, float("nan"), 2.0, 2.5], 1):
        write(store, step, metric)
        store.wait(20)
    assert steps(store) == [3, 6, 7] and store.best() == 3 and store.latest() == 7
    assert sealed(tmp_path / "staging") == ([3, 6, 7] if where == "local" else [7])
    if where == "s3":
        assert {n.split("/")[0] for n in names(s3)} == {
            "step-00000003", "step-00000006", "step-00000007", "latest.json",
        }  # fmt: skip
        deleted = [path.rsplit("/")[-1] for method, path in s3.seen if method == "DELETE"]
        assert deleted == ["manifest-0.json", "model.bin"] * 4
    else:
        latest = json.loads((tmp_path / "staging" / "latest.json").read_text())
        assert latest == {"step": 7, "name": "step-00000007"}


def test_what_a_kill_left_half_deleted_goes_with_the_next(new, s3):
    s3.plain.put_object(Bucket=s3.bucket, Key="run/one/step-00000001/model.bin", Body=b"left")
    s3.plain.put_object(Bucket=s3.bucket, Key="run/one-more/step-00000001/x", Body=b"another's")
    store = new()
    assert store.list() == []
    write(store, 2)
    store.wait(20)
    assert "step-00000001/model.bin" not in names(s3) and names(s3, "run/one-more/")


def test_one_who_only_looks_deletes_nothing(new, s3):
    store = new(keep_last=5)
    for step in range(1, 5):
        write(store, step)
        store.wait(20)
    reader = new("elsewhere", keep_last=1)
    reader.wait(20)
    assert steps(reader) == [1, 2, 3, 4]


# ---- order, and training that does not wait


def test_the_pointer_moves_only_after_everything_is_there(new, s3):
    store = new()
    write(store, 1)
    store.wait(20)
    s3.seen.clear()
    write(store, 2, a=b"a", b=b"b", c__d=b"d")
    store.wait(20)
    puts = [path.split("/run/one/")[1].split("?")[0] for m, path in s3.seen if m == "PUT"]
    assert [f"step-00000002/{n}" for n in ("a", "b", "c/d", "manifest-0.json")] == puts[:-1]
    assert puts[-1] == "latest.json" and pointer(s3) == {"step": 2, "name": "step-00000002"}


def test_the_pointer_never_goes_back(new, s3):
    store = new()
    write(store, 9)
    store.wait(20)
    write(store, 4)
    store.wait(20)
    assert pointer(s3)["step"] == 9 and store.latest() == 9 and 4 in steps(store)
    for key in names(s3):
        if key.startswith("step-00000009"):
            s3.plain.delete_object(Bucket=s3.bucket, Key=f"run/one/{key}")
    other = new("elsewhere")
    write(other, 5)
    other.wait(20)
    assert pointer(s3)["step"] == 9 and other.latest() == 5


@pytest.mark.parametrize("where", ["local", "s3"])
def test_a_pointer_that_a_kill_prevented_is_made_at_the_next_start(where, new, s3, tmp_path):
    url = f"s3://{s3.bucket}/run/one" if where == "s3" else str(tmp_path / "staging")
    store = new(url=url)
    write(store, 1)
    store.wait(20)
    if where == "s3":
        s3.plain.delete_object(Bucket=s3.bucket, Key="run/one/latest.json")
        new().wait(20)
        assert pointer(s3)["step"] == 1
    else:
        (tmp_path / "staging" / "latest.json").unlink()
        new(url=url)
        assert json.loads((tmp_path / "staging" / "latest.json").read_text())["step"] == 1


def test_commit_returns_while_an_upload_is_held(new, s3, tmp_path):
    release = threading.Event()
    s3.rule = lambda method, path: release if method == "PUT" else None
    store = new()
    write(store, 1, model=os.urandom(4_000_000))
    until(lambda: any(method == "PUT" for method, _ in s3.seen))
    write(store, 2, 5.0)
    assert not release.is_set() and names(s3) == set()
    until(lambda: store.latest() == 2)  # sealed, though the upload of the first is held
    with pytest.raises(ValueError, match="step-00000002"):
        store.wait(0.05)
    release.set()
    store.wait(20)
    assert steps(new("elsewhere")) == [1, 2]


@pytest.mark.parametrize("metrics, uploaded", [((4, 3, 2), [1, 4]), ((4, 1, 2), [1, 3, 4])])
def test_only_the_newest_and_the_best_wait(metrics, uploaded, new, s3, tmp_path):
    release = threading.Event()
    s3.rule = lambda method, path: release if method == "PUT" else None
    store = new(keep_last=9)
    write(store, 1, 9.0)
    until(lambda: any(method == "PUT" for method, _ in s3.seen))
    for step, metric in enumerate(metrics, 2):
        write(store, step, metric)
        until(lambda: not store.sealing)
    assert sealed(tmp_path / "staging") == uploaded
    release.set()
    store.wait(20)
    assert steps(new("elsewhere")) == uploaded


# ---- failures on the way


@pytest.mark.parametrize("action", [500, "503", "cut request", "cut answer", "cut at its body"])
def test_what_fails_on_the_way_is_tried_again(action, new, s3):
    faults = {}

    def rule(method, path):
        """Each request fails the first four times."""
        faults[method, path] = faults.get((method, path), 0) + 1
        return action if faults[method, path] <= 4 and method != "HEAD" else None

    big = os.urandom(5_300_000)
    store = new(part_bytes=5 * 2**20)
    s3.rule = rule
    write(store, 1, big=big, small=b"small")
    store.wait(20)
    reader = new("elsewhere")
    assert (reader.download(1) / "big").read_bytes() == big
    assert (reader.download(1) / "small").read_bytes() == b"small" and pointer(s3)["step"] == 1


def test_the_store_tries_again_where_boto_has_given_up(new, s3):
    count = [0]

    def rule(method, path):
        count[0] += method == "PUT"
        return 500 if count[0] <= 12 and method == "PUT" else None

    store = new()
    s3.rule = rule
    write(store, 1)
    store.wait(20)
    assert count[0] > 12 and steps(new("elsewhere")) == [1]


def test_a_lost_upload_is_found_by_its_size(new, s3):
    lies = [6]

    class Shortened:
        def __init__(self, client):
            self.client = client

        def __getattr__(self, name):
            return getattr(self.client, name)

        def head_object(self, **which):
            lies[0] -= 1
            return self.client.head_object(**which) | ({"ContentLength": 3} if lies[0] > 0 else {})

    store = new(client=Shortened(s3.plain))
    with pytest.warns(UserWarning, match="has 3 bytes after its upload, not 9"):
        write(store, 1)
        with pytest.raises(ValueError, match="3 bytes"):
            store.wait(20)
    assert names(s3) == {"step-00000001/model.bin"}


@pytest.mark.parametrize("again", ["commit", "start"])
def test_what_could_not_be_uploaded_stays_and_is_tried_again(again, new, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 2)
    store = new()
    s3.rule = lambda method, path: 500 if method == "PUT" else None
    copy = tmp_path / "staging" / "step-00000001"
    with pytest.warns(
        UserWarning, match=f"checkpoint 1 is not in s3://.*on purpose.*{copy} stays"
    ) as seen:
        write(store, 1)
        with pytest.raises(ValueError, match=f"{copy}"):
            store.wait(20)
    assert len(seen) == 1 and SECRET not in str(seen[0].message)
    assert copy.is_dir() and store.latest() == 1 and store.download() == copy
    assert new("elsewhere").latest() is None
    s3.rule = lambda method, path: None
    if again == "start":
        new().wait(20)
        assert steps(new("elsewhere")) == [1]
    else:
        write(store, 2)
        store.wait(20)
        assert set(steps(new("elsewhere"))) >= {2} and sealed(tmp_path / "staging") == [2]


def test_while_s3_is_down_the_disk_does_not_fill(new, s3, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    store = new(keep_last=2)
    s3.rule = lambda method, path: 500 if method == "PUT" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 6):
            write(store, step, 1.0 if step == 2 else 5.0)
            with pytest.raises(ValueError, match="on purpose"):
                store.wait(20)
    assert sealed(tmp_path / "staging") == [2, 4, 5]
    s3.rule = lambda method, path: None
    write(store, 6, 5.0)
    store.wait(20)
    assert steps(store)[-1] == 6 and 2 in steps(store)


def test_multipart_uploads_of_killed_processes_are_ended(new, s3, monkeypatch):
    def begun():
        answer = s3.plain.list_multipart_uploads(Bucket=s3.bucket)
        return {upload["Key"] for upload in answer.get("Uploads", [])}

    for key in ("run/one/step-00000003/big", "run/two/step-00000003/big"):
        s3.plain.create_multipart_upload(Bucket=s3.bucket, Key=key)
    monkeypatch.setattr(module, "DAY", time.time() - 1289422113 + 3600)  # moto: 2010-11-10T20:48:33
    young = new()
    write(young, 1)
    young.wait(20)
    assert len(begun()) == 2
    monkeypatch.setattr(module, "DAY", 86400)
    new("elsewhere")
    until(lambda: begun() == {"run/two/step-00000003/big"})


# ---- at the door


@pytest.mark.parametrize(
    "status, text",
    [(403, "access denied"), (404, "no such bucket: create it"), (400, "AWS_REGION"), (503, "503")],
)
def test_a_bucket_that_cannot_be_used_is_said_in_one_line(status, text, new, s3):
    s3.rule = lambda method, path: status
    with pytest.raises(ValueError, match=text) as error:
        new()
    assert s3.bucket in str(error.value) and SECRET not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_server_that_stumbles_at_the_start_is_tried_again(new, s3):
    count = []
    s3.rule = lambda method, path: count.append(1) or ("503" if len(count) < 4 else None)
    assert new().list() == [] and len(count) > 3


def test_no_bucket_credentials_or_endpoint(new, s3, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="no such bucket"):
        new(url="s3://nobody-has-this-one/x")
    for url in ("s3://", "s3:///run", "s3:/bucket", "gs://bucket/run"):
        with pytest.raises(ValueError, match="neither a directory nor s3://bucket/prefix"):
            new(url=url)
    with pytest.raises(ValueError) as error:
        new(url=f"s3://me:{SECRET}@bucket/run")
    assert SECRET not in str(error.value)
    with pytest.raises(ValueError, match="needs staging"):
        CheckpointStore(f"s3://{s3.bucket}")
    for bad in ({"keep_last": 0}, {"node": 2, "nodes": 2}, {"nodes": 2, "url": str(tmp_path)}):
        with pytest.raises(ValueError, match="do not fit"):
            new(**bad)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(ValueError, match="no connection: .*AWS_ENDPOINT_URL") as error:
        new()
    assert SECRET not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url.replace("//", f"//me:{SECRET}@"))
    s3.rule = lambda method, path: "cut at its body" if method == "GET" else "cut request"
    with pytest.raises(ValueError, match="Connection.*127.0.0.1") as error:
        new()
    assert SECRET not in str(error.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.url)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers credentials
    with pytest.raises(ValueError, match="no credentials"):
        new()


@pytest.mark.parametrize("writer", [False, True])
def test_only_a_writer_locks_others_out(writer, tmp_path):
    store = CheckpointStore(tmp_path, writer=writer)
    here = Path(module.__file__).resolve().parent
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n"
    code += f"from store import CheckpointStore as C; C({str(tmp_path)!r}).begin(1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ("in use by another process" in done.stderr) == writer
    assert (done.returncode == 0) != writer
    if not writer:
        with pytest.raises(ValueError, match="in use by another process or read-only"):
            store.begin(2)


def test_commit_wants_a_begin_and_names_of_its_own(tmp_path):
    store = CheckpointStore(tmp_path)
    with pytest.raises(ValueError, match=r"begin\(3\)"):
        store.commit(3)
    (store.begin(3) / "manifest-7.json").write_text("mine")
    with pytest.raises(ValueError, match="manifest"):
        store.commit(3)
    assert list(store.begin(3).iterdir()) == []


def test_two_steps_sealed_at_once_both_count(tmp_path, monkeypatch):
    store, atomic = CheckpointStore(tmp_path), module.atomic

    @contextlib.contextmanager
    def slow(path, mode="wb"):
        with atomic(path, mode) as file:
            yield file
            time.sleep(0.2 if path.name == "latest.json" else 0)

    monkeypatch.setattr(module, "atomic", slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in (1, 2):
            (store.begin(step) / "a").write_text(str(step))
            store.commit(step)
        store.wait(20)
    assert json.loads((tmp_path / "latest.json").read_text())["step"] == 2
    assert not list(tmp_path.glob(".step-*"))


def test_a_full_disk_is_said_and_the_next_commit_makes_it_good(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="No space left"):
        patch.setattr(module, "digest", full)
        write(store, 1)
        with pytest.raises(ValueError, match="00000001.* is not saved: .*No space left"):
            store.wait(20)
    assert store.list() == []
    write(store, 2)
    store.wait(20)
    assert steps(store) == [2]


# ---- damage


def test_a_damaged_file_on_a_disk_is_named(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (90, 100):
        write(store, step, nested__model=b"weights")
        store.wait(20)
    (tmp_path / "step-00000100" / "nested" / "model").write_bytes(b"weightz")
    with pytest.raises(ValueError, match="nested/model of step 100 .* use step 90"):
        store.download()
    assert (store.download(90) / "nested" / "model").read_bytes() == b"weights"
    (tmp_path / "step-00000090" / "nested" / "model").unlink()
    with pytest.raises(ValueError, match="nested/model of step 90 .* none before"):
        store.download(90)


def test_a_damaged_file_on_s3_is_named(new, s3, tmp_path):
    store = new()
    for step in (1, 2):
        write(store, step, model=b"weights", other=b"other")
        store.wait(20)
    key = {"Bucket": s3.bucket, "Key": "run/one/step-00000002/model"}
    s3.plain.put_object(**key, Body=b"weightz")
    with pytest.raises(ValueError, match="model of step 2 in s3://.* use step 1"):
        new("elsewhere").download()
    s3.plain.delete_object(**key)
    with pytest.raises(ValueError, match="model of step 2 in s3://.* use step 1"):
        new("elsewhere").download()
    assert sealed(tmp_path / "elsewhere") == []
    assert store.download() == tmp_path / "staging" / "step-00000002"
    s3.plain.put_object(**key, Body=b"weights")  # now the local copy: S3 has the right one
    (tmp_path / "staging" / "step-00000002" / "model").write_bytes(b"weightz")
    s3.seen.clear()
    assert (store.download() / "model").read_bytes() == b"weights"
    assert not [path for method, path in s3.seen if method == "GET" and path.endswith("other")]


def test_a_manifest_that_leads_elsewhere_is_passed_over(new, s3, tmp_path):
    files = {"../../mine": {"bytes": 1, "sha256": "0"}}
    manifest = {"step": 1, "metric": None, "files": files, "node": 0, "nodes": 1, "time": 0.0}
    key = {"Bucket": s3.bucket, "Key": "run/one/step-00000001/manifest-0.json"}
    for text in (json.dumps(manifest), "[]", "not JSON"):
        s3.plain.put_object(**key, Body=text.encode())
        with pytest.warns(UserWarning, match="manifest-0.json is damaged and passed over"):
            assert new().latest() is None


# ---- several nodes


def test_two_nodes_make_one_checkpoint(new, s3, tmp_path):
    stores = [new(f"node{i}", node=i, nodes=2) for i in range(2)]
    reader = new("reader")
    for i, store in enumerate(stores):
        module.LOCKS[os.getpid(), store.staging.resolve()] = open(os.devnull)
        write(store, 10, 2.0 if i == 0 else None, **{f"shard{i}": b"%d" % i, "config": b"same"})
        store.wait(20)
        if i == 0:
            assert store.latest() is None and reader.latest() is None and store.list() == []
            assert "latest.json" not in names(s3)
    assert pointer(s3) == {"step": 10, "name": "step-00000010"}
    for store in (*stores, reader):
        assert store.latest() == 10 and store.best() == 10
        path = store.download()
        assert {p.name: p.read_bytes() for p in path.iterdir() if "manifest" not in p.name} == {
            "shard0": b"0", "shard1": b"1", "config": b"same",
        }  # fmt: skip
    write(stores[1], 20, shard1=b"11")
    stores[1].wait(20)
    assert reader.latest() == 10 and pointer(s3)["step"] == 10
    write(stores[0], 20, shard0=b"00")
    stores[0].wait(20)
    assert reader.latest() == 20 and pointer(s3)["step"] == 20


def test_a_step_saved_again_by_fewer_nodes_replaces_the_old_one(new, s3):
    for i in range(2):
        store = new(f"node{i}", node=i, nodes=2)
        write(store, 1, **{f"shard{i}": b"old"})
        store.wait(20)
    store = new("alone")
    write(store, 1, model=b"new")
    store.wait(20)
    path = new("elsewhere").download()
    assert sorted(p.name for p in path.iterdir()) == ["manifest-0.json", "model"]


# ---- kills

CHILD = """
import sys; sys.path[:0] = [{folder!r}, {root!r}]
from store import CheckpointStore
store = CheckpointStore({url!r}, {staging!r})
for step in (1, 2):
    part = store.begin(step)
    (part / "model.bin").write_bytes(b"weights %d" % step)
    (part / "second.bin").write_bytes(b"second")
    if step == 2 and {how!r} == "write":
        print("writing", flush=True)
        sys.stdin.read()
    store.commit(step)
    if step == 1:
        store.wait()
print("committed", flush=True)
store.wait()
"""


@pytest.mark.parametrize("how", ["write", "upload", "write on a disk"])
def test_kill_9_leaves_the_newest_complete_one(how, new, s3, tmp_path):
    hold, held = threading.Event(), threading.Event()

    def rule(method, path):
        if method == "PUT" and "step-00000002/second.bin" in path:
            held.set()
            return hold

    s3.rule = rule
    local = how == "write on a disk"
    url = str(tmp_path / "staging") if local else f"s3://{s3.bucket}/run/one"
    here = Path(module.__file__).resolve().parent
    code = CHILD.format(
        folder=str(here), root=str(here.parent), url=url, staging=str(tmp_path / "staging"),
        how=how.split()[0],
    )  # fmt: skip
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", code], **pipes)
    try:
        line = child.stdout.readline().strip()
        if how == "upload":
            assert line == "committed" and held.wait(20)
        else:
            assert line == "writing"
            looker = CheckpointStore(url, tmp_path / "staging")
            assert (tmp_path / "staging" / ".step-00000002.part").is_dir()  # the living one's
            assert looker.latest() == 1
            with pytest.raises(ValueError, match="another process"):
                looker.begin(3)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdin.close(), child.stdout.close()
    if how == "upload":
        assert steps(new("elsewhere")) == [1] and pointer(s3)["step"] == 1
        assert "step-00000002/model.bin" in names(s3)
        assert new().latest() == 2  # sealed on its disk
        hold.set()
        s3.rule = lambda method, path: None
        store = new()
        store.wait(20)
        assert steps(new("third")) == [1, 2] and pointer(s3)["step"] == 2
    else:
        store = new(url=url)
        assert steps(store) == [1] and store.latest() == 1
        assert not list((tmp_path / "staging").glob(".step-*"))
        assert (store.download() / "model.bin").read_bytes() == b"weights 1"


class Kill(BaseException):
    """Ends a thread as a kill ends a process: nothing in the store catches it."""


class Mortal:
    """Counts what changes a disk or a bucket; the nth such call and all after it raise Kill."""

    def __init__(self, monkeypatch, client):
        self.left, self.client, self.dead = None, client, False
        for owner, name in [(os, "replace"), (os, "fsync"), (shutil, "rmtree")]:
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def __getattr__(self, name):
        function = getattr(self.client, name)
        changes = name in ("put_object", "upload_file", "delete_object", "head_object")
        return self.wrap(function) if changes else function

    def wrap(self, function):
        def call(*args, **options):
            if self.left is not None:
                self.left -= 1
                if self.left <= 0:
                    self.dead = True
                    raise Kill
            return function(*args, **options)

        return call


@pytest.mark.parametrize(
    "where", ["local", "local again", pytest.param("s3", marks=pytest.mark.slow), "s3 again"]
)
def test_killed_at_any_point_the_old_or_the_new_one_can_be_loaded(
    where, new, s3, tmp_path, monkeypatch
):
    """Each change to the disk or the bucket in turn is the last. "again" commits one step over and
    over: then what is on S3 alone may be incomplete for a while."""
    mortal = Mortal(monkeypatch, s3.plain)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    url = str(tmp_path / "staging") if where.startswith("local") else None
    options = {"url": url, "keep_last": 1, "client": mortal}
    store, last, survived = new(**options), 1, False
    write(store, 1, a=b"1", b=b"1")
    store.wait(20)
    for n in range(1, 100):
        step = 1 if where.endswith("again") else n + 1
        part = store.begin(step)
        for name in "ab":
            (part / name).write_text(str(n + 1))
        mortal.left = n
        store.commit(step)
        while not mortal.dead and store.sealing | store.todo | {store.busy} - {None}:
            time.sleep(0.001)
        if survived := not mortal.dead:
            break
        time.sleep(0.02)  # if one of its threads lives on, it dies now
        store.sealing, store.todo, store.busy = set(), set(), None
        mortal.left, mortal.dead = None, False
        if where == "s3":  # the disk is lost, too
            path = new(f"elsewhere{n}", **options).download()
            assert (path / "a").read_text() == (path / "b").read_text() in (str(last), str(n + 1))
        store = new(**options)
        path = store.download()
        assert (path / "a").read_text() == (path / "b").read_text() in (str(last), str(n + 1))
        last = int((path / "a").read_text())
        store.wait(20)
        for name in names(s3):  # what retention was killed before: else each round has more to do
            if name.startswith("step") and not name.startswith(path.name):
                s3.plain.delete_object(Bucket=s3.bucket, Key=f"run/one/{name}")
    mortal.left = None
    assert survived and n > 8 and steps(store) == [step]
    assert not list((tmp_path / "staging").glob(".step-*"))
