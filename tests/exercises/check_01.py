"""Checks of 01_tokenizer/exercises.py."""

import random
import sys
from collections import Counter

import bpe
from check import Differs, measured, same

SHIPPED = "873eebb3"  # stream as it came, which is no try yet


def first_merges(answer):
    counts = Counter(bpe.Splitter(bpe.GPT2_PATTERN).split("no one on one online"))
    wanted = bpe.merge_words(counts, 4)
    hints = (
        "(b' ', b'o') and (b'o', b'n') occur four times each: of equals the greater goes first, "
        "and a space is a small byte",
        "the counts have changed: what stood beside a merged pair now stands beside the new token",
        "two neighbours in different pre-tokens are no pair, however often they meet",
        "all pairs left occur once, so the greatest goes first: compare their bytes, b'a' < b'b'",
    )
    if not isinstance(answer, list) or not all(_is_pair(pair) for pair in answer):
        raise Differs(
            f"got {answer!r}, where a list of tuples of two bytes is wanted, (b'a', b'b')"
        )
    for i, (got, hint) in enumerate(zip(answer, hints)):
        if got != wanted[i]:
            raise Differs(f"merge {i + 1} is not {got}. Hint: {hint}")
    if len(answer) != 4:
        raise Differs(f"it has {len(answer)} merges, and four are wanted")


def _is_pair(pair):
    return isinstance(pair, tuple) and len(pair) == 2 and all(type(x) is bytes for x in pair)


def merge_words(answer):
    cases = (
        ({"low": 5, "lower": 2, "newest": 6}, 2, "the pair that occurs most often, by word counts"),
        ({"ab": 1, "": 4, "c": 7}, 5, "where no pair is left the list ends, and that is no error"),
        ({"ab": 1, "cd": 3, "ef": 2}, 3, "a word that occurs three times counts three times"),
        ({"zx": 2, "xz": 2, "ab": 2}, 3, "of equally frequent pairs the greater one goes first"),
        ({"xz": 2, "ab": 2, "zx": 2}, 3, "which word came first must not matter"),
        (
            {"ab": 9, "abc": 5, "bd": 5, "aze": 5},
            6,
            "ties are decided by the bytes of the two tokens: not by which was learned when, nor "
            "by the two written together",
        ),
        ({"aaa": 1, "bb": 1}, 3, "aaa holds the pair (a, a) twice, and becomes aa, a"),
        ({"aaaaaaa": 2, "baaab": 1, "ababab": 3}, 8, "places may touch: join from left to right"),
        ({"\u00e9t\u00e9": 2, "\u4e16\u754c": 3}, 6, "a word is its UTF-8, and tokens are bytes"),
        ({"abc": 2}, 0, "no merges were asked for"),
        ({}, 3, "no words, no merges"),
    )
    for counts, n, hint in cases:
        _merges(answer, counts, n, hint)
    random_words = random.Random(0)
    for letters in ("ab", "abc", " aB\u00e9"):
        for _ in range(20):
            words = ["".join(random_words.choices(letters, k=k)) for k in (1, 3, 5, 8, 8)]
            counts = {word: random_words.randint(1, 4) for word in words}
            _merges(answer, counts, 8, "work this one out by hand")


def _merges(answer, counts, n, hint):
    given, wanted = dict(counts), bpe.merge_words(counts, n)
    case = f"from {counts}, {n} merges: "
    try:
        got = answer(given, n)
    except (ValueError, LookupError) as error:  # max() of nothing, most often
        raise Differs(f"{case}{type(error).__name__}, {error}. Hint: {hint}") from None
    if given != counts:
        raise Differs(case + "the counts that were given have changed")
    if not isinstance(got, list) or not all(_is_pair(pair) for pair in got):
        raise Differs(f"{case}got {got!r}, where a list of pairs of bytes is wanted. Hint: {hint}")
    for i, (ours, theirs) in enumerate(zip(wanted, got)):
        if theirs != ours:
            raise Differs(f"{case}merge {i + 1} is {theirs}, not {ours}. Hint: {hint}")
    if len(got) != len(wanted):
        raise Differs(f"{case}there are {len(got)} of them, not {len(wanted)}. Hint: {hint}")


