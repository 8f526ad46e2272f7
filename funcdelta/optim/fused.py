"""Adam's step by torch's fused kernel, which passes over memory once instead of a dozen times.

The kernel works in place, so it gets copies. It takes betas, eps and the number of steps as one Python number each.
The learning rate and the decay may be one value per member, because they only scale its result. If this does not
hold, or something observes the operators (a transform, autograd, the compiler, a dispatch mode), the plain operators
of :mod:`funcdelta.optim.rules` make the step. Both agree to rounding: moments to 2 units in the last place, updates
to 8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..transforms import inside_transform
from .groups import Chosen
from .hyper import Values
from .moving import How, Moving, alive, decayed

__all__ = ["Adam", "Kernel", "kernel_for"]

TOGETHER = 1 << 17
"""Entries per batch of leaves, few enough that one pass finds in the processor's cache what the last one left."""

# torch.optim itself calls this; it has no public name.
_fused_adamw: Any = torch._fused_adamw_  # pyright: ignore[reportPrivateImportUsage]

_PLAIN = frozenset({Tensor, torch.nn.Parameter})
_KINDS = frozenset({torch.float32, torch.float64})


class Kernel(NamedTuple):
    """The fused kernel with the numbers that all members share.

    Attributes:
        beta1, beta2, eps: as in :func:`~funcdelta.optim.adam`.
        taken: the number of steps, including this one.
    """

    beta1: float
    beta2: float
    eps: float
    taken: int

    def __call__(
        self, leaves: list[Tensor], g: list[Tensor], mu: list[Tensor], nu: list[Tensor], lr: float, decay: float
    ) -> None:
        """Move the leaves and both moments, in place."""
        steps = [torch.tensor(float(self.taken), dtype=torch.float32, device="cpu")] * len(leaves)
        numbers: dict[str, Any] = {
            "beta1": self.beta1,
            "beta2": self.beta2,
            "eps": self.eps,
            "lr": lr,
            "weight_decay": decay,
        }
        _fused_adamw(leaves, g, mu, nu, [], steps, **numbers, amsgrad=False, maximize=False)


def kernel_for(values: Values, step: Tensor, moving: list[Moving], *moments: dict[str, Tensor]) -> Kernel | None:
    """The kernel for this step; ``None`` if the plain operators have to make it."""
    if torch.compiler.is_compiling() or inside_transform():
        return None
    # Dispatch modes observe or change operators, and the kernel would lose forward-mode tangents.
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:
        return None
    kept = [held[one.name] for held in moments for one in moving]
    if not moving or not _reads([*values.of.values(), step], kinds=None):
        return None
    if not _reads([tensor for one in moving for tensor in (one.value, one.gradient)] + kept, _KINDS):
        return None
    if any(held[one.name].dtype != one.value.dtype for held in moments for one in moving):
        return None
    found = [values.number(name) for name in ("beta1", "beta2", "eps")]
    taken = step.reshape(-1).tolist()
    # Without eps, an entry that never had a gradient would become 0 / 0.
    if None in found or not found[2] or len(set(taken)) != 1:
        return None
    beta1, beta2, eps = (float(one or 0.0) for one in found)
    return Kernel(beta1, beta2, eps, int(taken[0]) + 1)


def _reads(tensors: Iterable[Tensor], kinds: frozenset[torch.dtype] | None) -> bool:
    """Whether all are ordinary CPU tensors with which autograd builds no graph."""
    tensors = list(tensors)
    return (
        _PLAIN.issuperset(map(type, tensors))
        and all(map(attrgetter("is_cpu"), tensors))
        and (kinds is None or kinds.issuperset(map(attrgetter("dtype"), tensors)))
        and not (torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), tensors)))
    )


