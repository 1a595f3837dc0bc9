# SPDX-License-Identifier: MIT
"""`python -m deep_ep`: what it says, in lines and as JSON, and that it notices wrong values and failures."""

import json
import os
import subprocess
import sys
from typing import Any

import deep_ep
import pytest
import torch
from deep_ep import _core, doctor


def run(*options: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deep_ep", *options],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_it_lists_the_machine_and_checks_exchanges() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"deep_ep   {deep_ep.__version__}"
    assert [line for line in lines if line.startswith("check     two ranks on the CPU: every bit is right")]
    machine = _core.inspect_machine()
    for sentence in machine.missing:
        assert f"missing   {sentence}" in lines
    assert bool(machine.interfaces) == any("check     two nodes over " in line for line in lines)


def test_json_has_the_same_facts() -> None:
    done = run("--json", "--no-checks")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    machine = _core.inspect_machine()
    assert report["version"] == deep_ep.__version__ and report["torch"] == torch.__version__
    assert report["missing"] == machine.missing and report["checks"] == []
    assert [gpu["name"] for gpu in report["gpus"]] == [gpu.name for gpu in machine.gpus]
    assert [way["name"] for way in report["interfaces"]] == [way.name for way in machine.interfaces]


def test_a_malformed_environment_variable_is_named() -> None:
    done = run(EP_HOST_ISA="v9")
    assert done.returncode == 2
    assert "EP_HOST_ISA: 'v9'" in done.stderr and "Traceback" not in done.stderr


def test_wrong_values_and_failures_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._on_two_ranks(["cpu", "cpu"]) is None
    combine = doctor.ElasticBuffer.combine

    def wrong(self: Any, x: torch.Tensor, *args: Any, **more: Any) -> Any:
        y, *rest = combine(self, x, *args, **more)
        y[3, 5] += 1
        return (y, *rest)

    monkeypatch.setattr(doctor.ElasticBuffer, "combine", wrong)
    assert doctor._on_two_ranks(["cpu", "cpu"]) == f"1 of {doctor._TOKENS * doctor._HIDDEN} values are wrong"

    def failing(*args: Any, **more: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(doctor.ElasticBuffer, "dispatch", failing)
    (check, *_) = doctor.checks(_core.inspect_machine())
    assert check.name == "two ranks on the CPU" and check.problem == "no such luck"


@pytest.mark.skipif(not (_core.has_cuda() and torch.cuda.is_available()), reason="needs a GPU")
def test_every_gpu_is_checked() -> None:
    machine = _core.inspect_machine()
    done = list(doctor.checks(machine))
    assert [check for check in done if check.problem] == []
    names = [check.name for check in done]
    assert [f"two ranks on GPU {gpu.device}" in names for gpu in machine.gpus] == [True] * torch.cuda.device_count()
