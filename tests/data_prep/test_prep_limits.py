"""What a machine allows a process: open files and memory do not grow with the number of units, shards or documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from configs.corpus import CorpusConfig
from data_prep.format import ShardWriter, TokenStream
from data_prep.manifest import write_manifest
from data_prep.pipeline import prepare
from tests.data_prep.mixed import mixed_config, mixed_sources

ROOT = Path(__file__).resolve().parents[2]
LIMITED = """
import resource, sys
from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
    summary = prepare(CorpusConfig.load(sys.argv[1]))
    print(len(list(summary.output.glob("train/*/*.bin"))))
"""


def run_limited(config: Path, open_files: int) -> int:
    """Shards made by a preparation in a process of its own that may have so many files open."""
    script = config.with_name("run.py")
    script.write_text(LIMITED)
    done = subprocess.run(
        [sys.executable, str(script), str(config), str(open_files)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_more_units_and_shards_than_open_files(tmp_path: Path) -> None:
    mixed_sources(tmp_path / "in")
    changes = {"unit_bytes": 5_000, "shard_tokens": 2_000, "quality": None}
    config = mixed_config(tmp_path / "in", tmp_path / "out", **changes)
    (tmp_path / "config.yaml").write_text(config.dump())
    assert run_limited(tmp_path / "config.yaml", 60) > 60


def test_a_unit_of_short_documents_is_cut_by_what_they_cost(tmp_path: Path) -> None:
    """A document of 30 bytes takes some hundreds in a worker, whatever the size of its file says."""
    (tmp_path / "short.jsonl").write_text("".join(f'{{"text": "number {n}"}}\n' for n in range(400_000)))
    tree = {
        "output": str(tmp_path / "out"),
        "sources": [{"kind": "jsonl", "name": "short", "path": str(tmp_path / "short.jsonl")}],
        "workers": 1,
    }
    assert prepare(CorpusConfig.check(tree, "test"), until="read") is None
    units = [json.loads(path.read_text()) for path in sorted((tmp_path / "out/work/read").glob("*.unit.json"))]
    assert len(units) == 2 and units[0]["take"] == units[1]["skip"] == units[1]["first_record"] > 200_000


def test_a_stream_reads_more_shards_than_it_keeps_open(tmp_path: Path) -> None:
    shards = []
    for index in range(300):
        with ShardWriter(tmp_path, index, 1_000) as writer:
            writer.add_document(np.array([index, 999]), 1)
            shards.append(writer.close())
    write_manifest(tmp_path, name="many", vocab_size=1_000, eos_id=999, tokenizer_sha256="", tokenizer=".",
                   shards=shards, sources=["x"])  # fmt: skip
    before = len(os.listdir("/proc/self/fd"))
    stream = TokenStream(tmp_path)
    assert stream.read(0, 600)[::2].tolist() == list(range(300))
    assert [int(stream.read(2 * index, 1)[0]) for index in (0, 299, 7, 0)] == [0, 299, 7, 0]
    assert len(os.listdir("/proc/self/fd")) - before <= 128
