# SPDX-License-Identifier: MIT
"""Counts tests of several programs by the JUnit files that they leave in out/test, and tells which failed."""
import subprocess
import xml.etree.ElementTree as xml
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "out" / "test"


def run(*command, **more):
    """True if the command succeeded; it prints as it goes."""
    print("+", " ".join(map(str, command)), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, **more).returncode == 0
    except FileNotFoundError:
        print(f"{command[0]}: not installed", flush=True)
        return False


def last_words(case, lines=40):
    """The end of what a failed test said: pytest tells why in the failure's text, ctest in what the program printed."""
    said = [(case.find(tag).text or "") for tag in ("failure", "error", "system-out") if case.find(tag) is not None]
    return "\n".join("\n".join(said).strip().splitlines()[-lines:])


class Tally:
    """Tests counted from JUnit files, and the steps that failed by themselves."""

    def __init__(self):
        self.passed = self.skipped = 0
        self.broken = []
        self.failures = []  # (step, name of the test, end of what it printed)

    @property
    def failed(self):
        return len(self.failures)

    def add(self, junit, step):
        """Counts a file's tests; a file that is not there or names no test is a broken step."""
        try:
            cases = list(xml.parse(junit).iter("testcase"))
        except (OSError, xml.ParseError):
            cases = []
        if not cases:
            self.broken.append(f"{step}: no tests ran")
        before = self.failed
        for case in cases:
            skip = case.find("skipped")
            # ctest calls a test that it could not start "notrun" and skipped; a test that skips itself says SKIP_....
            absent = case.get("status") == "notrun" and not (skip is not None and skip.get("message", "").startswith("SKIP_"))
            if absent or any(case.find(tag) is not None for tag in ("failure", "error")):
                self.failures.append((step, case.get("name"), last_words(case)))
            elif skip is not None or case.get("status") == "disabled":
                self.skipped += 1
            else:
                self.passed += 1
        return self.failed - before


def tell_failures(tally, most=10):
    """Prints failed tests once more, since whoever reads only the end of a log must find them there."""
    for step, name, words in tally.failures[:most]:
        print(f"\nFAILED in {step}: {name}\n{words}", flush=True)
    if len(tally.failures) > most:
        print(f"\nand {len(tally.failures) - most} more: out/test/*.xml", flush=True)
