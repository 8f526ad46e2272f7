"""Converts between deltas and dense changes, ``{name of a weight: ΔW}``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ParamsError
from ..match import near
from ..merge import changes
from ..model import DeltaModel
from ..packing.packed import Packed
from ..plan.attachment import Attachment
from ..plan.sharing import expand_member
from ..trees.leaves import compute_dtype
from ..trees.stack import unstack
from .factored import Factored, Factors, factors_of, is_stack, need_factors, unfactored, write
from .ranks import gauged


def materialise(delta: DeltaModel, params: Mapping[str, Tensor], untie: bool = False) -> dict[str, Tensor]:
    """``{name: ΔW}`` of every tensor that ``delta.merge(params)`` changes: the merged tensor minus the backbone's.

    Tensors have the backbone's shapes, with a member axis (n,) in front for a stack. A change that is B A, or p - w of
    a trained leaf, is computed as such, in the leaves' dtype. For other methods it is the difference of weights, with
    the rounding of the backbone's dtype. Memory for a stack of n is n times the weights.

    Raises ``MergeError`` if ``merge`` does, and takes ``untie`` like it.

    >>> delta = fd.BitFitModel(torch.nn.Sequential(torch.nn.Linear(4, 2)), modified_modules=["0"])
    >>> fd.algebra.materialise(delta, {"0.bitfit.bias": torch.tensor([1.0, 2.0])})
    {'0.bias': tensor([1., 2.])}
    """

    def one(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        still = {name: leaf.detach() if name in delta.constants else leaf for name, leaf in params.items()}
        return _member(delta, expand_member(delta.plan.shared, still), untie)

    if not is_stack(delta, params):
        return one(params)
    if any(isinstance(config, Packed) for config in delta.configs):
        return _side_by_side([one(member) for member in unstack(dict(params))])
    return torch.vmap(one)(dict(params))


def _side_by_side(members: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the changes of members that may change different weights, with zeros for those that are missing."""
    like = {name: change for member in members for name, change in member.items()}
    return {
        name: torch.stack([member.get(name, torch.zeros_like(zero)) for member in members])
        for name, zero in like.items()
    }


