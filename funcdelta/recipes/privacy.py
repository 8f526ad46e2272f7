"""DP-SGD over a delta: gradients of rows clipped, summed and noised, and what that costs in privacy.

Abadi et al. 2016, "Deep Learning with Differential Privacy". Two data sets are neighbours if one has one row more.
The accountant is that of the package dp-accounting (extra ``privacy``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import funcdelta as fd

Params = dict[str, Tensor]


def batch(rows: int, rate: float, seed: int) -> Tensor:
    """The rows of one step, each in it with probability ``rate``, independently: their number varies, and may be 0.

    >>> batch(10, 0.3, seed=0)
    tensor([2, 3])
    """
    return (torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < rate).nonzero().flatten()


def gradient(
    loss: Callable[..., Tensor],
    params: Params,
    data: Sequence[Tensor],
    seed: int,
    *,
    clip: float,
    noise: float,
    expected: float,
    chunk_size: int | None = None,
) -> Params:
    """(Σᵢ ∇Lᵢ min(1, C/‖∇Lᵢ‖) + σ C ε) / ``expected``: C is ``clip``, σ is ``noise``, ε standard normal by ``seed``.

    ``loss(params, *rows)`` is that of a batch of one row, (); ``params`` are the leaves that train. ``expected`` is the
    expected number of rows, rate × rows: the true number of a step is private. A row whose gradient is not finite
    counts as 0. Give every step of every member a seed of its own, and keep seeds secret: whoever knows the noise can
    take it away, and the noise of two members that share it is told from their difference. torch's generator is no
    cryptographic one.

    >>> def loss(params, x):
    ...     return (params["w"] * x).sum()
    >>> gradient(loss, {"w": torch.zeros(2)}, [torch.tensor([[3.0, 4.0], [0.0, 0.5]])], 0, clip=1, noise=0, expected=2)
    {'w': tensor([0.3000, 0.6500])}
    """
    rows = fd.per_sample_grads(loss, chunk_size)(params, *data)
    norms = fd.tree.norm(rows, per_member=True)
    rows = fd.tree.map(lambda leaf: leaf[norms.isfinite()], rows)
    factors = (clip / norms[norms.isfinite()].clamp(min=1e-12)).clamp(max=1.0)
    total = fd.tree.map(lambda leaf: leaf.sum(0), fd.tree.scale(rows, factors, per_member=True))
    noisy = fd.tree.add(total, fd.tree.scale(fd.tree.randn_like(total, seed), noise * clip))
    return fd.tree.scale(noisy, 1 / expected)


def epsilon(steps: int, rate: float, noise: float, delta: float) -> float:
    """The ε of (ε, δ)-privacy after ``steps`` steps, by the accountant of privacy loss distributions.

    >>> round(epsilon(steps=100, rate=0.05, noise=1.0, delta=1e-4), 1)
    2.9
    """
    return _accountant().compose(_event(steps, rate, noise)).get_epsilon(delta)


def noise_for(epsilon: float, steps: int, rate: float, delta: float) -> float:
    """The least σ, from 0.2, that keeps ``steps`` steps within (ε, δ).

    >>> round(noise_for(epsilon=2.0, steps=100, rate=0.05, delta=1e-4), 2)
    1.2
    """
    accounting, event = _accounting(), partial(_event, steps, rate)
    bracket = accounting.LowerEndpointAndGuess(0.2, 1.0)
    return accounting.calibrate_dp_mechanism(_accountant, event, epsilon, delta, bracket, tol=1e-3)


def _event(steps: int, rate: float, noise: float) -> Any:
    """What the accountant calls all steps of a training together."""
    step = _accounting().PoissonSampledDpEvent(rate, _accounting().GaussianDpEvent(noise))
    return _accounting().SelfComposedDpEvent(step, steps)


def _accountant() -> Any:
    # The default interval of 1e-4 takes a minute for a small noise.
    return _accounting().pld.PLDAccountant(value_discretization_interval=1e-3)


def _accounting() -> ModuleType:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('The accountant is another package: pip install "funcdelta[privacy]"') from error
    return dp_accounting
