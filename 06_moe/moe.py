"""Mixture of experts: many MLPs in a layer, of which each token uses a few.

What this stage teaches: a router that sends each token to its best experts, the losses and nudges
that keep all of them in use, three ways to compute only what was chosen (a plain loop, sorted
segments, one grouped product), experts spread over processes, and a dense model turned into a
mixture. The model has the parameters of a large one and the cost per token of a small one.

Parent: 04_modern/modern.py; what training needs, in training.py, of 05_scaling/scaling.py
New: Routing, count, Router, Segments, can_group, grouped_product, Experts, AllToAll, MoE
Changed: TransformerConfig -> MoEConfig, rope_frequencies, Attention, Block,
    TransformerLM -> MoETransformerLM

Read in this order: MoEConfig; Router, Experts.loop and the two faster ways; MoE, Block; then
MoETransformerLM.hidden and auxiliary. The rest is the parent's with less in it. Beside it,
generation.py has the cache and the sampling of 04, training.py trains with Muon and AdamW of 05,
convert.py reads and writes mixtral and qwen3_moe directories and makes a mixture of a dense model.

Papers
- The layer, its noise and its losses: Shazeer et al. 2017, arXiv 1701.06538
- One expert a token, load-balancing loss, capacity, jitter: Fedus et al. 2021 (Switch), 2101.03961
- Experts over devices, all-to-all: Lepikhin et al. 2020 (GShard), arXiv 2006.16668
- Router z-loss: Zoph et al. 2022 (ST-MoE), arXiv 2202.08906
- No token dropped, products of segments: Gale et al. 2022 (MegaBlocks), arXiv 2211.15841
- SwiGLU experts, two a token: Jiang et al. 2024 (Mixtral), arXiv 2401.04088
- Fine-grained and shared experts: Dai et al. 2024 (DeepSeekMoE), arXiv 2401.06066
- Balance by a bias, without a loss: Wang et al. 2024, 2408.15664; in DeepSeek-V3: 2412.19437
- From dense to mixture: Komatsuzaki et al. 2022 (sparse upcycling), arXiv 2212.05055

Shapes: B batch, T time, N = B T tokens, C = d_model, E experts, k chosen ones, F = d_expert, H
heads, K heads of keys and values, D = head dim, V vocab.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import convert
import torch
import torch.distributed as dist
from generation import KVCache, check_length, cross_entropy, pad, sample_next
from torch import nn
from torch.nn import functional as F


@dataclass
class MoEConfig:
    """The shape of the model; the defaults are GPT-2's size with 8 experts, 2 of them active."""

    vocab_size: int = 50304  # number of token ids
    context_length: int = 1024  # longest input, tokens
    d_model: int = 768  # width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # heads of queries in each block
    n_kv_heads: int | None = None  # heads of keys and values; None: as many as n_heads
    head_dim: int | None = None  # width of a head; None is d_model / n_heads
    d_ff: int | None = None  # width inside a dense MLP; None is 8/3 d_model, a multiple of 32
    dropout: float = 0.0  # share of activations set to 0 in training
    rope_theta: float = 10_000.0  # pair i of a head turns theta^(-2i / head_dim) radians a token
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    tie_embeddings: bool = True  # use the token embedding as the output layer, too
    qk_norm: bool = True  # RMSNorm on each query and key, as in Qwen3
    moe_layers: str = "all"  # which have experts: all, none, every-2 (the 2nd, 4th) or like "1,3"
    n_experts: int = 8  # experts in such a layer
    top_k: int = 2  # experts that a token uses
    d_expert: int | None = None  # width inside an expert; None is d_ff / top_k: as active as dense
    n_shared: int = 0  # experts beside these that all tokens use
    scoring: str = "softmax"  # how the router scores: softmax or sigmoid
    renormalize: bool | None = None  # weights of the chosen sum to 1; None: yes, if several are
    balance: str = "switch"  # against collapse: switch (a loss), bias (nudged, no loss) or none
    balance_weight: float = 0.01  # of the Switch loss
    bias_rate: float = 0.01  # step of the bias; DeepSeek-V3 takes 0.001 over far more steps
    z_weight: float = 0.001  # of the loss on large router logits
    jitter: float = 0.0  # in training the router's input is multiplied by 1 - this to 1 + this
    capacity: float | None = None  # in training an expert takes this times its share; None: all
    dispatch: str = "auto"  # loop, segments or grouped; auto: grouped on a GPU, else segments

    def __post_init__(self):
        self.n_kv_heads = self.n_kv_heads or self.n_heads
        self.d_ff = self.d_ff or -(-8 * self.d_model // 3 // 32) * 32
        sizes = "vocab_size context_length d_model n_layers n_heads n_kv_heads d_ff n_experts top_k"
        for name in sizes.split():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}")
        self.head_dim = self.head_dim or self.d_model // self.n_heads
        if self.head_dim % 2 or self.head_dim < 2:
            raise ValueError(f"head_dim {self.head_dim} is odd or below 2: positions rotate pairs")
        if self.n_heads % self.n_kv_heads:
            heads = f"n_heads {self.n_heads} is not divisible by n_kv_heads"
            raise ValueError(f"{heads} {self.n_kv_heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")
        self.d_expert = self.d_expert or max(1, self.d_ff // self.top_k)
        if self.renormalize is None:  # the weight of one would always be 1, and no gradient
            self.renormalize = self.top_k > 1
        known = dict(scoring="softmax, sigmoid", balance="switch, bias, none")
        for name, words in (known | dict(dispatch="auto, loop, segments, grouped")).items():
            if getattr(self, name) not in words.split(", "):
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {words}")
        if self.dispatch == "grouped" and (self.d_model % 8 or self.d_expert % 8):
            widths = f"d_model {self.d_model} and d_expert {self.d_expert}"
            raise ValueError(f"dispatch grouped: {widths} must be multiples of 8")
        if self.d_expert < 1 or self.n_shared < 0 or not 0 <= self.jitter < 1:
            raise ValueError("d_expert is at least 1, n_shared at least 0, jitter in [0, 1)")
        if self.capacity is not None and not 0 < self.capacity < math.inf:
            raise ValueError(f"capacity {self.capacity} is not a number above 0")
        self.std = 0.7 / math.sqrt(self.d_model)  # of initial weights; GPT-2's 0.02 at d 1,225
        self.sparse = self.pattern()  # whether each layer has experts

    def pattern(self):
        word, layers = self.moe_layers.strip(), range(self.n_layers)
        if word in ("all", "none"):
            return [word == "all" for _ in layers]
        if word.startswith("every-") and word[6:].isdigit() and int(word[6:]):
            return [(layer + 1) % int(word[6:]) == 0 for layer in layers]
        numbers = [part.strip() for part in word.split(",")]
        if not all(n.isdigit() and int(n) < self.n_layers for n in numbers):
            raise ValueError(
                f"moe_layers {word!r} is neither all, none, like every-2, nor layers from 0 to "
                f'{self.n_layers - 1} like "1,3"'
            )
        return [layer in map(int, numbers) for layer in layers]


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

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.dropout, self.head_dim = layer, config.dropout, config.head_dim
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
        self.qkv = Linear(config.d_model, rows, False, config.std)
        # 2 n_layers sublayers add to the residual stream: scaled so, its variance does not grow.
        std = config.std / math.sqrt(2 * config.n_layers)
        self.out = Linear(config.n_heads * config.head_dim, config.d_model, False, std)
        norms = [RMSNorm(self.head_dim, config.norm_eps) for _ in "qk" if config.qk_norm]
        self.q_norm, self.k_norm = norms or (None, None)

    def forward(self, x, cos, sin, mask=None, cache=None):
        """x (B, T, C) to the same; cos, sin as in apply_rope; mask (B or 1, 1, T, S), True where
        attended, None: causal."""
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 K, T, D)
        qk, v = qkv.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=1)
        if self.q_norm is not None:
            q, k = qk.split([self.n_heads, self.n_kv_heads], dim=1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], dim=1)
        rotated = apply_rope(qk, cos, sin).type_as(v)  # both at once: half as many operations
        q, k = rotated.split([self.n_heads, self.n_kv_heads], dim=1)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        grouped = dict(enable_gqa=True) if self.n_heads != self.n_kv_heads else {}
        dropout = self.dropout if self.training else 0.0
        causal = mask is None and T > 1
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, **grouped)
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


