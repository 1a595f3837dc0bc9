# SPDX-License-Identifier: MIT
"""The exchange of bench/workload.h in numpy: the same routing and the same rows from the same seed, and the digest by which two
programs are seen to have made the same exchange."""

from typing import Any, List, NamedTuple, Tuple

import numpy as np
import torch

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


class Workload(NamedTuple):
    ranks: int
    tokens: int
    ll_tokens: int
    hidden: int
    topk: int
    experts: int
    reps: int
    ll_reps: int
    warmup: int
    seed: int

    @classmethod
    def of(cls, report: Any) -> "Workload":
        """As the C++ program's report states it."""
        return cls(*(report[name] for name in cls._fields))


def _draws(seed: int, count: int) -> np.ndarray:
    """SplitMix64's first numbers."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(seed & MASK)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def routing(work: Workload, rank: int, num_tokens: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """(expert ids int64, weights float32), each [num_tokens, topk]: C++'s routing `uniform`, ids of a token distinct."""
    draws = _draws(work.seed * 1000003 + rank, 2 * num_tokens * work.topk).reshape(num_tokens, 2, work.topk)
    ids = [_distinct(words, work.experts) for words in (draws[:, 0] >> np.uint64(32)).tolist()]
    units = (draws[:, 1] >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    weights = (np.float32(0.5) + units) / np.float32(work.topk)
    return torch.tensor(ids, dtype=torch.int64).view(num_tokens, work.topk), torch.from_numpy(weights)


def _distinct(words: List[int], count: int) -> List[int]:
    """Distinct numbers below count, one for each random word of 32 bits."""
    order = list(range(count))
    for k, word in enumerate(words):
        j = k + (word * (count - k) >> 32)
        order[k], order[j] = order[j], order[k]
    return order[: len(words)]


def rows(work: Workload, rank: int, num_rows: int) -> torch.Tensor:
    """bfloat16 [num_rows, hidden] from -1 to 1."""
    draws = _draws(work.seed * 7919 + rank + 1, num_rows * work.hidden // 2)
    pairs = np.stack([draws & np.uint64(0xFFFFFF), (draws >> np.uint64(32)) & np.uint64(0xFFFFFF)], axis=1)
    values = pairs.reshape(num_rows, work.hidden).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return torch.from_numpy(values).to(torch.bfloat16)


def _hashes(data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """One 64-bit hash per row of bytes."""
    padded = np.zeros((data.shape[0], -(-data.shape[1] // 8) * 8), dtype=np.uint8)
    padded[:, : data.shape[1]] = data
    words = np.ascontiguousarray(padded.view(np.uint64).T)
    value = np.uint64(0x243F6A8885A308D3) ^ (places.astype(np.uint64) * np.uint64(GOLDEN))
    for word in words:
        value = (value ^ word) * np.uint64(0xFF51AFD7ED558CCD)
        value ^= value >> np.uint64(32)
    return value


def _bytes(rows_: torch.Tensor) -> np.ndarray:
    return rows_.contiguous().view(torch.uint8).view(rows_.size(0), -1).numpy()


def _finished(total: int) -> int:
    return (total & MASK) >> 1


def digest_rows(received: torch.Tensor) -> int:
    """Of rows whose order does not matter; as bench/host_operations.h has it for rows without scales."""
    if received.size(0) == 0:
        return 0
    places = np.full(received.size(0), 0, dtype=np.uint64)
    return _finished(int(_hashes(_bytes(received), places).sum(dtype=np.uint64)))


def digest_padded(received: torch.Tensor, counts: torch.Tensor) -> int:
    """Of a block of rows per expert, its valid rows only."""
    total = 0
    for slot, count in enumerate(counts.tolist()):
        if count > 0:
            places = np.full(count, slot, dtype=np.uint64)
            total += int(_hashes(_bytes(received[slot, :count]), places).sum(dtype=np.uint64))
    return _finished(total)