def stream(answer):
    tokens = [bytes([b]) for b in range(256)]
    plain = bpe.Tokenizer(dict(enumerate(tokens)), [])
    # As in GPT-2: tokens that hold the first half of a character, and a space besides.
    halves = [(b"\xf0", b"\x9f"), (b" ", b"\xf0\x9f"), (b"\x98", b"\x80"), (b"\xe4", b"\xb8")]
    vocab = dict(enumerate(tokens + [a + b for a, b in halves]))
    cut = bpe.Tokenizer(vocab, halves)
    whole = "a smiling \U0001f600 says \u4e16\u754c, na\u00efve"
    for tokenizer in (plain, cut):
        for text in ("", "no more", whole, "\U0001f600\U0001f600"):
            _pieces(answer, tokenizer, tokenizer.encode(text))
    # What is half at the end, no UTF-8 at all, or a U+FFFD of the text: as decode shows it.
    odd = [
        plain.encode("so \U0001f600")[:-1],
        cut.encode("so \U0001f600")[:-1],
        [*b"a\xff\xfe\xf0\x9fb", 0x9F],
        [*b"\xf0\x9f\xf0\x9f\x98\x80"],
        plain.encode("\ufffd, a\ufffd"),
    ]
    for ids in odd:
        _pieces(answer, cut, ids)


def _pieces(answer, tokenizer, ids):
    data = [tokenizer.vocab[i] for i in ids]
    wanted, got, late = tokenizer.decode(ids), [], []

    def feed():
        for n, i in enumerate(ids):
            so_far = b"".join(data[:n])
            if _is_whole(so_far) and "".join(got) != so_far.decode(errors="replace"):
                late.append(so_far.decode(errors="replace"))
            yield i

    pieces = answer(tokenizer, feed())
    if not hasattr(pieces, "__next__"):
        raise Differs(f"got a {type(pieces).__name__}, where the pieces are to be yielded")
    for piece in pieces:
        if not isinstance(piece, str):
            raise Differs(f"yields a {type(piece).__name__}, not a str")
        got.append(piece)
    text, shown = "".join(got), data
    if text != wanted:
        raise Differs(
            f"the tokens {shown} came out as {text!r}, and decode says {wanted!r}. Hint: the bytes "
            "of half a character must wait for the rest; where no rest comes, decode shows them too"
        )
    if late:
        raise Differs(
            f"of {shown} not all of {late[0]!r} was out when the next id was asked for. Hint: who "
            "chats wants to read along; only half characters have to wait, and bytes that can "
            "never become one must not hold up what comes after"
        )


def _is_whole(data):
    """Whether bytes end with a whole character, whatever is before it: not with a U+FFFD, which
    looks as if it were half of one."""
    for k in range(1, min(4, len(data)) + 1):
        try:
            return data[-k:].decode() != "\ufffd"
        except UnicodeDecodeError:
            pass
    return not data


def fewest_tokens(answer):
    letters = [b"a", b"b", b"c", b"d", b"e", b"f", b"g"]
    cases = (
        (b"abc", [], "with tokens of one byte there is one way"),
        (b"", [b"ab"], "no bytes, no tokens"),
        (b"abcd", [b"ab", b"abcd"], "the whole word is a token"),
        (b"abcdef", [b"abcd", b"ab", b"cdef"], "the longest token first leaves e and f alone"),
        (b"abcdefg", [b"cdefg", b"abc", b"defg"], "the longest token from the end is no better"),
        (b"abcdefg", [b"bcdef", b"abc", b"defg"], "the longest of all is in the way here"),
        (b"aaaaa", [b"aa", b"aaa"], "5 is 2 and 3"),
    )
    for word, more, hint in cases:
        _fewest(answer, word, letters + more, hint)
    _fewest(answer, b"abc", [b"ab", b"bc", b"a"], "not every byte needs a token of its own")
    hint = "where there is no way: ValueError"
    _fewest(answer, b"abx", letters + [b"ab"], hint)
    _fewest(answer, b"abc", [b"ab", b"bc", b"b"], hint)
    _fewest(answer, b"a", [], hint)
    rng = random.Random(0)
    for _ in range(60):
        some = {bytes(rng.choices(b"ab", k=rng.randint(1, 5))) for _ in range(rng.randint(1, 7))}
        word = bytes(rng.choices(b"ab", k=rng.randint(1, 12)))
        _fewest(answer, word, sorted(some), "try all ways on paper")
    greek = "\u03bb\u03cc\u03b3\u03bf\u03c2".encode()
    _fewest(answer, greek, [bytes([b]) for b in range(256)] + [greek[1:5]], "bytes are all bytes")
    long = (
        "a word of 600 bytes: keep what is known of each beginning of the word, and go on from it"
    )
    _fewest(answer, b"ab" * 14 + b"c", [b"a", b"b", b"ab", b"ba", b"aba", b"bab", b"c"], long)
    _fewest(answer, b"ab" * 300, [b"a", b"b", b"ab", b"ba", b"aba", b"bab"], long)
    _fewest(answer, b"ab" * 299 + b"xa", [b"a", b"b", b"ab", b"ba", b"aba", b"bab"], hint)


