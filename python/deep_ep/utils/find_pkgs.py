# SPDX-License-Identifier: MIT
"""Where other packages lie. DeepEP looks for NCCL and NVSHMEM; this library needs neither."""

import importlib.util
import os
from typing import Optional


def find_package_root(name: str) -> Optional[str]:
    """Folder of an importable package, or None."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(iter(spec.submodule_search_locations))


def find_cuda_home() -> Optional[str]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            return os.environ[variable]
    return "/usr/local/cuda" if os.path.isdir("/usr/local/cuda") else None


def find_nccl_root() -> Optional[str]:
    return os.environ.get("EP_NCCL_ROOT_DIR") or os.environ.get("NCCL_DIR") or find_package_root("nvidia.nccl")


def find_nvshmem_root() -> Optional[str]:
    return os.environ.get("EP_NVSHMEM_ROOT_DIR") or os.environ.get("NVSHMEM_DIR")
