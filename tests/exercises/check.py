"""make exercise-03: which of the exercises in 03_gpt/exercises.py are done.

check_03.py beside this file has one function an exercise, with its name and in its order. It takes
what the reader wrote, a value or a function, and raises Differs with what is wrong and a hint.
"""

import ast
import hashlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


class Differs(AssertionError):
    """What the reader wrote is not what was asked for: its text says how, and gives a hint."""


class Open(Differs):
    """Nothing was written yet."""


def measured(given, name, hint):
    """(number, letter), what the last exercise of a stage returns, each filled in."""
    if not isinstance(given, tuple) or len(given) != 2:
        raise Differs(f"it returned {given!r}. Hint: return {name}, letter")
    if given == (None, None):
        raise Open()
    if given[0] is None:
        raise Differs(f"{name} is open. Hint: {hint}")
    if given[1] is None:
        raise Differs("letter is open: a, b or c")
    return given


def same(got, wanted, hint, tolerance=1e-5):
    """Raise Differs unless `got` is `wanted`: tensors and floats to a relative and absolute
    tolerance, all else by ==. Tensors must have the same shape; their dtypes may differ."""
    import torch

    if isinstance(wanted, torch.Tensor):
        if not isinstance(got, torch.Tensor):
            raise Differs(f"got a {type(got).__name__}, not a tensor. Hint: {hint}")
        if got.shape != wanted.shape:
            shapes = f"{tuple(got.shape)}, not {tuple(wanted.shape)}"
            raise Differs(f"the shape is {shapes}. Hint: {hint}")
        got, wanted = got.detach().double(), wanted.detach().double()
        wrong = ~torch.isclose(got, wanted, tolerance, tolerance, equal_nan=True)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            one, other = got[at].item(), wanted[at].item()
            digits = 15 if f"{one:.6g}" == f"{other:.6g}" else 6
            where = f" at {list(at)}" if at else ""
            raise Differs(f"{one:.{digits}g}{where}, not {other:.{digits}g}. Hint: {hint}")
    elif isinstance(wanted, float):
        if isinstance(got, torch.Tensor) and got.numel() == 1:
            got = got.item()
        if not isinstance(got, (int, float)) or isinstance(got, bool):
            raise Differs(f"got {got!r}, not a number. Hint: {hint}")
        if not abs(got - wanted) <= tolerance * max(1.0, abs(wanted)):
            raise Differs(f"got {got:.6g}. Hint: {hint}")
    elif isinstance(wanted, str) and isinstance(got, str):  # a letter
        if got.strip("(). ").lower() != wanted:
            raise Differs(f"got {got!r}. Hint: {hint}")
    elif type(got) is not type(wanted):
        kinds = [type(x).__name__ for x in (got, wanted)]
        kinds = [f"an {kind}" if kind.startswith("int") else f"a {kind}" for kind in kinds]
        raise Differs(f"got {got!r}, {kinds[0]}: {kinds[1]} is asked for. Hint: {hint}")
    elif got != wanted:
        wrong = ""
        if isinstance(got, tuple) and len(got) == len(wanted):
            places = [str(n) for n, (a, b) in enumerate(zip(got, wanted), 1) if a != b]
            wrong = f", of which {' and '.join(places)} of {len(got)} not"
        raise Differs(f"got {got!r}{wrong}. Hint: {hint}")


def load(path):
    """The module in a file, under a name of its own: each stage has an exercises.py."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stage(number):
    """The folder of a stage by its number; its files, and the checks', can be imported then."""
    folders = sorted(ROOT.glob("[0-9][0-9]_*/exercises.py"))
    found = [path.parent for path in folders if path.parent.name.startswith(f"{number}_")]
    if not found:
        numbers = " ".join(path.parent.name[:2] for path in folders)
        raise ValueError(f"there are no exercises {number}: give one of {numbers}")
    sys.path[:0] = [p for p in map(str, (found[0], ROOT, HERE)) if p not in sys.path]
    return found[0]


def checks(number):
    """{name: check} of a stage, in order."""
    module = load(HERE / f"check_{number}.py")
    own = inspect.getmembers(module, inspect.isfunction)
    own = [(n, f) for n, f in own if f.__module__ == module.__name__ and not n.startswith("_")]
    return dict(sorted(own, key=lambda item: item[1].__code__.co_firstlineno))


def is_open(answer):
    """True for None, and for a function of which there is only a docstring and `...`."""
    if not inspect.isfunction(answer):
        return answer is None
    try:
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(answer))).body
        return all(isinstance(n.value, ast.Constant) for n in function.body)
    except (OSError, SyntaxError, AttributeError, TypeError):  # of a lambda: no body like this
        return False


def is_shipped(answer, check):
    """True for the planted bug as it came: SHIPPED in check_03.py has the digest of its source."""
    try:
        digest = hashlib.sha256(inspect.getsource(answer).encode()).hexdigest()
    except (OSError, TypeError):  # not a function, or one without a file
        return False
    return digest[:8] == check.__globals__["SHIPPED"]


def verdict(check, module, path):
    """done, not yet, or what differs."""
    if not hasattr(module, check.__name__):
        return "it is gone: the check looks for this name"
    answer = getattr(module, check.__name__)
    if is_open(answer) or is_shipped(answer, check):
        return "not yet"
    try:
        check(answer)
    except Open:
        return "not yet"
    except Differs as error:
        return str(error)
    except Exception as error:
        calls = traceback.extract_tb(error.__traceback__)
        lines = [call.lineno for call in calls if Path(call.filename) == path]
        where = f" (line {lines[-1]})" if lines else ""
        return f"{type(error).__name__}: {error}{where}"
    return "done"


def main(number):
    number = number.zfill(2) if number else ""
    folder = stage(number)
    path = folder / "exercises.py"
    print(path.relative_to(ROOT))
    try:
        module = load(path)
    except Exception as error:
        line = (
            getattr(error, "lineno", None) or traceback.extract_tb(error.__traceback__)[-1].lineno
        )
        why = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        raise ValueError(f"{path.relative_to(ROOT)} cannot be read, line {line}: {why}") from None
    done, todo, name = 0, checks(number), ""
    try:
        for name, check in todo.items():
            said = verdict(check, module, path)
            done += said == "done"
            short = said if said in ("done", "not yet") else "differs"
            print(f"  {short:8} {name}", flush=True)
            if short == "differs":
                print(textwrap.fill(said, 96, initial_indent=" " * 11, subsequent_indent=" " * 11))
    except KeyboardInterrupt:
        print(f"stopped in {name}", file=sys.stderr)
        return 130
    print(f"{done} of {len(todo)} done")
    return done < len(todo)


if __name__ == "__main__":
    import check  # not this module, __main__, but the one whose Differs the checks raise

    try:
        sys.exit(check.main(*sys.argv[1:2] or [""]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
