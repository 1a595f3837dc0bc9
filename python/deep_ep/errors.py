# SPDX-License-Identifier: MIT
"""Errors found in Python, of the same type as those of the C++ library."""

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
