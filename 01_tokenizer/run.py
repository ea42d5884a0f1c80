"""Byte-level BPE: train a tokenizer, encode a corpus with it, look at it. README.md says more."""

import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the common/ beside this folder

import bpe

from common import EOT, OUT, Run, atomic, build, corpus, main

HERE = Path(__file__).resolve().parent
PATTERNS = {"gpt2": bpe.GPT2_PATTERN, "gpt4": bpe.GPT4_PATTERN, "o200k": bpe.O200K_PATTERN}
LATEST = OUT / "01_tokenizer" / "latest"
SAMPLE = "ROMEO:\nBut, soft! what light through window breaks?\n    It is 3.14159, naïve 世界 😀  "


@dataclass
class TrainOptions:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    sha256: str | None = None  # checksum of --data where that is a URL
    vocab_size: int | None = None  # tokens; None: 2048, 16384 from 20 MB, 50257 from 500 MB of text
    pattern: str = "gpt2"  # how text is cut before merging: gpt2, gpt4 or o200k
    processes: int | None = None  # that count words; None: one per core and 2 MB
    run: str = "run"  # first part of the name of the run's directory
    fresh: bool = False  # begin again even if this run is there
    record: bool = False  # append the result to results.jsonl


@dataclass
class EncodeOptions:
    data: str = "plays"  # text: plays, a file, directory, glob or URL (.txt .md .jsonl .parquet)
    sha256: str | None = None  # checksum of --data where that is a URL
    tokenizer: str = str(LATEST)  # directory with tokenizer.json
    processes: int | None = None  # that encode; None: one per core and 2 MB


@dataclass
class InspectOptions:
    text: str = SAMPLE  # the text to show token by token
    tokenizer: str = str(LATEST)  # directory with tokenizer.json
    data: str = "plays"  # its held-out part measures compression
    plot: bool = True  # draw compression.png: bytes per token against vocabulary size


def default_vocabulary(path, pattern):
    """More for a longer text, and for a short one no more than it can give."""
    size = path.stat().st_size
    if size > 2e6:
        return 2048 if size < 20e6 else 16384 if size < 500e6 else 50257
    counts = bpe.count_pretokens(path, [EOT], 1, pattern)
    return 257 + len(bpe.merge_words(counts, 2048 - 257))


