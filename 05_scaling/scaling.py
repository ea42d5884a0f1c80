"""Training at scale: the trainer grown up, from two CPU cores to many GPUs.

What this stage teaches: what a training run of a week needs beside a loop. Precision chosen by the
hardware; memory saved in four ways (accumulation, checkpointed activations, a loss that never holds
all logits, optimizer states in bfloat16); optimizers for matrices; tokens from many shards in an
order that any number of ranks agrees on; checkpoints that survive a kill, locally or on S3; several
GPUs through PyTorch's DDP and FSDP2. The model is the parent's, less what only generation needs.

Parent: 04_modern/modern.py (Linear, Embedding, RMSNorm, apply_rope, SwiGLU, TransformerConfig,
    rope_frequencies, Attention, Block, TransformerLM, AdamW, lr_schedule, clip_gradients, evaluate,
    compiled, TrainConfig)
New: document_mask, LinearCrossEntropy, local, stochastic_round, adam_update, orthogonalise, Muon,
    GaLore, TokenLoader, choose_precision, Trainer
Changed: TransformerConfig, rope_frequencies, Attention, Block, TransformerLM, AdamW, lr_schedule,
    clip_gradients, TrainConfig

Read in this order: TransformerLM.hidden, LinearCrossEntropy; AdamW, Muon, GaLore; TokenLoader;
Trainer.train_step, then the rest of Trainer. Beside it: store.py keeps checkpoints, shards.py turns
text into tokens, planner.py says on paper what a run will need.

Papers
- Mixed precision and loss scaling: Micikevicius et al. 2017, arXiv 1710.03740
- Checkpointed activations: Chen et al. 2016, arXiv 1604.06174
- Muon: Jordan et al. 2024, kellerjordan.github.io/posts/muon; scale: Liu et al. 2025, 2502.16982
- GaLore: Zhao et al. 2024, arXiv 2403.03507
- Warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395
- Sharded states: Rajbhandari et al. 2019 (ZeRO), arXiv 1910.02054; Zhao et al. 2023, 2304.11277

Shapes: B batch, T time (tokens), C = d_model, H heads, K heads of keys and values, D = head dim, V
vocab.
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import layout
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import tracking
from planner import plan  # noqa: F401, in a file of its own, as is the next
from store import CheckpointStore  # noqa: F401
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # as a target: not predicted, counts nowhere
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # dcp's, in a single process

# ---- the model


@dataclass
class TransformerConfig:
    """The shape of the model; the defaults are of GPT-2's size, 124M parameters."""

    vocab_size: int = 50304  # number of token ids
    context_length: int = 1024  # longest input, tokens
    d_model: int = 768  # width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # heads of queries in each block
    n_kv_heads: int | None = None  # heads of keys and values; None: as many as n_heads
    d_ff: int | None = None  # width inside the MLP; None is 8/3 d_model, up to a multiple of 32
    dropout: float = 0.0  # share of activations set to 0 in training
    rope_theta: float = 10_000.0  # pair i of a head turns theta^(-2i / head_dim) radians a token
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # use the token embedding as the output layer, too
    qk_norm: bool = True  # RMSNorm on each query and key, as in Qwen3

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.d_ff = self.d_ff or -(-8 * self.d_model // 3 // 32) * 32
        for name in "vocab_size context_length d_model n_layers n_heads n_kv_heads d_ff".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"d_model {self.d_model} is not divisible by twice n_heads {self.n_heads}: "
                "positions rotate pairs in each head"
            )
        if self.n_heads % self.n_kv_heads:
            heads = f"n_heads {self.n_heads} is not divisible by n_kv_heads"
            raise ValueError(f"{heads} {self.n_kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        self.head_dim = self.d_model // self.n_heads
        # Of initial weights. GPT-2's 0.02 is this at a width of 1,225; at 128 it learns far slower.
        self.std = 0.7 / math.sqrt(self.d_model)


class Linear(nn.Module):
    """y = x Wᵀ + b, (..., d_in) to (..., d_out). W is drawn from a normal cut at 3 std."""

    def __init__(self, d_in, d_out, bias=True, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, x):
        # One fused product and sum; x @ self.weight.T + self.bias is the same in two passes.
        return F.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """A learned vector for each id: (...) int64 to (..., d_model)."""

    def __init__(self, n_ids, d_model, std=0.02):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_ids, d_model))
        nn.init.trunc_normal_(self.weight, std=std, a=-3 * std, b=3 * std)

    def forward(self, ids):
        return self.weight[ids]


