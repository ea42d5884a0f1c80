"""Checkpoints of a run that may last a week: in a local directory or under s3://bucket/prefix.

What it teaches: a checkpoint is many files and must appear as one thing. On a file system a rename
publishes: all is written and synced under a hidden name, then renamed. S3 has no rename, but each
object appears whole or not at all: so the files go first, then the manifest that lists them, which
publishes, and last the pointer latest.json, which would else name what is not there yet. A kill
leaves a hidden directory, or files without a manifest, or a pointer one step behind: none of these
passes for a checkpoint, as only manifests say what is complete. Deletion begins with them.

On disk step-00000100/, on S3 prefix/step-00000100/: the files, and manifest-<node>.json of each
node: {"step", "metric", "files": {name: {"bytes", "sha256"}}, "node", "nodes", "time"}. With those
of all nodes it is complete, so nodes without a shared file system need no barrier; file names must
differ between nodes. latest.json, {"step", "name"}, is for people and other tools.

Parent: none
New: CheckpointStore

Read in this order: begin, commit, _seal, _work, _publish, _tidy, wait; _remote, list, download.
"""

import contextlib
import fcntl
import importlib
import json
import math
import os
import re
import shutil
import threading
import time
import warnings
from hashlib import sha256
from pathlib import Path

from common import atomic

STEP, NAME = re.compile(r"step-(\d{8,})/(?:manifest-(\d+)\.json$)?"), "step-{:08d}".format
ATTEMPTS, DAY, LOCKS = 5, 86400, {}
BUSY = "in use by another process or read-only: stop that one, or use another directory"
WHY = {  # by HTTP status or by exception
    400: "S3 rejects the request: expired credentials, or AWS_REGION is not the bucket's",
    403: "access denied: these credentials must be allowed to list, read, write and delete there",
    404: "there is no such bucket: create it or correct the url",
    "NoCredentialsError": "no credentials: set AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret",
    "EndpointConnectionError": "no connection: check the network and AWS_ENDPOINT_URL",
}


