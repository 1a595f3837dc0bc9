# SPDX-License-Identifier: MIT
"""`Config`, the recommended ones, and the sizes that DeepEP's V1 asks for. Our buffers need less: their slots are sized by
what is sent, and their queues do not exist; the hints are upstream's, raised where we need more."""

from typing import Any, Dict, Tuple

from . import _core
from .errors import require

_TOPK_IDX_BYTES = 8
_MAX_TOPK = 128
_MAX_SCALES = 128
_LANES = 8  # ranks of a node in upstream's formulas


def align(value: int, to: int) -> int:
    return -(-value // to) * to


class Config:
    """Tuning of upstream's queues. Here it fixes the number of channels in handles, num_sms / 2; the rest is checked
    and kept."""

    def __init__(
        self,
        num_sms: int = 20,
        num_max_nvl_chunked_send_tokens: int = 6,
        num_max_nvl_chunked_recv_tokens: int = 256,
        num_max_rdma_chunked_send_tokens: int = 6,
        num_max_rdma_chunked_recv_tokens: int = 256,
    ) -> None:
        nvl_send, nvl_recv = num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens
        rdma_send, rdma_recv = num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens
        require(num_sms >= 0, f"num_sms must not be negative: {num_sms}")
        require(
            0 < nvl_send < nvl_recv,
            f"num_max_nvl_chunked_send_tokens must be 1 .. num_max_nvl_chunked_recv_tokens - 1: {nvl_send}, {nvl_recv}",
        )
        require(rdma_send > 0 and rdma_recv > 0, f"chunks of RDMA tokens must be positive: {rdma_send}, {rdma_recv}")
        rdma_recv = align(rdma_recv, rdma_send)
        require(
            2 * rdma_send <= rdma_recv,
            f"num_max_rdma_chunked_send_tokens must be at most half of num_max_rdma_chunked_recv_tokens: "
            f"{rdma_send}, {rdma_recv}",
        )
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = nvl_send
        self.num_max_nvl_chunked_recv_tokens = nvl_recv
        self.num_max_rdma_chunked_send_tokens = rdma_send
        self.num_max_rdma_chunked_recv_tokens = rdma_recv

    @property
    def num_channels(self) -> int:
        return self.num_sms // 2

    def __repr__(self) -> str:
        return (
            f"Config({self.num_sms}, {self.num_max_nvl_chunked_send_tokens}, {self.num_max_nvl_chunked_recv_tokens}, "
            f"{self.num_max_rdma_chunked_send_tokens}, {self.num_max_rdma_chunked_recv_tokens})"
        )

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Upstream's `num_nvl_bytes` for rows of so many bytes."""
        require(
            num_ranks < _LANES or num_ranks % _LANES == 0, f"num_ranks must be below or a multiple of 8: {num_ranks}"
        )
        require(num_ranks <= _LANES or self.num_sms % 2 == 0, f"num_sms must be even: {self.num_sms}")
        nodes, peers = max(num_ranks // _LANES, 1), min(num_ranks, _LANES)
        queues = self.num_channels * peers
        counters = queues * (2 * nodes + 3) * 4
        return align(counters + queues * self.num_max_nvl_chunked_recv_tokens * _token_bytes(hidden_bytes), 128)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Upstream's `num_rdma_bytes` for rows of so many bytes; 0 inside one node."""
        if num_ranks <= _LANES:
            return 0
        require(num_ranks % _LANES == 0, f"num_ranks must be a multiple of 8: {num_ranks}")
        require(self.num_sms % 2 == 0, f"num_sms must be even: {self.num_sms}")
        queues = self.num_channels * (num_ranks // _LANES)
        counters = queues * (_LANES * 2 + 2) * 2 * 4
        token = _token_bytes(hidden_bytes) + 16
        return align(counters + queues * self.num_max_rdma_chunked_recv_tokens * 2 * token, 128)


def _token_bytes(hidden_bytes: int) -> int:
    """A row in upstream's queues: data, where it came from, ids, weights, scales."""
    return hidden_bytes + 8 + _MAX_TOPK * (_TOPK_IDX_BYTES + 4) + _MAX_SCALES * 4


def _per_ranks(*rows: Tuple[Tuple[int, ...], Tuple[int, int, int, int]]) -> Dict[int, Tuple[int, int, int, int]]:
    return {ranks: values for all_ranks, values in rows for ranks in all_ranks}


#: (nvl send, nvl recv, rdma send, rdma recv) by number of ranks.
DISPATCH_CONFIGS = _per_ranks(
    ((2,), (24, 256, 6, 128)),
    ((4,), (6, 256, 6, 128)),
    ((8,), (6, 256, 6, 128)),
    ((16,), (36, 288, 20, 128)),
    ((24, 32, 48, 64), (32, 288, 8, 128)),
    ((96,), (20, 480, 12, 128)),
    ((128,), (20, 560, 12, 128)),
    ((144,), (32, 720, 12, 128)),
    ((160,), (28, 720, 12, 128)),
)
COMBINE_CONFIGS = _per_ranks(
    ((2,), (10, 256, 6, 128)),
    ((4,), (9, 256, 6, 128)),
    ((8,), (4, 256, 6, 128)),
    ((16,), (4, 288, 12, 128)),
    ((24, 32, 48, 64), (1, 288, 8, 128)),
    ((96,), (1, 480, 8, 128)),
    ((128,), (1, 560, 8, 128)),
    ((144,), (2, 720, 8, 128)),
    ((160,), (2, 720, 8, 128)),
)


#: Low-latency operations whose slots exist at once; one less may be outstanding.
NUM_TICKETS = 4


def low_latency_size_hint(max_tokens: int, hidden: int, num_ranks: int, num_experts: int) -> int:
    """Upstream's formula, or what our tickets take where that is more (rows so short that headers matter)."""
    scales = hidden // 128
    dispatch_row = 16 + max(2 * hidden, hidden + 4 * scales)
    combine_row = 4 * scales + 2 * hidden
    send = max(max_tokens * dispatch_row, num_experts * max_tokens * combine_row)
    receive = num_experts * max_tokens * max(dispatch_row, combine_row)
    upstream = (2 * (send + receive + align(4 * num_experts, 128)) + 128) // 128 * 128
    ours = slots_bytes(low_latency_capacity(max_tokens, hidden, min(32, num_experts)), num_ranks)
    return max(upstream, align(ours, 128))


def low_latency_capacity(max_tokens: int, hidden: int, num_topk: int) -> Any:
    """For calls of BF16 rows."""
    capacity = _core.LowLatencyCapacity()
    capacity.max_tokens_per_rank, capacity.row_bytes, capacity.num_topk = max_tokens, 2 * hidden, num_topk
    return capacity


def slots_bytes(capacity: Any, num_ranks: int) -> int:
    """Of a rank's window: what the library's own plan adds for these calls."""
    config = _core.BufferConfig()
    config.arena_bytes, config.num_tickets = 1 << 20, NUM_TICKETS
    without = config.plan(num_ranks)
    config.low_latency = capacity
    return config.plan(num_ranks) - without