# ---- the mixture


class Routing(NamedTuple):
    """What a Router decided for N tokens, and how well its experts share the work."""

    experts: torch.Tensor  # int64 (N, k), best first, biases included; E where it was full
    weights: torch.Tensor  # float32 (N, k), 0 where it was
    load: torch.Tensor  # assignments that each expert was meant to get, (E,)
    dropped: torch.Tensor  # share of the assignments that found their expert full
    entropy: torch.Tensor  # of a token's distribution over experts, mean, nats
    balance: torch.Tensor  # Switch's loss: 1 where all get as much, E / k where k experts get all
    z: torch.Tensor  # mean square of the logits' log-sum-exp


def count(experts, n):
    """How often each of n experts is named: int64 of any shape to (n,). (bincount would make a GPU
    wait to look for the largest.)"""
    flat = experts.flatten()
    return flat.new_zeros(n).scatter_add_(0, flat, torch.ones_like(flat))


class Router(nn.Module):
    """Chooses k experts for each token and their weights. All in float32: a rounded logit sends a
    token elsewhere, and in bfloat16 training diverged (Fedus et al. 2021)."""

    def __init__(self, config):
        super().__init__()
        self.top_k, self.scoring, self.balance = config.top_k, config.scoring, config.balance
        self.renormalize, self.jitter = config.renormalize, config.jitter
        self.capacity, self.bias_rate, self.world = config.capacity, config.bias_rate, 1
        self.weight = nn.Parameter(torch.randn(config.n_experts, config.d_model) * config.std)
        self.register_buffer("bias", torch.zeros(config.n_experts))

    def forward(self, x):
        """x (N, C) to a Routing."""
        N, E = x.shape[0], len(self.weight)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            x = x.to(wide)
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = F.linear(x, self.weight.to(wide))  # (N, E)
            scores = logits.softmax(-1) if self.scoring == "softmax" else logits.sigmoid()
            # The bias has a say in who is chosen, not in how much the chosen count.
            chosen = (scores + self.bias).topk(self.top_k).indices  # (N, k)
            weights = scores.gather(1, chosen)
            if self.renormalize:
                weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
            probs = scores / (scores.sum(1, keepdim=True) + 1e-20)
            entropy = -(probs * probs.clamp(min=1e-20).log()).sum(1).mean()
            z = logits.logsumexp(1).square().mean()
        load = count(chosen, E).to(wide)
        share = load / load.sum()
        if self.world > 1:  # of all ranks' tokens; each adds the probabilities of its own
            dist.all_reduce(share)
            share /= self.world
        balance = E * (share * probs.mean(0)).sum()  # its gradient is that of probs
        if self.training and self.capacity is not None:
            full = self.positions(chosen, load) >= math.ceil(self.capacity * N * self.top_k / E)
            chosen, weights = chosen.masked_fill(full, E), weights.masked_fill(full, 0.0)
        dropped = (chosen == E).to(wide).mean()
        return Routing(chosen, weights, load, dropped, entropy.detach(), balance, z)

    def positions(self, chosen, load):
        """How many came to the same expert before, (N, k): first choices before second ones. (So a
        later token can push out an earlier one's second choice: capacity is for training only.)"""
        flat = chosen.T.flatten()  # (k N,)
        order = flat.argsort(stable=True)
        starts = load.long().cumsum(0) - load.long()
        position = torch.empty_like(flat)
        position[order] = torch.arange(len(flat), device=flat.device) - starts[flat[order]]
        return position.view(self.top_k, -1).T

    @torch.no_grad()
    def nudge(self, load):
        """After an optimizer step: experts with less than the mean load (E,) become likelier to be
        chosen, those with more less so (Wang et al. 2024)."""
        if self.balance == "bias":
            self.bias += self.bias_rate * (load.mean() - load).sign()


