"""What a method does at one site, as a value: pure functions on one member's leaves, and facts about them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Params = dict[str, Tensor]
"""One member's leaves at a site, under their own names."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values to what attention gives; shapes as in :class:`Acts`, at ``around``."""

Factors = dict[str, tuple[Tensor, Tensor]]
"""``{own name: (B, A)}`` with ΔW = B A: B (rows, r), A (r, the weight's other axes, flat)."""


def before_all(module: nn.Module, bias: Tensor, added: int) -> Tensor:
    """``bias`` (1, heads, queries, length) with ``added`` columns of zeros in front.

    >>> before_all(nn.Identity(), torch.ones(1, 1, 1, 2), 1)
    tensor([[[[0., 1., 1.]]]])
    """
    return torch.nn.functional.pad(bias, (added, 0))


@dataclass(frozen=True)
class Acts:
    """The functions that a method has at a site; ``None`` where it has none.

    A composition of methods composes these, so that whatever its parts do it does, too.

    Attributes:
        before: ``(p, x)``, the hidden input that the site gets instead of x.
        after: ``(p, y, x)``, the hidden output that leaves instead of y.
        weights: ``(p, w)``, the site's own tensors rewritten.
        attend: ``(p)``, keys and values that every query of the attention module sees too.
        widen_bias: ``(module, bias, added)``, a position bias with columns for those keys in front.
        around: ``(p, q, k, v, run)``, what leaves the attention, before its output projection, instead of
            ``run(q, k, v)``, which is the model's own: its mask, position bias, scale, dropout and cache, and the keys
            that an ``attend`` adds. q (rows, heads, queries, key size), rotated where the model rotates; k (rows, key
            heads, length, key size) and v (rows, key heads, length, value size), with what the cache holds, and with
            fewer heads than q where queries share keys; the result (rows, heads, queries, value size). ``run`` takes
            other numbers of the same shapes. Of the very tensors that it was given, the model's attention is computed
            once, however often it is asked for.
        prompt: ``(p)``, rows before the embedded input.
        factors: ``(p)``, the change of weights as products of low rank.
        present: ``(p)``, a number above 0 where the member has this delta here; ``None``: every member has.
        tokenwise: whether ``before`` and ``after`` take the tokens of many members at once, in batched products.
        exact: whether ``before`` and ``after`` compute what ``weights`` does; else the delta acts by its weights.
        unmergeable: why ``weights`` does not give what the delta computes; ``None`` if it does.
        unfactored: why there are no ``factors``, where that has a reason of its own.
        expand_ids: with a prompt, ``{input name: what is put before it}``; ``None``: what is usual.
        reads: names of the site's own tensors, or of modules below it (``k_proj.weight``), that its functions get, as
            ``p["own.weight"]``, to be read only.
        conditions: names of what ``before`` and ``after`` get of the call itself, as ``p["call.mask"]``, row by row as
            the inputs are. Four are read off the text that the model around the site takes: ``mask`` (rows, tokens),
            bool, which tokens are text; ``positions`` (rows, tokens), int64, each token's number in its own text,
            -1 where it is padding, going on where others are cached; ``lengths`` (rows,), int64, how many tokens the
            text has so far, cached ones included; ``cached`` (), int64, how many were cached before this call. Any
            other name is the caller's: ``delta.apply(params, ..., conditions={"gate": gates})``, with rows in front,
            one row, or a number for all. A caller may give the four, too, where a model does not tell them.
        strip: whether the prompt's positions are left out of outputs.

    >>> acts = Acts(after=lambda p, y, x: y + p["shift"])
    >>> acts.by_values, acts.weights is None, acts.after({"shift": 2}, 1, 0)
    (True, True, 3)
    >>> acts = Acts(after=lambda p, y, x: y * p["call.mask"].unsqueeze(-1), conditions=("mask",))
    >>> acts.after({"call.mask": torch.tensor([[True, False]])}, torch.ones(1, 2, 2), None)
    tensor([[[1., 1.],
             [0., 0.]]])
    """

    before: Callable[[Params, Tensor], Tensor] | None = None
    after: Callable[[Params, Tensor, Tensor], Tensor] | None = None
    weights: Callable[[Params, Params], Params] | None = None
    attend: Callable[[Params], tuple[Tensor, Tensor]] | None = None
    widen_bias: Callable[[nn.Module, Tensor, int], Tensor] = before_all
    around: Callable[[Params, Tensor, Tensor, Tensor, Attention], Tensor] | None = None
    prompt: Callable[[Params], Tensor] | None = None
    factors: Callable[[Params], Factors] | None = None
    present: Callable[[Mapping[str, Tensor]], Tensor | None] | None = None
    tokenwise: bool = False
    exact: bool = True
    unmergeable: str | None = None
    unfactored: str | None = None
    reads: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    expand_ids: Mapping[str, float] | None = None
    strip: bool = False

    @property
    def by_values(self) -> bool:
        """Whether it acts on hidden values."""
        return self.before is not None or self.after is not None

    @property
    def in_attention(self) -> bool:
        """Whether it acts where an attention module computes its softmax."""
        return self.attend is not None or self.around is not None

    @property
    def anything(self) -> bool:
        """Whether it does anything at all."""
        return self.by_values or self.in_attention or self.weights is not None or self.prompt is not None


OWN = "own."
"""Before the name of one of the site's own tensors among leaves."""

CALL = "call."
"""Before the name of what a call tells beside them."""


def depends_on_call(conditions: Sequence[str]) -> str | None:
    """Why what these conditions decide cannot be written into a weight; ``None`` where there are none.

    >>> depends_on_call(("gate",))
    'what it does depends on the call (gate), and no weight knows that'
    """
    return (
        f"what it does depends on the call ({', '.join(conditions)}), and no weight knows that" if conditions else None
    )


OF_LEAVES = ("before", "after", "weights", "attend", "around", "prompt", "factors")
"""The functions that get a member's leaves first."""


def on_leaves(acts: Acts, change: Callable[[Params], Params]) -> Acts:
    """``acts`` whose functions get ``change(p)`` where these are given ``p``.

    >>> acts = on_leaves(Acts(prompt=lambda p: p["rows"]), lambda p: {"rows": p["lora.rows"]})
    >>> acts.prompt({"lora.rows": torch.ones(1)}), acts.before is None
    (tensor([1.]), True)
    """

    def changed(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
        return None if function is None else lambda p, *values: function(change(p), *values)

    return dataclasses.replace(acts, **{name: changed(getattr(acts, name)) for name in OF_LEAVES})


def with_fixed(acts: Acts, fixed: Mapping[str, Tensor], leading: str) -> Acts:
    """``acts`` whose functions get, beside a member's leaves, tensors that all members have together.

    These have no member axis, so they are bound here, outside of every map over members. They follow the precision
    and the device of the leaf ``leading``. Where ``p`` holds one of them, a tensor of the backbone's that a call was
    given in the place of its own, that one is meant.

    >>> acts = with_fixed(Acts(after=lambda p, y, x: y @ p["basis"] * p["d"]), {"basis": torch.eye(2)}, "d")
    >>> acts.after({"d": torch.tensor(2.0)}, torch.ones(1, 2), None)
    tensor([[2., 2.]])
    """

    def beside(p: Params) -> Params:
        like = p[leading]
        same = {name: p.get(name, t).to(like.device) for name, t in fixed.items()}
        return {**p, **{name: t.to(like.dtype) if t.is_floating_point() else t for name, t in same.items()}}

    return on_leaves(acts, beside) if fixed else acts
