"""Models of scaling.py as directories in Hugging Face's layout, llama or qwen3.

What it teaches: nothing that 04_modern/weights.py does not; it is as much of it as training needs.

Parent: none
New: everything
"""

import json

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common import atomic

TOKENIZER_FILES = "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja"
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "dropout": "attention_dropout",
}
HF_NAMES = [
    ("token_embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
    (".out.", ".o_proj."),
    (".down.", ".down_proj."),
    ("output.", "lm_head."),
]


def config_to_hf(c):
    """What config.json of the llama or, with qk_norm, qwen3 layout holds."""
    kind, architecture = ("qwen3", "Qwen3") if c.qk_norm else ("llama", "Llama")
    hf = {"architectures": [f"{architecture}ForCausalLM"], "model_type": kind}
    hf |= {theirs: getattr(c, ours) for ours, theirs in HF_CONFIG.items()}
    hf |= {"head_dim": c.head_dim, "hidden_act": "silu", "attention_bias": False}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    hf |= {"rope_theta": c.rope_theta, "rope_parameters": rope}  # before and since transformers 5
    return hf | {"torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None}


def parts(name, shape, config):
    """{their name: rows} of the tensors that, row under row, are ours: gate over up, and so on."""
    theirs = name if name.startswith(("token", "blocks", "output")) else f"model.{name}"
    for ours, other in HF_NAMES:
        theirs = theirs.replace(ours, other)
    if ".qkv." in theirs:
        heads = dict(q=config.n_heads, k=config.n_kv_heads, v=config.n_kv_heads)
        rows = {f"{k}_proj": n * config.head_dim for k, n in heads.items()}
        return {theirs.replace("qkv", k): n for k, n in rows.items()}
    if ".gate_up." in theirs:
        return {theirs.replace("gate_up", k): config.d_ff for k in ("gate_proj", "up_proj")}
    return {theirs: shape[0]}


def tokenizer_files(directory):
    """{name: text} of the files of a tokenizer that are in a directory."""
    files = [directory / name for name in TOKENIZER_FILES.split()]
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}


def read(path):
    """Fields of the TransformerConfig, and tensors by their names, of a model directory."""
    try:
        hf = json.loads((path / "config.json").read_text())
        fields = {ours: hf[theirs] for ours, theirs in HF_CONFIG.items()}
        fields |= dict(rope_theta=(hf.get("rope_parameters") or hf)["rope_theta"])
        fields |= dict(qk_norm=dict(llama=False, qwen3=True)[hf["model_type"]])
        return fields, load_file(path / "model.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is not a model directory of this stage: {error!r}") from None


def assemble(tensors, model, path):
    """{our name: tensor} for the parameters of a model; ValueError lists what does not fit."""
    state, problems = {}, []
    for name, p in model.named_parameters():
        found = {part: tensors.get(part) for part in parts(name, p.shape, model.config)}
        missing = [part for part, tensor in found.items() if tensor is None]
        whole = None if missing else torch.cat([x.float() for x in found.values()])
        if missing or whole.shape != p.shape:
            got = f"missing {', '.join(missing)}" if missing else tuple(whole.shape)
            problems.append(f"{name} of {tuple(p.shape)}: {got}")
        state[name] = whole
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return state


def write(path, config, named, files):
    """A model directory of {our name: parameter} and {name: text} of the tokenizer."""
    tensors = {}
    for name, p in named.items():
        theirs = parts(name, p.shape, config)
        rows = p.detach().float().cpu().split(list(theirs.values()))
        tensors |= {part: values.contiguous() for part, values in zip(theirs, rows)}
    with atomic(path / "model.safetensors") as file:
        file.write(save(tensors, {"format": "pt"}))
    for name, text in {**files, "config.json": json.dumps(config_to_hf(config), indent=1)}.items():
        with atomic(path / name, "w") as file:
            file.write(text)
