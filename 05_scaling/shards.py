"""Text to token shards, in parallel and resumable; and back to memory maps, checked.

What it teaches: 10 GB take a tokenizer in Python hours, so the text is cut into jobs for all cores
and what is done must outlive a kill. Hence shards, files of some number of tokens: each is written
whole or not at all and then noted, and its crc32 tells if it has changed since.

Where to cut: the ids must be those of the whole text. <|endoftext|> cuts it in any case. Behind a
newline is not always safe: GPT-2's `\\s+(?!\\S)|\\s+` makes two tokens of "\\n\\n" in "a\\n\\nb",
but one where the text ends there; o200k's joins "/" to a newline before it. Between "x\\n" and "y"
is safe if x is no space and y a letter or digit, between "x" and " y" if both are letters: so cut
the patterns of GPT-2, GPT-4, o200k, Llama 3, Qwen2 and SmolLM2.

Parent: none
New: tokenize, open_shards
"""

import concurrent.futures
import glob
import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import zlib
from collections import deque
from itertools import chain, islice
from pathlib import Path

import numpy as np
import regex

from common import EOT, OUT, atomic, corpus, documents, download, progress

JOB = 1 << 20  # characters: a second of a tokenizer's work
HELD_OUT = 10**7  # bytes, as common.corpus holds out at most
# Searched from the end, (?r): a document's end if there is one, else a line's, else a word's.
CUTS = rf"(?<={regex.escape(EOT)})", r"(?<=\S\n)(?=[\p{L}\p{N}])", r"(?<=\p{L})(?= \p{L})"
CUTS = [regex.compile("(?r)" + cut) for cut in CUTS]


def read(path):
    """The texts of common.documents. ValueError with the file and the line or row of a bad one."""
    n, unit = 0, "row" if path.suffix == ".parquet" else "line"
    try:
        for text in documents(path):
            text.encode()  # raises for half of a surrogate pair, which JSON can hold
            n += 1
            yield text
    except (ValueError, KeyError, TypeError, EOFError, OSError, zlib.error) as error:
        late = isinstance(error, (UnicodeDecodeError, EOFError, OSError, zlib.error))  # in a block
        why = f"{type(error).__name__} {' '.join(str(error).split())}"
        where = f"{path}, {unit} {n + 1}{' or later' * late}"
        raise ValueError(f"{where}: not UTF-8 with a string 'text' ({why})") from None


def split_off(paths, split):
    """The documents of a split: every 100th is in val until that has HELD_OUT bytes."""
    held = 0
    for n, text in enumerate(chain.from_iterable(map(read, paths)), 1):
        chosen = n % 100 == 0 and held < HELD_OUT
        if chosen == (split == "val"):
            yield text
        held += chosen and len(text.encode())
        if split == "val" and held >= HELD_OUT:
            return


def jobs(texts, cuts):
    """The joined texts, cut into jobs of at most JOB characters, more where there is no cut."""
    text, size = "", JOB
    for piece in texts:
        text += piece
        while len(text) > size:
            end = next((m.end() for cut in cuts if (m := cut.search(text, 1, size))), 0)
            yield from [text[:end]] * bool(end)
            text, size = text[end:], JOB if end else 2 * size
    yield from [text] * bool(text)


def start(tokenizer, dtype, child=True):
    """What encode needs. In a child, Ctrl-C is for the parent, and a parent's death ends it."""
    global at_work
    at_work = tokenizer, dtype
    if child:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        parent = multiprocessing.parent_process()
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(text):
    """(bytes of the text, its ids as bytes)."""
    tokenizer, dtype = at_work
    ids = np.array(tokenizer.encode(text), dtype).tobytes()
    if not tokenizer.patterns:  # whole texts would fill the cache of merge
        type(tokenizer).merge.cache_clear()
    return len(text.encode()), ids


def encode_all(texts, tokenizer, dtype, workers):
    """encode of each text, in order; at most 2 * workers are under way."""
    start(tokenizer, dtype, child=False)
    if workers == 1:
        return (yield from map(encode, texts))
    how = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    pool = [workers, multiprocessing.get_context(how), start, (tokenizer, dtype)]
    with concurrent.futures.ProcessPoolExecutor(*pool) as pool:
        submitted = (pool.submit(encode, text) for text in texts)
        queue = deque(islice(submitted, 2 * workers))
        try:
            while queue:
                yield queue.popleft().result()
                queue.extend(islice(submitted, 1))
        except concurrent.futures.BrokenExecutor:
            raise ValueError(f"one of {workers} workers was killed: run again with fewer") from None


