"""What the fork server of `pretrain.local_ranks` imports once, so that its ranks need not."""

import contextlib
import gc
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # a fork after a second OpenMP thread would hang
# These ranks share the CPU, whatever else is there; and deepspeed need not look for it, and say so.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import torch

torch.set_num_threads(1)

with contextlib.redirect_stdout(sys.stderr):  # deepspeed binds its log to stdout otherwise, into --json
    import parallel.late_imports
    import pretrain.loop
    import pretrain.parity_ranks

gc.freeze()  # deepspeed collects garbage eight times an engine; what was imported here is none
