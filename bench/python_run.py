# SPDX-License-Identifier: MIT
"""The Python part of bench/run.py: installs the package into build/python, measures with it, writes its own report beside the other."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import python_tables

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tools"))
import python_env  # noqa: E402

# Beside C++ every operation is measured several times in turn, so each turn needs fewer repetitions.
FEWER = {"--reps": "8", "--ll-reps": "40"}


def measured(python, script, arguments, environment):
    """The report of one of the programs beside this file; None where it failed, which it has said."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        # Away from the tree, so that what is measured is what was installed.
        command = [python, str(HERE / script), "--out", str(out), *arguments]
        ended = subprocess.run(list(map(str, command)), cwd=folder, env={**os.environ, **environment})
        return json.loads(out.read_text()) if ended.returncode == 0 else None


def run(program, options, about, file):
    """`program` is host_exchange, `options` its workload, `about` the facts that both reports share."""
    python = python_env.prepare()
    if python is None:
        print("python: the package did not install, so nothing was measured", flush=True)
        return
    report = {**about, "load_before": os.getloadavg()[0], "niceness": os.nice(0)}
    quick = about["quick"]
    report["overhead"] = measured(
        python, "python_overhead.py", ["--reps", "200"] if quick else [], about["environment"]
    )
    fewer = [word for name, count in FEWER.items() if name not in options for word in (name, count)]
    turns = ["--program", Path(program).resolve(), "--rounds", 1 if quick else 5, "--", *options, *fewer]
    report["exchange"] = measured(python, "python_exchange.py", turns, about["environment"])
    if report["overhead"] is None or report["exchange"] is None:
        raise SystemExit("run.py: the Python part failed, or its results differ from those of the C++ program")
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{python_tables.as_text(report)}\n\nReport: {file}")
