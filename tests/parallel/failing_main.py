"""pretrain/main.py with a fault: FAULT (raise, memory, kill, freeze or hang) strikes rank FAULT_RANK in step three."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as main does, before torch is loaded

from pretrain import loop, main  # noqa: E402

original = loop.next_micro_batches


def next_micro_batches(run: Any) -> Any:
    if run.state.step == 2 and os.environ["RANK"] == os.environ["FAULT_RANK"]:
        fault = os.environ["FAULT"]
        if fault == "raise":
            raise ZeroDivisionError("a fault of this rank's own")
        if fault == "memory":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(3600)
    return original(run)


loop.next_micro_batches = next_micro_batches
main.leave(main.main())