class RMSNorm(nn.Module):
    """Scale each vector to a mean square of 1, then by a learned weight: LayerNorm without the mean
    and the bias (Zhang and Sennrich 2019)."""

    def __init__(self, d_model, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # bfloat16 would lose digits
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).type_as(x) * self.weight


def rope_frequencies(config):
    """Radians that each pair of a head turns per token: theta^(-2i/D), float32 (D/2,)."""
    i = torch.arange(0, config.head_dim, 2, device="cpu").float()
    return config.rope_theta ** (-i / config.head_dim)


def apply_rope(x, cos, sin):
    """Rotate each pair (x[i], x[i + D/2]) of a head by the angle of its position (Su et al. 2021).

    x (..., T, D); cos and sin (..., T, D), as they broadcast: those of the D/2 angles twice over,
    the first half of the sines negative. The product of two vectors so rotated depends on how far
    apart they are and on nothing else."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share keys and values."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_dim, self.dropout = config.head_dim, config.dropout
        rows = (config.n_heads + 2 * config.n_kv_heads) * self.head_dim
        self.qkv = Linear(config.d_model, rows, False, config.std)
        # 2 n_layers sublayers add to the residual stream: scaled so, its variance does not grow.
        std = config.std / math.sqrt(2 * config.n_layers)
        self.out = Linear(config.d_model, config.d_model, False, std)
        norms = [RMSNorm(self.head_dim, config.norm_eps) for _ in "qk" if config.qk_norm]
        self.q_norm, self.k_norm = norms or (None, None)

    def forward(self, x, cos, sin, mask=None):
        """x (B, T, C) to the same; cos, sin as in apply_rope; mask (B, 1, T, T), None: causal."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        rotated = apply_rope(qk, cos, sin).type_as(v)  # both at once: half as many operations
        q, k = rotated.split([self.n_heads, self.n_kv_heads], dim=1)
        grouped = dict(enable_gqa=True) if self.n_heads != self.n_kv_heads else {}
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, mask is None, **grouped)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


class SwiGLU(nn.Module):
    """Each token alone: wider, one half gating the other through SiLU, back (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        self.gate_up = Linear(config.d_model, 2 * config.d_ff, False, config.std)
        std = config.std / math.sqrt(2 * config.n_layers)
        self.down = Linear(config.d_ff, config.d_model, False, std)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, d_ff)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added back to it."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, cos, sin, mask=None):
        x = x + self.dropout(self.attention(self.norm1(x), cos, sin, mask))
        return x + self.dropout(self.mlp(self.norm2(x)))


def document_mask(ids, eot):
    """Which tokens each token sees when a row holds several documents, each ended by `eot`: those
    before it in its own document. ids (B, T) to bool (B, 1, T, T), True where seen. Rotary
    positions need no reset: they act only by how far apart two tokens are."""
    ends = ids == eot
    document = ends.cumsum(1) - ends.long()  # the end belongs to the document that it ends
    same = document[:, None, :, None] == document[:, None, None, :]
    return same.tril()


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x Wᵀ in nats that never holds all logits (N, V): those of `chunk`
    tokens at a time become loss and gradients at once, so that nothing is kept for the backward
    pass but these, (N, C) and (V, C), and nothing is computed twice.

    x (N, C), weight (V, C), targets int64 (N,), where IGNORE counts as no token."""

    @staticmethod
    def forward(ctx, x, weight, targets, chunk):
        wanted = any(ctx.needs_input_grad[:2])
        dtype = torch.get_autocast_dtype(x.device.type)
        dtype = dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        w, count = weight.to(dtype), (targets != IGNORE).sum().clamp(min=1)
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        dx = torch.empty_like(x) if wanted else None
        dw = torch.zeros_like(weight, dtype=total.dtype) if wanted else None
        # (chunk, V), the same memory for all chunks; losses in bfloat16 would lose digits.
        logits = x.new_empty(min(chunk, len(x)), len(w), dtype=dtype)
        log_probs = torch.empty_like(logits, dtype=total.dtype)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), chunk):
                rows, part = slice(start, start + chunk), x[start : start + chunk].to(dtype)
                target, kept = targets[rows].clamp(min=0)[:, None], targets[rows] != IGNORE
                logits, log_probs = logits[: len(part)], log_probs[: len(part)]
                torch.mm(part, w.T, out=logits)
                torch.log_softmax(logits, -1, dtype=total.dtype, out=log_probs)
                total -= (log_probs.gather(1, target)[:, 0] * kept).sum()
                if wanted:  # the gradient of logits: probabilities less 1 at the target
                    probs = log_probs.exp_()
                    probs.scatter_add_(1, target, -torch.ones_like(target, dtype=total.dtype))
                    probs.mul_(kept[:, None])
                    probs = probs if probs.dtype == dtype else logits.copy_(probs)
                    dx[rows] = probs @ w
                    dw += probs.T @ part
        ctx.save_for_backward(dx, dw, count)
        ctx.dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, gradient):
        dx, dw, count = ctx.saved_tensors
        scale = gradient / count  # only now: in float16 a small share of 1 / N would be lost
        return dx * scale, (dw * scale).to(ctx.dtype), None, None


