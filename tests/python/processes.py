# SPDX-License-Identifier: MIT
"""Ranks as processes of this machine, which are a torch.distributed group."""

import os
import socket
import sys
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing
from deep_ep.utils.envs import launch

RANKS = 4


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def spawn(
    body: Callable[[int], Any], ranks: int = RANKS, *, device: str = "cpu", preload: Sequence[str] = ()
) -> None:
    """body(rank) in so many processes: a gloo group, or with the device "cuda" an NCCL group with a GPU for each rank.
    The first call imports the modules of `preload` once for all processes, its own and those of later calls."""
    # The process that ranks are copies of must not touch a GPU, not even by an import that asks whether there is one.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    # It has to find the modules, but Python 3.11 does not give it this process's sys.path.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    torch.multiprocessing.set_forkserver_preload([*preload, "deep_ep", "torch._dynamo"])
    launch(_start, ranks, body, ranks, free_port(), device)


def _start(rank: int, body: Callable[[int], Any], ranks: int, port: int, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    body(rank)
    dist.barrier()
    dist.destroy_process_group()
