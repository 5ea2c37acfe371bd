"""What all benchmarks share: their arguments, the machine they ran on, a table or one JSON object."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.timing import pick_device

Figure = float | int | str | bool | None
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def make_parser(module: str, question: str, example: str) -> argparse.ArgumentParser:
    """Arguments every benchmark understands."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=question, epilog=f"example: {example}"
    )
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: under a minute on two cores")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice, or OMP_NUM_THREADS)")
    parser.add_argument("--rounds", type=int, help="how often each candidate is timed")
    parser.add_argument(
        "--onednn",
        action="store_true",
        help="float32 products through oneDNN instead of MKL, for every candidate (on a CPU with AMX that is bf16)",
    )
    parser.add_argument(
        "--keep-freed",
        action="store_true",
        help="let glibc keep freed memory, for every candidate: fewer page faults, steadier times on CPU",
    )
    # The tests' size: seconds, and of no use as a measurement.
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    return parser


def set_up(parsed: argparse.Namespace) -> torch.device:
    """Apply the shared arguments to torch; returns the device to measure on."""
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    if parsed.onednn:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    if parsed.keep_freed:
        _keep_freed_memory()
    return pick_device()


def _keep_freed_memory() -> None:
    """glibc maps blocks from 128 KiB to 32 MiB on anew each time, and each of their pages costs a fault when first
    touched; without mmap and trimming a step finds the pages of the step before."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not in musl
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never


def size_of(parsed: argparse.Namespace) -> str:
    return "smoke" if parsed.smoke else "quick" if parsed.quick else "full"


def repeated(parsed: argparse.Namespace) -> list[str]:
    """The shared arguments as a child process must get them."""
    flags = [f"--{name}" for name in ("quick", "onednn", "smoke") if getattr(parsed, name)]
    return [*flags, *(["--threads", str(parsed.threads)] if parsed.threads else [])]


@dataclass(frozen=True)
class Report:
    """Rows of figures, and under which conditions they came about."""

    benchmark: str
    size: str
    machine: dict[str, Figure]
    rows: list[dict[str, Figure]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def print(self, as_json: bool, columns: Mapping[str, str]) -> None:
        """
        Args:
            columns: key of a row -> head of its column; keys not named appear in the JSON only.
        """
        if as_json:
            print(json.dumps(asdict(self)))
            return
        console = Console()
        if not console.is_terminal:
            console.width = 160  # a log file has no edge
        table = Table(title=f"{self.benchmark} ({self.size})")
        for key, head in columns.items():
            table.add_column(head, justify="left" if key in ("case", "candidate", "note") else "right")
        previous: Figure = None
        for row in self.rows:
            case = row.get("case")
            if previous not in (None, case):
                table.add_section()
            shown = row if case != previous else row | {"case": ""}
            previous = case
            table.add_row(*(_shown(shown.get(key)) for key in columns))
        console.print(table)
        for note in self.notes:
            console.print(note, highlight=False)
        console.print("; ".join(f"{k} {v}" for k, v in self.machine.items() if v is not None), highlight=False)


def machine_facts(device: torch.device, parsed: argparse.Namespace) -> dict[str, Figure]:
    """What a reader must know to judge the figures."""
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1
    settings = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")]
    allocator = " ".join(settings + ["keeps freed memory"] * parsed.keep_freed)
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({_cpu_name()})",
        "threads": torch.get_num_threads(),
        "clock": "process CPU time" if one_thread else "wall time",
        "float32_products": "oneDNN" if parsed.onednn else "default",
        "malloc": allocator or None,
    }


@contextlib.contextmanager
def output_kept_clean() -> Iterator[None]:
    """Send what libraries print to standard error, where it does not spoil the JSON, and silence their warnings. By
    descriptor: some have taken hold of standard output, or print from C++."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def megabytes(count: float) -> float:
    return round(count / 2**20, 1)


def rounds_for(parsed: argparse.Namespace, by_size: Mapping[str, int]) -> int:
    return int(parsed.rounds or by_size[size_of(parsed)])


def chosen(parsed_value: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    return list(parsed_value or default)


def _shown(figure: Figure) -> str:
    if figure is None:
        return ""
    if isinstance(figure, bool):
        return "yes" if figure else "no"
    if isinstance(figure, float):
        return (
            f"{figure:.1e}" if figure and abs(figure) < 1e-3 else f"{figure:,.3g}" if figure < 100 else f"{figure:,.0f}"
        )
    return str(figure)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"
