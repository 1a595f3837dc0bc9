# SPDX-License-Identifier: MIT
"""python -m deep_ep: says what this machine has for a buffer, what is missing, and whether small exchanges work."""

import argparse
import json
import sys

import torch

from . import _core, doctor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deep_ep", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--no-checks", action="store_true", help="only look, make no exchange")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()

    try:
        machine = _core.inspect_machine()
    except _core.Error as error:
        print(f"deep_ep: {error}", file=sys.stderr)
        return 2
    if not args.json:
        print(machine, end="")
        print(f"torch     {torch.__version__}", flush=True)
    done = []
    for check in () if args.no_checks else doctor.checks(machine):
        done.append(check)
        if not args.json:
            print(f"check     {check.name}: {check.problem or 'every bit is right'}, {check.seconds:.2f} s", flush=True)
    if args.json:
        print(json.dumps({**doctor.facts(machine), "checks": [check._asdict() for check in done]}, indent=2))
    return 1 if any(check.problem for check in done) else 0


if __name__ == "__main__":
    sys.exit(main())
