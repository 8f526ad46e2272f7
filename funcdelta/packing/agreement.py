"""Checks that a member computes the same in a packed stack as alone, which its method promises.

``axes`` of a leaf promise that padding with zeros changes nothing, ``in_leaves`` and ``as_leaves`` that no function
reads these fields. A method that breaks its promise would compute something else once its members share a stack. So
both ways run once, with random leaves in double precision, for every kind of site where members differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..methods.acts import Acts, with_fixed
from ..methods.leaf import as_leaves, growing
from ..methods.own import Own
from ..methods.site import Site
from ..model import DeltaModel
from ..plan.attachment import Attachment
from ..plan.forms import moved
from ..plan.rewriting import LARGEST
from ..transforms import outside_transforms
from ..trees.drawing import own_defaults
from .packed import SIZE, Origin, Packed, longer


def check_agreement(delta: DeltaModel) -> None:
    """Raise ``ConfigError`` if a member would compute something else in a stack of the packed ``delta`` than alone."""
    starts = {group.name: group.start for group in delta.plan.shared if not group.expanded}
    seen: set[Any] = set()
    for a in delta.plan.all():
        config = a.config
        if not isinstance(config, Packed) or len(config.origins) == 1 or a.name not in starts:
            continue
        shared = {leaf: one.value for leaf, one in starts[a.name].items()}
        for origin in config.origins:
            kind = a.name, origin.config, dataclasses.replace(a.site, path="")
            if kind not in seen and origin.at(a.site.address):
                seen.add(kind)
                _compare(a, origin, delta.backbone.get_submodule(a.site.path), shared)


def _compare(a: Attachment, origin: Origin, module: nn.Module, shared: Mapping[str, Tensor]) -> None:
    packed, config, site = a.config, origin.config, dataclasses.replace(a.at(False), axes=())
    assert isinstance(packed, Packed)
    with torch.inference_mode(False), torch.no_grad(), outside_transforms(), own_defaults():
        given = as_leaves(config.leaves(site, Own(module, site.path), torch.Generator().manual_seed(0)), "leaves")
        member = {leaf: one for leaf, one in given.items() if one.of == "member"}
        rng = torch.Generator().manual_seed(0)
        alone = {leaf: moved(one.value, one.trains, rng) for leaf, one in member.items()}
        axes = growing({leaf: one.axes for leaf, one in member.items()})
        stacked, sizes = dict(alone), growing(a.axes)
        for name, own in axes.items():
            for leaf, axis in own.axes.items():
                stacked[leaf] = longer(stacked[leaf], axis, sizes[name].size(a.own), own.pieces[leaf])
            if SIZE + name in a.leaves:
                stacked[SIZE + name] = _number(own.size({leaf: tuple(t.shape) for leaf, t in alone.items()}))
        common = {leaf: moved(tensor, leaf in a.leaves, rng) for leaf, tensor in shared.items()}
        fields = {name: _number(getattr(config, name)) for name in packed.varying}
        common = {leaf: tensor for leaf, tensor in common.items() if leaf != "source" and leaf not in fields}
        extra = {"source": _number(0.0), **({"present": _number(1.0)} if "present" in a.leaves else {})}
        p = {**common, **alone}
        reading = with_fixed(config.acts(site), a.fixed, next(iter(p)))
        try:
            expected = _outputs(reading, site, module, p)
            found = _outputs(a.acts(), site, module, {**common, **stacked, **fields, **extra})
        except Exception:  # the first call raises the method's error again, and names the site
            return
    far = max((_apart(left, right) for left, right in zip(found, expected, strict=True)), default=0.0)
    if far > 1e-8:
        differ = [name for name in axes if SIZE + name in a.leaves]
        why = f"in_leaves or as_leaves names a field of {type(config).__name__} that its functions read"
        if differ:
            called = ", ".join(map(repr, differ))
            why = (
                f'zeros at the end of the axes called {called} change what it computes (write "." for these), or {why}'
            )
        raise ConfigError(
            f"{type(config).__name__} would compute something else at {site.address} in a stack with members of "
            f"another size than alone (they differ by {far:.1e}): {why}."
        )


def _outputs(acts: Acts, site: Site, module: nn.Module, p: dict[str, Tensor]) -> list[Tensor]:
    """The functions' outputs for random values, or for random tensors of the site."""
    rng = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    own = {name: drawn(*t.shape) for name, t in module._parameters.items() if t is not None and t.is_floating_point()}
    small = sum(tensor.numel() for tensor in own.values()) <= LARGEST
    if acts.attend is not None:
        return list(acts.attend(p))
    if acts.prompt is not None:
        return [acts.prompt(p)]
    if acts.by_values and acts.exact and (small or acts.tokenwise):
        along = (3,) * (len(site.weight) - 2) if "conv" in site.kind and site.weight is not None else ()
        y = drawn(2, site.width, *along) if along or site.channel_axis != -1 else drawn(2, 3, site.width)
        width = site.in_features or site.width
        x = drawn(2, width, *along) if along else drawn(2, 3, width)
        if site.kind == "embedding":
            x = torch.randint(width, (2, 3), generator=rng)
        if acts.weights is None or not along:
            x = acts.before(p, x) if acts.before is not None else x
            return [x, acts.after(p, y, x)] if acts.after is not None else [x]
    return list(acts.weights(p, own).values()) if acts.weights is not None and small else []


def _number(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _apart(left: Tensor, right: Tensor) -> float:
    if left.shape != right.shape:
        return float("inf")
    return float((left - right).abs().max() / (1 + right.abs().max())) if left.numel() else 0.0
