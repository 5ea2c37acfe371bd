"""Sparse upcycling (arXiv:2212.05055): a mixture of experts that begins as the dense model it is made of.

Every expert of a chosen layer is a copy of that layer's feed-forward part. Gate weights sum to 1 and no choice is
dropped, so whatever the routers say, the first logits are those of the dense model.

E experts, D width, F ffn width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from data_prep.progress import Reporter
from model.init import initial_value
from parallel.checkpoint_serial import LazyTensor
from pretrain import budget
from pretrain.weights import Origin, WeightReader, open_weights, parameter_shapes, write_weights

# stack of experts -> the dense weights that each is a copy of
_COPIED = {
    "moe.experts.gate": "ffn.gate_proj.weight",
    "moe.experts.up": "ffn.in_proj.weight",
    "moe.experts.down": "ffn.out_proj.weight",
}


@dataclass(frozen=True)
class UpcycleReport:
    """What was made.

    Attributes:
        layers: numbers of those that hold experts now.
        parameters_before: of the dense model.
        parameters: of the new one.
        active: of those, the ones that a token passes through.
    """

    folder: Path
    layers: tuple[int, ...]
    parameters_before: int
    parameters: int
    active: int


def upcycle(
    checkpoint: Path,
    out: Path,
    num_experts: int,
    k: int = 2,
    every: int = 2,
    offset: int = 0,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> UpcycleReport:
    """Write a mixture of experts made of a dense checkpoint, or of the newest of a run: weights only, in float32.

    Args:
        k: experts a token visits.
        every: layers i with i % every == offset get experts.
        seed: of the routers.

    Raises:
        UserError: a model with experts already, numbers that do not fit it, damage, or `out` cannot be made.
    """
    reporter = reporter or Reporter(None)
    with open_weights(checkpoint) as dense:
        model = sparse_twin(dense.model, num_experts, k, every, offset, str(dense.folder))
        tensors = [_tensor(dense, model, name, shape, seed) for name, shape in parameter_shapes(model).items()]
        source = {**dense.source, "num_experts": num_experts, "k": k, "every": every, "offset": offset, "seed": seed}
        tokenizers = dense.manifest.document.get("tokenizers", {})
        origin = Origin("upcycle", source, dense.folder, tokenizers, partial(dense.verify, reporter))
        write_weights(out, model, tensors, origin, reporter)
        counts = budget.parameters(model)
        return UpcycleReport(
            folder=out,
            layers=tuple(layer for layer in range(model.num_layers) if model.is_moe(layer)),
            parameters_before=budget.parameters(dense.model).total,
            parameters=counts.total,
            active=counts.active,
        )


def sparse_twin(dense: ModelConfig, num_experts: int, k: int, every: int, offset: int, where: str) -> ModelConfig:
    """The dense model with experts like its feed-forward layers in some of them."""
    if dense.num_moe_layers:
        assert dense.moe is not None
        raise UserError(
            f"{where} has {dense.moe.num_experts} experts in {dense.num_moe_layers} of its layers already",
            "a dense checkpoint (model.moe=null)",
            "choose another",
        )
    if num_experts < 2:
        raise UserError(f"{num_experts} expert(s) a layer", "at least 2", "choose more experts")
    if offset >= dense.num_layers:
        found = f"every={every}, offset={offset} in a model of {dense.num_layers} layers: none would hold experts"
        raise UserError(found, f"offset below {dense.num_layers}", "choose a smaller offset")
    moe = {
        "num_experts": num_experts,
        "expert": dense.ffn.model_dump(mode="json"),
        "every": every,
        "offset": offset,
        "router": {"kind": "topk", "k": k, "renormalise": True},
    }
    return ModelConfig.check({**dense.model_dump(mode="json"), "moe": moe}, where="the mixture that was asked for")


def _tensor(dense: WeightReader, model: ModelConfig, name: str, shape: tuple[int, ...], seed: int) -> LazyTensor:
    layer, _, part = name.partition(".moe.")
    if not part:
        return LazyTensor(name, shape, "float32", partial(dense.rows, name))
    if part == "router.weight":
        return LazyTensor(name, shape, "float32", partial(_router_rows, name, shape, model, seed))
    copied = f"{layer}.{_COPIED[f'moe.{part}']}"
    return LazyTensor(name, shape, "float32", partial(_copies, dense, copied, shape[1]))


def _router_rows(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int, first: int, count: int) -> Tensor:
    return initial_value(name, shape, model, seed, (first, 0), (count, shape[1]))


def _copies(dense: WeightReader, name: str, num_rows: int, _: int, count: int) -> Tensor:
    """The dense weights `count` times, [count, F, D] or [count, D, F]; a view."""
    return dense.rows(name, 0, num_rows).expand(count, -1, -1)
