"""How fast is the way from raw text to shards, and what bounds it?

tokenize  the tokenize stage (read, check, encode, shuffle, write shards) a core, against the tokenizer alone,
          Megatron-LM's way and datatrove's step, on the same lines with the same vocabulary, one process each
stages    every stage at three sizes of the corpus, on all workers: is the cost linear, which stage bounds?
memory    the fullest worker of a whole preparation at three sizes
start     from a data section to the first batch of a data set of a billion tokens (a sparse file)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import data_prep_corpus as corpus
from benchmarks.data_prep_peers import DataTrove, Megatron, Ours, Raw
from benchmarks.report import Figure, Report, machine_facts, make_parser, output_kept_clean, rounds_for, set_up, size_of
from benchmarks.timing import in_fresh_process, paired_times

CASES = ("tokenize", "stages", "memory", "start")
BYTES = {"smoke": 400_000, "quick": 6_000_000, "full": 30_000_000}
VOCABULARY = {"smoke": 1_000, "quick": 8_000, "full": 32_000}
SCALES = {"smoke": (1,), "quick": (1, 3, 7), "full": (1, 3, 7)}  # copies, besides the curated one
TOKENS = {"smoke": 4_000_000, "quick": 1_000_000_000, "full": 1_000_000_000}
COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "mb": "MB",
    "seconds": "s",
    "mb_per_s": "MB/s",
    "ratio": "x raw tokenizer",
    "peak_mb": "peak MB a worker",
    "note": "note",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = make_parser("data_prep", __doc__ or "", "python -m benchmarks.data_prep --threads 1 --quick")
    parser.add_argument("--case", action="append", choices=CASES, help="default: all")
    parser.add_argument("--workers", type=int, default=2, help="processes of the cases stages and memory")
    parsed = parser.parse_args(arguments)
    device = set_up(parsed)
    report = Report("data_prep", size_of(parsed), machine_facts(device, parsed))
    with output_kept_clean(), tempfile.TemporaryDirectory() as folder:
        for case in parsed.case or CASES:
            rows = {"tokenize": tokenize_rows, "stages": stage_rows, "memory": memory_rows, "start": start_rows}[case]
            report.rows.extend(rows(parsed, Path(folder)))
    report.notes.append(
        "MB are of UTF-8 text. tokenize: CPU seconds of one process where --threads 1, else wall time; Megatron's way "
        "neither shuffles nor checks nor keeps where a document came from. datatrove takes no SentencePiece file."
    )
    report.print(parsed.json, COLUMNS)


def tokenize_rows(parsed: argparse.Namespace, folder: Path) -> list[dict[str, Figure]]:
    """One row a candidate and algorithm."""
    size, rows = size_of(parsed), []
    for algorithm in ("unigram", "bpe"):
        lines = corpus.write_lines(folder / "lines.jsonl", BYTES[size])
        ours = Ours(lines, folder / algorithm, algorithm, VOCABULARY[size])
        peers = [ours, Raw(ours), Megatron(ours), DataTrove(ours)]
        ready = {peer.name: peer for peer in peers if peer.unfit is None}
        times = paired_times(
            {name: peer.step for name, peer in ready.items()},
            rounds_for(parsed, {"smoke": 1, "quick": 3, "full": 5}),
            set_up(parsed),
        )
        megabytes = ours.text_bytes / 1e6
        for peer in peers:
            row: dict[str, Figure] = {"case": f"tokenize, {algorithm} {VOCABULARY[size]:,}", "candidate": peer.name}
            if peer.name in ready:
                seconds = times.median(peer.name)
                row |= {"mb": megabytes, "seconds": seconds, "mb_per_s": megabytes / seconds, "note": peer.note()}
                row["ratio"] = times.ratio(Raw.name, peer.name)
            else:
                row["note"] = f"did not run: {peer.unfit}"
            rows.append(row)
    return rows


def stage_rows(parsed: argparse.Namespace, folder: Path) -> list[dict[str, Figure]]:
    """One row a stage and size."""
    size, rows = size_of(parsed), []
    for scale in SCALES[size]:
        megabytes, seconds, _ = _whole(parsed, folder, scale)
        for stage, took in seconds.items():
            row: dict[str, Figure] = {"case": f"stages, {parsed.workers} workers", "candidate": stage}
            rows.append(row | {"mb": megabytes, "seconds": took, "mb_per_s": megabytes / max(took, 1e-9)})
    return sorted(rows, key=lambda row: str(row["candidate"]))


def memory_rows(parsed: argparse.Namespace, folder: Path) -> list[dict[str, Figure]]:
    """One row a size."""
    rows: list[dict[str, Figure]] = []
    for scale in SCALES[size_of(parsed)]:
        megabytes, seconds, peak = _whole(parsed, folder, scale)
        row: dict[str, Figure] = {"case": f"memory, {parsed.workers} workers", "candidate": "all stages"}
        rows.append(row | {"mb": megabytes, "seconds": sum(seconds.values()), "peak_mb": peak / 2**20})
    return rows


def _whole(parsed: argparse.Namespace, folder: Path, scale: int) -> tuple[float, dict[str, float], int]:
    """MB, seconds of each stage, peak bytes of the fullest worker of one whole preparation; done once a scale."""
    kept = folder / f"whole-{scale}.json"
    if not kept.exists():
        size = size_of(parsed)
        lines = corpus.write_lines(folder / f"lines-{scale}.jsonl", BYTES[size], copies=scale)
        curated = corpus.write_lines(folder / "curated.jsonl", BYTES[size], first=25)
        vocabulary, output = max(500, VOCABULARY[size] // 4), folder / f"whole-{scale}"
        arguments = ["prepare", str(lines), str(curated), str(output), str(vocabulary), str(parsed.workers)]
        kept.write_text(in_fresh_process("benchmarks.data_prep_corpus", arguments, 3000, environment={}))
    found = json.loads(kept.read_text())
    return found["text_bytes"] / 1e6, found["seconds"], found["peak_bytes"]


def start_rows(parsed: argparse.Namespace, folder: Path) -> list[dict[str, Figure]]:
    """One row: opening, and the first batch of 512 sequences of 1,024 tokens."""
    tokens = TOKENS[size_of(parsed)]
    dataset = corpus.write_sparse(folder / "sparse", tokens)
    found = json.loads(in_fresh_process("benchmarks.data_prep_corpus", ["start", str(dataset)], environment={}))
    note = f"imports {found['imports']:.2f} s before it"
    return [{"case": "start", "candidate": f"{tokens:,} tokens", "seconds": found["seconds"], "note": note}]


if __name__ == "__main__":
    main()
