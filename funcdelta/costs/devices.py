"""Devices: how much they compute, move, hold and exchange a second; vendors' figures, or measured here."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Device:
    """One device. Figures are for dense matrices in ``weight_bytes`` bytes a number.

    Attributes:
        flops: operations a second; a multiplication and an addition are two.
        bandwidth: bytes a second between its memory and its arithmetic.
        memory: bytes.
        link: bytes a second to another device, each way.
        efficiency: the part of ``flops`` and ``bandwidth`` that real layers reach.
        weight_bytes: bytes a number of the backbone has there.
        launch: seconds that starting the kernels of one layer takes, forward (about 20 of 6 µs on a GPU).

    >>> DEVICES["h100"].balance
    295.2...
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    link: float
    efficiency: float = 0.5
    weight_bytes: int = 2
    launch: float = 0.12e-3

    @property
    def balance(self) -> float:
        """Tokens T* = F/BW (of 2-byte weights) from which on arithmetic takes longer than reading the weights."""
        return self.flops / self.bandwidth * self.weight_bytes / 2


# bf16 without sparsity; NVIDIA's data sheets of the SXM versions. Links are NVLink's, one way.
DEVICES = {
    "a100": Device("a100", 312e12, 2.039e12, 80e9, 300e9),
    "h100": Device("h100", 989e12, 3.35e12, 80e9, 450e9),
    "h200": Device("h200", 989e12, 4.8e12, 141e9, 450e9),
}


def this_cpu() -> Device:
    """This machine's CPU, measured in about half a second: a float32 matrix product and a copy, best of several.

    Real layers were measured to reach three quarters of that product on two cores, and to need a millisecond at least.

    >>> this_cpu().flops > 1e8
    True
    """
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    flops = 2 * 512**3 / _best(lambda: torch.mm(a, b))
    source = torch.zeros(8_000_000)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / _best(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Processes on one machine exchange tensors by copies in its memory.
    return Device("cpu", flops, bandwidth, float(memory), bandwidth / 2, efficiency=0.75, weight_bytes=4, launch=1e-3)


def _best(function: object, seconds: float = 0.2) -> float:
    assert callable(function)
    function()
    found, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        function()
        found = min(found, time.perf_counter() - begin)
    return found
