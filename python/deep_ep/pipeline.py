# SPDX-License-Identifier: MIT
"""Pipeline send and receive of DeepEP's V2 between neighbours of the ring. Not collective, so not a dispatch: tensors travel
through the process group, in order per direction."""

import collections
from typing import Any, Deque, Dict

import torch

from .errors import require
from .group import barrier, receive, send
from .session import Session


class PipelineMixin(Session):
    _pp_limits = (0, 0)

    def pp_set_config(self, num_max_tensor_bytes: int, num_max_inflight_tensors: int) -> None:
        """How large tensors are and how many may be under way. Collective."""
        self._opened()
        require(
            num_max_tensor_bytes > 0 and num_max_inflight_tensors > 0,
            f"sizes must be positive: {num_max_tensor_bytes}, {num_max_inflight_tensors}",
        )
        self._pp_limits = (num_max_tensor_bytes, num_max_inflight_tensors)
        self._pp_sent: Dict[int, Deque[Any]] = collections.defaultdict(collections.deque)
        barrier(self.group)

    def pp_send(self, t: torch.Tensor, dst_rank_idx: int, num_sms: int = 0) -> None:
        """Returns at once while fewer than the configured number are under way to that rank."""
        self._check_pp(t, dst_rank_idx)
        sent = self._pp_sent[dst_rank_idx]
        if len(sent) == self._pp_limits[1]:
            sent.popleft()()
        sent.append(send(self.group, t.clone(), dst_rank_idx))

    def pp_recv(self, t: torch.Tensor, src_rank_idx: int, num_sms: int = 0) -> None:
        """Receives into `t` the next tensor that a neighbour sent."""
        self._check_pp(t, src_rank_idx)
        receive(self.group, t, src_rank_idx)

    def _check_pp(self, t: torch.Tensor, peer: int) -> None:
        self._opened()
        size = t.numel() * t.element_size()
        require(self._pp_limits[0] > 0, "pp_set_config must come first")
        require(
            t.is_contiguous() and size <= self._pp_limits[0] and size % 32 == 0,
            f"t must be contiguous, of a multiple of 32 bytes and at most {self._pp_limits[0]}: {size}",
        )
        neighbours = ((self._rank + 1) % self._num_ranks, (self._rank - 1) % self._num_ranks)
        require(peer in neighbours, f"the peer must be a neighbour of {self._rank} in the ring: {peer}")