class Segments(torch.autograd.Function):
    """SwiGLU of rows sorted by expert, an expert's rows at a time: x (S, C), gate and up (E, F, C),
    down (E, C, F), counts a list of E row counts; returns (S, C).

    The backward pass is written out for memory's sake: what belongs to one expert stays in the
    cache, and buffers serve all of them. a = silu(g), h = a u, y = h downᵀ."""

    @staticmethod
    def forward(ctx, x, gate, up, down, counts):
        g, u = (x.new_empty(len(x), gate.shape[1]) for _ in "gu")  # (S, F)
        y, buffer = torch.empty_like(x), x.new_empty(max(counts), gate.shape[1])
        rows = zip(*(t.split(counts) for t in (x, g, u, y)))
        for (xe, ge, ue, ye), G, U, D in zip(rows, gate.mT, up.mT, down.mT):
            h = buffer[: len(xe)]
            torch.mm(xe, G, out=ge)
            torch.mm(xe, U, out=ue)
            torch.mul(F.silu(ge), ue, out=h)
            torch.mm(h, D, out=ye)
        ctx.save_for_backward(x, g, u, gate, up, down)
        ctx.counts = counts
        return y

    @staticmethod
    def backward(ctx, dy):
        x, g, u, *weights = ctx.saved_tensors
        dx, gradients = torch.empty_like(x), [torch.empty_like(w) for w in weights]
        buffers = g.new_empty(3, max(ctx.counts), g.shape[1])
        rows = zip(*(t.split(ctx.counts) for t in (x, g, u, dy, dx)))
        for (xe, ge, ue, dye, dxe), G, U, D, dG, dU, dD in zip(rows, *weights, *gradients):
            a, dh, du = buffers[:, : len(xe)]
            torch.ops.aten.silu.out(ge, out=a)
            torch.mm(dye, D, out=dh)
            torch.mul(a, dh, out=du)
            torch.mm(du.T, xe, out=dU)
            torch.mm(du, U, out=dxe)
            torch.mm(dye.T, a.mul_(ue), out=dD)  # a is now h
            dg = torch.ops.aten.silu_backward.grad_input(dh.mul_(ue), ge, grad_input=dh)
            torch.mm(dg.T, xe, out=dG)
            dxe.addmm_(dg, G)
        return dx, *gradients, None


