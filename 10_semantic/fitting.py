"""The training loop of the studies: until a budget of FLOPs is spent, and on from where it stopped.

Parent: none
New: everything
"""

import signal
import sys
import time

import torch
from blocks import AdamW, clip_gradients, lr_schedule

import common


def fit(name, model, step, budget, lr, home=None, seed=0, weight_decay=0.1):
    """Train `model` in place until `budget` FLOPs are spent; returns dict(steps, flops, seconds).

    step(generator) gives the loss of a batch drawn with it and the FLOPs of that step, forward and
    backward. The schedule runs over FLOPs, not steps: batches do not cost the same. With a
    directory `home`, `<name>.pt` there keeps what is trained: finished, it is loaded and nothing
    is done; begun, it goes on from there, exactly. Ctrl-C (exit 130) and SIGTERM (exit 0) save.
    Raises ValueError for a budget that does not pay for one step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr)
    optimizer.param_groups[0]["weight_decay"] = weight_decay
    cost, path, asked = dict(steps=0, flops=0, seconds=0.0), home and home / f"{name}.pt", []
    finished = False
    if path and path.exists():
        try:
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
        except Exception as error:
            raise ValueError(f"{path} is damaged, remove it: {error}") from None
        cost, finished = state["cost"], state["finished"]
        if not finished:
            optimizer.load_state_dict(state["optimizer"])
            generator.set_state(state["generator"])
            torch.set_rng_state(state["torch"])
    if finished:
        return cost

    def save(finished):
        state = dict(model=model.state_dict(), cost=cost, finished=finished)
        if not finished:
            state |= dict(optimizer=optimizer.state_dict(), generator=generator.get_state())
            state |= dict(torch=torch.get_rng_state())
        with common.atomic(path) as file:
            torch.save(state, file)

    # A step is whole or not at all: a signal waits for its end.
    caught = {
        s: signal.signal(s, lambda s, _: asked.append(s)) for s in (signal.SIGINT, signal.SIGTERM)
    }
    bar = common.progress(
        total=round(budget / 1e9), initial=round(cost["flops"] / 1e9), desc=name, unit="GFLOP"
    )
    begin = time.perf_counter() - cost["seconds"]
    model.train()
    try:
        while not asked:
            loss, flops = step(generator)
            if cost["flops"] + flops > budget:
                break
            loss.backward()
            clip_gradients(model.parameters(), 1.0)
            cost = dict(
                steps=cost["steps"] + 1,
                flops=cost["flops"] + flops,
                seconds=time.perf_counter() - begin,
            )
            rate = lr_schedule(cost["flops"], lr, 0.02 * lr, 0.03 * budget, budget)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(round(cost["flops"] / 1e9) - bar.n)
    finally:
        bar.close()
        for which, handler in caught.items():
            signal.signal(which, handler)
    if not cost["steps"]:
        raise ValueError(f"{budget:.2g} FLOPs do not pay for one step of {name}, {flops:.2g}")
    if path:
        save(finished=not asked)
    if asked:
        saved = "and saved: the same command goes on" if path else "and not saved"
        print(f"{name}: stopped after {cost['steps']} steps {saved}")
        sys.exit(130 if asked[0] == signal.SIGINT else 0)
    model.eval()
    return cost
