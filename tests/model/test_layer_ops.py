"""What a layer does between its products: the torch definitions."""

from __future__ import annotations

import torch

from tpworker.model import layer_ops


def test_an_activation_has_the_same_bits_whatever_is_beside_it() -> None:
    """With several threads torch cuts a tensor in the middle of a row, and treats what is left over apart."""
    torch.manual_seed(0)
    gate_up = torch.randn(483, 2 * 1504)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = layer_ops.silu_mul(gate_up)
        alone = torch.cat([layer_ops.silu_mul(row[None]) for row in gate_up])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, alone)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(together, torch.nn.functional.silu(gate) * up)
