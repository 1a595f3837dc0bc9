#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Runs every test of the CUDA backend on this machine's GPUs (rank r has GPU r modulo their number) and writes one log, which begins with the commit and ends
with one line that sums up. Exit code 0 only if everything passed and nothing was skipped.

The programs are those of the preset `cuda` (or of another build: --tests). A test that hangs or ends its program has failed, is named, and the others go on.
Without a GPU all tests are skipped."""
import argparse
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Program, and the backend that it tests by itself.
PROGRAMS = [("cuda_tests", "host"), ("backends_tests", "cuda"), ("faults_tests", "cuda"), ("internode_tests", "cuda")]
BEGUN = re.compile(r"^\[ RUN      \] (\S+)")
ENDED = re.compile(r"^\[ *(OK|FAILED|SKIPPED) *\] ([^\s,]+)")
UNABLE = re.compile(r"^deep_ep tests on \w+: 0 passed, 0 failed, (\d+) skipped$")


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
    try:
        gpus = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout.count("GPU ")
    except FileNotFoundError:
        gpus = 0
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = min(gpus, len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    name = first_line("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    return f"{gpus} x {name}" if gpus else "no GPU"


class Program:
    """One test program, started again without the tests that are done wherever one of them ends it."""

    def __init__(self, command, backend, args, deadline, say):
        self.command, self.args, self.deadline, self.say = command, args, deadline, say
        self.env = {**os.environ, "EP_TEST_BACKEND": backend, "CUDA_DEVICE_MAX_CONNECTIONS": "32", "CUDA_MODULE_LOADING": "EAGER"}
        self.passed = self.skipped = 0
        self.failed, self.done = [], []

    def run(self):
        while not self.run_once():
            pass

    def filter(self):
        wanted, _, unwanted = self.args.filter.partition("-")
        unwanted = ":".join(filter(None, [unwanted, *self.done]))
        return f"--gtest_filter={wanted}" + (f"-{unwanted}" if unwanted else "")

    def run_once(self):
        """True: that was all."""
        process = subprocess.Popen([self.command, self.filter(), "--gtest_color=no"], env=self.env, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True)
        lines = queue.Queue()

        def read():
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        self.current, began = None, time.monotonic()
        while True:
            end = min(self.deadline, began + self.args.test_limit)
            try:
                line = lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return self.stop(process)
            if line is None:
                break
            if self.heed(line):
                began = time.monotonic()
        code = process.wait()
        if self.current:
            return self.lose(f"{self.current} ended its program with code {code}")
        return True

    def heed(self, line):
        """Counts what a line says of a test; true if it says something."""
        self.say(line.rstrip("\n"))
        if unable := UNABLE.match(line):
            self.skipped = int(unable.group(1))
        if begun := BEGUN.match(line):
            self.current = begun.group(1)
            return True
        ended = ENDED.match(line)
        if not ended or ended.group(2) != self.current:
            return False
        self.done.append(self.current)
        self.passed += ended.group(1) == "OK"
        self.skipped += ended.group(1) == "SKIPPED"
        if ended.group(1) == "FAILED":
            self.failed.append(self.current)
        self.current = None
        return True

    def stop(self, process):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        late = time.monotonic() >= self.deadline
        what = self.current or "the program between tests"
        return self.lose(f"{what} " + ("was running when the time was over" if late else f"took more than {self.args.test_limit} s")) or late

    def lose(self, what):
        """Takes the running test as failed. True: not even one had begun, so another start would be no better."""
        self.say(f"LOST: {what}")
        self.failed.append(what)
        if self.current:
            self.done.append(self.current)
        return not self.current


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tests", type=Path, default=ROOT / "build" / "cuda" / "tests", help="folder of the programs")
    parser.add_argument("--commit", default=None, help="where this is no checkout")
    parser.add_argument("--filter", default="*", help="as --gtest_filter")
    parser.add_argument("--programs", nargs="+", choices=[program for program, _ in PROGRAMS], default=[program for program, _ in PROGRAMS])
    parser.add_argument("--log", type=Path, default=None, help="also write what is printed here")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for all programs")
    parser.add_argument("--test-limit", type=float, default=60, help="seconds for one test")
    args = parser.parse_args()
    chosen = [(program, backend) for program, backend in PROGRAMS if program in args.programs]
    absent = [program for program, _ in chosen if not (args.tests / program).is_file()]
    if absent:
        parser.error(f"{args.tests} has no {', '.join(absent)}: build the preset cuda, or name the folder by --tests")

    log = args.log.open("w") if args.log else None

    def say(text):
        print(text, flush=True)
        if log:
            print(text, file=log, flush=True)

    start = time.monotonic()
    say(f"commit {args.commit or commit()}, {machine()}, {time.strftime('%Y-%m-%d')}")
    programs = []
    for name, backend in chosen:
        say(f"+ EP_TEST_BACKEND={backend} {name}")
        programs.append(Program(args.tests / name, backend, args, start + args.limit, say))
        programs[-1].run()
    passed, skipped = (sum(getattr(program, what) for program in programs) for what in ("passed", "skipped"))
    failed = [name for program in programs for name in program.failed]
    for name in failed:
        say(f"FAILED: {name}")
    say(f"deep_ep GPU tests: {passed} passed, {len(failed)} failed, {skipped} skipped, {time.monotonic() - start:.0f} s")
    return 0 if passed and not failed and not skipped else 1


if __name__ == "__main__":
    sys.exit(main())