class CheckpointStore:
    """Keeps the last `keep_last` and the `keep_best` of lowest metric under `url`. For S3, with
    endpoint, region and credentials as boto3 finds them, they are sealed in `staging`, a directory
    of this node, and uploaded in parts of `part_bytes` by `threads` threads. One process writes to
    a directory; others, best with writer=False, which leaves the place free, may look. ValueError
    if url is malformed or the bucket cannot be used."""

    pause = 1.0  # seconds before a second attempt; doubled before each further one

    def __init__(
        self, url, staging=None, keep_last=3, keep_best=1, node=0, nodes=1,
        part_bytes=16 * 2**20, threads=4, client=None, writer=True,
    ):  # fmt: skip
        self.url = re.sub(r"//[^/]*@", "//", str(url)).rstrip("/")  # printed, so without a password
        s3 = re.fullmatch(r"s3://([\w.-]+)(?:/(.*))?", str(url))
        if not s3 and re.match(r"\w+:/", str(url)):
            raise ValueError(f"{self.url} is neither a directory nor s3://bucket/prefix")
        if keep_last < 1 or keep_best < 0 or not 0 <= node < nodes or (nodes > 1 and not s3):
            raise ValueError(f"{keep_last=}, {keep_best=}, {node=}, {nodes=} do not fit {self.url}")
        if s3 and staging is None:
            raise ValueError(f"{self.url} needs staging, a local directory")
        self.staging, self.node, self.nodes = Path(staging if s3 else url), node, nodes
        self.keep_last, self.keep_best, self.client, self.began = keep_last, keep_best, None, False
        self.found, self.keys, self.cache = {}, {}, {}  # S3 as last listed, manifests by ETag
        self.sealing, self.todo, self.failed, self.busy = set(), set(), {}, None
        self.changed = threading.Condition()  # guards the line above
        if s3:
            self.bucket, self.prefix = s3[1], f"{(s3[2] or '').strip('/')}/".lstrip("/")
            self._connect(client, part_bytes, threads)
        self.staging.mkdir(parents=True, exist_ok=True)
        self.mine = writer and self._lock()
        done, local = self._whole(), self._local()
        newest = max(self._complete(self.found if s3 else local), default=-1)
        if self.mine and s3:  # the newest, as it may lack just its pointer, and what is newer
            self.todo = {s for s, m in local.items() if s > newest and node in m}
            self.todo |= {newest} & done.keys()
            threading.Thread(target=self._work, daemon=True).start()
        elif self.mine and done:
            self._point(newest)

    def _connect(self, client, part_bytes, threads):
        names = "boto3", "botocore.config", "boto3.s3.transfer"  # half a second, only for S3
        boto3, botocore, transfer = map(importlib.import_module, names)
        parts = {"multipart_threshold": part_bytes, "multipart_chunksize": part_bytes}
        parts |= {"max_concurrency": threads, "preferred_transfer_client": "classic"}
        self.transfer = transfer.TransferConfig(**parts)
        options = {"connect_timeout": 5, "read_timeout": 60, "max_pool_connections": threads + 4}
        options |= {"retries": {"mode": "standard", "total_max_attempts": 5}}  # about 8 seconds
        try:
            self.client = client or boto3.client("s3", config=botocore.Config(**options))
            self.client.head_bucket(Bucket=self.bucket)
        except Exception as error:  # botocore's have no common base
            raise ValueError(f"{self.url}: {why(error)}") from None

    def _lock(self):
        """True if no other process writes to staging. The kernel ends the lock with the process,
        where a pid in a file may be another's by then; so what its first holder finds under hidden
        names is a dead process's and can go."""
        if (key := (os.getpid(), self.staging.resolve())) in LOCKS:
            return True
        try:
            file = open(self.staging / ".lock", "w")
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or the directory is read-only
            return False
        LOCKS[key] = file  # stays open, as closing it unlocks
        for old in self.staging.glob(".step-*.old"):  # _seal was between its two renames
            if not (new := self.staging / old.stem[1:]).exists():
                os.replace(old, new)
        for path in self.staging.glob(".step-*"):
            if path.suffix != ".download":  # that one can go on
                shutil.rmtree(path)
        return True

    # ---- writing

    def begin(self, step):
        """A new, empty directory for the files of the checkpoint. ValueError if another process
        writes to staging."""
        if not self.mine:
            raise ValueError(f"{self.staging} is {BUSY}")
        with self.changed:
            self.changed.wait_for(lambda: step not in self.sealing)
        self.began, part = True, self.staging / f".{NAME(step)}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        return part

    def commit(self, step, metric=None):
        """Make what was written since begin the checkpoint of `step`. Returns at once: it is safe
        after wait(). Of those that wait for an upload only the newest and the best stay, except
        with several nodes, which might drop different ones. ValueError if there was no begin or a
        file has a manifest's name."""
        part = self.staging / f".{NAME(step)}.part"
        if not part.exists() or any(part.glob("manifest-*.json")):
            raise ValueError(f"{part} must be there, by begin({step}), without manifest-*.json")
        metric = None if metric is None or not math.isfinite(metric) else float(metric)
        with self.changed:
            self.sealing.add(step)
        # In a thread of its own, as an upload may take an hour and what is sealed survives a kill.
        threading.Thread(target=self._seal, args=(step, metric, part), daemon=True).start()

    def settle(self):
        """Block until each commit is whole on the local disk, uploaded or not."""
        with self.changed:
            self.changed.wait_for(lambda: not self.sealing)

    def _seal(self, step, metric, part):
        final, old = self.staging / NAME(step), part.with_suffix(".old")
        try:
            names = [p.relative_to(part).as_posix() for p in sorted(part.rglob("*")) if p.is_file()]
            manifest = {"step": step, "metric": metric, "node": self.node, "nodes": self.nodes}
            manifest |= {"time": time.time(), "files": {n: digest(part / n) for n in names}}
            with atomic(part / f"manifest-{self.node}.json", "w") as file:
                json.dump(manifest, file, indent=1)
            for path in [*part.rglob("*"), part]:
                sync(path)
            with self.changed:
                self.changed.wait_for(lambda: self.busy != step)
            if final.exists():  # saved before; _lock puts it back after a kill here
                os.replace(final, old)
            os.replace(part, final)
            sync(self.staging)
            shutil.rmtree(old, ignore_errors=True)
            if not self.client:
                with self.changed:  # another step may be sealed at this moment
                    self._point(max(self._local()))
            for path in self.staging.glob(".step-*.download"):  # a run that saves has resumed
                shutil.rmtree(path)
            self._tidy(step)
        except Exception as error:
            self._fail(step, f"checkpoint {part} is not saved: {error}")
        with self.changed:
            self.sealing.discard(step)
            self.changed.notify_all()

    def _fail(self, step, text):
        with self.changed:
            self.failed[step] = text
        warnings.warn(text, stacklevel=2)

    def _work(self):
        with contextlib.suppress(Exception):  # some servers cannot list them
            self._abort_uploads()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.todo)
                step = self.busy = min(self.todo)
                self.todo.remove(step)
            try:
                self._publish(step)
                self._tidy()
            except Exception as error:
                here = f"{self.staging / NAME(step)} stays and is tried again with the next commit"
                self._fail(step, f"checkpoint {step} is not in {self.url}: {error}; {here}")
            with self.changed:
                self.busy = None
                self.changed.notify_all()

    def _abort_uploads(self):
        """End uploads that were killed: unseen, yet paid for. A day old: others may be going on."""
        pages = self.client.get_paginator("list_multipart_uploads")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + "step-"):
            for upload in page.get("Uploads", []):
                if upload["Initiated"].timestamp() < time.time() - DAY:
                    ids = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    self.client.abort_multipart_upload(Bucket=self.bucket, **ids)

    def _publish(self, step):
        """The files, the manifest, the pointer if that completes it; then what is old goes."""
        own = self._local().get(step, {}).get(self.node)
        there = self._retry(self._remote).get(step, {})
        if own and own != there.get(self.node):
            for node in there:  # manifests of an earlier commit of this step
                if node == self.node or node >= self.nodes:
                    self._retry(self._remove, f"{NAME(step)}/manifest-{node}.json")
            for name, entry in own["files"].items():
                self._retry(self._send, step, name, entry)
            self._retry(self._put, f"{NAME(step)}/manifest-{self.node}.json", own)
        done = self._complete(self._retry(self._remote))
        # No two nodes are here with different steps: each ends one before it uploads the next.
        if done and max(done) > self._retry(self._get, "latest.json").get("step", -1):
            self._point(max(done))
        stay = self._keep(done) if self.began else self.keys  # who only looks deletes nothing
        for old in sorted(s for s in self.keys if s not in stay and s < max(done, default=0)):
            for name in sorted(self.keys[old], key=lambda n: not STEP.match(n)[2]):
                self._retry(self._remove, name)  # the manifests first

    def _send(self, step, name, entry):
        path, key = self.staging / NAME(step) / name, f"{self.prefix}{NAME(step)}/{name}"
        extra = {"ChecksumAlgorithm": "SHA256"}  # S3 checks each part
        self.client.upload_file(str(path), self.bucket, key, extra, Config=self.transfer)
        size = self.client.head_object(Bucket=self.bucket, Key=key)["ContentLength"]
        if size != entry["bytes"]:
            raise ValueError(f"{key} has {size} bytes after its upload, not {entry['bytes']}")

    def _point(self, step):
        if self.client:
            return self._retry(self._put, "latest.json", {"step": step, "name": NAME(step)})
        with atomic(self.staging / "latest.json", "w") as file:
            json.dump({"step": step, "name": NAME(step)}, file)

    def _tidy(self, sealed=None):
        """Delete local copies: what is uploaded but for the newest, what is not to be kept, and if
        one was `sealed` what waits and is not the best. That and what failed is to be uploaded."""
        local, drop = self._local(), []
        every = self.found | local
        with self.changed:
            for step in local.keys() - {max(local, default=None), self.busy} - self.sealing:
                waits = sealed is not None and step in self.todo and self.nodes == 1
                gone = self.node in self.found.get(step, {}) or step not in self._keep(every)
                if waits and step not in ranked(every)[:1] or gone and step not in self.todo:
                    drop.append(step)
            self.todo -= set(drop)
            self.failed = {s: text for s, text in self.failed.items() if s not in drop}
            if sealed is not None:
                self.todo |= {sealed} | self.failed.keys() if self.client else set()
                self.failed = {}
        for step in drop:
            self._delete(step)

    def _keep(self, found):
        return {*sorted(found)[-self.keep_last :], *ranked(found)[: self.keep_best]}

    def _delete(self, step):
        gone = self.staging / f".{NAME(step)}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.staging / NAME(step), gone)
        shutil.rmtree(gone, ignore_errors=True)

    def wait(self, timeout=None):
        """Block until all commits are where they belong. ValueError, which names the local copy, if
        one could not be uploaded or is not after `timeout` seconds."""

        def pending():
            return self.sealing | self.todo | {self.busy} - {None}

        with self.changed:
            if not self.changed.wait_for(lambda: not pending(), timeout):
                paths = ", ".join(str(self.staging / NAME(step)) for step in sorted(pending()))
                raise ValueError(f"not in {self.url} after {timeout} seconds: {paths}")
            if self.failed:
                raise ValueError("; ".join(self.failed.values()))

    # ---- reading, and requests to S3

    def _retry(self, action, *args):
        """An action's result, tried again whatever failed: credentials, too, may be renewed."""
        for attempt in range(ATTEMPTS):
            try:
                return action(*args)
            except Exception as error:
                if attempt == ATTEMPTS - 1:
                    raise ValueError(why(error)) from None
                time.sleep(self.pause * 2**attempt)

    def _remote(self):
        """{step: {node: manifest}} on S3: one listing, and each manifest read once."""
        found, keys = {}, {}
        pages = self.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + "step-"):
            if "IsTruncated" not in page:  # cut behind its headers: botocore finds that all right
                raise ConnectionError("the listing broke off")
            for item in page.get("Contents", []):
                name, tag = item["Key"][len(self.prefix) :], (item["Key"], item["ETag"])
                if match := STEP.match(name):
                    keys.setdefault(int(match[1]), {})[name] = item["Size"]
                    if match[2] and (manifest := self.cache.get(tag) or self._get(name)):
                        self.cache[tag] = manifest
                        found.setdefault(int(match[1]), {})[int(match[2])] = manifest
        self.found, self.keys = found, keys
        return found

    def _get(self, name):
        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.prefix + name)
            return parse(answer["Body"].read(), f"{self.url}/{name}")
        except self.client.exceptions.NoSuchKey:
            return {}

    def _put(self, name, data):
        what = {"Key": self.prefix + name, "Body": json.dumps(data, indent=1).encode()}
        self.client.put_object(Bucket=self.bucket, ChecksumAlgorithm="SHA256", **what)

    def _remove(self, name):
        self.client.delete_object(Bucket=self.bucket, Key=self.prefix + name)

    def _local(self):
        found = {}
        for path in self.staging.glob("step-*/manifest-*.json"):
            match = STEP.match(path.relative_to(self.staging).as_posix())
            with contextlib.suppress(FileNotFoundError):  # deleted since
                if match and match[2] and (manifest := parse(path.read_bytes(), path)):
                    found.setdefault(int(match[1]), {})[int(match[2])] = manifest
        return found

    def _complete(self, found):
        """Those with the manifests of all nodes, which must agree on how many these are."""
        counts = {step: {m["nodes"] for m in ms.values()} for step, ms in found.items()}
        return {s: ms for s, ms in found.items() if counts[s] == {len(ms)} and max(ms) < len(ms)}

    def _whole(self):
        """The complete ones. With several nodes only what all can read counts, lest they resume
        from different steps."""
        local = self._complete(self._local())
        remote = self._complete(self._retry(self._remote)) if self.client else {}
        return remote | local if self.nodes == 1 else remote

    def list(self):
        """A dict(step, metric, bytes, time, name, where) of each complete checkpoint, ascending;
        `where` is the local copy if there is one. ValueError if S3 does not answer."""
        entries, local = [], self._complete(self._local())
        for step, ms in sorted(self._whole().items()):
            size = sum(entry["bytes"] for _, entry in joined(ms))
            where = str(self.staging if step in local else self.url) + f"/{NAME(step)}"
            when = max(m["time"] for m in ms.values())
            entry = dict(step=step, metric=score(ms), bytes=size, time=when)
            entries.append(entry | dict(name=NAME(step), where=where))
        return entries

    def latest(self):
        """The newest complete step, sealed or uploaded, or None; the pointer is not asked."""
        return max(self._whole(), default=None)

    def best(self):
        """The complete step of lowest metric, or None if none has a metric."""
        return next(iter(ranked(self._whole())), None)

    def download(self, step=None):
        """A local directory with the files of a checkpoint, by default the newest, checked against
        their sha256; what a broken attempt has fetched stays. ValueError, which names the file and
        an older step, if it is damaged, and if there is no such checkpoint."""
        whole = self._whole()
        if not whole or step not in {None, *whole}:
            raise ValueError(f"{self.url} lacks a complete checkpoint {step or ''}: {[*whole]}")
        step = max(whole) if step is None else step
        older = max((s for s in whole if s < step), default=None)
        older = "there is none before it" if older is None else f"use step {older}"
        text = "{} of step {} in {} is damaged or missing: {}"
        folder, remote = self.staging / NAME(step), self._complete(self.found).get(step)
        bad = next((n for n, e in joined(whole[step]) if digest(folder / n) != e), None)
        if bad is None:
            return folder
        if not remote:
            raise ValueError(text.format(bad, step, folder, older))
        if not self.mine and not self._lock():
            raise ValueError(f"{self.staging} is {BUSY}")
        if (part := self.staging / f".{NAME(step)}.download").exists():
            self._delete(step)
        elif folder.exists():
            os.replace(folder, part)  # what is right in it need not be fetched
        for name, entry in joined(remote):
            if digest(path := part / name) != entry:
                path.parent.mkdir(parents=True, exist_ok=True)
                args = self.bucket, f"{self.prefix}{NAME(step)}/{name}", str(path), None, None
                if there := self.keys.get(step, {}).get(f"{NAME(step)}/{name}") == entry["bytes"]:
                    self._retry(self.client.download_file, *args, self.transfer)
                if not there or digest(path) != entry:
                    raise ValueError(text.format(name, step, self.url, older))
        for node, manifest in remote.items():
            (part / f"manifest-{node}.json").write_text(json.dumps(manifest, indent=1))
        os.replace(part, folder)
        return folder


