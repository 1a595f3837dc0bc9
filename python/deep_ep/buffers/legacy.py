# SPDX-License-Identifier: MIT
"""DeepEP V2's place of the first generation's buffer."""

from ..buffer import Buffer
from ..config import Config
from ..event import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap"]
