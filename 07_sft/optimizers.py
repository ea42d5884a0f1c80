"""Optimizers, schedule, clipping and checkpoints, as in 04 and 05.

Parent: 04_modern/modern.py (AdamW, clip_gradients, compiled); 05_scaling/scaling.py (orthogonalise,
    Muon, lr_schedule)
New: optimizers_of, save_state, load_state
Changed: Muon

Papers
- AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101
- Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale: Liu et al. 2025, 2502.16982
"""

import math
import shutil
import warnings

import torch

from common import atomic


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
    """Orthogonalised momentum for matrices (Jordan et al. 2024). A group with `parts`, row counts,
    holds matrices that are several under one another. A step is an orthogonal matrix times 0.2
    sqrt(max(rows, columns)), as large as one of AdamW: both share one learning rate (Liu et al.
    2025). Matrices of one shape go together, which is faster."""

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.1):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike, momentum = {}, group["momentum"]
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p]["m"] = torch.zeros_like(p)
                    m = self.state[p]["m"].mul_(momentum).add_(p.grad)
                    alike.setdefault(p.shape, []).append((p, p.grad + momentum * m))
            for shape, found in alike.items():
                params, ahead = zip(*found)
                parts = torch.stack(ahead).split(group.get("parts") or shape[0], dim=1)
                steps = [orthogonalise(x) * (0.2 * math.sqrt(max(x.shape[1:]))) for x in parts]
                for p, step in zip(params, torch.cat(steps, dim=1)):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)


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


def clip_gradients(params, max_norm):
    """Scale all gradients together so that their joint 2-norm is at most max_norm; returns the norm
    before."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    if norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for g in grads:
            g.mul_(scale)
    return norm


def compiled(model, wanted):
    """torch.compile, where it is wanted and a C compiler is there; otherwise the model as it is."""
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warnings.warn("no C compiler here: training without torch.compile, slower", stacklevel=2)
        wanted = False
    return torch.compile(model) if wanted else model


def optimizers_of(model, config):
    """AdamW for all that is trained; or Muon for the matrices of the blocks and AdamW for the rest.
    `config` has optimizer, max_lr, weight_decay, beta1 and beta2."""
    groups, rest = {}, []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if "blocks." not in name or p.ndim < 2 or config.optimizer == "adamw":
            rest.append(p)
        else:
            shape = model.config
            heads = [n * shape.head_dim for n in (shape.n_heads, *2 * [shape.n_kv_heads])]
            parts = heads if name.endswith("qkv.weight") else None
            parts = 2 * [len(p) // 2] if name.endswith("gate_up.weight") else parts
            groups.setdefault(str(parts), dict(params=[], parts=parts))["params"].append(p)
    betas, decay = (config.beta1, config.beta2), config.weight_decay
    found = [AdamW(rest, config.max_lr, betas, weight_decay=decay)] if rest else []
    return found + ([Muon(groups.values(), config.max_lr, 0.95, decay)] if groups else [])


def save_state(model, optimizers, state, path):
    """Weights, optimizers and random state beside the dict `state`, whole or not at all."""
    everything = dict(model=model.state_dict(), rng=torch.get_rng_state(), **state)
    everything |= dict(optimizers=[optimizer.state_dict() for optimizer in optimizers])
    everything |= dict(cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
    with atomic(path) as file:
        torch.save(everything, file)


def load_state(path, model, optimizers):
    """Restore what save_state wrote; returns its `state`, among other things. Raises ValueError
    where the file is unreadable, truncated or of another model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
    except Exception as error:  # torch.load raises a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"checkpoint {path} cannot be read ({reason}): remove it, or start again with --fresh"
        ) from None
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    return state
