"""Checks of 07_sft/exercises.py."""

import tempfile
from pathlib import Path

import checkpoints
import lora
import numpy as np
import sft
import templates
import torch
from check import Differs, measured, same
from transformer import Linear, TransformerConfig, TransformerLM

import common

CONVERSATION = [
    dict(role="system", content="Be brief."),
    dict(role="user", content="What is <|im_end|>?"),
    dict(role="assistant", content="A token."),
    dict(role="user", content="2 + 3?"),
    dict(role="assistant", content="5"),
]

SHIPPED = "89885642"  # accumulate as it came, which is no try yet


def _model():
    """A small model in whose outputs everything that it sees shows."""
    torch.manual_seed(0)
    model = TransformerLM(
        TransformerConfig(vocab_size=40, context_length=32, d_model=16, n_layers=2, n_heads=2)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return model


def _take_gradients(model):
    """All gradients in one row; afterwards there are none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return torch.cat([grad.flatten() for grad in found])


def _two(answer, names):
    """The two parts of an answer."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        raise Differs(f"got {type(answer).__name__}, not the two in {names}")
    return answer


def counts(answer):
    template = templates.choose("chatml")
    with tempfile.TemporaryDirectory() as home:
        for name, text in checkpoints.add_tokens({}, template)[0].items():
            Path(home, name).write_text(text)
        ids, mask = sft.encode_example(CONVERSATION, common.Tokenizer(home), template)
    tokens, learned = _two(answer, "(tokens, learned)")
    hint = "a turn of ChatML has a start, its role, a newline, its words, an end and a newline"
    same(tokens, len(ids), f"{hint}; and which of the ends has the user typed?")
    hint = "of render_chat's parts that are learned, count also what the model has to say itself"
    same(learned, sum(mask), f"{hint} when it is done, and nothing that the template adds then")


def sft_loss(answer):
    model, random = _model(), np.random.default_rng(0)
    ids = torch.from_numpy(random.integers(40, size=(3, 10)))
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, 4:6], mask[1, 2:], mask[2, 0] = True, True, True
    hint = "position t of hidden predicts token t + 1, so logits 0 to T - 2 belong to mask[:, 1:]"
    given = mask.clone()
    same(answer(model, ids[:1], given[:1]), sft.sft_loss(model, ids[:1], mask[:1]), hint)
    hint = "each token counts alike, however many there are in its row"
    same(answer(model, ids, given), sft.sft_loss(model, ids, mask), hint)
    if not torch.equal(given, mask):
        raise Differs("the mask given has changed. Hint: work on a part of it or on a copy")

    some = [list(range(i, i + n)) for i, n in ((3, 4), (20, 3), (9, 5), (1, 2))]
    rows = [[(i, [True] * len(i)) for i in some[:2]], [(i, [True] * len(i)) for i in some[2:]]]
    packed = sft.collate([*rows, [(some[0], [False, False, True, True])]])
    wanted = sft.sft_loss(model, *packed)
    alone = torch.stack([sft.sft_loss(model, *packed[:2]), wanted]).tolist()
    got = answer(model, *packed)
    if isinstance(got, torch.Tensor) and got.shape == wanted.shape:
        if abs(got.item() - alone[0]) < 1e-6:
            raise Differs("documents have no effect. Hint: who sees whom, and what follows whom?")
    hint = "the documents of a row do not see one another (tell hidden), and none begins with a"
    same(got, wanted, f"{hint} token that follows from the one before")
    if not got.requires_grad:
        raise Differs("no gradient comes from this loss. Hint: it must not leave the graph")
    wanted.backward()
    gradients = _take_gradients(model)
    got.backward()
    same(_take_gradients(model), gradients, "the loss is right, its gradient is not")

    hint = "with total it is the sum of the losses over total, not the mean over anything"
    same(answer(model, *packed, 50), sft.sft_loss(model, *packed, 50), hint)
    nothing = mask & False
    for total in (None, 7):
        got = answer(model, ids, nothing, None, total)
        same(
            got, torch.tensor(0.0), "where nothing is learned the loss is 0; a mean of none is nan"
        )
        if not got.requires_grad:
            raise Differs("backward() fails where nothing is learned. Hint: a 0 from the graph")
        got.backward()
        gone = torch.zeros_like(gradients)
        same(_take_gradients(model), gone, "where nothing is learned the gradients are 0")
    with torch.no_grad():
        model.output.weight.mul_(1000)
    hint = "logits of a thousand overflow in exp: cross_entropy knows how to go about it"
    same(answer(model, ids, mask), sft.sft_loss(model, ids, mask), hint)


