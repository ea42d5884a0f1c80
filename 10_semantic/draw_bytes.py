"""Pictures of the study of bytes: the four models side by side, and where the patches fall.

Parent: none
New: everything
"""

from matplotlib.figure import Figure

TITLES = {
    "clean": "as printed",
    "typos 10%": "typos in\n10% of words",
    "typos 30%": "typos in\n30% of words",
    "lower": "lower case",
    "upper": "UPPER CASE",
    "random": "rAnDoM case",
}
COLOURS = {
    "bpe": "#444444",
    "bytes": "#c44e52",
    "ngrams": "#b9a03c",
    "fixed": "#8fb8de",
    "entropy": "#1f5fa8",
}
LABELS = {"bpe": "BPE tokens", "bytes": "plain bytes", "ngrams": "n-grams, no patches"}
LABELS |= {"fixed": "fixed patches", "entropy": "entropy patches"}
PATCHES = "#cfe2f3", "#fce5cd"  # two that alternate


def draw_scores(results, path):
    """Bars of bits per byte: {model: {condition: bits}} with the names above; writes a PNG."""
    axes = (figure := Figure(figsize=(12, 4))).subplots()
    width = 0.8 / len(results)
    for i, (name, row) in enumerate(results.items()):
        values = [row[key] for key in TITLES]
        x = [k + (i - (len(results) - 1) / 2) * width for k in range(len(values))]
        bars = axes.bar(x, values, width * 0.94, color=COLOURS[name], label=LABELS[name])
        axes.bar_label(bars, fmt="%.2f", fontsize=6, padding=2)
    axes.set_xticks(range(len(TITLES)), TITLES.values())
    axes.set_ylabel("bits per byte, held-out plays\n(lower is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.02, y=0.2)
    axes.legend(ncols=5, frameon=False, loc="upper left", fontsize=9)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_patches(lines, threshold, path):
    """Held-out lines, a background colour a patch, with the entropy of each byte as a curve above.

    lines: [(bytes, entropy, ends)], each of one length: the entropy, in bits, of the prediction OF
    each byte, and whether a patch ends with it. threshold in bits. Writes a PNG."""
    figure = Figure(figsize=(11, 1.35 * len(lines)))
    top = max([6, *(0.5 + max(entropy) for _, entropy, _ in lines)])
    longest = max((len(text) for text, _, _ in lines), default=1)
    rows = figure.subplots(len(lines), 1, squeeze=False)[:, 0]
    for axes, (text, entropy, ends) in zip(rows, lines, strict=True):
        begin = colour = 0
        for t, end in enumerate(ends):
            if end or t == len(text) - 1:
                axes.axvspan(begin - 0.5, t + 0.5, color=PATCHES[colour % 2], lw=0)
                begin, colour = t + 1, colour + 1
        axes.plot(range(len(text)), entropy, color="#1f5fa8", lw=1, marker=".", ms=3)
        axes.hlines(threshold, -0.5, len(text) - 0.5, color="#c44e52", lw=0.8, ls="--")
        for t, byte in enumerate(text):
            shown = {10: "⏎", 32: "·"}.get(byte, chr(byte) if 32 < byte < 127 else f"{byte:02x}")
            grey = byte in (10, 32)
            axes.text(
                t,
                -1.3,
                shown,
                ha="center",
                va="center",
                fontsize=10,
                family="DejaVu Sans Mono",
                color="#999999" if grey else "black",
            )
        axes.set(xlim=(-0.5, longest - 0.5), ylim=(-2.4, top), yticks=(0, 4), xticks=())
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.supylabel("entropy of the guess of each byte (bits)", fontsize=8, x=0.09)
    note = "a patch begins with a byte whose entropy is above the dashed line"
    figure.suptitle(note, fontsize=9, x=0.125, y=0.91, ha="left")
    figure.subplots_adjust(hspace=0.12)
    figure.savefig(path, dpi=150, bbox_inches="tight")
