# SPDX-License-Identifier: MIT
"""Helpers under the names that DeepEP's users import."""

from ..event import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
