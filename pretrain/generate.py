"""Text from a trained model, one token at a time with a key-value cache, on one process."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from configs.model import ModelConfig
from model.glam import GLaM


def without_capacity(config: ModelConfig) -> ModelConfig:
    """The same model without dropped choices: capacity counts the tokens of a sequence that decoding has not yet."""
    router = config.moe.router if config.moe else None
    if config.moe is None or getattr(router, "capacity", None) is None:
        return config
    free = router.model_copy(update={"capacity": None})  # type: ignore[union-attr]
    return config.model_copy(update={"moe": config.moe.model_copy(update={"router": free})})


@torch.no_grad()
def generate(
    model: GLaM, prompt: list[int], max_tokens: int, temperature: float, top_p: float, eos_id: int | None, seed: int
) -> Iterator[int]:
    """Yield token ids that continue `prompt`, until EOS or `max_tokens`.

    Args:
        temperature: 0 takes the most probable token.
        top_p: sample from the smallest set of tokens that holds this much probability (arXiv:1904.09751).
    """
    model.eval()
    device = model.embed.weight.device
    generator = torch.Generator().manual_seed(seed)
    state = model.decoding_state(len(prompt) + max_tokens)
    tokens = torch.tensor([prompt], device=device)
    for _ in range(max_tokens):
        logits_V = model(tokens, state)[0, -1].float().cpu()
        chosen = sample(logits_V, temperature, top_p, generator)
        if chosen == eos_id:
            return
        yield chosen
        tokens = torch.tensor([[chosen]], device=device)


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """Draw one token id."""
    if temperature == 0:
        return int(logits_V.argmax())
    probs, order = (logits_V / temperature).softmax(-1).sort(descending=True)
    # A token stays if the mass before it is still short of top_p; the first always stays.
    probs[1:][(probs.cumsum(0) - probs)[1:] >= top_p] = 0
    return int(order[torch.multinomial(probs, 1, generator=generator)])
