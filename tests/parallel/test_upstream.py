"""Each workaround of an upstream bug is still needed: a test here turns red when upstream mends it, and then the
function it names can go. Measured on deepspeed 0.19.8 and torch 2.13.

`sum_over_tensor_ranks`: the planted fault `norms_left_partial` shows that deepspeed leaves these gradients partial.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import clip_grad_norm_
from deepspeed.utils import safe_get_full_optimizer_state

from configs.run import RunConfig
from parallel import gradients, groups, pipeline
from parallel.engine import Engine
from pretrain.health import fit_to_apply
from pretrain.local_ranks import LocalRanksFailed, run_ranks
from slurm.environ import LaunchEnv
from tests.parallel.jobs import batches, engine_on
from tests.tiny import tiny_config


def stock_norm(engine: Engine, config: RunConfig) -> float:
    """The global gradient norm as deepspeed computes it, where its own step would."""
    wrapper = engine._deepspeed
    if config.parallel.zero_stage == 0:
        return float(clip_grad_norm_(wrapper.module.parameters(), max_norm=1e9, mpu=wrapper.mpu))
    return float(wrapper.optimizer.scaled_global_norm())


def norms_job(env: LaunchEnv, config: RunConfig) -> tuple[float, float]:
    """(deepspeed's norm, ours) of one step."""
    found: list[tuple[float, float]] = []
    with engine_on(env, config) as engine:
        for name, parameter in engine.part.owned_parameters().items():
            # As megatron-core marks what is cut over tensor ranks; deepspeed's norm reads it.
            parameter.tensor_model_parallel = "tensor" in engine.part.placements[name].axes  # type: ignore[attr-defined]

        def accept(cross_entropy: float, norm: float) -> bool:
            found.append((stock_norm(engine, config), norm))
            return fit_to_apply(cross_entropy, norm)

        engine.train_step(batches(engine, config, 0), 1e-3, accept)
    return found[0]


@pytest.mark.parametrize(
    ("workaround", "ranks", "parallel", "model"),
    [
        (gradients.clip_unsharded, 2, "{pipeline: 2, zero_stage: 0}", "model.moe=null"),
        (gradients.clip_unsharded, 2, "{expert: 2, zero_stage: 0}", "model.width=32"),
        (gradients.hand_over_norm, 2, "{tensor: 2, expert: 2}", "model.width=32"),
    ],
)
def test_deepspeeds_norm_is_still_wrong(workaround: Any, ranks: int, parallel: str, model: str) -> None:
    config = tiny_config(f"parallel={parallel}", model)
    assert "Upstream" in workaround.__doc__
    found = run_ranks(ranks, norms_job, config)
    assert any(abs(stock - ours) > 1e-3 * ours for stock, ours in found), f"mended: {found}"


def test_deepspeeds_norm_is_right_where_it_should_be() -> None:
    """The same question where both agree: the tests above measure what they say."""
    for stock, ours in run_ranks(2, norms_job, tiny_config("parallel={data: 2}")):
        assert stock == pytest.approx(ours, rel=1e-5)


def test_deepspeeds_norm_still_waits_for_ever_where_a_stage_holds_no_experts() -> None:
    """`hand_over_norm`: here the wait is ended by a time-out."""
    config = tiny_config("parallel={pipeline: 2, expert: 2}", "model.num_layers=2", "cluster.collective_timeout_s=5")
    with pytest.raises(LocalRanksFailed, match=r"(?i)timed out|closed by peer"):
        run_ranks(4, norms_job, config, timeout_s=60)


def state_job(env: LaunchEnv, config: RunConfig) -> str:
    with engine_on(env, config) as engine:
        engine.train_step(batches(engine, config, 0), 1e-3, fit_to_apply)
        block = engine.model.moe_blocks()[0]
        assert block.moe is not None
        try:
            safe_get_full_optimizer_state(block.moe.experts.up, "exp_avg")
        except (ValueError, KeyError, AttributeError, AssertionError) as error:
            return f"{type(error).__name__}: {error}"
        return "found"


def test_deepspeed_still_does_not_find_experts_moments() -> None:
    """`optimizer_state._partitions`."""
    found = run_ranks(2, state_job, tiny_config("parallel={expert: 2}"))
    assert all("exp_avg" in told for told in found), f"mended: {found}"


def unmarked_job(env: LaunchEnv, config: RunConfig) -> bool:
    pipeline.ExpertMarker = lambda num_experts: torch.nn.Identity()  # type: ignore[misc, assignment]
    with engine_on(env, config) as engine:
        return bool(engine._deepspeed.has_moe_layers)


def test_deepspeed_still_sees_experts_only_in_layers_of_its_own() -> None:
    """`ExpertMarker`."""
    assert run_ranks(2, unmarked_job, tiny_config("parallel={expert: 2}")) == [False, False]


def long_evaluation_job(env: LaunchEnv, config: RunConfig) -> str:
    with engine_on(env, config) as engine:
        many = batches(engine, config, 0) * 2
        try:
            engine._deepspeed.eval_batch(iter(many), num_micro_batches=len(many))
        except Exception as error:
            return type(error).__name__
        return "evaluated"


def test_dualpipev_still_cannot_evaluate_more_micro_batches_than_a_step_has() -> None:
    """`as_many_micro_batches`."""
    config = tiny_config("parallel={pipeline: 2, schedule: dualpipev}", "cluster.collective_timeout_s=5")
    try:
        told = run_ranks(2, long_evaluation_job, config, timeout_s=60)
    except LocalRanksFailed:  # one rank raised, and the end of its groups failed then
        return
    assert "evaluated" not in told, "mended"


def time_out_job(env: LaunchEnv) -> tuple[float, float]:
    """Seconds after which a group made without a time-out gives up, before and after the workaround."""
    given = timedelta(seconds=7)
    init = f"tcp://{env.master_addr}:{env.master_port}"
    dist.init_process_group("gloo", init_method=init, rank=env.rank, world_size=env.world_size, timeout=given)

    def seconds() -> float:
        backend: Any = dist.new_group([0, 1])._get_backend(torch.device("cpu"))
        return float(backend.options._timeout.total_seconds())

    before = seconds()
    groups.time_out_every_group(given)
    after = seconds()
    groups.leave()
    return before, after


def test_a_new_group_still_ignores_the_time_out_given_at_the_start() -> None:
    """`time_out_every_group`."""
    for before, after in run_ranks(2, time_out_job):
        assert before > 7 and after == 7


def test_deepspeed_still_needs_to_be_kept_out_of_shared_memory() -> None:
    """`keep_out_of_shared_memory`: red when deepspeed drops the operator or moves the table."""
    groups.keep_out_of_shared_memory()
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
