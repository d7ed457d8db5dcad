"""Which operations serve a device. Asked once, by what is built for it: weights, decoder, slot table."""

from __future__ import annotations

import torch

from tpworker.kernels.operations import Operations
from tpworker.model import torch_operations


def operations_of(device: torch.device) -> Operations:
    """The operations of this kind of device; those of torch for any that has none of its own."""
    if device.type == "cuda":
        from tpworker.kernels import cuda_operations

        return cuda_operations
    return torch_operations
