# SPDX-License-Identifier: MIT
"""V2's rows in another order than the library's, which is (source rank, source token): grouped by scale-up rank, as hybrid mode
gives them, or as a caller sorted them together with the handle's metadata. An order is the library's row of each row given out."""

from typing import Optional

import torch


def by_scaleup_rank(metadata: torch.Tensor, max_tokens: int, num_scaleup: int) -> torch.Tensor:
    """Scale-up ranks ascending, in each the library's order; rows behind the last real one stay behind."""
    source = metadata[:, 0]
    group = torch.where(source >= 0, source.div(max_tokens, rounding_mode="floor") % num_scaleup, num_scaleup)
    return torch.argsort(group, stable=True)


def of_metadata(metadata: torch.Tensor, num_valid: int, num_rows: int) -> Optional[torch.Tensor]:
    """The order of `num_rows` rows that the sources of the valid ones tell; None where it is the library's."""
    sources = metadata[:num_valid, 0]
    if num_valid < 2 or bool((sources[1:] > sources[:-1]).all()):
        return None
    behind = torch.arange(num_valid, num_rows, device=metadata.device)
    return torch.cat([inverse(torch.argsort(sources)), behind])


def inverse(order: torch.Tensor) -> torch.Tensor:
    result = torch.empty_like(order)
    result[order] = torch.arange(order.numel(), dtype=order.dtype, device=order.device)
    return result


def taken(rows: Optional[torch.Tensor], order: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """rows[order], in memory arranged as the rows were."""
    if rows is None or order is None:
        return rows
    if rows.dim() == 2 and rows.stride(0) == 1 and rows.stride(1) != 1:  # scales, column by column
        columns = torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype, device=rows.device)
        return columns.copy_(rows[order])
    if rows.element_size() == 1:  # not every version of torch picks rows of FP8
        return rows.view(torch.uint8)[order].view(rows.dtype)
    return rows[order]
