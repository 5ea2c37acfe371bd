"""Shared by all tests."""

from __future__ import annotations

import os

# Before torch: every rank and every thread pool of a test run shares two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