def tokenize(source, tokenizer, home=None, shard_tokens=2**26, workers=None, sha256=None):
    """Make the directory `home` with train-00000.bin ..., val-00000.bin ... and, last, meta.json;
    returns its path. Killed, it goes on after the last shard; finished, it returns at once.

    source: plays, a file, directory, glob or URL (with its sha256) of .txt .md .jsonl .parquet,
      gzipped or not. Where all are .jsonl or .parquet, every 100th document is held out, up to
      10 MB; the plays, other files and fewer than 100 documents are split by common.corpus
    tokenizer: a common.Tokenizer. The ids, little-endian uint16 or above 65,536 ids uint32, are
      those of a split's whole text; <|endoftext|> stays text where it is not in the vocabulary
    home: by default out/tokens/<corpus>-<tokenizer>-shards
    shard_tokens: a shard ends with the job that brings it to so many
    workers: processes, by default one a core; the result is the same for any number
    Raises ValueError: bad text, with file and line; a `home` that has the tokens of other text.
    """
    workers = os.cpu_count() if workers is None else workers
    if min(workers, shard_tokens) < 1:
        raise ValueError(f"workers ({workers}) and shard_tokens ({shard_tokens}) must be positive")
    # Found and named as common.corpus does it: other files, or changed ones, make another name.
    paths = [download(source, sha256)] if "://" in source else sorted(map(Path, glob.glob(source)))
    if paths and paths[0].is_dir():
        names = r"\.(txt|md|jsonl|parquet)(\.gz)?$"
        paths = sorted(p for p in paths[0].rglob("*") if regex.search(names, p.name))
    files = repr([source, [(p, p.stat().st_size, p.stat().st_mtime) for p in paths]]).encode()
    name = f"{Path(source).stem}-{hashlib.sha256(files).hexdigest()[:8]}"
    home = Path(home or OUT / "tokens" / f"{name}-{tokenizer.hash[:8]}-shards")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    key = dict(dtype=dtype.name, vocab_size=tokenizer.vocab_size, source=source, corpus=name)
    key |= dict(tokenizer=tokenizer.hash, eot=tokenizer.eot, shard_tokens=shard_tokens, job=JOB)
    notes = home / "meta.json", home / "progress.json"
    meta, state = (json.loads(p.read_text()) if p.exists() else {} for p in notes)
    if key.items() <= meta.items():
        return home
    if meta and (meta.get("corpus"), meta["tokenizer"]) != (name, tokenizer.hash):
        raise ValueError(f"{home} has the tokens of {meta['source']}: remove it or name another")
    if not key.items() <= state.items():
        for old in (*notes, *home.glob("*-[0-9]*.bin")):
            old.unlink(missing_ok=True)
        state = key | dict(bytes=dict(train=0, val=0), jobs=dict(train=0, val=0), shards=[])
    alone = all(regex.search(r"\.(jsonl(\.gz)?|parquet)$", p.name) for p in paths)
    alone = alone and next(split_off(paths, "val"), None) is not None
    try:
        text = None if alone else corpus(source, sha256)
    except (OSError, zlib.error):  # of which file?
        deque(chain.from_iterable(map(read, paths)), 0)
        raise
    for split in ("val", "train"):
        path = None if alone else text / f"{split}.txt"
        texts = split_off(paths, split) if alone else open(path, encoding="utf-8", newline="")
        total = None if alone else path.stat().st_size
        bar = progress(total=total, desc=f"tokenizing {split}", unit="B", unit_scale=True)
        pieces, shard, size = jobs(texts, CUTS[tokenizer.eot is None :]), bytearray(), 0
        for done in islice(pieces, count := state["jobs"][split]):
            bar.update(len(done.encode()))
        for n, ids in chain(encode_all(pieces, tokenizer, dtype, workers), [(0, b"")]):
            shard += ids
            size, count = size + n, count + bool(n)
            bar.update(n)
            if len(shard) >= shard_tokens * dtype.itemsize or shard and not n:
                name = f"{split}-{sum(s['split'] == split for s in state['shards']):05}.bin"
                with atomic(home / name) as file:
                    file.write(shard)
                note = dict(name=name, split=split, tokens=len(shard) // dtype.itemsize)
                state["shards"].append(note | dict(bytes=size, crc32=zlib.crc32(shard)))
                state["bytes"][split] += size
                state["jobs"][split], shard, size = count, bytearray(), 0
                with atomic(home / "progress.json", "w") as file:
                    json.dump(state, file)
        bar.close()
        texts.close()
    with atomic(home / "meta.json", "w") as file:
        json.dump(state, file, indent=1)
    for old in (notes[1], *home.glob(".*.bin.*"), *home.glob(".*.json.*")):  # what a kill left
        old.unlink(missing_ok=True)
    return home


def describe(home):
    """(meta.json, dtype), checked; 03's and 04's train.bin and val.bin count as a shard each."""
    try:
        meta, known = json.loads((home / "meta.json").read_text()), dict(tokens=None, crc32=None)
        old = [known | dict(name=f"{s}.bin", split=s, bytes=n) for s, n in meta["bytes"].items()]
        for shard in meta.setdefault("shards", old):
            whole = shard.keys() >= {"split", "tokens", "bytes", "crc32"}
            if not whole or not regex.fullmatch(
                r"(train|val)(-\d+)?\.bin", shard["name"]
            ):  # no ../
                raise ValueError(f"an unknown form of shard, {shard}")
        _ = meta["vocab_size"], meta["tokenizer"]
        return meta, np.dtype({"uint16": "<u2", "uint32": "<u4"}[meta["dtype"]])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__} {error}"
        raise ValueError(
            f"{home} has no tokens, or unfinished ones: make it again ({why})"
        ) from None


