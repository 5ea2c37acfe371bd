"""The dense feed-forward layer.

B batch, S sequence, D width, F ffn width.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import Activation, FeedForwardConfig


def activate(x: Tensor, kind: Activation) -> Tensor:
    """Element-wise activation; gelu is the tanh form, as in GLaM's code and T5 v1.1."""
    if kind == "gelu":
        return F.gelu(x, approximate="tanh")
    return F.relu(x) if kind == "relu" else F.silu(x)


class FeedForward(nn.Module):
    """`out(act(in(x)))` or, gated, `out(act(gate(x)) * in(x))`; [..., D] -> [..., D]."""

    def __init__(self, width: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        self.gate_proj = nn.Linear(width, config.width, bias=False) if config.gated else None
        self.in_proj = nn.Linear(width, config.width, bias=False)
        self.out_proj = nn.Linear(config.width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.in_proj(x)
        if self.gate_proj is None:
            return self.out_proj(activate(hidden, self.config.activation))
        return self.out_proj(activate(self.gate_proj(x), self.config.activation) * hidden)
