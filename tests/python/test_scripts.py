# SPDX-License-Identifier: MIT
"""The scripts that DeepEP's users know run, shortened, and say how they are used."""

import os
import pathlib
import runpy
import socket
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
SHORT = {
    "test_intranode.py": "--num-processes 2 --num-tokens 16 --hidden 512 --num-experts 16 --num-topk 4 --num-tests 1",
    "test_internode.py": "--num-processes 4 --num-tokens 8 --hidden 512 --num-experts 16 --num-topk 4 --num-tests 1",
    "test_low_latency.py": "--num-processes 2 --num-tokens 16 --hidden 512 --num-experts 8 --num-topk 4 --num-tests 1",
    "test_inference.py": "--num-processes 2 --batch_size 8 --hidden_size 512 --num-experts 8 --num-tests 3",
    "test_fp8.py": "--num-processes 2 --num-tokens 16 --hidden 512 --num-experts 8 --num-tests 1",
}


def run(script, *arguments):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "1", "RANK": "0"}
    ended = subprocess.run(
        [sys.executable, str(TESTS / script), *arguments], capture_output=True, text=True, timeout=200, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize("script", SHORT)
def test_scripts_run(script):
    assert "us" in run(script, *SHORT[script].split())


@pytest.mark.parametrize("script", SHORT)
def test_scripts_explain_themselves(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TESTS / script), run_name="__main__")
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "--num-processes" in said and said.count("(default: ") >= 7


@pytest.mark.parametrize("wrong, says", [("--num-experts 7", "no multiple of"), ("--num-topk 300", "more than")])
@pytest.mark.parametrize("script", SHORT)
def test_scripts_say_what_is_wrong_with_their_arguments(script, wrong, says, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setattr(sys, "argv", [script, *wrong.split()])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TESTS / script), run_name="__main__")
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_a_small_model_learns_alike_on_several_ranks_and_on_one(tmp_path):
    printed = run(
        "../examples/train_moe.py",
        *"--num-processes 2 --steps 8 --batch 8 --length 32 --width 32 --experts 4 --layers 1 --out".split(),
        str(tmp_path),
    )
    assert "the curves differ by" in printed and (tmp_path / "2_ranks.json").exists()


@pytest.mark.parametrize("content, says", [(None, "No such file"), ("", "at least --length"), ("short", "has 5")])
def test_training_says_what_is_wrong_with_a_text(content, says, tmp_path, monkeypatch, capsys):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_text(content)
    monkeypatch.setattr(sys, "argv", ["train_moe.py", "--file", str(file), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TESTS.parent / "examples" / "train_moe.py"), run_name="__main__")
    assert ended.value.code == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
