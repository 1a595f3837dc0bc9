# SPDX-License-Identifier: MIT
"""Ranks share the machine's cores; torch's own threads would only fight over them."""

import torch

torch.set_num_threads(1)
