# SPDX-License-Identifier: MIT
"""Keywords that forks of DeepEP have added to its calls. No signature names them: frameworks look there to learn what a
package supports. Passed all the same, they are ignored where they ask for nothing and refused, with the reason, where they
ask for something."""

import inspect
from typing import Any, Callable, Dict, Tuple, TypeVar

from .errors import unsupported

_Method = TypeVar("_Method", bound=Callable[..., Any])


def unannounced(method: _Method) -> _Method:
    """Leaves the method's `**keywords` out of its signature."""
    signature = inspect.signature(method)
    named = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    method.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return method


def refuse(session: Any, operation: str, given: Dict[str, Any], known: Tuple[str, ...], because: str) -> None:
    """For a collective operation that was given such keywords. The first one known is the switch, others count beside it."""
    for name in given:
        if name not in known:
            raise TypeError(f"{operation}() got an unexpected keyword argument '{name}'")
    if given.get(known[0], False):

        def refusal() -> None:
            raise unsupported(f"{known[0]}, an argument of forks: {because}")

        session._checked(operation, refusal)
