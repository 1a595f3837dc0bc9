# SPDX-License-Identifier: MIT
"""Events, under DeepEP's name for the module."""

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