class TransformerLM(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar.

    ids and targets: int64 (B, T), T up to context_length; a target IGNORE is not counted. mask:
    bool (B, 1, T, T), as from document_mask; None is causal. `checkpointing` keeps only the input
    of each block and computes the rest again in the backward pass; logits are held of `loss_chunk`
    tokens at once. save_pretrained writes `tokenizer_files`, {name: text}, beside the weights."""

    def __init__(self, config, checkpointing=False, loss_chunk=2048):
        super().__init__()
        self.config, self.tokenizer_files = config, {}
        self.checkpointing, self.loss_chunk = checkpointing, loss_chunk
        self.token_embedding = Embedding(config.vocab_size, config.d_model, config.std)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size, False, config.std)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def hidden(self, ids, mask=None):
        """What the output layer sees: (B, T) to (B, T, C)."""
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit into {self.config.context_length}: crop them")
        angles = torch.arange(T, device=ids.device)[:, None] * self.frequencies  # (T, D/2)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()
        x = self.dropout(self.token_embedding(ids))  # (B, T, C)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask)
        return self.norm(x)

    def forward(self, ids, targets=None, mask=None):
        x = self.hidden(ids, mask)
        if targets is None:
            return self.output(x)  # (B, T, V)
        x = x.flatten(0, 1)  # (B T, C)
        return LinearCrossEntropy.apply(x, self.output.weight, targets.flatten(), self.loss_chunk)

    def flops_per_token(self):
        """Forward and backward pass at full context (Chowdhery et al. 2022); look-ups and what
        checkpointing computes twice do not count."""
        c, n = self.config, sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        products = 6 * (n + self.output.weight.numel())
        return products + 12 * c.n_layers * c.d_model * c.context_length

    @classmethod
    def from_pretrained(cls, path, device="cpu"):
        """A directory as save_pretrained writes it. ValueError where it is another, or a file or
        tensor is missing or misshapen."""
        fields, tensors = layout.read(Path(path))
        config = TransformerConfig(**fields)
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = cls(config)
        state = layout.assemble(tensors, model, path)
        model.load_state_dict(state, strict=False, assign=True)
        if config.tie_embeddings:
            model.output.weight = model.token_embedding.weight
        model.frequencies = rope_frequencies(config)
        model.tokenizer_files = layout.tokenizer_files(Path(path))
        return model.to(device)

    def save_pretrained(self, path):
        """Write config.json, model.safetensors (float32) and the tokenizer, if it is known, as
        `transformers` reads them (llama or qwen3), each file whole or not at all. With sharded
        parameters every rank calls it and the first one writes."""
        named = self.named_parameters()
        whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in named}
        if not dist.is_initialized() or dist.get_rank() == 0:
            layout.write(Path(path), self.config, whole, self.tokenizer_files)


# ---- optimizers


def local(x):
    """The part of a sharded tensor that this rank holds; any other tensor as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def stochastic_round(x, generator):
    """float32 to bfloat16, up or down by chance so that the mean is right. To the nearest, a
    running mean with beta 0.999 would stand still: it moves by 1/1000, bfloat16 by up to 1/128."""
    shape = dict(size=x.shape, dtype=torch.int32, device=x.device, generator=generator)
    bits = x.view(torch.int32) + torch.randint(1 << 16, **shape)
    return (bits & -(1 << 16)).view(torch.float32).bfloat16()


def adam_update(p, grad, m, v, lr, decay, beta1, beta2, eps, root, bias):
    """p -= lr (m' / (sqrt(v') + eps) + decay p), in place, where m' = m / bias and v' = v / root²
    are the running means of the gradient and its square, freed of their start from 0."""
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    p.mul_(1 - lr * decay)
    p.sub_(m / (v.sqrt() + eps * root) * (lr * root / bias))


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay, on matrices only (Loshchilov and Hutter 2017). m and v are
    kept in state_dtype; compile makes adam_update one kernel. The base class gives zero_grad,
    param_groups and state_dict."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
        state_dtype=torch.float32, compile=False,
    ):  # fmt: skip
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.state_dtype = state_dtype
        self.kernel = torch.compile(adam_update, dynamic=True) if compile else adam_update

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.init(p, group)
                    self.state[p]["step"] += 1
                    self.update(p, group)

    def init(self, p, group):
        """The state of p before its first step, where it has none yet."""
        if not self.state[p]:
            m, v = (torch.zeros_like(p, dtype=self.state_dtype) for _ in "mv")
            self.state[p] = dict(step=0, m=m, v=v)

    def update(self, p, group):
        if "v" in self.state[p]:  # else it is a matrix of Muon
            self.adam(local(p), local(p.grad), self.state[p], group, p.ndim >= 2)

    def adam(self, p, grad, state, group, decays):
        t, (beta1, beta2) = state["step"], group["betas"]
        m, v = local(state["m"]), local(state["v"])
        wide = (m, v) if m.dtype == p.dtype else (m.type_as(p), v.type_as(p))
        numbers = (group["lr"], group["weight_decay"] * decays, beta1, beta2, group["eps"])
        self.kernel(p, grad, *wide, *numbers, math.sqrt(1 - beta2**t), 1 - beta1**t)
        if wide[0] is not m:
            generator = torch.Generator(m.device).manual_seed(t)  # the same on every rank
            for narrow, values in zip((m, v), wide):
                narrow.copy_(stochastic_round(values, generator))


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


