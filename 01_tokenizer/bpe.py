r"""Byte-level byte-pair encoding: learn a vocabulary from text, then text to ids and back.

Parent: none

A language model reads numbers. Characters would make sequences long, whole words would leave
every new word unknown. Byte-pair encoding stands between: begin with the 256 bytes, so that
any text can be written, then again and again make the most frequent pair of neighbours a new
token. Text is first cut into pre-tokens, roughly words with the space before them, and pairs
are counted only inside these. This is all of it:

    def plain_bpe(text, n_merges):
        words = Counter(regex.findall(GPT2_PATTERN, text))
        words = {tuple(bytes([b]) for b in word.encode()): n for word, n in words.items()}
        merges = []
        for _ in range(n_merges):
            pairs = Counter()
            for word, n in words.items():
                for pair in zip(word, word[1:]):
                    pairs[pair] += n
            merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
            words = {merge(word, *merges[-1]): n for word, n in words.items()}
        return merges

    def merge(word, a, b):
        out = []
        for token in word:
            if token == b and out and out[-1] == a:
                token = out.pop() + b
            out.append(token)
        return tuple(out)

To encode, cut new text into pre-tokens and apply the merges in the order they were learned:
in each pre-token the pair that was learned first goes first (`rank` is that order). To decode,
put the bytes of the tokens in a row; only then are they UTF-8, a token may be half a character.

Why the fast version is fast, although it is Python:

- Training counts distinct pre-tokens once, in several processes. A merge then touches only the
  words that hold the pair (an index from pair to words), changes only the counts beside it,
  and finds the next pair in a heap whose entries may be out of date: counts of old pairs only
  fall, so an entry is checked when it comes up. A word is a str with one character per token:
  finding a pair in it is a substring search, in C.
- A pre-token has the same ids wherever it stands, and most were seen before. So encoding is
  one `findall`, one dictionary look-up each and one `join`: all C. Plain `re` takes a third
  of the time of `regex` but knows no \p{L}, so it does the ASCII part of the text, which
  has letters a-z.
- Pre-tokens not seen before are merged thousands at a time with numpy: a matrix with a row per
  word, in each round every row's best pair.
- Files are cut where no pre-token crosses (`CUT`), so processes share the work and memory
  does not grow with the file.

Four traps, each with a test. A space belongs to the word after it: a prompt that ends in a
space ends in a lone space token, which no text does. GPT-2 cuts numbers anywhere, which hides
arithmetic; GPT-4 takes digits in threes. GPT-2 spends a token on each space of indented code,
GPT-4 one on the run. A language that the training text lacked costs several tokens a character.

Read `merge_words`, `Tokenizer._encode` and `_merge_block`; the rest is cutting and files.

Papers: Gage 1994 (A New Algorithm for Data Compression); Sennrich et al. 2015 (1508.07909, BPE
for words); Radford et al. 2019 (GPT-2: bytes and pre-tokens); Zouhar et al. 2023 (2306.16837,
how good the greedy choice is).
"""

from __future__ import annotations

import contextlib
import heapq
import json
import mmap
import multiprocessing
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property, lru_cache
from itertools import chain
from operator import add
from pathlib import Path

import numpy as np
import regex

# Patterns that cut text into pre-tokens, written so that `re`, `regex` and `tokenizers` read them
# alike. GPT-2: a contraction, a word, a number or a run of marks, each with the one space before
# it; of white space the last character is left for what follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4 (cl100k_base): digits in threes, contractions in either case, line breaks go with the marks
# before them. White space that ends the text is one pre-token.
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+(?!\s|\S)|\s*[\r\n]|\s+(?!\S)|\s"
)
# GPT-4o (o200k_base): cuts "camelCase" at the capital, and keeps contractions with their word.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_PATTERN = (
    rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
# SmolLM2 splits off each digit, then applies GPT-2's pattern to the rest. One pattern does both:
# white space takes a digit for the end of the text.
SMOLLM2_PATTERN = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
_TIKTOKENS_GPT2 = GPT2_PATTERN.replace(r"|\s+(?!\S)|\s+", r"|\s+(?!\s|\S)|\s+(?!\S)|\s")
KNOWN_PATTERNS = {GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, LLAMA3_PATTERN, QWEN2_PATTERN}
KNOWN_PATTERNS |= {SMOLLM2_PATTERN, _TIKTOKENS_GPT2}

