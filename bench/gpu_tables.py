#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables and plots from the reports of the GPU benchmarks. As a program: writes them into docs/performance.md, and a few lines of them into README.md, between markers.

Reports are bench/results/cuda_exchange_*.json (bench/cuda_exchange.cpp), cuda_low_latency_*.json (bench/cuda_low_latency.cpp) and nccl_exchange_*.json
(bench/nccl_exchange.py). Plots, with --plots, need matplotlib and go to docs/pictures.
"""
import argparse
import json
from itertools import groupby
from pathlib import Path

from tables import ROOT, markdown, update_page

PICTURES = ROOT / "docs" / "pictures"
BEGIN, END = "<!-- gpu tables: begin -->", "<!-- gpu tables: end -->"
SUMMARY_BEGIN, SUMMARY_END = "<!-- gpu summary: begin -->", "<!-- gpu summary: end -->"
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


def pair_rows(pairs):
    for rank, row in enumerate(pairs["gb_per_s"]):
        yield [f"from rank {rank}", *(f"{gb:.0f}" for gb in row)]


def nccl_rows(report):
    for result in report["results"]:
        yield [str(result["tokens"]), "rank" if result["copies"] == "rank" else "selection",
               *(f"{result[name]['median_us']:.0f}" for name in ("dispatch_counted", "dispatch_known", "combine"))]


# Low latency: each operation's columns, and how they are made from what a run says of it.
def typical(time):
    name = "us" if "us" in time else "graph"
    return f"{time[name]:.1f} ({time.get('p99', time.get('graph_p99')):.1f})"


LATENCY_OPERATIONS = {"dispatch": "dispatch FP8", "combine": "combine", "pre_reduced": "pre-reduced", "round_trip": "round trip",
                      "round_trip_pre_reduced": "round trip, pre-reduced"}
LATENCY_COLUMNS = {
    "floor": ("floor", lambda time: f"{time['floor']:.1f}"),
    "send": ("send + recv", lambda time: f"{time['send']:.1f} + {time['recv']:.1f}"),
    "called": ("called", lambda time: f"{time['called']:.1f}"),
    "logfmt10": ("LogFMT-10", lambda time: f"{time['logfmt10']:.1f}"),
    "fp8": ("FP8", lambda time: f"{time['fp8']:.1f}"),
}


def latency_columns(run):
    for operation, title in LATENCY_OPERATIONS.items():
        if operation not in run:
            continue
        yield operation, f"{title} (p99)", typical
        for field, (name, text) in LATENCY_COLUMNS.items():
            if field in run[operation]:
                yield operation, name, text


def latency_shape(run):
    return run["shape"], run["hidden"], run["topk"], run["experts"], run.get("routing", "uniform")


def latency_tables(report):
    for (shape, hidden, topk, experts, routing), runs in groupby(sorted(report["runs"], key=latency_shape), key=latency_shape):
        runs = list(runs)
        columns = list(latency_columns(runs[0]))
        rows = [[str(run["tokens"]), *(text(run[operation]) for operation, _, text in columns)] for run in runs]
        yield f"{shape}: hidden {hidden}, top-{topk} of {experts}, routing {routing}, microseconds:", ["tokens", *(title for _, title, _ in columns)], rows


def place(report):
    ranks_are = f" as {report['ranks_are']}" if "ranks_are" in report else ""
    return f"{report['gpus']} x {report['gpu']}, {report['ranks']} ranks{ranks_are}"


def facts(report):
    return (f"{place(report)}; hidden {report['hidden']}, top-{report['topk']} of {report['experts']}; {report['reps']} repetitions; commit "
            f"{report['commit'][:12] or 'unknown'}. Clock: {report['clock']}.")


def latency_facts(report):
    text = (f"{place(report)}, {report['sms_of_rank']} SMs each; {report['calls_in_graph']} calls in a graph, median of {report['graphs']} graphs; commit "
            f"{report.get('commit', '')[:12] or 'unknown'}. An empty kernel in a graph takes {report['launch_in_graph_us']:.2f} us, a signal "
            f"{report['signal_us']:.2f}, copies reach {report['copy_gb_per_s']:.0f} GB/s")
    if "local_gb_per_s" in report:
        text += f" to the next rank, {report['local_gb_per_s']:.0f} GB/s nearby"
    if report.get("overlap"):
        text += (f". A kernel that fills all SMs takes {report['overlap']['grind_alone_us']:.0f} us alone, "
                 f"{report['overlap']['grind_between_send_and_receive_us']:.0f} between send and receive")
    return text + "."


def reports(results, kind):
    for file in sorted(results.glob(f"{kind}_*.json")):
        yield file.stem, json.loads(file.read_text())


def picture(stem, pictures, title):
    return [f"![{title}](pictures/{stem}.svg)", ""] if (pictures / f"{stem}.svg").is_file() else []


def as_markdown(results, pictures):
    lines = []
    for stem, report in reports(results, "cuda_exchange"):
        lines += [f"### {stem}", "", facts(report), "", *picture(stem, pictures, "time against SMs, with the limit")]
        if "pairs" in report:
            lines += [f"Copies from one rank to one other, alone, with {report['pairs']['sms']} SMs, GB/s:", "",
                      *markdown(["", *(f"to rank {rank}" for rank in range(report["ranks"]))], pair_rows(report["pairs"])), ""]
        for title, header, rows in tables_of(report):
            lines += [title, "", *markdown(header, rows), ""]
    for stem, report in reports(results, "cuda_low_latency"):
        lines += [f"### {stem}", "", latency_facts(report), "", *picture(stem, pictures, "latency against tokens, with the floor")]
        for title, header, rows in latency_tables(report):
            lines += [title, "", *markdown(header, rows), ""]
    for stem, report in reports(results, "nccl_exchange"):
        lines += [f"### {stem}", "",
                  f"{report['what']}; {report['ranks']} x {report['gpu']}, NCCL {report['nccl']}, torch {report['torch']}, {report['date']}, hidden "
                  f"{report['hidden']}, top-{report['topk']} of {report['experts']}, BF16, microseconds:", "",
                  *markdown(["tokens per rank", "a row per", "dispatch, counts exchanged", "dispatch, counts known", "combine"], nccl_rows(report)), ""]
    return "\n".join(lines)


def summary(results):
    """What README.md tells of two GPUs joined by NVLink: the first setting of either report."""
    throughput, latency = (json.loads((results / f"{kind}_2xh200.json").read_text()) for kind in ("cuda_exchange", "cuda_low_latency"))
    runs = {run["sms"]: run["operations"] for run in throughput["runs"] if setting(run) == setting(throughput["runs"][0])}
    sms, names = (8, 16, 24), ("dispatch_bf16", "dispatch_fp8", "combine_bf16")
    times = [[OPERATIONS[name], *(f"{runs[n][name]['time']['median_us']:.0f}" for n in sms)] for name in names]
    calls = {run["tokens"]: run for run in latency["runs"] if latency_shape(run) == latency_shape(latency["runs"][0])}
    tokens, forms = (4, 32, 128), {"dispatch": "dispatch FP8", "combine": "combine BF16", "pre_reduced": "combine BF16, joined by rank first"}
    low = [[title, *(f"{calls[n][name]['us']:.1f}" for n in tokens)] for name, title in forms.items()]
    return "\n".join([*markdown([f"{throughput['runs'][0]['tokens']} tokens, cached handle", *(f"{n} SMs" for n in sms)], times), "",
                      *markdown(["low latency, in a graph", *(f"{n} tokens" for n in tokens)], low), ""])


def measured_and_limit(axes, x, name, measured, limit, colour):
    axes.plot(x, measured, "o-", color=colour, label=name)
    axes.plot(x, limit, "--", color=colour, label="its limit")


def draw_throughput(report, axes):
    """Time against SMs, measured and limit, of the report's first setting."""
    runs = [run for run in report["runs"] if setting(run) == setting(report["runs"][0])]
    sms = [run["sms"] for run in runs]
    for name, colour in zip(("dispatch_bf16", "dispatch_fp8", "combine_bf16"), COLOURS):
        if any(name not in run["operations"] for run in runs):
            continue
        ops = [run["operations"][name] for run in runs]
        measured_and_limit(axes, sms, OPERATIONS[name], [op["time"]["median_us"] for op in ops], [op["limit"]["us"] for op in ops], colour)
    axes.set(xlabel="SMs per rank", title=f"{place(report)}, {runs[0]['tokens']} tokens each")
    return sms


