r"""Byte-level byte-pair encoding: learn a vocabulary from text, then text to ids and back.

Parent: none

A language model reads numbers. Characters would make sequences long, whole words would leave
every new word unknown. Byte-pair encoding stands between: begin with the 256 bytes, so that any
text can be written, then again and again make the most frequent pair of neighbours a new token (of
equally frequent ones the greater bytes). Text is first cut into pre-tokens, roughly words with the
space before them, and pairs are counted only inside these. While there is a pair, this is it:

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

To encode, cut new text into pre-tokens and apply the merges in the order they were learned (their
`rank`). To decode, put the bytes of the tokens in a row; only then are they UTF-8, a token may be
half a character.

Why the fast version is fast, although it is Python:
- Training counts distinct pre-tokens once, in several processes. A merge then touches only the
  words that hold the pair (an index from pair to words) and the counts beside it; the next pair is
  on a heap whose entries may be out of date: counts of old pairs only fall, so an entry is checked
  when it comes up. A word is a str with a character per token, so finding a pair is C's work.
- A pre-token has the same ids wherever it stands, and most were seen before. So encoding is one
  `findall`, one dictionary look-up each and one `join`: all C. Plain `re` takes a third of the
  time of `regex` but knows no \p{L}, so it does the ASCII part, which has letters a-z.
- Pre-tokens not seen before are merged thousands at a time with numpy: a matrix with a row per
  word, in each round every row's best pair.
- Files are cut where no pre-token crosses (`CUT`): processes share the work, memory stays constant.

Four traps, all tested. A space belongs to the word after it: a prompt that ends in one is cut where
no text is. GPT-2 cuts numbers anywhere, which hides arithmetic; GPT-4 takes digits in threes. Of
indented code GPT-2's vocabulary has single spaces only, GPT-4's whole runs. A language that the
training text lacked costs several tokens a character.

Read `merge_words`, `Tokenizer._encode` and `_merge_block`; the rest is cutting and files.
Papers: Gage 1994 (A New Algorithm for Data Compression); Sennrich et al. 2015 (1508.07909, BPE for
words); Radford et al. 2019 (GPT-2: bytes and pre-tokens); Zouhar et al. 2023 (2306.16837).
"""

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
from functools import cached_property, partial
from io import BytesIO
from itertools import chain, starmap
from operator import add
from pathlib import Path

import numpy as np
import regex

# Patterns that cut text into pre-tokens, written so that `re`, `regex` and `tokenizers` read them
# alike. GPT-2: a contraction, a word, a number or a run of marks, each with the one space before
# it; of white space the last character is left for what follows.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4 (cl100k_base): digits in threes, contractions in either case, marks take line breaks along.
GPT4_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
GPT4_PATTERN += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\s|\S)|\s*[\r\n]|\s+(?!\S)|\s"
# GPT-4o (o200k_base): cuts "camelCase" at the capital, and keeps contractions with their word.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
O200K_PATTERN = f"{_LEAD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_LEAD}{_UPPER}+{_LOWER}*{_SUFFIX}?"
O200K_PATTERN += r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA3_PATTERN += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
            spans = (match.span() for match in self.unicode.finditer(text))
            ends = [0, *chain.from_iterable(spans), len(text)]
            return [text[a:b] for a, b in zip(ends, ends[1:]) if a < b]
        # Plain `re` for what is ASCII, `regex` for what lies around other characters.
        pieces, done = [], 0
        while not text.isascii() and (other := NOT_ASCII.search(text, done)):
            before = LAST_CUT.search(text, done, other.start())
            after = CUT.search(text, other.end() + 64)  # such characters seldom come alone
            start = before.start() if before else done
            end = after.start() if after else len(text)
            pieces += self.ascii.findall(text, done, start)
            pieces += self.unicode.findall(text, start, end)
            done = end
        return pieces + self.ascii.findall(text, done)


