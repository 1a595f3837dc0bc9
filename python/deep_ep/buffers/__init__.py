# SPDX-License-Identifier: MIT
"""Where DeepEP's V2 keeps its buffers."""

from .elastic import ElasticBuffer
from .legacy import Buffer

__all__ = ["Buffer", "ElasticBuffer"]
