"""The report of the four studies: one page of HTML that carries its pictures with it.

Parent: none
New: everything
"""

import base64
import html
import json
import os

import draw_bytes

import common

STYLE = """<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px; display: block;
  overflow-x: auto }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } .goal { font-weight: 600 } blockquote { color: #555 }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; font-size: 13px }
</style>"""
BITS = {
    "from_concept": "bits per byte, told from its concept",
    "exact": "share of lines told back exactly",
    "from_codes": "bits per byte, told from the codes of its concept",
    "exact_codes": "share of lines told back exactly from codes",
    "codes": "bits per byte of the codes of the next line, given the lines before",
    "codes_and_text": "bits per byte of the next line by way of its codes, both together",
    "from_regression": "bits per byte of the next line, told from the regression",
    "tokens": "bits per byte of the token model",
}


def table(rows):
    """HTML of rows of dicts: a column for each key."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["<tr>" + "".join(f"<th>{html.escape(key)}</th>" for key in keys) + "</tr>"]
    for row in rows:
        cells = (html.escape(str(row.get(key, ""))) for key in keys)
        lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table>{''.join(lines)}</table>"


def picture(path, says):
    """HTML of a PNG, within the page; `says` is for those who do not see it."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{html.escape(says)}"></p>'


def newest(home, name):
    """(directory, details) of the last finished run of a study; None where there is none."""
    found = sorted(home.glob(f"{name}-??????/details.json"), key=os.path.getmtime)
    return (found[-1].parent, json.loads(found[-1].read_text())) if found else None


def write(home):
    """report.html in `home` from the last run of each study; returns whether there was any."""
    tell = dict(concept=concept, context=context, hyperbolic=hyperbolic, bytes=of_bytes)
    found = {name: newest(home, name) for name in tell}
    body = "".join(tell[name](*run) for name, run in found.items() if run)
    if not body:
        return False
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'>{STYLE}"
    with common.atomic(home / "report.html", "w") as file:
        file.write(
            f"<!doctype html><html lang=en><head>{head}<title>10_semantic</title></head>"
            f"<body><h1>Models of meaning</h1>{body}</body></html>"
        )
    print(f"report: {home / 'report.html'}")
    return True


def concept(home, d):
    rates = [{"writes": who, "bytes a second": rate} for who, rate in d["speed"].items()]
    rows = [{"measured on held-out lines": BITS[name], "": x} for name, x in d["bits"].items()]
    costs = [
        {"fit": name, "steps": cost["steps"], "TFLOP": round(cost["flops"] / 1e12, 2)}
        for name, cost in d["costs"].items()
    ]
    return (
        "<h2>1. Concepts</h2><p>A line becomes one vector, its concept, from which its words can be"
        " told. A small transformer over the concepts of the last 32 lines says what comes next; a"
        " token model has the same lines and the same training FLOPs.</p>"
        + picture(home / "picks.png", "how often each model picks the true next line")
        + table(rows)
        + table(rates)
        + table(costs)
    )


def context(home, d):
    wins = [{"thought units against plain decoding": kind, **x} for kind, x in d["wins"].items()]
    return (
        "<h2>2. Context and thought units</h2><p>The same line in another scene leads elsewhere:"
        " mean cosines of what lines lead to.</p>"
        + table([d["moved"]])
        + picture(home / "context.png", "retrieval of scene and speaker; bits of what is written")
        + "<p>A thought unit is the best of several next concepts, each drawn and told, as the"
        " concept model finds on reading it.</p>"
        + table(wins)
        + "".join(samples(*one) for one in d["samples"])
    )


def samples(before, written):
    """HTML of what each way writes behind some lines."""
    lines = "".join(f"{html.escape(line)}<br>" for line in before)
    rows = [{"written by": who, "next line": line} for who, line in written.items()]
    return f"<blockquote>{lines}</blockquote>{table(rows)}"


def hyperbolic(home, d):
    return (
        "<h2>3. Hyperbolic space</h2><p>A tree grows as fast as a hyperbolic ball does, and much"
        " faster than a flat one. MAP and mean rank say how well the ancestors of a node are read"
        " off distances.</p>"
        + table([{"tree": name, **x} for name, x in d["trees"].items()])
        + picture(home / "curves.png", "MAP and mean rank against the dimension")
        + table(d["results"])
        + picture(home / "disc.png", "the Poincaré disc with its tree")
    )


def of_bytes(home, d):
    rows = [
        {"model": draw_bytes.LABELS[name]}
        | {" ".join(title.split()): row[key] for key, title in draw_bytes.TITLES.items()}
        | {"parameters": row["parameters"], "of them in tables": row["looked_up"]}
        for name, row in d["results"].items()
    ]
    return (
        "<h2>4. Without a tokenizer</h2><p>Bits per byte of five models at the same training FLOPs;"
        f" entropy patches have {d['mean_patch']} bytes on average.</p>"
        + picture(home / "scores.png", "bits per byte, as printed, with typos and in other cases")
        + table(rows)
        + picture(home / "patches.png", "where entropy patches fall in held-out lines")
    )
