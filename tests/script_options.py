# SPDX-License-Identifier: MIT
"""Command lines of the scripts test_*.py beside this file, which DeepEP's users know."""

import argparse
import os
from typing import Any, Callable, Dict, Optional, Tuple

from deep_ep.utils.envs import launch

HELP = {
    "num_processes": "ranks on this machine",
    "num_tokens": "tokens of each rank",
    "hidden": "channels of a token",
    "num_topk": "experts of each token",
    "num_experts": "experts in all, a multiple of the ranks",
    "num_warmups": "calls before the measured ones",
    "num_tests": "measured calls",
}


def parser(
    description: Optional[str], spelled: Optional[Dict[str, Tuple[str, ...]]] = None, **defaults: int
) -> argparse.ArgumentParser:
    """With every option of HELP, each with its default; `spelled` are those that a script calls otherwise."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, text in HELP.items():
        flags = (spelled or {}).get(name, ("--" + name.replace("_", "-"),))
        made.add_argument(*flags, dest=name, type=int, default=defaults[name], metavar="N", help=text)
    return made


def start(run: Callable[..., Any], made: argparse.ArgumentParser) -> None:
    """Runs `run(local rank, ranks here, arguments)` in a process for each rank, if the arguments can be."""
    args = made.parse_args()
    ranks = args.num_processes * int(os.environ.get("WORLD_SIZE", "1"))
    if args.num_experts % ranks != 0:
        made.error(f"{args.num_experts} experts are no multiple of {ranks} ranks")
    if args.num_topk > args.num_experts:
        made.error(f"{args.num_topk} experts of each token are more than the {args.num_experts} that there are")
    launch(run, args.num_processes, args.num_processes, args)
