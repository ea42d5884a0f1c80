"""Pictures of the studies of concepts: who picks the next line, what writes how, what context adds.

Parent: none
New: everything
"""

from matplotlib.figure import Figure

GREY, BLUE, RED = "#999999", "#1f5fa8", "#c44e52"


def bars(axes, values, errors=None, colours=None, form="{:.1%}"):
    """Horizontal bars of {name: number}, the first at the top, each with its number behind it."""
    names = list(values)
    axes.barh(names, values.values(), xerr=errors, color=colours or BLUE, error_kw=dict(lw=1))
    for i, name in enumerate(names):
        behind = values[name] + (errors[i] if errors else 0)
        axes.text(behind, i, "  " + form.format(values[name]), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def draw_picks(picks, path):
    """{way: (share, standard error)}: how often the true next line is put first. Writes a PNG."""
    axes = (figure := Figure(figsize=(8, 4))).subplots()
    colour = {"contrast": BLUE, "codes": BLUE, "regression": BLUE, "tokens": RED}
    colours = [colour.get(name.split(",")[0], GREY) for name in picks]
    shares, errors = ({name: x[i] for name, x in picks.items()} for i in (0, 1))
    bars(axes, shares, list(errors.values()), colours)
    axes.axvline(1 / 32, color="black", lw=0.8, ls=":")
    axes.set_xlabel("true next line picked among 32 (dotted: by chance; lines: one standard error)")
    figure.savefig(path, dpi=140, bbox_inches="tight")


def draw_context(retrieval, written, path):
    """Left MAP of lines of one scene and of one speaker, {what: {reading: (precision, MAP,
    chance)}}; right bits per byte of what each way writes, {who: dict(bits, bytes)}. Writes a
    PNG."""
    figure = Figure(figsize=(13, 4))
    axes = figure.subplots(1, 3)
    for i, (what, found) in enumerate(retrieval.items()):
        bars(axes[i], {name: x[1] for name, x in found.items()}, form="{:.3f}")
        axes[i].axvline(next(iter(found.values()))[2], color="black", lw=0.8, ls=":")
        axes[i].set_xlabel(f"MAP, lines of the same {what}\n(dotted: by chance)")
        if i:
            axes[i].set_yticklabels([])
    colours = [
        GREY if name == "the play" else RED if name == "tokens" else BLUE for name in written
    ]
    bars(axes[2], {name: x["bits"] for name, x in written.items()}, None, colours, "{:.2f}")
    axes[2].set_xlabel("bits per byte of what is written,\nas the token model reads it")
    figure.tight_layout()
    figure.savefig(path, dpi=140, bbox_inches="tight")