def train_bpe(
    input_path, vocab_size: int, special_tokens=(), num_processes=None, pattern=GPT2_PATTERN
) -> tuple[dict[int, bytes], list[tuple[bytes, bytes]]]:
    """Learns a byte-level BPE vocabulary from a UTF-8 file (Sennrich et al. 2015).

    Returns `vocab` (the 256 bytes, then the special tokens, then one token per merge) and `merges`
    in the order learned. Of pairs that are equally frequent the greater one, as a pair of byte
    strings, goes first. Special tokens separate texts and are not learned from. The result does not
    depend on `num_processes` (default: one per core and 2 MB). Raises ValueError for a missing,
    empty or not UTF-8 corpus, and a `vocab_size` that is too small or more than it can give.
    """
    special_tokens = _check_special_tokens(special_tokens)
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and specials are {least}")
    counts = count_pretokens(input_path, special_tokens, num_processes, pattern)
    merges = merge_words(counts, vocab_size - least)
    if (most := least + len(merges)) < vocab_size:
        what = f"vocab_size {vocab_size} is more than {input_path} can give"
        raise ValueError(f"{what}: every word is one token at {most}; use that, or a longer text")
    tokens = [bytes([b]) for b in range(256)] + [token.encode() for token in special_tokens]
    return dict(enumerate(tokens + [a + b for a, b in merges])), merges


def count_pretokens(path, special_tokens, num_processes, pattern) -> Counter[str]:
    """How often each pre-token of a file occurs; memory is for these and the chunks at work."""
    splitter = Splitter(pattern)
    chunks, processes = _file_chunks(path, splitter, special_tokens, num_processes)
    shared = (path, splitter, frozenset(special_tokens))
    total = Counter()
    for counts in _process_map(_count_chunk, shared, chunks, processes):
        total.update(counts)
    return total


def _count_chunk(path, splitter: Splitter, special: frozenset, start: int, end: int) -> Counter:
    counts = Counter()
    for part in _split_special(_read_text(path, start, end), special)[::2]:
        for chunk in splitter.chunks(part, TEXT_CHUNK):
            counts.update(splitter.split(chunk))
    return counts


