"""Stopwatch and scales: paired times of candidates, and the peak memory of one step.

Machines are shared and drift, so candidates take turns within one process and are compared round by round.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

Step = Callable[[], object]

# Freed blocks from 64 KiB on go back to the system at once, so that resident memory is what is really held.
_MEMORY_ENVIRONMENT = MappingProxyType({"MALLOC_MMAP_THRESHOLD_": "65536"})


@dataclass(frozen=True)
class Times:
    """Seconds of each candidate in each round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Median over rounds of name / base: both of a round met the same machine."""
        return statistics.median(self._ratios(name, base))

    def spread(self, name: str, base: str) -> float:
        """Half the interquartile range of that ratio; 0 where there were too few rounds to say."""
        ratios = self._ratios(name, base)
        if len(ratios) < 4:
            return 0.0
        lower, _, upper = statistics.quantiles(ratios, n=4)
        return (upper - lower) / 2

    def _ratios(self, name: str, base: str) -> list[float]:
        return [a / b for a, b in zip(self.seconds[name], self.seconds[base])]


def pick_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def paired_times(
    candidates: Mapping[str, Step], rounds: int, device: torch.device, warmup: int = 1, limit_s: float = 600.0
) -> Times:
    """Time candidates in turns, forwards in one round and backwards in the next.

    On one CPU thread it counts the process's own CPU time, which other processes on the machine disturb less.

    Args:
        limit_s: no new round begins after so many seconds; one round is always made.
    """
    cpu_time = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if cpu_time else time.perf_counter
    for step in candidates.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    names, began = list(candidates), time.perf_counter()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would fall on whoever happens to run
    try:
        for number in range(rounds):
            if number and time.perf_counter() - began > limit_s:
                break
            for name in names if number % 2 == 0 else reversed(names):
                _wait_for(device)
                start = clock()
                candidates[name]()
                _wait_for(device)
                seconds[name].append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return Times(seconds)


def peak_bytes(step: Step, device: torch.device) -> int:
    """Bytes a step needs at its fullest beyond those held before it. On CPU call it in a process of its own
    (`in_fresh_process`): what an earlier step left in the allocator would hide what this one takes."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark of resident memory
    before = _status_bytes("VmRSS")
    step()
    return max(0, _status_bytes("VmHWM") - before)


def in_fresh_process(
    module: str,
    arguments: Sequence[str],
    timeout_s: float = 600.0,
    environment: Mapping[str, str] = _MEMORY_ENVIRONMENT,
) -> str:
    """Run `python -m module arguments`, by default with an allocator that shows its use; returns the last line it
    printed.

    Raises:
        RuntimeError: it failed; carries the end of its error output.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError(f"{module} {' '.join(arguments)}: exit code {done.returncode}: {done.stderr[-500:]}")
    return lines[-1]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: peak memory is measured on Linux only")
