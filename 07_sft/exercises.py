"""Five exercises on sft.py. Fill in what is open, then: make exercise-07

Each stands for something that goes wrong, or that people get wrong, when they fine-tune a model.
Read sft.py first, for the fourth lora.py, too. The checks say what differs and give a hint.
"""

import sft
import torch
from transformer import TransformerConfig, TransformerLM, cross_entropy  # noqa: F401

# ---- 1. Predict

counts = None
"""(tokens, learned): how long is this conversation as encode_example writes it in ChatML, and how
many of its tokens are learned? Two ints in a tuple, worked out on paper. The tokenizer knows
<|im_start|> and <|im_end|> as one token each; of all other text each byte is a token.

    system     Be brief.
    user       What is <|im_end|>?
    assistant  A token.
    user       2 + 3?
    assistant  5

What a step costs goes by the first number, what is learned from it by the second. And the first
depends on how what a user types is read."""


# ---- 2. Fill in


def sft_loss(model, ids, mask, documents=None, total=None):
    """The mean loss in nats of the tokens under mask: a scalar tensor to call backward() on.

    ids int64, mask bool and documents int64 are (B, T), as collate gives them: mask is True for
    the tokens to learn, documents numbers the examples that share a row, -1 is padding; None: each
    row is one example. With total, an int, it is the sum of the losses divided by that. There are
    model.hidden(ids, documents=documents), (B, T, C), model.output for logits, and cross_entropy,
    which takes logits of thousands.

    A token is learned where the one before it is read. The first token of a row has none before
    it, and the first of a document has one that it does not follow from: neither counts, whatever
    mask says. Where nothing is to be learned the loss is 0 and backward() still works: in a large
    run there is a micro-batch without an answer sooner or later, and one nan ends it."""
    ...


# ---- 3. Find the planted bug


def accumulate(model, micro_batches):
    """Gradients of a step that does not fit into memory at once: adds them up in .grad and returns
    the step's loss, a float. micro_batches: lists of rows as ExampleLoader gives them, a row a list
    of examples (ids, mask). There is nothing wrong with sft.sft_loss and sft.collate.

    It runs, and the loss falls. But the same rows, cut into other micro-batches, give another loss
    and other gradients, and the less memory there is, the more. Both should be those of all rows in
    one batch."""
    loss = 0.0
    for rows in micro_batches:
        total = sum(sum(mask[1:]) for row in rows for _, mask in row)  # tokens to learn
        part = sft.sft_loss(model, *sft.collate(rows), total) / len(micro_batches)
        part.backward()
        loss += part.item()
    return loss


# ---- 4. Extend


def extract_lora(before, after, rank, alpha):
    """The LoRA adapter of a fine-tuning that was done without one: (A, B) such that
    before + alpha / rank · B A is as near to `after` as two matrices of this rank allow.

    before and after: a weight before and after the fine-tuning, float32 (d_out, d_in), which stay
    as they are. A is (rank, d_in), B (d_out, rank), float32; rank is at most the smaller side of
    the weight. Near is meant in the Frobenius norm, and Eckart and Young (1936, doi
    10.1007/BF02288367) say which directions to keep. Any A and B with the right product will do.

    How good it is shows how many directions a fine-tuning has needed: the bet that LoRA makes (Hu
    et al. 2021, arXiv 2106.09685). It also turns a model of gigabytes into an adapter of megabytes
    beside a base that is there anyway."""
    ...


# ---- 5. Measure and explain


def end_masked_out():
    """What does a model think of the token that ends an answer if that token was never learned?

    Below a small model learns the answers of 16 conversations of 12 tokens each, without their ends
    (as where a tokenizer pads with the end token, and pads are masked out). Return (nats, letter):
    -log of the probability that it then gives to the token `end` where the answer is over and the
    end should come, the mean of that over the 16, a float; and the letter that explains it. Before
    training it is about log(64) = 4.16.

    a. About log(64): no gradient has come to it, so it is as likely as before
    b. Near 0: the model has read the end after each answer, that is enough to expect it
    c. Well above log(64): what raises a learned token lowers all others; nothing raises this one

    Such a model answers well and then goes on, up to max_new_tokens."""
    torch.manual_seed(0)
    end, begin = 62, 63
    ids = torch.randint(57, (16, 1)).repeat(1, 12)  # question 7 7 7 7 7, answer 7 8 9 10 11
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
    nats, letter = None, None  # yours: use model, ids and end
    return nats, letter
