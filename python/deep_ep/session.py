# SPDX-License-Identifier: MIT
"""The part that both buffers share: a C++ buffer that is opened by all ranks together and closed by each alone."""

import atexit
import weakref
from typing import Any, Callable, Dict, List, Optional, TypeVar

from . import _core
from .errors import invalid, require
from .group import core_group_of, rank_of, size_of
from .topology import core_nodes, node_size

_Result = TypeVar("_Result")

#: More experts than any model has; it costs a few bytes of counters each.
MAX_EXPERTS = 4096

_BY_RANK = _core.SumOrder()
_BY_RANK_AND_NODE = _core.SumOrder(round_per_node=True)

_open_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Worker threads end before the interpreter does.
    for session in list(_open_sessions):
        session.close()


class Session:
    """Owner of one C++ buffer. Closing never communicates; outputs stay valid after it."""

    def __init__(self, group: Any, ranks_per_node: Optional[int], num_workers: int) -> None:
        self._group = group
        self._core: Optional[Any] = None
        self._core_group = core_group_of(group)
        self._rank, self._num_ranks = rank_of(group), size_of(group)
        self._node_size = node_size(self._num_ranks, ranks_per_node)
        self._num_workers = num_workers
        self._config = _core.BufferConfig()
        self._config.max_experts = MAX_EXPERTS
        self._config.ranks_per_node = core_nodes(self._num_ranks, self._node_size)

    @property
    def _num_nodes(self) -> int:
        return -(-self._num_ranks // self._node_size)

    def _open(self) -> None:
        """Collective."""
        self._core = _core.CoreBuffer.open(self._core_group, self._config, self._num_workers)
        _open_sessions.add(self)

    def _opened(self) -> Any:
        if self._core is None:
            raise invalid("the buffer is closed")
        return self._core

    def _rank_order(self) -> Any:
        """Upstream's V1 order of sums: rank by rank, between nodes rounded per node first."""
        return _BY_RANK if self._num_nodes == 1 else _BY_RANK_AND_NODE

    def _checked(self, operation: str, check: Callable[[], _Result]) -> _Result:
        """Runs Python's own checks of a collective call. Where they fail the call counts as made, so that the other
        ranks learn it at once and the group stays usable."""
        core = self._opened()
        try:
            return check()
        except Exception as error:
            core.refuse(operation, str(error))
            raise

    def close(self) -> None:
        """Unmaps the buffer on this rank. May be called twice; tensors that it gave out stay valid."""
        core, self._core = getattr(self, "_core", None), None
        if core is not None:
            core.close()
            _open_sessions.discard(self)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    # Above upstream -------------------------------------------------------------------------------------------------

    def set_masked(self, rank: int, masked: bool = True) -> None:
        """Leaves a rank out of everything, or takes it back. A local decision, which ranks should take together."""
        self._opened().set_masked(rank, masked)

    def masked_ranks(self) -> List[bool]:
        core = self._opened()
        return [core.masked(rank) for rank in range(self._num_ranks)]

    def statistics(self) -> Dict[str, Any]:
        """Counters since the buffer opened: bytes and waits by peer, rows by expert, refusals, memory."""
        return self._opened().statistics()

    def reset_statistics(self) -> None:
        self._opened().reset_statistics()

    def memory_plan(self) -> str:
        """A table of what this buffer maps, and why."""
        return self._config.describe_plan(self._num_ranks)

    def allocate(self, shape: Any, dtype: Any) -> Any:
        """Memory that peers can read: combine takes it without a staging copy."""
        import torch

        return self._opened().allocate(torch.empty(1, dtype=dtype, device="cpu"), list(shape))


def two_biases(bias: Any) -> Any:
    """None, one tensor or two, as two."""
    if bias is None:
        return None, None
    if isinstance(bias, tuple):
        require(len(bias) == 2, f"bias must be a tensor or two: {len(bias)} are given")
        return bias
    return bias, None
