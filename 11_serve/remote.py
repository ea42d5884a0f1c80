"""Runs whose checkpoints are on S3: listed by their manifests, a model fetched when it is wanted.

What it teaches: to read a bucket that others write. Only the manifests of all nodes make a
checkpoint (05_scaling/store.py writes them last), so what is being uploaded is not seen. Listing
costs a request a thousand files: it happens when somebody looks, at most every 30 seconds and
behind their back, and a manifest is read once. Of a checkpoint of many gigabytes only the files of
the model are fetched, against their sha256, to a hidden name; then one rename makes them a model.
Names in a bucket are data, like all that comes from elsewhere: none may leave the directory.

Parent: none
New: everything

Read in this order: Remote.refresh, runs, fetch, _download.
"""

import contextlib
import importlib
import json
import os
import re
import shutil
import threading
import time
from hashlib import sha256
from pathlib import Path

from runs import load_json, parse

from common import atomic

KEY = re.compile(
    r"(?:([A-Za-z0-9_-][A-Za-z0-9_.-]{0,199})/)?step-(\d{8,12})/manifest-(\d{1,5})\.json"
)
PART = r"(?!\.)[A-Za-z0-9_.-]{1,200}"
WHY = {  # by HTTP status or by exception, as the message of an exception may hold anything
    400: "S3 rejects the request: expired credentials, or AWS_REGION is not the bucket's",
    403: "access denied: these credentials must be allowed to list and read there",
    404: "there is no such bucket: create it or correct the url",
    "NoCredentialsError": "no credentials: set AWS_PROFILE or AWS_ACCESS_KEY_ID and its secret",
    "EndpointConnectionError": "no connection: check the network and AWS_ENDPOINT_URL",
}