def _fewest(answer, word, tokens, hint):
    vocab = {3 * i + 7: token for i, token in enumerate(tokens)}  # an id is no index
    given = dict(vocab)
    case = f"{word if len(word) < 40 else f'{len(word)} bytes'} with the tokens {tokens[:12]}: "
    least = _distance(word, tokens)
    try:
        got = _limited(lambda: answer(word, given), 10**6 if len(word) < 100 else 10**7)
    except ValueError as error:
        if least is None:
            return
        raise Differs(
            f"{case}ValueError, {error}, but {least} tokens do it. Hint: {hint}"
        ) from None
    except LookupError as error:
        what = f"{type(error).__name__}: {error}"
        raise Differs(f"{case}{what}. Hint: {hint}") from None
    except RecursionError:
        raise Differs(f"{case}calls stand in calls until Python gives up. Hint: {hint}") from None
    if given != vocab:
        raise Differs(case + "the vocabulary that was given has changed")
    if least is None:
        raise Differs(f"{case}there is no way, but got {got!r}. Hint: {hint}")
    if not isinstance(got, list) or not all(type(i) is int and i in vocab for i in got):
        raise Differs(f"{case}got {got!r}, where a list of ids in vocab is wanted")
    if (bytes_of := b"".join(vocab[i] for i in got)) != word:
        raise Differs(f"{case}the ids stand for {bytes_of}. Hint: {hint}")
    if len(got) != least:
        raise Differs(f"{case}{len(got)} tokens, but {least} do it. Hint: {hint}")


def _distance(word, tokens):
    """How many tokens a word takes at least, or None: all places one token away, and so on."""
    places, n = {0}, 0
    while places and len(word) not in places:
        places = {p + len(t) for p in places for t in tokens if word.startswith(t, p)}
        n += 1
        if n > len(word):
            return None
    return n if places else None


def _limited(function, most):
    """function(), but Differs once it has run so many lines: those of work that doubles."""
    before, lines = sys.gettrace(), 0

    def trace(frame, event, arg):
        nonlocal lines
        lines += event in ("line", "call")
        if lines > most:
            raise Differs(
                f"still at work after {most:,} lines. Hint: each way to go on is tried again for "
                "each way to get there; how many ways are there, and how many places?"
            )
        return trace

    sys.settrace(trace)
    try:
        return function()
    finally:
        sys.settrace(before)


def never_used(answer):
    number, letter = measured(answer(), "number", "a set of tokenizer.encode(text)")
    merges = bpe.merge_words(Counter(bpe.Splitter(bpe.GPT2_PATTERN).split(bpe.__doc__)), 400)
    tokens = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    tokenizer = bpe.Tokenizer(dict(enumerate(tokens)), merges)
    wanted = len(set(range(256, 256 + len(merges))) - set(tokenizer.encode(bpe.__doc__)))
    same(number, wanted, "the ids from 256 on, less those that occur at least once")
    hint = "take one of them, look for the merges that have it as a part, and where it stood"
    same(letter, "b", hint)
