"""Functional optimisers: SGD, Adam and AdamW whose hyper-parameters may be one value per member.

The protocol is optax's: ``state = opt.init(params)`` and ``updates, state = opt.update(grads, state, params)``; the new
params are ``fd.tree.add(params, updates)``. ``opt.step`` does both in one pass. Nothing is changed in place, except
what is given away to ``step`` (``donate=True``). For every member, and every leaf from its first gradient on, the
numbers equal those of ``torch.optim``.

A hyper-parameter is a number, a tensor (), a tensor (n,) with one value per member of a stack, or a schedule: a
function that takes the step (an integer tensor, 0 at the first update, shaped like ``state.step``) and returns one of
these. Write schedules with tensor functions (``torch.where``), not with ``if``.

The state is a pytree of tensors: ``step`` is () for one member and (n,) for a stack, and moments are dicts by leaf
name. ``fd.take``, ``fd.stack`` and ``fd.cat`` work on it as on params. ``init`` decides which leaves may move: those
with moments. Every other leaf gets a zero update. Moments of half-precision leaves are float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..trees import arithmetic as tree
from ..trees.selecting import Selector
from .fused import Adam, kernel_for
from .groups import Groups
from .hyper import Hyper, Values, checked, is_zero
from .moving import How, Tree, alive, begin, decayed, told, zeros

__all__ = ["AdamState", "Optimizer", "SGDState", "adam", "adamw", "apply_updates", "clip_by_norm", "sgd"]


class Optimizer(NamedTuple):
    """``init(params, n=None) -> state`` and ``update(grads, state, params) -> (updates, state)``.

    ``init``: ``params`` is any pytree of tensors. ``n`` says that it is a stack of n members; by default n is taken
    from the hyper-parameters. If they do not tell either, ``step`` is (), and the state of a stack cannot be split.

    ``update``: ``grads`` may lack leaves, or contain ``None``; those leaves and their moments stay as they are.
    ``updates`` always has the structure of ``params``.

    >>> opt = adamw(lr=torch.tensor([1e-3, 1e-2, 1e-1]))
    >>> stack = {"w": torch.ones(3, 2)}
    >>> state = opt.init(stack)
    >>> updates, state = opt.update({"w": torch.ones(3, 2)}, state, stack)
    >>> updates["w"][:, 0]
    tensor([-0.0010, -0.0101, -0.1010])
    >>> state.step
    tensor([1, 1, 1])
    """

    init: Callable[..., Any]
    update: Callable[..., tuple[Any, Any]]

    def step(self, grads: Any, state: Any, params: Any, *, donate: bool = False) -> tuple[Any, Any]:
        """``(new params, new state)``: ``update`` and ``apply_updates`` in a single, faster pass.

        ``donate=True`` gives ``state`` and ``params`` away: new values may be written into their tensors, so do not
        use them again, nor anything that shares memory with them, such as views of members. This saves copies, which
        take longer than the arithmetic.

        >>> opt = sgd(lr=0.5)
        >>> params = {"w": torch.tensor([1.0, 2.0])}
        >>> params, state = opt.step({"w": torch.tensor([1.0, 1.0])}, opt.init(params), params)
        >>> params
        {'w': tensor([0.5000, 1.5000])}
        """
        if isinstance(self.update, Rule):
            return self.update.run(grads, state, params, How(onto=True, donated=donate))
        updates, state = self.update(grads, state, params)
        return apply_updates(params, updates), state


class Rule:
    """An ``update`` that can also return the new params; ``run`` takes a :class:`How` as a further argument."""

    def __init__(self, run: Callable[[Any, Any, Any, How], tuple[Any, Any]]) -> None:
        self.run = run

    def __call__(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return self.run(grads, state, params, How())


class SGDState(NamedTuple):
    """``step``: steps taken; ``momentum``: the velocity by leaf name (empty tensors if momentum is 0).

    >>> sgd(0.1, momentum=0.9).init({"w": torch.ones(2)})
    SGDState(step=tensor(0), momentum={'w': tensor([0., 0.])})
    """

    step: Tensor
    momentum: dict[str, Tensor]


class AdamState(NamedTuple):
    """``step``: steps taken; ``mu`` and ``nu``: the first and second moments by leaf name.

    >>> adam(0.1).init({"w": torch.ones(2)})
    AdamState(step=tensor(0), mu={'w': tensor([0., 0.])}, nu={'w': tensor([0., 0.])})
    """

    step: Tensor
    mu: dict[str, Tensor]
    nu: dict[str, Tensor]


def sgd(
    lr: Hyper,
    momentum: Hyper = 0.0,
    nesterov: bool = False,
    weight_decay: Hyper = 0.0,
    *,
    trainable: Selector | None = None,
    groups: Mapping[Any, Hyper] | None = None,
    decay_mask: Selector | None = None,
) -> Optimizer:
    """g ← grad + wd·p; v ← momentum·v + g; p ← p - lr·v (nesterov: p - lr·(g + momentum·v)).

    ``trainable`` selects the leaves that move. A predicate (``delta.trainable``) decides alone. Names as in
    ``fd.partition`` select among the leaves that ``delta.init`` has not marked as constants. By default all of those
    move. In params without any mark, a leaf decays only from its first nonzero gradient on, so constants stay put.

    ``groups`` = {selector: factor} multiplies lr for the selected leaves. A selector is a predicate or names as in
    ``fd.partition`` (several as a tuple), and a factor is any hyper-parameter; a leaf in several groups gets their
    product. LoRA+ (Hayou et al. 2024) is ``groups={"lora_B": 16.0}``. ``decay_mask`` selects the leaves that decay;
    by default, all that move.

    >>> opt = sgd(lr=0.5)
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> updates, state = opt.update({"w": torch.tensor([1.0, 1.0])}, opt.init(params), params)
    >>> apply_updates(params, updates)
    {'w': tensor([0.5000, 1.5000])}
    >>> opt = sgd(lr=0.5, groups={"b": 0.1})
    >>> params = {"w": torch.ones(1), "b": torch.ones(1)}
    >>> opt.update(params, opt.init(params), params)[0]
    {'w': tensor([-0.5000]), 'b': tensor([-0.0500])}
    """
    grouped = Groups(groups, decay_mask)
    hypers = checked(lr=lr, momentum=momentum, weight_decay=weight_decay, **grouped.hypers)
    has_momentum, decays = not is_zero(momentum), not is_zero(weight_decay)
    if nesterov and not has_momentum:
        raise ConfigError("nesterov=True needs a momentum; write sgd(lr, momentum=0.9, nesterov=True).")

    def init(params: Any, n: int | None = None) -> SGDState:
        first, moving = begin(params, hypers, trainable, n)
        grouped.of(params)
        if has_momentum:
            return SGDState(first, {name: zeros(leaf) for name, leaf in moving.items()})
        return SGDState(first, {name: zeros(leaf, (*first.shape, 0)) for name, leaf in moving.items()})

    def run(grads: Any, state: SGDState, params: Any, how: How) -> tuple[Any, SGDState]:
        values, tree = Values(hypers, state.step), Tree(grads, state.momentum, params, trainable)
        velocities, chosen = dict(state.momentum), grouped.of(params)
        known = told(trainable, params, state.momentum)

        def move(name: str, p: Tensor, g: Tensor) -> Tensor:
            if decays and chosen.decays(name):
                live = alive(known, state.step, g, *([velocities[name]] if has_momentum else []))
                g = decayed(g, p, values("weight_decay", p, name), live)
            if has_momentum:
                m = values("momentum", p, name)
                velocities[name] = torch.addcmul(g, velocities[name], m)
                g = torch.addcmul(g, velocities[name], m) if nesterov else velocities[name]
            return g * -chosen.scaled(values, "lr", p, name)

        return tree.moved(move, how), SGDState(state.step + 1, velocities)

    return Optimizer(init, Rule(run))


def adam(
    lr: Hyper,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    *,
    trainable: Selector | None = None,
    groups: Mapping[Any, Hyper] | None = None,
    decay_mask: Selector | None = None,
) -> Optimizer:
    """Adam with L2 weight decay, which is added to the gradient, as in ``torch.optim.Adam``.

    m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; p ← p - lr·m̂ / (√v̂ + eps), with m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ).
    ``trainable``, ``groups`` and ``decay_mask`` are those of :func:`sgd`.

    >>> opt = adam(lr=lambda step: 0.1 * 0.5**step)
    >>> params = {"w": torch.tensor([1.0, 2.0])}
    >>> state = opt.init(params)
    >>> for _ in range(2):
    ...     updates, state = opt.update({"w": torch.tensor([3.0, -3.0])}, state, params)
    ...     params = apply_updates(params, updates)
    >>> params
    {'w': tensor([0.8500, 2.1500])}
    """
    return _adam(lr, betas, eps, weight_decay, trainable, groups, decay_mask, decoupled=False)


def adamw(
    lr: Hyper,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 1e-2,
    *,
    trainable: Selector | None = None,
    groups: Mapping[Any, Hyper] | None = None,
    decay_mask: Selector | None = None,
) -> Optimizer:
    """Adam with decoupled weight decay: p ← p - lr·wd·p in addition to Adam's step, as in ``torch.optim.AdamW``.

    ``trainable``, ``groups`` and ``decay_mask`` are those of :func:`sgd`.

    >>> opt = adamw(lr=torch.tensor([0.1, 0.2]), weight_decay=torch.tensor([0.0, 0.5]))
    >>> stack = {"w": torch.ones(2, 1)}
    >>> updates, state = opt.update({"w": torch.ones(2, 1)}, opt.init(stack), stack)
    >>> updates["w"]
    tensor([[-0.1000],
            [-0.3000]])
    """
    return _adam(lr, betas, eps, weight_decay, trainable, groups, decay_mask, decoupled=True)


def _adam(
    lr: Hyper,
    betas: tuple[Hyper, Hyper],
    eps: Hyper,
    weight_decay: Hyper,
    trainable: Selector | None,
    groups: Mapping[Any, Hyper] | None,
    decay_mask: Selector | None,
    decoupled: bool,
) -> Optimizer:
    """Adam, or AdamW if ``decoupled``."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ConfigError(f"betas must be a pair (beta1, beta2); found {betas!r}.")
    grouped = Groups(groups, decay_mask)
    hypers = checked(lr=lr, beta1=betas[0], beta2=betas[1], eps=eps, weight_decay=weight_decay, **grouped.hypers)
    decays = not is_zero(weight_decay)

    def init(params: Any, n: int | None = None) -> AdamState:
        first, moving = begin(params, hypers, trainable, n)
        grouped.of(params)
        mu, nu = ({name: zeros(leaf) for name, leaf in moving.items()} for _ in range(2))
        return AdamState(first, mu, nu)

    def run(grads: Any, state: AdamState, params: Any, how: How) -> tuple[Any, AdamState]:
        values, tree = Values(hypers, state.step), Tree(grads, state.mu, params, trainable)
        mu, nu, chosen = dict(state.mu), dict(state.nu), grouped.of(params)
        known = told(trainable, params, state.mu) if how.known is None else how.known
        values.of["shrink"] = -values.of["lr"] * values.of["weight_decay"]
        kernel = kernel_for(values, state.step, tree.moving, mu, nu)
        if kernel is not None:
            fused = Adam(kernel, values, chosen, state.step, decays, decoupled, known)
            return tree.filled(fused.results(tree.moving, mu, nu, how), how), AdamState(state.step + 1, mu, nu)
        # (lr/c₁)·m / (√v/√c₂ + eps) is rearranged to lr·√c₂/c₁ · m / (√v + eps·√c₂), so that the bias corrections
        # apply to scalars, which are few and float64, instead of to leaves.
        taken = (state.step + 1).to(values.dtype)
        root = (1 - values.of["beta2"] ** taken).sqrt()
        values.of["rate"] = -values.of["lr"] * root / (1 - values.of["beta1"] ** taken)
        values.of["floor"] = values.of["eps"] * root
        values.of["fresh1"], values.of["fresh2"] = 1 - values.of["beta1"], 1 - values.of["beta2"]

        def move(name: str, p: Tensor, g: Tensor) -> Tensor:
            shrinks = decays and chosen.decays(name)
            if shrinks and not decoupled:
                g = decayed(g, p, values("weight_decay", p, name), alive(known, state.step, g, nu[name]))
            mu[name] = torch.lerp(mu[name], g, values("fresh1", p, name))
            nu[name] = torch.lerp(nu[name], g * g, values("fresh2", p, name))
            # The clamp is negligible beside eps; it keeps the root's derivative finite before the first gradient.
            root_nu = nu[name].clamp_min(torch.finfo(p.dtype).tiny).sqrt()
            delta = mu[name] * chosen.scaled(values, "rate", p, name) / (root_nu + values("floor", p, name))
            if shrinks and decoupled:
                live = alive(known, state.step, nu[name])
                return decayed(delta, p, chosen.scaled(values, "shrink", p, name), live)
            return delta

        return tree.moved(move, how), AdamState(state.step + 1, mu, nu)

    return Optimizer(init, Rule(run))


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates: ``fd.tree.add`` under optax's name.

    >>> apply_updates({"w": torch.tensor([1.0])}, {"w": torch.tensor([-0.5])})
    {'w': tensor([0.5000])}
    """
    return tree.add(params, updates)


def clip_by_norm(grads: Any, max_norm: float | Tensor, per_member: bool = False) -> Any:
    """grads · min(1, max_norm / (‖grads‖ + 1e-6)) with the norm over all leaves, as in ``clip_grad_norm_``.

    With ``per_member=True`` each member of a stack is clipped by its own norm, and ``max_norm`` may be (n,).

    >>> clip_by_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    >>> clip_by_norm({"a": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0, per_member=True)
    {'a': tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])}
    """
    factor = (max_norm / (tree.norm(grads, per_member) + 1e-6)).clamp(max=1.0)
    return tree.scale(grads, factor, per_member)
