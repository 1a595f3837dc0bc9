# SPDX-License-Identifier: MIT
"""Ranks share the machine's cores; torch's own threads would only fight over them. Where they share a GPU, a kernel of
torch's that is loaded only when it is needed would wait for the kernels of ranks that wait for its caller."""

import os

os.environ.setdefault("CUDA_MODULE_LOADING", "EAGER")
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import torch  # noqa: E402

torch.set_num_threads(1)
