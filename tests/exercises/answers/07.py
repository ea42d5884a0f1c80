"""Answers to 07_sft/exercises.py, and in WRONG what the checks must not let pass."""

import math

import sft
import torch
from transformer import TransformerConfig, TransformerLM, cross_entropy

# A turn has a start, "role\n", its words, an end and "\n"; what a user types stays text. Learned
# are the words of the assistant and the ends of its turns.
counts = (
    (1 + 7 + 9 + 2) + (1 + 5 + 19 + 2) + (1 + 10 + 8 + 2) + (1 + 5 + 6 + 2) + (1 + 10 + 1 + 2),
    (8 + 1) + (1 + 1),
)


def sft_loss(model, ids, mask, documents=None, total=None):
    x = model.hidden(ids, documents=documents)[:, :-1]  # (B, T - 1, C)
    wanted = mask[:, 1:]
    if documents is not None:
        wanted = wanted & (documents[:, 1:] == documents[:, :-1])
    if not wanted.any():
        return 0.0 * x.sum()
    loss = cross_entropy(model.output(x[wanted]), ids[:, 1:][wanted])
    return loss if total is None else loss * wanted.sum() / total


def accumulate(model, micro_batches):
    examples = [example for rows in micro_batches for row in rows for example in row]
    total = sum(sum(mask[1:]) for _, mask in examples)
    loss = 0.0
    for rows in micro_batches:
        part = sft.sft_loss(model, *sft.collate(rows), total)
        part.backward()
        loss += part.item()
    return loss


def extract_lora(before, after, rank, alpha):
    u, s, vt = torch.linalg.svd(after - before, full_matrices=False)
    root = s[:rank].sqrt()  # half of it to each, so that both are of one size
    return root[:, None] * vt[:rank], u[:, :rank] * root * (rank / alpha)


def trained():
    """What the setup of end_masked_out makes: (model, ids, end)."""
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


def end_masked_out():
    model, ids, end = trained()
    with torch.no_grad():
        log_probs = model(ids)[:, -2].log_softmax(-1)  # (16, V), after the answer's last token
    return -log_probs[:, end].mean().item(), "c"


# ---- wrong answers


def off_by_one(model, ids, mask, documents=None, total=None):
    """The mask as it stands, not that of the targets."""
    return sft_loss(model, ids, torch.nn.functional.pad(mask, (1, 0))[:, :-1], documents, total)


def no_shift(model, ids, mask, documents=None, total=None):
    logits = model.output(model.hidden(ids, documents=documents))
    loss = cross_entropy(logits[mask], ids[mask])
    return loss if total is None else loss * mask.sum() / total


def first_of_documents(model, ids, mask, documents=None, total=None):
    x, wanted = model.hidden(ids, documents=documents)[:, :-1], mask[:, 1:]
    if not wanted.any():
        return 0.0 * x.sum()
    loss = cross_entropy(model.output(x[wanted]), ids[:, 1:][wanted])
    return loss if total is None else loss * wanted.sum() / total


def documents_see_each_other(model, ids, mask, documents=None, total=None):
    if documents is not None:
        mask = mask.clone()
        mask[:, 1:] &= documents[:, 1:] == documents[:, :-1]
    return sft_loss(model, ids, mask, None, total)


def mean_of_rows(model, ids, mask, documents=None, total=None):
    if total is not None or documents is not None or not mask[:, 1:].any():
        return sft_loss(model, ids, mask, documents, total)
    rows = [sft_loss(model, i[None], m[None]) for i, m in zip(ids, mask) if m[1:].any()]
    return torch.stack(rows).mean()


def nan_where_empty(model, ids, mask, documents=None, total=None):
    logits = model.output(model.hidden(ids, documents=documents)[:, :-1])
    wanted = mask[:, 1:].clone()
    if documents is not None:
        wanted &= documents[:, 1:] == documents[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:].masked_fill(~wanted, -100), reduction="sum"
    )
    return losses / (wanted.sum() if total is None else total)


def no_graph_where_empty(model, ids, mask, documents=None, total=None):
    if not mask[:, 1:].any():
        return torch.zeros(())
    return sft_loss(model, ids, mask, documents, total)


def without_total(model, ids, mask, documents=None, total=None):
    return sft_loss(model, ids, mask, documents)


def mean_over_total(model, ids, mask, documents=None, total=None):
    return sft_loss(model, ids, mask, documents) / (total or 1)


def no_gradient(model, ids, mask, documents=None, total=None):
    return sft_loss(model, ids, mask, documents, total).detach()


def overflows(model, ids, mask, documents=None, total=None):
    x, wanted = model.hidden(ids, documents=documents)[:, :-1], mask[:, 1:]
    if documents is not None:
        wanted = wanted & (documents[:, 1:] == documents[:, :-1])
    logits, targets = model.output(x[wanted]), ids[:, 1:][wanted]
    chosen = logits.gather(1, targets[:, None])[:, 0]
    loss = (logits.exp().sum(1).log() - chosen).sum()
    return 0.0 * x.sum() if not len(targets) else loss / (len(targets) if total is None else total)


