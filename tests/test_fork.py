"""Each stage, copied alone into an empty directory, works there: help, a short run, its tests."""

import os
import subprocess
import sys

import fork
import pytest

FOLDERS = sorted(path.name for path in fork.ROOT.glob("[0-9][0-9]_*"))
SMALL = "--d_model 16 --n_layers 1 --n_heads 2 --context_length 16 --steps 3 "
SMALL += "--tokens_per_step 64 --eval_every 3 --device cpu"
# The smallest run of each stage on {text}, on {chats} or {pairs}.
MINIMAL = {
    "01_tokenizer": "train --data {text}",
    "02_attention": "measure --max_context 256 --d_model 32 --n_heads 4",
    "03_gpt": "train --data {text} " + SMALL,
    "04_modern": "train --data {text} " + SMALL,
    "05_scaling": "train --data {text} " + SMALL,
    "06_moe": "train --data {text} " + SMALL + " --n_experts 4",
    "07_sft": "train --data {chats} --steps 3 --tokens_per_step 512 --eval_every 3 --device cpu",
    "08_reward": "train --data {pairs} --steps 3 --tokens_per_step 512 --eval_every 3 --device cpu",
    "09_rlhf": "train --data {pairs} --reward stop_in_time --steps 3 --device cpu",
    "10_semantic": "bytes --data {text} --flops 3e9 --context_length 32 --sample 200",
    "11_serve": "ask --max_tokens 4 --device cpu",
}


def in_fork(folder, *command):
    env = {k: v for k, v in os.environ.items() if k not in ("OUT", "PYTHONPATH")}
    env |= {"OMP_NUM_THREADS": "1", "IN_FORK": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder.parent, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.skipif("IN_FORK" in os.environ, reason="a fork does not fork again")
@pytest.mark.parametrize("name", FOLDERS)
def test_fork_runs_alone(tmp_path, name):
    folder = fork.fork(name[:2], tmp_path / "mine")
    text = tmp_path / "text.txt"
    text.write_text("A small text about nothing much,\nrepeated until it will do.\n" * 100)
    chats = tmp_path / "chats.jsonl"
    chats.write_text('{"prompt": "How many?", "response": "Just one."}\n' * 20)
    pairs = tmp_path / "pairs.jsonl"
    pair = '{{"prompt": "How many? {}", "chosen": "Just one.", "rejected": "x"}}\n'
    pairs.write_text("".join(map(pair.format, range(20))))
    words = MINIMAL[name].format(text=text, chats=chats, pairs=pairs).split()
    assert words[0] in in_fork(folder, f"{name}/run.py", "--help")
    in_fork(folder, f"{name}/run.py", *words)
    made = {path.name for path in (folder.parent / "out").iterdir()}
    assert name in made  # in the fork, not beside the original
    # All of its tests are collected there and one in twelve runs: beside the original all do.
    quiet = ("-m", "pytest", "-p", "no:cacheprovider")
    listed = in_fork(folder, *quiet, name, "--collect-only")
    tests = [line for line in listed.splitlines() if line.startswith(f"{name}/") and "::" in line]
    assert len(tests) > 20
    in_fork(folder, *quiet, *tests[::12], "-x")


def test_fork_refuses_an_unknown_stage_and_a_full_directory(tmp_path):
    with pytest.raises(ValueError, match="none of 01_tokenizer"):
        fork.fork("99", tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="not empty"):
        fork.fork("03", tmp_path / "mine")
    with pytest.raises(ValueError, match="TO= is missing"):
        fork.fork("03", "")
