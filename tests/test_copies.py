"""A copy is its parent's, letter for letter, unless the docstring says that it changed."""

import copies
import pytest


@pytest.mark.parametrize("path", copies.stages(), ids=lambda path: path.parent.name)
def test_copies_are_their_parents(path):
    wrong = [f"{name} differs from {parent.name}'s" for name, parent in copies.drifted(path)]
    assert not wrong, f"{path}: {wrong}: `make copies`, or name it under Changed"
    assert not copies.misstated(path)


def test_every_stage_says_whose_copy_it_is():
    folders = {path.parent for path in copies.stages()}
    assert folders == set(copies.ROOT.glob("[0-9][0-9]_*"))


PARENT = '"""One.\n\nParent: none\n"""\n\n\nclass A:\n    x = 1\n\n\nclass B:\n    x = 1\n'
CHILD = (
    '"""Two.\n\nParent: 01_one/one.py\nNew: C\nChanged: B\n"""\n\n\nclass A:\n    x = 2\n\n\n'
    "class B:\n    x = 2\n\n\nclass C:\n    x = 2\n"
)


@pytest.fixture
def tree(tmp_path):
    for folder, text in (("01_one/one.py", PARENT), ("02_two/two.py", CHILD)):
        (tmp_path / folder).parent.mkdir()
        (tmp_path / folder).write_text(text)
    return tmp_path


def test_drift_is_seen_and_a_fix_is_carried_down(tree):
    child = tree / "02_two" / "two.py"
    assert [name for name, _ in copies.drifted(child, tree)] == ["A"]  # B may differ, C is new
    assert copies.carry(tree) == ["A: 01_one/one.py -> 02_two/two.py"]
    assert copies.drifted(child, tree) == []
    text = child.read_text()
    assert "class A:\n    x = 1\n" in text and "class B:\n    x = 2\n" in text
    assert copies.carry(tree) == []


def test_a_fix_goes_through_a_chain(tree):
    third = tree / "03_three" / "three.py"
    third.parent.mkdir()
    third.write_text(
        '"""Three.\n\nParent: 02_two/two.py (A)\n"""\n\n\n'
        "class A:\n    x = 3\n\n\nclass B:\n    x = 9\n"
    )
    copies.carry(tree)
    assert "class A:\n    x = 1\n" in third.read_text()
    assert "class B:\n    x = 9\n" in third.read_text()  # only A is taken from this parent


def test_what_the_docstring_says_must_be_there(tree):
    child = tree / "02_two" / "two.py"
    child.write_text(CHILD.replace("New: C", "New: A, C").replace("Changed: B", "Changed: B, Gone"))
    assert copies.misstated(child, tree) == [
        "A is under New but has a parent",
        "Gone is under Changed but nowhere defined",
    ]


def test_a_fork_without_the_parent_does_not_complain(tree):
    (tree / "01_one" / "one.py").unlink()
    child = tree / "02_two" / "two.py"
    assert copies.drifted(child, tree) == [] and copies.parents(child, tree) == []
