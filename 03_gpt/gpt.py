"""GPT-2 and its training loop: the main job of this repository.

What this stage teaches: how a decoder-only transformer turns token ids into a guess of the next
token, and everything that has to be written around it to train one on real text: initialisation,
loss, optimizer, schedule, evaluation on held-out text, checkpoints that survive a kill -9, resuming
to the bit, and sampling.

Parent: 02_attention/attention.py (Linear, Embedding, sinusoidal_positions)
New: GPTConfig, LayerNorm, Attention, MLP, Block, GPT, and all that trains and samples

Read in this order: GPTConfig; the pieces Linear, Embedding, LayerNorm; Attention, MLP, Block, GPT;
cross_entropy, AdamW, SGD, lr_schedule, clip_gradients; get_batch, evaluate, checkpoints, train;
sample_next and GPT.generate.

Papers
- Attention: Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762
- GPT-2, the model of this file: Radford et al. 2019, Language Models are Unsupervised Multitask
  Learners (no arXiv number)
- LayerNorm: Ba et al. 2016, arXiv 1607.06450; first in a sublayer: Xiong et al. 2020, 2002.04745
- GELU: Hendrycks and Gimpel 2016, arXiv 1606.08415
- Output layer tied to the embedding: Press and Wolf 2016, arXiv 1608.05859
- AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101; cosine schedule: the same, arXiv 1608.03983
- 6N + 12 L d T FLOPs a token: Chowdhery et al. 2022 (PaLM), arXiv 2204.02311, appendix B
- Top-p sampling: Holtzman et al. 2019, arXiv 1904.09751

Shapes: B batch, T time (tokens), C = d_model, H heads, D = head dim, V vocab.
"""

import json
import math
import shutil
import signal
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from common import atomic

# ---- the model


@dataclass
class GPTConfig:
    """The shape of the model; the defaults are GPT-2 with 124M parameters."""

    vocab_size: int = 50257  # number of token ids
    context_length: int = 1024  # longest input, tokens
    d_model: int = 768  # width of the residual stream
    n_layers: int = 12  # number of blocks
    n_heads: int = 12  # attention heads in each block
    d_ff: int | None = None  # width inside the MLP; None is 4 d_model
    dropout: float = 0.0  # share of activations set to 0 in training
    bias: bool = True  # biases in Linear and LayerNorm
    positions: str = "learned"  # position embedding, learned or sinusoidal
    gelu: str = "tanh"  # tanh, GPT-2's approximation, or exact (2.5 times as fast on a CPU)
    norm_eps: float = 1e-5  # added to the variance in LayerNorm
    tie_embeddings: bool = True  # use the token embedding as the output layer, too

    def __post_init__(self):
        self.d_ff = self.d_ff or 4 * self.d_model
        for name in ("vocab_size", "context_length", "d_model", "n_layers", "n_heads", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not divisible by n_heads {self.n_heads}: "
                "each head takes an equal share of the width"
            )
        if self.positions not in ("learned", "sinusoidal") or self.gelu not in ("tanh", "exact"):
            raise ValueError("positions is learned or sinusoidal, gelu is tanh or exact")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")


PRESETS = {
    "124m": dict(n_layers=12, n_heads=12, d_model=768),
    "355m": dict(n_layers=24, n_heads=16, d_model=1024),
    "774m": dict(n_layers=36, n_heads=20, d_model=1280),
    "1558m": dict(n_layers=48, n_heads=25, d_model=1600),
}


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