def can_group(x, dtype, *widths):
    """Whether grouped_product is to be had, and worth having, for rows like x."""
    if not x.is_cuda or dtype != torch.bfloat16 or any(n % 8 for n in widths):
        return False
    generation, _ = torch.cuda.get_device_capability(x.device)
    if hasattr(F, "grouped_mm"):
        return generation >= 8
    return hasattr(torch, "_grouped_mm") and generation == 9  # before torch 2.10


def grouped_product(x, weight, ends):
    """Rows x (S, C) up to ends[0] times weight[0], those up to ends[1] times weight[1], and so on:
    weight (E, C, F), ends int32 (E,), returns (S, F). One kernel on a GPU, for bfloat16."""
    product = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)  # before 2.10
    if product is None:
        raise ValueError("dispatch grouped needs a torch with grouped_mm: take segments")
    return product(x, weight, offs=ends)


class Experts(nn.Module):
    """SwiGLU experts in stacked tensors; each token goes through the ones it was sent to.

    `gate` and `up` are (E, F, C), `down` is (E, C, F)."""

    def __init__(self, config):
        super().__init__()
        E, C, width = config.n_experts, config.d_model, config.d_expert
        self.dispatch = config.dispatch
        for name, shape, std in (
            ("gate", (E, width, C), config.std),
            ("up", (E, width, C), config.std),
            ("down", (E, C, width), config.std / math.sqrt(2 * config.n_layers)),
        ):
            weight = nn.init.trunc_normal_(torch.empty(shape), std=std, a=-3 * std, b=3 * std)
            setattr(self, name, nn.Parameter(weight))

    def forward(self, x, chosen, weights):
        """x (N, C), chosen int64 (N, k) with E for none, weights (N, k), 0 there: the weighted
        sum of the chosen experts' outputs, (N, C). The three ways give the same."""
        if self.dispatch == "loop":
            return self.loop(x, chosen, weights)
        E, flat = len(self.gate), chosen.flatten()
        kind, way = x.device.type, self.dispatch  # autocast knows neither Segments nor grouped_mm
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if way == "auto":
            way = "grouped" if can_group(x, dtype, *self.gate.shape[1:]) else "segments"
        counts = count(flat, E + 1)[:E]
        order = flat.argsort(stable=True)  # those for no expert come last
        if way == "segments":
            counts = counts.tolist()
            order = order[: sum(counts)]
        tokens = order // chosen.shape[1]
        rows = x.to(dtype).index_select(0, tokens)  # (S, C)
        gate, up, down = (w.to(dtype) for w in (self.gate, self.up, self.down))
        if way == "segments":
            y = Segments.apply(rows, gate, up, down, counts)
        else:
            ends = counts.cumsum(0).int()
            ends[-1] = len(rows)  # the last expert takes those for no expert: their weight is 0
            h = F.silu(grouped_product(rows, gate.mT, ends))
            h = h * grouped_product(rows, up.mT, ends)
            y = grouped_product(h, down.mT, ends)  # (S, C)
        y = y * weights.flatten()[order, None]
        return torch.zeros_like(x, dtype=y.dtype).index_add_(0, tokens, y).type_as(x)

    def loop(self, x, chosen, weights):
        """The definition: each expert takes its tokens, and adds to them what it makes of them."""
        y = torch.zeros_like(x)
        for e in range(len(self.gate)):
            tokens, choice = torch.where(chosen == e)
            rows = x[tokens]  # (n, C)
            h = F.silu(F.linear(rows, self.gate[e])) * F.linear(rows, self.up[e])  # (n, F)
            rows = F.linear(h, self.down[e]) * weights[tokens, choice, None]
            y = y.index_add(0, tokens, rows.type_as(y))
        return y


