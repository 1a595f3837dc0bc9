# SPDX-License-Identifier: MIT
"""Imports vLLM where there is no GPU. Its files are as in the wheel; all that differs from a GPU is said here."""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # with it vLLM takes Triton although there is no driver
os.environ["TRITON_INTERPRET"] = "1"  # its Triton kernels are run by Triton's interpreter, on CPU tensors
os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"

import torch  # noqa: E402

import stand_ins  # noqa: E402

# A parser of answers' grammars, the event loop of a server, and attention on AMD's GPUs, which bring in half of vLLM.
stand_ins.stand_in_for("xgrammar", "uvloop", "vllm.v1.attention.ops.rocm_aiter_mla_sparse")

import vllm.distributed.device_communicators.all2all  # noqa: E402, F401
import vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ht  # noqa: E402, F401
import vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_ll  # noqa: E402, F401
import vllm.model_executor.layers.fused_moe.prepare_finalize.deepep_v2  # noqa: E402, F401

vllm.model_executor.layers.fused_moe.modular_kernel.PIN_MEMORY = False  # only memory for a GPU can be pinned

# The wheel's compiled kernels need a GPU. The one that is called, the sum over a token's slots, is written in torch.
_kernels = torch.library.Library("_moe_C", "FRAGMENT")
_kernels.define("moe_sum(Tensor input, Tensor! output, Tensor? topk_ids, Tensor? expert_map) -> ()")


@torch.library.impl(_kernels, "moe_sum", "CPU")
def _moe_sum(input, output, topk_ids=None, expert_map=None):
    output.copy_(input.float().sum(dim=1))
