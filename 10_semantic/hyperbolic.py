"""Hyperbolic space in two coordinate systems, and embeddings of a hierarchy learnt in it.

A hyperbolic ball grows exponentially with its radius, as a tree does with its depth. Poincaré's
ball has its points within the unit sphere, Lorentz' hyperboloid those x of R^(dim + 1) with
<x, x> = -1, x0 > 0: two maps of one space of curvature -1, which round differently (Mishne et al.
2022, arXiv 2211.00181). Nickel and Kiela 2017, 1705.08039, and 2018, 1806.03417; flat baselines
tuned as well: Bansal and Benton 2021, 2109.07488."""

import math

import torch

# Squared distances are at least this: a root has an infinite slope at 0, what is clamped has none.
TINY = 1e-30


def poincare_factor(x):
    """How much longer a step at x is than it looks, 2 / (1 - |x|^2): (..., dim) to (..., 1)."""
    return 2 / (1 - x.square().sum(-1, keepdim=True))


def poincare_distance(x, y):
    """(..., dim) twice to (...). The paper's arcosh(1 + 2t) as 2 arsinh(sqrt(t)), which keeps the
    digits of a small distance: in 1 + 2t it is gone below 1e-8."""
    t = (x - y).square().sum(-1) * (poincare_factor(x) * poincare_factor(y)).squeeze(-1) / 4
    return 2 * t.clamp(min=TINY).sqrt().asinh()


def poincare_exp(x, v):
    """Where the geodesic from x with velocity v is at time 1, |v| * factor away: Möbius' sum of x
    and of where v leads from the centre, a tanh. (..., dim) twice to (..., dim)."""
    norm = v.norm(dim=-1, keepdim=True).clamp(min=TINY)
    y = torch.tanh(poincare_factor(x) * norm / 2) * v / norm
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    xy = 2 * (x * y).sum(-1, keepdim=True)
    return ((1 + xy + yy) * x + (1 - xx) * y) / (1 + xy + xx * yy)


def poincare_project(x):
    """x, pulled back to a norm of 1 - 1e-10 (float32: 1 - 1e-5), 23.7 (12.2) from the centre, where
    it is beyond: there 1 - |x|^2 still has six (two) digits."""
    most = 1 - (1e-10 if x.dtype == torch.float64 else 1e-5)
    return x * (most / x.norm(dim=-1, keepdim=True).clamp(min=most))


def poincare_gradient(x, grad):
    """The Riemannian gradient at x for a Euclidean one: grad / factor^2."""
    return grad / poincare_factor(x).square()


def lorentz_inner(x, y):
    """<x, y> = -x0 y0 + x1 y1 + ...: (..., dim + 1) twice to (...)."""
    return (x[..., 1:] * y[..., 1:]).sum(-1) - x[..., 0] * y[..., 0]


def lorentz_distance(x, y):
    """(..., dim + 1) twice to (...): arcosh(-<x, y>), by the chord for the digits of a small one.
    Its cosh is off by about 1e-16 exp(2 radius): fit for radii up to 15, the ball for up to 23."""
    return 2 * (lorentz_inner(x - y, x - y).clamp(min=TINY).sqrt() / 2).asinh()


def lorentz_exp(x, v):
    """Where the geodesic from x with a tangent v, <x, v> = 0, is at time 1, sqrt(<v, v>) away."""
    norm = lorentz_inner(v, v).clamp(min=TINY).sqrt()[..., None]
    return torch.cosh(norm) * x + torch.sinh(norm) / norm * v


def lorentz_project(x):
    """x with the x0 that puts it on the hyperboloid, so that rounding does not add up."""
    return torch.cat([(1 + x[..., 1:].square().sum(-1, keepdim=True)).sqrt(), x[..., 1:]], -1)


def lorentz_gradient(x, grad):
    """The Riemannian gradient at x for a Euclidean one: the sign of x0 turned, then the tangent
    part v + <x, v> x."""
    v = torch.cat([-grad[..., :1], grad[..., 1:]], -1)
    return v + lorentz_inner(x, v)[..., None] * x


def to_lorentz(x):
    """The point of the hyperboloid for one of the ball: (..., dim) to (..., dim + 1)."""
    return torch.cat([poincare_factor(x) - 1, poincare_factor(x) * x], -1)


