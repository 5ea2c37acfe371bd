"""Whether a step may change the weights."""

from __future__ import annotations

import math

# Beyond this the square overflows float32 inside the clipping that follows.
LARGEST_NORM = 1e18


def fit_to_apply(cross_entropy: float, grad_norm: float) -> bool:
    """False for a loss or gradient that is not finite: the whole update is skipped, on all ranks alike (spec of GLaM,
    arXiv:2112.06905, sec. 5.1). Both figures are reduced over all ranks, so every rank answers the same."""
    return math.isfinite(cross_entropy) and math.isfinite(grad_norm) and grad_norm < LARGEST_NORM
