"""Training steps over all ranks. DeepSpeed sits behind this file and its neighbours, and nowhere else.

Four verbs: train_step, evaluate, and the state to save and to load (`tensors`, `loaded`); and two questions about the
step just done: `router_loads`, `gradients`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.pipe.schedule import OptimizerStep, ReduceTiedGrads
from torch import Tensor

from configs.run import RunConfig
from parallel import gradients
from parallel.collectives import sum_over_ranks
from parallel.context import own_part
from parallel.fragments import TensorBoxes, fragment_boxes
from parallel.groups import expert_group_name
from parallel.optimizer_state import state_fragments, take_over
from parallel.part import Part
from parallel.pipeline import TiedEmbedding, as_many_micro_batches, pipeline_module

MicroBatch = tuple[Tensor, Tensor]  # int64 tokens [B, S] and labels [B, S]


@dataclass(frozen=True)
class StepResult:
    """One step's figures, the same on every rank."""

    cross_entropy: float  # nats a token, mean over the global batch, before the update
    grad_norm: float  # of the mean gradient over all parameters, before clipping
    applied: bool  # False: judged unfit, and neither weights nor optimizer state changed


class Engine:
    """Forward, backward, reduction and update of one model over a topology."""

    def __init__(self, part: Part, config: RunConfig, device: torch.device) -> None:
        self.part, self.topology, self.device, self.model = part, part.topology, device, part.model
        self.num_micro_batches = config.train.num_micro_batches(part.topology.data)
        self._clip_norm = config.train.clip_norm
        for block in part.local_blocks().values():
            # Where experts are cut over tensor ranks, each of those adds the same auxiliary loss. Context ranks add it
            # too, but each to the gradient of its own tokens only, and then the mean over lanes divides by them.
            block.aux_scale = part.topology.context / (self.num_micro_batches * part.topology.expert_width)
            block.recompute = config.train.recompute
        self._tied = self._tie_embedding(config)
        owned = part.owned_parameters()
        self._names = {id(parameter): name for name, parameter in owned.items()}
        self._placed = {id(parameter): part.placements[name] for name, parameter in owned.items()}
        self._partial = [p for name, p in owned.items() if part.placements[name].sum_over_tensor]
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory figures for every parameter group
            self._deepspeed, *_ = deepspeed.initialize(
                model=pipeline_module(part),
                optimizer=_adamw(part, config),
                config=_deepspeed_config(config, self.num_micro_batches),
            )
        self._optimizer = self._deepspeed.optimizer
        self._lr = 0.0
        self._accept: Callable[[float, float], bool] = lambda cross_entropy, norm: True
        self._result: StepResult | None = None
        # Asked before each update, which changes what forward and backward passes only read: a snapshot of the state
        # may be under way until then.
        self.before_update: Callable[[], None] = lambda: None
        self.progress: Callable[[str], None] = lambda doing: None  # told what begins, for whoever watches
        # DeepSpeed binds each instruction of its schedule to itself; ours have their own self.
        own_steps = {
            ReduceTiedGrads: lambda _: self._complete_gradients(),
            OptimizerStep: lambda _: self._optimizer_step(),
        }
        self._deepspeed._INSTRUCTION_MAP = {**self._deepspeed._INSTRUCTION_MAP, **own_steps}
        # DualPipeV sends point to point over the default group, which under NCCL must have met as a whole before.
        sum_over_ranks(torch.zeros(1, device=device))

    def _tie_embedding(self, config: RunConfig) -> TiedEmbedding | None:
        if not (self.part.holds_copy_of_embedding or self.part.embedding_has_copy):
            return None
        assert self.part.groups.ends is not None
        if self.part.holds_copy_of_embedding and config.train.precision == "bf16":
            self.model.embed.to(torch.bfloat16)  # DeepSpeed converts only what it trains
        return TiedEmbedding(self.model.embed.weight, self.part.groups.ends)

    @property
    def reads_data(self) -> bool:
        """Whether tokens or labels are asked for here: stages between the first and the last never look at them,
        unless documents are kept apart."""
        stage = self.topology.stage
        return self._separates or self.part.stages.embeds(stage) or self.part.stages.ends(stage)

    @property
    def _separates(self) -> bool:
        return self.model.config.attention.document_end is not None

    def _own_parts(self, micro_batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """What this rank holds of each sequence. Its blocks are told of whole ones where documents are kept apart."""
        if self._separates:
            micro_batches = list(micro_batches)
            self.model.expect(tokens.to(self.device) for tokens, _ in micro_batches)
        return ((own_part(tokens, self.topology), own_part(y, self.topology)) for tokens, y in micro_batches)

    # ---- training -------------------------------------------------------------------------------------------------
    def train_step(
        self, micro_batches: Iterable[MicroBatch], lr: float, accept: Callable[[float, float], bool]
    ) -> StepResult:
        """One update over `num_micro_batches` micro-batches of this data rank (any number where `reads_data` is
        False): whole sequences, whatever part of them is held here.

        `accept(cross_entropy, grad_norm)` decides before anything is changed; it sees the same figures on every rank.
        """
        self.progress("a training step")
        self._lr, self._accept = lr, accept
        self.model.cross_entropies.clear()
        for block in self.part.local_blocks().values():
            block.totals.take()
        self._deepspeed.train_batch(data_iter=self._own_parts(micro_batches))
        assert self._result is not None
        return self._result

    def _complete_gradients(self) -> None:
        """After the last backward pass: sum what different ranks know of one gradient, data-parallel ranks excepted."""
        if self._partial:
            assert self.part.groups.tensor is not None
            gradients.sum_over_tensor_ranks(self._partial, self._optimizer, self.part.groups.tensor)
        if self._tied is not None:
            original = self.model.embed.weight if self.part.embedding_has_copy else None
            self._tied.hand_over_gradient(
                None if original is None else gradients.accumulated(original, self._optimizer)
            )

    def _optimizer_step(self) -> None:
        """The schedule's last instruction, in place of DeepSpeed's: judge first, then update or discard."""
        losses = self.model.cross_entropies
        figures = torch.zeros(3, dtype=torch.float64, device=self.device)
        figures[0] = gradients.local_squared_norm(self._optimizer, self._placed, self.topology)
        if losses:
            figures[1], figures[2] = torch.stack(losses).double().sum(), len(losses)
        squared_norm, loss_sum, loss_count = sum_over_ranks(figures).tolist()
        norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        cross_entropy = loss_sum / max(loss_count, 1)
        applied = self._accept(cross_entropy, norm)
        if applied:
            self._apply(norm)
        else:
            gradients.discard(self._optimizer)
        self._result = StepResult(cross_entropy, norm, applied)

    def _apply(self, norm: float) -> None:
        self.before_update()
        for group in self._optimizer.param_groups:
            group["lr"] = self._lr
        if gradients.is_sharded(self._optimizer):
            gradients.hand_over_norm(self._optimizer, torch.tensor(norm, device=self.device))
        else:
            gradients.clip_unsharded(self._optimizer, norm, self._clip_norm)
        self._deepspeed._exec_optimizer_step()
        if self._tied is not None:
            self._tied.refresh()

    def router_loads(self) -> dict[int, Tensor]:
        """Layer -> [load of E experts, choices, balance loss, z-loss, passes], summed over the step and all ranks."""
        config = self.model.config
        layers = [layer for layer in range(config.num_layers) if config.is_moe(layer)]
        if not layers or config.moe is None:
            return {}
        summed = torch.zeros(len(layers), config.moe.num_experts + 4, dtype=torch.float64, device=self.device)
        for layer, block in self.part.local_blocks().items():
            if (totals := block.totals.take()) is not None:
                summed[layers.index(layer)] = totals
        sum_over_ranks(summed).div_(self.topology.expert_width)  # where cut, each tensor rank saw the same tokens
        return {layer: totals for layer, totals in zip(layers, summed.cpu()) if totals[-1] > 0}

    # ---- evaluation -----------------------------------------------------------------------------------------------
    def evaluate(self, micro_batches: Sequence[MicroBatch], num_micro_batches: int) -> float:
        """Mean cross-entropy in nats a token over the micro-batches of all ranks, each data rank passing equally many.

        Args:
            micro_batches: this data rank's, of whole sequences; may be empty where `reads_data` is False.
        """
        self.progress("an evaluation")
        # DeepSpeed switches the layers it was given, but the loss belongs to the whole model.
        self.model.eval()
        with as_many_micro_batches(self._deepspeed, num_micro_batches):
            loss = self._deepspeed.eval_batch(self._own_parts(micro_batches), num_micro_batches=num_micro_batches)
        self.model.train()
        return float(loss)

    # ---- state ----------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, TensorBoxes]:
        """Name -> this rank's boxes of each float32 weight and optimizer moment, as views: what is written into them
        is the state. Names and shapes are the whole model's, whatever the layout. Call `loaded` after writing."""
        found: dict[str, TensorBoxes] = {}
        for parameter, start, pieces in state_fragments(self._optimizer):
            name = self._names[id(parameter)]
            for key, flat in pieces.items():
                found[f"{name}/{key}"] = self._boxes(parameter, start, flat)
        return found

    def loaded(self, updates: int) -> None:
        """Take over state written into `tensors()` after `updates` applied updates: refresh the working weights."""
        take_over(self._optimizer, updates)
        if self._tied is not None:
            self._tied.refresh()

    def gradients(self) -> Iterator[tuple[str, TensorBoxes]]:
        """Name and this rank's boxes of each mean gradient before clipping; to be asked within `accept` only."""
        for parameter, start, flat in gradients.reduced(self._optimizer):
            yield self._names[id(parameter)], self._boxes(parameter, start, flat)

    def _boxes(self, parameter: Tensor, start: int, flat: Tensor) -> TensorBoxes:
        return fragment_boxes(flat, start, tuple(parameter.shape), self._placed[id(parameter)])


def _adamw(part: Part, config: RunConfig) -> torch.optim.Optimizer:
    """Parameter groups: decayed matrices, undecayed vectors and position tables, and experts (all matrices)."""
    spec = config.train.optimizer
    matrices, vectors, experts = [], [], []
    for name, parameter in part.owned_parameters().items():
        if hasattr(parameter, "group_name"):
            experts.append(parameter)
        elif parameter.ndim >= 2 and not name.endswith("bias.table"):
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": matrices, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]
    if experts:
        listed.append({"params": experts, "moe": True, "name": expert_group_name(part.topology)})
    return torch.optim.AdamW(
        listed,
        lr=spec.peak_lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
        weight_decay=spec.weight_decay,
        fused=True,
    )


def _deepspeed_config(config: RunConfig, num_micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's settings; those that differ from its defaults do so for a reason given beside them."""
    sharded = config.parallel.zero_stage == 1
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "steps_per_print": None,
        "gradient_clipping": (config.train.clip_norm or 0.0) if sharded else 0.0,  # its default is 1.0; unsharded: ours
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",  # bf16 by default in bf16 runs, also for float32 gradients
        # Cutting what travels between stages over tensor ranks is ours to do (`parallel.tensor`).
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if config.train.precision == "bf16":
        # Gradients go into their float32 sum as they arise; by default bf16 copies of all stay until the step.
        settings["bf16"] = {"enabled": True, "immediate_grad_update": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # bf16 by default
    return settings
