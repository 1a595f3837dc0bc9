# SPDX-License-Identifier: MIT
"""What frameworks ask of torch's CUDA even where all tensors are on the CPU. They run unmodified: torch is patched, here."""

import contextlib

import torch
import torch.distributed as dist


class Nothing:
    """A stream or an event of a CPU, where work is done when the call that asks for it returns."""

    def __init__(self, *arguments, **options):
        pass

    def record(self, stream=None):
        pass

    def record_event(self, event=None):
        return event or Nothing()

    def synchronize(self):
        pass

    def wait_event(self, event):
        pass

    def wait_stream(self, stream):
        pass


def patch_torch():
    """In a process whose tensors are on the CPU: torch's current CUDA device is the CPU, its streams and events do nothing, and
    splits of an all-to-all may be tensors (Megatron makes lists of those that come from a GPU)."""
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda device=None: Nothing()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.synchronize = lambda device=None: None

    all_to_all = dist.all_to_all_single

    def with_lists(output, input, output_split_sizes=None, input_split_sizes=None, **more):
        splits = (output_split_sizes, input_split_sizes)
        return all_to_all(output, input, *(s.tolist() if isinstance(s, torch.Tensor) else s for s in splits), **more)

    dist.all_to_all_single = with_lists
