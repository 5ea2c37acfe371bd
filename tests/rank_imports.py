"""What the fork server imports once for all ranks of all tests."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a fork after a second OpenMP thread would hang

import torch

torch.set_num_threads(1)

import pretrain.build  # noqa: E402
import pretrain.loop  # noqa: E402, F401
