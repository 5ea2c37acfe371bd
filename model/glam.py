"""The whole decoder: embedding, blocks, final norm, output weights.

B batch, S sequence, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import ModelConfig
from model.block import Block
from model.documents import document_starts
from model.kv_cache import DecodingState
from model.loss import language_model_loss
from model.norm import RMSNorm
from model.vocabulary import Vocabulary, WholeVocabulary


class Embedding(nn.Module):
    """tokens[B, S] -> [B, S, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.width))
        self.vocabulary: Vocabulary = WholeVocabulary()

    def forward(self, token_BS: Tensor) -> Tensor:
        row_BS, here_BS = self.vocabulary.rows(token_BS, self.weight.shape[0])
        x_BSD = F.embedding(row_BS, self.weight)
        return self.vocabulary.leave(x_BSD if here_BS is None else x_BSD * here_BS[..., None])


class GLaM(nn.Module):
    """Decoder-only sparse or dense language model (arXiv:2112.06905, sec. 4).

    Parameters start uninitialised: build on the meta device, cut, then fill with `model.init.initial_value`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_epsilon)
        self.head = None if config.tied_embedding else nn.Linear(config.width, config.vocab_size, bias=False)
        self.cross_entropies: list[Tensor] = []  # of training passes since they were last taken, in nats

    def layers(self) -> list[nn.Module]:
        """The model as a chain of one tensor in, one tensor out, for a pipeline; `loss` ends it."""
        return [self.embed, *self.blocks, self.norm]

    @property
    def output_weight(self) -> Tensor:
        """[V, D]: the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def loss(self, hidden_BSD: Tensor, label_BS: Tensor) -> Tensor:
        """The objective for the final hidden states: cross-entropy in nats, plus the output z-loss when training."""
        z_coef = self.config.lm_z_coef if self.training else 0.0
        vocabulary = self.embed.vocabulary
        hidden_TD = vocabulary.enter(hidden_BSD).flatten(0, 1)
        loss, cross_entropy = language_model_loss(
            hidden_TD, self.output_weight, label_BS.flatten(), z_coef, vocabulary=vocabulary
        )
        if self.training:
            self.cross_entropies.append(cross_entropy)
        return loss

    def forward(self, token_BS: Tensor, state: DecodingState | None = None) -> Tensor:
        """Logits [B, S, V]; with a `state` the tokens continue what it has seen."""
        if state is None:
            self.expect([token_BS])
        elif state.documents is not None:
            self._expect_documents([state.documents.read(token_BS)])
        x_BSD = self.embed(token_BS)
        for number, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, state.layers[number] if state else None)
        return F.linear(self.norm(x_BSD), self.output_weight)

    def hidden(self, token_BS: Tensor) -> Tensor:
        """Final hidden states [B, S, D] of whole sequences, by the chain that `loss` ends."""
        self.expect([token_BS])
        x = token_BS
        for layer in self.layers():
            x = layer(x)
        return x

    def decoding_state(self, length: int) -> DecodingState:
        """The beginning of a sequence of up to `length` tokens."""
        layers = [block.attention.new_cache(length) for block in self.blocks if isinstance(block, Block)]
        return DecodingState(layers, self.config.attention.document_end)

    def expect(self, micro_batches: Iterable[Tensor]) -> None:
        """Tell every block of the tokens [B, S] of the passes to come, before they are made layer by layer: where
        documents are kept apart, hidden states alone do not say where they start."""
        end = self.config.attention.document_end
        if end is not None:
            self._expect_documents([document_starts(token_BS, end) for token_BS in micro_batches])

    def _expect_documents(self, starts: list[Tensor]) -> None:
        for block in self.blocks:
            assert isinstance(block, Block)
            block.documents = iter(starts)

    def moe_blocks(self) -> dict[int, Block]:
        """Layer number -> block, for the blocks that hold experts."""
        return {n: block for n, block in enumerate(self.blocks) if isinstance(block, Block) and block.moe is not None}
