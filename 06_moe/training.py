"""Training a mixture: Muon for stacks of matrices, and what to watch while experts share the work.

What it teaches: nothing about training that 05_scaling/scaling.py does not, but what experts change
in it: a stack of matrices is orthogonalised matrix by matrix, an expert without a token rests, the
losses and the bias of the routers, and gradients of experts that other ranks do not have.

Parent: 04_modern/modern.py (AdamW, compiled, train); 05_scaling/scaling.py (TokenLoader,
    lr_schedule, orthogonalise, evaluate, Muon, clip_gradients, TrainConfig)
New: optimizers_of, Watch, save_state, newest_state, load_state
Changed: Muon, clip_gradients, TrainConfig, train

Read in this order: Muon, Watch, then train.

Papers
- Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale: Liu et al. 2025, 2502.16982
- Balance by a bias: Wang et al. 2024, arXiv 2408.15664
"""

import math
import queue
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from common import atomic

IGNORE = -100  # what a TokenLoader with `eot` marks; no loss of this stage knows it

# ---- optimizers


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, on matrices only (Loshchilov and Hutter 2017).

    m and v are running means of the gradient and its square; dividing by 1 - beta^t undoes their
    start from 0. The base class gives zero_grad, param_groups and state_dict."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, eps, (beta1, beta2) = group["lr"], group["eps"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["step"] += 1
                m, v, t = state["m"], state["v"], state["step"]
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                if p.ndim >= 2:
                    p.mul_(1 - lr * group["weight_decay"])
                # p -= lr m' / (sqrt(v') + eps), with m' = m / (1 - beta1^t), v' = v / (1 - beta2^t)
                root = math.sqrt(1 - beta2**t)
                p.addcdiv_(m, v.sqrt().add_(eps * root), value=-lr * root / (1 - beta1**t))


