# SPDX-License-Identifier: MIT
"""Imports LMDeploy's dispatchers alone, whose files are as in the wheel: the packages above them import engines and
servers, so they are entered here without running their __init__."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def _enter(root, *names):
    """Modules of these packages can be imported from now on; their __init__ is not run."""
    for name in names:
        spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = importlib.util.module_from_spec(spec)


_BACKENDS = "lmdeploy.pytorch.backends"
_enter(
    Path(importlib.util.find_spec("lmdeploy").origin).parent.parent,
    *("lmdeploy", "lmdeploy.pytorch", _BACKENDS, f"{_BACKENDS}.cuda", f"{_BACKENDS}.default"),
)

import lmdeploy.pytorch.backends.cuda.token_dispatcher  # noqa: E402, F401
