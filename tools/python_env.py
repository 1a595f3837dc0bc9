# SPDX-License-Identifier: MIT
"""The environment build/python, with torch and this tree's package installed as a user would install it; and frameworks that
call the package, each of one version, without what they depend on, in a folder of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "python"
TORCH = "torch==2.13.0"
MPI4PY = "mpi4py>=4.1"  # from this version on its wheels find the machine's MPI when they are loaded

# Packages that vLLM and SGLang import.
_SERVING = """
    aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 annotated-types==0.8.0 anyio==4.16.0 attrs==26.1.0
    certifi==2026.10.18 charset-normalizer==3.5.2 dill==0.4.1 einops==0.8.2 frozenlist==1.8.0 h11==0.16.0
    httpcore2==2.16.2 httpx2==2.16.2 huggingface_hub==2.4.0 idna==3.20 msgspec==0.22.0 multidict==7.2.1 numpy==2.3.5
    orjson==3.13.0 propcache==0.5.4 psutil==7.2.2 pybase64==1.5.1 pydantic==2.14.3 pydantic_core==2.50.4
    PyYAML==6.0.3 pyzmq==27.3.0 regex==2026.11.15 requests==2.34.2 safetensors==0.8.0 sniffio==1.3.1
    starlette==1.10.0 tokenizers==0.23.3 tqdm==4.70.1 transformers==5.19.0 triton==3.6.0 truststore==0.10.5
    typing-inspection==0.4.5 urllib3==2.8.0 yarl==1.25.1
""".split()
_VLLM = """
    annotated-doc==0.0.7 cachetools==8.0.1 cbor2==6.3.0 cloudpickle==3.1.2 distro==1.9.0 fastapi==0.136.3
    jiter==0.19.0 llguidance==1.9.1 openai-harmony==0.0.8 openai==3.54.0 partial-json-parser==0.2.1.1.post7
    prometheus_client==0.26.0 py-cpuinfo==9.0.0 xxhash==4.1.0
""".split()
# What pip gets for each framework of tests/frameworks: its own package and those that the modules under test import.
FRAMEWORKS = {
    "megatron": ("megatron-core==0.16.1",),
    "vllm": ("vllm==0.33.0", *_SERVING, *_VLLM),
    "sglang": ("sglang==0.5.23", *_SERVING, "compressed-tensors==0.18.0", "gguf==0.19.0", "loguru==0.7.3"),
    "lmdeploy": ("lmdeploy==0.18.0",),
}
SMALL_FRAMEWORKS = ("megatron",)  # a download of some megabytes: `make test` runs their tests too


def run(*command):
    print("+", " ".join(map(str, command)), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode == 0


def prepare():
    """The interpreter; None where something could not be installed, which pip has said by then."""
    python = HOME / "bin" / "python"
    made = python.exists() or run(sys.executable, "-m", "venv", HOME)
    # Where nvcc is but no GPU, its kernels would be compiled for nothing: the preset `cuda` compiles them in the tests.
    no_gpu = () if shutil.which("nvidia-smi") else ("-C", "cmake.define.DEEP_EP_CUDA=OFF")
    if not (made and run(python, "-m", "pip", "install", "-q", *no_gpu, TORCH, ".[test]")):
        return None
    if shutil.which("mpirun"):
        run(python, "-m", "pip", "install", "-q", MPI4PY)  # without it a test is skipped and says so
    return python


def install_framework(python, name):
    """The folder to put into PYTHONPATH; None where pip could not install it, which it has said by then."""
    folder, packages = ROOT / "build" / "frameworks" / name, FRAMEWORKS[name]
    installed = folder / "installed.txt"
    if installed.is_file() and installed.read_text().split() == list(packages):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    if not run(python, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, *packages):
        return None
    installed.write_text("\n".join(packages) + "\n")
    return folder
