"""Models of moe.py as directories in Hugging Face's layout, and mixtures made of dense ones.

What it teaches: a mixture on disk is a dense checkpoint in which a layer's MLP comes E times, with
a router beside it; so that one can be made of the other by copying.

Parent: 05_scaling/layout.py (tokenizer_files)
New: kind_of, config_from_hf, read_dense, copy_mlps
Changed: config_to_hf, parts, read, assemble, write

Read in this order: kind_of, config_to_hf, config_from_hf; parts, assemble; read_dense, copy_mlps.

Papers
- Sparse upcycling: Komatsuzaki et al. 2022, arXiv 2212.05055
"""

import json
from dataclasses import asdict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from common import atomic

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja"
OWN = "moe_from_nothing"  # the layout of what no layout of Hugging Face's holds
CLASSES = dict(llama="Llama", qwen3="Qwen3", mixtral="Mixtral", qwen3_moe="Qwen3Moe")
HF_CONFIG = {
    "vocab_size": "vocab_size",
    "context_length": "max_position_embeddings",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "dropout": "attention_dropout",
}
MOE_CONFIG = {"top_k": "num_experts_per_tok", "balance_weight": "router_aux_loss_coef"}
HF_NAMES = [
    ("token_embedding.", "model.embed_tokens."),
    ("blocks.", "model.layers."),
    (".norm1.", ".input_layernorm."),
    (".norm2.", ".post_attention_layernorm."),
    (".attention.", ".self_attn."),
    (".out.", ".o_proj."),
    (".down.", ".down_proj."),
    (".router.bias", ".gate.e_score_correction_bias"),
    (".router.", ".gate."),
    (".shared.", ".shared_expert."),
    ("output.", "lm_head."),
]
MIXTRAL_NAMES = [
    (".mlp.", ".block_sparse_moe."),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
]


def kind_of(c):
    """The layout that holds a MoEConfig: llama or qwen3 where no layer has experts, mixtral where
    all have, qwen3_moe with qk_norm, or OWN."""
    plain = c.scoring == "softmax" and c.balance != "bias" and not c.n_shared
    if not any(c.sparse):
        return "qwen3" if c.qk_norm else "llama"
    if plain and c.renormalize and not c.qk_norm and all(c.sparse):
        return "mixtral"
    return "qwen3_moe" if plain and c.qk_norm else OWN


def config_to_hf(c):
    """What config.json holds for a MoEConfig."""
    kind = kind_of(c)
    if kind == OWN:
        return {"model_type": OWN} | asdict(c)
    hf = {"architectures": [f"{CLASSES[kind]}ForCausalLM"], "model_type": kind}
    hf |= {theirs: getattr(c, ours) for ours, theirs in HF_CONFIG.items()}
    hf |= {"hidden_act": "silu", "attention_bias": False, "sliding_window": None}
    rope = {"rope_type": "default", "rope_theta": c.rope_theta}
    hf |= {"rope_theta": c.rope_theta, "rope_parameters": rope}  # before and since transformers 5
    if any(c.sparse):
        hf |= {theirs: getattr(c, ours) for ours, theirs in MOE_CONFIG.items()}
        hf |= {"num_local_experts": c.n_experts, "num_experts": c.n_experts}
    if kind == "mixtral":
        hf |= {"intermediate_size": c.d_expert, "router_jitter_noise": c.jitter}
    if kind == "qwen3_moe":
        dense = [layer for layer, sparse in enumerate(c.sparse) if not sparse]
        hf |= {"moe_intermediate_size": c.d_expert, "norm_topk_prob": c.renormalize}
        hf |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    return hf | {"torch_dtype": "float32", "bos_token_id": None, "eos_token_id": None}


