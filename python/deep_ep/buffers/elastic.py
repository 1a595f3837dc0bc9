# SPDX-License-Identifier: MIT
"""DeepEP V2's place of the second generation's buffer."""

from ..elastic import ElasticBuffer
from ..event import EventHandle, EventOverlap
from ..handle import EPHandle

__all__ = ["EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap"]
