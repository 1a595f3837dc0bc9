# SPDX-License-Identifier: MIT
"""Errors found in Python, of the same type as those of the C++ library."""

from typing import Any

from ._core import Error, ErrorCode


def invalid(what: str) -> Error:
    error = Error("invalid argument: " + what)
    error.code, error.wait = ErrorCode.invalid_argument, None
    return error


def unsupported(what: str) -> Error:
    error = Error("unsupported: " + what)
    error.code, error.wait = ErrorCode.unsupported, None
    return error


def require(condition: bool, what: str) -> None:
    if not condition:
        raise invalid(what)


def require_counters(name: str, counters: Any, dtype: Any, entries: int) -> None:
    """A tensor that a call adds to: contiguous, one entry for each."""
    require(
        counters.dtype == dtype and tuple(counters.shape) == (entries,) and counters.is_contiguous(),
        f"{name} must be contiguous {dtype} [{entries}]: it is {counters.dtype} {list(counters.shape)}",
    )
