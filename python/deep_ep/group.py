# SPDX-License-Identifier: MIT
"""Groups of ranks: a torch process group of any backend, an mpi4py communicator, or threads of this process."""

import pickle
from typing import Any, Callable, List, Optional

import torch
import torch.distributed as dist

from . import _core
from .errors import unsupported


class ThreadRank:
    """One rank of a group whose ranks are threads of this process; made by `in_process_group`."""

    def __init__(self, core_group: Any) -> None:
        self.core_group = core_group

    def rank(self) -> int:
        return self.core_group.rank

    def size(self) -> int:
        return self.core_group.num_ranks

    def all_gather_object(self, mine: Any, timeout_secs: float = 60.0) -> List[Any]:
        return [pickle.loads(each) for each in self.core_group.all_gather(pickle.dumps(mine), timeout_secs)]

    def barrier(self) -> None:
        self.all_gather_object(None)


def in_process_group(num_ranks: int) -> List[ThreadRank]:
    """Entry r is the group for rank r's thread."""
    return [ThreadRank(each) for each in _core.in_process_group(num_ranks)]


def group_from_environment() -> ThreadRank:
    """The ranks that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE name, over TCP and without torch.distributed."""
    return ThreadRank(_core.tcp_group_from_environment())


def _number(group: Any, name: str) -> int:
    value = getattr(group, name)
    return int(value() if callable(value) else value)


def rank_of(group: Any) -> int:
    return group.Get_rank() if hasattr(group, "Get_rank") else _number(group, "rank")


def size_of(group: Any) -> int:
    return group.Get_size() if hasattr(group, "Get_size") else _number(group, "size")


def all_gather_object(group: Any, mine: Any) -> List[Any]:
    """Every rank's object, in rank order. Collective."""
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        gathered: List[Any] = [None] * group.size()
        dist.all_gather_object(gathered, mine, group=group)
        return gathered
    if hasattr(group, "all_gather_object"):
        return group.all_gather_object(mine)
    return group.allgather(mine)


_PIPELINE_TAG = 0x0DEE


def _bytes_of(tensor: torch.Tensor) -> Any:
    return tensor.view(-1).view(torch.uint8).numpy()


def send(group: Any, tensor: torch.Tensor, peer: int) -> Callable[[], Any]:
    """Begins to send to a rank of the group, in order; the result waits until the tensor is free. Not collective."""
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        work = dist.isend(tensor, dist.get_global_rank(group, peer), group=group)
        assert work is not None
        return work.wait
    if hasattr(group, "Isend"):
        return group.Isend(_bytes_of(tensor), dest=peer, tag=_PIPELINE_TAG).Wait
    raise unsupported(f"sends need a torch process group or an MPI communicator: {type(group).__name__}")


def receive(group: Any, tensor: torch.Tensor, peer: int) -> None:
    """Waits for what `send` sent here."""
    if dist.is_available() and isinstance(group, dist.ProcessGroup):
        dist.recv(tensor, dist.get_global_rank(group, peer), group=group)
    elif hasattr(group, "Recv"):
        group.Recv(_bytes_of(tensor), source=peer, tag=_PIPELINE_TAG)
    else:
        raise unsupported(f"receives need a torch process group or an MPI communicator: {type(group).__name__}")


def barrier(group: Any) -> None:
    all_gather_object(group, None)


def core_group_of(group: Any) -> Any:
    """The group as the C++ library takes it."""
    if isinstance(group, ThreadRank):
        return group.core_group
    return _core.callback_group(rank_of(group), size_of(group), lambda mine: all_gather_object(group, mine))


def chosen_group(group: Optional[Any], comm: Optional[Any]) -> Any:
    if group is None and comm is None:
        raise ValueError("either `group` or `comm` must be given")
    return comm if group is None else group