def spoils_the_mask(model, ids, mask, documents=None, total=None):
    loss = sft_loss(model, ids, mask, documents, total)
    mask[:, 0] = False
    return loss


def weighted(size):
    """Micro-batches that count by `size` of their rows, which is not what they have to learn."""

    def accumulate(model, micro_batches):
        sizes, loss = [size(rows) for rows in micro_batches], 0.0
        for rows, n in zip(micro_batches, sizes):
            part = sft.sft_loss(model, *sft.collate(rows)) * (n / sum(sizes))
            part.backward()
            loss += part.item()
        return loss

    return accumulate


def sum_of_means(model, micro_batches):
    return weighted(lambda rows: 1)(model, micro_batches) * len(micro_batches)


def only_reported(model, micro_batches):
    """The right loss, and the gradients that they were."""
    weighted(lambda rows: 1)(model, micro_batches)
    rows = [row for rows in micro_batches for row in rows]
    return sft.sft_loss(model, *sft.collate(rows)).item()


def still_divided(model, micro_batches):
    """total as it should be, and the division left where it was."""
    examples = [example for rows in micro_batches for row in rows for example in row]
    total = sum(sum(mask[1:]) for _, mask in examples)
    loss = 0.0
    for rows in micro_batches:
        part = sft.sft_loss(model, *sft.collate(rows), total) / len(micro_batches)
        part.backward()
        loss += part.item()
    return loss


def lora_of(change):
    """The answer with its (A, B) changed by change(A, B, rank, alpha)."""
    return lambda before, after, rank, alpha: change(
        *extract_lora(before, after, rank, alpha), rank, alpha
    )


def of_the_weight(before, after, rank, alpha):
    return extract_lora(torch.zeros_like(after), after, rank, alpha)


def smallest(before, after, rank, alpha):
    """eigh orders from small to large."""
    update = after - before
    b = torch.linalg.eigh(update @ update.T).eigenvectors[:, :rank]
    return b.T @ update * (rank / alpha), b


def first_rows(before, after, rank, alpha):
    """A product of the right rank, and not the nearest."""
    update = after - before
    return update[:rank], torch.linalg.lstsq(update[:rank].T, update.T).solution.T * rank / alpha


def all_of_it(before, after, rank, alpha):
    """Exact, of any rank."""
    u, s, vt = torch.linalg.svd(after - before, full_matrices=False)
    return vt, u * s * (rank / alpha)


def in_place(before, after, rank, alpha):
    return extract_lora(torch.zeros_like(after), after.sub_(before), rank, alpha)


def swelling(before, after, rank, alpha):
    """Singular values in both."""
    u, s, vt = torch.linalg.svd(after - before, full_matrices=False)
    return s[:rank, None] * vt[:rank], u[:, :rank] * s[:rank] * (rank / alpha)


def one_too_late():
    model, ids, end = trained()
    return -model(ids)[:, -1].log_softmax(-1)[:, end].mean().item(), "c"


def anywhere():
    model, ids, end = trained()
    return -model(ids).log_softmax(-1)[..., end].mean().item(), "c"


def its_logit():
    model, ids, end = trained()
    return -model(ids)[:, -2, end].mean().item(), "c"


def log_of_the_mean():
    model, ids, end = trained()
    return -model(ids)[:, -2].softmax(-1)[:, end].mean().log().item(), "c"


WRONG = {
    "counts": [(95, 9), (95, 13), (86, 11), (94, 11), (95, 85), (95,), 95, (95.0, 11.0)],
    "sft_loss": [
        off_by_one, no_shift, first_of_documents, documents_see_each_other, mean_of_rows,
        nan_where_empty, no_graph_where_empty, without_total, mean_over_total, no_gradient,
        overflows, spoils_the_mask, lambda *args: sft_loss(*args).item(),
    ],
    "accumulate": [
        weighted(len), weighted(lambda rows: sum(len(e[0]) for row in rows for e in row)),
        weighted(lambda rows: sum(sum(e[1]) for row in rows for e in row)),
        weighted(lambda rows: sum(map(len, rows))), sum_of_means, only_reported, still_divided,
        lambda *args: None,
    ],
    "extract_lora": [
        lora_of(lambda a, b, rank, alpha: (b, a)),
        lora_of(lambda a, b, rank, alpha: (a, b * alpha / rank)),  # the scale is forgotten
        lora_of(lambda a, b, rank, alpha: (a, b * (alpha / rank) ** 2)),  # or on the wrong side
        lora_of(lambda a, b, rank, alpha: b @ a),
        of_the_weight, smallest, first_rows, all_of_it, in_place, swelling,
    ],
    "end_masked_out": [
        one_too_late, anywhere, its_logit, log_of_the_mean, lambda: (math.log(64), "a"),
        lambda: (-end_masked_out()[0], "c"), lambda: (end_masked_out()[0], "a"),
    ],
}  # fmt: skip
