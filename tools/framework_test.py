#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs frameworks' own code on this library: installs each framework of tests/frameworks and runs its tests in a process of
its own; the last line sums up what happened. A framework that cannot be installed, or of which no test passed, has failed."""
import argparse
import os
import sys
import time

import python_env
from tally import OUT, ROOT, Tally, run, tell_failures


def test(python, name, tally, needed=True):
    """The number of a framework's tests that passed. One that is not needed may be absent: then its tests skip themselves."""
    before = tally.passed
    folder = python_env.install_framework(python, name)
    if folder is None and needed:
        tally.broken.append(f"{name} could not be installed")
        return 0
    junit = OUT / f"framework_{name}.xml"
    junit.unlink(missing_ok=True)
    finished = run(python, "-m", "pytest", "-q", "-rs", f"--junitxml={junit}", "--rootdir", ROOT,
                   ROOT / "tests" / "frameworks" / f"test_{name}.py",
                   env={**os.environ, "PYTHONPATH": str(folder or ""), "PYTHONDONTWRITEBYTECODE": "1"})
    if not tally.add(junit, name) and not finished:
        tally.broken.append(f"{name}: pytest failed")
    elif needed and tally.passed == before:
        tally.broken.append(f"{name}: no test passed")
    return tally.passed - before


def summary(tally, parts, seconds):
    bad = tally.failed or tally.broken
    counts = f"{tally.passed} tests passed, {tally.failed} failed, {tally.skipped} skipped ({', '.join(parts)})"
    return f"deep_ep framework-test: {'FAILED: ' if bad else ''}{', '.join([counts, *tally.broken])}, {seconds:.0f} s"


def main():
    known = ", ".join(python_env.FRAMEWORKS)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("frameworks", nargs="*", metavar="FRAMEWORK", help=f"of {known}; without one, all")
    names = parser.parse_args().frameworks or list(python_env.FRAMEWORKS)
    for name in names:
        if name not in python_env.FRAMEWORKS:
            parser.error(f"there are tests of {known}, not of {name}")

    start, tally = time.monotonic(), Tally()
    OUT.mkdir(parents=True, exist_ok=True)
    python = python_env.prepare()
    if python is None:
        tally.broken.append("the package did not install")
    parts = [f"{name} {test(python, name, tally)}" for name in names] if python else []
    tell_failures(tally)
    print(summary(tally, parts, time.monotonic() - start))
    return 1 if tally.failed or tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
