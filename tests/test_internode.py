#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Dispatch and combine of V1 between nodes: the checks of test_intranode.py with logical nodes, on one machine or several
(MASTER_ADDR, WORLD_SIZE = machines, RANK = this machine)."""

from script_options import start
from test_intranode import options, run

if __name__ == "__main__":
    made = options(__doc__)
    made.set_defaults(ranks_per_node=2)
    start(run, made)
