"""Training steps over all ranks. DeepSpeed sits behind this file and nowhere else.

Four verbs: train_step, evaluate, and the state to save and to load (`tensors`, `loaded`).
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
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.schedule import OptimizerStep
from torch import Tensor

from configs.run import RunConfig
from model.glam import GLaM
from parallel import groups
from parallel.collectives import sum_over_ranks
from parallel.fragments import TensorBoxes, fragment_boxes
from parallel.gradients import hand_over_norm, local_squared_norm
from parallel.pipeline import pipeline_module
from parallel.sharding import Placement
from parallel.topology import Topology

MicroBatch = tuple[Tensor, Tensor]  # int64 tokens [B, S] and labels [B, S]


@dataclass(frozen=True)
class StepResult:
    """One step's figures, the same on every rank."""

    cross_entropy: float  # nats a token, mean over the global batch, before the update
    grad_norm: float  # of the mean gradient over all parameters, before clipping
    applied: bool  # False: judged unfit, and neither weights nor optimizer state changed


class Engine:
    """Forward, backward, reduction and update of one model over a topology (ZeRO stage 1)."""

    def __init__(
        self,
        model: GLaM,
        placements: dict[str, Placement],
        topology: Topology,
        config: RunConfig,
        device: torch.device,
    ) -> None:
        self.model, self.placements, self.topology, self.device = model, placements, topology, device
        self.num_micro_batches = config.train.num_micro_batches(topology.data)
        for block in model.blocks:
            block.aux_scale = 1 / self.num_micro_batches  # type: ignore[assignment]
            block.recompute = config.train.recompute  # type: ignore[assignment]
        module = pipeline_module(model, topology)
        optimizer = _adamw(model, topology, config)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints memory figures for every parameter group
            self._deepspeed, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=_deepspeed_config(config, self.num_micro_batches)
            )
        self._lr = 0.0
        self._accept: Callable[[float, float], bool] = lambda cross_entropy, norm: True
        self._result: StepResult | None = None
        # DeepSpeed binds each instruction of its schedule to itself; ours has its own self.
        own_step = {OptimizerStep: lambda _: self._optimizer_step()}
        self._deepspeed._INSTRUCTION_MAP = {**self._deepspeed._INSTRUCTION_MAP, **own_step}

    # ---- training -------------------------------------------------------------------------------------------------
    def train_step(
        self, micro_batches: Iterable[MicroBatch], lr: float, accept: Callable[[float, float], bool]
    ) -> StepResult:
        """One update over `num_micro_batches` micro-batches of this rank.

        `accept(cross_entropy, grad_norm)` decides before anything is changed; it sees the same figures on every rank.
        """
        self._lr, self._accept = lr, accept
        self.model.cross_entropies.clear()
        for block in self.model.moe_blocks().values():
            block.totals.take()
        self._deepspeed.train_batch(data_iter=iter(micro_batches))
        assert self._result is not None
        return self._result

    def _optimizer_step(self) -> None:
        """The schedule's last instruction, in place of DeepSpeed's: judge first, then update or discard."""
        optimizer = self._deepspeed.optimizer
        losses = self.model.cross_entropies
        figures = torch.zeros(3, dtype=torch.float64, device=self.device)
        figures[0] = local_squared_norm(optimizer, self.topology)
        if losses:
            figures[1], figures[2] = torch.stack(losses).double().sum(), len(losses)
        squared_norm, loss_sum, loss_count = sum_over_ranks(figures).tolist()
        norm = math.sqrt(squared_norm) if squared_norm >= 0 else math.nan
        cross_entropy = loss_sum / max(loss_count, 1)
        applied = self._accept(cross_entropy, norm)
        if applied:
            for group in self._deepspeed.optimizer.param_groups:
                group["lr"] = self._lr
            hand_over_norm(optimizer, torch.tensor(norm, device=self.device))
            self._deepspeed._exec_optimizer_step()
        else:
            _discard_gradients(optimizer)
        self._result = StepResult(cross_entropy, norm, applied)

    def router_loads(self) -> dict[int, Tensor]:
        """Layer -> [load of E experts, choices, balance loss, z-loss, passes], summed over the step and all ranks."""
        blocks = self.model.moe_blocks()
        taken = {layer: block.totals.take() for layer, block in blocks.items()}
        present = {layer: totals for layer, totals in taken.items() if totals is not None}
        if not present:
            return {}
        summed = sum_over_ranks(torch.stack(list(present.values())).double())
        return dict(zip(present, summed.cpu()))

    # ---- evaluation -----------------------------------------------------------------------------------------------
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> float:
        """Mean cross-entropy in nats a token over the micro-batches of all ranks, each rank passing equally many."""
        # DeepSpeed switches the layers it was given, but the loss belongs to the whole model.
        self.model.eval()
        loss = self._deepspeed.eval_batch(iter(micro_batches), num_micro_batches=len(micro_batches))
        self.model.train()
        return float(loss)

    # ---- state ----------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, TensorBoxes]:
        """Name -> this rank's boxes of each float32 weight and optimizer moment, as views: what is written into them
        is the state. Names and shapes are the whole model's, whatever the layout. Call `loaded` after writing."""
        found: dict[str, TensorBoxes] = {}
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameters, flat, state in self._partitions():
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                name = names[id(parameter)]
                here, whole = mapping.lp_fragment_address, mapping.hp_fragment_address
                for key, tensor in (
                    ("weight", flat),
                    ("exp_avg", state["exp_avg"]),
                    ("exp_avg_sq", state["exp_avg_sq"]),
                ):
                    part = tensor.detach().narrow(0, whole.start, whole.numel)
                    found[f"{name}/{key}"] = fragment_boxes(
                        part, here.start, tuple(parameter.shape), self.placements[name]
                    )
        return found

    def loaded(self, updates: int) -> None:
        """Take over state written into `tensors()` after `updates` applied updates: refresh the working weights."""
        for _, _, state in self._partitions():
            state["step"].fill_(float(updates))
        self._deepspeed.optimizer.update_lp_params()

    def _partitions(self) -> Iterator[tuple[list[Any], Tensor, dict[str, Tensor]]]:
        """(parameters, this rank's flat float32 partition, its AdamW state) of each parameter group.

        Upstream (deepspeed 0.19.8, stage_1_and_2.py `_lazy_init_hp_params_optimizer_state`): state is linked to
        parameters after the first group's step only, so experts' moments are not found through DeepSpeed's own
        getters. The flat partitions know them.
        """
        wrapper = self._deepspeed.optimizer
        lists = wrapper.bf16_groups if isinstance(wrapper, BF16_Optimizer) else wrapper.bit16_groups
        for parameters, group in zip(lists, wrapper.optimizer.param_groups):
            flat = group["params"][0]
            state = wrapper.optimizer.state[flat]
            if "exp_avg" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
            yield parameters, flat, state


