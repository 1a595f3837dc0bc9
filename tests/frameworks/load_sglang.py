# SPDX-License-Identifier: MIT
"""Imports SGLang where there is no GPU. Its files are as in the wheel; all that differs from a GPU is said here."""

import os
import types

os.environ["TRITON_INTERPRET"] = "1"  # its Triton kernels are run by Triton's interpreter, on CPU tensors

import torch  # noqa: E402

import stand_ins  # noqa: E402

# A notebook's display, bindings of compiled all-reduces and a tokenizer, which other parts of SGLang import.
stand_ins.stand_in_for("IPython", "tvm_ffi", "sentencepiece")

import sglang  # noqa: E402, F401

# Pictures, for configurations of models that see. Only now: transformers, loaded by now, asks whether it is installed.
stand_ins.stand_in_for("torchvision")

import numpy as np  # noqa: E402
import sglang.srt.layers.moe.token_dispatcher.deepep  # noqa: E402, F401
import sglang.srt.layers.moe.token_dispatcher.deepep_v2  # noqa: E402, F401
import triton.language as tl  # noqa: E402
from sglang.kernels.ops.moe import ep_moe_kernels  # noqa: E402
from sglang.kernels.ops.quantization import fp8_kernel  # noqa: E402
from sglang.srt.layers import deep_gemm_wrapper  # noqa: E402
from sglang.srt.layers.moe.moe_runner import deep_gemm  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

# As with DeepGEMM installed on a Hopper GPU. Its GEMMs are the only part of the layer that the tests write themselves.
deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM = True
# Lists come to the "GPU" by the path that needs no pinned memory.
deep_gemm.get_offloader = lambda: types.SimpleNamespace(forbid_copy_engine_usage=True)
deep_gemm.copy_list_to_gpu_no_ce = lambda numbers: torch.tensor(numbers, dtype=torch.int32)


def _quantise(x, x_q, x_s, group_size, eps, fp8_min, fp8_max, **options):
    """The CUDA kernel that quantises groups of a row, in torch."""
    groups = x.float().unflatten(-1, (-1, group_size))
    scales = groups.abs().amax(dim=-1).clamp(min=eps) / fp8_max
    x_s.copy_(scales)
    x_q.copy_((groups / scales[..., None]).clamp(fp8_min, fp8_max).flatten(-2).to(x_q.dtype))


fp8_kernel._run_per_token_group_quant_8bit_kernel = _quantise


def _tensors(*bounds, **options):
    """A kernel's range. Triton's interpreter counts by Python's numbers, SGLang's kernels take them for tensors."""
    for i in range(*bounds):
        yield tl.tensor(interpreter.TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)


def _patch_language(function, patch=interpreter._patch_lang):
    scope = patch(function)
    scope.set_attr(tl, "range", _tensors)
    return scope


interpreter._patch_lang = _patch_language
ep_moe_kernels.range = _tensors
