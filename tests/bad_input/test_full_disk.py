"""A run folder's disk that takes no more, as `/dev/full` plays it. On a real one: `python -m benchmarks.faults`."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import DiskRefused
from pretrain.metrics import Metrics


def test_a_record_that_finds_no_room(tmp_path: Path) -> None:
    """Told as what it is, not as the trace of whatever could not be closed after it."""
    with pytest.raises(DiskRefused, match="No space left on device") as told, Metrics(tmp_path, 0, 10) as metrics:
        metrics._file.close()
        metrics._file = Path("/dev/full").open("w")  # noqa: SIM115 - the block closes it
        metrics.write("train", 1, {"loss": 1.0})
    assert "metrics.jsonl" in told.value.found and "free space" in told.value.remedy and told.value.cause == "disk"
