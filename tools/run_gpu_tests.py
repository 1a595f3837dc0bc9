#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs every test of the CUDA backend on this machine's GPU and writes one log, which begins with the commit and ends
with one line that sums up. Exit code 0 only if everything passed and nothing was skipped.

The programs are those of the preset `cuda` (or of another build: --tests). Without a GPU all tests are skipped."""
import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUMMARY = re.compile(r"^deep_ep tests on \w+: (\d+) passed, (\d+) failed, (\d+) skipped$", re.M)
# Program, and the backend that it tests by itself.
PROGRAMS = [("cuda_tests", "host"), ("backends_tests", "cuda"), ("faults_tests", "cuda")]


def first_line(*command):
    """What a command says first; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""


def commit():
    return first_line("git", "describe", "--always", "--dirty") or "unknown"


def machine():
    return first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "no GPU"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, default=ROOT / "build" / "cuda" / "tests", help="folder of the programs")
    parser.add_argument("--commit", default=None, help="where this is no checkout")
    parser.add_argument("--filter", default="*", help="as --gtest_filter")
    parser.add_argument("--log", type=Path, default=None, help="also write what is printed here")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one program")
    args = parser.parse_args()
    absent = [program for program, _ in PROGRAMS if not (args.tests / program).is_file()]
    if absent:
        parser.error(f"{args.tests} has no {', '.join(absent)}: build the preset cuda, or name the folder by --tests")

    lines, total, broken = [], [0, 0, 0], []

    def say(text):
        lines.append(text.rstrip("\n"))
        print(lines[-1], flush=True)

    start = time.monotonic()
    say(f"commit {args.commit or commit()}, {machine()}, {time.strftime('%Y-%m-%d')}")
    for program, backend in PROGRAMS:
        say(f"+ EP_TEST_BACKEND={backend} {program}")
        settings = {"EP_TEST_BACKEND": backend, "CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
        try:
            done = subprocess.run([args.tests / program, f"--gtest_filter={args.filter}"], env={**os.environ, **settings},
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=args.limit)
            output = done.stdout
        except subprocess.TimeoutExpired as late:
            output = late.stdout or ""
            output = output.decode(errors="replace") if isinstance(output, bytes) else output
        say(output)
        counts = SUMMARY.findall(output)
        if counts:
            total = [have + int(more) for have, more in zip(total, counts[-1])]
        else:
            broken.append(f"{program} did not end")
    good = not (total[1] or total[2] or broken)
    notes = "".join(f", {note}" for note in broken)
    say(f"deep_ep GPU tests: {total[0]} passed, {total[1]} failed, {total[2]} skipped{notes}, "
        f"{time.monotonic() - start:.0f} s")
    if args.log:
        args.log.write_text("\n".join(lines) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
