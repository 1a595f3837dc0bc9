# SPDX-License-Identifier: MIT
"""The part that both buffers share: a C++ buffer that is opened by all ranks together and closed by each alone."""

import atexit
import weakref
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar

import torch

from . import _core
from .errors import invalid, require, unsupported
from .group import ThreadRank, core_group_of, rank_of, size_of
from .streams import CudaCall, HostCall
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


def _chosen_device(device: Any) -> torch.device:
    """As asked for; else this process's current GPU, where there is one and the library was built for it; else the CPU."""
    if device is None:
        device = "cuda" if _core.has_cuda() and torch.cuda.is_available() else "cpu"
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    return chosen


class Session:
    """Owner of one C++ buffer, and of a second one where calls on CPU tensors and on CUDA tensors are mixed. Closing never
    communicates; outputs stay valid after it."""

    def __init__(self, group: Any, ranks_per_node: Optional[int], num_workers: int, device: Any = None) -> None:
        self._group = group
        self._core: Optional[Any] = None  # the one of the last call
        self._cores: Dict[str, Any] = {}  # by type of device
        self._stream: Any = None  # of operations on CUDA tensors
        self.in_call = False  # between the two ends of a CudaCall
        self._be_on(_chosen_device(device))
        self._core_group = core_group_of(group)
        self._rank, self._num_ranks = rank_of(group), size_of(group)
        self._node_size = node_size(self._num_ranks, ranks_per_node)
        self._num_workers = num_workers
        self._config = _core.BufferConfig()
        self._config.max_experts = MAX_EXPERTS
        self._config.ranks_per_node = core_nodes(self._num_ranks, self._node_size)

    @property
    def group(self) -> Any:
        """The group that the buffer was made of; None once it is closed."""
        return self._group

    @property
    def _num_nodes(self) -> int:
        return -(-self._num_ranks // self._node_size)

    def _be_on(self, device: torch.device) -> None:
        self._device, self._on_gpu = device, device.type == "cuda"

    def _open(self) -> None:
        """Opens the buffer for `_device`, anew where it was open. Collective."""
        if self._on_gpu and not _core.has_cuda():
            raise unsupported(f"tensors are on {self._device}, but this deep_ep was built without CUDA")
        if self._on_gpu and self._stream is None:
            self._stream = torch.cuda.Stream(self._device, priority=-1)
        device = self._device.index if self._on_gpu else -1
        self._core = _core.CoreBuffer.open(self._core_group, self._config, self._num_workers, device)
        self._cores[self._device.type] = self._core
        _open_sessions.add(self)

    def _reopen(self) -> None:
        """Opens the buffer anew, as `_config` now is; tickets and tensors of the old one keep it alive. Collective."""
        if self._on_gpu:
            # The old one goes first: a GPU may have no room for both.
            self._core = None
            self._cores.pop(self._device.type, None)
        self._open()

    def _opened(self) -> Any:
        """For calls that bring no tensors, or after `_use`. Operations then run on the current stream."""
        if self._core is None:
            raise invalid("the buffer is closed")
        if self._on_gpu and not self.in_call:
            current = torch.cuda.current_stream(self._device).cuda_stream
            self._core.use_streams(current, current)
        return self._core

    def use_streams(self, calls: Any, user: Any) -> None:
        """On a GPU: operations are enqueued on one stream, their results used on the other."""
        self._core.use_streams(calls.cuda_stream, user.cuda_stream)  # type: ignore[union-attr]

    def _use(self, x: torch.Tensor, name: str, operation: str = "") -> Any:
        """The C++ buffer for tensors that are where `x` is, the argument `name` of a collective operation, or of a
        local call. Collective at the first call for its type of device."""
        try:
            on_gpu = x.is_cuda
        except AttributeError:
            error = invalid(f"{name} must be a tensor: it is {type(x).__name__}")
            if operation:
                self._opened().refuse(operation, str(error))
            raise error from None
        if on_gpu != self._on_gpu and (x.is_cpu or on_gpu):
            self._opened()
            self._be_on(x.device)
            self._core = self._cores.get(x.device.type)
            if self._core is None:
                self._open()
        return self._opened()

    def _call(self, operation: str, previous_event: Any, asynchronous: bool, *more_events: Any) -> Any:
        """An operation's way through streams, for a `with` statement, see `streams`. `_use` comes first."""
        events = (previous_event, *more_events)
        if not self._on_gpu:
            return HostCall(events, asynchronous)
        self._checked(operation, self._require_own_stream)
        return CudaCall(self, self._stream, events, asynchronous)

    def _sms(self, num_sms: int) -> Dict[str, int]:
        """On a GPU an operation takes as many SMs at most; on CPUs the buffer's threads, whatever number of SMs was named."""
        return {"num_workers": num_sms} if self._on_gpu else {}

    def _comm_stream(self) -> Any:
        if self._on_gpu:
            return self._stream
        return torch.cpu.current_stream() if hasattr(torch, "cpu") else None

    def _require_own_stream(self) -> None:
        """Threads that share a stream would wait for each other's operations there, and for each other's calls: forever."""
        if isinstance(self._group, ThreadRank) and self._num_ranks > 1:
            current = torch.cuda.current_stream(self._device)
            require(
                current != torch.cuda.default_stream(self._device),
                "ranks that are threads of one process must each have a stream of their own: "
                "with torch.cuda.stream(torch.cuda.Stream()): ...",
            )

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

    @staticmethod
    def _combine_rows_home(
        core: Any, x: Any, handle: Any, topk_weights: Optional[torch.Tensor], biases: Any, **how: Any
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The high-throughput combine of both APIs: (rows, weights)"""
        weights = None if topk_weights is None else topk_weights.contiguous()
        return core.combine(x=x, handle=handle, topk_weights=weights, bias_0=biases[0], bias_1=biases[1], **how)

    def close(self) -> None:
        """Unmaps the buffer on this rank. May be called twice; tensors that it gave out stay valid."""
        self._core = None
        cores, self._cores = self.__dict__.get("_cores", {}), {}
        for core in cores.values():
            core.close()
        if cores:
            _open_sessions.discard(self)
        # gloo's threads end with the last reference to their group, and should do so before the interpreter does.
        self._group = self._core_group = None

    def __repr__(self) -> str:
        state = "" if self.__dict__.get("_core") is not None else ", closed"
        where = (
            f"rank {self._rank} of {self._num_ranks} on {self._device}" if "_num_ranks" in self.__dict__ else "not made"
        )
        return f"<{type(self).__module__}.{type(self).__name__}: {where}{state}>"

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        """Closes; where nothing was raised yet, raises what enqueued calls found out and nobody has asked for."""
        try:
            for core in self._cores.values() if kind is None else ():
                core.check()
        finally:
            self.close()

    def __del__(self) -> None:
        self.close()

    # Above upstream -------------------------------------------------------------------------------------------------

    def set_masked(self, rank: int, masked: bool = True) -> None:
        """Leaves a rank out of everything, or takes it back. A local decision, which ranks should take together."""
        self._opened()
        for core in self._cores.values():
            core.set_masked(rank, masked)

    def masked_ranks(self) -> List[bool]:
        """Which ranks are left out."""
        core = self._opened()
        return [core.masked(rank) for rank in range(self._num_ranks)]

    def statistics(self) -> Dict[str, Any]:
        """Counters since the buffer opened: bytes and waits by peer, rows by expert, refusals, memory."""
        return self._opened().statistics()

    def check(self) -> None:
        """Waits for all enqueued operations and raises what they found out. Without it, the next call raises that."""
        self._opened().check()

    def reset_statistics(self) -> None:
        """Lets all counters begin anew."""
        self._opened().reset_statistics()

    def memory_plan(self) -> str:
        """A table of what this buffer maps, and why."""
        return self._config.describe_plan(self._num_ranks)

    def allocate(self, shape: Any, dtype: Any) -> Any:
        """Memory that peers can read: combine takes it without a staging copy."""
        return self._opened().allocate(torch.empty(1, dtype=dtype, device="cpu"), list(shape))


def two_biases(bias: Any) -> Any:
    """None, one tensor or two, as two."""
    if bias is None:
        return None, None
    if isinstance(bias, (tuple, list)):
        require(len(bias) == 2, f"bias must be a tensor or two: {len(bias)} are given")
        return tuple(bias)
    return bias, None
