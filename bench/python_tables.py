#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Tables of what bench/python_overhead.py and bench/python_exchange.py measured. As a program: writes them into docs/performance.md,
between its Python markers, from the reports python_*.json that bench/run.py made."""


from tables import TITLES, aligned, markdown, page_main, time_text

BEGIN, END = "<!-- python tables: begin -->", "<!-- python tables: end -->"
OVERHEAD_HEADER = ["call", "median", "p99", "the extension's call beneath", "goal"]
EXCHANGE_HEADER = ["operation", "C++ median", "Python median", "Python / C++", "gloo median", "gloo / Python"]


def us(value):
    return f"{value:.1f} us"


def overhead_rows(part, goal):
    yield ["bare nanobind call", f"{part['bare']['median_us']:.2f} us", f"{part['bare']['p99_us']:.2f} us", "-", "-"]
    for call in part["calls"]:
        beneath = us(call["beneath"]["median_us"]) if "beneath" in call else "-"
        wanted = f"{goal:.0f} us" if call["name"].startswith("low_latency") else "-"
        yield [call["name"], us(call["time"]["median_us"]), us(call["time"]["p99_us"]), beneath, wanted]


def exchange_rows(report):
    cpp = {each["name"]: each["time"]["median_us"] for each in report["cpp"]}
    gloo = {each["name"]: each["time"]["median_us"] for each in report["gloo"]}
    gloo["combine_bf16_staged"] = gloo.get("combine_bf16")
    for each in report["package"]:
        name, ours = each["name"], each["time"]["median_us"]
        there, other = cpp.get(name), gloo.get(name)
        yield [
            TITLES.get(name, name),
            time_text(there),
            time_text(ours),
            f"{ours / there:.2f}" if there else "-",
            time_text(other),
            f"{other / ours:.1f}" if other else "-",
        ]


def titled_shapes(report):
    for part in report["shapes"]:
        shape = part["shape"]
        yield f"hidden {shape['hidden']}, top-{shape['topk']} of {shape['experts']}", part


def exchange_facts(report):
    work = report["workload"]
    yield (
        f"{work['ranks']} ranks as processes, {work['tokens']} tokens each ({work['ll_tokens']} low latency), hidden {work['hidden']}, "
        f"top-{work['topk']} of {work['experts']}; medians of {report['rounds']} turns of C++ and Python"
    )
    differ = ", ".join(report["differ"])
    yield (
        f"results differ from C++'s in: {differ}"
        if differ
        else "results: bit-identical to those of the C++ program, gloo's too"
    )


def machine_facts(report):
    machine = report["machine"]
    yield (
        f"{machine['cpu']}, {machine['cores']} cores; {report['date'][:10]}, commit {report['commit']['id'][:12]}"
        f"{' with changes' if report['commit']['changed_since'] else ''}; Python {report['overhead']['python']}, torch {report['overhead']['torch']}"
    )
    yield f"load average before the run: {report['load_before']:.1f}, niceness of the run: {report['niceness']}"
    if "note" in report:
        yield report["note"]
    if report["quick"]:
        yield "QUICK run with small shapes: these figures mean nothing"


def overhead_text(report):
    lines = []
    for title, part in titled_shapes(report):
        lines += [title, *aligned(OVERHEAD_HEADER, list(overhead_rows(part, report["goal_us"]))), ""]
    return "\n".join(lines)


def as_text(report):
    exchange = report["exchange"]
    lines = [*machine_facts(report), "", overhead_text(report["overhead"]), *exchange_facts(exchange), ""]
    return "\n".join([*lines, *aligned(EXCHANGE_HEADER, list(exchange_rows(exchange)))])


def as_markdown(file, report):
    lines = [f"### {file.stem}", "", *(f"- {fact}" for fact in machine_facts(report)), ""]
    for title, part in titled_shapes(report["overhead"]):
        lines += [f"One token, one rank, {title}:", ""]
        lines += [*markdown(OVERHEAD_HEADER, overhead_rows(part, report["overhead"]["goal_us"])), ""]
    exchange = report["exchange"]
    lines += [*(f"- {fact}" for fact in exchange_facts(exchange)), ""]
    return "\n".join([*lines, *markdown(EXCHANGE_HEADER, exchange_rows(exchange)), ""])


if __name__ == "__main__":
    raise SystemExit(page_main(__doc__, "python_*.json", (BEGIN, END), as_markdown))