def why(error):
    """One line, without secrets, on what went wrong with S3."""
    answer = getattr(error, "response", None) or {}  # None where the connection broke
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    text = re.sub(r"//[^/\s]*@", "//", " ".join(f"{type(error).__name__}: {error}".split()))
    return WHY.get(status) or WHY.get(type(error).__name__) or text


def parse(text, where):
    """A manifest or pointer; {}, with a warning, where it is none or names files elsewhere."""
    with contextlib.suppress(ValueError, AttributeError):
        data = json.loads(text)
        if not any(n.startswith("/") or ".." in n.split("/") for n in data.get("files", {})):
            return data
    warnings.warn(f"{where} is damaged and passed over", stacklevel=2)
    return {}


def digest(path):
    """{"bytes", "sha256"} of a file; None if there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        hashed = sha256()
        while block := file.read(1 << 20):
            hashed.update(block)
        return {"bytes": file.tell(), "sha256": hashed.hexdigest()}


def sync(path):
    """Make a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def joined(manifests):
    """(name, entry) of the files of all nodes."""
    return [pair for manifest in manifests.values() for pair in manifest["files"].items()]


def score(manifests):
    """The metric, of the node that gave one, or None."""
    return min((m["metric"] for m in manifests.values() if m["metric"] is not None), default=None)


def ranked(found):
    """The steps that have a metric, the lowest first; of equals the newest."""
    scored = [(score(ms), -step) for step, ms in found.items() if score(ms) is not None]
    return [-step for _, step in sorted(scored)]