def accumulate(answer):
    model, random = _model(), np.random.default_rng(0)

    def example(n, learned, first=False):
        mask = [first] + [False] * (n - 1 - learned) + [True] * learned
        return random.integers(40, size=n).tolist(), mask

    short, long, silent = example(9, 1), example(12, 9), example(8, 0)
    whole, other = example(6, 5, True), example(3, 2, True)
    cases = {
        "one micro-batch": [[[long], [short]]],
        "two that learn alike": [[[short], [long]], [[long], [short]]],
        "a short answer and a long one": [[[short]], [[long]]],
        "one row and two": [[[long]], [[short], [short]]],
        "a micro-batch without an answer": [[[silent]], [[long]]],
        "packed rows": [[[short, other], [long]], [[silent, short]]],
        "first tokens in the mask": [[[whole, other, other]], [[long]]],
    }
    for name, micro_batches in cases.items():
        rows = [row for rows in micro_batches for row in rows]
        loss = sft.sft_loss(model, *sft.collate(rows))
        loss.backward()
        wanted = _take_gradients(model)
        got = answer(model, micro_batches)
        found = _take_gradients(model)
        hint = "what does one learned token count in each micro-batch, and in all rows at once?"
        if name == "first tokens in the mask":
            hint = "what counts is what is a target, and the first token of an example is none"
        same(got, loss.item(), f"{name}: all rows in one batch lose {loss.item():.6g}; {hint}")
        same(found, wanted, f"{name}: the loss is right, the gradients are not; {hint}")


def extract_lora(answer):
    torch.manual_seed(0)
    rank, alpha, x = 2, 8.0, torch.randn(5, 10)
    linear = Linear(10, 6, bias=False, std=1.0)
    before = linear.weight.detach().clone()
    after = before + torch.randn(6, rank) @ torch.randn(rank, 10)
    kept = before.clone(), after.clone()
    a, b = _two(answer(before, after, rank, alpha), "(A, B)")
    if isinstance(a, torch.Tensor) and a.shape == (6, rank):
        raise Differs(f"the first has the shape {(6, rank)}. Hint: return A first, then B")
    for name, got, shape in (("A", a, (rank, 10)), ("B", b, (6, rank))):
        if not isinstance(got, torch.Tensor) or got.shape != shape:
            size = tuple(got.shape) if isinstance(got, torch.Tensor) else type(got).__name__
            raise Differs(f"{name} is {size}, not {shape}. Hint: B A has the shape of the weight")
        if got.dtype != torch.float32:
            raise Differs(f"{name} is {got.dtype}, not torch.float32")
    if not (torch.equal(before, kept[0]) and torch.equal(after, kept[1])):
        raise Differs("before or after has changed. Hint: an operation that ends in _ is in place")
    hint = "this update is of rank 2, so rank 2 gives it whole: mind what it is that has few"
    hint += " directions, and LoRALinear's factor alpha / rank"
    same(before + alpha / rank * b.detach() @ a.detach(), after, hint, tolerance=1e-4)
    layer = lora.LoRALinear(linear, rank, alpha)
    with torch.no_grad():
        layer.lora_a["weight"].copy_(a)
        layer.lora_b["weight"].copy_(b)
    same(layer(x), x @ after.T, "as A and B of a LoRALinear it gives another output", 1e-3)

    for shape in ((6, 10), (10, 6)):
        before, update = torch.randn(2, *shape)
        tail = torch.linalg.svdvals(update).square().flip(0).cumsum(0).sqrt().flip(0)  # (6,)
        for rank in (1, 3, 6):
            a, b = _two(answer(before, before + update, rank, 16.0), "(A, B)")
            left = (update - 16.0 / rank * b.detach() @ a.detach()).norm().item()
            best = tail[rank].item() if rank < 6 else 0.0
            hint = f"at rank {rank} of a {shape} weight what is left has a norm of at least "
            hint += f"{best:.4f}; keep the directions of the largest singular values of the update"
            same(left, best, hint, tolerance=1e-3)
    a, b = _two(answer(before, before.clone(), 2, 16.0), "(A, B)")
    same(b.detach() @ a.detach(), torch.zeros(10, 6), "where nothing has changed B A is 0")


def _end_not_learned():
    """(model, ids, end) as the exercise makes them."""
    torch.manual_seed(0)
    end, begin = 62, 63
    ids = torch.randint(57, (16, 1)).repeat(1, 12)
    ids[:, 6:11] += torch.arange(5)
    ids[:, 5], ids[:, 11] = begin, end
    mask = torch.zeros(16, 12, dtype=torch.bool)
    mask[:, 6:11] = True
    size = dict(vocab_size=64, context_length=12, d_model=32, n_layers=2, n_heads=2)
    model = TransformerLM(TransformerConfig(**size, tie_embeddings=False))
    for _ in range(100):
        model.zero_grad()
        sft.sft_loss(model, ids, mask).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    return model, ids, end


def end_masked_out(answer):
    nats, letter = measured(answer(), "nats", "model(ids)[:, t].log_softmax(-1)[:, end]")
    model, ids, end = _end_not_learned()  # here: other versions of torch draw other weights
    log_probs = model(ids)[:, -2].log_softmax(-1)  # (16, V)
    hint = "which position of model(ids) guesses the last token of a row? The probability is that"
    hint += " after a softmax, and the mean is of 16 logs"
    same(float(nats), -log_probs[:, end].mean().item(), hint, tolerance=0.02)
    same(letter, "c", "compare with log(64): is it as likely as before, more, or less?")
