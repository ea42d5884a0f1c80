"""Hyperbolic geometry against closed forms, embeddings against flat ones, the two hierarchies."""

import math

import draw_hyperbolic as draw
import hyperbolic as hyp
import hyperbolic_study as study
import pytest
import torch
from trees import class_tree, closure, play_tree

import common

torch.set_num_threads(1)
GEOMETRIES = ["euclidean", "poincare", "lorentz"]


def ball(n, dim=3, most=0.95, seed=0):
    """n points of the ball, float64, at radii up to `most`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    r = torch.rand(n, 1, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True) * most * r


def tangents(x, seed=1):
    """A tangent at each point of the hyperboloid."""
    v = torch.randn(*x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    return v + hyp.lorentz_inner(x, v)[:, None] * x


def test_distance_against_closed_forms():
    x, y, z = ball(50), ball(50, seed=1), ball(50, seed=2)
    d = hyp.poincare_distance(x, y)
    near = (x - y).square().sum(1) / (1 - x.square().sum(1)) / (1 - y.square().sum(1))
    torch.testing.assert_close(d, torch.acosh(1 + 2 * near))  # the paper's formula
    torch.testing.assert_close(hyp.poincare_distance(x, 0 * x), 2 * torch.atanh(x.norm(dim=1)))
    other = hyp.poincare_distance(x, z) + hyp.poincare_distance(z, y)
    assert (d <= other).all() and (d < 0.999 * other).any()
    u, v = hyp.to_lorentz(x), hyp.to_lorentz(y)
    torch.testing.assert_close(hyp.lorentz_distance(u, v), torch.acosh(-hyp.lorentz_inner(u, v)))


def test_two_maps_of_one_space():
    x, y = ball(50), ball(50, seed=1)
    u, v = hyp.to_lorentz(x), hyp.to_lorentz(y)
    torch.testing.assert_close(hyp.lorentz_inner(u, u), -torch.ones(50, dtype=x.dtype))
    torch.testing.assert_close(hyp.lorentz_distance(u, v), hyp.poincare_distance(x, y))
    torch.testing.assert_close(hyp.to_poincare(u), x)
    for one, two, geometry in ((x, y, "poincare"), (u, v, "lorentz")):  # by one matrix product
        d = hyp.poincare_distance(x[:, None], y)
        torch.testing.assert_close(hyp.gaps(one, two, geometry), torch.cosh(d))
    torch.testing.assert_close(hyp.gaps(x, y, "euclidean").sqrt(), torch.cdist(x, y))


def test_exponential_map_of_the_ball():
    x = ball(50)
    v = ball(50, seed=1) * 0.5
    torch.testing.assert_close(hyp.poincare_exp(x, 0 * v), x)
    norm = v.norm(dim=1, keepdim=True)
    torch.testing.assert_close(hyp.poincare_exp(0 * x, v), torch.tanh(norm) * v / norm)
    y = hyp.poincare_exp(x, v)
    length = (hyp.poincare_factor(x) * norm).squeeze(1)
    torch.testing.assert_close(hyp.poincare_distance(x, y), length)
    half = hyp.poincare_exp(x, v / 2)  # on the way: a geodesic, not just a point at that distance
    torch.testing.assert_close(hyp.poincare_distance(half, y), length / 2)
    direction = (hyp.poincare_exp(x, v * 1e-6) - x) / 1e-6
    torch.testing.assert_close(direction, v, rtol=1e-3, atol=1e-4)


def test_exponential_map_of_the_hyperboloid():
    x = hyp.to_lorentz(ball(50))
    v = tangents(x)
    v = v / hyp.lorentz_inner(v, v).sqrt()[:, None] * torch.linspace(0.1, 3, 50).double()[:, None]
    torch.testing.assert_close(hyp.lorentz_exp(x, 0 * v), x)
    y, length = hyp.lorentz_exp(x, v), torch.linspace(0.1, 3, 50).double()
    torch.testing.assert_close(hyp.lorentz_inner(y, y), -torch.ones_like(length), rtol=1e-9, atol=0)
    torch.testing.assert_close(hyp.lorentz_distance(x, y), length)
    half = hyp.lorentz_exp(x, v / 2)
    torch.testing.assert_close(hyp.lorentz_distance(half, y), length / 2)


def test_gradients_in_float64():
    x, y, v = ball(4), ball(4, seed=1), ball(4, seed=2) * 0.3
    u, w = hyp.to_lorentz(x), hyp.to_lorentz(y)
    out = x / x.norm(dim=1, keepdim=True) * 1.5  # outside: pulled back
    cases = [(hyp.poincare_distance, x, y), (hyp.poincare_exp, x, v), (hyp.poincare_project, out)]
    cases += [(hyp.poincare_project, x), (hyp.to_lorentz, x), (hyp.to_poincare, u)]
    cases += [(hyp.lorentz_distance, u, w), (hyp.lorentz_exp, u, tangents(u))]
    cases += [(hyp.lorentz_project, u)]
    for function, *points in cases:
        points = [p.clone().requires_grad_() for p in points]
        assert torch.autograd.gradcheck(function, points), function.__name__


@pytest.mark.parametrize("radius", [1 - 1e-6, 1 - 1e-10])
def test_near_the_boundary(radius):
    x = torch.tensor([[radius, 0.0], [radius, 0.0], [0.0, radius], [0.0, 0.0]]).double()
    x[:3] *= radius / x[:3].norm(dim=1, keepdim=True)
    x.requires_grad_()
    d = hyp.poincare_distance(x[[0, 0, 0, 3]], x[[1, 2, 3, 3]])
    (grad,) = torch.autograd.grad(d.sum(), x)
    assert d.isfinite().all() and grad.isfinite().all()
    assert d[0] < 1e-9 and d[3] < 1e-9  # coincident points: none
    torch.testing.assert_close(d[2], 2 * torch.atanh(x[0].norm()).detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        d[1] - 2 * d[2], torch.tensor(-math.log(2)).double(), rtol=1e-4, atol=0
    )
    moved = hyp.step(x.detach(), -1e30 * grad, 1.0, "poincare", longest=5.0)
    assert moved.isfinite().all() and (moved.norm(dim=1) < 1).all()
    assert (hyp.poincare_distance(moved, 0 * moved) < 24).all()


def test_small_distances_keep_their_digits():
    x = torch.tensor([0.3, 0.4]).double()
    for size in 1e-3, 1e-9, 1e-13:
        v = torch.tensor([size, 0.0]).double()
        expected = torch.tensor(size * 2 / 0.75).double()
        near = hyp.poincare_distance(x, x + v)
        torch.testing.assert_close(near, expected, rtol=2 * size + 1e-3, atol=0)
    u = hyp.to_lorentz(x)
    d = hyp.lorentz_distance(u, hyp.to_lorentz(x + torch.tensor([1e-9, 0.0])))
    torch.testing.assert_close(d, torch.tensor(2e-9 / 0.75).double(), rtol=1e-3, atol=0)
    u = u[None].requires_grad_()
    (grad,) = torch.autograd.grad(hyp.lorentz_distance(u, u.detach()).sum(), u)
    assert grad.isfinite().all()


def test_projections_touch_only_what_is_off():
    x = ball(20)
    assert torch.equal(hyp.poincare_project(x), x)
    for dtype, digits in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        out = hyp.poincare_project((x / x.norm(dim=1, keepdim=True) * 7).to(dtype))
        assert (1 - out.norm(dim=1)).min() > digits / 2 and (1 - out.norm(dim=1)).max() < 2 * digits
    u = hyp.to_lorentz(x)
    off = hyp.lorentz_project(u + torch.eye(4, dtype=u.dtype)[0])
    torch.testing.assert_close(off, u)


@pytest.mark.parametrize("geometry", ["poincare", "lorentz"])
def test_riemannian_gradient_against_autograd(geometry):
    """The slope of a loss along any geodesic is the inner product with the Riemannian gradient."""
    x, target = ball(6, most=0.8), ball(6, seed=3)
    if geometry == "lorentz":
        x, target = hyp.to_lorentz(x), hyp.to_lorentz(target)
        v, exp, distance = tangents(x), hyp.lorentz_exp, hyp.lorentz_distance
        gradient, inner = hyp.lorentz_gradient, hyp.lorentz_inner
    else:
        v, exp, distance = ball(6, seed=4), hyp.poincare_exp, hyp.poincare_distance
        gradient = hyp.poincare_gradient

        def inner(a, b):
            return (a * b).sum(1) * hyp.poincare_factor(x).squeeze(1) ** 2

    x.requires_grad_()
    (grad,) = torch.autograd.grad(distance(x, target).square().sum(), x)
    t, x = torch.full((6, 1), 1e-7).double().requires_grad_(), x.detach()
    (slope,) = torch.autograd.grad(distance(exp(x, t * v), target).square().sum(), t)
    own = gradient(x, grad)
    torch.testing.assert_close(inner(own, v), slope[:, 0], rtol=1e-5, atol=1e-5)
    if geometry == "lorentz":  # tangent
        torch.testing.assert_close(hyp.lorentz_inner(x, own), torch.zeros(6).double())
    # A distance has the slope 1: a step of 0.1 against it comes 0.1 nearer, on the geodesic.
    x.requires_grad_()
    (grad,) = torch.autograd.grad(distance(x, target).sum(), x)
    x = x.detach()
    nearer = distance(hyp.step(x, grad, 0.1, geometry), target)
    torch.testing.assert_close(distance(x, target) - nearer, torch.full((6,), 0.1).double())
    capped = hyp.step(x, grad, 50.0, geometry, longest=0.2)
    torch.testing.assert_close(distance(x, capped), torch.full((6,), 0.2).double())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_steps_lower_a_loss_and_stay_on_the_manifold(geometry):
    x, losses = ball(30), []
    x = hyp.to_lorentz(x) if geometry == "lorentz" else x
    for _ in range(300):
        x.requires_grad_()
        gap = hyp.gaps(x, x, geometry)
        loss = gap.log1p().mean() + (1 / (0.1 + gap)).mean()
        (grad,) = torch.autograd.grad(loss, x)
        losses.append(loss.item())
        x = hyp.step(x.detach(), grad, 0.1, geometry)
    assert losses[-1] < losses[0] - 0.01 and all(b <= a + 1e-12 for a, b in zip(losses, losses[1:]))
    if geometry == "lorentz":
        torch.testing.assert_close(hyp.lorentz_inner(x, x), -torch.ones(30).double())
    assert geometry != "poincare" or (x.norm(dim=1) < 1).all()


def test_one_step_is_the_same_in_both_maps():
    x, y = ball(20), ball(20, seed=1)
    moved = []
    for geometry, into, distance in (
        ("poincare", lambda p: p, hyp.poincare_distance),
        ("lorentz", hyp.to_lorentz, hyp.lorentz_distance),
    ):
        p = into(x).requires_grad_()
        (grad,) = torch.autograd.grad(distance(p, into(y)).square().sum(), p)
        moved.append(hyp.step(p.detach(), grad, 0.2, geometry))
    torch.testing.assert_close(hyp.to_poincare(moved[1]), moved[0])


def plain_reconstruction(distance, edges):
    """The definition, by loops over a table of distances."""
    n, ranks, precisions = len(distance), [], []
    above = {u: [b for a, b in edges if a == u] for u in range(n)}
    for u in (u for u in range(n) if above[u]):
        rest = [w for w in range(n) if w != u and w not in above[u]]
        mine = [1 + sum(bool(distance[u, w] <= distance[u, v]) for w in rest) for v in above[u]]
        ranks += mine
        parts = [(k + 1) / (k + rank) for k, rank in enumerate(sorted(mine))]
        precisions.append(sum(parts) / len(parts))
    return sum(ranks) / len(ranks), sum(precisions) / len(precisions)


@pytest.mark.parametrize("cells", [1, 500, 10**6])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_reconstruction_against_loops(geometry, cells):
    x = ball(40)
    random = torch.Generator().manual_seed(3)
    parents = [[]] + [[int(torch.randint(i, (1,), generator=random))] for i in range(1, 40)]
    parents[30] += [7, 12]
    edges = closure(parents)
    table = torch.cdist(x, x) if geometry == "euclidean" else hyp.poincare_distance(x[:, None], x)
    points = hyp.to_lorentz(x) if geometry == "lorentz" else x
    shuffled = edges[torch.randperm(len(edges), generator=random)]
    found = hyp.reconstruction(points, shuffled, geometry, cells)
    assert found == pytest.approx(plain_reconstruction(table, edges.tolist()))
    assert 1 < found[0] and found[1] < 0.9


def test_reconstruction_of_the_perfect_and_of_the_useless():
    edges = torch.tensor([[1, 0], [2, 0], [3, 0], [4, 0]])
    cross = torch.tensor([[0, 0], [1, 0], [0, 1], [-1, 0], [0, -1]]).double()
    assert hyp.reconstruction(cross, edges, "euclidean") == (1, 1)
    # All in one place: nothing is told apart, so ties must not pass for rank 1.
    rank, score = hyp.reconstruction(0 * cross, edges, "euclidean")
    assert rank == 4 and score == pytest.approx(0.25)
    with pytest.raises(ValueError, match="not finite"):  # nan compares as nearer than nothing
        hyp.reconstruction(cross * math.nan, edges, "euclidean")


def test_bad_input_is_refused():
    edges = torch.tensor([[1, 0], [2, 0]])
    for bad, nodes, dim, geometry, text in (
        (edges, 3, 0, "poincare", "at least 1"),
        (edges[:0], 3, 2, "poincare", "pairs"),
        (edges[:, :1], 3, 2, "poincare", "pairs"),
        (edges, 2, 2, "poincare", "0 to 1"),
        (torch.tensor([[1, 1]]), 3, 2, "lorentz", "own node"),
        (edges, 3, 2, "spherical", "spherical"),
    ):
        with pytest.raises(ValueError, match=text):
            hyp.embed(bad, nodes, dim, geometry)
    with pytest.raises(ValueError, match="pairs"):
        hyp.reconstruction(torch.zeros(3, 2).double(), edges[:0], "euclidean")


def small_tree(branching=3, depth=4):
    parents, level = [[]], [0]
    for _ in range(depth):
        level = [
            len(parents) - 1 for p in level for _ in range(branching) if not parents.append([p])
        ]
    return parents


def test_a_small_tree_needs_hyperbolic_space():
    parents = small_tree()
    edges, scores = closure(parents), {}
    assert (len(parents), len(edges)) == (121, 3 + 9 * 2 + 27 * 3 + 81 * 4)
    for geometry in GEOMETRIES:
        rate, longest = (1.0, math.inf) if geometry == "euclidean" else (0.3, 0.5)
        settings = (rate, 1.0, longest)  # in two dimensions a small tree wants a sharpness of 1
        points = hyp.embed(edges, 121, 2, geometry, 150, settings, negatives=30, batch=16)
        assert points.shape == (121, 3 if geometry == "lorentz" else 2)
        scores[geometry] = hyp.reconstruction(points, edges, geometry)
        again = hyp.embed(edges, 121, 2, geometry, epochs=2)
        assert torch.equal(again, hyp.embed(edges, 121, 2, geometry, epochs=2))
    for geometry in "poincare", "lorentz":
        assert scores[geometry][1] > scores["euclidean"][1] + 0.2
        assert scores[geometry][0] < scores["euclidean"][0]


def test_closure_of_a_dag():
    # 3 has two parents that share a grandparent; it counts once.
    assert closure([[], [0], [0], [1, 2], [3]]).tolist() == [
        [1, 0], [2, 0], [3, 0], [3, 1], [3, 2], [4, 0], [4, 1], [4, 2], [4, 3],
    ]  # fmt: skip
    assert closure([[]]).shape == (0, 2)
    for loop in ([[1], [0]], [[0]], [[], [5]]):
        with pytest.raises(ValueError, match="its own ancestor"):
            closure(loop)


def test_play_tree():
    names = ["macbeth", "measure-for-measure"]
    labels, parents = play_tree(names)
    plays, above = common.plays(), closure(parents)
    kinds = [kind for name in names for kind, _, _ in plays[name] if kind != "direction"]
    assert len(labels) == len(parents) == 1 + len(names) + len(kinds)
    depth = above[:, 0].bincount(minlength=len(labels))
    assert [labels[i] for i in range(len(labels)) if depth[i] <= 1][:2] == ["plays", "macbeth"]
    first = labels.index("First Witch")  # speech, scene, act, play, root
    path = [labels[a] for a in above[above[:, 0] == first, 1]]
    assert path == ["plays", "macbeth", "ACT I", "SCENE I. A desert place."]
    second = labels.index("measure-for-measure")
    acts = [labels[i] for i in range(second) if parents[i] == [labels.index("macbeth")]]
    assert acts == ["ACT I", "ACT II", "ACT III", "ACT IV", "ACT V"]
    opening = second + 1  # no heading of act I in the source: the scene hangs on its play
    assert labels[opening].startswith("SCENE I.") and parents[opening] == [second]
    speeches = sum(kind == "speech" for kind, _, _ in plays["macbeth"])
    assert (depth[:second] == 4).sum() == speeches
    with pytest.raises(ValueError, match="no play hamnet"):
        play_tree(["hamnet"])


def ancestors(tree):
    labels, parents = tree
    found = {label: set() for label in labels}
    for node, above in closure(parents).tolist():
        found[labels[node]].add(labels[above])
    return found


def test_classes_of_the_standard_library():
    tree = class_tree()
    found = ancestors(tree)
    assert tree[0][0] == "object" and tree[1][0] == [] and len(tree[0]) > 1500
    assert all("object" in above for label, above in found.items() if label != "object")
    assert found["bool"] == {"int", "object"}
    assert found["OSError"] == {"Exception", "BaseException", "object"}
    assert found["ConnectionResetError"] >= {"ConnectionError", "OSError"}
    assert found["collections.OrderedDict"] == {"dict", "object"}
    assert found["json.decoder.JSONDecodeError"] >= {"ValueError", "Exception"}
    server = {"http.server.HTTPServer", "socketserver.TCPServer", "socketserver.ThreadingMixIn"}
    assert found["http.server.ThreadingHTTPServer"] >= server  # two bases: a DAG
    assert "EnvironmentError" not in found and not any(label.startswith("test") for label in found)


def test_classes_of_a_directory(tmp_path):
    (tmp_path / "pack" / "deep").mkdir(parents=True)
    (tmp_path / "test").mkdir()
    files = {
        "base.py": "class A: pass\nclass B(A, dict):\n class In(A): pass\n class Two(In): pass\n",
        "use.py": "import base as b, pack.deep\nfrom base import A as Z\nfrom star import *\n"
        "W = Z\nclass C(b.B, W): pass\nclass D(pack.deep.P, IOError): pass\n"
        "class E(Starred): pass\ntry:\n class T(Generic[C], C): pass\nexcept ImportError: pass\n"
        "class F(_thread.lock): pass\nimport _thread\nclass N(namedtuple('N', 'a')): pass\n",
        "star.py": "from star import *\nloop = loop\nfrom pack import P as Starred\n",
        "pack/__init__.py": "from .deep import P\n",
        "pack/deep/__init__.py": "from ...base import A\nfrom base import B\nclass P(B): pass\n",
        "broken.py": "class Broken(:\n",
        "test/skipped.py": "class Skipped: pass\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.py").write_bytes(b"\x00\xff\xfe class Q: pass")
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    found = ancestors(class_tree(tmp_path))
    top = {"object"}
    assert found["base.B"] == {"base.A", "dict"} | top
    assert found["base.B.Two"] == {"base.B.In", "base.A"} | top  # of the class around it
    assert found["use.C"] == {"base.B", "base.A", "dict"} | top  # import as, assignment
    assert found["use.D"] >= {"pack.deep.P", "base.B", "OSError"}
    assert found["use.E"] == {"pack.deep.P", "base.B", "base.A", "dict"} | top  # through * and as
    assert found["use.T"] >= {"use.C", "base.B"}  # inside try
    assert found["use.F"] == {"_thread.lock"} | top  # written in C
    assert not {
        label for label in found if label.startswith(("broken", "test")) or label.endswith(".Q")
    }
    assert class_tree(tmp_path) == class_tree(tmp_path)
    assert "bool" in class_tree(tmp_path / "absent")[0]  # no source: the builtins are left


# ---- the study


def test_a_chain_has_no_negatives_and_stays_finite():
    edges = closure([[], [0], [1]])  # the last has everything above it
    for geometry in GEOMETRIES:
        points = hyp.embed(edges, 3, 2, geometry, epochs=3)
        assert hyp.reconstruction(points, edges, geometry)[1] > 0.5  # raises where nan


def test_read_tree(tmp_path):
    file = tmp_path / "zoo.tsv"
    file.write_text("\ufeffcat\tmammal\n\ndog\tmammal\r\nmammal\tanimal\ndog\tpet\ndog\tpet\n")
    labels, parents = study.read_tree(file)
    above = {labels[n]: {labels[p] for p in some} for n, some in enumerate(parents)}
    assert above == {
        "cat": {"mammal"}, "dog": {"mammal", "pet"}, "mammal": {"animal"}, "animal": set(),
        "pet": set(),
    }  # fmt: skip
    assert [study.levels(parents)[labels.index(n)] for n in ("animal", "pet", "cat")] == [0, 0, 2]
    chain = "".join(f"{n}\t{n + 1}\n" for n in range(study.DEEPEST + 1))
    for bad, text in (
        ("", "line 1: the file is empty"),
        ("\n \n", "line 1: the file is empty"),
        ("a\tb\nc d\n", "line 2: 0 tabs"),
        ("a\tb\tc\n", "line 1: 2 tabs"),
        ("a\tb\nc\t\n", "line 2: a name is missing"),
        ("\tb\n", "line 1: a name is missing"),
        ("a\ta\n", "line 1: 'a' is its own ancestor"),
        ("x\ta\nq\tr\na\tb\nb\tc\nc\ta\n", r"line [345]: '[abc]' is its own ancestor"),
        (chain, "line 1: the tree has more than 200 levels"),
        (b"a\tb\n\xff\xfe\tb\n", "line 2: this is not UTF-8"),
    ):
        file.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        with pytest.raises(ValueError, match=f"zoo.tsv, {text}") as caught:
            study.read_tree(file)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="nowhere"):
        study.read_tree(tmp_path / "nowhere")


def test_below():
    labels, parents = list("rabcde"), [[], [0], [0], [1, 2], [3], [2]]
    assert study.below(labels, parents, "a") == (["a", "c", "d"], [[], [0], [1]])


@pytest.mark.parametrize(
    "bad", [dict(dims="2,x"), dict(dims="0"), dict(dims=""), dict(epochs=0), dict(plays="a,,b")]
)
def test_bad_options(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        study.HyperbolicOptions(**bad)


def test_compare_and_draw(tmp_path, monkeypatch):
    monkeypatch.setitem(study.DISC, "epochs", 40)
    parents, said = small_tree(), []
    lines = [f"n{n}\tn{p}\n" for n, above in enumerate(parents) for p in above]
    (tmp_path / "three.tsv").write_text("".join(lines))
    o = study.HyperbolicOptions(dims="5, 2", epochs=20, tree=str(tmp_path / "three.tsv"))
    found = study.compare(study.read_trees(o), o, said.append, tmp_path / "rows.jsonl")
    assert found["trees"] == {"three": dict(nodes=121, pairs=426, depth=4)} and len(said) == 6
    rows = [(row["geometry"], row["dim"]) for row in found["results"]]
    assert rows == [(geometry, dim) for dim in (2, 5) for geometry in GEOMETRIES]
    assert all(row["mean_rank"] >= 1 and 0 < row["map"] <= 1 for row in found["results"])
    again = study.compare(study.read_trees(o), o, said.append, tmp_path / "rows.jsonl")
    assert again["results"] == found["results"] and len(said) == 6  # kept, not done again
    draw.draw_curves(found["results"], tmp_path / "curves.png")
    draw.draw_disc(*found["disc"], tmp_path / "disc.png")
    assert all((tmp_path / f"{n}.png").stat().st_size > 20_000 for n in ("curves", "disc"))


def test_arcs_are_geodesics():
    for p, q in ((0.3 + 0.4j, -0.5 + 0.1j), (0.99 + 0.1j, 0.1 - 0.98j), (0j, 0.5j)):
        way = torch.tensor(draw.arc(p, q)).double()
        ends = torch.tensor([[p.real, p.imag], [q.real, q.imag]]).double()
        torch.testing.assert_close(way[[0, -1]], ends, rtol=1e-4, atol=1e-5)
        steps = hyp.poincare_distance(way[1:], way[:-1])  # of one length, and together the shortest
        torch.testing.assert_close(steps.sum(), hyp.poincare_distance(*ends), rtol=1e-3, atol=1e-3)
        assert steps.max() < 1.01 * steps.min()


def test_branches():
    # 0 has the leaf 1 and 2, which holds most: its children 3 (with 4, 5) and 6 are the heads.
    parents = [[], [0], [0], [2], [3], [3], [2], [6, 1]]
    hub, heads, branch = draw.branches(parents)
    assert (hub, heads) == (2, [3, 6]) and branch == [None, None, None, 0, 0, 0, 1, 1]
