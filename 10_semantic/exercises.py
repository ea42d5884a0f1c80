"""Five exercises on semantic.py, hyperbolic.py, patches.py. Fill them in, then: make exercise-10

Each stands for something that people get wrong when a model predicts lines, embeds trees or cuts
bytes into patches. Read semantic.py first; 2 and 3 are about hyperbolic.py, 4 is about patches.py.
The checks say what differs and give a hint.
"""

import torch
from hyperbolic import TINY, poincare_exp, poincare_factor, poincare_project
from semantic import Autoencoder, ConceptConfig

# ---- 1. Predict

choices = None
"""A batch has rows (8, 32, D): concepts of 8 windows of 32 lines. Among how many lines, the true
one counted, does contrast_loss(lm, lm(rows[:, :-1]), rows) find each next line? An int. Its
logarithm is the loss of a model that scores all lines alike. An untrained one is above it, as its
scores differ by chance; one that stays there has learned nothing; and one that is far below it
within a few steps sees something that it should not."""


# ---- 2. Fill in


def poincare_distance(x, y):
    """The distance of points of Poincaré's ball: (..., dim) twice, as they broadcast, to (...).

    The paper has arcosh(1 + 2 |x - y|^2 / ((1 - |x|^2) (1 - |y|^2))). In float64 the result must
    be right, to five digits, for points as near to each other as 1e-10 (1 + 1e-20 is 1) and as near
    to the rim as 1e-10, at opposite ends of it. Of a point to itself it is 0, or at most 1e-12, and
    its gradient there must be finite: in training a node does meet itself, and one NaN in a
    gradient is a NaN in all points soon after. (The name is that of hyperbolic.py: do not call it.)
    """
    ...


# ---- 3. Find the planted bug


def descend(x, grad, rate, longest):
    """A step of Riemannian descent in Poincaré's ball, as hyperbolic.step makes one: points x
    (N, D) and the Euclidean gradient of the loss there, (N, D), to points (N, D). Along the
    geodesic, rate times as far as the Riemannian gradient is long, at most `longest`.

    It runs, it goes downhill, and points never leave the ball. But a node far out jumps by
    `longest` at every step, however small the rate has become: the loss stops falling early, and
    leaves do not settle beside their parents."""
    factor = poincare_factor(x)  # (N, 1), a step at x is so much longer than it looks
    v = -rate * grad / factor  # (N, D)
    length = v.norm(dim=1, keepdim=True) * factor  # (N, 1), as the ball measures it
    v = v * (longest / length.clamp(min=TINY)).clamp(max=1)
    return poincare_project(poincare_exp(x, v))


# ---- 4. Extend


def space_patches(ids):
    """True at each byte that ends a patch: int64 bytes (..., T) to bool (..., T), by the rule of
    SpaceByte (Slagle 2024, arXiv 2404.14408), which needs no model that measures entropy.

    A byte is spacelike unless it is an ASCII letter, an ASCII digit or a UTF-8 continuation byte,
    0x80 to 0xBF; so spaces, punctuation and the first byte of a character beyond ASCII are. A patch
    ends with each spacelike byte that has no spacelike byte right before it; before the first byte
    of a row there is none. So the large model steps behind the space, before a word begins.

    As with all patches, what is said of byte t may depend on bytes 0 to t and on none behind them:
    who ends a word at its last letter has told the model that a space comes next."""
    ...


# ---- 5. Measure and explain


def order_kept():
    """How much of the order of its words does a concept keep, and where?

    Autoencoder.encode turns the vector of each token by its place and adds them all. Here `words`
    (12, 512) are 12 such vectors, before they are turned. Make the concept of the line (turn by
    places 0 to 11, add: (512,)) and that of the same line backwards. Return (cosine, letter): the
    cosine of the two, as a float, in the slowest quarter of the pairs alone: the 64 pairs with the
    smallest `turns`, 128 of the 512 channels (apply_rope says which channels are a pair). In the
    fastest quarter it is near 0. The letter says why it is not here:

    a. a cosine over few channels is high for any two vectors: 128 is a quarter of 512
    b. these pairs hardly turn within a line, so their sum is nearly a bag of words, the same in
       any order
    c. the numbers in slow pairs are small, so that there is little left that could differ

    The fast pairs are what a line is told back from; these are what its topic is read from."""
    words = torch.randn(12, 512, generator=torch.Generator().manual_seed(0))
    autoencoder = Autoencoder(ConceptConfig(d_concept=512))
    cosine, letter = None, None  # yours: use autoencoder.turn, autoencoder.turns and words
    return cosine, letter
