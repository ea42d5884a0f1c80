"""Checks of 06_moe/exercises.py."""

import moe
import torch
from check import Differs, measured, same

SHAPE = dict(vocab_size=64, d_model=8, n_layers=1, n_heads=1, d_expert=6, n_experts=4, top_k=2)

SHIPPED = "39ad286d"  # balance_loss as it came, which is no try yet


def parameters(answer):
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise Differs(f"got {answer!r}. Hint: a tuple of two ints, (total, active)")
    config = moe.MoEConfig(
        vocab_size=1000, context_length=64, d_model=32, n_layers=2, n_heads=4, d_ff=96,
        moe_layers="1", n_experts=8, top_k=2, d_expert=48, n_shared=1,
    )  # fmt: skip
    total, active = moe.MoETransformerLM(config).counts()
    hint = "total: one embedding; in each block attention, with a norm of a head's width for q and "
    hint += "one for k, and two norms; in block 0 one MLP of three matrices, in block 1 a router, "
    same(answer[0], total, hint + "8 experts and a shared one; a norm at the end; no biases")
    hint = "active: the total without the experts that a token does not use. Router, shared expert "
    same(answer[1], active, hint + "and all that is not an expert is used by every token")


def _outputs(function, x, chosen, weights, experts):
    """What a way to compute the layer gives, and its gradients under a loss without symmetries."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weights)]
    y = function(experts, leaves[0], chosen.clone(), leaves[1])
    if not isinstance(y, torch.Tensor):
        raise Differs(f"got a {type(y).__name__}, not a tensor of {tuple(x.shape)}")
    if y.shape != x.shape:
        raise Differs(f"the shape is {tuple(y.shape)}, not {tuple(x.shape)} as x has it")
    if not y.numel():
        return [y.detach()]
    if not y.requires_grad and (chosen < len(experts.gate)).any():
        raise Differs("no gradient passes. Hint: is something detached, or under no_grad?")
    slope = torch.arange(1.0, y.numel() + 1).view_as(y) / y.numel()
    wanted = [*leaves, experts.gate, experts.up, experts.down]
    loss = (y.float() * slope).sum() + 0 * leaves[0].sum()  # nobody took one: zeros, no graph
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    none = [torch.zeros_like(t) for t in wanted]
    return [y.detach(), *(n if g is None else g for g, n in zip(gradients, none))]


def loop(answer):
    torch.manual_seed(0)
    experts = moe.Experts(moe.MoEConfig(**SHAPE))
    for p in experts.parameters():
        p.data.mul_(4)  # far from linear
    x, weights = torch.randn(7, 8), torch.rand(7, 2)
    for chosen, hint in (
        (
            [[0, 1], [1, 0], [2, 3], [3, 0], [1, 2], [2, 1], [0, 3]],
            "row n is the sum over j of weights[n, j] times expert chosen[n, j] of x[n]: both of a "
            "token's experts count, each by its own weight",
        ),
        ([[1, 2]] * 7, "here experts 0 and 3 have no token, 1 and 2 have all of them"),
        (
            [[4, 4], [1, 4], [4, 2], [4, 4], [3, 4], [4, 0], [4, 4]],
            "4 is one past the last of the 4 experts: nothing is added there",
        ),
        ([[4, 4]] * 7, "here no expert took any token: the result is 0"),
        (
            [[0, 0], [1, 1], [2, 2], [3, 3], [1, 0], [2, 2], [0, 3]],
            "a token that names an expert twice gets it twice: y[rows] = and y[rows] += keep only "
            "the last of several rows with one index, index_add keeps all",
        ),
    ):
        chosen = torch.tensor(chosen)
        try:
            got = _outputs(answer, x, chosen, weights, experts)
        except IndexError as error:
            raise Differs(f"IndexError: {error}. Hint: {hint}") from None
        found = _outputs(moe.Experts.loop, x, chosen, weights, experts)
        names = ("y", "the gradient of x", "that of weights", "of gate", "of up", "of down")
        for name, one, other in zip(names, got, found):
            same(one, other, f"this is {name}; {hint}")
    nothing = torch.empty(0, 2).long()
    try:
        got = _outputs(answer, x[:0], nothing, weights[:0], experts)[0]
    except (IndexError, RuntimeError) as error:
        raise Differs(f"without a token: {error}. Hint: no tokens in, none out") from None
    same(got, x[:0], "no tokens in, none out")
    chosen, half = torch.tensor([[0, 1]] * 7), x.bfloat16()
    got = answer(experts.bfloat16(), half, chosen, weights)
    if got.dtype != torch.bfloat16:
        kinds = f"{got.dtype} of x in bfloat16 and weights in float32"
        raise Differs(f"the result is {kinds}. Hint: it has x's dtype")
    same(got, experts.loop(half, chosen, weights), "x in bfloat16, weights in float32", 0.05)


def _router(E, top_k):
    """A Router whose logits are its input."""
    shape = dict(vocab_size=64, d_model=E, n_layers=1, n_heads=1, n_experts=E, top_k=top_k)
    router = moe.Router(moe.MoEConfig(**shape))
    router.weight.data.copy_(torch.eye(E))
    return router


def balance_loss(answer):
    torch.manual_seed(0)
    for E, top_k, favour in ((4, 1, 0.0), (8, 2, 1.0), (8, 3, 5.0)):
        logits = torch.randn(40, E)
        logits[:, 0] += favour
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        wanted, got = _router(E, top_k)(ours).balance, answer(theirs, top_k)
        same(got, wanted, "the value was right before: it is that of a Router's `balance`")
        if not got.requires_grad:
            raise Differs(
                "backward() cannot go through it, so nothing is learned from it. Hint: in "
                "training it is added to a loss that has a gradient, so that nobody notices"
            )
        slope = torch.autograd.grad(got, theirs, allow_unused=True)[0]
        if slope is None:
            raise Differs("its gradient does not reach the logits. Hint: what cuts it off?")
        hint = "this is the gradient of the logits: of the two factors the counted one has none, "
        hint += "and the other one has all of its own"
        same(100 * slope, 100 * torch.autograd.grad(wanted, ours)[0], hint)


def _sent(pair, N, E):
    """chosen and weights, where they have the right form."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise Differs(f"got a {type(pair).__name__}. Hint: return chosen, weights")
    for name, t in zip(("chosen", "weights"), pair):
        if not isinstance(t, torch.Tensor) or t.shape != (N, E):
            shape = tuple(t.shape) if isinstance(t, torch.Tensor) else type(t).__name__
            raise Differs(f"{name} is {shape}, not ({N}, {E}): a column for each expert")
    if pair[0].dtype != torch.int64:
        raise Differs(f"chosen is {pair[0].dtype}. Hint: expert numbers are int64")
    return pair


