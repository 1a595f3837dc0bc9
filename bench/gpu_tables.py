#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables and plots from the reports of the GPU benchmarks. As a program: writes them into docs/performance.md, between its markers.

Reports are bench/results/cuda_exchange_*.json (bench/cuda_exchange.cpp) and nccl_exchange_*.json (bench/nccl_exchange.py). Plots, with --plots, need
matplotlib and go to docs/pictures.
"""
import argparse
import json
from itertools import groupby
from pathlib import Path

from tables import ROOT, markdown, update_page

PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- gpu tables: begin -->", "<!-- gpu tables: end -->"
OPERATIONS = {
    "dispatch_bf16": "dispatch BF16",
    "dispatch_fp8": "dispatch FP8",
    "combine_bf16": "combine BF16",
    "dispatch_bf16_counted": "dispatch BF16, counted first",
    "dispatch_fp8_counted": "dispatch FP8, counted first",
}


def setting(run):
    """What is alike in all lines of one table."""
    return run["tokens"], run["routing"], run["layout"]


def tables_of(report):
    for (tokens, routing, layout), runs in groupby(report["runs"], key=setting):
        runs = list(runs)
        names = [name for name in OPERATIONS if name in runs[0]["operations"]]
        header = ["SMs per rank"]
        for name in names:
            header += [OPERATIONS[name], "p99", "of limit"]
        rows = []
        for run in runs:
            row = [str(run["sms"])]
            for name in names:
                op = run["operations"][name]
                row += [f"{op['time']['median_us']:.0f}", f"{op['time']['p99_us']:.0f}", f"{100 * op['of_limit']:.0f} %"]
            rows.append(row)
        yield f"{tokens} tokens per rank, routing {routing}, output {layout.replace('_', ' ')}, microseconds:", header, rows


def nccl_rows(report):
    for result in report["results"]:
        yield [str(result["tokens"]), "rank" if result["copies"] == "rank" else "selection",
               *(f"{result[name]['median_us']:.0f}" for name in ("dispatch_counted", "dispatch_known", "combine"))]


def facts(report):
    where = f"{report['gpus']} x {report['gpu']}, {report['ranks']} ranks as {report['ranks_are']}"
    return (f"{where}; hidden {report['hidden']}, top-{report['topk']} of {report['experts']}; {report['reps']} repetitions; commit "
            f"{report['commit'][:12] or 'unknown'}. Clock: {report['clock']}.")


def as_markdown(results, pictures):
    lines = []
    for file in sorted(results.glob("cuda_exchange_*.json")):
        report = json.loads(file.read_text())
        lines += [f"### {file.stem}", "", facts(report), ""]
        if (pictures / f"{file.stem}.svg").is_file():
            lines += [f"![time against SMs, with the limit](pictures/{file.stem}.svg)", ""]
        for title, header, rows in tables_of(report):
            lines += [title, "", *markdown(header, rows), ""]
    for file in sorted(results.glob("nccl_exchange_*.json")):
        report = json.loads(file.read_text())
        lines += [f"### {file.stem}", "",
                  f"{report['what']}; {report['ranks']} x {report['gpu']}, NCCL {report['nccl']}, torch {report['torch']}, {report['date']}, hidden "
                  f"{report['hidden']}, top-{report['topk']} of {report['experts']}, BF16, microseconds:", "",
                  *markdown(["tokens per rank", "a row per", "dispatch, counts exchanged", "dispatch, counts known", "combine"], nccl_rows(report)), ""]
    return "\n".join(lines)


def plot(file, pictures):
    """Time against SMs, measured and limit, of the report's first setting."""
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "deep_ep"  # the same report gives the same file
    from matplotlib import pyplot, ticker

    report = json.loads(file.read_text())
    runs = [run for run in report["runs"] if setting(run) == setting(report["runs"][0])]
    sms = [run["sms"] for run in runs]
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, colour in zip(("dispatch_bf16", "dispatch_fp8", "combine_bf16"), ("tab:blue", "tab:green", "tab:red")):
        if any(name not in run["operations"] for run in runs):
            continue
        ops = [run["operations"][name] for run in runs]
        axes.plot(sms, [op["time"]["median_us"] for op in ops], "o-", color=colour, label=OPERATIONS[name])
        axes.plot(sms, [op["limit"]["us"] for op in ops], "--", color=colour, label="its limit")
    axes.set(xscale="log", yscale="log", xlabel="SMs per rank", ylabel="microseconds",
             title=f"{report['gpus']} x {report['gpu']}, {report['ranks']} ranks, {runs[0]['tokens']} tokens each")
    axes.set_xticks(sms, [str(n) for n in sms])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    for of_axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        of_axis(ticker.ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncol=3)
    pictures.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(pictures / f"{file.stem}.svg", metadata={"Date": None})
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder with the reports")
    parser.add_argument("--plots", action="store_true", help="draw the plots anew (needs matplotlib)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page does not match the reports")
    args = parser.parse_args()
    if args.plots:
        for file in sorted(args.results.glob("cuda_exchange_*.json")):
            plot(file, PICTURES)
    return 0 if update_page(BEGIN, END, as_markdown(args.results, PICTURES), args.check) else 1


if __name__ == "__main__":
    raise SystemExit(main())
