"""Ways in which a checkpoint goes bad on a disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def spoil(folder: Path, number: int, random: np.random.Generator) -> str:
    """Damage one file of a checkpoint: of ten times, seven a flipped bit, two a cut, one a missing file. Every other
    time in the manifest or near a file's begin, where heads are, as most bytes are data. Returns what was done."""
    files = sorted(path for path in folder.iterdir())
    path = folder / "manifest.json" if number % 4 == 0 else files[int(random.integers(len(files)))]
    data = bytearray(path.read_bytes())
    kind = number % 10
    if kind < 7:
        place = int(random.integers(len(data) if number % 2 else min(len(data), 600)))
        data[place] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        return f"{path.name}: bit of byte {place} of {len(data)}"
    if kind < 9:
        size = int(random.integers(len(data)))
        path.write_bytes(data[:size])
        return f"{path.name}: cut from {len(data)} to {size} bytes"
    path.unlink()
    return f"{path.name}: removed"