def _discard_gradients(optimizer: Any) -> None:
    """Forget this step's gradients, as DeepSpeed does on an overflow, without touching anything else.

    Upstream (deepspeed 0.19.8, bf16_optimizer.py, utils/ `get_norm_with_moe_layers`): letting a non-finite norm reach
    the optimizer's own step is not safe in every mode, so it never does.
    """
    optimizer.zero_grad(set_to_none=True)
    if not isinstance(optimizer, BF16_Optimizer):
        for table in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for key in table:
                table[key] = None


def _adamw(model: GLaM, topology: Topology, config: RunConfig) -> torch.optim.Optimizer:
    """Parameter groups: decayed matrices, undecayed vectors and position tables, and experts (all matrices)."""
    spec = config.train.optimizer
    matrices, vectors, experts = [], [], []
    for name, parameter in model.named_parameters():
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
        listed.append({"params": experts, "moe": True, "name": groups.expert_group_name(topology)})
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
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_sequences,
        "gradient_accumulation_steps": num_micro_batches,
        "steps_per_print": None,
        "gradient_clipping": config.train.clip_norm or 0.0,  # its default is 1.0
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",  # bf16 by default in bf16 runs, also for float32 gradients
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False},
    }
    if config.train.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        settings["data_types"] = {"grad_accum_dtype": "fp32"}  # bf16 by default
    return settings
