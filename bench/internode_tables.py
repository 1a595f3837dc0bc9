#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables from the reports that bench/internode.py wrote. As a program: writes them into docs/performance.md, between its markers."""

from tables import TITLES, aligned, markdown, page_main, time_text

BEGIN, END = "<!-- internode tables: begin -->", "<!-- internode tables: end -->"
HEADER = ["operation", "n", "ours median", "p99", "at the put", "over payload", "GB/s", "of iperf3", "CPU: ours user + kernel", "share of cores", "idle", "MPI median",
          "times faster"]

# What MPI does for each of our operations.
MPI_NAMES = {
    "dispatch_fp8": "dispatch_fp8",
    "combine_bf16_in_place": "combine_bf16",
    "combine_bf16_by_node": "combine_bf16",
    "ll_round_trip_fp8_bf16": "ll_round_trip_fp8_bf16",
}


def title(name):
    return {"combine_bf16_in_place": "combine BF16, one reduction", "combine_bf16_by_node": "combine BF16, summed per node"}.get(name, TITLES.get(name, name))


def iperf_rate(report):
    """What iperf3 moved both ways at once, as an exchange does, over as many connections as carry rows: the first that were tried."""
    return report["iperf3"][0]["gb_per_s"]["both_ways"] if report.get("iperf3") else None


def rows_of(report):
    mpi = {op["name"]: op["time"]["median_us"] for op in report.get("mpi", {}).get("operations", [])}
    limit, cores = iperf_rate(report), report["machine"]["cores"]
    for op in report["ours"]["operations"]:
        median, theirs = op["time"]["median_us"], mpi.get(MPI_NAMES[op["name"]])
        user, system = op["user_us_all_ranks"], op["system_us_all_ranks"]
        yield [
            title(op["name"]),
            str(op["time"]["n"]),
            time_text(median),
            time_text(op["time"]["p99_us"]),
            f"{op['put_bytes_all_ranks'] * 1e-6:.1f} MB",
            f"{100 * (op['put_over_payload'] - 1):+.2f} %",
            f"{op['gb_per_s_all_ranks']:.2f}",
            f"{100 * op['gb_per_s_all_ranks'] / limit:.0f} %" if limit else "-",
            f"{user / 1000:.0f} + {system / 1000:.0f} ms",
            f"{100 * (user + system) / op['time']['mean_us'] / cores:.0f} %",
            f"{100 * op['idle_share_of_machine']:.0f} %" if "idle_share_of_machine" in op else "-",
            time_text(theirs),
            f"{theirs / median:.2f}" if theirs else "-",
        ]


def disagreements(report):
    """Operations whose results differ from MPI's: then the two did not make the same exchange."""
    theirs = {op["name"]: op.get("digest") for op in report.get("mpi", {}).get("operations", [])}
    return [op["name"] for op in report["ours"]["operations"]
            if op["name"] != "combine_bf16_by_node" and theirs.get(MPI_NAMES[op["name"]]) not in (None, op["digest"])]


def facts(report):
    info, work = report["machine"], report["ours"]["workload"]
    commit = report["commit"]["id"][:12] + (" with later changes" if report["commit"]["changed_since"] else "")
    lines = [
        f"{info['cpu']}, {info['cores']} cores, kernel {info['kernel']}; {report['date'][:10]}, commit {commit}; load average before the run {report['load_before']:.1f}",
        f"two network namespaces joined by veth and a bridge, {'+'.join(map(str, report['ours']['ranks_per_node']))} ranks as processes, {report['provider']}; "
        f"{work['tokens']} tokens each ({work['ll_tokens']} low latency), hidden {work['hidden']}, top-{work['topk']} of {work['experts']}, {work['routing']}",
    ]
    for run in report.get("iperf3", []):
        rates = run["gb_per_s"]
        which = ", the faster of a run before and one after ours" if run.get("runs", 1) > 1 else ""
        lines.append(f"iperf3, {run['connections']} connections, {run['seconds']} s{which}: {rates['one_way']:.2f} GB/s one way, {rates['both_ways']:.2f} both ways at once, "
                     "added up")
    if "raw" in report:
        raw = report["raw"]["exchange"]
        ours = {op["name"]: op["time"]["median_us"] for op in report["ours"]["operations"]}.get("ll_round_trip_fp8_bf16")
        lines.append(f"low latency: libfabric alone takes {time_text(raw['median_us'])} for the same bytes ({raw['pairs']} pairs at once, {raw['there_bytes']} bytes there and "
                     f"{raw['back_bytes']} back of each rank); the round trip takes {ours / raw['median_us']:.2f} times as long")
    lines.append(f"MPI: {report['mpi']['library'].split(',')[0]}; {report['mpi']['command']}" if "command" in report.get("mpi", {}) else "MPI: not measured")
    if "command" in report.get("mpi", {}):
        differ = disagreements(report)
        lines.append("results differ from MPI's in: " + ", ".join(differ) if differ else "results: dispatch and combine are bit-identical to MPI's")
    return lines


def as_text(report):
    return "\n".join([*facts(report), "", *aligned(HEADER, list(rows_of(report)))])


def as_markdown(file, report):
    return "\n".join([f"### {file.stem}", "", *(f"- {fact}" for fact in facts(report)), "", *markdown(HEADER, rows_of(report)), ""])


if __name__ == "__main__":
    raise SystemExit(page_main(__doc__, "internode_*.json", (BEGIN, END), as_markdown))
