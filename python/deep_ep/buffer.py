# SPDX-License-Identifier: MIT
"""`Buffer`, the first generation of DeepEP's API."""

import os
from typing import Any, Optional, Tuple

import torch

from .config import COMBINE_CONFIGS, DISPATCH_CONFIGS, NUM_TICKETS, Config, low_latency_size_hint
from .errors import require
from .event import EventHandle, EventOverlap
from .group import chosen_group
from .low_latency import LowLatencyMode
from .normal import NormalMode
from .runtime import Runtime
from .session import two_biases


class Buffer(NormalMode, LowLatencyMode):
    """One rank's end of a group that exchanges tokens: high-throughput `dispatch` and `combine`, and their low-latency
    forms. Construction is collective. Keyword-only arguments are ours; all others are DeepEP's, of its last V1 and of V2's
    legacy buffer alike."""

    num_sms: int = 20

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        *positional: bool,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        ranks_per_node: Optional[int] = None,
        arena_bytes: int = 0,
        timeout_secs: float = 100.0,
        num_workers: int = 0,
        device: Any = None,
    ) -> None:
        # The last V1 had use_fabric before explicitly_destroy; positionally we read that order.
        in_order = ("use_fabric", "explicitly_destroy", "enable_shrink", "comm")
        if len(positional) > len(in_order):
            raise TypeError(f"Buffer() takes at most {7 + len(in_order)} positional arguments: {7 + len(positional)}")
        given = dict(zip(in_order, positional))
        use_fabric = given.get("use_fabric", use_fabric)
        explicitly_destroy = given.get("explicitly_destroy", explicitly_destroy)
        enable_shrink = given.get("enable_shrink", enable_shrink)
        comm = given.get("comm", comm)
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            require(value >= 0 and value % 128 == 0, f"{name} must be a multiple of 128: {value}")
        super().__init__(chosen_group(group, comm), ranks_per_node, num_workers, device)
        self.rank, self.group_size = self._rank, self._num_ranks
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.num_qps_per_rank = num_qps_per_rank
        self.explicitly_destroy, self.enable_shrink = explicitly_destroy, enable_shrink
        self.use_fabric = use_fabric or allow_mnnvl
        if low_latency_mode or self._num_nodes > 1:
            self.nvshmem_qp_depth = int(os.environ.get("NVSHMEM_QP_DEPTH", "1024"))
        self._config.arena_bytes = arena_bytes
        self._config.timeout_secs = timeout_secs
        self._config.num_tickets = NUM_TICKETS
        self._plan_low_latency(num_rdma_bytes if low_latency_mode else 0)
        self._open()
        self.runtime: Optional[Runtime] = Runtime(self)

    def close(self) -> None:
        self.runtime = None
        super().close()

    def destroy(self) -> None:
        """Ends the buffer; allowed where it was made with `explicitly_destroy`. May be called twice."""
        assert self.explicitly_destroy, "destroy() is for buffers made with explicitly_destroy=True"
        self.close()

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: FP8 rows are supported."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets `Buffer.num_sms`, an even number: of the recommended configs, and of SMs that a call on a GPU takes."""
        assert new_num_sms % 2 == 0, "the number of SMs must be even"
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event on the current stream, now."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """`num_rdma_bytes` of a buffer for low-latency calls of that size."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The recommended one; for numbers of ranks that DeepEP knows."""
        assert num_ranks in DISPATCH_CONFIGS, f"there is no recommended dispatch config for {num_ranks} ranks"
        return Config(Buffer.num_sms, *DISPATCH_CONFIGS[num_ranks])

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The recommended one; for numbers of ranks that DeepEP knows."""
        assert num_ranks in COMBINE_CONFIGS, f"there is no recommended combine config for {num_ranks} ranks"
        return Config(Buffer.num_sms, *COMBINE_CONFIGS[num_ranks])

    def get_comm_stream(self) -> Any:
        """The stream that operations run on: on CPUs they run in the call itself."""
        return self._comm_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Optional[torch.Size] = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """A view of this rank's scratch memory of num_nvl_bytes or num_rdma_bytes; `offset` counts bytes. Operations do
        not use that memory."""
        raw = self._scratch(use_rdma_buffer)
        require(0 <= offset <= raw.numel(), f"offset must be 0 .. {raw.numel()} bytes: {offset}")
        item = torch.empty((), dtype=dtype, device="cpu").element_size()
        count = (raw.numel() - offset) // item
        whole = raw[offset : offset + count * item].view(dtype)
        if size is None:
            return whole
        assert whole.numel() >= size.numel(), f"{size} needs more than the {whole.numel()} items that are there"
        return whole[: size.numel()].view(size)

    def _scratch(self, use_rdma_buffer: bool) -> torch.Tensor:
        scratch = self.__dict__.setdefault("_scratch_memory", {})
        if use_rdma_buffer not in scratch:
            size = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            scratch[use_rdma_buffer] = torch.empty(size, dtype=torch.uint8, device=self._device)
        return scratch[use_rdma_buffer]

    @staticmethod
    def _unpack_bias(bias: Any) -> Tuple[Optional[torch.Tensor], Optional[torch.Tensor]]:
        return two_biases(bias)
