#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables from the reports that bench/run.py wrote. As a program: writes them into docs/performance.md, between its markers."""
import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"

TITLES = {
    "dispatch_bf16": "dispatch BF16",
    "dispatch_bf16_cached": "dispatch BF16, cached handle",
    "dispatch_fp8": "dispatch FP8",
    "dispatch_fp8_cached": "dispatch FP8, cached handle",
    "combine_bf16_in_place": "combine BF16, in place",
    "combine_bf16_staged": "combine BF16, staged",
    "ll_dispatch_bf16": "low latency: dispatch BF16",
    "ll_dispatch_fp8": "low latency: dispatch FP8",
    "ll_dispatch_fp8_columns": "low latency: dispatch FP8, scales by column",
    "ll_combine_bf16_in_place": "low latency: combine BF16, in place",
    "ll_combine_bf16_staged": "low latency: combine BF16, staged",
    "ll_round_trip_fp8_bf16": "low latency: FP8 there, BF16 back",
}
HEADER = ["operation", "n", "ours median", "p99", "limit", "limit / ours", "no protocol", "MPI median", "times faster"]
MEMORY_HEADER = ["rank", "plan", "window in use", "private", "together / plan", "process peak"]


def mpi_name(name):
    """MPI has one combine: it cannot read a peer's memory in place. Its scales come row by row."""
    return re.sub(r"(combine_bf16|ll_dispatch_fp8)_(in_place|staged|columns)$", r"\1", name)


def limit_us(op):
    """The least time by the machine's own measure: copying the bytes, or for FP8 quantising them, whichever takes longer."""
    if "limit" not in op:
        return None
    copying = op["limit"]["predicted_us"]
    return max(copying, op["bound"]["time"]["median_us"]) if "bound" in op else copying


def limit_text(op):
    if "limit" not in op:
        return "-"
    longer = "bound" in op and op["bound"]["time"]["median_us"] > op["limit"]["predicted_us"]
    return f"{time_text(limit_us(op))} ({op['bound']['name'] if longer else 'memcpy'})"


def time_text(us):
    if us is None:
        return "-"
    return f"{us / 1000:.1f} ms" if us >= 10000 else f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.0f} us"


def rows_of(report):
    mpi = {op["name"]: op["time"]["median_us"] for op in report["mpi"].get("operations", [])}
    for op in report["ours"].get("operations", []):
        ours, limit, theirs = op["time"]["median_us"], limit_us(op), mpi.get(mpi_name(op["name"]))
        yield [
            TITLES.get(op["name"], op["name"]),
            str(op["time"]["n"]),
            time_text(ours),
            time_text(op["time"]["p99_us"]),
            limit_text(op),
            f"{100 * limit / ours:.0f} %" if limit else "-",
            time_text(op["bare"]["median_us"]) if "bare" in op else "-",
            time_text(theirs),
            f"{theirs / ours:.2f}" if theirs else "-",
        ]


def memory_rows(report):
    memory = report["ours"]["memory"]
    for rank, used in enumerate(memory["ranks"]):
        together = used["window_bytes"] + used["private_bytes"]
        yield [
            str(rank),
            mib(memory["plan_bytes"]),
            mib(used["window_bytes"]),
            mib(used["private_bytes"]),
            f"{100 * together / memory['plan_bytes']:.1f} %",
            mib(used["process_peak_bytes"]),
        ]


def mib(count):
    return f"{count / 2**20:.1f} MiB"


def facts(report):
    """One line for each thing that a reader needs to judge the figures."""
    info, work = report["machine"], report["ours"]["workload"]
    commit = report["commit"]["id"][:12] + (" with later changes" if report["commit"]["changed_since"] else "")
    lines = [
        f"{info['cpu']}, {info['cores']} cores, {info['memory_bytes'] / 2**30:.0f} GiB, {info['system']}, kernel {info['kernel']}; "
        f"{report['date'][:10]}, commit {commit}",
        f"{work['ranks']} ranks as processes, {work['tokens']} tokens each ({work['ll_tokens']} low latency), hidden {work['hidden']}, "
        f"top-{work['topk']} of {work['experts']}, {work['routing']}, seed {work['seed']}; row arithmetic: {report['ours']['isa']}",
        f"clock: {report['ours']['clock']}",
    ]
    rates = [op["limit"]["gb_per_s"] for op in report["ours"].get("operations", []) if "limit" in op and not op["name"].startswith("ll_")]
    if rates:
        lines.append(f"memcpy limit: {min(rates):.1f} to {max(rates):.1f} GB/s read and written by all ranks together, measured beside each call")
    if "command" in report["mpi"]:
        lines.append(f"MPI: {report['mpi']['library'].split(',')[0]}; {report['mpi']['command']}")
    else:
        lines.append(f"MPI: {report['mpi'].get('missing', 'no report')}")
    lines.append(f"load average of the machine before the run: {report['load_before']:.1f}, niceness of the run: {report['niceness']}")
    checked = [op["name"] for op in report["mpi"].get("operations", []) if op.get("digest")]
    if checked and not report["disagree"]:
        lines.append("results: bit-identical to MPI's in every operation that both make")
    if report["disagree"]:
        lines.append("results differ from MPI's in: " + ", ".join(report["disagree"]))
    if report["quick"]:
        lines.append("QUICK run with small shapes: these figures mean nothing")
    return lines


def aligned(header, rows):
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        yield "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths)))


def markdown(header, rows):
    yield "| " + " | ".join(header) + " |"
    yield "|---|" + "--:|" * (len(header) - 1)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def as_text(report):
    lines = [*facts(report), "", *aligned(HEADER, list(rows_of(report))), "", *aligned(MEMORY_HEADER, list(memory_rows(report)))]
    return "\n".join(lines)


def as_markdown(file, report):
    lines = [f"### {file.stem}", "", *(f"- {fact}" for fact in facts(report)), ""]
    lines += [*markdown(HEADER, rows_of(report)), "", *markdown(MEMORY_HEADER, memory_rows(report)), ""]
    return "\n".join(lines)


def update_page(begin, end, body, check=False, page=PAGE):
    """Puts `body` between two markers of a page. With `check` nothing is written; False where the page says something else."""
    text = page.read_text()
    head, rest = text.split(begin, 1)
    wanted = f"{head}{begin}\n{body}{end}{rest.split(end, 1)[1]}"
    if not check:
        page.write_text(wanted)
    return not check or wanted == text


def page_main(description, pattern, markers, section):
    """The program of a tables module: section(file, report) of every report whose name matches `pattern` goes between the
    `markers` of the page. Returns the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help=f"folder with the reports, {pattern}")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page does not match the reports")
    args = parser.parse_args()
    body = "\n".join(section(file, json.loads(file.read_text())) for file in sorted(args.results.glob(pattern)))
    return 0 if update_page(*markers, body, args.check) else 1


if __name__ == "__main__":
    raise SystemExit(page_main(__doc__, "host_*.json", (BEGIN, END), as_markdown))