def merge_words(counts: dict[str, int], n_merges: int) -> list[tuple[bytes, bytes]]:
    """The first `n_merges` merges of words that occur `counts[word]` times, fewer if spent: of the
    most frequent pair (aaa holds aa twice), among equals that of the greater bytes.

    A word is a string with one character per token (256 + i is what merge i makes), so that a pair
    is a string of two and a merge is a search for it."""
    words = [word if word.isascii() else word.encode().decode("latin-1") for word in counts]
    freqs = list(counts.values())
    pair_counts = defaultdict(int)
    where = defaultdict(list)  # pair -> the words that hold it, and some that did
    for i, (word, freq) in enumerate(zip(words, freqs)):
        for pair in map(add, word, word[1:]):
            pair_counts[pair] += freq
            where[pair].append(i)

    tokens = [bytes([b]) for b in range(256)]
    # heapq gives the least first: compare complemented bytes, and an end mark above them all.
    order = [chr(255 - b) + "\u0100" for b in range(256)]
    heap = [(-n, order[ord(p[0])] + order[ord(p[1])], p) for p, n in pair_counts.items()]
    heapq.heapify(heap)
    merges = []
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
        change = defaultdict(int)
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
        self, vocab, merges, special_tokens=None, pattern=GPT2_PATTERN, *, ignore_merges=False
    ):
        """From what `train_bpe` returns: id -> bytes, and pairs of bytes in the order learned.

        `special_tokens` that `vocab` lacks get the next free ids, or those a dict gives.
        `ignore_merges`: a pre-token that is in the vocabulary is taken whole, even where its
        merges would end elsewhere (tiktoken, Llama 3).
        """
        self.vocab, self.merges = dict(vocab), list(merges)
        self.splitter, self.ignore_merges = Splitter(pattern), bool(ignore_merges)
        self.normalizer = None  # or "NFC": what is done to text first (Qwen)
        id_of = {token: i for i, token in reversed(self.vocab.items())}
        given = special_tokens if isinstance(special_tokens, dict) else {}
        self.special_tokens = {}
        for token in _check_special_tokens(special_tokens or ()):
            index = given.get(token, id_of.get(token.encode(), max(self.vocab) + 1))
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
        self._byte_ids = np.array([id_of.get(bytes([b]), -1) for b in range(256)], np.int64)
        self._missing_bytes = bytes(np.flatnonzero(self._byte_ids < 0).tolist())
        try:
            triples = [(id_of[a], id_of[b], id_of[a + b]) for a, b in self.merges]
        except KeyError as error:
            raise ValueError(f"vocab lacks {error}, which merges name: they do not match") from None
        left, right, self._product = np.array(triples, np.int64).reshape(-1, 3).T.copy()
        keys = left * (self._end + 1) + right
        order = np.argsort(keys, kind="stable")
        self._keys = np.append(keys[order], np.iinfo(np.int64).max)
        self._ranks = np.append(order, NEVER).astype(np.int32)
        self._size = np.zeros(self._end + 1, np.int64)  # bytes of each token
        self._size[list(self.vocab)] = list(map(len, self.vocab.values()))

        a, b = np.divmod(np.arange(1 << 16), 256)
        self._byte_pair_ranks = np.append(self._rank(self._byte_ids[a], self._byte_ids[b]), NEVER)
        # Pre-token -> its ids as uint32 bytes; to begin with, of those that are one token.
        special = set(self.special_tokens.values())
        tokens = [token for i, token in self.vocab.items() if i not in special]
        if self.ignore_merges:
            whole = [id_of[token].to_bytes(4, "little") for token in tokens]
        else:
            whole = self._merge_short(tokens := [t for t in tokens if len(t) <= SHORT])
        texts = [token.decode(errors="replace") for token in tokens]
        self._known = {t: i for t, i in zip(texts, whole) if len(i) == 4 and "\ufffd" not in t}
        self._cache, self._room = dict(self._known), CACHE_SIZE

    @classmethod
    def from_ranks(cls, ranks: dict[bytes, int], pattern: str, special_tokens=None) -> "Tokenizer":
        """A tokenizer from tiktoken's ranks, in which a token's id is its rank.

        tiktoken joins any neighbours that make a token, so each way to cut one in two is a merge.
        """
        merges = []
        for token in sorted(ranks, key=ranks.__getitem__):
            for k in range(1, len(token)):
                if token[:k] in ranks and token[k:] in ranks:
                    merges.append((token[:k], token[k:]))
        vocab = {rank: token for token, rank in ranks.items()}
        return cls(vocab, merges, special_tokens, pattern, ignore_merges=True)

    def encode(self, text: str, allowed_special="all") -> list[int]:
        """The ids of `text`.

        `allowed_special` says which special tokens become their id where the text spells them:
        "all", "none" or a set; in what a user typed they should stay text. Bytes that a loaded
        vocabulary lacks are left out, as in `tokenizers`. Raises ValueError for lone surrogates.
        """
        ids = b"".join(self._encode(text, self._allowed(allowed_special)))
        return np.frombuffer(ids, "<u4").tolist()

    def encode_iterable(self, texts: Iterable[str], allowed_special="all") -> Iterator[int]:
        """Yields the ids of the concatenated `texts`, a file's lines, say, in constant memory."""
        allowed = self._allowed(allowed_special)
        can_cut = _can_cut(self.splitter, allowed)
        held, enough = "", STREAM_CHUNK
        for text in chain(texts, [None]):  # None: the end
            held += text or ""
            if text is not None and (len(held) < enough or not can_cut):
                continue
            match = LAST_CUT.search(held)
            cut = len(held) if text is None else match.start() if match else 0
            for ids in self._encode(held[:cut], allowed, STREAM_CHUNK, STREAM_CACHE_SIZE):
                yield from np.frombuffer(ids, "<u4").tolist()
            held = held[cut:]
            enough = STREAM_CHUNK + 2 * len(held)  # where nothing can be cut, try ever more rarely

    def encode_file(self, source, target, allowed_special="all", num_processes=None) -> int:
        """Writes the ids of a UTF-8 file to another, which appears when complete; returns how many.

        Flat little-endian uint16, or uint32 where `vocab_size` is above 65,536.
        """
        allowed = self._allowed(allowed_special)
        chunks, processes = _file_chunks(source, self.splitter, allowed, num_processes)
        results = _process_map(self._encode_chunk, (source, allowed), chunks, processes)
        return _write(target, results) // self.dtype.itemsize

    def _encode_chunk(self, path, allowed: frozenset[str], start: int, end: int) -> bytes:
        ids = b"".join(self._encode(_read_text(path, start, end), allowed))
        return np.frombuffer(ids, "<u4").astype(self.dtype).tobytes()

    def _allowed(self, allowed_special: str | Iterable[str]) -> frozenset[str]:
        if allowed_special == "none":
            return frozenset()
        allowed = frozenset(self.special_tokens if allowed_special == "all" else allowed_special)
        if unknown := allowed - self.special_tokens.keys():
            raise ValueError(f"allowed_special has {min(unknown)!r}, none of the special tokens")
        return allowed

    def _encode(self, text: str, allowed, size=TEXT_CHUNK, room=CACHE_SIZE) -> Iterator[bytes]:
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
        try:
            words = [piece.encode().translate(None, self._missing_bytes) for piece in new]
        except UnicodeEncodeError as error:
            half = f"text holds {error.object[error.start]!r}, half of a surrogate pair"
            raise ValueError(f"{half}: read it as UTF-8, or with errors='replace'") from None
        short = iter(self._merge_short([word for word in words if len(word) <= SHORT]))
        ids = (next(short) if len(w) <= SHORT else self._merge_long(w) for w in words)
        self._cache.update(zip(new, ids))

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
            read = BytesIO(ids.astype("<u4").tobytes()).read
            for i, count in zip(block, counts.tolist()):
                results[i] = read(4 * count)
        return results

    def _merge_block(self, words: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Merges all words at once, in each round the best pair of every word.

        Returns all ids in a row, and how many each word has. W words, the longest last; N columns,
        one more than that has bytes. Tokens stay in the column of their first byte.
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
        rank = rank_rows.ravel()  # a view: what is written to it shows in rank_rows
        previous = np.arange(-1, ids.size - 1)  # before a first token: the last column above it
        starts, rows = inside.ravel().copy(), np.arange(len(words))

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
        following, previous = [*range(1, n + 1), n], [*range(-1, n)]
        heap, changed = [], range(n)
        while True:
            for i in changed:
                rank = rank_of.get(ids[i] * base + ids[following[i]])
                if rank is not None:
                    heapq.heappush(heap, (rank, i))
            if not heap:
                break
            rank, i = heapq.heappop(heap)
            j, changed = following[i], ()
            if ids[i] >= 0 and rank_of.get(ids[i] * base + ids[j]) == rank:  # else out of date
                ids[i], ids[j] = int(self._product[rank]), -1
                following[i] = following[j]
                previous[following[i]] = i
                changed = (i, previous[i])
        return np.array([i for i in ids[:n] if i >= 0], "<u4").tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a list, array or tensor); bytes that are no UTF-8 become U+FFFD."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            return b"".join(map(self.vocab.__getitem__, ids)).decode("utf-8", errors="replace")
        except KeyError as error:
            raise ValueError(f"id {error} is not in the vocabulary: another encoded it") from None

    def save(self, directory) -> None:
        """Writes `tokenizer.json` in Hugging Face's format, and what `AutoTokenizer` asks for."""
        special = {i: token for token, i in self.special_tokens.items()}
        plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        added = [dict(id=i, content=special[i], **plain, special=True) for i in sorted(special)]
        split = dict(type="Split", pattern={"Regex": self.splitter.pattern})
        split |= dict(behavior="Isolated", invert=False)
        byte_level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
        byte_level["use_regex"] = False
        unused = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
        model = {"type": "BPE", **dict.fromkeys(unused), "fuse_unk": False, "byte_fallback": False}
        model["ignore_merges"] = self.ignore_merges
        vocab = sorted(self.vocab.items())
        model["vocab"] = {special.get(i) or _to_visible(token): i for i, token in vocab}
        model["merges"] = [f"{_to_visible(a)} {_to_visible(b)}" for a, b in self.merges]
        document = dict(version="1.0", truncation=None, padding=None, added_tokens=added)
        document["normalizer"] = {"type": self.normalizer} if self.normalizer else None
        document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
        document |= dict(post_processor=None, decoder=byte_level, model=model)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 10**30}
        config["clean_up_tokenization_spaces"] = False
        if END_OF_TEXT in self.special_tokens:
            config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in (("tokenizer.json", document), ("tokenizer_config.json", config)):
            text = json.dumps(content, ensure_ascii=False, indent=1)
            _write(Path(directory) / name, [text.encode()])

    @classmethod
    def load(cls, directory) -> "Tokenizer":
        """A byte-level BPE from `tokenizer.json` (or from the directory that holds it).

        Reads what `save` writes and the files of GPT-2, Llama 3, Qwen, SmolLM2 and their like, but
        adds no tokens around a text. Raises ValueError for a file that asks for something else.
        """
        path = Path(directory)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            model = document["model"]
            if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
                raise LookupError(f"a model of type {model.get('type')}")
            special = {token["content"]: token["id"] for token in document["added_tokens"]}
            names = model["vocab"].items()
            vocab = {i: t.encode() if t in special else _from_visible(t) for t, i in names}
            pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
            merges = [(_from_visible(a), _from_visible(b)) for a, b in pairs]
            pattern = _pattern_from_json(document["pre_tokenizer"])
            normalizer = document.get("normalizer")
            steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
            if any(step["type"] != "NFC" for step in steps):
                raise LookupError(f"an unknown normalizer: {normalizer}")
            whole = model.get("ignore_merges")
            tokenizer = cls(vocab, merges, special, pattern, ignore_merges=whole)
            tokenizer.normalizer = "NFC" if steps else None
            return tokenizer
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}; train one first") from None
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            what = "is no tokenizer.json of a byte-level BPE known here"
            raise ValueError(f"{path} {what} ({error!r}): use or train another") from None


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
    *kinds, last = [step["type"] for step in steps]
    if last == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        gpt2 = steps[-1].get("use_regex", True)  # whether this step cuts, too
        if gpt2 and not kinds:
            return GPT2_PATTERN
        if gpt2 and kinds == ["Digits"] and steps[0]["individual_digits"]:
            return SMOLLM2_PATTERN
        if not gpt2 and kinds == ["Split"] and steps[0]["behavior"] == "Isolated":
            return steps[0]["pattern"]["Regex"]
    raise LookupError(f"an unknown pre_tokenizer: {steps}")


