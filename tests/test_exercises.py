"""The exercises can be done, are not done yet, and a wrong answer is told that it is wrong."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "exercises"))
import check as exercises  # noqa: E402

FOLDERS = sorted(exercises.ROOT.glob("[0-9][0-9]_*"))
each = pytest.mark.parametrize("number", [folder.name[:2] for folder in FOLDERS])


def parts(number):
    """The checks, the open file and the answers of a stage."""
    folder = exercises.stage(number)
    answers = exercises.load(exercises.HERE / "answers" / f"{number}.py")
    return exercises.checks(number), exercises.load(folder / "exercises.py"), answers


@each
def test_five_exercises_each_saying_what_is_wanted(number):
    todo, _, answers = parts(number)
    text = (exercises.stage(number) / "exercises.py").read_text()
    tree = ast.parse(text).body
    found = []
    for node, following in zip(tree, [*tree[1:], None]):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            found.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(following, ast.Expr):
            found.append(node.targets[0].id)
    assert found == list(todo) and len(todo) == 5
    assert all(hasattr(answers, name) for name in todo)
    assert len(text.splitlines()) <= 200


@each
def test_the_answers_pass(number):
    todo, _, answers = parts(number)
    for name, check in todo.items():
        check(getattr(answers, name))


@each
def test_the_open_file_passes_none_and_its_bug_is_caught(number):
    todo, opened, _ = parts(number)
    path = exercises.stage(number) / "exercises.py"
    verdicts = {name: exercises.verdict(check, opened, path) for name, check in todo.items()}
    assert set(verdicts.values()) == {"not yet"}, verdicts
    bug, check = list(todo.items())[2]
    assert not exercises.is_open(getattr(opened, bug))  # it runs, and does the wrong thing
    with pytest.raises(exercises.Differs, match="."):  # and is told so where it is a try
        check(getattr(opened, bug))


@each
def test_wrong_answers_are_told_what_differs(number):
    todo, _, answers = parts(number)
    assert set(answers.WRONG) == set(todo) and all(answers.WRONG.values())
    for name, wrong in answers.WRONG.items():
        for i, answer in enumerate(wrong):
            with pytest.raises(exercises.Differs):
                todo[name](answer)
                print(f"{name}: wrong answer {i} passes")


# ---- what a reader sees


@pytest.fixture
def tree(tmp_path):
    """A copy of what make exercise-03 needs; write(old, new) changes its exercises.py."""
    root = exercises.ROOT
    skip = shutil.ignore_patterns("__pycache__", "answers")
    for name in ("03_gpt", "common", "tests/exercises"):
        shutil.copytree(root / name, tmp_path / name, ignore=skip)
    path = tmp_path / "03_gpt" / "exercises.py"

    def write(*changes):
        text = path.read_text()
        for old, new in changes:
            assert old in text
            text = text.replace(old, new, 1)
        path.write_text(text)

    return tmp_path, write


def run(root, *words):
    command = [sys.executable, root / "tests" / "exercises" / "check.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_the_report(tree):
    root, write = tree
    code, out, _ = run(root, "03")
    assert code == 1 and "0 of 5 done" in out and out.count("not yet") == 5
    write(
        ("parameters = None", "parameters = 60_960"),
        ('in float32."""\n    ...', 'in float32."""\n    return logits.mean() + nothing'),
        ("return windows[:, 1:], windows[:, 1:]", "return windows[:, :-1], windows[:, 1:]"),
    )  # fmt: skip
    code, out, err = run(root, "03")
    assert code == 1 and not err and "1 of 5 done" in out
    assert "  done     next_batch" in out and "  not yet  wsd_schedule" in out
    assert "  differs  parameters\n           got 60960. Hint: two embeddings" in out
    assert "NameError: name 'nothing' is not defined (line " in out


def test_all_done_is_exit_code_0(tree):
    root, _ = tree
    shutil.copy(exercises.HERE / "answers" / "03.py", root / "03_gpt" / "exercises.py")
    code, out, _ = run(root, "03")
    assert code == 0 and "5 of 5 done" in out


@pytest.mark.parametrize(
    "new, said",
    [
        ("return 4.5, letter", "letter is open: a, b or c"),
        ("return 4.5", "it returned 4.5. Hint: return loss, letter"),
    ],
)
def test_half_of_an_answer_is_told_from_none(tree, new, said):
    root, write = tree
    write(("return loss, letter", new))
    code, out, _ = run(root, "03")
    assert code == 1 and said in out and "not yet  loss_before_training" not in out


def test_a_lambda_in_place_of_a_function_is_checked(tree):
    root, write = tree
    write(("# ---- 3.", "cross_entropy = lambda logits, targets: 0.0\n# ---- 3."))
    code, out, err = run(root, "03")
    assert code == 1 and not err and "  differs  cross_entropy" in out


@pytest.mark.parametrize(
    "change, words, said",
    [
        (("return loss, letter", "return loss, ("), ("03",), "exercises.py cannot be read, line"),
        (("import torch", "import torch_"), ("03",), "line 7: ModuleNotFoundError"),
        (None, ("12",), "there are no exercises 12: give one of 03"),
        (None, (), "there are no exercises : give one of 03"),
    ],
)  # fmt: skip
def test_one_line_where_it_cannot_check(tree, change, words, said):
    root, write = tree
    if change:
        write(change)
    code, _, err = run(root, *words)
    assert code == 2 and err.count("\n") == 1 and said in err


def test_a_name_that_is_gone_is_said(tree):
    root, write = tree
    write(("def next_batch", "def following_batch"))
    code, out, _ = run(root, "03")
    assert code == 1 and "it is gone: the check looks for this name" in out


def test_ctrl_c_says_where_it_was(tree):
    root, write = tree
    write(('in float32."""\n    ...', 'in float32."""\n    while True:\n        pass'))
    command = [sys.executable, root / "tests" / "exercises" / "check.py", "3"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as process:
        while "parameters" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(1)  # by then it is in the one after that
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "stopped in cross_entropy\n" and process.wait() == 130
