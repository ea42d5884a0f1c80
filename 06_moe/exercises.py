"""Five exercises on moe.py. Fill in what is open, then: make exercise-06

Each stands for something that goes wrong, or that people get wrong, when they write a mixture of
experts. Read moe.py first; nothing here needs more than is in it. The checks say what differs and
give a hint.
"""

import torch
from moe import MoE, MoEConfig, count

# ---- 1. Predict

parameters = None
"""How many parameters has this model, and how many of them does one token use? A tuple (total,
active) of two ints, worked out on paper:

    MoETransformerLM(MoEConfig(vocab_size=1000, context_length=64, d_model=32, n_layers=2,
                               n_heads=4, d_ff=96, moe_layers="1", n_experts=8, top_k=2,
                               d_expert=48, n_shared=1))

The first number is the memory it takes, the second the work per token: the two that a mixture
pulls apart. A token uses everything but the experts that it was not sent to; as in counts() the
embedding counts in full. Note what MoEConfig does by default: tie_embeddings, qk_norm. A buffer is
not a parameter."""


# ---- 2. Fill in


def loop(experts, x, chosen, weights):
    """The definition of the layer, as Experts.loop has it: for each token the weighted sum of what
    its chosen experts make of it.

    experts: an Experts, of which gate (E, F, C), up (E, F, C) and down (E, C, F) are used; an
    expert is SwiGLU, down(silu(gate x) * up x). x (N, C) float; chosen int64 (N, k); weights
    (N, k) float32. Returns (N, C) in x's dtype, through which gradients reach x, weights and the
    experts. Row n is the sum over j of weights[n, j] times expert chosen[n, j] of x[n]. Where
    chosen is E, one past the last, no expert took the token: nothing is added, whatever the weight
    there. An expert may have no token, a token no expert, and N may be 0; a token that names an
    expert twice gets it twice. Do not call Experts.forward or Experts.loop.

    Everything faster is checked against this one, so it has to be right where they break."""
    ...


# ---- 3. Find the planted bug


def balance_loss(logits, top_k):
    """The Switch loss of router logits, float (N, E), where each token takes top_k experts: E times
    the sum over the experts of (share of the assignments) x (mean probability). A scalar, to be
    added to the loss; 1 where the load is even.

    It runs, and agrees with the `balance` of a Router to the last digit, in every case, however
    uneven the load. And the router collapses as if it were not there, whatever it is multiplied
    by."""
    E = logits.shape[1]
    with torch.no_grad():  # whole tokens are counted: that has no gradient
        probs = logits.softmax(-1)  # (N, E)
        chosen = probs.topk(top_k).indices  # (N, k)
        share = count(chosen, E) / chosen.numel()  # (E,)
    return E * (share * probs.mean(0)).sum()


# ---- 4. Extend


def expert_choice(logits, capacity):
    """Experts choose their tokens (Zhou et al. 2022, arXiv 2202.09368): router logits float (N, E)
    and an int capacity of at least 1 to (chosen, weights), which Experts takes as they are.

    The scores are a softmax over the experts, as in Router. Each expert takes the `capacity` tokens
    that score highest with it, or all N where capacity is above N; of equal ones any. chosen: int64
    (N, E), in column e the number e where expert e took the token and E where it did not. weights:
    (N, E), there its score, not renormalised, with its gradient, and elsewhere 0.

    Every expert gets as many tokens as every other, with no loss and nothing nudged; a token may
    get several experts or none. The price: who gets in depends on later tokens, so that a model
    which writes token by token cannot route so."""
    ...


# ---- 5. Measure and explain


def experts_that_learn():
    """Who is chosen learns, and is chosen more. What of the others?

    In the layer below, two experts a token and renormalised weights, some of the 8 experts are
    favourites and some get nothing. Take task = layer(x).square().mean() in place of a language
    model's loss, and its gradient with respect to layer.router.weight (8, 32), in which row e is
    what the router knows of expert e. Return (number, letter): in how many of the 8 rows is
    anything larger, in absolute value, than a thousandth of the largest number in the whole
    gradient; and why it is not 8.

    a. The softmax gives an expert that nobody chose so small a probability that its gradient, which
       is proportional to it, falls below what float32 can hold
    b. Weights of the chosen are divided by their sum, in which all other logits cancel; and topk
       hands on which experts are best, an index, through which no gradient passes
    c. An expert that was not chosen computes nothing, so that the gradient goes into the matrices
       of the others and has left nothing for the router

    Before you choose, look at .double(), at renormalize=False, and at the gradient of
    layer.routing.balance. They tell why a collapsed router does not recover by itself."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, d_model=32, n_layers=1, n_heads=2, d_expert=32)
    layer = MoE(MoEConfig(**shape, n_experts=8, top_k=2))
    x = torch.randn(4, 16, 32) + 4 * torch.randn(32)  # (B, T, C); streams have much in common
    number, letter = None, None  # yours: use layer and x
    return number, letter