class Remote:
    """The runs below `url`, s3://bucket/prefix, which may be one itself. What is fetched goes to
    `cache_dir`. `client` is boto3's, else made with credentials as boto3 finds them."""

    every = 30  # seconds between two looks
    keep = 4  # models in the cache

    def __init__(self, url, cache_dir, client=None):
        s3 = re.fullmatch(r"s3://([\w.-]+)(?:/([^@?#]*))?", str(url))
        if not s3:
            raise ValueError("--store is s3://bucket/prefix, without credentials in it")
        self.bucket, prefix = s3[1], (s3[2] or "").strip("/")
        self.url, self.prefix = f"s3://{self.bucket}/{prefix}".rstrip("/"), prefix and prefix + "/"
        self.name = re.sub(r"[^\w.-]", "-", self.url.rpartition("/")[2]).lstrip(".") or "store"
        self.home, self.client = Path(cache_dir).resolve(), client
        self.found, self.error, self.looked, self.manifests = {}, None, -1e9, {}
        self.thread, self.starting, self.fetching = None, threading.Lock(), threading.Lock()
        self.watched = set()  # runs whose metrics somebody wants

    def look(self, wait):
        """Have it looked again where that was long ago; wait for it at most so many seconds."""
        with self.starting:
            idle = self.thread is None or not self.thread.is_alive()
            if idle and time.monotonic() - self.looked > self.every:
                self.thread = threading.Thread(target=self.refresh, daemon=True)
                self.thread.start()
        if wait and self.thread:
            self.thread.join(wait)

    def refresh(self):
        """List the complete checkpoints, {run: {step: {node: manifest}}}, and fetch the metrics of
        the runs that are watched."""
        try:
            found, manifests = {}, {}
            pages = self._client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for item in page.get("Contents", []):
                    name, tag = item["Key"][len(self.prefix) :], (item["Key"], item["ETag"])
                    if (match := KEY.fullmatch(name)) and item["Size"] < 1 << 22:
                        manifests[tag] = self.manifests.get(tag) or self._manifest(item["Key"])
                        steps = found.setdefault(match[1] or self.name, {})
                        prefix = self.prefix + (f"{match[1]}/" if match[1] else "")
                        nodes = steps.setdefault(int(match[2]), {})
                        nodes[int(match[3])] = manifests[tag] | {"prefix": prefix}
            self.manifests, self.error = manifests, None
            self.found = {
                run: complete for run, steps in found.items() if (complete := whole(steps))
            }
            for run in self.watched & self.found.keys():
                with self.fetching:
                    self._metrics(run)
        except Exception as error:  # botocore's have no common base
            self.error = f"{self.url}: {why(error)}"
        self.looked = time.monotonic()

    def runs(self, wait=0):
        """The runs as the contract has it, with their checkpoints; an error is one more line."""
        self.look(wait)
        rows = []
        for run, steps in self.found.items():
            entries = [
                dict(
                    step=step,
                    metric=min((m["metric"] for m in ms if m["metric"] is not None), default=None),
                    bytes=sum(e["bytes"] for m in ms for e in m["files"].values()),
                    time=max(m["time"] for m in ms),
                    where="s3",
                    model=f"s3:{run}@{step}" if model_files(ms) else None,
                )
                for step, ms in sorted(steps.items())
            ]
            last = entries[-1]
            row = dict(step=last["step"], updated=last["time"], error=None, checkpoints=entries)
            row |= dict(last={} if last["metric"] is None else {"val_loss": last["metric"]})
            rows.append(row | dict(name=run, has_model=any(e["model"] for e in entries)))
        if self.error:
            row = dict(name=self.name, step=None, updated=0, error=self.error, checkpoints=[])
            rows = [r for r in rows if r["name"] != self.name] + [
                row | dict(last={}, has_model=False)
            ]
        same = dict(stage="s3", where="s3", status="idle", steps=None, job=None)
        return [dict(id=f"s3/{row['name']}") | same | row for row in rows]

    def metrics(self, run, wait=0):
        """metrics.jsonl of the newest checkpoint, a file that is replaced with each; None yet."""
        if run in self.found and run not in self.watched:
            self.watched.add(run)
            self.looked = -1e9
        self.look(wait)
        if run in self.found and wait and run not in self.watched:  # it was the first look at all
            return self.metrics(run, wait)
        path = self.home / run / "metrics.jsonl"
        return path if run in self.found and path.exists() else None

    def fetch(self, run, step):
        """The local directory of a checkpoint's model. ValueError where there is none, it is
        damaged or S3 does not answer."""
        self.look(60)
        if not (manifests := self.found.get(run, {}).get(step)):
            raise ValueError(self.error or f"{self.url} has no complete checkpoint {run}@{step}")
        folder, files = self.home / run / f"step-{step:08d}", model_files(manifests)
        if not files:
            raise ValueError(f"checkpoint {run}@{step} holds no model/ to load")
        with self.fetching:
            if load_json(folder / "files.json") != files:
                shutil.rmtree(part := folder.with_name(f".{folder.name}"), ignore_errors=True)
                try:
                    for name, entry in files.items():
                        self._download(manifests[0]["prefix"], step, name, entry, part / name)
                    (part / "files.json").write_text(json.dumps(files))
                    shutil.rmtree(folder, ignore_errors=True)
                    os.replace(part, folder)
                except Exception as error:
                    raise ValueError(f"{run}@{step} of {self.url}: {why(error)}") from None
                finally:
                    shutil.rmtree(part, ignore_errors=True)
                cached = sorted(self.home.glob("*/step-*"), key=lambda path: path.stat().st_mtime)
                for old in cached[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        return folder / "model"

    def _metrics(self, run):
        step, manifests = max(self.found[run].items())
        for manifest in manifests:
            entry, path = manifest["files"].get("metrics.jsonl"), self.home / run / "metrics.jsonl"
            if entry and not (path.exists() and digest(path) == entry["sha256"]):
                self._download(manifest["prefix"], step, "metrics.jsonl", entry, path)

    def _download(self, prefix, step, name, entry, path):
        """One file, written to the end and checked before it has its name."""
        if not path.resolve().is_relative_to(self.home):
            raise ValueError(f"the file name {name!r} leads elsewhere")
        key = f"{prefix}step-{step:08d}/{name}"
        body = self._client().get_object(Bucket=self.bucket, Key=key)["Body"]
        hashed, size = sha256(), 0
        with atomic(path) as file:
            while block := body.read(1 << 20):
                hashed.update(block)
                if (size := size + len(block)) > entry["bytes"]:
                    break
                file.write(block)
            if size != entry["bytes"] or hashed.hexdigest() != entry["sha256"]:
                raise ValueError(f"{name} is damaged: it is not what its manifest says")

    def _client(self):
        if self.client is None:
            boto3, botocore = map(importlib.import_module, ("boto3", "botocore.config"))
            retries = {"mode": "standard", "total_max_attempts": 3}
            config = botocore.Config(connect_timeout=5, read_timeout=30, retries=retries)
            self.client = boto3.client("s3", config=config)
        return self.client

    def _manifest(self, key):
        data = parse(self.client.get_object(Bucket=self.bucket, Key=key)["Body"].read()) or {}
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
            files = {
                name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
                for name, entry in data["files"].items()
                # .metadata and the like are not for us; nor is what leads out of the directory
                if re.fullmatch(f"{PART}(/{PART}){{0,3}}", name)
            }
            metric = data["metric"] if data["metric"] is None else float(data["metric"])
            return dict(
                files=files, metric=metric, nodes=int(data["nodes"]), time=float(data["time"])
            )
        return {"nodes": 0}  # damaged: never complete


def whole(steps):
    """{step: manifests in order} of those with the manifests of all nodes."""
    counts = {
        step: {manifest["nodes"] for manifest in nodes.values()} for step, nodes in steps.items()
    }
    return {s: [n[i] for i in sorted(n)] for s, n in steps.items() if counts[s] == {len(n)}}


def model_files(manifests):
    files = {name: entry for m in manifests for name, entry in m["files"].items()}
    files = {name: entry for name, entry in files.items() if name.startswith("model/")}
    return files if {"model/config.json", "model/model.safetensors"} <= files.keys() else {}


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


def why(error):
    """One line on what went wrong, which never holds a secret."""
    answer = getattr(error, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    own = str(error) if type(error) is ValueError else type(error).__name__
    return WHY.get(status) or WHY.get(type(error).__name__) or own
