"""Small functional optimisers: SGD, Adam and AdamW whose hyper-parameters may be one value a member.

The protocol is optax's: ``state = opt.init(params)``, ``updates, state = opt.update(grads, state, params)``,
new params are ``fd.tree.add(params, updates)``, and ``opt.step`` is both in one pass. Nothing is changed in place, but
for what ``step`` is given away. Member by member, and for every leaf from its first gradient on, the numbers are those
of ``torch.optim``.

A hyper-parameter is a number, a tensor (), a tensor (n,) with one value a member of a stack, or a schedule: a
function of the step (an integer tensor, 0 at the first update, shaped as ``state.step``) that returns one of
these. Write schedules with tensor functions (``torch.where``), not with ``if``.

The state is a pytree of tensors: ``step`` is () for one member and (n,) for a stack, and moments are dicts
by leaf name. ``fd.take``, ``fd.stack`` and ``fd.cat`` act on it as on params. A dict of moments names the
leaves that may move, chosen once, in ``init``; every other leaf gets a zero update. Moments of half-precision
leaves are float32.
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

    ``init``: ``params`` is any pytree of tensors. ``n`` says that it is a stack of n members; left out, n is
    read off the hyper-parameters. Without either, ``step`` is () and the state of a stack cannot be taken
    apart.

    ``update``: ``grads`` may lack leaves, or hold ``None``; those leaves and their moments stay as they are.
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
        """(new params, new state): ``update`` and ``apply_updates`` in one pass, which takes less time.

        ``donate=True`` gives ``state`` and ``params`` away: new values may be written into their tensors, so neither
        may be used again, nor anything that shares memory with them, such as views of members. That spares the copies,
        which take longer than the arithmetic.

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
    """An ``update`` that can also give the new params; ``run`` takes a ``How`` beside what ``update`` takes."""

    def __init__(self, run: Callable[[Any, Any, Any, How], tuple[Any, Any]]) -> None:
        self.run = run

    def __call__(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return self.run(grads, state, params, How())


class SGDState(NamedTuple):
    """``step`` steps taken; ``momentum`` the velocity by leaf name (empty tensors where momentum is 0).

    >>> sgd(0.1, momentum=0.9).init({"w": torch.ones(2)})
    SGDState(step=tensor(0), momentum={'w': tensor([0., 0.])})
    """

    step: Tensor
    momentum: dict[str, Tensor]


class AdamState(NamedTuple):
    """``step`` steps taken; ``mu`` and ``nu`` the first and second moments by leaf name.

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

    ``trainable`` says which leaves move: a predicate (``delta.trainable``) decides alone; names as in ``fd.partition``
    choose among the leaves that are not marked as constants of a delta, as ``delta.init`` does. Default: all but these.
    In params without any mark a leaf decays from its first gradient other than zero on, so that constants stay there,
    too.

    ``groups`` = {selector: factor} multiplies lr at the leaves that a selector means, named as in ``fd.partition``
    (several names as a tuple), or a predicate; a factor is any hyper-parameter, and a leaf in several groups gets
    their product. LoRA+ (Hayou et al. 2024) is ``groups={"lora_B": 16.0}``. ``decay_mask`` is a selector of the
    leaves that decay; default: all that move.

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
    """Adam; weight decay is L2, added to the gradient, as in ``torch.optim.Adam``.

    m ← β₁m + (1-β₁)g; v ← β₂v + (1-β₂)g²; p ← p - lr·m̂ / (√v̂ + eps), with m̂ = m/(1-β₁ᵗ), v̂ = v/(1-β₂ᵗ).
    ``trainable``, ``groups`` and ``decay_mask`` are as in :func:`sgd`.

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
    """Adam with decoupled weight decay: p ← p - lr·wd·p beside Adam's step, as in ``torch.optim.AdamW``.

    ``trainable``, ``groups`` and ``decay_mask`` are as in :func:`sgd`.

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
    """Both kinds of Adam."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ConfigError(f"betas is a pair (beta1, beta2); found {betas!r}.")
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
        # p - (lr/c₁)·m / (√v/√c₂ + eps) is rearranged to lr·√c₂/c₁ · m / (√v + eps·√c₂): the corrections then
        # fall on scalars, which are few and float64, instead of on leaves.
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
            # The clamp is lost beside eps; it keeps the root's derivative finite where no gradient came yet.
            root_nu = nu[name].clamp_min(torch.finfo(p.dtype).tiny).sqrt()
            delta = mu[name] * chosen.scaled(values, "rate", p, name) / (root_nu + values("floor", p, name))
            if shrinks and decoupled:
                live = alive(known, state.step, nu[name])
                return decayed(delta, p, chosen.scaled(values, "shrink", p, name), live)
            return delta

        return tree.moved(move, how), AdamState(state.step + 1, mu, nu)

    return Optimizer(init, Rule(run))


def apply_updates(params: Any, updates: Any) -> Any:
    """params + updates: the same as ``fd.tree.add``, by optax's name.

    >>> apply_updates({"w": torch.tensor([1.0])}, {"w": torch.tensor([-0.5])})
    {'w': tensor([0.5000])}
    """
    return tree.add(params, updates)


def clip_by_norm(grads: Any, max_norm: float | Tensor, per_member: bool = False) -> Any:
    """grads · min(1, max_norm / (‖grads‖ + 1e-6)), the norm over all leaves, as ``clip_grad_norm_`` has it.

    With ``per_member=True`` every member of a stack has its own norm, and ``max_norm`` may be (n,).

    >>> clip_by_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
    {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    >>> clip_by_norm({"a": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}, 1.0, per_member=True)
    {'a': tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])}
    """
    factor = (max_norm / (tree.norm(grads, per_member) + 1e-6)).clamp(max=1.0)
    return tree.scale(grads, factor, per_member)