def to_poincare(x):
    """The point of the ball for one of the hyperboloid: (..., dim + 1) to (..., dim)."""
    return x[..., 1:] / (1 + x[..., :1])


def gaps(x, y, geometry):
    """What grows with the distance of every pair, by one matrix product: (B, D), (M, D) to (B, M).
    The squared distance in flat space, else cosh of the distance; loses those below 1e-7."""
    if geometry == "lorentz":
        return x[:, :1] @ y[:, :1].T - x[:, 1:] @ y[:, 1:].T
    xx, yy = x.square().sum(1, keepdim=True), y.square().sum(1)
    square = torch.addmm(xx + yy, x, y.T, alpha=-2)
    return 1 + 2 * square / ((1 - xx) * (1 - yy)) if geometry == "poincare" else square


def step(x, grad, rate, geometry, longest=math.inf):
    """x (N, D) after a step of Riemannian descent: along the geodesic against the gradient, rate
    times as far as it is long, at most `longest`. grad: the Euclidean gradient, (N, D)."""
    v, norm = grad, grad.norm(dim=1, keepdim=True)
    if geometry == "lorentz":
        v = lorentz_gradient(x, grad)
        norm = lorentz_inner(v, v).clamp(min=TINY).sqrt()[:, None]
    elif geometry == "poincare":
        v, norm = poincare_gradient(x, grad), norm / poincare_factor(x)
    v = -v * (longest / norm.clamp(min=TINY)).clamp(max=rate)
    if geometry == "lorentz":
        return lorentz_project(lorentz_exp(x, v))
    return poincare_project(poincare_exp(x, v)) if geometry == "poincare" else x + v


def by_node(edges, n_nodes):
    """(edges sorted by node, the place of each among those of its node from 0, edges of each node).
    Raises ValueError where edges (E, 2) are none, or lead to their own node or one not there."""
    if edges.shape[1:] != (2,) or not len(edges):
        raise ValueError(f"edges are (E, 2) pairs (node, ancestor), not {tuple(edges.shape)}")
    if edges.min() < 0 or edges.max() >= n_nodes or (edges[:, 0] == edges[:, 1]).any():
        raise ValueError(f"an edge leads to its own node, or is not within 0 to {n_nodes - 1}")
    edges = edges[edges[:, 0].argsort(stable=True)]
    counts = edges[:, 0].bincount(minlength=n_nodes)
    return edges, torch.arange(len(edges)) - (counts.cumsum(0) - counts)[edges[:, 0]], counts


# Rate, sharpness, longest step: for each a compromise over two trees and several dimensions. In a
# plane nodes have few ways to turn: hyperbolic ones need longer steps and, to fit, more curvature.
SETTINGS = dict(euclidean=(2.0, 1.0, math.inf), poincare=(0.1, 5.0, 0.5), lorentz=(0.1, 5.0, 0.5))
PLANE = SETTINGS | dict(poincare=(2.0, 0.5, 0.5), lorentz=(2.0, 0.5, 0.5))