class Adam(NamedTuple):
    """One step of Adam or AdamW, including what :class:`Kernel` does not handle.

    Attributes:
        kernel: the kernel, with what all leaves share.
        values, chosen: the rate and the decay of every leaf.
        step: the state's step, () or (n,).
        decays, decoupled: whether there is weight decay, and whether it bypasses the moments.
        known: whether all leaves are known to train (:func:`~funcdelta.optim.moving.alive`).
    """

    kernel: Kernel
    values: Values
    chosen: Chosen
    step: Tensor
    decays: bool
    decoupled: bool
    known: bool

    def results(
        self, moving: list[Moving], mu: dict[str, Tensor], nu: dict[str, Tensor], how: How
    ) -> dict[str, Tensor]:
        """The updates, or the new leaves, by name; the new moments go into ``mu`` and ``nu``."""
        found: dict[str, Tensor] = {}
        if how.donated and not _apart(moving, mu, nu):
            how = how._replace(donated=False)
        for (rate, shrinks), leaves in self._groups(moving).items():
            if how.onto and self._is_all_said(leaves, rate, shrinks, nu):
                # No further pass follows, so batches would gain nothing: one call for all leaves.
                found |= self._moved(leaves, rate, shrinks, mu, nu, how)
                continue
            # New leaves are computed from changes, whose memory is reused from batch to batch.
            scratch: dict[torch.dtype, Tensor] | None = {} if how.onto else None
            for batch in _batches(leaves):
                found |= self._changed(batch, rate, shrinks, mu, nu, how, scratch)
        return found

    def _groups(self, moving: list[Moving]) -> dict[tuple[str, bool], list[Moving]]:
        """The leaves grouped by learning rate (its name in ``values``) and by whether they decay."""
        if self.chosen.alike:
            return {("lr", self.decays): moving}
        groups: dict[tuple[str, bool], list[Moving]] = {}
        for one in moving:
            key = self.chosen.product(self.values, "lr", one.name), self.decays and self.chosen.decays(one.name)
            groups.setdefault(key, []).append(one)
        return groups

    def _is_all_said(self, leaves: list[Moving], rate: str, shrinks: bool, nu: dict[str, Tensor]) -> bool:
        """Whether rate and decay are one number each, so that the kernel can compute the new leaves itself."""
        if self.values.number(rate) is None or any(one.leaf is not one.value for one in leaves):
            return False
        if not (shrinks and self.decoupled):
            return True
        known = self.values.number("weight_decay") is not None
        return known and all(self._live(nu[one.name]) is None for one in leaves)

    def _moved(
        self, leaves: list[Moving], rate: str, shrinks: bool, mu: dict[str, Tensor], nu: dict[str, Tensor], how: How
    ) -> dict[str, Tensor]:
        """The new leaves, computed by the kernel alone."""
        targets = [_room(one.value, how.donated) for one in leaves]
        decay = self.values.number("weight_decay") if shrinks and self.decoupled else 0.0
        self._run(targets, leaves, self.values.number(rate), decay, shrinks, mu, nu, how)
        return dict(zip([one.name for one in leaves], targets, strict=True))

    def _changed(
        self,
        batch: list[Moving],
        rate: str,
        shrinks: bool,
        mu: dict[str, Tensor],
        nu: dict[str, Tensor],
        how: How,
        scratch: dict[torch.dtype, Tensor] | None,
    ) -> dict[str, Tensor]:
        """The updates, or the new leaves, computed from the change that the kernel makes to zeros."""
        targets = _zeros(batch, scratch)
        number = self.values.number(rate)
        self._run(targets, batch, 1.0 if number is None else number, 0.0, shrinks, mu, nu, how)
        found: dict[str, Tensor] = {}
        for one, change in zip(batch, targets, strict=True):
            shrink = None
            if shrinks and self.decoupled:
                shrink = self.chosen.scaled(self.values, "shrink", one.value, one.name)
            live = None if shrink is None else self._live(nu[one.name])
            lr = self.values(rate, one.value, one.name) if number is None else None
            if how.onto and live is None and one.leaf is one.value:
                found[one.name] = _added(one.leaf, change, lr, shrink, how.donated)
                continue
            change = change if lr is None else change.mul_(lr)
            if shrink is not None:
                change = (
                    change.addcmul_(one.value, shrink) if live is None else decayed(change, one.value, shrink, live)
                )
            found[one.name] = how.result(one, change)
        return found

    def _run(
        self,
        targets: list[Tensor],
        leaves: list[Moving],
        lr: float | None,
        decay: float | None,
        shrinks: bool,
        mu: dict[str, Tensor],
        nu: dict[str, Tensor],
        how: How,
    ) -> None:
        """Run the kernel on ``targets`` with the leaves' gradients; it also updates their moments."""
        gradients = [one.gradient.contiguous() for one in leaves]
        if shrinks and not self.decoupled:
            gradients = [self._with_decay(one, nu[one.name]) for one in leaves]
        for one in leaves:
            mu[one.name], nu[one.name] = _room(mu[one.name], how.donated), _room(nu[one.name], how.donated)
        first, second = [mu[one.name] for one in leaves], [nu[one.name] for one in leaves]
        self.kernel(targets, gradients, first, second, lr or 0.0, decay or 0.0)

    def _with_decay(self, one: Moving, nu: Tensor) -> Tensor:
        """The gradient of a leaf plus its weight decay."""
        factor = self.values("weight_decay", one.value, one.name)
        return decayed(one.gradient, one.value, factor, self._live(one.gradient, nu)).contiguous()

    def _live(self, *evidence: Tensor) -> Tensor | None:
        """As :func:`~funcdelta.optim.moving.alive`, but checks one entry per member first, which usually suffices."""
        if self.known or any(bool(_first(one, self.step.ndim).all()) for one in evidence):
            return None
        return alive(False, self.step, *evidence)


