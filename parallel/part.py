"""What one rank holds of a model that is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from model.block import Block
from model.glam import GLaM
from parallel.groups import Groups
from parallel.sharding import Placement
from parallel.stages import Stages
from parallel.topology import Topology


@dataclass(frozen=True)
class Part:
    """A whole model on the meta device in which this rank's modules are cut to its share and filled."""

    model: GLaM
    placements: dict[str, Placement]  # of every parameter, local or not
    topology: Topology
    stages: Stages
    groups: Groups

    @property
    def holds_copy_of_embedding(self) -> bool:
        """The output weights are the embedding, and that lies on another stage."""
        stage = self.topology.stage
        return self.model.head is None and self.stages.ends(stage) and not self.stages.embeds(stage)

    @property
    def embedding_has_copy(self) -> bool:
        return self.model.head is None and self.topology.stage == 0 and self.stages.ends_apart

    def local_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """(prefix of parameter names, module) of everything that is to be filled here."""
        stage, model = self.topology.stage, self.model
        if self.stages.embeds(stage) or self.holds_copy_of_embedding:
            yield "embed", model.embed
        for number, block in self.local_blocks().items():
            yield f"blocks.{number}", block
        if self.stages.ends(stage):
            yield "norm", model.norm
            if model.head is not None:
                yield "head", model.head

    def local_blocks(self) -> dict[int, Block]:
        """Layer number -> block."""
        blocks: dict[int, Block] = {}
        for number in self.stages.blocks(self.topology.stage):
            block = self.model.blocks[number]
            assert isinstance(block, Block)
            blocks[number] = block
        return blocks

    def owned_parameters(self) -> dict[str, Tensor]:
        """Name -> parameter that this rank trains: all that is local but a copy of the embedding."""
        return {
            f"{prefix}.{name}": parameter
            for prefix, module in self.local_modules()
            if not (prefix == "embed" and self.holds_copy_of_embedding)
            for name, parameter in module.named_parameters()
        }