def draw_latency(report, axes):
    """Time against tokens, measured and floor, of the report's first shape."""
    runs = [run for run in report["runs"] if latency_shape(run) == latency_shape(report["runs"][0])]
    tokens = [run["tokens"] for run in runs]
    for (name, title), colour in zip({"dispatch": "dispatch FP8", "combine": "combine", "pre_reduced": "combine, pre-reduced"}.items(), COLOURS):
        measured_and_limit(axes, tokens, title, [run[name]["us"] for run in runs], [run[name]["floor"] for run in runs], colour)
    axes.set(xlabel="tokens per rank", title=f"low latency, {place(report)}")
    return tokens


COLOURS = ("tab:blue", "tab:green", "tab:red")
PLOTS = {"cuda_exchange": draw_throughput, "cuda_low_latency": draw_latency}


def plot(stem, report, draw, pictures):
    import matplotlib
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "deep_ep"  # the same report gives the same file
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(7, 4))
    x = draw(report, axes)
    axes.set(xscale="log", yscale="log", ylabel="microseconds")
    axes.set_xticks(x, [str(n) for n in x])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    for of_axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        of_axis(ticker.ScalarFormatter())
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncol=3)
    pictures.mkdir(exist_ok=True)
    figure.tight_layout()
    figure.savefig(pictures / f"{stem}.svg", metadata={"Date": None})
    pyplot.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="folder with the reports")
    parser.add_argument("--plots", action="store_true", help="draw the plots anew (needs matplotlib)")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page does not match the reports")
    args = parser.parse_args()
    if args.plots:
        for kind, draw in PLOTS.items():
            for stem, report in reports(args.results, kind):
                plot(stem, report, draw, PICTURES)
    same = update_page(BEGIN, END, as_markdown(args.results, PICTURES), args.check)
    same &= update_page(SUMMARY_BEGIN, SUMMARY_END, summary(args.results), args.check, ROOT / "README.md")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
