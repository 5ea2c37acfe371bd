"""What checkpoints of a large layout come to, worked out on one process: bytes and boxes a rank, plan, manifest.

Every rank's boxes are made as its engine would make them (sharding table, then ZeRO-1's flat cut), without values; then
rank 0's work is done for real: planning over all ranks, writing the manifest, reading it again.
"""

from __future__ import annotations

import pickle
import statistics
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import report
from configs.run import PRESETS, RunConfig
from model.glam import GLaM
from parallel.checkpoint_manifest import Manifest, StoredBox, StoredFile, StoredTensor
from parallel.checkpoint_plan import Place, local_plan, spread
from parallel.fragments import Box, TensorBoxes, fragment_boxes
from parallel.sharding import placement
from parallel.topology import Topology
from pretrain import budget

COLUMNS = {
    "case": "preset",
    "candidate": "ranks",
    "state_gb": "state GB",
    "fullest_gb": "fullest rank GB",
    "emptiest_gb": "emptiest rank GB",
    "boxes": "boxes",
    "plan_s": "plan s",
    "plan_mb": "gathered MB",
    "manifest_mb": "manifest MB",
    "write_s": "encode s",
    "read_s": "parse s",
    "note": "note",
}
PRESETS_BY_SIZE = {
    "full": (("glam", 1024), ("glam", 2048), ("glam_8b_64e", 256), ("glam_1.7b_64e", 64)),
    "quick": (("glam_8b_64e", 256), ("glam_1.7b_64e", 64)),
    "smoke": (("glam_0.1b_64e", 8),),
}
_ALIGN = 2  # ZeRO-1 pads each group to a multiple of this many elements a rank


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "checkpoint_scale", (__doc__ or "").split("\n\n")[0], "python -m benchmarks.checkpoint_scale --quick"
    )
    parsed = parser.parse_args(arguments)
    device, size = report.set_up(parsed), report.size_of(parsed)
    result = report.Report("checkpoint_scale", size, report.machine_facts(device, parsed) | {"clock": "wall time"})
    with report.output_kept_clean():
        result.rows.extend(measure(preset, ranks) for preset, ranks in PRESETS_BY_SIZE[size])
    result.notes.append(
        "state: float32 weights and two moments. plan: once a run, on rank 0, over all ranks' boxes (gathered MB of "
        "pickles). The manifest is encoded at each save, beside training, and parsed by every rank at a resume."
    )
    result.print(parsed.json, COLUMNS)
    return 0


def measure(preset: str, ranks: int) -> dict[str, report.Figure]:
    config = RunConfig.load(PRESETS / f"{preset}.yaml", ["parallel.data=auto"])
    plans, gathered = [], 0
    for boxes in boxes_of_ranks(config, ranks):
        local = local_plan(boxes)
        gathered += len(pickle.dumps(local))
        plans.append(local)
    began = time.perf_counter()
    everyone, described = spread(plans)
    plan_s = time.perf_counter() - began
    sizes = [sum(_bytes(shape) for _, _, shape in places) for places in everyone]
    began = time.perf_counter()
    manifest = _manifest(everyone, described)
    data = manifest.encode()
    write_s = time.perf_counter() - began
    began = time.perf_counter()
    again = Manifest.decode(data)
    read_s = time.perf_counter() - began
    assert again == manifest
    wanted = 12 * budget.parameters(config.model).total
    assert sum(sizes) == wanted, f"{sum(sizes)} bytes of boxes, {wanted} of state"
    return {
        "case": preset, "candidate": str(ranks), "state_gb": sum(sizes) / 1e9, "fullest_gb": max(sizes) / 1e9,
        "emptiest_gb": min(sizes) / 1e9, "boxes": sum(len(places) for places in everyone), "plan_s": plan_s,
        "plan_mb": gathered / 1e6, "manifest_mb": len(data) / 1e6, "write_s": write_s, "read_s": read_s,
        "note": f"{statistics.median(map(len, everyone)):.0f} boxes a rank",
    }  # fmt: skip


def boxes_of_ranks(config: RunConfig, ranks: int) -> list[dict[str, TensorBoxes]]:
    """What `Engine.tensors` gives on each rank, without values."""
    p, stages = config.parallel, budget.stages(config)
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in GLaM(config.model).named_parameters()}
    found = []
    for rank in range(ranks):
        t = Topology(rank, p.data_degree(ranks), p.tensor, p.pipeline, p.expert, p.expert_tensor, p.sequence, p.context)
        local = {f"blocks.{n}." for n in stages.blocks(t.stage)}
        boxes: dict[str, TensorBoxes] = {}
        groups: dict[str, list[str]] = {"matrices": [], "vectors": [], "experts": []}
        for name, shape in shapes.items():
            here = (
                any(name.startswith(prefix) for prefix in local)
                if name.startswith("blocks.")
                else stages.embeds(t.stage) if name.startswith("embed") else stages.ends(t.stage)
            )  # fmt: skip
            if here:
                kind = "experts" if ".experts." in name else "matrices" if len(shape) > 1 else "vectors"
                groups["vectors" if name.endswith("bias.table") else kind].append(name)
        for kind, names in groups.items():
            replicas = max(1, t.ranks_per_stage // p.ranks_for_all_experts) if kind == "experts" else t.lanes
            index = t.expert_replica if kind == "experts" else t.lane
            boxes |= _zero_boxes(names, shapes, t, replicas, index)
        found.append(boxes)
    return found


def _zero_boxes(
    names: list[str], shapes: dict[str, tuple[int, ...]], topology: Topology, replicas: int, index: int
) -> dict[str, TensorBoxes]:
    """A parameter group's flat order, padded and cut evenly: what part number `index` holds."""
    placed = {name: placement(name, shapes[name], topology) for name in names}
    sizes = {name: torch.Size(part).numel() for name, (_, part) in placed.items()}
    step = replicas * _ALIGN
    each = -(-sum(sizes.values()) // step) * step // replicas
    first, start, boxes = index * each, 0, dict[str, TensorBoxes]()
    for name in names:
        begin, end = max(first, start), min(first + each, start + sizes[name])
        if begin < end:
            flat = torch.empty(end - begin, device="meta")
            made = fragment_boxes(flat, begin - start, placed[name][1], placed[name][0])
            for key in ("weight", "exp_avg", "exp_avg_sq"):
                boxes[f"{name}/{key}"] = TensorBoxes(shapes[name], [Box(b.offset, b.values) for b in made.boxes])
        start += sizes[name]
    return boxes


def _manifest(everyone: list[list[Place]], described: dict[str, tuple[tuple[int, ...], str]]) -> Manifest:
    boxes: dict[str, list[StoredBox]] = {name: [] for name in described}
    for rank, places in enumerate(everyone):
        start = 4096
        for name, offset, shape in places:
            boxes[name].append(StoredBox(offset, shape, rank, start, f"{rank:032x}"))
            start += _bytes(shape)
    files = tuple(StoredFile(f"rank-{r:05d}-000.safetensors", 10**10, 4096, f"{r:032x}") for r in range(len(everyone)))
    return Manifest({}, files, {name: StoredTensor(*described[name], tuple(held)) for name, held in boxes.items()})


def _bytes(shape: tuple[int, ...]) -> int:
    return 4 * torch.Size(shape).numel()


if __name__ == "__main__":
    sys.exit(main())