def expert_choice(answer):
    # The second row's logits are 10 higher, its probabilities are not; the third's 10 lower.
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6]])
    logits = probs.log() + torch.tensor([[0.0], [10.0], [-10.0], [0.0]])
    for capacity, taken in (
        (1, ([0], [2], [3])),  # token 1 has no expert
        (2, ([0, 1], [1, 2], [2, 3])),
        (3, ([0, 1, 3], [0, 1, 2], None)),  # expert 2: 0.1 twice, either may be the third
        (9, ([0, 1, 2, 3],) * 3),
    ):
        try:
            pair = answer(logits.clone(), capacity)
        except (IndexError, RuntimeError) as error:
            where = f"with 4 tokens and a capacity of {capacity}: {error}"
            raise Differs(f"{where}. Hint: an expert cannot take more than there are") from None
        chosen, weights = _sent(pair, 4, 3)
        for e, tokens in enumerate(taken):
            column = chosen[:, e]
            if not ((column == e) | (column == 3)).all():
                raise Differs(f"column {e} of chosen is {column.tolist()}. Hint: only {e} and 3")
            got = (column == e).nonzero()[:, 0].tolist()
            if len(got) != min(capacity, 4):
                many = f"expert {e} takes {len(got)} of 4 tokens with a capacity of {capacity}"
                raise Differs(f"{many}. Hint: as many as it can, and no more than there are")
            if tokens is not None and got != tokens:
                scores = [round(score, 1) for score in probs[:, e].tolist()]
                which = f"expert {e} takes tokens {got}, where their scores are {scores}"
                hint = "the highest scores in its column, after a softmax over the experts"
                raise Differs(f"{which} (capacity {capacity}). Hint: {hint}")
        wanted = probs * (chosen < 3)
        same(weights, wanted, "a weight is the score itself, and 0 where the token was not taken")
    chosen, _ = _sent(answer(torch.tensor([[2.0, 1.0, 0.0]] * 4), 3), 4, 3)
    many = (chosen < 3).sum(0).tolist()
    if many != [3, 3, 3]:
        raise Differs(
            f"of four tokens alike, capacity 3, the experts take {many}. Hint: topk gives "
            "indices; a comparison with the least score takes all that equal it"
        )
    torch.manual_seed(0)
    ours, theirs = (torch.randn(30, 6).requires_grad_() for _ in range(2))
    ours.data.copy_(theirs.data)
    chosen, weights = _sent(answer(theirs, 7), 30, 6)
    slope = torch.arange(180.0).view(30, 6) / 180
    wanted = ours.softmax(-1) * (chosen < 6)
    same(weights, wanted, "a weight is the score itself, and 0 where the token was not taken")
    least = [scores[column < 6].min() for scores, column in zip(ours.softmax(-1).T, chosen.T)]
    most = [scores[column == 6].max() for scores, column in zip(ours.softmax(-1).T, chosen.T)]
    if any(kept < left for kept, left in zip(least, most)):
        raise Differs("of 30 tokens an expert left one that scores higher than one it took")
    if not weights.requires_grad:
        raise Differs("no gradient passes. Hint: weights are scores, looked up and not copied out")
    got = torch.autograd.grad((weights * slope).sum(), theirs, allow_unused=True)[0]
    if got is None:
        raise Differs("the gradient of the weights does not reach the logits")
    same(got, torch.autograd.grad((wanted * slope).sum(), ours)[0], "this is the logits' gradient")


def experts_that_learn(answer):
    number, letter = measured(answer(), "number", "torch.autograd.grad(task, weight)")
    torch.manual_seed(0)
    shape = dict(vocab_size=64, d_model=32, n_layers=1, n_heads=2, d_expert=32)
    layer = moe.MoE(moe.MoEConfig(**shape, n_experts=8, top_k=2))
    x = torch.randn(4, 16, 32) + 4 * torch.randn(32)
    gradient = torch.autograd.grad(layer(x).square().mean(), layer.router.weight)[0].abs()
    wanted = (gradient.amax(1) > gradient.max() / 1000).sum().item()
    same(float(number), float(wanted), "rows in which the largest number is over the bound")
    hint = "does it change in float64? Do the other rows get a gradient without renormalising? And "
    same(letter, "b", hint + "does the router have one at all?")
