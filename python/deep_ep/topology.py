# SPDX-License-Identifier: MIT
"""Which ranks form a node. A node is a parameter, EP_NODE_SIZE or `ranks_per_node`, and never read from a host name."""

import os
from typing import Any, List, Optional, Tuple

from .errors import require
from .group import size_of

DEFAULT_NODE_SIZE = 8


def node_size(num_ranks: int, ranks_per_node: Optional[int] = None) -> int:
    """Ranks of one node: as given, else EP_NODE_SIZE, else 8; at most all ranks."""
    text = os.environ.get("EP_NODE_SIZE", "")
    if ranks_per_node is None and text:
        require(text.isdigit() and int(text) > 0, f"EP_NODE_SIZE must be a positive number: '{text}'")
        ranks_per_node = int(text)
    size = DEFAULT_NODE_SIZE if ranks_per_node is None else ranks_per_node
    require(size > 0, f"ranks_per_node must be positive: {size}")
    return min(size, num_ranks)


def core_nodes(num_ranks: int, size: int) -> List[int]:
    """As the library's Config takes it: empty for one node."""
    return [] if size >= num_ranks else [size]


def physical_domains(num_ranks: int, size: int) -> Tuple[int, int]:
    return (-(-num_ranks // size), size)


def get_physical_domain_size(group: Any) -> Tuple[int, int]:
    """(nodes, ranks of a node)."""
    num_ranks = size_of(group)
    return physical_domains(num_ranks, node_size(num_ranks))


def get_logical_domain_size(group: Any, allow_hybrid_mode: bool = True) -> Tuple[int, int]:
    """(scale-out ranks, scale-up ranks): the nodes in hybrid mode, else one domain of all ranks."""
    return get_physical_domain_size(group) if allow_hybrid_mode else (1, size_of(group))