def fetch(url):
    """The local copy of s3://bucket/prefix: what is missing or of another size is fetched."""
    boto3, errors = importlib.import_module("boto3"), importlib.import_module("botocore.exceptions")
    bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
    digest = hashlib.sha256(f"{bucket}/{prefix}".encode()).hexdigest()[:8]
    home = OUT / "tokens" / f"{Path(prefix or bucket).name}-{digest}"

    def get(name):
        key, path = dict(Bucket=bucket, Key=f"{prefix}/{name}".strip("/")), home / name
        size = client.head_object(**key)["ContentLength"] if path.exists() else None
        if size is None or path.stat().st_size != size or name == "meta.json":
            with atomic(path) as file:
                shutil.copyfileobj(client.get_object(**key)["Body"], file)

    try:
        client = boto3.Session().client("s3")
        get("meta.json")
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            deque(pool.map(get, [shard["name"] for shard in describe(home)[0]["shards"]]), 0)
    except (errors.BotoCoreError, errors.ClientError) as error:
        raise ValueError(f"{url} cannot be fetched: {error}") from None
    return home


def fault(path, shard, dtype, vocab_size):
    """What is wrong with the file of a shard, or None. Reads all of it, 16 MB at a time."""
    if not path.exists():
        return "is missing"
    size, crc, top = path.stat().st_size, 0, 0
    if shard["tokens"] is None:
        shard["tokens"] = size // dtype.itemsize
    if size != (want := shard["tokens"] * dtype.itemsize) or not size:
        return f"has {size:,} bytes, not {want:,}"
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            crc, top = zlib.crc32(block, crc), max(top, int(np.frombuffer(block, dtype).max()))
    if shard["crc32"] not in (None, crc):
        return f"has the crc32 {crc}, not {shard['crc32']}"
    return f"has the id {top:,} and the vocabulary {vocab_size:,}" if top >= vocab_size else None


def open_shards(home, tokenizer=None, skip_corrupt=False):
    """(dict(train=[memory maps], val=[memory maps]), meta) of a directory of `tokenize`, of 03's or
    04's tokens, or of s3://bucket/prefix, which is copied to out/tokens.

    Every file is read to be checked. One that is missing, of another size or crc32, or has an id
    beyond the vocabulary raises ValueError or, with skip_corrupt, is left out of the maps and of
    meta, and counted on a line. So does a vocabulary or hash other than the tokenizer's."""
    remote = str(home).startswith("s3://")
    home = fetch(home) if remote else Path(home)
    meta, dtype = describe(home)
    theirs = meta["vocab_size"], meta["tokenizer"]
    if tokenizer and theirs != (tokenizer.vocab_size, tokenizer.hash):
        raise ValueError(
            f"{home} was not made with this tokenizer (vocabulary {theirs[0]}, hash {theirs[1]}; "
            f"it has {tokenizer.vocab_size}, {tokenizer.hash}): give the right one with --tokenizer"
        )
    again = "remove it, it is fetched again" if remote else f"remove {home} and make it again"
    kept, lost = [], []
    for shard in meta["shards"]:
        wrong = fault(home / shard["name"], shard, dtype, theirs[0])
        if wrong and not skip_corrupt:
            raise ValueError(f"{home / shard['name']} {wrong}: {again}, or skip it (skip_corrupt)")
        (lost if wrong else kept).append(shard)
    if lost:
        tokens = sum(shard["tokens"] or 0 for shard in lost)
        print(f"{home}: skipped {len(lost)} of {len(meta['shards'])} shards, {tokens:,} tokens")
    maps = {"train": [], "val": []}
    for shard in kept:
        maps[shard["split"]].append(np.memmap(home / shard["name"], dtype, "r"))
    if not maps["train"]:
        raise ValueError(f"{home} has no train shard left: {again}")
    sizes = {s: sum(shard["bytes"] for shard in kept if shard["split"] == s) for s in maps}
    return maps, meta | {"shards": kept, "bytes": sizes}
