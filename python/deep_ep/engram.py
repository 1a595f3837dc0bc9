# SPDX-License-Identifier: MIT
"""Engram of DeepEP's V2: a table spread over the ranks, whose entries any rank fetches by number. The fetch is collective
here: requests go to their owners as one dispatch, entries come back as another."""

from typing import Callable, Optional, Tuple

import torch

from .config import align
from .errors import require
from .group import barrier
from .session import Session

_ROW_BYTES = 16


class EngramMixin(Session):
    _engram: Optional[torch.Tensor] = None
    _engram_sf: Optional[torch.Tensor] = None

    def engram_write(self, storage: torch.Tensor, sf: Optional[torch.Tensor] = None) -> None:
        """Sets this rank's entries, `[entries, hidden]`; `sf` is the table of all ranks' scales. Collective."""
        self._opened()
        require(
            storage.dim() == 2 and storage.is_contiguous(),
            f"storage must be a contiguous matrix: {list(storage.shape)}",
        )
        require(storage.element_size() == 2 or sf is not None, f"sf must be given for {storage.dtype}")
        barrier(self.group)
        self._engram, self._engram_sf = storage.clone(), sf
        barrier(self.group)

    def engram_fetch(
        self, indices: torch.Tensor, num_qps: int = 0, use_tma_aligned_col_major_sf: bool = False
    ) -> Callable[[], Tuple[torch.Tensor, Optional[torch.Tensor]]]:
        """`indices` int32 [tokens, entries per token], global. The result of the returned callable is
        ([tokens, entries per token * hidden], scales or None). Collective."""

        def check() -> torch.Tensor:
            require(self._engram is not None, "engram_write must come first")
            total = self._num_ranks * self._engram.size(0)  # type: ignore[union-attr]
            wanted = indices.reshape(-1).to(torch.int64)
            inside = wanted.numel() == 0 or (int(wanted.min()) >= 0 and int(wanted.max()) < total)
            require(inside, f"indices must be 0 .. {total - 1}")
            return wanted

        self._use(indices, "indices")
        wanted = self._checked("dispatch", check)
        data = self._fetch_rows(wanted, self._engram)  # type: ignore[arg-type]
        tokens, per_token = indices.shape
        sf = None
        if self._engram_sf is not None:
            sf = self._engram_sf[wanted].view(tokens, -1)
            if use_tma_aligned_col_major_sf:
                padded = torch.empty((sf.size(1), align(max(tokens, 1), 4)), dtype=sf.dtype, device=self._device)
                padded[:, :tokens] = sf.t()
                sf = padded.t()[:tokens]
        result = (data.view(tokens, per_token * data.size(1)), sf)
        return lambda: result

    def _fetch_rows(self, wanted: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        core, entries, ranks = self._opened(), table.size(0), self._num_ranks
        owner = wanted // entries
        request = torch.zeros((wanted.numel(), _ROW_BYTES // 8), dtype=torch.int64, device=self._device)
        request[:, 0] = wanted % entries
        asked, *_, came = core.dispatch(x=request, topk_idx=owner.view(-1, 1), num_experts=ranks)
        # Requests came in order of their ranks, and rows go back in the order of the requests.
        first = came.first_arrival.to(torch.int64)
        source = torch.repeat_interleave(torch.arange(ranks, device=self._device), first[1:] - first[:-1])
        size = table.size(1) * table.element_size()
        rows = torch.zeros((asked.size(0), align(size, _ROW_BYTES)), dtype=torch.uint8, device=self._device)
        rows[:, :size] = table.view(torch.uint8)[asked[:, 0]]
        back = core.dispatch(x=rows, topk_idx=source.view(-1, 1), num_experts=ranks)[0]
        # They are here by owner, each owner's in the order asked.
        result = torch.empty((wanted.numel(), size), dtype=torch.uint8, device=self._device)
        result[torch.argsort(owner, stable=True)] = back[:, :size]
        return result.view(table.dtype)
