"""The scaling law at our own scale: loss as a function of parameters N and training tokens D.

What it teaches: Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3) fit L(N, D) = E + A / N^a +
B / D^b to the losses of many runs: E is what no model of this text gets below, the second term what
a small model lacks, the third what little training leaves. With it one can say before a long run
what it will reach, and how to split a budget of compute C = 6 N D: N grows with C^(b / (a + b)).
A law is only as good as its points: each must have a learning rate that suits it, so several are
tried and the best counts, and each needs a schedule of its own length.

Parent: none
New: everything

Read in this order: fit, sweep, plot.
"""

import json
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from scaling import TokenLoader, TrainConfig, Trainer, TransformerConfig, TransformerLM, evaluate


def solve(n, d, loss, a, b):
    """E, A, B by linear least squares for given exponents, and the sum of squared residuals."""
    x = np.stack([np.ones_like(n), n**-a, d**-b], axis=1)
    scale = np.abs(x).max(0)
    solution = np.linalg.lstsq(x / scale, loss, rcond=None)[0] / scale
    return solution, float(((x @ solution - loss) ** 2).sum())


def fit(n, d, loss):
    """L(N, D) = E + A / N^a + B / D^b by least squares: {name: (value, standard error)} for E, A,
    B, a and b, the same of the exponent b / (a + b) under "split", and rms, of the residuals.

    n, d and loss: 1-D arrays of one length. For given exponents the rest is linear: so these two
    are searched on a grid that is made finer around the best. Errors are those of the linearised
    problem, s² (JᵀJ)⁻¹ with s² from the residuals. ValueError with fewer than 6 points, or fewer
    than 3 different N or D."""
    n, d, loss = (np.asarray(x, dtype=np.float64) for x in (n, d, loss))
    if len(loss) < 6 or min(len(set(n)), len(set(d))) < 3:
        raise ValueError(
            f"5 unknowns cannot be fitted to {len(loss)} points of {len(set(n))} sizes and "
            f"{len(set(d))} budgets: take 6 or more, of 3 each"
        )
    middle = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    n, d = n / middle[0], d / middle[1]  # near 1, or the powers would lose digits
    a = b = 0.8
    width = 0.75
    for _ in range(30):
        steps = width * np.linspace(-1, 1, 7)
        grid = [(max(0.02, a + i), max(0.02, b + j)) for i in steps for j in steps]
        a, b = min(grid, key=lambda pair: solve(n, d, loss, *pair)[1])
        width *= 0.6
    (e, big_a, big_b), rest = solve(n, d, loss, a, b)
    x, y = n**-a, d**-b
    jacobian = np.stack([np.ones_like(n), x, y, -big_a * x * np.log(n), -big_b * y * np.log(d)], 1)
    variance = rest / max(1, len(loss) - 5)
    covariance = variance * np.linalg.pinv(jacobian.T @ jacobian)
    # Back from N and D over their means to N and D: A' = A m^a, which a moves, too.
    back = np.eye(5)
    for i, j, m, value in ((1, 3, middle[0], big_a), (2, 4, middle[1], big_b)):
        power = m ** (a if i == 1 else b)
        back[i, i], back[i, j] = power, value * power * math.log(m)
    covariance = back @ covariance @ back.T
    values = (e, big_a * middle[0] ** a, big_b * middle[1] ** b, a, b)
    found = {
        k: (float(v), float(s)) for k, v, s in zip("EABab", values, covariance.diagonal() ** 0.5)
    }
    gradient = np.array([-b, a]) / (a + b) ** 2
    error = math.sqrt(gradient @ covariance[3:, 3:] @ gradient)
    return found | dict(split=(b / (a + b), error), rms=math.sqrt(rest / len(loss)))


def predict(law, n, d):
    """L(N, D) of a fit."""
    e, big_a, big_b, a, b = (law[k][0] for k in "EABab")
    return e + big_a / n**a + big_b / d**b


def sweep(shapes, rates, budgets, base, tokens, val_tokens, vocab_size, where, say=print):
    """Train each (d_model, n_layers) of shapes with each learning rate to each budget of tokens;
    returns a dict for each run. Those that are in the file `where` already, from a sweep that was
    stopped or a smaller one, are not done again.

    base: fields of TrainConfig and TransformerConfig that all share; where: a .jsonl path. Sizes
    have heads of 32, half as many for keys and values; the warm-up is a twentieth of the steps."""
    known = [json.loads(line) for line in open(where)] if where.exists() else []
    rows, jobs = [], [(s, d, r) for d in sorted(budgets) for s in shapes for r in rates]
    for i, ((width, layers), budget, rate) in enumerate(jobs):
        steps = max(1, round(budget / base["tokens_per_step"]))
        key = base | dict(d_model=width, n_layers=layers, max_lr=rate, steps=steps)
        row = next((r for r in known if r["key"] == key), None)
        if row is None:
            torch.manual_seed(base["seed"])
            context, heads = base["context_length"], max(2, width // 32)
            config = TransformerConfig(
                vocab_size, context, width, layers, heads, heads // 2, qk_norm=False
            )
            settings = {k: v for k, v in key.items() if k in TrainConfig.__dataclass_fields__}
            warm = dict(warmup_steps=max(1, steps // 20))
            model = TransformerLM(config)
            loader = TokenLoader(tokens, context, base["tokens_per_step"] // context, base["seed"])
            trainer = Trainer(model, loader, None, TrainConfig(**settings, **warm), None, None)
            try:
                while trainer.step < steps:
                    trainer.train_step()
                loss = evaluate(model, val_tokens, context)
            except ValueError:  # it diverged: that is a result, too
                loss = None
            loader.close()
            n = (model.flops_per_token() - 12 * layers * width * context) // 6
            row = dict(key=key, N=n, D=steps * base["tokens_per_step"], loss=loss)
            with open(where, "a") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        text = "diverged" if row["loss"] is None else f"{row['loss']:.4f} nats per token"
        say(f"{i + 1}/{len(jobs)}: N {row['N']:,}, D {row['D']:,}, rate {rate:g}: {text}")
    return rows


def best(rows):
    """Of each size and budget the row whose learning rate did best."""
    found = {}
    for row in rows:
        if row["loss"] is not None:
            key = row["N"], row["D"]
            found[key] = min(found.get(key, row), row, key=lambda r: r["loss"])
    return [found[key] for key in sorted(found)]


def plot(rows, law, path):
    """Loss against tokens with the law's curves, and against learning rates at the most tokens."""
    left, right = (figure := Figure(figsize=(11, 4.5))).subplots(1, 2)
    sizes, most = sorted({r["N"] for r in rows}), max(r["D"] for r in rows)
    for i, n in enumerate(sizes):
        shade = (0.1, 0.3 + 0.5 * i / len(sizes), 0.9 - 0.7 * i / len(sizes))
        points = [(r["D"], r["loss"]) for r in best(rows) if r["N"] == n]
        left.plot(*zip(*points), "o", color=shade, label=f"N = {n:,}")
        d = np.geomspace(points[0][0], 2 * most, 50)
        left.plot(d, predict(law, n, d), "-", color=shade)
        points = [(r["key"]["max_lr"], r["loss"]) for r in rows if (r["N"], r["D"]) == (n, most)]
        right.plot(*zip(*sorted(p for p in points if p[1])), "o-", color=shade, label=f"N = {n:,}")
    left.set(xlabel="training tokens D", ylabel="held-out nats per token", xscale="log")
    left.set_title("points, and the law fitted to all of them")
    right.set(xlabel="learning rate", xscale="log", title=f"D = {most:,}")
    left.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")
