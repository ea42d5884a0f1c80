"""GPT-2 for the engine: 03's model, with its keys and values in a paged cache.

What it teaches: nothing but how little the engine asks of a model: `hidden(ids, cache)`, in which
each attention hands its queries, keys and values to the cache and gets the result.

Parent: 03_gpt/gpt.py (GPTConfig, Linear, Embedding, LayerNorm, Attention, MLP, Block, GPT, hf_name,
    is_conv1d, cross_entropy)
Changed: GPTConfig, Attention, Block, GPT
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class GPTConfig:
    """The shape of the model, as config.json of a GPT-2 tells it."""

    vocab_size: int
    context_length: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int | None = None  # width inside the MLP; None is 4 d_model
    gelu: str = "tanh"  # tanh, GPT-2's approximation, or exact
    norm_eps: float = 1e-5  # added to the variance in LayerNorm
    tie_embeddings: bool = True  # use the token embedding as the output layer, too
    bias: bool = True  # their layout always has them

    def __post_init__(self):
        self.d_ff = self.d_ff or 4 * self.d_model
        self.n_kv_heads, self.head_dim = self.n_heads, self.d_model // self.n_heads


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


class Attention(nn.Module):
    """Causal multi-head self-attention. 02_attention takes it apart; here it is one fused call."""

    def __init__(self, config, layer):
        super().__init__()
        self.n_heads, self.layer = config.n_heads, layer
        self.qkv = Linear(config.d_model, 3 * config.d_model, config.bias)
        self.out = Linear(config.d_model, config.d_model, config.bias)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(self.layer, q, k, v)
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

    def __init__(self, config, layer):
        super().__init__()
        self.norm1 = LayerNorm(config.d_model, config.norm_eps, config.bias)
        self.attention = Attention(config, layer)
        self.norm2 = LayerNorm(config.d_model, config.norm_eps, config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attention(self.norm1(x), cache)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """`model(ids)`: logits (B, T, V). `model(ids, targets)`: the mean loss in nats, a scalar.

    ids and targets: int64 (B, T) with T up to context_length. Only for reading and writing text:
    there is no dropout."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.token_embedding = Embedding(config.vocab_size, config.d_model)
        self.position_embedding = Embedding(config.context_length, config.d_model)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = LayerNorm(config.d_model, config.norm_eps, config.bias)
        self.output = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.output.weight = self.token_embedding.weight

    def hidden(self, ids, cache=None):
        """What the output layer sees: ids (1, N) of an engine's Pass to (1, N, C); without one, of
        whole texts, (B, T) to (B, T, C)."""
        T = ids.shape[1]
        if cache is None and T > self.config.context_length:
            raise ValueError(f"{T} tokens do not fit into {self.config.context_length}: crop them")
        positions = torch.arange(T, device=ids.device) if cache is None else cache.positions
        x = self.token_embedding(ids) + self.position_embedding(positions)
        for block in self.blocks:
            x = block(x, cache)
        return self.norm(x)

    def forward(self, ids, targets=None):
        logits = self.output(self.hidden(ids))  # (B, T, V)
        return logits if targets is None else cross_entropy(logits, targets)

    @classmethod
    def from_tensors(cls, path, hf, tensors, device="cpu", dtype=torch.float32):
        """A GPT-2 of what loading.read gives. Raises ValueError for another activation, and where
        tensors are missing or misshapen: all of them are named."""
        gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "exact"}
        activation = hf.get("activation_function", "gelu_new")
        if activation not in gelu:
            raise ValueError(f"{path} has the activation {activation}, which GPT-2 has not")
        try:
            sizes = [hf[key] for key in "vocab_size n_positions n_embd n_layer n_head".split()]
        except KeyError as error:
            raise ValueError(f"{path}: its config lacks {error}") from None
        eps, tied = hf.get("layer_norm_epsilon", 1e-5), hf.get("tie_word_embeddings", True)
        config = GPTConfig(*sizes, hf.get("n_inner"), gelu[activation], eps, tied)
        with torch.device("meta"):  # nothing is drawn that would be overwritten
            model = cls(config)
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        state, problems = {}, []
        for name, parameter in model.named_parameters():
            theirs = hf_name(name).removeprefix("transformer.")
            tensor = tensors.get(theirs)
            if tensor is not None and is_conv1d(name):
                tensor = tensor.T.contiguous()
            if tensor is None or tensor.shape != parameter.shape:
                shape = "missing" if tensor is None else tuple(tensor.shape)
                problems.append(f"{theirs} is {shape}, not {tuple(parameter.shape)}")
            state[name] = tensor
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}")
        model.load_state_dict(state, strict=False, assign=True)
        if config.tie_embeddings:
            model.output.weight = model.token_embedding.weight
        return model.to(device, dtype)


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


def cross_entropy(logits, targets):
    """Mean of -log softmax(logits)[target] in nats: logits (..., V), targets int64 (...).

    log-sum-exp subtracts the largest logit first, so that nothing overflows."""
    logits = logits.to(
        torch.promote_types(logits.dtype, torch.float32)
    )  # bfloat16 would lose digits
    chosen = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)  # (...)
    return (logits.logsumexp(-1) - chosen).mean()
