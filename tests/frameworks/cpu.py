# SPDX-License-Identifier: MIT
"""What frameworks ask of torch's CUDA where all tensors are on the CPU. They run unmodified; torch is patched, here."""

import contextlib

import torch
import torch._dynamo
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
    """In a process whose tensors are on the CPU: torch's current CUDA device is the CPU, its streams and events do
    nothing, it has no random numbers of its own; nothing is compiled. Splits of an all-to-all may be tensors, since
    Megatron makes lists only of those that come from a GPU."""
    torch._dynamo.config.disable = True  # compiling would take longer than all else
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.current_stream = lambda device=None: Nothing()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.cuda.Stream = torch.cuda.Event = Nothing
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.synchronize = lambda device=None: None

    all_to_all = dist.all_to_all_single

    def with_lists(output, input, output_split_sizes=None, input_split_sizes=None, **more):
        splits = (output_split_sizes, input_split_sizes)
        return all_to_all(output, input, *(s.tolist() if isinstance(s, torch.Tensor) else s for s in splits), **more)

    dist.all_to_all_single = with_lists