# In these patterns no pre-token reaches across either of these places, and neither side looks
# across: before a space and after a line break, if each is single and between visible characters.
# (o200k takes a slash along with the line break before it.)
CUT = regex.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=[^\s/])")
LAST_CUT = regex.compile(r"(?r)" + CUT.pattern)
_WHITE = rb"[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f"
_WHITE += rb"|\xe3\x80\x80"
CUT_BYTES = regex.compile(rb"(?<!%b)\n(?!/|%b)" % (_WHITE, _WHITE))  # the second, in UTF-8

NOT_ASCII = re.compile(r"[^\x00-\x7f]")

END_OF_TEXT = "<|endoftext|>"
TEXT_CHUNK = 1 << 18  # characters encoded or counted at a time
STREAM_CHUNK = 1 << 16  # and by encode_iterable
FILE_CHUNK = 1 << 22  # bytes of a file that a process takes at a time
CACHE_SIZE = 1 << 17  # pre-tokens that encode remembers
STREAM_CACHE_SIZE = 1 << 13  # and encode_iterable
SHORT = 32  # bytes; longer pre-tokens are merged one by one, with a heap
NEVER = np.int32(2**31 - 1)  # the rank of a pair that does not merge


class Splitter:
    """Cuts text into pre-tokens, the pieces that merges never cross."""

    def __init__(self, pattern: str):
        # Possessive quantifiers lose their plus: it only saves time, and `tokenizers` takes
        # {1,3}+ for a repeat. In Python $ also stands before a last line break.
        part = re.compile(r"(\\.|\[(?:\\.|[^\]])*\])|([+*?]|\{\d+,?\d*\})\+|\$", re.S)
        self.pattern = part.sub(lambda m: m[1] or m[2] or r"(?!\s|\S)", pattern)
        self.known = self.pattern in KNOWN_PATTERNS
        try:
            self.unicode = regex.compile(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
        if self.known:  # what it means for ASCII text, in the syntax of plain `re`
            ascii_only = re.sub(r"\[[^]]*\]|(\\p\{\w+\})", r"[\g<0>]", self.pattern)
            ascii_only = ascii_only.replace("[[", "[").replace("]]", "]")
            for name, members in {"L": "a-zA-Z", "Lu": "A-Z", "Ll": "a-z", "N": "0-9"}.items():
                ascii_only = ascii_only.replace(rf"\p{{{name}}}", members)
            # Words before contractions, which they cannot be taken for: most pre-tokens are words.
            ascii_only = re.sub(r"^('\(.*?\)\|)( \?\[a-zA-Z\]\+\|)", r"\2\1", ascii_only)
            self.ascii = re.compile(re.sub(r"\\p\{\w+\}", "", ascii_only), re.ASCII)

    def __reduce__(self):
        return Splitter, (self.pattern,)

    def chunks(self, text: str, size: int) -> Iterator[str]:
        """`text` in chunks of about `size` characters that split as they do in the whole."""
        start = 0
        while self.known and (cut := CUT.search(text, start + size)):
            yield text[start : cut.start()]
            start = cut.start()
        yield text[start:] if start else text

    def split(self, text: str) -> list[str]:
        """The pre-tokens of `text`; together they are the text."""
        if not self.known:  # it may leave gaps (they become pre-tokens too) or hold groups
            pieces, end = [], 0
            for match in self.unicode.finditer(text):
                pieces += (text[end : match.start()], match.group())
                end = match.end()
            return [piece for piece in (*pieces, text[end:]) if piece]
        # Plain `re` for what is ASCII, `regex` for what lies around other characters.
        pieces, done = [], 0
        while not text.isascii() and (other := NOT_ASCII.search(text, done)):
            before = LAST_CUT.search(text, done, other.start())
            after = CUT.search(text, other.end() + 64)
            start = before.start() if before else done
            end = after.start() if after else len(text)
            pieces += self.ascii.findall(text, done, start)
            pieces += self.unicode.findall(text, start, end)
            done = end
        return pieces + self.ascii.findall(text, done)


def train_bpe(
    input_path: str | os.PathLike,
    vocab_size: int,
    special_tokens: Iterable[str] = (),
    num_processes: int | None = None,
    pattern: str = GPT2_PATTERN,
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learns a byte-level BPE vocabulary from a UTF-8 file (Sennrich et al. 2015).

    Returns `vocab` (the 256 bytes, then the special tokens, then one token per merge) and
    `merges` in the order learned. Of pairs that are equally frequent the greater one, as a pair
    of byte strings, goes first. Special tokens separate texts and are not learned from. The
    result does not depend on `num_processes` (default: one per core and 2 MB).

    Raises ValueError if the corpus is missing, empty or not UTF-8, or `vocab_size` is below
    256 + special tokens or above what the corpus can give.
    """
    special_tokens = _check_special_tokens(special_tokens)
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: the bytes and special tokens are {least}"
        )
    counts = count_pretokens(input_path, special_tokens, num_processes, pattern)
    merges = merge_words(counts, vocab_size - least)
    if least + len(merges) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is more than {input_path} can give: every word there is one "
            f"token at {least + len(merges)}; use at most that, or a longer text"
        )
    tokens = [bytes([b]) for b in range(256)] + [token.encode() for token in special_tokens]
    return dict(enumerate(tokens + [a + b for a, b in merges])), merges


def count_pretokens(
    path: str | os.PathLike,
    special_tokens: Iterable[str] = (),
    num_processes: int | None = None,
    pattern: str = GPT2_PATTERN,
) -> Counter[str]:
    """How often each pre-token occurs in a file.

    Memory holds the chunks at work and the distinct pre-tokens, however long the file. A pattern
    that is not in `KNOWN_PATTERNS` might match across any cut, so it needs the file whole.
    """
    splitter = Splitter(pattern)
    chunks, processes = _file_chunks(path, splitter, special_tokens, num_processes)
    shared = (path, splitter, frozenset(special_tokens))
    total: Counter[str] = Counter()
    with _process_map(_count_chunk, shared, chunks, processes) as results:
        for counts in results:
            total.update(counts)
    return total


def _count_chunk(path, splitter: Splitter, special: frozenset, start: int, end: int) -> Counter:
    text = _read_text(path, start, end)
    counts: Counter[str] = Counter()
    for part in _split_special(text, special)[::2]:
        for chunk in splitter.chunks(part, TEXT_CHUNK):
            counts.update(splitter.split(chunk))
    return counts


def merge_words(counts: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges of words that occur `counts[word]` times; fewer if spent.

    A word is kept as a string with one character per token (character 256 + i is what merge i
    makes), so that a pair is a string of two and a merge in a word is a search for it.
    """
    words = []
    freqs = []
    for word, count in counts.items():
        if len(word) > 1 or not word.isascii():
            words.append(word if word.isascii() else word.encode().decode("latin-1"))
            freqs.append(count)

    pair_counts: dict[str, int] = defaultdict(int)
    where: dict[str, list[int]] = defaultdict(list)  # pair -> words, some no longer holding it
    for i, word in enumerate(words):
        freq = freqs[i]
        for pair in map(add, word, word[1:]):
            pair_counts[pair] += freq
            where[pair].append(i)

    tokens = [bytes([b]) for b in range(256)]
    # heapq gives the least first, so ties compare complemented bytes; the end mark, above any
    # byte, puts "abc" before "ab".
    order = [chr(255 - b) + "\u0100" for b in range(256)]
    heap = [(-n, order[ord(p[0])] + order[ord(p[1])], p) for p, n in pair_counts.items()]
    heapq.heapify(heap)

    merges: list[tuple[bytes, bytes]] = []
    while len(merges) < n_merges and heap:
        negative_count, key, pair = heapq.heappop(heap)
        count = pair_counts[pair]
        if count != -negative_count:  # the count has fallen since the entry was made
            if count:
                heapq.heappush(heap, (-count, key, pair))
            continue

        a, b = pair
        new = chr(256 + len(merges))
        tokens.append(tokens[ord(a)] + tokens[ord(b)])
        order.append(order[ord(a)][:-1] + order[ord(b)])
        merges.append((tokens[ord(a)], tokens[ord(b)]))

        change: dict[str, int] = defaultdict(int)
        for i in where.pop(pair):
            word = words[i]
            left, found, right = word.partition(pair)
            if not found:
                continue
            freq = freqs[i]
            if a == b or pair in right:  # occurrences may touch: take all pairs out, put all in
                words[i] = word.replace(pair, new)
                for p in map(add, word, word[1:]):
                    change[p] -= freq
                for p in map(add, words[i], words[i][1:]):
                    change[p] += freq
                    if new in p:
                        where[p].append(i)
                continue
            words[i] = left + new + right
            if left:
                before = left[-1]
                change[before + a] -= freq
                change[before + new] += freq
                where[before + new].append(i)
            if right:
                after = right[0]
                change[b + after] -= freq
                change[new + after] += freq
                where[new + after].append(i)

        del pair_counts[pair]
        change.pop(pair, None)
        for p, difference in change.items():
            pair_counts[p] += difference
            if new in p:
                key = order[ord(p[0])] + order[ord(p[1])]
                heapq.heappush(heap, (-difference, key, p))
    return merges


class Tokenizer:
    """Byte-level BPE with a given vocabulary."""

    def __init__(
        self,
        vocab: dict[int, bytes],
        merges: list[tuple[bytes, bytes]],
        special_tokens: Iterable[str] | dict[str, int] | None = None,
        pattern: str = GPT2_PATTERN,
        *,
        ignore_merges: bool = False,
        normalizer: str | None = None,
    ):
        """`special_tokens` that `vocab` lacks get the next free ids, or those a dict gives.

        `ignore_merges`: a pre-token that is in the vocabulary is taken whole, even where its
        merges would end elsewhere (tiktoken, Llama 3). `normalizer`: None or "NFC" (Qwen).
        """
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.splitter = Splitter(pattern)
        self.ignore_merges = ignore_merges
        self.normalizer = normalizer
        id_of = {token: i for i, token in reversed(self.vocab.items())}
        self.special_tokens: dict[str, int] = {}
        for token in _check_special_tokens(special_tokens or ()):
            if isinstance(special_tokens, dict):
                index = special_tokens[token]
            else:
                index = id_of.get(token.encode(), max(self.vocab) + 1)
            if self.vocab.setdefault(index, token.encode()) != token.encode():
                taken = self.vocab[index]
                raise ValueError(f"id {index} of special token {token!r} is taken by {taken!r}")
            self.special_tokens[token] = index
        self.vocab_size = max(self.vocab) + 1  # the rows an embedding needs
        self.dtype = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")  # of ids in files
        self._build_tables(id_of)

    def _build_tables(self, id_of: dict[bytes, int]) -> None:
        """Arrays that answer for many pairs at once: their rank, and the token they make."""
        self._end = self.vocab_size  # stands where a word ends, and merges with nothing
        byte_ids = [id_of.get(bytes([b]), -1) for b in range(256)]
        self._byte_ids = np.array(byte_ids, np.int64)
        self._missing_bytes = bytes(b for b in range(256) if byte_ids[b] < 0)
        try:
            triples = [(id_of[a], id_of[b], id_of[a + b]) for a, b in self.merges]
        except KeyError as error:
            raise ValueError(
                f"vocab lacks {error.args[0]!r}, which merges name: take both from one tokenizer"
            ) from None
        left, right, self._product = np.array(triples, np.int64).reshape(-1, 3).T.copy()
        keys = left * (self._end + 1) + right
        order = np.argsort(keys, kind="stable")
        self._keys = np.append(keys[order], np.iinfo(np.int64).max)
        self._ranks = np.append(order, NEVER).astype(np.int32)
        self._size = np.zeros(self._end + 1, np.int64)  # bytes of each token
        self._size[list(self.vocab)] = list(map(len, self.vocab.values()))

        a, b = np.divmod(np.arange(1 << 16), 256)
        self._byte_pair_ranks = self._rank(self._byte_ids[a], self._byte_ids[b])
        self._byte_pair_ranks = np.append(self._byte_pair_ranks, NEVER)

        # Pre-token -> its ids as uint32 bytes; to begin with, of those that are one token.
        special = set(self.special_tokens.values())
        tokens = [token for i, token in self.vocab.items() if i not in special]
        if self.ignore_merges:
            whole = [id_of[token].to_bytes(4, "little") for token in tokens]
        else:
            tokens = [token for token in tokens if len(token) <= SHORT]
            whole = self._merge_short(tokens)
        texts = [token.decode(errors="replace") for token in tokens]
        self._known = {t: i for t, i in zip(texts, whole) if len(i) == 4 and "\ufffd" not in t}
        self._cache, self._room = dict(self._known), CACHE_SIZE

    @classmethod
    def from_ranks(
        cls,
        ranks: dict[bytes, int],
        pattern: str,
        special_tokens: Iterable[str] | dict[str, int] | None = None,
    ) -> Tokenizer:
        """A tokenizer from tiktoken's ranks, in which a token's id is its rank.

        tiktoken joins any two neighbours that make a token, so each way to cut a token into two
        is a merge, and those of one token stand together.
        """
        merges = []
        for token in sorted(ranks, key=ranks.__getitem__):
            for k in range(1, len(token)):
                if token[:k] in ranks and token[k:] in ranks:
                    merges.append((token[:k], token[k:]))
        vocab = {rank: token for token, rank in ranks.items()}
        return cls(vocab, merges, special_tokens, pattern, ignore_merges=True)

    def encode(self, text: str, allowed_special: str | Iterable[str] = "all") -> list[int]:
        """The ids of `text`.

        `allowed_special` says which special tokens become their id where the text spells them:
        "all", "none" or a set. Others stay text, as they should in what a user typed. Raises
        ValueError for half a surrogate pair. (Bytes that a loaded vocabulary lacks have no id and
        are left out, as in `tokenizers`; SmolLM2 lacks control characters.)
        """
        ids = b"".join(self._encode(text, self._allowed(allowed_special)))
        return np.frombuffer(ids, "<u4").tolist()

    def encode_iterable(
        self, texts: Iterable[str], allowed_special: str | Iterable[str] = "all"
    ) -> Iterator[int]:
        """Yields the ids of the concatenated `texts` (a file's lines, say) one by one.

        Memory is constant: text is held only up to the next place where it can be cut.
        """
        allowed = self._allowed(allowed_special)
        can_cut = _can_cut(self.splitter, allowed)
        held, length, enough = [], 0, STREAM_CHUNK
        for text in chain(texts, [None]):  # None: the end
            held.append(text or "")
            length += len(held[-1])
            if text is not None and (length < enough or not can_cut):
                continue
            whole = "".join(held)
            match = LAST_CUT.search(whole)
            cut = len(whole) if text is None else match.start() if match else 0
            for ids in self._encode(whole[:cut], allowed, STREAM_CHUNK, STREAM_CACHE_SIZE):
                yield from np.frombuffer(ids, "<u4").tolist()
            held, length = [whole[cut:]], len(whole) - cut
            enough = STREAM_CHUNK + 2 * length  # where nothing can be cut, try ever more rarely

    def encode_file(
        self,
        source: str | os.PathLike,
        target: str | os.PathLike,
        allowed_special: str | Iterable[str] = "all",
        num_processes: int | None = None,
    ) -> int:
        """Writes the ids of a UTF-8 file to `target`, flat and little-endian; returns how many.

        uint16, or uint32 where `vocab_size` is above 65,536. The target appears when complete.
        """
        allowed = self._allowed(allowed_special)
        chunks, processes = _file_chunks(source, self.splitter, allowed, num_processes)
        shared = (self, source, allowed)
        with (
            _process_map(_encode_chunk, shared, chunks, processes) as results,
            atomic_write(target) as file,
        ):
            return sum(map(file.write, results)) // self.dtype.itemsize

    def _allowed(self, allowed_special: str | Iterable[str]) -> frozenset[str]:
        if allowed_special in ("all", "none"):
            return frozenset(self.special_tokens if allowed_special == "all" else ())
        allowed = frozenset(allowed_special)
        for token in allowed - self.special_tokens.keys():
            raise ValueError(
                f"allowed_special has {token!r}, which is none of {list(self.special_tokens)[:5]}"
            )
        return allowed

    def _encode(
        self, text: str, allowed: frozenset[str], size: int = TEXT_CHUNK, room: int = CACHE_SIZE
    ) -> Iterator[bytes]:
        """Yields the ids of `text` as uint32 bytes, a chunk at a time."""
        for i, part in enumerate(_split_special(text, allowed)):
            if i % 2:  # what the split was at
                yield self.special_tokens[part].to_bytes(4, "little")
                continue
            if self.normalizer and not part.isascii():
                part = unicodedata.normalize(self.normalizer, part)
            for chunk in self.splitter.chunks(part, size):
                pieces = self.splitter.split(chunk)
                try:
                    yield b"".join(map(self._cache.__getitem__, pieces))
                except KeyError:
                    self._learn(set(pieces), room)
                    yield b"".join(map(self._cache.__getitem__, pieces))

    def _learn(self, pieces: set[str], room: int) -> None:
        """Puts pre-tokens in the cache, which forgets everything when it is full."""
        new = list(pieces.difference(self._cache))
        self._room = min(self._room, room) - len(new) - sum(map(len, new)) // 16
        if self._room < 0:
            self._cache, self._room = dict(self._known), room
            new = list(pieces.difference(self._cache))
        self._cache.update(zip(new, self._merge(new)))

    def _merge(self, pieces: list[str]) -> Iterator[bytes]:
        try:
            words = [piece.encode().translate(None, self._missing_bytes) for piece in pieces]
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text holds {error.object[error.start]!r}, half of a surrogate pair, which is no "
                "character: read text as UTF-8, or .encode('utf-8', 'replace').decode() it"
            ) from None
        short = iter(self._merge_short([word for word in words if len(word) <= SHORT]))
        return (next(short) if len(w) <= SHORT else self._merge_long(w) for w in words)

    def _rank(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Ranks of the pairs (left[i], right[i]); NEVER where they do not merge."""
        keys = left * (self._end + 1) + right
        at = np.searchsorted(self._keys, keys)
        return np.where(self._keys[at] == keys, self._ranks[at], NEVER)

    def _merge_short(self, words: list[bytes]) -> list[bytes]:
        """The ids of each word as uint32 bytes; some thousand words of like length at a time."""
        results = [b""] * len(words)
        by_length = sorted(range(len(words)), key=lambda i: len(words[i]))
        for start in range(0, len(words), 4096):
            block = by_length[start : start + 4096]
            ids, counts = self._merge_block([words[i] for i in block])
            data = ids.astype("<u4").tobytes()
            begin = 0
            for i, count in zip(block, counts.tolist()):
                results[i] = data[begin : begin + 4 * count]
                begin += 4 * count
        return results

    def _merge_block(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Merges all words at once, in each round the best pair of every word.

        Returns the ids of all words in a row, and how many each has. W words, the longest last;
        N columns, one more than that has bytes. Tokens stay in the column of their first byte.
        """
        lengths = np.array([len(word) for word in words])
        width = int(lengths[-1]) + 1
        inside = np.arange(width) < lengths[:, None]  # (W, N)
        text = np.zeros(inside.shape, np.int64)  # (W, N)
        text[inside] = np.frombuffer(b"".join(words), np.uint8)
        # From here on positions are in the flattened matrix, (W * N,); `rank` belongs to the token
        # that starts there and the one after it, `previous` says where the one before it starts.
        ids = np.where(inside, self._byte_ids[text], self._end).ravel()
        pairs = np.where(inside[:, 1:], text[:, :-1] * 256 + text[:, 1:], 1 << 16)  # (W, N-1)
        rank_rows = np.pad(self._byte_pair_ranks[pairs], ((0, 0), (0, 1)), constant_values=NEVER)
        rank = rank_rows.ravel()
        previous = np.arange(-1, ids.size - 1)  # before a first token: the last column above it
        starts = inside.ravel().copy()

        rows = np.arange(len(words))
        while rows.size:
            at = rank_rows[rows].argmin(axis=1) + rows * width  # the first of equals
            best = rank[at]
            rows, at, best = (x[best != NEVER] for x in (rows, at, best))
            right = at + self._size[ids[at]]
            after = right + self._size[ids[right]]
            before = previous[at]
            ids[at] = token = self._product[best]
            starts[right] = False
            previous[after] = at
            rank[right] = NEVER
            rank[at] = self._rank(token, ids[after])
            rank[before] = self._rank(ids[before], token)
        return ids[starts], starts.reshape(inside.shape).sum(axis=1)

    @cached_property
    def _rank_of(self) -> dict[int, int]:
        return dict(zip(self._keys.tolist(), self._ranks.tolist()))

    def _merge_long(self, word: bytes) -> bytes:
        """Merges one word of n bytes in O(n log n): a heap of pairs over a linked list."""
        ids = [*self._byte_ids[np.frombuffer(word, np.uint8)].tolist(), self._end]
        n, base, rank_of = len(word), self._end + 1, self._rank_of
        following, previous = list(range(1, n + 2)), list(range(-1, n))
        heap: list[tuple[int, int]] = []

        def push(i: int, j: int) -> None:
            rank = rank_of.get(ids[i] * base + ids[j])
            if rank is not None:
                heapq.heappush(heap, (rank, i))

        for i in range(n):
            push(i, i + 1)
        while heap:
            rank, i = heapq.heappop(heap)
            j = following[i]
            if ids[i] < 0 or rank_of.get(ids[i] * base + ids[j]) != rank:
                continue  # one of the two has merged with another since
            ids[i], ids[j] = int(self._product[rank]), -1
            following[i] = following[j]
            previous[following[i]] = i
            push(i, following[i])
            if i:
                push(previous[i], i)
        return np.array([i for i in ids[:n] if i >= 0], "<u4").tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a list, array or tensor); bytes that are no UTF-8 become U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return b"".join(map(self.vocab.__getitem__, ids)).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(
                f"id {error} is not among the {len(self.vocab)} of this tokenizer: decode with "
                "the one that encoded"
            ) from None

    def save(self, directory: str | os.PathLike) -> None:
        """Writes `tokenizer.json` in Hugging Face's format, and what `AutoTokenizer` asks for."""
        special = set(self.special_tokens.values())
        split = {"type": "Split", "pattern": {"Regex": self.splitter.pattern}}
        split |= {"behavior": "Isolated", "invert": False}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        byte_level["use_regex"] = False
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        document = {"version": "1.0", "truncation": None, "padding": None}
        document["added_tokens"] = [
            {"id": i, "content": token, **plain, "special": True}
            for token, i in sorted(self.special_tokens.items(), key=lambda item: item[1])
        ]
        document["normalizer"] = {"type": self.normalizer} if self.normalizer else None
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        document |= {"post_processor": None, "decoder": byte_level}
        document["model"] = {
            **{"type": "BPE", **dict.fromkeys(unused), "fuse_unk": False, "byte_fallback": False},
            "ignore_merges": self.ignore_merges,
            "vocab": {
                token.decode() if i in special else _to_visible(token): i
                for i, token in sorted(self.vocab.items())
            },
            "merges": [f"{_to_visible(a)} {_to_visible(b)}" for a, b in self.merges],
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
        config["clean_up_tokenization_spaces"] = False
        if END_OF_TEXT in self.special_tokens:
            config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", document), ("tokenizer_config.json", config)):
            with atomic_write(Path(directory) / name) as file:
                file.write(json.dumps(content, ensure_ascii=False, indent=1).encode())

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Tokenizer:
        """A byte-level BPE from `tokenizer.json` (or from the directory that holds it).

        Reads what `save` writes and the files of GPT-2, Llama 3, Qwen, SmolLM2 and their like.
        Tokens that a template would add around a text are not added here. Raises ValueError for
        a file that asks for something else.
        """
        path = Path(directory)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            model = document["model"]
            if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
                raise LookupError(f"a model of type {model.get('type')}")
            special = {token["content"]: token["id"] for token in document["added_tokens"]}
            vocab = {
                i: token.encode() if token in special else _from_visible(token)
                for token, i in model["vocab"].items()
            }
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            merges = [(_from_visible(a), _from_visible(b)) for a, b in pairs]
            pattern = _pattern_from_json(document["pre_tokenizer"])
            normalizer = document.get("normalizer")
            steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
            if any(step["type"] != "NFC" for step in steps):
                raise LookupError(f"an unknown normalizer: {normalizer}")
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; train one first") from None
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is no tokenizer.json of a byte-level BPE known here ({error!r}): use or "
                "train another"
            ) from None
        options = {"ignore_merges": bool(model.get("ignore_merges"))}
        options["normalizer"] = "NFC" if steps else None
        return cls(vocab, merges, special, pattern, **options)


def _encode_chunk(tokenizer: Tokenizer, path, allowed: frozenset, start: int, end: int) -> bytes:
    ids = b"".join(tokenizer._encode(_read_text(path, start, end), allowed))
    return np.frombuffer(ids, "<u4").astype(tokenizer.dtype).tobytes()


# tokenizer.json is text, so each byte is written as a visible character (GPT-2's table): itself
# where it is one in Latin-1, else the next unused one from U+0100 on; a space becomes U+0120.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_TO_CHAR = {b: chr(b) for b in _VISIBLE}
_BYTE_TO_CHAR |= {b: chr(256 + i) for i, b in enumerate(sorted({*range(256)} - {*_VISIBLE}))}
_CHAR_TO_BYTE = {char: b for b, char in _BYTE_TO_CHAR.items()}


def _to_visible(token: bytes) -> str:
    """b" the\n" -> "Ġtheċ"."""
    return "".join(map(_BYTE_TO_CHAR.__getitem__, token))


def _from_visible(token: str) -> bytes:
    """ "Ġtheċ" -> b" the\n"."""
    return bytes(map(_CHAR_TO_BYTE.__getitem__, token))


def _pattern_from_json(pre_tokenizer: dict) -> str:
    """The one pattern that cuts text as these steps do."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    byte_level = steps[-1]
    if kinds[-1] == "ByteLevel" and not byte_level.get("add_prefix_space"):
        if byte_level.get("use_regex", True):
            if kinds == ["ByteLevel"]:
                return GPT2_PATTERN
            if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
                return SMOLLM2_PATTERN
        elif kinds == ["Split", "ByteLevel"] and steps[0]["behavior"] == "Isolated":
            return steps[0]["pattern"]["Regex"]
    raise LookupError(f"an unknown pre_tokenizer: {steps}")


def _check_special_tokens(tokens: Iterable[str]) -> list[str]:
    if isinstance(tokens, str):
        raise ValueError(f"special_tokens is the string {tokens!r}: give a list of strings")
    for token in (tokens := list(dict.fromkeys(tokens))):
        if not isinstance(token, str) or not token or regex.search(r"\p{Cs}", token):
            raise ValueError(f"special token {token!r} is not a non-empty string of characters")
    return tokens


@lru_cache
def _special_regex(tokens: frozenset[str]) -> re.Pattern:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})")


def _split_special(text: str, tokens: frozenset[str]) -> list[str]:
    """`text` cut at special tokens, the longest first; they are every other part."""
    if not any(token in text for token in tokens):  # far faster to find out than the expression
        return [text]
    return _special_regex(tokens).split(text)


def _can_cut(splitter: Splitter, special_tokens: Iterable[str]) -> bool:
    """Whether `CUT` is safe: cuts are beside white space, so no special token may hold any."""
    return splitter.known and not re.search(r"\s", "".join(special_tokens))


def _file_chunks(
    path: str | os.PathLike, splitter: Splitter, special_tokens, num_processes: int | None
) -> tuple[list[tuple[int, int]], int]:
    """Byte ranges of a file that split as in the whole, and how many processes to use."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            processes = num_processes or max(1, min(os.cpu_count() or 1, size >> 21))
            step = max(1, min(FILE_CHUNK, -(-size // processes)))
            cuts = [0]
            if size and _can_cut(splitter, special_tokens):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    while match := CUT_BYTES.search(data, cuts[-1] + step):
                        cuts.append(match.end())
    except OSError as error:
        raise ValueError(
            f"cannot read the corpus {path}: {error.strerror}; give a UTF-8 text file"
        ) from None
    if not size:
        raise ValueError(f"the corpus {path} is empty: give a UTF-8 text file")
    return list(zip(cuts, [*cuts[1:], size])), processes


def _read_text(path: str | os.PathLike, start: int, end: int) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset "
            f"{start + error.start} is {error.reason}; convert the file, or leave it out if binary"
        ) from None


@contextlib.contextmanager
def _process_map(function, shared: tuple, jobs: list[tuple], processes: int):
    """Yields an iterator over `function(*shared, *job)`, in order, from several processes."""
    if processes == 1 or len(jobs) == 1:
        yield (function(*shared, *job) for job in jobs)
        return
    # A forked process starts at once and holds `shared` already.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with context.Pool(min(processes, len(jobs)), _start_process, (function, shared)) as pool:
        yield pool.imap(_run_job, jobs)


def _start_process(*task) -> None:
    global _task
    _task = task


def _run_job(job: tuple):
    function, shared = _task
    return function(*shared, *job)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike):
    """A binary file that takes its name, replacing what had it, only when complete on disk."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