def config_from_hf(hf, path):
    """Fields of a MoEConfig from what their config.json holds; ValueError where it is of another
    architecture or asks for what moe.py does not do."""
    kind = hf.get("model_type")
    if kind == OWN:
        return {name: value for name, value in hf.items() if name not in ("model_type", *TOKEN_IDS)}
    if kind not in CLASSES:
        raise ValueError(f"{path} holds a {kind} model: {', '.join(CLASSES)} and {OWN} are read")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    wrong = [key for key in ("attention_bias", "mlp_bias") if hf.get(key)]
    window = hf.get("sliding_window") if hf.get("use_sliding_window", kind == "mixtral") else None
    wrong += [f"sliding_window {window}"] if window else []
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wrong += [f"rope_type {rope_type}"] if rope_type != "default" else []
    wrong += [f"hidden_act {hf['hidden_act']}"] if hf.get("hidden_act", "silu") != "silu" else []
    if wrong:
        raise ValueError(f"{path} asks for {', '.join(wrong)}, which is not supported here")
    fields = {ours: hf[theirs] for ours, theirs in HF_CONFIG.items() if theirs in hf}
    fields |= dict(rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    fields |= dict(qk_norm=kind.startswith("qwen3"), moe_layers="none")
    fields |= dict(tie_embeddings=hf.get("tie_word_embeddings", False))
    if kind in ("mixtral", "qwen3_moe"):
        fields |= {ours: hf[theirs] for ours, theirs in MOE_CONFIG.items() if theirs in hf}
        fields |= dict(n_experts=hf.get("num_local_experts") or hf["num_experts"], moe_layers="all")
    if kind == "mixtral":
        fields |= dict(d_expert=hf["intermediate_size"], jitter=hf.get("router_jitter_noise", 0.0))
        fields |= dict(renormalize=True)  # also the weight of one
    if kind == "qwen3_moe":
        step, dense = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        layers = [
            i for i in range(hf["num_hidden_layers"]) if i not in dense and not (i + 1) % step
        ]
        fields |= dict(d_expert=hf["moe_intermediate_size"], renormalize=hf["norm_topk_prob"])
        fields |= dict(moe_layers=",".join(map(str, layers)) or "none")
    return fields


def parts(name, shape, config):
    """{their name: rows} of the tensors that, row under row, are ours: gate over up, one expert
    under another."""
    theirs = name if name.startswith(("token", "blocks", "output")) else f"model.{name}"
    for ours, other in HF_NAMES:
        theirs = theirs.replace(ours, other)
    if ".qkv." in theirs:
        heads = dict(q=config.n_heads, k=config.n_kv_heads, v=config.n_kv_heads)
        rows = {f"{k}_proj": n * config.head_dim for k, n in heads.items()}
        return {theirs.replace("qkv", k): n for k, n in rows.items()}
    if ".gate_up." in theirs:
        return {theirs.replace("gate_up", k): shape[0] // 2 for k in ("gate_proj", "up_proj")}
    if ".experts." in theirs:
        layer, matrix = theirs.split(".experts.")
        names = (f"{layer}.experts.{e}.{matrix}_proj.weight" for e in range(config.n_experts))
        return dict.fromkeys(names, shape[1])
    return {theirs: shape[0]}


def tokenizer_files(directory):
    """{name: text} of the files of a tokenizer that are in a directory."""
    files = [directory / name for name in TOKENIZER_FILES.split()]
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}


def read(path):
    """Of a model directory: fields of its MoEConfig, tensors by qwen3_moe's names, {name: text} of
    its tokenizer files, and eos_token_id and the like."""
    try:
        hf = json.loads((path / "config.json").read_text())
        index, shards = path / "model.safetensors.index.json", {"model.safetensors"}
        if index.exists() and not (path / "model.safetensors").exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
        fields, tensors = config_from_hf(hf, path), {}
        for shard in sorted(shards):
            tensors |= load_file(path / shard)
    except (
        OSError,
        LookupError,
        TypeError,
        AttributeError,
        json.JSONDecodeError,
        SafetensorError,
    ) as error:
        raise ValueError(f"{path} is not a whole model directory: {error!r}") from None
    if hf["model_type"] == "mixtral":
        for ours, theirs in MIXTRAL_NAMES:
            tensors = {name.replace(theirs, ours): tensor for name, tensor in tensors.items()}
    token_ids = {key: hf[key] for key in TOKEN_IDS if hf.get(key) is not None}
    return fields, tensors, tokenizer_files(path), token_ids


def assemble(tensors, model, path):
    """{our name: tensor} for the parameters and biases of a model, which may be on the meta device.

    Raises ValueError that lists every tensor that is missing, misshapen or unknown."""
    state, problems, known, c = {}, [], {"lm_head.weight"}, model.config
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name == "frequencies" or (name.endswith("router.bias") and c.balance != "bias"):
            state[name] = torch.zeros(p.shape)
            continue
        rows = parts(name, p.shape, c)
        known |= rows.keys()
        for part, n in rows.items():
            found = tuple(tensors[part].shape) if part in tensors else "missing"
            if found != (shape := (n, *p.shape[1:][-1:])):
                problems.append(f"{part} is {found}, not {shape}")
        if not problems:
            state[name] = torch.cat([tensors[part].float() for part in rows]).view(p.shape)
    problems += [f"{n} is unknown" for n in tensors if n not in known and "inv_freq" not in n]
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{path}: {'; '.join(problems[:8])}{more}")
    return state


def write(path, model, state):
    """A model directory of a MoETransformerLM, whose `state` holds all of its experts."""
    c, tensors = model.config, {}
    names = {name for name, _ in model.named_parameters()}
    names |= {name for name in state if name.endswith("router.bias") and c.balance == "bias"}
    for name in sorted(names):
        p = state[name].detach().float().cpu()
        theirs = parts(name, p.shape, c)
        rows = p.reshape(-1, p.shape[-1]) if p.ndim > 1 else p
        tensors |= dict(zip(theirs, rows.split(list(theirs.values()))))
    if kind_of(c) == "mixtral":
        for ours, theirs in MIXTRAL_NAMES:
            tensors = {name.replace(ours, theirs): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic(path / "model.safetensors") as file:
        file.write(save(tensors, {"format": "pt"}))
    hf = json.dumps(config_to_hf(c) | model.token_ids, indent=1)
    for name, text in {**model.tokenizer_files, "config.json": hf}.items():
        with atomic(path / name, "w") as file:
            file.write(text)


def read_dense(path):
    """As read, of a dense model; ValueError where it is none."""
    fields, *rest = read(path)
    if fields["moe_layers"] != "none":
        raise ValueError(f"{path} is a mixture already: give a dense model, a llama or qwen3")
    return fields, *rest


def copy_mlps(tensors, dense, config, path):
    """The tensors of a mixture of shape `config` from those of a dense model, whose fields `dense`
    holds: each expert its layer's MLP, a random router. Raises ValueError where they do not fit."""
    wrong = [
        f"{name} {getattr(config, name)} (it has {value})"
        for name, value in dense.items()
        if name not in ("moe_layers", "dropout", "context_length")
        and getattr(config, name) != value
    ]
    if config.d_expert != dense["d_ff"]:
        wrong.append(f"d_expert {config.d_expert} (a copied MLP has {dense['d_ff']})")
    if not config.renormalize or config.n_shared:
        wrong.append("weights that do not sum to 1, or shared experts")
    if wrong:
        raise ValueError(f"the dense model {path} does not fit: {', '.join(wrong)}")
    tensors = dict(tensors)
    for layer in (i for i, sparse in enumerate(config.sparse) if sparse):
        mlp = f"model.layers.{layer}.mlp"
        for matrix in ("gate", "up", "down"):
            if (weight := tensors.pop(f"{mlp}.{matrix}_proj.weight", None)) is not None:
                names = (f"{mlp}.experts.{e}.{matrix}_proj.weight" for e in range(config.n_experts))
                tensors |= dict.fromkeys(names, weight)
        router = torch.randn(config.n_experts, config.d_model) * config.std
        tensors |= {f"{mlp}.gate.weight": router}
        if config.balance == "bias":
            tensors |= {f"{mlp}.gate.e_score_correction_bias": torch.zeros(config.n_experts)}
    return tensors
