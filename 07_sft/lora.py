"""LoRA: a large model fine-tuned through two small matrices beside each of its large ones.

What it teaches: what fine-tuning adds to a matrix has few directions, so it can be written as a
product of two thin matrices: some hundredths of the numbers to train, to keep optimizer states for
and to store; merged, it costs nothing.

Parent: none
New: everything

Read in this order: LoRALinear, add_lora, merged; save_adapter and load_adapter, in peft's layout.

Papers: Hu et al. 2021, arXiv 2106.09685
"""

import json
import math
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from common import atomic


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + alpha / rank · dropout(x) Aᵀ Bᵀ, with W and b frozen (Hu et al. 2021).

    A (rank, d_in) is random and B (d_out, rank) 0: at first nothing changes. A Linear whose rows
    are several matrices under one another, `parts`, {name: rows}, has an A and a B for each of
    those in `wanted`, as if they were Linears of their own."""

    def __init__(self, linear, rank, alpha, dropout=0.0, parts=None, wanted=None):
        super().__init__()
        if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA of rank {rank}, alpha {alpha}, dropout {dropout} cannot be")
        self.weight, self.bias = linear.weight.requires_grad_(False), linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.parts, self.dropout = parts or {"weight": len(linear.weight)}, dropout
        self.scale, self.kept = alpha / rank, None
        d_in, place = linear.weight.shape[1], dict(device=linear.weight.device)
        self.lora_a, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
        for name, rows in self.parts.items():
            if wanted is None or name in wanted:
                self.lora_a[name] = nn.Parameter(torch.empty(rank, d_in, **place))
                self.lora_b[name] = nn.Parameter(torch.zeros(rows, rank, **place))
                nn.init.kaiming_uniform_(self.lora_a[name], a=math.sqrt(5))

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        if self.kept is not None:  # merged: W has it
            return y
        down = torch.cat([self.lora_a[name] for name in self.lora_a])  # (parts · rank, d_in)
        up = torch.block_diag(*(self.up(name) for name in self.parts))  # (d_out, parts · rank)
        low = F.linear(F.dropout(x, self.dropout, self.training), down)  # (..., parts · rank)
        return y + F.linear(low, up) * self.scale

    def up(self, name):
        """B of a part; of one without LoRA rows of nothing."""
        none = self.weight.new_zeros(self.parts[name], 0)
        return self.lora_b[name] if name in self.lora_b else none

    @torch.no_grad()
    def merge(self):
        """Add B A to W: from here on as fast as a Linear."""
        if self.kept is None:
            self.kept = self.weight.clone()
            down = torch.cat([self.lora_a[name] for name in self.lora_a])
            up = torch.block_diag(*(self.up(name) for name in self.parts))
            self.weight += self.scale * up @ down

    @torch.no_grad()
    def unmerge(self):
        """Take it back: W is to the bit what it was."""
        if self.kept is not None:
            self.weight.copy_(self.kept)
            self.kept = None


LORA_TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"  # as peft names them


def add_lora(model, rank, alpha, dropout=0.0, targets=LORA_TARGETS, layers=""):
    """Freeze a TransformerLM and put LoRALinears on the named matrices of the chosen layers, such
    as "0,5"; all where that is empty. Raises ValueError for a name or a layer that is not there."""
    c, wanted = model.config, set(targets.split(","))
    if unknown := wanted - set(LORA_TARGETS.split(",")):
        raise ValueError(f"--lora_targets {min(unknown)!r} is none of {LORA_TARGETS}")
    chosen = [layer.strip() for layer in layers.split(",") if layer.strip()]
    for layer in chosen:
        if not layer.isdigit() or int(layer) >= c.n_layers:
            raise ValueError(f"--lora_layers {layers!r}: there is no layer {layer}")
    model.requires_grad_(False)
    kv = c.n_kv_heads * c.head_dim
    for i, block in enumerate(model.blocks):
        if chosen and str(i) not in map(str, map(int, chosen)):
            continue
        for owner, name, parts in (
            (block.attention, "qkv", dict(q_proj=c.n_heads * c.head_dim, k_proj=kv, v_proj=kv)),
            (block.attention, "out", dict(o_proj=c.d_model)),
            (block.mlp, "gate_up", dict(gate_proj=c.d_ff, up_proj=c.d_ff)),
            (block.mlp, "down", dict(down_proj=c.d_model)),
        ):
            if wanted & parts.keys():
                linear = getattr(owner, name)
                setattr(owner, name, LoRALinear(linear, rank, alpha, dropout, parts, wanted))
    model.lora = dict(r=rank, lora_alpha=alpha, lora_dropout=dropout, layers=chosen)
    model.lora |= dict(target_modules=sorted(wanted))
    return model


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


@contextmanager
def merged(model):
    """While it lasts the LoRA matrices, if there are any, are part of the weights."""
    for layer in lora_layers(model):
        layer.merge()
    try:
        yield model
    finally:
        for layer in lora_layers(model):
            layer.unmerge()


def adapter_tensors(model):
    """{peft's name: parameter} of a model's LoRA matrices, and of its embedding if that is trained,
    for which its vocabulary has to be enlarged."""
    places, found = dict(q="self_attn", k="self_attn", v="self_attn", o="self_attn"), {}
    for i, block in enumerate(model.blocks):
        for layer in lora_layers(block):
            for name in layer.lora_a:
                theirs = f"base_model.model.model.layers.{i}.{places.get(name[0], 'mlp')}.{name}"
                found[f"{theirs}.lora_A.weight"] = layer.lora_a[name]
                found[f"{theirs}.lora_B.weight"] = layer.lora_b[name]
    if model.token_embedding.weight.requires_grad:
        found["base_model.model.model.embed_tokens.weight"] = model.token_embedding.weight
        if not model.config.tie_embeddings:
            found["base_model.model.lm_head.weight"] = model.output.weight
    return found


def save_adapter(model, path, base):
    """Write adapter_config.json and adapter_model.safetensors as `peft` does; base: the directory
    of the model that it belongs to."""
    lora = dict(model.lora)
    layers = [int(layer) for layer in lora.pop("layers")]
    config = dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    config |= dict(bias="none", fan_in_fan_out=False, inference_mode=True, **lora)
    config |= dict(layers_to_transform=layers or None, use_rslora=False, use_dora=False)
    tensors = {k: v.detach().float().cpu() for k, v in adapter_tensors(model).items()}
    with atomic(Path(path) / "adapter_model.safetensors") as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))
    with atomic(Path(path) / "adapter_config.json", "w") as file:
        json.dump(config, file, indent=1)


def load_adapter(model, path):
    """Put the adapter in a directory, ours or peft's, on a TransformerLM. Raises ValueError where
    it is not whole, or not for this model."""
    try:
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        tensors = safetensors.torch.load_file(Path(path) / "adapter_model.safetensors")
        how = (config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
        targets = config["target_modules"]
        targets = targets if isinstance(targets, str) else ",".join(targets)
        layers = config.get("layers_to_transform")
        layers = [layers] if isinstance(layers, int) else layers or []
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a whole adapter: {error}") from None
    more = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save")
    if wrong := [name for name in more if config.get(name)]:
        raise ValueError(f"the adapter in {path} has {wrong[0]}, which is not supported here")
    add_lora(model, *how, targets, ",".join(map(str, layers)))
    if any("embed_tokens" in name for name in tensors):
        model.token_embedding.requires_grad_(True)
        model.output.requires_grad_(True)
    own = adapter_tensors(model)
    wrong = [n for n in own if n not in tensors or tensors[n].shape != own[n].shape]
    if wrong := wrong + sorted(tensors.keys() - own.keys()):
        raise ValueError(f"the adapter in {path} does not fit this model: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    return model
