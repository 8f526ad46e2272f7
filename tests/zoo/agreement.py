"""What laws compare by: closeness at the size of the numbers, a delta that acts, a loss with gradients everywhere."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    scale = max(1.0, float(expected.detach().abs().max()))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * scale)


def assert_moved(found: Tensor, bare: Tensor) -> None:
    """The comparison means something only if the delta acts."""
    assert float((found - bare).detach().abs().max()) > 1e-6


def weighted_sum(output: Tensor) -> Tensor:
    """A loss with a gradient everywhere: Σ cos(i) yᵢ over one member's output."""
    flat = output.flatten()
    return (flat * torch.arange(flat.numel(), dtype=flat.dtype).cos()).sum()
