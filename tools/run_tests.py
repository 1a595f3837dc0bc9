#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Builds and tests presets one after the other, then lint and the Python tests; the last line sums up what happened.

A step that fails does not stop the others. Logs and JUnit files lie in out/test. Exit code 0 only if everything passed.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import framework_test
import python_env
from tally import OUT, ROOT, Tally, run, tell_failures


def wrapper_for(preset):
    """GCC's sanitizers cannot start, or only sometimes, where the kernel randomises addresses by more bits than they expect
    (32 on Ubuntu 24.04): then programs run without that."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    if not preset.endswith(("asan", "tsan")) or not bits.is_file() or int(bits.read_text()) <= 28:
        return []
    fixed = ["setarch", os.uname().machine, "-R"]
    if subprocess.run([*fixed, "true"], capture_output=True).returncode == 0:
        return fixed
    print(f"run_tests: {preset} may not start: this kernel randomises addresses by {bits.read_text().strip()} bits, and setarch -R is not "
          "allowed here; `sysctl vm.mmap_rnd_bits=28` as root helps", flush=True)
    return []


def options_for(preset):
    # Without GoogleTest a plain build leaves the tests out; here that is an error.
    options = ["-DCMAKE_REQUIRE_FIND_PACKAGE_GTest=ON"]
    if preset == "cuda" and not shutil.which("nvidia-smi"):
        # Kernels that cannot run are only compiled: both sides of each #if on __CUDA_ARCH__, for one GPU down to its instructions.
        options.append("-DCMAKE_CUDA_ARCHITECTURES=80-virtual;90-real")
    return options


def test_preset(preset, jobs, tally):
    if not run("cmake", "--preset", preset, *options_for(preset)):
        tally.broken.append(f"{preset}: configure failed")
        return
    if not run("cmake", "--build", "--preset", preset, "-j", str(jobs)):
        tally.broken.append(f"{preset}: build failed")
        return
    junit = OUT / f"{preset}.xml"
    # Two more than processors: many tests wait for deadlines and for one another most of their time.
    finished = run(*wrapper_for(preset), "ctest", "--preset", preset, "-j", str(jobs + 2), "--output-junit", str(junit))
    failures = tally.add(junit, preset)
    if not finished and not failures:
        tally.broken.append(f"{preset}: ctest failed")


def test_python(tally):
    """Installs the package as a user would, into an environment of its own, and runs its tests there."""
    if not list((ROOT / "tests" / "python").glob("test_*.py")):
        return []
    junit = OUT / "python.xml"
    python = python_env.prepare()
    if python is None:
        tally.broken.append("python: the package did not install")
        return ["python"]
    # Away from the tree, so that what is tested is what was installed.
    finished = run(python, "-m", "pytest", "-q", f"--junitxml={junit}", "--rootdir", ROOT, ROOT / "tests" / "python",
                   env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    if not tally.add(junit, "python") and not finished:
        tally.broken.append("python: pytest failed")
    return ["python"] + [name for name in python_env.SMALL_FRAMEWORKS if framework_test.test(python, name, tally, needed=False)]


def lint(jobs):
    """Runs tools/lint.sh; what its last line says after "lint: "."""
    print("+ tools/lint.sh", flush=True)
    last = "lint: FAILED: it did not start"
    with subprocess.Popen(["tools/lint.sh"], cwd=ROOT, env={**os.environ, "JOBS": str(jobs)}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for last in process.stdout:
            print(last, end="", flush=True)
    return last.strip().removeprefix("lint: ") if process.returncode == 0 or "FAILED" in last else "FAILED"


def good(tally, lint_says):
    return not tally.failed and not tally.broken and lint_says in ("", "clean")


def summary(tally, parts, lint_says, seconds):
    counts = f"{tally.passed} tests passed, {tally.failed} failed, {tally.skipped} skipped ({', '.join(parts)})"
    notes = ([f"lint {lint_says}"] if lint_says else []) + tally.broken
    return f"deep_ep test: {'' if good(tally, lint_says) else 'FAILED: '}{', '.join([counts, *notes])}, {seconds:.0f} s"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["host", "host-asan", "host-tsan"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--no-lint", action="store_true", help="only build and test")
    args = parser.parse_args()

    start, tally, lint_says, parts = time.monotonic(), Tally(), "", list(args.presets)
    OUT.mkdir(parents=True, exist_ok=True)
    for old in [*OUT.glob("*.xml"), *OUT.glob("summary.txt")]:
        old.unlink()  # a step that fails must not find its last result
    try:
        for preset in args.presets:
            test_preset(preset, args.jobs, tally)
        if not args.no_lint:
            # clang-tidy reads the compile commands of the preset host.
            ready = "host" in args.presets or run("cmake", "--preset", "host")
            lint_says = lint(args.jobs) if ready else "FAILED: no preset host"
            parts += test_python(tally)
    except KeyboardInterrupt:
        tally.broken.append("interrupted")
    line = summary(tally, parts, lint_says, time.monotonic() - start)
    (OUT / "summary.txt").write_text(line + "\n")
    tell_failures(tally)
    print(line, flush=True)
    return 0 if good(tally, lint_says) else 1


if __name__ == "__main__":
    sys.exit(main())
