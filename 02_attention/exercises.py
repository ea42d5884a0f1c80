"""Five exercises on attention.py. Fill in what is open, then: make exercise-02

Each stands for something that goes wrong, or that people get wrong, when they write attention. Read
attention.py first; nothing here needs more than is in it. The checks say what differs and give a
hint.
"""

import attention
import torch
from attention import MultiHeadAttention

# ---- 1. Predict

tiles = None
"""flash_attention(q, k, v, causal=True, tile=64) on a CPU, with 300 queries that are the last of
1,000 tokens, and so 1,000 keys. For how many tiles does its forward pass compute scores (how often
does it call tile_scores)? An int, worked out on paper. That no (T, T) matrix is kept saves memory.
Tiles into which no query may look are never computed: that saves up to half of the time. Which
these are depends on where the diagonal of the causal mask ends."""


# ---- 2. Fill in


def scaled_dot_product_attention(q, k, v, mask=None, scale=None):
    """The formula: q (..., T_q, D), k (..., T_k, D) and v (..., T_k, D_v) to (..., T_q, D_v), where
    the leading dimensions broadcast. Without the softmax and the attention of torch and of
    attention.py.

    mask: None, or boolean and True where a query may look; it broadcasts to (..., T_q, T_k). A row
    without True gives zeros and its gradients are zeros, not NaN. scale: what scores are multiplied
    by, 1 / sqrt(D) if None. Scores of 10,000 and of -10^12 must do no harm: exp(10,000) is inf, a
    hidden key must stay hidden beside visible ones that score -10^12, and a hidden one that scores
    10,000 must not make what is visible round to 0. None of the arguments may change."""
    ...


# ---- 3. Find the planted bug


def window_attention(q, k, v, window):
    """Causal attention in which a token sees the last `window` tokens, itself among them: q, k and
    v (B, H, T, D), all of the same T tokens, to (B, H, T, D).

    For texts up to the window it is right to the last digit, so the first tests pass. On longer
    ones the loss looks merely odd; place by place it is absurd, close to 0 for the last `window`
    tokens of a text and poor for all before them, and what the model writes is nonsense."""
    T = q.shape[-2]
    k, v = k[..., -window:, :], v[..., -window:, :]  # nobody sees what is older
    mask = torch.ones(T, k.shape[-2], dtype=torch.bool).tril()
    return attention.scaled_dot_product_attention(q, k, v, mask)


# ---- 4. Extend


def alibi_attention(q, k, v):
    """Causal attention with linear biases (ALiBi: Press et al. 2021, arXiv 2108.12409): q
    (B, H, T_q, D), the last T_q of T_k tokens; k and v (B, H, T_k, D) to (B, H, T_q, D).

    Tokens carry no positions. In head h, counted from 0, the score of a key that stands n tokens
    before the query is q·k / sqrt(D) - m n, where m = 2^(-8 (h + 1) / H); keys after the query are
    not seen. H is a power of two. A steep head looks at its neighbours, a flat one at everything,
    and a text may be longer than those in training: a distance that never occurred has a score.

    All of attention.py may be used. Scores of 10,000 must do no harm, and no argument may change.
    """
    ...


# ---- 5. Measure and explain


def order_seen():
    """Attention is a mean, and a mean does not see the order of what it is taken of. Without
    positions, how much does the order of the first two tokens matter to the last one?

    Below are two causal layers without positions, and two texts that differ in that order alone.
    After one layer the last token has the same vector in both. Send both texts through the first
    and then the second layer (nothing added, nothing normalised) and return (change, letter): for
    the last token |y - y_swapped| / |y|, a float, where y and y_swapped are its vectors after both
    layers and |.| is a length, and the letter that says where the change comes from.

    a. float64 rounds sums taken in another order to other numbers, and a second layer enlarges that
    b. the mask: in layer one token 0 sees only itself and token 1 sees both, whoever is first, so
       that the second layer averages other vectors
    c. a softmax gives more weight to keys that stand early in its row, if they are equally good

    Decoders without positions do learn to tell order (Haviv et al. 2022, arXiv 2203.16634)."""
    torch.manual_seed(0)
    layers = [MultiHeadAttention(16, n_heads=2, theta=None).double() for _ in range(2)]
    for layer in layers:
        for weight in layer.parameters():
            weight.data *= 20  # as large as in a trained model
    x = torch.randn(1, 8, 16, dtype=torch.float64)  # (B, T, C)
    swapped = x[:, [1, 0, *range(2, 8)]]
    change, letter = None, None  # yours: use layers, x and swapped
    return change, letter
