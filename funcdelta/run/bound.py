"""How a method's pure functions are called: in the leaves' precision, with the module's own precision going out."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, MergeError
from ..functional.tokenwise import Tokenwise
from ..match import below
from ..methods.acts import CALL, Acts, Attention
from ..plan.attachment import Attachment
from ..plan.axes import in_order
from ..plan.rewriting import check_rewritten
from .attention import joined


def rewritten(
    attachment: Attachment, p: dict[str, Tensor], own: Mapping[str, Tensor], training: bool
) -> dict[str, Tensor]:
    """The site's tensors as ``weights`` rewrites them, by their full names and in their own dtype.

    The arithmetic is done in the leaves' dtype, or in the tensors' own where that is finer: half-precision weights are
    raised and lowered again, and none is rounded to the precision of its change.
    """
    path, dtype = attachment.site.path, _leaf_dtype(p, attachment.leading)
    weights = attachment.acts(training).weights
    assert weights is not None
    floating = [t.dtype for t in own.values() if t.is_floating_point() and t.dtype.itemsize > 1]  # not float8
    finest = functools.reduce(torch.promote_types, floating, dtype)
    if finest != dtype:
        dtype = finest
        p = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in p.items()}
    raised = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in own.items()}
    try:
        changed = weights(p, raised)
    except KeyError as error:
        if error.args[0] in raised:
            raise
        raise MergeError(
            f"{path} ({attachment.site.module_type}) has no parameter {error} that {attachment.name} could "
            f"rewrite; it has "
            f"{', '.join(raised) or 'none'}."
        ) from error
    check_rewritten(changed, raised, f"{type(attachment.config).__name__}.weights", path)
    like = next(iter(own.values())).dtype if own else dtype
    return {
        below(path, name): tensor.to(own[name].dtype if name in own else like)
        for name, tensor in changed.items()
        if raised.get(name) is not tensor
    }


class Bound:
    """One of a method's functions at its site.

    Attributes:
        conditions: what the method wants to know of the call; its values come after the hidden ones.
        key: the key in params that stands for all of the attachment's.
        first: the leaf whose precision it computes in.
        spans: whether it gets what entered another module.
        keeps_shape: whether what it gives has the shape of what it is given.
        functions: in evaluation and in training mode, computed in the leaves' dtype.
        acts: what the method does there, in evaluation and in training mode.
        alone, together: the function itself in both modes, for one member and for many, where no axes have to be moved;
            for hidden values of the leaves' own precision.
    """

    __slots__ = (
        "acts",
        "alone",
        "attachment",
        "conditions",
        "first",
        "functions",
        "keeps_shape",
        "key",
        "pairs",
        "spans",
        "together",
    )

    def __init__(
        self, attachment: Attachment, make: Callable[[Acts], Callable[..., Tensor]], function: str = ""
    ) -> None:
        self.attachment, self.key, self.first = attachment, attachment.key, attachment.leading
        self.acts = attachment.acts(False), attachment.acts(True)
        self.conditions = self.acts[0].conditions
        self.pairs = tuple(attachment.leaves.items())
        self.spans = attachment.site.exit is not None
        self.keeps_shape = function == "after" and self.acts[False].before is None
        self.functions = make(self.acts[False]), make(self.acts[True])
        self.alone = tuple(getattr(acts, function) for acts in self.acts) if function else ()
        pairs = zip(self.alone, self.functions, strict=False)
        self.together = tuple(Tokenwise(own) if isinstance(function, Tokenwise) else own for own, function in pairs)

    def leaves(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leaves under their own names, and what ``params`` have in the place of tensors that the method reads."""
        found = {name: params[key] for name, key in self.pairs}
        if self.attachment.reads:
            found |= {leaf: params[name] for leaf, name in self.attachment.reads if name in params}
        return found


def bound_in_both_modes(attachment: Attachment, function: str) -> Bound:
    """The method's function at its site, ready for both modes."""
    as_it_is = function if attachment.config.axis_order is None and not attachment.acts().conditions else ""
    return Bound(attachment, lambda acts: _bound(attachment, acts, function), as_it_is)


