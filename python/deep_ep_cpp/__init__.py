# SPDX-License-Identifier: MIT
"""The name of DeepEP V1's compiled module."""

from deep_ep._C import *  # noqa: F401,F403
from deep_ep._C import __all__  # noqa: F401
