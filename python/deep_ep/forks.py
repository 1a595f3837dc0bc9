# SPDX-License-Identifier: MIT
"""Keywords that forks of DeepEP have added to its calls. No signature names them: frameworks look there to learn what a
package supports. Passed all the same, they are ignored where they ask for nothing and refused, with the reason, where they
ask for something."""

import functools
from typing import Any, Callable, TypeVar, cast

from .errors import unsupported

_Method = TypeVar("_Method", bound=Callable[..., Any])


def refuses(switch: str, *companions: str, because: str) -> Callable[[_Method], _Method]:
    """For a collective method of a Session: without `switch`, a fork's, and the arguments that only count beside it."""
    names = frozenset((switch, *companions))

    def decorate(method: _Method) -> _Method:
        def refuse() -> None:
            raise unsupported(f"{switch}, an argument of forks: {because}")

        @functools.wraps(method)
        def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
            if not names.isdisjoint(keywords):
                asked = keywords.pop(switch, False)
                keywords = {name: value for name, value in keywords.items() if name not in names}
                if asked:
                    self._checked(method.__name__, refuse)
            return method(self, *arguments, **keywords)

        return cast(_Method, call)

    return decorate