def _bound(attachment: Attachment, acts: Acts, function: str) -> Callable[..., Tensor]:
    """The method's function, computed in the leaves' dtype and returned in the hidden value's own."""
    config, first = attachment.config, attachment.leading
    method, wanted = in_order(getattr(acts, function), config.axis_order), [CALL + name for name in acts.conditions]

    def act(p: dict[str, Tensor], *values: Tensor) -> Tensor:
        dtype, own = _leaf_dtype(p, first), values[0].dtype
        raised = [v.to(dtype) if v.dtype != dtype and v.is_floating_point() else v for v in values]
        if wanted:  # what the call tells comes last
            told, raised = raised[-len(wanted) :], raised[: -len(wanted)]
            p = {**p, **dict(zip(wanted, told, strict=True))}
        result = method(p, *raised)
        return in_precision(result, own, f"{type(config).__name__}.{function}", attachment.site.path)

    # A config's order of axes counts those of the model's own value.
    return Tokenwise(act) if acts.tokenwise and config.axis_order is None and not wanted else act


def in_precision(result: Any, own: torch.dtype, who: str, path: str) -> Tensor:
    """What a method gave for a hidden value of the dtype ``own``, in that dtype.

    Raises ``ConfigError`` where it is no tensor, or has another kind of numbers, which would be rounded or lost.

    >>> in_precision(torch.ones(2), torch.float16, "MyConfig.after", "0").dtype
    torch.float16
    """
    if not isinstance(result, Tensor):
        raise ConfigError(f"{who} at {path} returned {type(result).__name__}; expected a tensor.")
    if result.dtype == own or not own.is_floating_point:
        return result
    if not result.is_floating_point():
        raise ConfigError(f"{who} at {path} returned {result.dtype}, where the hidden value is {own}; expected that.")
    return result.to(own)


def added_in_both_modes(attachment: Attachment) -> Bound:
    """What the method adds at an attention site, (P, key width + value width) for each row of the value given."""

    def bound(acts: Acts) -> Callable[..., Tensor]:
        site, attend = attachment.site, acts.attend
        assert attend is not None

        def act(p: dict[str, Tensor], slot: Tensor) -> Tensor:
            added = joined(site.path, site.attention, *attend(p))
            return added.to(slot.dtype).expand(slot.shape[0], *added.shape)

        return act

    return Bound(attachment, bound)


def around_in_both_modes(attachment: Attachment) -> Bound:
    """The method's function around an attention, computed in the leaves' dtype; ``run`` computes in the model's own."""

    def bound(acts: Acts) -> Callable[..., Tensor]:
        around, path, first = acts.around, attachment.site.path, attachment.leading
        assert around is not None

        def act(p: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, run: Attention) -> Tensor:
            dtype, own, given = _leaf_dtype(p, first), q.dtype, (q, k, v)
            raised = q.to(dtype), k.to(dtype), v.to(dtype)

            def in_own(*values: Tensor) -> Tensor:
                pairs = zip(values, raised, given, strict=True)
                lowered = [old if value is same else value.to(own) for value, same, old in pairs]
                return run(*lowered).to(dtype)

            result = around(p, *raised, in_own)
            shape = (*q.shape[:-1], v.shape[-1])
            if not isinstance(result, Tensor) or tuple(result.shape) != shape:
                found = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
                raise ConfigError(
                    f"{type(attachment.config).__name__}.around gave {found} at {path}; expected what run(q, k, v) "
                    f"gives, (rows, heads, queries, value size) = {shape}."
                )
            return result.to(own)

        return act

    return Bound(attachment, bound)


def _leaf_dtype(p: dict[str, Tensor], first: str = "") -> torch.dtype:
    """The precision of the leaf ``first``, or of the first that has one."""
    for tensor in (p[first], *p.values()) if first in p else p.values():
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32
