# SPDX-License-Identifier: MIT
"""All-gather sessions of DeepEP's V2 ("AGRS"), as a dispatch of one row to every rank."""

import contextlib
import math
from typing import Any, Iterator, Sequence, Tuple, Union

import torch

from .config import align
from .errors import require
from .session import Session

_ROW_BYTES = 16
_MAX_GATHERS = 32


class GatherMixin(Session):
    _agrs_limits: Tuple[int, int] = (0, 0)
    _agrs_used: Tuple[int, int] = (0, 0)
    _agrs_open = False

    def agrs_set_config(self, num_max_session_bytes: int, num_max_all_gathers_per_session: int) -> None:
        """What a session may gather at most."""
        require(
            0 < num_max_all_gathers_per_session <= _MAX_GATHERS,
            f"num_max_all_gathers_per_session must be 1 .. {_MAX_GATHERS}: {num_max_all_gathers_per_session}",
        )
        self._agrs_limits = (num_max_session_bytes, num_max_all_gathers_per_session)

    def create_agrs_session(self) -> None:
        """Begins a session: `all_gather` is for sessions. `agrs_new_session` ends it by itself."""
        require(not self._agrs_open, "a session is open already")
        self._agrs_open, self._agrs_used = True, (0, 0)

    def destroy_agrs_session(self) -> None:
        """Ends the session."""
        require(self._agrs_open, "no session is open")
        self._agrs_open = False

    @contextlib.contextmanager
    def agrs_new_session(self, enabled: bool = True) -> Iterator[None]:
        """A session for the length of a `with` statement; none where not `enabled`."""
        if not enabled:
            yield
            return
        self.create_agrs_session()
        try:
            yield
        finally:
            self.destroy_agrs_session()

    def agrs_get_inplace_tensor(self, shapes: Union[Sequence[int], Sequence[Sequence[int]]], dtype: torch.dtype) -> Any:
        """A tensor, or several, to fill and to gather."""
        if len(shapes) > 0 and not isinstance(shapes[0], int):
            return tuple(torch.empty(tuple(shape), dtype=dtype, device=self._device) for shape in shapes)  # type: ignore[arg-type]
        return torch.empty(tuple(shapes), dtype=dtype, device=self._device)  # type: ignore[arg-type]

    def all_gather(self, tensors: Any) -> Tuple[Any, ...]:
        """(every rank's tensors, each `[num_ranks, ...]`, and a callable that waits). Collective."""
        several = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        self._checked("dispatch", lambda: self._count_gather(several))
        return (*(self._gather(each) for each in several), _done)

    def _count_gather(self, tensors: Sequence[torch.Tensor]) -> None:
        require(self._agrs_open, "all_gather needs an open session")
        sizes = (align(self._num_ranks * t.numel() * t.element_size(), 32) for t in tensors)
        used = (self._agrs_used[0] + sum(sizes), self._agrs_used[1] + 1)
        require(
            used[0] <= self._agrs_limits[0] and used[1] <= self._agrs_limits[1],
            f"session: {used[0]} bytes in {used[1]} gathers, agrs_set_config allows {self._agrs_limits}",
        )
        self._agrs_used = used

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._use(tensor, "tensors")
        size = tensor.numel() * tensor.element_size()
        row = torch.zeros((1, align(max(size, 1), _ROW_BYTES)), dtype=torch.uint8, device=self._device)
        row[0, :size] = tensor.contiguous().view(-1).view(torch.uint8)
        everyone = torch.arange(self._num_ranks, dtype=torch.int32, device=self._device).view(1, -1)
        gathered = self._opened().dispatch(x=row, topk_idx=everyone, num_experts=self._num_ranks)[0]
        shape = (self._num_ranks, *tensor.shape)
        if math.prod(shape) == 0:
            return torch.empty(shape, dtype=tensor.dtype, device=self._device)
        return gathered[:, :size].contiguous().view(tensor.dtype).view(shape)


def _done() -> None:
    """The gathered tensors are there when all_gather returns."""