def embed(edges, n_nodes, dim, geometry, epochs=60, settings=None, negatives=256, batch=64, seed=0):
    """Points (n_nodes, dim) in float64, (n_nodes, dim + 1) for lorentz, that put every node nearer
    to its ancestors than to others. edges: (E, 2) int64 pairs (node, ancestor) of the closure.
    A pair has the paper's loss -log(e^-d(u,v) / (e^-d(u,v) + sum of e^-d(u,w))) over nodes w that
    are no ancestors of u, drawn for each batch of nodes u and shared by it. d is the distance times
    a sharpness: a change of units in flat space, of curvature in hyperbolic space. The first third
    is the paper's burn-in at a tenth of the rate, else nodes fly apart before they have found their
    directions; the rate falls to 0. settings: rate, sharpness, longest step; None: as above.
    Raises ValueError for an unknown geometry, sizes below 1, and as by_node does."""
    if geometry not in SETTINGS or min(dim, epochs, negatives, batch) < 1:
        text = f"one of {', '.join(SETTINGS)}, dim, epochs, negatives and batch at least 1"
        raise ValueError(f"geometry {geometry!r} at dim {dim}: it must be {text}")
    edges, place, counts = by_node(edges, n_nodes)
    most, sharpness, longest = settings or (PLANE if dim == 2 else SETTINGS)[geometry]
    distance = lorentz_distance if geometry == "lorentz" else poincare_distance
    generator = torch.Generator().manual_seed(seed)
    points = (torch.rand(n_nodes, dim, generator=generator, dtype=torch.float64) - 0.5) / 500
    points = to_lorentz(points) if geometry == "lorentz" else points
    ancestors = torch.arange(n_nodes)[:, None].repeat(1, counts.max() + 1)  # filled up with itself
    ancestors[edges[:, 0], place] = edges[:, 1]
    nodes, column = counts.nonzero()[:, 0], torch.full((n_nodes,), -1)
    per_epoch, flat = -(-len(nodes) // batch), geometry == "euclidean"
    for n in range(steps := epochs * per_epoch):
        if n % per_epoch == 0:
            order = nodes[torch.randperm(len(nodes), generator=generator)].split(batch)
        u = order[n % per_epoch]
        v, w = ancestors[u], torch.randperm(n_nodes, generator=generator)[:negatives]
        column[w], bar = torch.arange(len(w)), torch.zeros(len(u), len(w), dtype=torch.float64)
        row, at = (column[v] >= 0).nonzero().T  # an ancestor, or u itself, is no negative
        bar[row, column[v[row, at]]], column[w] = 1e9, -1
        x = points[ids := torch.cat([u, v.flatten(), w])].requires_grad_()
        at_u, at_v, at_w = x.split([len(u), v.numel(), len(w)])
        pair = at_u[:, None], at_v.view(*v.shape, -1)  # (B, 1, D), (B, A, D)
        near = (pair[0] - pair[1]).norm(dim=-1) if flat else distance(*pair)  # (B, A)
        gap = gaps(at_u, at_w, geometry)  # (B, M)
        # acosh is poor near 1, as gaps says: where negatives are so near it does not matter.
        far = gap.clamp(min=TINY).sqrt() if flat else gap.clamp(min=1 + 1e-12).acosh()
        others = (-sharpness * far - bar).logsumexp(1, keepdim=True)  # (B, 1)
        losses = torch.nn.functional.softplus(others + sharpness * near)[v != u[:, None]]
        (grad,) = torch.autograd.grad(losses.sum(), x)
        ids, inverse = ids.unique(return_inverse=True)  # the gradients of a node add up
        grad = grad.new_zeros(len(ids), grad.shape[1]).index_add_(0, inverse, grad)
        rate = most * (0.1 if n < steps // 3 else 1) * (1 - n / steps)
        points[ids] = step(points[ids], grad, rate, geometry, longest)
    return points


def reconstruction(points, edges, geometry, cells=4_000_000):
    """(mean rank, MAP) of Nickel and Kiela: do distances tell the ancestors of each node?
    For a pair (u, v) of the closure `edges` (E, 2), v is ranked by its distance to u among the
    nodes that are no ancestors of u (its descendants are, u itself is not among them); a tie counts
    against v. The precision at an ancestor is the number of ancestors so far over that of nodes so
    far; MAP is the mean for u, then over u. cells: numbers held at once. Raises ValueError for a
    point that is not finite, and as by_node does."""
    if not points.isfinite().all():  # nothing is nearer than nan: ranks would all be 1
        raise ValueError("a point is not finite: the rate is too high")
    edges, place, counts = by_node(edges, len(points))
    ends, ahead = counts.cumsum(0), []
    for u in counts.nonzero()[:, 0].split(max(1, cells // (len(points) * int(counts.max())))):
        own, v = edges[ends[u[0]] - counts[u[0]] : ends[u[-1]]].T
        row, gap = torch.searchsorted(u, own.contiguous()), gaps(points[u], points, geometry)
        near = gap[row, v]  # (pairs of these nodes,)
        gap[row, v] = gap[torch.arange(len(u)), u] = math.inf
        ahead.append((gap[row] <= near[:, None]).sum(1))
    ahead = torch.cat(ahead)
    before = ahead[(edges[:, 0] * (len(points) + 1) + ahead).argsort()]  # nearest first, as `place`
    precision = ((place + 1) / (place + 1 + before)).double()
    sums = precision.new_zeros(len(points)).index_add_(0, edges[:, 0], precision)
    return (ahead + 1).double().mean().item(), (sums / counts)[counts > 0].mean().item()
