"""The READMEs tell the truth: their commands exist, their tables are what results.jsonl gives."""

import functools
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import readme

TEXTS = {str(path.relative_to(readme.ROOT)): path for path in readme.readmes()}


def commands():
    """The lines of the ```sh blocks of all READMEs, and `make ...` or `python ...` in the text."""
    found = {}
    for name, path in TEXTS.items():
        text = path.read_text()
        lines = [
            s for block in re.findall(r"```sh\n(.*?)```", text, re.S) for s in block.splitlines()
        ]
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        lines += re.findall(r"`((?:make|python|pytest) [^`\n]+)`", prose)
        for line in lines:
            line = line.split(" #")[0].strip()
            if line and not line.startswith(("git clone", "cd ", "#")):
                found.setdefault(line, name)
    return found


def dry(line):
    """A form of the command that runs at once: make -n, or the --help of a module."""
    words = shlex.split(line)
    while re.match(r"[A-Z_]+=", words[0]):  # VARIABLE=value in front
        words.pop(0)
    if words[0] == "make":
        return ["make", "-n", *words[1:]]
    assert words[0] in ("python", "pytest"), f"{line}: not a make, python or pytest command"
    return words if words[1] != "-m" else [sys.executable, *words[1:3], "--help"]


HELP = """
import contextlib, io, json, os, re, runpy, sys
path, found = sys.argv[1], {}
sys.path[0] = os.path.dirname(path)
def ask(*words):
    sys.argv, text = [path, *words, "--help"], io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as end:
            assert not end.code, (words, end.code)
    found[" ".join(words)] = text.getvalue()
ask()
for name in (re.search(r"\\{([\\w,-]+)\\}", found[""]) or ["", ""])[1].split(","):
    ask(*filter(None, [name]))
print(json.dumps(found))
"""


@functools.cache
def helps(path):
    """{command: its --help} of a script, "" for that of the script: one process for all, as to
    import torch takes longest."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HELP, str(readme.ROOT / path)]
    done = subprocess.run(command, cwd=readme.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{path}: {done.stderr}"
    return json.loads(done.stdout)


def test_commands_are_found():
    assert {"make 03", "make test"} <= set(commands())


@pytest.mark.parametrize("line", commands())
def test_command_exists(line):
    command = dry(line)
    for path in re.findall(r"(?:ARGS|PROMPT|DATA)=\S*|\b\d\d_\w+/\S+\.py\b", line):
        assert "=" in path or (readme.ROOT / path).exists(), f"{line}: no {path}"
    if command[0] == "python":
        name = "".join(word for word in command[2:3] if not word.startswith("-"))
        assert name in helps(command[1]), f"{line}: no command {name}"
        for flag in [word for word in command[2:] if word.startswith("--")]:
            assert flag.split("=")[0] in helps(command[1])[name], f"{line}: no flag {flag}"
        return
    if command[0] == "pytest":  # that they can be collected is seen where they run
        assert list((readme.ROOT / command[1]).glob("test_*.py")), f"{line}: no tests there"
        return
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=readme.ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{commands()[line]}: {line}\n{done.stderr}"


@pytest.mark.parametrize(
    "path", sorted(readme.ROOT.glob("[0-9][0-9]_*/run.py")), ids=lambda p: p.parent.name
)
def test_every_command_of_a_stage_has_help(path):
    names = [name for name in helps(path.relative_to(readme.ROOT).as_posix()) if name]
    assert names[0] in ("train", "measure", "serve")  # what a bare run.py does
    for name in names:
        text = helps(path.relative_to(readme.ROOT).as_posix())[name]
        assert text.count("(default:") == text.count("  --"), f"{path} {name}: {text}"


@pytest.mark.parametrize("name", TEXTS)
def test_results_tables_are_what_results_jsonl_gives(name):
    text = TEXTS[name].read_text()
    assert readme.MARKS.search(text), f"{name} has no <!-- results --> marks"
    assert readme.rendered(TEXTS[name]) == text, f"{name}: run `make readme`"


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", TEXTS[name].read_text()):
        assert (TEXTS[name].parent / target).exists(), f"{name} links to {target}"


def test_a_table_of_two_runs():
    rows = [
        dict(command="a", commit="c", machine="m", seed=1, bpb=2.34567),
        dict(seed=2, minutes=3.0),
    ]
    assert readme.table(rows).splitlines() == [
        "| seed | bpb | minutes | command, commit, machine |",
        "| --- | --- | --- | --- |",
        "| 1 | 2.346 |  | `a`, c, m |",
        "| 2 |  | 3 | ``, ,  |",
    ]
