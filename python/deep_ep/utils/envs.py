# SPDX-License-Identifier: MIT
"""Start-up of test programs: process groups, seeds, printing in turn, what the links give."""

import os
import random
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.distributed as dist
import torch.multiprocessing

from .. import _core
from ..topology import get_logical_domain_size, get_physical_domain_size

__all__ = [
    "all_gather",
    "check_fast_rdma_atomic_support",
    "check_nvlink_connections",
    "check_torch_deterministic",
    "device",
    "dist_print",
    "get_global_seed",
    "get_local_seed",
    "get_logical_domain_size",
    "get_nvlink_gbs",
    "get_physical_domain_size",
    "get_rdma_gbs",
    "init_dist",
    "init_seed",
    "launch",
    "settle",
    "take_device",
]

_seeds = {"global": 0, "local": 0}


def device() -> torch.device:
    """Where tests make their tensors: as EP_TEST_DEVICE says, else on GPUs where there are some, else on the CPU."""
    on_gpu = _core.has_cuda() and torch.cuda.is_available()
    return torch.device(os.environ.get("EP_TEST_DEVICE") or ("cuda" if on_gpu else "cpu"))


def settle() -> None:
    """Before a look at the clock: what was enqueued on this process's GPU is done."""
    if device().type == "cuda":
        torch.cuda.synchronize()


def all_gather(tensor: torch.Tensor, group: Any) -> List[torch.Tensor]:
    """Every rank's tensor; gloo gathers on the CPU only."""
    moved = tensor.cpu() if dist.get_backend(group) == "gloo" else tensor
    everyone = [torch.empty_like(moved) for _ in range(group.size())]
    dist.all_gather(everyone, moved, group=group)
    return [each.to(tensor.device) for each in everyone]


def launch(run: Callable[..., None], num_processes: int, *arguments: Any) -> None:
    """Runs run(number, *arguments) in so many processes of this machine. torch is imported once, by the process that they
    are copies of; that one touches no GPU."""
    torch.multiprocessing.start_processes(run, args=arguments, nprocs=num_processes, start_method="forkserver")


def take_device(local_rank: int, num_local_ranks: int) -> str:
    """Chooses this process's GPU, where there are any, and says which backend torch.distributed should have: a GPU of its
    own for each rank where there are enough, else ranks share them, slowly, because processes take turns on a GPU."""
    if device().type != "cuda":
        return "gloo"
    torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return "nccl" if num_local_ranks <= torch.cuda.device_count() else "gloo"


def init_dist(local_rank: int, num_local_ranks: int, seed: int = 0) -> Tuple[int, int, Any]:
    """(rank, ranks, group). As torch.multiprocessing.spawn starts it: WORLD_SIZE counts nodes and RANK is this node.
    bfloat16 becomes the default dtype, and `device()` the default device, see `take_device`."""
    nodes, node = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "8361"))
    world = nodes * num_local_ranks
    dist.init_process_group(
        take_device(local_rank, num_local_ranks),
        init_method=f"tcp://{address}:{port}",
        world_size=world,
        rank=node * num_local_ranks + local_rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    torch.set_default_device(device())
    init_seed(seed)
    return dist.get_rank(), dist.get_world_size(), dist.new_group(list(range(world)))


def init_seed(seed: int) -> None:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    _seeds["global"], _seeds["local"] = seed, seed + rank
    torch.manual_seed(seed + rank)
    random.seed(seed + rank)


def get_global_seed() -> int:
    return _seeds["global"]


def get_local_seed() -> int:
    return _seeds["local"]


def dist_print(s: str = "", once_in_node: bool = False) -> None:
    """Prints, then waits for all ranks. `once_in_node`: only the first rank of a node prints."""
    size = int(os.environ.get("EP_NODE_SIZE", "8"))
    if not once_in_node or dist.get_rank() % size == 0:
        print(s, flush=True)
    dist.barrier()


def get_rdma_gbs(nic: Optional[str] = None) -> float:
    """GB/s of a network card as sysfs says it, 0 where there is none."""
    name = nic or os.environ.get("EP_NIC_NAME", "mlx5_0")
    try:
        with open(f"/sys/class/infiniband/{name}/ports/1/rate", encoding="ascii") as rate:
            return float(rate.read().split()[0]) / 8
    except (OSError, ValueError, IndexError):
        return 0.0


def get_nvlink_gbs(factor: float = 0.9) -> float:
    """GB/s of this GPU's NVLinks together, 0 where there are none."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return 0.0
    listed = subprocess.run(["nvidia-smi", "nvlink", "-s", "-i", "0"], capture_output=True, text=True, check=False)
    speeds = [line.split(":")[1].split()[0] for line in listed.stdout.splitlines() if "GB/s" in line]
    return factor * sum(float(speed) for speed in speeds)


def check_nvlink_connections(group: Any) -> None:
    """Nothing to check on CPUs: ranks of one machine reach each other's memory."""


def check_torch_deterministic() -> bool:
    """Whether torch fills uninitialised memory, which upstream refuses; here it only costs time."""
    fills = getattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    return torch.are_deterministic_algorithms_enabled() and fills


def check_fast_rdma_atomic_support() -> bool:
    return False