def _first(tensor: Tensor, axes: int) -> Tensor:
    """One entry per member."""
    flat = tensor.reshape((*tensor.shape[:axes], -1)) if tensor.ndim >= axes else tensor
    return flat[..., :1] if flat.numel() else flat.new_zeros(())


def _zeros(batch: list[Moving], scratch: dict[torch.dtype, Tensor] | None) -> list[Tensor]:
    """Zeros for every leaf; with ``scratch``, in memory that the next batch will reuse."""
    dtype = batch[0].value.dtype
    if scratch is None or any(one.value.dtype != dtype for one in batch):
        return [torch.zeros_like(one.value, memory_format=torch.contiguous_format) for one in batch]
    sizes = [one.value.numel() for one in batch]
    if dtype not in scratch or scratch[dtype].numel() < sum(sizes):
        scratch[dtype] = torch.empty(sum(sizes), dtype=dtype, device="cpu")
    pieces = scratch[dtype][: sum(sizes)].zero_().split(sizes)
    return [piece.view(one.value.shape) for piece, one in zip(pieces, batch, strict=True)]


def _added(leaf: Tensor, change: Tensor, lr: Tensor | None, shrink: Tensor | None, donated: bool) -> Tensor:
    """(1 + shrink)·leaf + lr·change in as few passes as possible; written into the leaf if it was donated."""
    room = leaf if donated and leaf.is_contiguous() and not leaf.is_inference() else None
    if shrink is not None:
        room = leaf = torch.mul(leaf, 1 + shrink, out=room)
    if lr is None:
        return torch.add(leaf, change, out=room)
    return torch.addcmul(leaf, change, lr, out=room)


def _batches(moving: list[Moving]) -> Iterator[list[Moving]]:
    batch: list[Moving] = []
    size = 0
    for one in moving:
        batch.append(one)
        size += one.value.numel()
        if size >= TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _apart(moving: list[Moving], mu: dict[str, Tensor], nu: dict[str, Tensor]) -> bool:
    """Whether no two of the tensors share memory, so that each may be overwritten."""
    tensors = [x for one in moving for x in (one.value, one.gradient, mu[one.name], nu[one.name]) if x.is_contiguous()]
    places = sorted([(begin := x.data_ptr(), begin + x.nbytes) for x in tensors if x.numel()])
    return all(end <= begin for (_, end), (begin, _) in itertools.pairwise(places))


def _room(tensor: Tensor, donated: bool) -> Tensor:
    """The tensor that the kernel may overwrite with new values: a copy, or itself if it was donated."""
    if donated and tensor.is_contiguous() and not tensor.is_inference():
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
