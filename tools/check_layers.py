#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Includes go down only, neighbours do not see each other, and every public header compiles alone."""
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# From the bottom up; the parts on one line are neighbours. "src/*.h" are helpers that all of src may use.
LEVELS = [
    ["include"],
    ["src/*.h"],
    ["src/plan"],
    ["src/bootstrap", "src/net"],
    ["src/backend.h"],
    ["src/host", "src/cuda"],
    ["src/*.cpp"],
    ["src/capi"],
    ["python", "tests", "bench", "examples"],
]
LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
SUFFIXES = {".h", ".hpp", ".c", ".cpp", ".cu", ".cuh", ".inc"}
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)


def included(path):
    """The files of this repository that `path` includes."""
    text = path.read_text(errors="replace")
    for name in INCLUDE.findall(text):
        for folder in (path.parent, *(ROOT / part for part in ("src", "include", "tests", "bench", "examples"))):
            if (folder / name).is_file():
                yield (folder / name).resolve()
                break


def part_of(path):
    """The entry of LEVELS that a file belongs to; None outside of all."""
    names = path.relative_to(ROOT).parts
    if names[0] != "src":
        return names[0]
    if len(names) > 2:
        return "/".join(names[:2])
    if path.name == "backend.h":
        return "src/backend.h"
    # A header in src/ itself that needs more than a helper may belongs to the files that stand above the backends.
    low = path.suffix == ".h" and all(part_of(other) in ("include", "src/*.h") for other in included(path) if other != path)
    return "src/*.h" if low else "src/*.cpp"


def violations(files):
    for path in files:
        for other in included(path):
            mine, its = part_of(path), part_of(other)
            if mine not in LEVEL or its not in LEVEL:
                yield f"{path.relative_to(ROOT)} or {other.relative_to(ROOT)} belongs to no level of tools/check_layers.py"
            elif mine != its and LEVEL[its] >= LEVEL[mine]:
                kind = "its neighbour" if LEVEL[its] == LEVEL[mine] else "above it:"
                yield f"{path.relative_to(ROOT)} ({mine}) includes {kind} {other.relative_to(ROOT)} ({its})"


def headers_that_need_help():
    for header in sorted((ROOT / "include").rglob("*.h")):
        languages = [("c++", [os.environ.get("CXX", "g++"), "-std=c++20"])]
        if header.name == "deep_ep.h":
            languages.append(("c", [os.environ.get("CC", "gcc"), "-std=c11", "-Wpedantic"]))
        for language, compiler in languages:
            command = compiler + ["-x", language, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT}/include", "-"]
            source = f'#include "{header.relative_to(ROOT / "include")}"\n'
            done = subprocess.run(command, input=source, capture_output=True, text=True)
            if done.returncode:
                yield f"{header.relative_to(ROOT)} does not compile alone as {language}:\n{done.stderr}"


def main():
    files = [p for part in ("include", "src", "python", "tests", "bench", "examples")
             for p in sorted((ROOT / part).rglob("*")) if p.suffix in SUFFIXES]
    problems = list(violations(files)) + list(headers_that_need_help())
    for problem in problems:
        print(f"check_layers: {problem}")
    if not problems:
        print(f"check_layers: {len(files)} files include downwards only, public headers compile alone")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