def _member(delta: DeltaModel, params: Mapping[str, Tensor], untie: bool) -> dict[str, Tensor]:
    merged = changes(delta, params, untie)
    own = {name: tensor.detach() for name, tensor in delta.backbone.state_dict().items()}
    sums = {
        end: params[name] - own[end].to(params[name])
        for name, ends in delta.plan.trained.items()
        if name in params
        for end in ends
    }
    for path, attachments in delta.plan.attachments.items():
        acting = [a for a in attachments if a.among(params)]
        if any(isinstance(a.config, Packed) or unfactored(a) for a in acting):
            sums = {name: change for name, change in sums.items() if name.rpartition(".")[0] != path}
            continue
        for a in acting:
            for leaf, (b, a_) in factors_of(a, a.of(params), stacked=False).items():
                name = f"{path}.{leaf}"
                change = (b @ a_).reshape(own[name].shape)
                sums[name] = sums[name] + change if name in sums else change
    # A tensor with several names is a single object in ``merged``, but its sum is only under the site's name.
    by_tensor = {id(merged[name]): change for name, change in sums.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in merged.items():
        change = sums.get(name, by_tensor.get(id(tensor)))
        found[name] = change if change is not None else tensor - own[name] if name in own else tensor
    return found


def from_dense(delta: DeltaModel, dense: Mapping[str, Tensor]) -> tuple[DeltaModel, dict[str, Tensor]]:
    """The params of ``delta``'s rank whose changes are closest to ``dense``, in the gauge of :func:`canonical`.

    Keeps the largest singular values of every ΔW (Eckart and Young 1936). ``dense`` is ``{name of a weight: ΔW}``, as
    from :func:`materialise`, with a first axis (n,) for a stack; trained backbone leaves get their changes exactly. The
    returned delta has scale 1. For gradients see :func:`truncate`.

    Raises ``ParamsError`` if a weight is missing, has another shape, or is not changed by the delta.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(4, 8))
    >>> delta, full = (fd.LoraModel(backbone, lora_r=r, modified_modules=["0"]) for r in (2, 4))
    >>> change = torch.outer(torch.arange(8.0), torch.ones(4))
    >>> found = fd.algebra.from_dense(delta, {"0.weight": change})
    >>> torch.allclose(fd.algebra.materialise(*found)["0.weight"], change, atol=1e-5)
    True
    """
    places = _places(delta)
    trained = {name: tuple(tensor.shape) for name, tensor in delta.backbone.named_parameters()}
    trained = {name: trained[name] for name in delta.plan.trained}
    for name, ends in delta.plan.trained.items():
        both = [end for end in ends if end in places]
        if both:
            raise ParamsError(
                f"{both[0]} is changed by the delta and also trained itself ({name} in unfrozen_modules), so its "
                f"change could be split between the two in many ways: build the delta for from_dense with only one."
            )
    given = _by_place(delta, dense, [*places, *trained])
    n = _members(given, {name: shape for name, (_, _, shape) in places.items()} | trained)
    sites: dict[str, dict[str, Factors]] = {}
    rank = 0
    for name, (a, own, shape) in places.items():
        matrix = given[name].to(compute_dtype(given[name].dtype)).flatten(1 - len(shape))
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        k = _fresh(a)[own][1].shape[-2]
        sites.setdefault(a.site.path, {})[own] = gauged(u[..., :k], s[..., :k], vh[..., :k, :])
        rank = max(rank, k)
    base = delta.plan.all()[0].config
    return write(Factored(delta, base, n, sites, {name: given[name] for name in trained}), rank)


def _fresh(a: Attachment) -> dict[str, Factors]:
    """Factors of zeros, for their shapes."""
    shapes = a.own
    return factors_of(a, {leaf: torch.zeros(shapes[leaf]) for leaf in shapes}, stacked=False)


def _places(delta: DeltaModel) -> dict[str, tuple[Attachment, str, tuple[int, ...]]]:
    """``{name of a weight: (attachment that changes it, own name, shape)}``."""
    found: dict[str, tuple[Attachment, str, tuple[int, ...]]] = {}
    state = delta.backbone.state_dict()
    for a in need_factors(delta):
        for own in _fresh(a):
            name = f"{a.site.path}.{own}"
            if name not in state:
                raise ParamsError(f"{name} is not in the backbone's state dict, so it is computed at each call.")
            if name in found:
                raise ParamsError(
                    f"{name} is changed by both {found[name][0].name} and {a.name}, so a change could be split between "
                    f"them in many ways: pass from_dense a delta with one config."
                )
            found[name] = a, own, tuple(state[name].shape)
    return found


def _by_place(delta: DeltaModel, dense: Mapping[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
    """The changes under the delta's names; ``dense`` may also, or instead, have other names of the same tensors."""
    tensors = dict(delta.backbone.named_parameters(remove_duplicate=False))
    owners = {id(tensors[name]): name for name in wanted if name in tensors}
    same = {end: owners[id(tensor)] for end, tensor in tensors.items() if id(tensor) in owners}
    same |= {name: name for name in wanted}
    for name in dense:
        if name not in same:
            raise ParamsError(f"from_dense: the delta does not change {name!r}.{near(name, wanted)}")
    found = {name: dense[name] for name in wanted if name in dense}
    found |= {same[name]: change for name, change in dense.items() if same[name] not in found}
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ParamsError(
            f"from_dense: {len(missing)} changes are missing, first {missing[0]!r}. Give zeros for a weight that does "
            f"not change."
        )
    return found


def _members(given: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """The number of members, on which all changes must agree; ``None`` for one member."""
    first = next(iter(shapes))
    n = given[first].shape[0] if given[first].ndim > len(shapes[first]) else None
    for name, shape in shapes.items():
        expected = shape if n is None else (n, *shape)
        if tuple(given[name].shape) != expected:
            raise ParamsError(
                f"from_dense: the change of {name} has shape {tuple(given[name].shape)}; expected {expected}."
            )
    return n
