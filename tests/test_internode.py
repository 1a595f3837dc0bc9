#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Dispatch and combine of V1 between nodes: the checks of test_intranode.py with logical nodes, on one machine or several
(MASTER_ADDR, WORLD_SIZE = machines, RANK = this machine)."""

from deep_ep.utils.envs import launch

from test_intranode import parser, run

if __name__ == "__main__":
    arguments = parser(__doc__ or "", 4)
    arguments.set_defaults(ranks_per_node=2)
    arguments = arguments.parse_args()
    launch(run, arguments.num_processes, arguments.num_processes, arguments)
