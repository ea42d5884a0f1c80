"""Debugging habits for a model and its training loop, run on whatever gpt.py now holds.

After any change to the model: is the loss right before training, can no token see the future, are
the gradients those of the loss? After any change to the loop: does it overfit one batch, does
memory stay flat, and does it reach a loss that is known in advance? Each check below returns what
it saw and fails by AssertionError. The habits are collected in Karpathy 2019, A Recipe for Training
Neural Networks (karpathy.github.io/2019/04/25/recipe).
"""

import math
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import gpt
import numpy as np
import torch


def tiny(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, context_length=16, d_model=32, n_layers=2, n_heads=2)
    return gpt.GPT(gpt.GPTConfig(**shape | changes))


def train(model, tokens, on_step=lambda line: None, **config):
    """The real loop on a throwaway run directory; returns the last line of metrics."""
    with tempfile.TemporaryDirectory() as out:
        run = SimpleNamespace(dir=Path(out), resume=False, log=lambda **line: None)
        return gpt.train(model, tokens, tokens, gpt.TrainConfig(**config), run, on_step=on_step)


def initial_loss():
    """An untrained model guesses evenly: its loss is ln V."""
    model = tiny(vocab_size=5000)
    ids = torch.randint(5000, (2, 8, 16))
    loss, expected = model(*ids).item(), math.log(5000)
    assert abs(loss / expected - 1) < 0.01, f"loss {loss:.3f}, ln V is {expected:.3f}"
    return f"{loss:.3f}, ln V is {expected:.3f}"


def causality():
    """Changing a token changes no earlier logits, and all later ones."""
    model = tiny().eval()
    ids = torch.randint(50, (1, 16))
    before = model(ids)
    for t in range(1, 16):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % 50
        after = model(changed)
        seen = (after - before).abs().amax((0, 2)) > 1e-6  # (T,)
        assert not seen[:t].any(), f"logits before position {t} depend on the token there"
        assert seen[t:].all(), f"some logits from position {t} on ignore the token there"
    return "no position sees a later one, each sees all earlier ones"


def gradients():
    """The backward pass agrees with finite differences in float64, for every parameter."""
    model = tiny(vocab_size=7, context_length=4, d_model=4, n_layers=1).double()
    ids, targets = torch.randint(7, (2, 2, 4))
    names, params = zip(*model.named_parameters())

    def loss(*values):
        return torch.func.functional_call(model, dict(zip(names, values)), (ids, targets))

    assert torch.autograd.gradcheck(loss, params), "gradients differ from finite differences"
    return f"{sum(p.numel() for p in params)} partial derivatives agree"


def overfits_one_batch():
    """A loop that learns at all drives the loss on one window to near 0."""
    tokens = np.random.default_rng(0).integers(0, 50, 17)  # one window is all there is
    config = dict(steps=150, tokens_per_step=64, max_lr=1e-2, warmup_steps=10, eval_every=150)
    line = train(tiny(), tokens, weight_decay=0.0, **config)
    assert line["train_loss"] < 0.05, f"the loss stays at {line['train_loss']:.3f}"
    return f"loss {line['train_loss']:.4f} after 150 steps"


def memory_stays_flat():
    """200 more steps take no more memory: no graph or list grows behind the loop's back."""
    sizes = {}

    def on_step(line):
        if line["step"] in (50, 250):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            sizes[line["step"]] = pages * 4096 / 2**20

    if not Path("/proc/self/statm").exists():
        return "not measured: no /proc here"
    tokens = np.random.default_rng(0).integers(0, 50, 10_000)
    config = dict(steps=250, tokens_per_step=512, eval_every=250)
    train(tiny(d_model=64, context_length=64), tokens, on_step, **config)
    growth = sizes[250] - sizes[50]
    assert growth < 50, f"memory grew by {growth:.0f} MiB in 200 steps"
    return f"{growth:+.1f} MiB in 200 steps"


def reaches_known_entropy():
    """No model can beat the entropy of a Markov chain on its text; this one gets within 2%."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(8, 0.4), size=8)  # row i: probabilities of what follows i
    cumulative, draws = chain.cumsum(1), rng.random(60_000)
    tokens = np.zeros(60_000, dtype=np.int64)
    for t in range(1, len(tokens)):
        tokens[t] = min(np.searchsorted(cumulative[tokens[t - 1]], draws[t]), 7)
    # The entropy of this very text under the chain, so that no sampling error is left in it.
    entropy = -np.log(chain[tokens[:-1], tokens[1:]]).mean()
    config = dict(steps=400, tokens_per_step=1024, max_lr=1e-2, min_lr=0.0, warmup_steps=20)
    model = tiny(vocab_size=8, context_length=32, gelu="exact")
    loss = train(model, tokens, eval_every=400, **config)["val_loss"]
    assert loss / entropy < 1.02, f"loss {loss:.4f}, the chain's entropy is {entropy:.4f}"
    assert loss / entropy > 0.98, f"loss {loss:.4f} beats the entropy {entropy:.4f}: it cheats"
    return f"loss {loss:.4f}, the chain's entropy is {entropy:.4f}"


CHECKS = [
    initial_loss,
    causality,
    gradients,
    overfits_one_batch,
    memory_stays_flat,
    reaches_known_entropy,
]


def main():
    """Run all checks, print a line each; returns the exit code."""
    torch.set_num_threads(1)  # two threads only get in the way of models this small
    failed = 0
    for check in CHECKS:
        try:
            print(f"ok    {check.__name__}: {check()}", flush=True)
        except Exception as error:  # a broken fork may raise anything
            failed = 1
            print(f"FAIL  {check.__name__}: {str(error).splitlines()[0] or error!r}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