def _check_special_tokens(tokens: Iterable[str]) -> list[str]:
    if isinstance(tokens, str):
        raise ValueError(f"special_tokens is the string {tokens!r}: give a list of strings")
    for token in (tokens := list(dict.fromkeys(tokens))):
        if not isinstance(token, str) or not token or regex.search(r"\p{Cs}", token):
            raise ValueError(f"special token {token!r} is not a non-empty string of characters")
    return tokens


def _split_special(text: str, tokens: frozenset[str]) -> list[str]:
    """`text` cut at special tokens, the longest first; they are every other part."""
    if not any(token in text for token in tokens):  # far faster to find out than the expression
        return [text]
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def _can_cut(splitter: Splitter, special_tokens: Iterable[str]) -> bool:
    """Whether `CUT` is safe: other patterns, and special tokens with spaces, may reach across."""
    return splitter.known and not re.search(r"\s", "".join(special_tokens))


def _file_chunks(path, splitter: Splitter, special_tokens, num_processes: int | None):
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
        raise ValueError(f"cannot read the corpus {path}: {error.strerror}; give text") from None
    if not size:
        raise ValueError(f"the corpus {path} is empty: give a UTF-8 text file")
    return list(zip(cuts, [*cuts[1:], size])), processes


def _read_text(path, start: int, end: int) -> str:
    with open(path, "rb") as file:
        file.seek(start)
        data = file.read(end - start)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{data[error.start]:02x} at offset {start + error.start}"
        raise ValueError(f"{path} is not UTF-8 text: {where}; convert or leave it out") from None


def _process_map(function, shared: tuple, jobs: list[tuple], processes: int) -> Iterator:
    """Yields `function(*shared, *job)` for each job, in order, from several processes."""
    if processes == 1 or len(jobs) == 1:
        yield from starmap(partial(function, *shared), jobs)
        return
    # A forked process starts at once and holds `shared` already.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with context.Pool(min(processes, len(jobs)), _start_process, (function, shared)) as pool:
        yield from pool.imap(_run_job, jobs)


def _start_process(function, shared: tuple) -> None:
    global _work
    _work = partial(function, *shared)


def _run_job(job: tuple):
    return _work(*job)


def _write(path, parts: Iterable[bytes]) -> int:
    """Writes a file that takes its name only when complete on disk; returns its size."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            size = sum(map(file.write, parts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        return size
    finally:
        temporary.unlink(missing_ok=True)
