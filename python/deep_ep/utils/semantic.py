# SPDX-License-Identifier: MIT
"""Small tools of the language."""

import functools
import weakref
from typing import Any, Callable, Optional, TypeVar

T = TypeVar("T")


def value_or(value: Optional[T], default: T) -> T:
    return default if value is None else value


def weak_lru(maxsize: Optional[int] = 128, typed: bool = False) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`functools.lru_cache` for methods: the cache does not keep the object alive."""

    def decorate(method: Callable[..., T]) -> Callable[..., T]:
        @functools.lru_cache(maxsize, typed)
        def cached(reference: Any, *args: Any, **kwargs: Any) -> T:
            return method(reference(), *args, **kwargs)

        @functools.wraps(method)
        def call(self: Any, *args: Any, **kwargs: Any) -> T:
            return cached(weakref.ref(self), *args, **kwargs)

        return call

    return decorate
