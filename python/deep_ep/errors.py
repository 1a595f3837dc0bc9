# SPDX-License-Identifier: MIT
"""Errors found in Python, of the same type as those of the C++ library."""

import functools
import re
from typing import Any, Callable, TypeVar, cast

from ._core import Error, ErrorCode

_Call = TypeVar("_Call", bound=Callable[..., Any])


class Naming:
    """How a call's errors name its arguments: by the names that its users know, given here for those of the library
    beneath. Decorates the call; `around` is for what it leaves to be called later."""

    def __init__(self, **names: str) -> None:
        self._names = names
        self._theirs = re.compile(rf"(?<![\w.])({'|'.join(names)})(?!\w)")

    def __call__(self, call: _Call) -> _Call:
        return cast(_Call, functools.update_wrapper(self.around(call), call))

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def named(*arguments: Any, **keywords: Any) -> Any:
            try:
                return call(*arguments, **keywords)
            except Error as error:
                error.args = (self._theirs.sub(lambda found: self._names[found[1]], str(error)),)
                raise

        return named


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
