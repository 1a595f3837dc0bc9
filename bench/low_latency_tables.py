#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Prints the tables of docs/cuda.md from the JSON that bench/cuda_low_latency.cu wrote."""
import json
import sys

HEADER = ["tokens", "dispatch FP8", "floor", "send", "recv", "combine", "floor", "send", "recv", "pre-reduced", "floor", "round trip", "as called"]


def row(run):
    d, c, p, t = (run[key] for key in ("dispatch", "combine", "pre_reduced", "round_trip"))
    figures = [d["us"], d["floor"], d["send"], d["recv"], c["us"], c["floor"], c["send"], c["recv"], p["us"], p["floor"], t["graph"], t["called"]]
    return [str(run["tokens"])] + [f"{figure:.1f}" for figure in figures]


def table(runs):
    print("| " + " | ".join(HEADER) + " |")
    print("|" + "--:|" * len(HEADER))
    for run in runs:
        print("| " + " | ".join(row(run)) + " |")


def main():
    with open(sys.argv[1]) as file:
        runs = json.load(file)["runs"]
    for shape in dict.fromkeys((r["shape"], r["hidden"], r["experts"], r["topk"]) for r in runs):
        print(f"\n{shape[0]}: hidden {shape[1]}, top-{shape[3]} of {shape[2]}\n")
        table([r for r in runs if r["shape"] == shape[0]])


if __name__ == "__main__":
    main()
