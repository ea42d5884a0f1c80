"""What the studies of concepts read: lines, for plays with their scene and speaker, as rows of ids.

Parent: none
New: everything
"""

from dataclasses import dataclass, field

import torch

import common

WRAP = 100  # longest line of other text, bytes: longer ones are cut at a space
TOKENS = 128  # longest line, tokens


@dataclass
class Lines:
    """Lines in order; `speaker`, `scene` and `play` number those of each line, -1 where there are
    none, and `names` has the speakers' names."""

    text: list = field(default_factory=list)
    speaker: list = field(default_factory=list)
    scene: list = field(default_factory=list)
    play: list = field(default_factory=list)
    names: list = field(default_factory=list)

    def __len__(self):
        return len(self.text)


def play_lines(names):
    """The spoken lines of these plays, without the speakers' names above them."""
    lines, speakers, all_plays = Lines(), {}, common.plays()
    for number, name in enumerate(names):
        for kind, speaker, text in all_plays[name]:
            if kind == "scene" or not lines.scene or lines.play[-1:] != [number]:
                scene = lines.scene[-1] + 1 if lines.scene else 0
            for line in filter(None, map(str.strip, text.split("\n") if kind == "speech" else [])):
                lines.text.append(line)
                lines.speaker.append(speakers.setdefault((name, speaker), len(speakers)))
                lines.scene.append(scene)
                lines.play.append(number)
    lines.names = [speaker for _, speaker in speakers]
    return lines


def text_lines(text):
    """The lines of any text that are not empty, those longer than WRAP cut at spaces."""
    lines = Lines()
    for line in text.replace(common.EOT, "\n").splitlines():
        line = " ".join(line.split())
        while len(line.encode()) > WRAP:
            head = line.encode()[:WRAP].decode(errors="ignore")  # without half a character
            cut = head.rfind(" ") if " " in head else len(head)
            lines.text.append(line[:cut])
            line = line[cut:].strip()
        lines.text += [line] if line else []
    lines.speaker = lines.scene = lines.play = [-1] * len(lines)
    return lines


def read(data="plays"):
    """(lines to train on, lines held out) of the plays, or of what common.corpus takes."""
    if data == "plays":
        rest = [name for name in common.plays() if name not in common.HELD_OUT]
        return play_lines(rest), play_lines(common.HELD_OUT)
    home = common.corpus(data)
    parts = [home / name for name in ("train.txt", "val.txt")]
    return tuple(text_lines(path.read_text(encoding="utf-8")) for path in parts)


def table(texts, tokenizer, end):
    """Lines as int64 (N, T): their ids, the id `end`, -1 behind it. Raises ValueError for a line of
    more than TOKENS."""
    rows = [[*tokenizer.encode(text, special=False), end] for text in texts]
    longest = max(map(len, rows))
    if longest > TOKENS:
        line = texts[[len(row) for row in rows].index(longest)]
        raise ValueError(f"a line has {longest} tokens, more than {TOKENS}: {line[:40]!r}...")
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