class LayerNorm(nn.Module):
    """Shift and scale each vector to mean 0 and variance 1, then by learned weight and bias."""

    def __init__(self, d_model, eps=1e-5, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.eps = eps

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight
        return x if self.bias is None else x + self.bias


def sinusoidal_positions(context_length, d_model):
    """The fixed table of Vaswani et al. 2017, (T, C): sines in even columns, cosines in odd ones,
    wavelengths rising from 2 pi to 10,000 times 2 pi."""
    position = torch.arange(context_length)[:, None]
    rate = torch.exp(-math.log(10_000) * torch.arange(0, d_model, 2) / d_model)
    table = torch.zeros(context_length, d_model)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: d_model // 2])
    return table


class Attention(nn.Module):
    """Causal multi-head self-attention. 02_attention takes it apart; here it is one fused call."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.qkv = Linear(config.d_model, 3 * config.d_model, config.bias)
        # 2 n_layers sublayers add to the residual stream: scaled so, its variance does not grow.
        std = 0.02 / math.sqrt(2 * config.n_layers)
        self.out = Linear(config.d_model, config.d_model, config.bias, std)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Each token alone: wider, GELU, back."""

    def __init__(self, config):
        super().__init__()
        self.gelu = "tanh" if config.gelu == "tanh" else "none"
        self.up = Linear(config.d_model, config.d_ff, config.bias)
        std = 0.02 / math.sqrt(2 * config.n_layers)
        self.down = Linear(config.d_ff, config.d_model, config.bias, std)

    def forward(self, x):
        return self.down(F.gelu(self.up(x), approximate=self.gelu))  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each on the normalised stream and added back to it."""

    def __init__(self, config):
        super().__init__()
        self.norm1 = LayerNorm(config.d_model, config.norm_eps, config.bias)
        self.attention = Attention(config)
        self.norm2 = LayerNorm(config.d_model, config.norm_eps, config.bias)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar.

    ids and targets: int64 (B, T) with T up to context_length. Untrained, it loses about log V."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.position_embedding = Embedding(config.context_length, config.d_model)
        else:  # as large as the token embedding at the start, or the tokens would drown in it
            table = sinusoidal_positions(config.context_length, config.d_model)
            self.register_buffer("position_table", 0.02 * math.sqrt(2) * table, persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = LayerNorm(config.d_model, config.norm_eps, config.bias)
        self.output = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def hidden(self, ids):
        """What the output layer sees: (B, T) to (B, T, C)."""
        T = ids.shape[1]
        if T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit into {self.config.context_length}: crop them")
        learned = self.config.positions == "learned"
        positions = (self.position_embedding.weight if learned else self.position_table)[:T]
        x = self.dropout(self.token_embedding(ids) + positions)  # (B, T, C)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, ids, targets=None):
        logits = self.output(self.hidden(ids))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    def matrix_parameters(self):
        """Number of parameters in matrix products: the output layer counts, look-ups do not."""
        blocks = sum(p.numel() for p in self.blocks.parameters() if p.ndim == 2)
        return blocks + self.output.weight.numel()

    def flops_per_token(self):
        """Forward and backward pass at full context (Chowdhery et al. 2022)."""
        c = self.config
        return 6 * self.matrix_parameters() + 12 * c.n_layers * c.d_model * c.context_length

    @torch.no_grad()
    def generate(
        self,
        ids,
        max_new_tokens,
        temperature=1.0,
        top_k=None,
        top_p=None,
        stop_tokens=(),
        seed=None,
    ):
        """Continue each row of ids (B, T) by up to max_new_tokens; returns (B, T + new).

        A row that has drawn one of stop_tokens repeats it; all rows stopped ends it. The model sees
        the last context_length tokens. `seed` makes the draw repeatable on its own."""
        training = self.training
        self.eval()
        generator = None if seed is None else torch.Generator(ids.device).manual_seed(seed)
        stops = torch.tensor(list(stop_tokens), dtype=ids.dtype, device=ids.device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for _ in range(max_new_tokens):
            x = self.hidden(ids[:, -self.config.context_length :])
            logits = self.output(x[:, -1])  # (B, V)
            next_ids = sample_next(logits, temperature, top_k, top_p, generator)
            next_ids = torch.where(done, ids[:, -1], next_ids)
            ids = torch.cat([ids, next_ids[:, None]], dim=1)
            done = done | torch.isin(next_ids, stops)
            if done.all():
                break
        self.train(training)
        return ids

    @classmethod
    def from_pretrained(cls, path):
        """A GPT-2 in Hugging Face's layout: config.json and model.safetensors in a directory.

        Raises ValueError where a file is missing, truncated or of another architecture."""
        path = Path(path)
        try:
            hf = json.loads((path / "config.json").read_text())
            tensors = safetensors.torch.load_file(path / "model.safetensors")
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{path} is not a whole model directory: {error}") from None
        gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
        activation = hf.get("activation_function", "gelu_new")
        if hf.get("model_type") != "gpt2" or activation not in gelu:
            raise ValueError(
                f"{path} holds a {hf.get('model_type')} with {activation}, not a GPT-2"
            )
        config = GPTConfig(
            vocab_size=hf["vocab_size"],
            context_length=hf["n_positions"],
            d_model=hf["n_embd"],
            n_layers=hf["n_layer"],
            n_heads=hf["n_head"],
            d_ff=hf.get("n_inner"),
            dropout=hf.get("resid_pdrop", 0.0),
            gelu=gelu[activation],
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            tie_embeddings=hf.get("tie_word_embeddings", True),
        )
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        model = cls(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                tensor = tensors.get(hf_name(name).removeprefix("transformer."))
                if tensor is not None and is_conv1d(name):
                    tensor = tensor.T
                if tensor is None or tensor.shape != parameter.shape:
                    shape = None if tensor is None else tuple(tensor.shape)
                    raise ValueError(
                        f"{path}: {hf_name(name)} is {shape}, not {tuple(parameter.shape)}"
                    )
                parameter.copy_(tensor)
        return model

    def save_pretrained(self, path, eos_token_id=None):
        """Write config.json and model.safetensors, from which `transformers` gives these logits.

        GPT-2 has biases and a position table: missing biases are written as zeros, sinusoids as
        the table. Each file appears whole or not at all."""
        c = self.config
        hf = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": c.vocab_size,
            "n_positions": c.context_length,
            "n_embd": c.d_model,
            "n_layer": c.n_layers,
            "n_head": c.n_heads,
            "n_inner": c.d_ff,
            "activation_function": "gelu_new" if c.gelu == "tanh" else "gelu",
            "layer_norm_epsilon": c.norm_eps,
            "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
            "tie_word_embeddings": c.tie_embeddings,
            "bos_token_id": eos_token_id,
            "eos_token_id": eos_token_id,
        }
        tensors = {}
        for name, parameter in self.named_parameters():
            tensor = parameter.detach().float().cpu()
            tensors[hf_name(name)] = (tensor.T if is_conv1d(name) else tensor).contiguous()
            bias = name.removesuffix("weight") + "bias"
            if not c.bias and name.startswith(("blocks", "norm")):
                tensors[hf_name(bias)] = torch.zeros(parameter.shape[0])
        if c.positions == "sinusoidal":
            tensors["transformer.wpe.weight"] = self.position_table.float().cpu()
        with atomic(Path(path) / "model.safetensors") as file:
            file.write(safetensors.torch.save(tensors, {"format": "pt"}))
        with atomic(Path(path) / "config.json", "w") as file:
            json.dump(hf, file, indent=1)


HF_NAMES = [
    ("token_embedding.", "transformer.wte."),
    ("position_embedding.", "transformer.wpe."),
    ("blocks.", "transformer.h."),
    (".norm1.", ".ln_1."),
    (".attention.qkv.", ".attn.c_attn."),
    (".attention.out.", ".attn.c_proj."),
    (".norm2.", ".ln_2."),
    (".mlp.up.", ".mlp.c_fc."),
    (".mlp.down.", ".mlp.c_proj."),
    ("output.", "lm_head."),
]


def hf_name(name):
    """blocks.0.mlp.up.weight -> transformer.h.0.mlp.c_fc.weight"""
    for ours, theirs in HF_NAMES:
        name = name.replace(ours, theirs)
    return name.replace("norm.", "transformer.ln_f.") if name.startswith("norm.") else name


def is_conv1d(name):
    """True for the matrices that GPT-2 keeps as (d_in, d_out), the transpose of ours."""
    return name.startswith("blocks") and name.endswith("weight") and "norm" not in name


# ---- loss and optimizers


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets int64 (...).

    log-sum-exp subtracts the largest logit first, so that nothing overflows."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 would lose digits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()


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


class SGD(torch.optim.Optimizer):
    """Plain gradient descent whose step shrinks as lr / sqrt(t), t = 1, 2, ..."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    t = self.state[p]["step"] = self.state[p].get("step", 0) + 1
                    p.sub_(p.grad, alpha=group["lr"] / math.sqrt(t))


def lr_schedule(step, max_lr, min_lr, warmup_steps, total_steps):
    """Learning rate: up in a line to max_lr at warmup_steps, down a half cosine to min_lr at
    total_steps, then min_lr. It depends on nothing but `step`: a resume cannot restart it."""
    if step < warmup_steps:
        return max_lr * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr + (max_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


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


# ---- data, evaluation, checkpoints


def get_batch(tokens, batch_size, context_length, device="cpu"):
    """Random windows of `tokens`, a 1-D array (a memory map stays one): ids and targets, both int64
    (B, T), the targets one token further on. Raises ValueError if there is no whole window."""
    if len(tokens) <= context_length:
        raise ValueError(
            f"the text has {len(tokens)} tokens: context_length {context_length} needs one more "
            "than that; take more text or a shorter context"
        )
    starts = torch.randint(len(tokens) - context_length, (batch_size,)).numpy()
    windows = tokens[starts[:, None] + np.arange(context_length + 1)]  # (B, T + 1)
    windows = torch.from_numpy(np.asarray(windows, dtype=np.int64))
    if torch.device(device).type == "cuda":  # pinned, so that the copy need not be waited for
        windows = windows.pin_memory().to(device, non_blocking=True)
    return windows[:, :-1], windows[:, 1:]


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


def save_checkpoint(model, optimizer, step, out):
    """Weights, optimizer, random state, step; to a path (whole or not at all) or an open file."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    if hasattr(out, "write"):
        torch.save(state, out)
    else:
        with atomic(out) as file:
            torch.save(state, file)


def load_checkpoint(src, model, optimizer):
    """Restore what save_checkpoint wrote, into model, optimizer and torch's random state; returns
    the step. Raises ValueError where the file is unreadable, truncated or of another model."""
    try:
        state = torch.load(src, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    except Exception as error:  # torch.load raises a dozen kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise ValueError(
            f"checkpoint {src} cannot be read ({reason}): remove it, or start again with --fresh"
        ) from None
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"])
    return state["step"]


# ---- training


@dataclass
class TrainConfig:
    """How to train; run.py chooses the values for the machine and preset."""

    steps: int = 1000  # optimizer steps
    tokens_per_step: int = 8192  # batch size, tokens
    micro_batch: int | None = None  # sequences at once, the rest is accumulated; None: what fits
    max_lr: float = 1e-3  # learning rate after the warm-up
    min_lr: float = 1e-4  # learning rate at the end
    warmup_steps: int = 100  # steps of rising learning rate
    weight_decay: float = 0.1  # AdamW's, on matrices
    beta1: float = 0.9  # AdamW's memory of gradients
    beta2: float = 0.99  # AdamW's memory of squared gradients
    max_norm: float = 1.0  # gradients are clipped to this norm
    eval_every: int = 100  # steps between evaluations and checkpoints
    eval_tokens: int = 50_000  # held-out tokens in an evaluation
    patience: int = 10  # evaluations without a better loss before it stops early
    seed: int = 1  # of initialisation, batches and dropout
    compile: bool | None = None  # torch.compile; None: on CUDA (on a CPU it takes half a minute)

    def __post_init__(self):
        for name in ("steps", "tokens_per_step", "eval_every", "eval_tokens", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


def micro_batch_size(config, context_length, sequences, device):
    """Sequences at once on a CUDA device: what fits in two thirds of the free memory. A token keeps
    about 36 bytes a layer and channel and 10 a vocabulary entry until the backward pass."""
    if torch.device(device).type != "cuda":
        return sequences
    per_token = 36 * config.n_layers * config.d_model + 10 * config.vocab_size
    fits = int(0.66 * torch.cuda.mem_get_info(device)[0] / (per_token * context_length))
    return max(1, min(sequences, fits))


def compiled(model, wanted):
    """torch.compile, where it is wanted and a C compiler is there; otherwise the model as it is."""
    if wanted and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        warnings.warn("no C compiler here: training without torch.compile, slower", stacklevel=2)
        wanted = False
    return torch.compile(model) if wanted else model


def train(model, train_tokens, val_tokens, config, run, device="cpu", dtype=torch.float32, **hooks):
    """Train `model` in place; returns the last line of metrics.

    train_tokens, val_tokens: 1-D integer arrays. `run` has `dir`, `resume` and `log(**metrics)`, as
    common.Run. In run.dir: state.pt, the newest state, after each evaluation and when stopped; and
    the model of the lowest validation loss as save_pretrained writes it.
    hooks: val_bytes, the size of the held-out text, for bits per byte; peak_flops, of the machine,
    for MFU; on_step(metrics). Ctrl-C and SIGTERM save, then exit with 130 and 0; a second one ends
    at once. Raises ValueError on a loss that is not finite; state.pt is then the last good one."""
    context_length = model.config.context_length
    sequences = max(1, config.tokens_per_step // context_length)
    micro = config.micro_batch or micro_batch_size(model.config, context_length, sequences, device)
    chunks = [min(micro, sequences - i) for i in range(0, sequences, micro)]
    betas = (config.beta1, config.beta2)
    optimizer = AdamW(model.parameters(), config.max_lr, betas, weight_decay=config.weight_decay)
    kind, wanted = torch.device(device).type, config.compile
    forward = compiled(model, kind == "cuda" if wanted is None else wanted)
    autocast = torch.autocast(kind, dtype) if dtype != torch.float32 else nullcontext()
    bits_per_byte = len(val_tokens) / hooks.get("val_bytes", math.inf) / math.log(2)  # times nats
    state, step, best, since_best, trained, line = run.dir / "state.pt", 0, math.inf, 0, 0.0, {}
    if run.resume and state.exists():
        step = load_checkpoint(state, model, optimizer)
        for line in map(json.loads, open(run.dir / "metrics.jsonl")):
            if line["step"] <= step:
                trained = line["time"]
                if line.get("val_loss") is not None:
                    since_best = 0 if line["val_loss"] < best else since_best + 1
                    best = min(best, line["val_loss"])
    signals = []

    def stop(number, _):
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    start = time.perf_counter() - trained
    model.train()
    while step < config.steps and since_best < config.patience and not signals:
        began = time.perf_counter()
        step += 1
        args = (config.max_lr, config.min_lr, config.warmup_steps, config.steps)
        lr = optimizer.param_groups[0]["lr"] = lr_schedule(step, *args)
        loss = 0.0
        for n in chunks:  # each chunk's mean counts by its share, as if it were one batch
            ids, targets = get_batch(train_tokens, n, context_length, device)
            with autocast:
                part = forward(ids, targets) * (n / sequences)
            part.backward()
            loss += part.item()
        norm = clip_gradients(model.parameters(), config.max_norm).item()
        if not math.isfinite(loss + norm):
            raise ValueError(
                f"step {step}: the loss is {loss}, the gradient norm {norm}: stopped; {state} "
                "holds the last good state; lower --max_lr or look at the text around there"
            )
        optimizer.step()
        optimizer.zero_grad()
        rate = sequences * context_length / (time.perf_counter() - began)
        mfu = (
            rate * model.flops_per_token() / hooks["peak_flops"] if "peak_flops" in hooks else None
        )
        line = dict(step=step, time=round(time.perf_counter() - start, 3), train_loss=loss, lr=lr)
        line |= dict(tokens=step * sequences * context_length, grad_norm=norm, tokens_per_s=rate)
        line |= dict(mfu=mfu, val_loss=None, val_bpb=None)
        if step % config.eval_every == 0 or step == config.steps:
            size = max(1, 16384 // context_length)
            with autocast:
                val_loss = evaluate(
                    model, val_tokens, context_length, config.eval_tokens, size, device
                )
            line |= dict(val_loss=val_loss, val_bpb=val_loss * bits_per_byte)
            since_best = 0 if val_loss < best else since_best + 1
            if val_loss < best:
                best = val_loss
                model.save_pretrained(run.dir)
        run.log(**line)
        if line["val_loss"] is not None:
            save_checkpoint(model, optimizer, step, state)
        if "on_step" in hooks:
            hooks["on_step"](line)
    if signals:
        save_checkpoint(model, optimizer, step, state)
        if best == math.inf:  # no evaluation yet: this model is the best there is
            model.save_pretrained(run.dir)
        print(
            f"stopped after step {step} and saved in {run.dir}: the same command goes on from there"
        )
        sys.exit(130 if signals[0] == signal.SIGINT else 0)
    return line


# ---- generation


def sample_next(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw the next id for each row: logits (B, V) to int64 (B,).

    temperature divides the logits; 0 takes the likeliest id. top_k keeps the k likeliest ids, top_p
    the fewest whose probabilities reach p, counted after top_k; one of what is left is drawn.
    Raises ValueError where temperature < 0, top_k < 1 or top_p is not in (0, 1]."""
    if temperature < 0 or (top_k is not None and top_k < 1) or not 0 < (top_p or 1.0) <= 1:
        raise ValueError("temperature is at least 0, top_k at least 1, top_p in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(descending=True)
        before = probs.cumsum(-1) - probs  # the first is always kept
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
