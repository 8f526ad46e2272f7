"""DP-SGD for a delta: clips, sums and noises the gradients of rows, and accounts for the privacy cost.

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
    """The rows of one step: each is taken independently with probability ``rate``, so there may be none.

    >>> batch(10, 0.3, seed=0)
    tensor([2, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(rows, generator=generator, dtype=torch.float32, device="cpu") < rate).nonzero().flatten()


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

    ``loss(params, *rows)`` is the loss of a batch of one row, (). Leaves that it does not depend on (constants of a
    delta) get 0 and no noise; they are determined with a row of zeros, so that they reveal nothing about the data.
    ``expected`` is the expected number of rows, rate × rows, because the true number in a step is private. A row whose
    gradient is not finite counts as 0. Use a different seed for every step of every member, and keep seeds secret:
    known noise can be subtracted, and noise that two members share cancels in their difference. torch's generator is
    not cryptographically secure.

    >>> def loss(params, x):
    ...     return (params["w"] * x).sum()
    >>> gradient(loss, {"w": torch.zeros(2)}, [torch.tensor([[3.0, 4.0], [0.0, 0.5]])], 0, clip=1, noise=0, expected=2)
    {'w': tensor([0.3000, 0.6500])}
    """
    every = torch.ones(len(data[0]), dtype=torch.bool, device=data[0].device)
    total = _clipped(loss, params, data, every, clip, chunk_size)
    moving, fixed = _moving(loss, params, total, data)
    noisy = fd.tree.add(moving, fd.tree.scale(fd.tree.randn_like(moving, seed), noise * clip))
    return fd.combine(fd.tree.scale(noisy, 1 / expected), fixed, order=total)


def batches(rows: int, rate: float, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """`batch` for every member, padded to the longest: rows (n, b), and a mask of those taken, (n, b) bool.

    >>> batches(10, 0.3, seeds=[2, 4])
    (tensor([[7, 9, 0, 0],
            [2, 3, 4, 5]]), tensor([[ True,  True, False, False],
            [ True,  True,  True,  True]]))
    """
    each = [batch(rows, rate, seed) for seed in seeds]
    taken = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one, dtype=torch.bool) for one in each], True)
    return torch.nn.utils.rnn.pad_sequence(each, True), taken


def gradients(
    loss: Callable[..., Tensor],
    stack: Params,
    data: Sequence[Tensor],
    taken: Tensor,
    seeds: Sequence[int],
    *,
    clip: float | Tensor,
    noise: float | Tensor,
    expected: float,
    chunk_size: int | None = None,
) -> Params:
    """`gradient` for every member of a stack in one mapped run, with the same numbers as member by member.

    Args:
        loss, expected: as in `gradient`; ``loss`` is that of one member.
        stack, seeds: n members, and a seed for each one's noise.
        data: tensors (n, b, ...) of every member's rows, padded to the same b.
        taken: (n, b) bool, the rows that count, from `batches`.
        clip, noise: one for all members, or (n,).
        chunk_size: members to compute at once; by default all.

    >>> def loss(params, x):
    ...     return (params["w"] * x).sum()
    >>> stack, rows = {"w": torch.zeros(2, 2)}, torch.tensor([[[3.0, 4.0], [0.0, 0.5]]]).expand(2, 2, 2)
    >>> taken = torch.tensor([[True, True], [True, False]])
    >>> gradients(loss, stack, [rows], taken, [0, 1], clip=torch.tensor([1.0, 5.0]), noise=0, expected=2)
    {'w': tensor([[0.3000, 0.6500],
            [1.5000, 2.0000]])}
    """
    wide = torch.float32 if taken.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    numbers = (
        value if isinstance(value, Tensor) else torch.tensor(value, dtype=wide, device=taken.device)
        for value in (clip, noise)
    )
    clips, noises = (value.to(taken.device).expand(len(taken)) for value in numbers)

    def member(params: Params, clip: Tensor, taken: Tensor, *data: Tensor) -> Params:
        return _clipped(loss, params, data, taken, clip, None)

    total = torch.vmap(member, chunk_size=chunk_size)(stack, clips, taken, *data)
    moving, fixed = _moving(loss, fd.take(stack, 0), total, [own[0] for own in data])
    drawn = fd.tree.randn_like(moving, seeds)
    noisy = fd.tree.add(moving, fd.tree.scale(drawn, noises * clips, per_member=True))
    return fd.combine(fd.tree.scale(noisy, 1 / expected), fixed, order=total)


def _moving(
    loss: Callable[..., Tensor], params: Params, total: Params, data: Sequence[Tensor]
) -> tuple[Params, Params]:
    """``total`` split into the leaves that ``loss`` depends on and the others."""
    zeros = [own.new_zeros((1, *own.shape[1:])) for own in data]
    names = fd.grad.reached(loss, params, *zeros)
    return fd.partition(total, lambda name: name in names)


def _clipped(
    loss: Callable[..., Tensor],
    params: Params,
    data: Sequence[Tensor],
    taken: Tensor,
    clip: float | Tensor,
    chunk_size: int | None,
) -> Params:
    """Σᵢ ∇Lᵢ min(1, C/‖∇Lᵢ‖) over the rows that are taken and whose gradients are finite."""
    rows = fd.grad.per_sample_grads(loss, chunk_size)(params, *data)
    norms = fd.tree.norm(rows, per_member=True)
    counts = norms.isfinite() & taken
    factors = (clip / norms.clamp(min=1e-12)).clamp(max=1.0)

    def total(leaf: Tensor) -> Tensor:
        shape = (-1, *[1] * (leaf.ndim - 1))
        # where(), not a factor of 0, because 0 · nan is nan.
        return torch.where(counts.view(shape), leaf * factors.view(shape).to(leaf.dtype), 0.0).sum(0)

    return fd.tree.map(total, rows)


def epsilon(steps: int, rate: float, noise: float, delta: float) -> float:
    """The ε of (ε, δ)-privacy after ``steps`` steps, from an accountant of privacy loss distributions.

    >>> round(epsilon(steps=100, rate=0.05, noise=1.0, delta=1e-4), 1)
    2.9
    """
    return _accountant().compose(_event(steps, rate, noise)).get_epsilon(delta)


def noise_for(epsilon: float, steps: int, rate: float, delta: float) -> float:
    """The smallest σ, at least 0.2, that keeps ``steps`` steps within (ε, δ).

    >>> round(noise_for(epsilon=2.0, steps=100, rate=0.05, delta=1e-4), 2)
    1.2
    """
    accounting, event = _accounting(), partial(_event, steps, rate)
    bracket = accounting.LowerEndpointAndGuess(0.2, 1.0)
    return accounting.calibrate_dp_mechanism(_accountant, event, epsilon, delta, bracket, tol=1e-3)


def _event(steps: int, rate: float, noise: float) -> Any:
    """The accountant's event for all steps of a training run."""
    step = _accounting().PoissonSampledDpEvent(rate, _accounting().GaussianDpEvent(noise))
    return _accounting().SelfComposedDpEvent(step, steps)


def _accountant() -> Any:
    # With the default interval of 1e-4, small noise takes a minute.
    return _accounting().pld.PLDAccountant(value_discretization_interval=1e-3)


def _accounting() -> ModuleType:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('The accountant needs another package: pip install "funcdelta[privacy]"') from error
    return dp_accounting