class Muon(AdamW):
    """Orthogonalised momentum for matrices (Jordan et al. 2024), AdamW for everything else.

    A group of params with adam=True is AdamW's: embedding and output layer; one with `parts`, row
    counts, holds matrices that are several under one another. A step is an orthogonal matrix times
    0.2 sqrt(max(rows, columns)), as large as one of AdamW: both share one learning rate (Liu et al.
    2025). Matrices of one shape go together, which is faster; a sharded one is gathered."""

    together = 2**24  # numbers in the matrices that are orthogonalised at once

    def __init__(self, params, lr=1e-3, momentum=0.95, **settings):
        super().__init__(params, lr, **settings)
        self.momentum = momentum

    def init(self, p, group):
        if group.get("adam") or p.ndim != 2:
            super().init(p, group)
        elif not self.state[p]:
            self.state[p] = dict(step=0, m=torch.zeros_like(p, dtype=self.state_dtype))

    @torch.no_grad()
    def step(self):
        super().step()
        for group in self.param_groups:
            alike = {}
            for p in group["params"]:
                if p.grad is not None and "v" not in self.state[p]:
                    alike.setdefault(p.shape, []).append(p)
            for shape, found in alike.items():
                n = max(1, self.together // shape.numel())
                for i in range(0, len(found), n):
                    self.muon(found[i : i + n], group)

    def muon(self, params, group):
        lr, ahead = group["lr"], []
        for p in params:
            m = self.state[p]["m"].mul_(self.momentum)
            m.add_(p.grad.type_as(m))
            nesterov = p.grad + self.momentum * m
            ahead.append(nesterov.full_tensor() if isinstance(p, DTensor) else nesterov)
        ahead, steps = torch.stack(ahead), []  # (n, rows, columns)
        for part in ahead.split(group.get("parts") or ahead.shape[1], dim=1):
            steps.append(orthogonalise(part) * (0.2 * math.sqrt(max(part.shape[1:]))))
        for p, step in zip(params, torch.cat(steps, dim=1)):
            if isinstance(p, DTensor):
                whole = DTensor.from_local(step, p.device_mesh, [Replicate()] * p.device_mesh.ndim)
                step = whole.redistribute(placements=p.placements).to_local()
            local(p).mul_(1 - lr * group["weight_decay"]).sub_(lr * step)


class GaLore(AdamW):
    """AdamW in `rank` dimensions: each matrix's gradient is projected on its leading singular
    vectors, found anew every `refresh` steps, so that m and v are small (Zhao et al. 2024). Groups
    with adam=True, vectors, and matrices no larger than rank are AdamW's."""

    def __init__(self, params, lr=1e-3, rank=128, refresh=200, scale=0.25, **settings):
        super().__init__(params, lr, **settings)
        self.rank, self.refresh, self.scale = rank, refresh, scale

    def init(self, p, group):
        if group.get("adam") or p.ndim != 2 or min(p.shape) <= self.rank:
            super().init(p, group)
        elif not self.state[p]:
            small, long = min(p.shape), max(p.shape)
            m, v = torch.zeros(2, self.rank, long, dtype=self.state_dtype, device=p.device)
            basis = torch.zeros(small, self.rank, dtype=p.dtype, device=p.device)
            self.state[p] = dict(step=0, m=m, v=v, basis=basis)

    def update(self, p, group):
        state, lr = self.state[p], group["lr"]
        if "basis" not in state:
            return super().update(p, group)
        tall = p.shape[0] > p.shape[1]
        grad = p.grad.mT if tall else p.grad  # (small, long)
        if state["step"] % self.refresh == 1:
            vectors = torch.linalg.svd(grad.float(), full_matrices=False).U
            state["basis"].copy_(vectors[:, : self.rank])
        step = torch.zeros_like(state["m"], dtype=p.dtype)  # (rank, long)
        self.adam(step, state["basis"].mT @ grad, state, group | {"lr": 1.0}, False)
        step = state["basis"] @ step  # minus the direction, (small, long)
        p.mul_(1 - lr * group["weight_decay"])
        p.add_(step.mT if tall else step, alpha=lr * self.scale)


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
    """Scale all gradients together so that their joint 2-norm, over all ranks' shards, is at most
    max_norm; returns the norm before."""
    grads = [p.grad for p in params if p.grad is not None]
    norms = [g.norm() for g in grads]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    if norm > max_norm:
        scale = max_norm / (norm + 1e-6)
        for g in grads:
            local(g).mul_(scale)
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
    micro_batch: int | None = None  # sequences at once, the rest is accumulated; None: what fits
    precision: str = "auto"  # fp32, tf32, bf16 or fp16; auto: bf16 on a GPU that has it, else fp32
    checkpointing: bool = False  # keep only each block's input and compute the rest again
    loss_chunk: int = 2048  # tokens whose logits are held at once
    optimizer: str = "muon"  # adamw, muon or galore
    state_dtype: str = "float32"  # of optimizer states: float32 or bfloat16
    max_lr: float = 1e-3  # learning rate after the warm-up
    min_lr: float = 0.0  # learning rate at the end
    warmup_steps: int = 100  # steps of rising learning rate
    schedule: str = "wsd"  # cosine, linear or wsd (level, then down in a line)
    decay_share: float = 0.4  # share of the steps in which wsd goes down
    weight_decay: float = 0.1  # on matrices
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # AdamW's memory of squared gradients
    momentum: float = 0.95  # Muon's memory of gradients
    galore_rank: int = 128  # dimensions that GaLore keeps of a gradient
    max_norm: float = 1.0  # gradients are clipped to this norm
    whole_documents: bool = False  # a token sees only its own document, none before an end of text
    eval_every: int = 100  # steps between evaluations
    eval_tokens: int = 50_000  # held-out tokens in an evaluation
    save_every: int | None = None  # steps between checkpoints; None: at each evaluation
    patience: int = 10  # evaluations without a better loss before it stops early
    seed: int = 1  # of initialisation, batches and dropout
    parallel: str = "ddp"  # with several ranks: ddp (a replica each) or fsdp (a share of all each)
    compile: bool | None = None  # torch.compile; None: on CUDA (on a CPU it takes half a minute)
    layer_norms: int = 0  # steps between records of norms by layer in layers.jsonl; 0: none
    profile: int = 0  # step after which three steps are traced into trace.json; 0: none
    tensorboard: bool = False  # write metrics for TensorBoard, too
    wandb: bool = False  # write metrics to Weights & Biases, too (WANDB_MODE=offline works)

    def __post_init__(self):
        for name in "steps tokens_per_step eval_every eval_tokens patience loss_chunk".split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        known = dict(precision="auto fp32 tf32 bf16 fp16", optimizer="adamw muon galore")
        known |= dict(state_dtype="float32 bfloat16", schedule="cosine linear wsd")
        for name, values in (known | dict(parallel="ddp fsdp")).items():
            if getattr(self, name) not in values.split():
                raise ValueError(f"{name} {getattr(self, name)} is none of {values}")
        if self.parallel == "fsdp" and (self.precision == "fp16" or self.optimizer == "galore"):
            raise ValueError("fsdp goes with neither fp16 nor galore: take bf16, adamw or muon")


def compiled(model, wanted):
    """torch.compile, where it is wanted and a C compiler is there; otherwise the model as it is."""
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warnings.warn("no C compiler here: training without torch.compile, slower", stacklevel=2)
        wanted = False
    return torch.compile(model) if wanted else model


def choose_precision(name, device):
    """(dtype of matrix products, why) for a precision of TrainConfig; sets TF32 where it is wanted.

    bfloat16 has float32's range and 3 digits; float16 has 4 digits and a smallest normal value of
    6e-5, so that its loss must be scaled. ValueError for bf16 on a GPU that has none."""
    cuda = device.type == "cuda"
    has_bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    why = dict(bf16="this GPU has it, and it needs no scaling", fp32="on a CPU it is the fastest")
    why |= dict(fp16="this GPU has no bfloat16; the loss is scaled")
    best = "bf16" if has_bf16 else "fp16" if cuda else "fp32"
    name, why = (best, why[best]) if name == "auto" else (name, "asked for")
    if name == "bf16" and cuda and not has_bf16:
        raise ValueError("this GPU has no bfloat16: take --precision fp16")
    if cuda:
        torch.set_float32_matmul_precision("highest" if name == "fp32" else "high")
    return dict(bf16=torch.bfloat16, fp16=torch.float16).get(name, torch.float32), f"{name}, {why}"


class Trainer:
    """Trains `model` in place on the batches of `loader`; fit() does all of it.

    val_tokens: 1-D integer array. run: has `dir` and `log(**metrics)`, as common.Run; the model of
    the lowest validation loss is saved there. store: a CheckpointStore, whose newest checkpoint, of
    any number of ranks, is gone on from; only the first rank has one, or, on S3 and without a
    shared disk, the first of each node. hooks: val_bytes, the size of the held-out text, for bits
    per byte; peak_flops, of all ranks' devices, for MFU; on_step(metrics), on the first rank. With
    torch.distributed initialised each rank makes one, with its own device and loader. Raises
    ValueError where the checkpoint is of another architecture or optimizer."""

    def __init__(self, model, loader, val_tokens, config, run, store, device="cpu", **hooks):
        self.config, self.loader, self.val_tokens = config, loader, val_tokens
        self.run, self.store, self.hooks, self.device = run, store, hooks, torch.device(device)
        several = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if several else (0, 1)
        self.rows, self.T = loader.batch_size // self.world, loader.T
        self.micro = min(config.micro_batch or self.rows, self.rows)
        self.dtype, self.precision = choose_precision(config.precision, self.device)
        model.checkpointing, model.loss_chunk = config.checkpointing, config.loss_chunk
        self.model = self.forward = model
        sharded = self.world > 1 and config.parallel == "fsdp"
        compile = self.device.type == "cuda" if config.compile is None else config.compile
        if sharded:
            self.shard(compile)
        else:
            self.forward = compiled(model, compile)
            if self.world > 1:
                self.forward = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)
        kind, narrow = self.device.type, self.dtype != torch.float32 and not sharded
        self.autocast = partial(torch.autocast, kind, self.dtype, narrow, cache_enabled=False)
        self.scaler = torch.amp.GradScaler(kind, 2.0**14, enabled=self.dtype == torch.float16)
        # Now: after an evaluation FSDP's model has gathered parameters under these names.
        self.names = {p: name for name, p in model.named_parameters()}
        self.optimizer = self.make_optimizer(compile)
        # What a checkpoint must share with the run that goes on from it.
        self.identity = dict(optimizer=config.optimizer, state_dtype=config.state_dtype)
        self.identity |= asdict(model.config)
        self.step, self.saved, self.seconds, self.signals = 0, 0, 0.0, []
        self.best, self.since_best = math.inf, 0
        self.load()

    def shard(self, compile):
        """FSDP2: each rank holds its share of every parameter, gradient and optimizer state; a
        block's parameters are gathered when it runs, and freed after."""
        narrow = self.dtype if self.dtype != torch.float32 else None
        # Inputs stay as they are: cosines in bfloat16 would blur far positions.
        policy = MixedPrecisionPolicy(narrow, torch.float32 if narrow else None, None, False)
        for block in self.model.blocks:
            if compile:
                block.compile()
            fully_shard(block, mp_policy=policy)
        fully_shard(self.model, mp_policy=policy)

    def make_optimizer(self, compile):
        c, shape, groups = self.config, self.model.config, {}
        heads = [n * shape.head_dim for n in (shape.n_heads, *2 * [shape.n_kv_heads])]
        for name, p in self.model.named_parameters():
            parts = heads if "qkv" in name else 2 * [shape.d_ff] if "gate_up" in name else None
            key = "adam" if "blocks" not in name or p.ndim < 2 else str(parts)
            group = groups.setdefault(key, dict(params=[], adam=key == "adam", parts=parts))
            group["params"].append(p)
        settings = dict(betas=(c.beta1, c.beta2), weight_decay=c.weight_decay, compile=compile)
        settings |= dict(state_dtype=getattr(torch, c.state_dtype))
        if c.optimizer == "muon":
            return Muon(groups.values(), c.max_lr, c.momentum, **settings)
        if c.optimizer == "galore":
            return GaLore(groups.values(), c.max_lr, c.galore_rank, **settings)
        return AdamW(groups.values(), c.max_lr, **settings)

    def train_step(self):
        """One optimizer step; returns its loss, gradient norm and learning rate. Each micro-batch
        counts by its share of the targets of all ranks, as if it were one batch: an average of
        averages would have another gradient where documents end."""
        c, (ids, targets) = self.config, next(self.loader)
        chunks = list(zip(ids.split(self.micro), targets.split(self.micro)))
        counts = torch.stack([(t != IGNORE).sum() for _, t in chunks]).float()
        total = self.sum_ranks(counts.sum()).clamp(min=1)  # 0 where the text is all ignored
        loss = torch.zeros((), device=self.device)
        for i, (ids, targets) in enumerate(chunks):
            mask = document_mask(ids, self.loader.eot) if c.whole_documents else None
            last = i + 1 == len(chunks)  # gradients travel once a step, with the last micro-batch
            if isinstance(self.forward, FSDPModule):
                self.forward.set_requires_gradient_sync(last)
            quiet = isinstance(self.forward, DistributedDataParallel) and not last
            with self.forward.no_sync() if quiet else nullcontext():
                with self.autocast():
                    part = self.forward(ids, targets, mask) * (counts[i] / total)
                self.scaler.scale(part * self.world).backward()  # ranks average their gradients
            loss += part.detach()
        self.scaler.unscale_(self.optimizer)  # clipping before would clip the scaled gradient
        norm = clip_gradients(self.model.parameters(), c.max_norm)
        loss, norm = self.sum_ranks(loss).item(), norm.item()
        overflowed = self.scaler.is_enabled() and not math.isfinite(norm)  # halves the scale
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflowed):
            raise ValueError(
                f"step {self.step + 1}: the loss is {loss}, the gradient norm {norm}: stopped; the "
                f"last good checkpoint is {self.saved}; lower --max_lr or look at the text there"
            )
        if c.layer_norms and (self.step + 1) % c.layer_norms == 0:
            with self.autocast():
                path = self.run.dir / "layers.jsonl" if self.rank == 0 else None
                tracking.layer_norms(self.model, ids, self.step + 1, path)
        shape = (c.warmup_steps, c.steps, c.schedule, c.decay_share)
        lr = lr_schedule(self.step + 1, c.max_lr, c.min_lr, *shape)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        return dict(train_loss=loss, grad_norm=norm, lr=lr)

    def sum_ranks(self, x):
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def fit(self):
        """Train to the end; returns the last line of metrics. Ctrl-C and SIGTERM (of a spot machine
        that is taken away) save, then exit with 130 and 0; a second one ends at once. Raises
        ValueError on a loss that is not finite, with the last checkpoint kept."""
        c, line = self.config, {}
        before = {n: signal.signal(n, self.stop) for n in (signal.SIGINT, signal.SIGTERM)}
        size, peak = max(1, 16384 // self.T), self.hooks.get("peak_flops", math.inf)
        bits = len(self.val_tokens) / self.hooks.get("val_bytes", math.inf) / math.log(2)
        trace = tracking.Trace(c.profile, self.run.dir / "trace.json", self.device)
        if self.rank == 0:
            writers = tracking.writers(self.run, c, self.model.config, self.hooks.get("on_step"))
        start = time.perf_counter() - self.seconds
        self.model.train()
        while self.step < c.steps and self.since_best < c.patience and not self.stopping():
            began = time.perf_counter()
            trace.before(self.step)
            done = self.train_step()
            tokens = self.loader.batch_size * self.T
            rate = tokens / (time.perf_counter() - began)
            line = dict(step=self.step, time=0.0, tokens=self.step * tokens) | done
            line |= dict(tokens_per_s=rate, mfu=rate * self.model.flops_per_token() / peak)
            line |= dict(memory_gib=tracking.memory(self.device), val_loss=None, val_bpb=None)
            last = self.step == c.steps
            if evaluated := last or self.step % c.eval_every == 0:
                args = (self.val_tokens, self.T, c.eval_tokens, size, self.device)
                with self.autocast():
                    val_loss = evaluate(self.model, *args)
                line |= dict(val_loss=val_loss, val_bpb=val_loss * bits)
                self.since_best = 0 if val_loss < self.best else self.since_best + 1
                if val_loss < self.best:
                    self.best = val_loss
                    self.model.save_pretrained(self.run.dir)
            self.seconds = line["time"] = round(time.perf_counter() - start, 3)
            for write in writers if self.rank == 0 else []:
                write(line)
            if last or (self.step % c.save_every == 0 if c.save_every else evaluated):
                self.save(line["val_loss"])
        self.loader.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if self.signals:
            self.leave()
        if self.store:
            self.store.wait()
        return line

    def stop(self, number, _):
        self.signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    def stopping(self):
        """Whether any rank was told to stop: all leave after the same step."""
        flag = torch.tensor(self.signals[:1] or [0], device=self.device)
        if self.world > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            self.signals = [n for n in flag.tolist() if n]
        return bool(self.signals)

    def leave(self):
        if self.step and self.saved != self.step:
            self.save()
        if self.best == math.inf:  # no evaluation yet: this model is the best there is
            self.model.save_pretrained(self.run.dir)
        if self.store:
            self.store.wait()
        if self.rank == 0:
            print(f"stopped after step {self.step} and saved: the same command goes on from there")
        sys.exit(130 if self.signals[0] == signal.SIGINT else 0)

    def agree(self, value):
        """The first rank's value, on all ranks, which have by then come this far."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values, device=self.device)
        return values[0]

    def tensors(self):
        """Weights and optimizer states by name: what torch.distributed.checkpoint saves from each
        rank, and what it fills on loading, whatever ranks they were on."""
        names, states, held = self.names, {}, self.optimizer.state
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                self.optimizer.init(p, group)
                states[names[p]] = {k: x for k, x in held[p].items() if torch.is_tensor(x)}
        return dict(model={n: p.detach() for p, n in names.items()}, optimizer=states)

    def save(self, val_loss=None):
        """Write a checkpoint and hand it to the store, which uploads it while training goes on."""
        path = self.agree(self.store.begin(self.step) if self.store else None)
        dcp.save(self.tensors(), checkpoint_id=path)
        self.model.save_pretrained(path / "model")  # for who would talk to it and needs no pickle
        state = dict(step=self.step, position=self.loader.position)
        state |= dict(updates=max(s["step"] for s in self.optimizer.state.values()))
        state |= dict(best=self.best, since_best=self.since_best, seconds=self.seconds)
        state |= dict(scaler=self.scaler.state_dict(), identity=self.identity)
        cuda = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        torch.save(dict(rng=torch.get_rng_state(), cuda=cuda), path / f"rng-{self.rank}.pt")
        if self.rank == 0:
            torch.save(state, path / "state.pt")
            if (lines := self.run.dir / "metrics.jsonl").exists():
                shutil.copy(lines, path)
        self.agree(None)  # every rank has written
        if self.store:
            self.store.commit(self.step, val_loss)
        self.saved = self.step

    def load(self):
        """Go on from the newest checkpoint, if there is one."""
        step = self.agree(self.store.latest() if self.store else None)
        if step is None:
            return
        path = self.agree(self.store.download(step) if self.store else None)
        try:
            state = torch.load(path / "state.pt", weights_only=True)
            theirs, ours = state["identity"], self.identity
            other = [f"{k} {theirs.get(k)} not {v}" for k, v in ours.items() if theirs.get(k) != v]
            if other:
                raise ValueError(f"it is of another model: {', '.join(other)}")
            dcp.load(self.tensors(), checkpoint_id=path)
            own = path / f"rng-{self.rank}.pt"  # missing where there were fewer ranks
            random = torch.load(own, weights_only=True) if own.exists() else {}
        except Exception as error:  # torch.load and dcp.load raise a dozen kinds
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(
                f"checkpoint {step} ({path}) cannot be gone on from, {reason}: give the "
                "settings that it was made with, or start again with --fresh or another --store"
            ) from None
        for x in self.optimizer.state.values():
            x["step"] = state["updates"]
        if random:
            torch.set_rng_state(random["rng"])
        if random.get("cuda") is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
        self.step = self.saved = state["step"]
        self.best, self.since_best = state["best"], state["since_best"]
        self.seconds, self.loader.position = state["seconds"], state["position"]
        self.scaler.load_state_dict(state["scaler"])
        here, lines = self.run.dir / "metrics.jsonl", path / "metrics.jsonl"
        if self.rank == 0 and lines.exists() and not here.exists():  # this is a new machine
            shutil.copy(lines, here)