class AllToAll(torch.autograd.Function):
    """Each rank sends send[r] of its rows x (S, C) to rank r and gets receive[r] from it, in the
    order of the ranks; gradients take the way back."""

    @staticmethod
    def forward(ctx, x, send, receive):
        ctx.back = (receive, send)
        rows = x.new_empty(sum(receive), *x.shape[1:])
        dist.all_to_all_single(rows, x.contiguous(), receive, send)
        return rows

    @staticmethod
    def backward(ctx, gradient):
        return AllToAll.apply(gradient, *ctx.back), None, None


class MoE(nn.Module):
    """Router and experts in the place of an MLP. `routing` holds what it last decided.

    After spread(rank, world) this rank holds its share of the experts and rows travel to theirs and
    back (Lepikhin et al. 2020); all ranks then call it together, each with its own tokens."""

    def __init__(self, config):
        super().__init__()
        self.router, self.experts = Router(config), Experts(config)
        self.world, self.routing, self.shared = 1, None, None
        if config.n_shared:
            self.shared = SwiGLU(replace(config, d_ff=config.n_shared * config.d_expert))

    def forward(self, x):
        """x (B, T, C) to the same."""
        flat = x.flatten(0, -2)  # (N, C)
        routing = self.routing = self.router(flat)
        way = self.experts if self.world == 1 else self.exchange
        y = way(flat, routing.experts, routing.weights).view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def __getstate__(self):  # a copy has decided nothing yet
        return self.__dict__ | dict(routing=None)

    def spread(self, rank, world):
        """Keep this rank's experts; ValueError where they cannot be shared out evenly."""
        E = len(self.experts.gate)
        if E % world:
            raise ValueError(f"{E} experts cannot be shared out over {world} ranks evenly")
        mine = slice(rank * E // world, (rank + 1) * E // world)
        for name, weight in list(self.experts.named_parameters()):
            setattr(self.experts, name, nn.Parameter(weight.detach()[mine].clone()))
        self.world = self.router.world = world

    def exchange(self, x, chosen, weights):
        """As Experts.forward: rows go to the ranks of their experts, through them, and back."""
        n, k = len(self.experts.gate), chosen.shape[1]  # n experts on each rank
        counts = count(chosen, n * self.world + 1)[:-1]
        order = chosen.flatten().argsort(stable=True)[: counts.sum()]
        theirs = torch.empty_like(counts)  # rows that each rank sends to each of my experts
        dist.all_to_all_single(theirs, counts)
        send, receive = (c.view(self.world, n).sum(1).tolist() for c in (counts, theirs))
        tokens = order // k
        rows = AllToAll.apply(x.index_select(0, tokens), send, receive)  # (R, C)
        own = torch.arange(n, device=x.device).repeat(self.world).repeat_interleave(theirs)  # (R,)
        y = self.experts(rows, own[:, None], torch.ones_like(rows[:, :1]))
        y = AllToAll.apply(y, receive, send) * weights.flatten()[order, None]  # (S, C)
        return torch.zeros_like(x, dtype=y.dtype).index_add_(0, tokens, y).type_as(x)


class Block(nn.Module):
    """Attention, then MLP or experts, each on the normalised stream and added back to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config, layer)
        self.norm2 = RMSNorm(config.d_model, config.norm_eps)
        self.mlp = MoE(config) if config.sparse[layer] else SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.dropout(self.attention(self.norm1(x), cos, sin, mask, cache))
        return x + self.dropout(self.mlp(self.norm2(x)))


# ---- the model


class MoETransformerLM(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar; to
    train, add auxiliary() to it.

    ids and targets: int64 (B, T) with T up to context_length. `tokenizer_files`, {name: text}, are
    written beside the weights by save_pretrained; `token_ids` holds eos_token_id and the like."""

    def __init__(self, config):
        super().__init__()
        self.config, self.tokenizer_files, self.token_ids, self.world = config, {}, {}, 1
        self.token_embedding = Embedding(config.vocab_size, config.d_model, config.std)
        self.register_buffer("frequencies", rope_frequencies(config), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.output = Linear(config.d_model, config.vocab_size, False, config.std)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def hidden(self, ids, cache=None):
        """What the output layer sees: (B, T) to (B, T, C). With a cache, ids are the tokens that
        follow those in it."""
        T, mask = ids.shape[1], None
        if cache is not None:
            positions, mask = cache.begin(T, ids.device)
        elif T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit into {self.config.context_length}: crop them")
        else:
            positions = torch.arange(T, device=ids.device)[None]
        angles = positions[:, None, :, None] * self.frequencies  # (B or 1, 1, T, D/2)
        cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([-angles, angles], -1).sin()
        x = self.dropout(self.token_embedding(ids))  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, mask, cache)
        return self.norm(x)

    def forward(self, ids, targets=None, cache=None):
        logits = self.output(self.hidden(ids, cache))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    def mixtures(self):
        """The MoE layers, in order."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def auxiliary(self):
        """What the last forward pass adds to the loss: the Switch loss and the z-loss of each
        mixture, weighted. A scalar tensor, or 0.0 without mixtures."""
        c, total = self.config, 0.0
        for mixture in self.mixtures():
            if c.balance == "switch":
                total = total + c.balance_weight * mixture.routing.balance
            total = total + c.z_weight * mixture.routing.z
        return total

    def counts(self):
        """(all parameters, those that a token uses), with the experts on other ranks."""
        c, here = self.config, sum(p.numel() for p in self.parameters())
        experts = sum(p.numel() for m in self.mixtures() for p in m.experts.parameters())
        total = here + (self.world - 1) * experts
        return total, total - self.world * experts * (c.n_experts - c.top_k) // c.n_experts

    def flops_per_token(self):
        """Forward and backward pass at full context (Chowdhery et al. 2022), of active experts."""
        c, (_, active) = self.config, self.counts()
        looked_up = 0 if c.tie_embeddings else self.token_embedding.weight.numel()
        products = active - looked_up - sum(p.numel() for p in self.parameters() if p.ndim == 1)
        return 6 * products + 12 * c.n_layers * c.n_heads * c.head_dim * c.context_length

    def spread(self, rank, world):
        """Share the experts of every mixture out over ranks; see MoE."""
        self.world = world
        for mixture in self.mixtures():
            mixture.spread(rank, world)
        return self

    @torch.inference_mode()
    def stream(
        self, prompts, max_new_tokens, temperature=1.0, top_k=None, top_p=None, min_p=None,
        repetition_penalty=1.0, seed=None, cache=None,
    ):  # fmt: skip
        """Yield the next ids and their log-probabilities, int64 and float32 (B,), token by token.

        prompts: int64 (B, T) or lists of ids of any lengths. The log-probabilities are the model's
        own, before penalty, temperature and filters. With a cache, prompts follow what it holds.
        Raises ValueError where prompt and new tokens do not fit into the context, and for prompts
        of different lengths with a cache of the caller's."""
        if repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty {repetition_penalty} is not above 0")
        weight = self.token_embedding.weight
        ids, pads = (prompts, None) if torch.is_tensor(prompts) else pad(prompts, weight.device)
        if ids.numel() == 0 or (cache is not None and pads is not None):
            raise ValueError("a prompt without a token, or of different lengths after one cache")
        if cache is None:
            total = check_length(ids.shape[1], max_new_tokens, self.config)
            cache = KVCache(self.config, len(ids), total, pads, weight.device, weight.dtype)
        self.eval()
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        seen = torch.zeros(len(ids), self.config.vocab_size, dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            logits = self.output(self.hidden(ids, cache)[:, -1]).float()  # (B, V)
            chosen = logits
            if repetition_penalty != 1.0:
                seen.scatter_(1, ids, True)
                penalty = torch.where(logits > 0, 1 / repetition_penalty, repetition_penalty)
                chosen = torch.where(seen, logits * penalty, logits)
            next_ids = sample_next(chosen, temperature, top_k, top_p, generator, min_p)  # (B,)
            log_probs = logits.gather(1, next_ids[:, None])[:, 0] - logits.logsumexp(1)
            yield next_ids, log_probs
            ids = next_ids[:, None]

    def generate(self, prompts, max_new_tokens, stop_tokens=(), **settings):
        """Continue each prompt by up to max_new_tokens: int64 (B, T) gives (B, T + new), where a
        row that has drawn one of stop_tokens repeats it; lists of ids give lists of the new ids,
        the stop token their last. `settings` are those of stream."""
        training, new = self.training, []
        stops = torch.tensor(list(stop_tokens), device=self.token_embedding.weight.device)
        try:
            for next_ids, _ in self.stream(prompts, max_new_tokens, **settings):
                stopped = torch.isin(new[-1], stops) if new else torch.zeros_like(next_ids).bool()
                new.append(torch.where(stopped, new[-1], next_ids) if new else next_ids)
                if torch.isin(new[-1], stops).all():
                    break
        finally:
            self.train(training)
        if torch.is_tensor(prompts):
            return torch.cat([prompts, *(ids[:, None] for ids in new)], dim=1)
        rows = [[ids[i].item() for ids in new] for i in range(len(prompts))]
        ends = [[n for n, token in enumerate(row, 1) if token in stop_tokens] for row in rows]
        return [row[: end[0]] if end else row for row, end in zip(rows, ends)]

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=torch.float32):
        """A mixtral or qwen3_moe in Hugging Face's layout, or what save_pretrained wrote; routers
        stay in float32. ValueError where a file is missing or unreadable, the architecture is
        another, or tensors are missing, misshapen or unknown, by name."""
        model = cls.build(*convert.read(Path(path)), path).to(device)
        for name, p in model.named_parameters():
            p.data = p.data if "router" in name else p.data.to(dtype)
        return model

    @classmethod
    def from_dense(cls, path, device="cpu", **fields):
        """A mixture that starts as the dense model in a directory of 04 or 05 (llama or qwen3):
        every expert a copy of its layer's MLP, so that it gives the same logits, whatever the
        router says (Komatsuzaki et al. 2022). `fields` are those of MoEConfig about experts.
        ValueError where it does not fit: another width asked for, weights that do not sum to 1,
        shared experts, biases."""
        own, tensors, files, token_ids = convert.read_dense(Path(path))
        fields = own | dict(moe_layers="all", d_expert=own["d_ff"]) | fields
        tensors = convert.copy_mlps(tensors, own, MoEConfig(**fields), path)
        return cls.build(fields, tensors, files, token_ids, path).to(device)

    @classmethod
    def build(cls, fields, tensors, files, token_ids, path):
        try:
            config = MoEConfig(**fields)
        except TypeError as error:
            raise ValueError(f"{path}: its config.json does not fit this stage: {error}") from None
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = cls(config)
        state = convert.assemble(tensors, model, path)
        model.load_state_dict(state, strict=False, assign=True)
        if config.tie_embeddings:
            model.output.weight = model.token_embedding.weight
        model.frequencies = rope_frequencies(config)
        model.tokenizer_files, model.token_ids = files, token_ids
        return model

    def save_pretrained(self, path):
        """Write config.json, model.safetensors (float32) and the tokenizer, if it is known, each
        whole or not at all: as mixtral or qwen3_moe, from which `transformers` gives these logits,
        or, where neither holds a feature (see convert.kind_of), in a layout of our own. With
        experts spread over ranks every rank calls it and the first one writes."""
        state = self.state_dict()
        for name, p in list(state.items()) if self.world > 1 else []:
            if ".experts." in name:
                parts = [torch.empty_like(p) for _ in range(self.world)]
                dist.all_gather(parts, p.contiguous())
                state[name] = torch.cat(parts)
        if self.world == 1 or dist.get_rank() == 0:
            convert.write(Path(path), self, state)
