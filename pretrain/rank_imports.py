"""What the fork server of `pretrain.local_ranks` imports once, so that its ranks need not."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # a fork after a second OpenMP thread would hang
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these ranks share the CPU, whatever else is there

import torch

torch.set_num_threads(1)

import pretrain.loop  # noqa: E402
import pretrain.parity_ranks  # noqa: E402, F401