def orthogonalise(matrices, steps=5):
    """Roughly U Vᵀ of each matrix U S Vᵀ, (n, rows, columns): values of S above 0.002 of the norm
    come to between 0.7 and 1.2: rare directions count like common ones (Jordan et al. 2024).

    A step maps a singular value s to a s + b s³ + c s⁵, whose large slope at 0 lifts small ones."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()  # a CPU is faster in float32
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # so that the gram matrix is of the smaller side
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value is above 1
    one = torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
    for _ in range(steps):
        gram = x @ x.mT
        x = (a * one + b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).type_as(matrices)


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices (Jordan et al. 2024) and stacks of them, (E, rows,
    columns). A group with `parts`, row counts, holds matrices that are several under one another. A
    step is an orthogonal matrix times 0.2 sqrt(max(rows, columns)), as large as one of AdamW (Liu
    et al. 2025). Matrices of one shape go together, which is faster.

    An expert without a token rests: what is left of its momentum would otherwise be normalised to a
    whole step, and decay would wear it away."""

    together = 2**24  # numbers in the matrices that are orthogonalised at once

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike, momentum = {}, group["momentum"]
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["m"] = torch.zeros_like(p)
                    m = state["m"].mul_(momentum).add_(p.grad)
                    nesterov = (p.grad + momentum * m).view(-1, *p.shape[-2:])  # (n, rows, columns)
                    alike.setdefault(p.shape[-2:], []).append((p, nesterov))
            for shape, found in alike.items():
                params, stacks = zip(*found)
                steps, n = [], max(1, self.together // shape.numel())
                for piece in torch.cat(stacks).split(n):
                    parts = piece.split(group.get("parts") or shape[0], dim=1)
                    ones = [orthogonalise(x) * (0.2 * math.sqrt(max(x.shape[1:]))) for x in parts]
                    steps.append(torch.cat(ones, dim=1))
                steps = torch.cat(steps).split(list(map(len, stacks)))
                for p, step in zip(params, steps):
                    busy = p.grad.view_as(step).any(-1).any(-1)[:, None, None] * group["lr"]
                    p.view_as(step).mul_(1 - busy * group["weight_decay"]).sub_(busy * step)


def optimizers_of(model, config):
    """Muon for the matrices of the blocks, AdamW for embedding, routers and vectors; or AdamW for
    all."""
    shape, groups, rest = model.config, {}, []
    heads = [n * shape.head_dim for n in (shape.n_heads, *2 * [shape.n_kv_heads])]
    for name, p in model.named_parameters():
        if "blocks" not in name or p.ndim < 2 or "router" in name or config.optimizer == "adamw":
            rest.append(p)
        else:
            parts = heads if "qkv" in name else 2 * [len(p) // 2] if "gate_up" in name else None
            groups.setdefault(str(parts), dict(params=[], parts=parts))["params"].append(p)
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    found = [AdamW(rest, config.max_lr, betas, weight_decay=decay)]
    if groups:
        found.append(Muon(groups.values(), config.max_lr, config.momentum, decay))
    return found


def lr_schedule(step, max_lr, min_lr, warmup_steps, total_steps, kind="cosine", decay_share=0.4):
    """Learning rate: up in a line to max_lr at warmup_steps, then down to min_lr at total_steps.

    cosine: along half a cosine; linear: along a line; wsd: max_lr until decay_share of all steps is
    left, then along a line (Hu et al. 2024), so that a run can go on from before its decay. It
    depends on nothing but `step`: a resume cannot restart it. ValueError for another kind."""
    if kind not in ("cosine", "linear", "wsd"):
        raise ValueError(f"schedule {kind} is none of cosine, linear and wsd")
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    start = warmup_steps
    if kind == "wsd":
        start = max(warmup_steps, round((1 - decay_share) * total_steps))
    progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
    share = 1 - progress if kind != "cosine" else 0.5 * (1 + math.cos(math.pi * progress))
    return min_lr + (max_lr - min_lr) * share


def clip_gradients(model, max_norm):
    """Scale all gradients together so that their joint 2-norm is at most max_norm; returns the norm
    before. Where experts are spread over ranks, those of all of them count."""
    squares = torch.zeros(2, device=model.token_embedding.weight.device)  # shared, spread
    grads = []
    for name, p in model.named_parameters():
        if p.grad is not None:
            squares[int(".experts." in name)] += p.grad.square().sum()
            grads.append(p.grad)
    if model.world > 1:
        dist.all_reduce(squares[1:])
    norm = squares.sum().sqrt()
    if norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for g in grads:
            g.mul_(scale)
    return norm


# ---- data


class TokenLoader:
    """Batches of windows from token shards, in an order that the seed and the epoch determine.

    shards: 1-D integer arrays or memory maps. next(loader) is this rank's part of a batch of
    `batch_size` windows: ids and targets, int64 (batch_size / world, T), the targets one token
    further on; with `eot`, what follows an end of text is not predicted (IGNORE). An epoch has each
    window once, in a new order and from a new offset; ranks take every world-th one. A thread keeps
    `ahead` batches ready. `position`, the number of windows used so far, is all its state: set it
    before the first batch, or after close(), to go on from there with any number of ranks. Raises
    ValueError where no shard holds a window, or batch_size is not divisible by world."""

    def __init__(
        self, shards, context_length, batch_size, seed=1, rank=0, world=1, device="cpu", eot=None,
        ahead=4,
    ):  # fmt: skip
        if batch_size < 1 or batch_size % world:
            fix = f"make tokens_per_step a multiple of {world} x {context_length}"
            raise ValueError(
                f"a batch of {batch_size} sequences cannot be split over {world} ranks: {fix}"
            )
        self.shards = [shard for shard in shards if len(shard) > context_length]
        if not self.shards:
            raise ValueError(
                f"the longest shard has {max(map(len, shards), default=0)} tokens, context_length "
                f"{context_length} needs one more than that: take more text or a shorter context"
            )
        self.T, self.batch_size, self.seed, self.eot = context_length, batch_size, seed, eot
        self.rank, self.world, self.device, self.ahead = rank, world, torch.device(device), ahead
        self.counts = [max(1, (len(s) - self.T) // self.T) for s in self.shards]  # windows in each
        self.windows, self.order, self.thread, self.position = sum(self.counts), {}, None, 0

    def epoch(self, n):
        """(shard, start) of each window of epoch n, int64 (windows, 2), shuffled."""
        if n not in self.order:
            random, rows = np.random.default_rng((self.seed, n)), []
            for i, (shard, count) in enumerate(zip(self.shards, self.counts)):
                offset = random.integers(min(self.T, len(shard) - count * self.T))
                starts = offset + self.T * np.arange(count)
                rows.append(np.stack([np.full(count, i), starts], axis=1))
            self.order = {n: random.permutation(np.concatenate(rows))}
        return self.order[n]

    def batch(self, position):
        """The batch of the windows that follow `position`."""
        rows = []
        for i in range(position + self.rank, position + self.batch_size, self.world):
            shard, start = self.epoch(i // self.windows)[i % self.windows]
            rows.append(self.shards[shard][start : start + self.T + 1])
        windows = torch.from_numpy(np.stack(rows).astype(np.int64))  # (B, T + 1)
        if self.device.type == "cuda":  # pinned, so that the copy need not be waited for
            windows = windows.pin_memory().to(self.device, non_blocking=True)
        ids, targets = windows[:, :-1], windows[:, 1:]
        return ids, targets if self.eot is None else targets.masked_fill(ids == self.eot, IGNORE)

    def __next__(self):
        if self.thread is None:
            self.ready, self.stopped = queue.Queue(self.ahead), threading.Event()
            self.thread = threading.Thread(target=self.read, daemon=True, args=(self.position,))
            self.thread.start()
        item = self.ready.get()
        if isinstance(item, Exception):
            raise item
        self.position += self.batch_size
        return item

    def read(self, position):
        ready, stopped, item = self.ready, self.stopped, None
        while not stopped.is_set() and not isinstance(item, Exception):
            try:
                item, position = self.batch(position), position + self.batch_size
            except Exception as error:  # raised where the batch is asked for
                item = error
            while not stopped.is_set():
                with suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    break

    def close(self):
        """End the thread."""
        if self.thread is not None:
            self.stopped.set()
            self.thread.join()
            self.thread = None


@torch.no_grad()
def evaluate(model, tokens, context_length, max_tokens=None, batch_size=32, device="cpu"):
    """Mean loss in nats over non-overlapping windows of context_length from the start of `tokens`
    up to max_tokens (all, the last window shorter, where it is None)."""
    if len(tokens) < 2:
        raise ValueError(f"{len(tokens)} held-out tokens are too few: take more text")
    training = model.training
    model.eval()
    ids = torch.from_numpy(np.asarray(tokens[: max_tokens and max_tokens + 1], dtype=np.int64))
    n = len(ids) - 1  # targets
    whole = n // context_length * context_length
    windows = list(ids[:whole].view(-1, context_length).split(batch_size)) if whole else []
    targets = list(ids[1 : whole + 1].view(-1, context_length).split(batch_size)) if whole else []
    if whole < n:
        windows.append(ids[None, whole:n])
        targets.append(ids[None, whole + 1 : n + 1])
    total = 0.0
    for x, y in zip(windows, targets):
        total += model(x.to(device), y.to(device)).item() * y.numel()
    model.train(training)
    return total / n


# ---- training


@dataclass
class TrainConfig:
    """How to train; run.py chooses the values for the machine and preset."""

    steps: int = 1000  # optimizer steps
    tokens_per_step: int = 8192  # batch size, tokens, over all ranks
    micro_batch: int | None = None  # sequences at once on a rank; None: all
    optimizer: str = "muon"  # muon or adamw
    max_lr: float = 1e-3  # learning rate after the warm-up
    min_lr: float = 0.0  # learning rate at the end
    warmup_steps: int = 100  # steps of rising learning rate
    schedule: str = "wsd"  # cosine, linear or wsd (level, then down in a line)
    decay_share: float = 0.4  # share of the steps in which wsd goes down
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # AdamW's memory of squared gradients
    momentum: float = 0.95  # Muon's memory of gradients
    max_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 100  # steps between evaluations and checkpoints
    eval_tokens: int = 50_000  # held-out tokens in an evaluation
    patience: int = 10  # evaluations without a better loss before it stops early
    seed: int = 1  # of initialisation, batches and dropout
    compile: bool | None = None  # torch.compile; None: on CUDA

    def __post_init__(self):
        for name in ("steps", "tokens_per_step", "eval_every", "eval_tokens", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch is {self.micro_batch}: it must be at least 1")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer {self.optimizer} is neither muon nor adamw")
        lr_schedule(0, self.max_lr, self.min_lr, 1, 1, self.schedule)  # says if it is unknown


def compiled(model, wanted):
    """torch.compile, where it is wanted and a C compiler is there; otherwise the model as it is."""
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warnings.warn("no C compiler here: training without torch.compile, slower", stacklevel=2)
        wanted = False
    return torch.compile(model) if wanted else model


class Watch:
    """Sums up over the forward passes of a step, and over ranks, what the routers did."""

    def __init__(self, model):
        self.model, self.sums = model, None

    def add(self, share):
        """After a forward pass that is this share of the step."""
        rows = []
        for routing in (mixture.routing for mixture in self.model.mixtures()):
            means = torch.stack([routing.entropy, routing.dropped, routing.balance, routing.z])
            rows.append(torch.cat([routing.load, means.detach() * share]))
        if rows:
            rows = torch.stack(rows)  # (mixtures, E + 4)
            self.sums = rows if self.sums is None else self.sums + rows

    def finish(self):
        """Nudge the routers' biases; what to log of the step: each layer's shares of the load, its
        entropy, balance loss and z-loss, and the share of assignments dropped in all of them."""
        if self.sums is None:
            return {}
        sums, self.sums = self.sums, None
        if self.model.world > 1:
            dist.all_reduce(sums)
        E = self.model.config.n_experts
        load, (entropy, dropped, balance, z) = sums[:, :E], sums[:, E:].T
        for mixture, counts in zip(self.model.mixtures(), load):
            mixture.router.nudge(counts)
        share = load / load.sum(1, keepdim=True)
        lists = dict(load=share, entropy=entropy, balance_loss=balance, z_loss=z)
        lists = {k: [np.round(row, 4).tolist() for row in v.tolist()] for k, v in lists.items()}
        return lists | dict(dropped=round(dropped.mean().item(), 4))


def save_state(model, optimizers, state, run_dir, rank):
    """Weights, optimizers and random state beside the dict `state`, whole or not at all, as
    state-<rank>-<step>.pt. Older ones go when all ranks have written theirs."""
    everything = dict(model=model.state_dict(), rng=torch.get_rng_state(), **state)
    everything |= dict(optimizers=[optimizer.state_dict() for optimizer in optimizers])
    everything |= dict(cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    path = run_dir / f"state-{rank}-{state['step']}.pt"
    with atomic(path) as file:
        torch.save(everything, file)
    if model.world > 1:
        dist.barrier()
    for old in set(run_dir.glob(f"state-{rank}-*.pt")) - {path}:
        old.unlink()


def newest_state(run_dir, rank, world):
    """The state of this rank of the newest step that all ranks have one of, or None."""
    steps = [{int(path.stem.split("-")[2]) for path in run_dir.glob(f"state-{rank}-*.pt")}]
    if world > 1:
        mine, steps = steps[0], [None] * world
        dist.all_gather_object(steps, mine)
    step = max(set.intersection(*steps), default=None)
    return None if step is None else run_dir / f"state-{rank}-{step}.pt"


def load_state(src, model, optimizers):
    """Restore what save_state wrote; returns its `state`, among other things. Raises ValueError
    where the file is unreadable, truncated or of another model."""
    try:
        state = torch.load(src, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    except Exception as error:  # torch.load raises a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"checkpoint {src} cannot be read ({reason}): remove it, or start again with --fresh"
        ) from None
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    return state


def train(model, loader, val_tokens, config, run, device="cpu", dtype=torch.float32, **hooks):
    """Train a MoETransformerLM in place on the batches of `loader`; returns the last metrics.

    val_tokens: 1-D integer array. `run` has `dir`, `resume` and `log(**metrics)`, as common.Run. In
    run.dir: state-<rank>-<step>.pt, after each evaluation and when stopped, the newest only; and
    the model of the lowest validation loss as save_pretrained writes it. hooks: val_bytes, the size
    of the held-out text, for bits per byte; peak_flops, of the machine, for MFU; on_step(metrics),
    on the first rank. A model whose experts are spread over ranks is trained by all of them
    together. Ctrl-C and SIGTERM save, then exit with 130 and 0; a second one ends at once. Raises
    ValueError on a loss that is not finite; the state is then the last good one."""
    world = model.world
    rank, kind = dist.get_rank() if world > 1 else 0, torch.device(device).type
    micro = config.micro_batch or loader.batch_size
    optimizers, watch = optimizers_of(model, config), Watch(model)
    forward = compiled(model, kind == "cuda" if config.compile is None else config.compile)
    autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
    bits = len(val_tokens) / hooks.get("val_bytes", math.inf) / math.log(2)  # times nats
    peak, signals, line = hooks.get("peak_flops", math.inf), [], {}
    state = dict(step=0, position=0, best=math.inf, since_best=0, seconds=0.0)
    if run.resume and (path := newest_state(run.dir, rank, world)):
        found = load_state(path, model, optimizers)
        state = {name: found[name] for name in state}
    loader.position = state["position"]

    def stop(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def stopping():  # all ranks leave after the same step
        if world > 1:
            flag = torch.tensor(signals[:1] or [0], device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            signals.extend([flag.item()] if flag and not signals else [])
            return bool(flag)
        return bool(signals)

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    start = time.perf_counter() - state["seconds"]
    model.train()
    while state["step"] < config.steps and state["since_best"] < config.patience:
        if stopping():
            break
        began, step, loss = time.perf_counter(), state["step"] + 1, 0.0
        lr = lr_schedule(
            step, config.max_lr, config.min_lr, config.warmup_steps, config.steps, config.schedule,
            config.decay_share,
        )  # fmt: skip
        for ids, targets in zip(*(rows.split(micro) for rows in next(loader))):
            share = len(ids) / loader.batch_size  # each mean counts by its share of the batch
            with autocast:
                part = forward(ids, targets)
                whole = (part + model.auxiliary()) * share
            whole.backward()
            watch.add(share)
            loss += part.detach() * share
        if world > 1:  # a rank's gradients are of its own tokens; its experts have seen all
            for name, p in model.named_parameters():
                if ".experts." not in name:
                    dist.all_reduce(p.grad)
            dist.all_reduce(loss)
        loss, norm = loss.item(), clip_gradients(model, config.max_norm).item()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {step}: the loss is {loss}, the gradient norm {norm}: stopped; the "
                f"last good state is in {run.dir}; lower --max_lr or look at the text around there"
            )
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        tokens = loader.batch_size * loader.T
        rate = tokens / (time.perf_counter() - began)
        line = dict(step=step, time=0.0, tokens=step * tokens, train_loss=loss, lr=lr)
        line |= dict(grad_norm=norm, tokens_per_s=rate, mfu=rate * model.flops_per_token() / peak)
        line |= dict(val_loss=None, val_bpb=None) | watch.finish()
        state |= dict(step=step, position=loader.position)
        if evaluated := (step % config.eval_every == 0 or step == config.steps):
            size = max(1, 16384 // loader.T)
            with autocast:
                args = (model, val_tokens, loader.T, config.eval_tokens, size, device)
                val_loss = torch.tensor(evaluate(*args), dtype=torch.float64, device=device)
            if world > 1:  # all must agree whether this model is the best
                dist.broadcast(val_loss, 0)
            val_loss = val_loss.item()
            line |= dict(val_loss=val_loss, val_bpb=val_loss * bits)
            state["since_best"] = 0 if val_loss < state["best"] else state["since_best"] + 1
            if val_loss < state["best"]:
                state["best"] = val_loss
                model.save_pretrained(run.dir)
        line["time"] = state["seconds"] = round(time.perf_counter() - start, 3)
        if rank == 0:
            run.log(**line)
        if evaluated:
            save_state(model, optimizers, state, run.dir, rank)
        if "on_step" in hooks and rank == 0:
            hooks["on_step"](line)
    loader.close()
    for number, handler in before.items():
        signal.signal(number, handler)
    if signals:
        save_state(model, optimizers, state, run.dir, rank)
        if state["best"] == math.inf:  # no evaluation yet: this model is the best there is
            model.save_pretrained(run.dir)
        if rank == 0:
            print(f"stopped after step {state['step']} and saved: the same command goes on there")
        sys.exit(130 if signals[0] == signal.SIGINT else 0)
    return line
