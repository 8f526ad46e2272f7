"""Hyper-parameters of optimisers: numbers, tensors with one value per member, or schedules of the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, StackError

__all__ = ["Hyper", "Values", "checked", "is_zero", "members_of"]

Hyper = float | Tensor | Callable[[Tensor], float | Tensor]

_BELOW_ONE = ("beta1", "beta2")


def checked(**hypers: Hyper) -> dict[str, Hyper]:
    """The hyper-parameters, after all checks that do not need to read a tensor's values.

    >>> checked(lr=0.1, eps=1e-8)
    {'lr': 0.1, 'eps': 1e-08}
    """
    for name, value in hypers.items():
        if isinstance(value, Tensor):
            if value.ndim > 1 or value.is_complex() or value.dtype == torch.bool:
                raise ConfigError(
                    f"{name} must be a number, a tensor () or a tensor (n,) with one value per member; found shape "
                    f"{tuple(value.shape)}, {value.dtype}."
                )
        elif isinstance(value, int | float) and not isinstance(value, bool):
            below = 1.0 if name in _BELOW_ONE else float("inf")
            if not 0.0 <= value < below:
                raise ConfigError(f"{name} must be in [0, {below:g}); found {value!r}.")
        elif not callable(value):
            hint = f" Write {name}=torch.tensor({list(value)!r})." if isinstance(value, list | tuple) else ""
            raise ConfigError(
                f"{name} must be a number, a tensor () or (n,), or a schedule of the step; found {value!r}.{hint}"
            )
    members_of(hypers)
    return hypers


def is_zero(value: Hyper) -> bool:
    """Whether a hyper-parameter is the number 0, so that its term can be left out.

    >>> is_zero(0.0), is_zero(torch.tensor(0.0))
    (True, False)
    """
    return isinstance(value, int | float) and value == 0


def members_of(hypers: Mapping[str, Hyper], step: Tensor | None = None) -> int | None:
    """The n of hyper-parameters with shape (n,); ``None`` if there are none.

    Schedules are evaluated at ``step`` if it is given. Raises ``ConfigError`` if two disagree.

    >>> members_of({"lr": torch.tensor([0.1, 0.2]), "eps": 1e-8})
    2
    """
    sizes: dict[str, int] = {}
    for name, hyper in hypers.items():
        value = hyper
        if callable(hyper) and not isinstance(hyper, Tensor):
            value = None if step is None else hyper(step)
        if isinstance(value, Tensor) and value.ndim:
            sizes[name] = value.shape[0]
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ConfigError(f"Hyper-parameters disagree about the number of members: {told}.")
    return next(iter(sizes.values()), None)


class Values:
    """The hyper-parameters at one step as float64 tensors (``of``); a call returns one in a leaf's dtype and shape.

    float64, because 1 - 0.999 and powers of it lose half their digits in float32; there are only a few of them.

    >>> values = Values({"lr": torch.tensor([0.1, 0.2])}, torch.zeros(2, dtype=torch.int64))
    >>> values("lr", torch.ones(2, 3, 4), "w").shape
    torch.Size([2, 1, 1])
    """

    def __init__(self, hypers: Mapping[str, Hyper], step: Tensor) -> None:
        # Apple's GPUs have no float64.
        self.dtype = torch.float32 if step.device.type == "mps" else torch.float64
        self.of = {name: self._at(name, hyper, step) for name, hyper in hypers.items()}
        self._fitted: dict[tuple[str, torch.dtype, torch.device, int], Tensor] = {}
        self._numbers: dict[str, float | None] = {}

    def _at(self, name: str, hyper: Hyper, step: Tensor) -> Tensor:
        """One hyper-parameter at ``step`` as a tensor () or (n,)."""
        value = hyper if isinstance(hyper, Tensor) or not callable(hyper) else hyper(step)
        if not isinstance(value, Tensor):
            return torch.full((), value, dtype=self.dtype, device=step.device)
        if value.ndim and value.shape != step.shape:
            n = value.shape[0]
            state = f"of {step.shape[0]} members" if step.ndim else "of one member"
            raise StackError(
                f"{name} has shape {tuple(value.shape)} but the state is that {state}. "
                f"Write state = opt.init(stack, n={n})."
            )
        return value.to(dtype=self.dtype, device=step.device)

    def __call__(self, name: str, leaf: Tensor, leaf_name: str) -> Tensor:
        """The value ``name`` in the leaf's dtype and on its device; one value per member has shape (n, 1, ...)."""
        value = self.of[name]
        if value.ndim and (leaf.ndim == 0 or leaf.shape[0] != value.shape[0]):
            raise StackError(
                f"Leaf {leaf_name!r} has shape {tuple(leaf.shape)}; its first axis should be that of the "
                f"{value.shape[0]} members of the hyper-parameters and the state."
            )
        key = (name, leaf.dtype, leaf.device, leaf.ndim)
        if key not in self._fitted:
            fitted = value.to(dtype=leaf.dtype, device=leaf.device)
            self._fitted[key] = fitted.reshape((-1, *[1] * (leaf.ndim - 1))) if fitted.ndim else fitted
        return self._fitted[key]

    def number(self, name: str) -> float | None:
        """The value ``name`` as a Python number if it is the same for all members, else ``None``.

        >>> values = Values({"lr": torch.tensor([0.5, 0.5]), "eps": 0.25}, torch.zeros(2, dtype=torch.int64))
        >>> values.number("lr"), values.number("eps")
        (0.5, 0.25)
        """
        if name not in self._numbers:
            found = set(self.of[name].reshape(-1).tolist())
            self._numbers[name] = found.pop() if len(found) == 1 else None
        return self._numbers[name]