def train(given):
    """train a tokenizer and measure it on held-out text"""
    options = build(TrainOptions, given)
    if options.pattern not in PATTERNS:
        raise ValueError(f"--pattern {options.pattern} is none of {', '.join(PATTERNS)}")
    text = corpus(options.data, options.sha256)
    pattern, source = PATTERNS[options.pattern], text / "train.txt"
    vocab_size = options.vocab_size
    if vocab_size is None:
        vocab_size = default_vocabulary(source, pattern)
    plan = {"data": options.data, "vocab_size": vocab_size, "pattern": options.pattern}
    before = LATEST.resolve()
    run = Run(bpe.__file__, plan | {"corpus": text.name}, options.run, options.fresh)
    if run.result and (run.dir / "tokenizer.json").exists():
        print(f"{run.dir} is finished: {summary(run.result)}")
        return print("train another with --vocab_size or --pattern, or begin again with --fresh")
    size = source.stat().st_size
    print(f"text: {text.name}, {size:,} bytes to learn from; device: CPU, numpy and plain Python")
    print(f"vocabulary: {vocab_size:,} tokens, in about {max(1, size // 3_000_000)} s")
    print(f"run: {run.dir}", flush=True)
    began = time.perf_counter()
    try:
        vocab, merges = bpe.train_bpe(source, vocab_size, [EOT], options.processes, pattern)
    except BaseException:  # leave things as they were, with `latest` on the last good run
        if not run.resume:
            shutil.rmtree(run.dir)
        LATEST.unlink()
        if before.is_dir():
            LATEST.symlink_to(before.name)
        raise
    seconds = time.perf_counter() - began
    tokenizer = bpe.Tokenizer(vocab, merges, [EOT], pattern)
    held_out = (text / "val.txt").read_text(encoding="utf-8")
    result = plan | {"seconds": round(seconds, 2)}
    result["bytes_per_token"] = round(compression(tokenizer.encode, held_out), 4)
    result["train_mb_per_s"] = round(size / 1e6 / seconds, 2)
    usage = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    result["peak_gib"] = round(max(u.ru_maxrss for u in usage) / 2**20, 2)
    tokenizer.save(run.dir)
    run.log(time=seconds, **result)
    run.finish(result)
    if options.record:
        git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        line = {"commit": commit, "machine": f"{os.cpu_count()} CPU cores"}
        line |= {"command": " ".join(sys.argv), **result}
        with open(HERE / "results.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    print(f"{summary(result)}. The tokenizer is in {run.dir}; next: run.py encode, run.py inspect")


def summary(result):
    return (
        f"{result['vocab_size']:,} tokens in {result['seconds']} s, "
        f"{result['bytes_per_token']:.3f} bytes per token on held-out text"
    )


def compression(encode, text):
    return len(text.encode()) / len(encode(text))


def encode(given):
    """write train.bin, val.bin and meta.json for the stages that train models"""
    options = build(EncodeOptions, given)
    tokenizer = bpe.Tokenizer.load(options.tokenizer)
    digest = sha256((Path(options.tokenizer) / "tokenizer.json").read_bytes()).hexdigest()[:16]
    text = corpus(options.data, options.sha256)
    home = OUT / "tokens" / f"{text.name}-{digest[:8]}"
    home.mkdir(parents=True, exist_ok=True)
    meta = {
        "dtype": "uint16" if tokenizer.dtype.itemsize == 2 else "uint32",
        "source": options.data,
    }
    meta |= {"vocab_size": tokenizer.vocab_size, "tokenizer": digest, "bytes": {}, "tokens": {}}
    for split in ("train", "val"):
        source, began = text / f"{split}.txt", time.perf_counter()
        count = tokenizer.encode_file(
            source, home / f"{split}.bin", num_processes=options.processes
        )
        seconds, size = time.perf_counter() - began, source.stat().st_size
        meta["bytes"][split], meta["tokens"][split] = size, count
        ratio, rate = size / max(count, 1), count / seconds
        print(f"{split}.bin: {count:,} tokens of {ratio:.3f} bytes, {rate:,.0f} tokens/s")
    with atomic(home / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
    print(f"tokens are in {home}; next: python 03_gpt/run.py train --tokens {home}")


def inspect(given):
    """show a text token by token, compression beside gpt2 and cl100k, and a plot of it"""
    options = build(InspectOptions, given)
    tokenizer = bpe.Tokenizer.load(options.tokenizer)
    ids = tokenizer.encode(options.text)
    print(f"{len(options.text.encode())} bytes, {len(ids)} tokens:")
    print(colored([tokenizer.vocab[i] for i in ids]))
    home = corpus(options.data)
    held_out = (home / "val.txt").read_text(encoding="utf-8")
    rows = {"this": (tokenizer.vocab_size, compression(tokenizer.encode, held_out))}
    for name in ("gpt2", "cl100k_base"):
        try:
            theirs = tiktoken_encoding(name)
            of_text = lambda text, theirs=theirs: theirs.encode(text, allowed_special="all")  # noqa: E731
            rows[name] = theirs.n_vocab, compression(of_text, held_out)
        except ImportError as error:
            print(f"{name} is not compared: {error}")
    for name, (size, value) in rows.items():
        label = f"{name} ({size:,})"
        print(f"{label:24} {value:.3f} bytes per token on the held-out text of {options.data}")
    if options.plot:
        plot(tokenizer, held_out, rows, Path(options.tokenizer) / "compression.png")


def colored(tokens):
    """Tokens on alternating backgrounds, or between bars; parts of characters as \\x and digits."""
    if not sys.stdout.isatty():
        return "|".join(token.decode(errors="backslashreplace") for token in tokens)
    lines, colors = [], (44, 45, 42, 46, 43, 41)
    for i, token in enumerate(tokens):
        shown = token.decode(errors="backslashreplace").replace("\n", "↵\033[0m\n")
        lines.append(f"\033[30;{colors[i % len(colors)]}m{shown}\033[0m")
    return "".join(lines)


def tiktoken_encoding(name):
    """An encoding of tiktoken from its cache; ImportError, with the reason, where that lacks it."""
    if not importlib.util.find_spec("tiktoken"):
        raise ImportError("tiktoken is not installed")
    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        raise ImportError("TIKTOKEN_CACHE_DIR does not say where tiktoken's vocabularies are")
    importlib.import_module("tiktoken.load").read_file = None  # what would download
    try:
        return importlib.import_module("tiktoken").get_encoding(name)
    except TypeError:
        raise ImportError("its vocabulary is not in TIKTOKEN_CACHE_DIR") from None


def plot(tokenizer, text, rows, path):
    """The first merges of a tokenizer are the tokenizer that fewer merges would have given."""
    from matplotlib.figure import Figure

    sizes, values = [], []
    n = len(tokenizer.merges)
    for k in sorted({0, n, *(2**i for i in range(6, 20) if 2**i < n)}):
        tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in tokenizer.merges[:k]]
        vocab = dict(enumerate(dict.fromkeys(tokens)))
        part = bpe.Tokenizer(vocab, tokenizer.merges[:k], pattern=tokenizer.splitter.pattern)
        sizes.append(len(vocab))
        values.append(compression(part.encode, text))
    axes = (figure := Figure(figsize=(7, 4.5))).subplots()
    axes.plot(sizes, values, "o-", label="this tokenizer after each so many merges")
    for name, (size, value) in list(rows.items())[1:]:
        axes.plot(size, value, "D", label=f"{name}, learned from other text")
    ticks = [2**i for i in range(8, 18) if 2**i < 1.5 * max(size for size, _ in rows.values())]
    axes.set(xscale="log", title="What a larger vocabulary buys", ylim=(0, None))
    axes.set(xlabel="vocabulary size (tokens)", ylabel="bytes per token on held-out text")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with atomic(path) as file:
        figure.savefig(file, dpi=120, bbox_inches="tight")
    print(f"vocabulary size against compression: {path}")


if __name__ == "__main__":
    main(
        {
            "train": (train, TrainOptions),
            "encode": (encode, EncodeOptions),
            "inspect": (inspect, InspectOptions),
        }
    )
