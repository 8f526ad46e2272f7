"""Kinds of layers: how each lays out its weight, and what it computes with one.

Whatever the kind, a change is written as one matrix ΔW of shape ``(out, in, *kernel)``, the rows of the output first:
``(out, in)`` of a linear layer, ``(features, tokens)`` of an embedding, ``(out, in / groups, *kernel)`` of a
convolution, transposed ones too. Here alone is known where that stands in the layer's own weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..structures.parts import Part, place
from .site import Site

CONVOLVE: dict[str, Callable[..., Tensor]] = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
POINTWISE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}

LINEAR = ("linear", "transposed_linear")
TURNED = ("transposed_linear", "embedding")
"""Kinds whose weight is (in, out)."""
KINDS = (*LINEAR, "embedding", *CONVOLVE, "transposed_conv")
NAMES = "Linear, Conv1D, Embedding, Conv1d/2d/3d and ConvTranspose1d/2d/3d"


def matrix_shape(site: Site, parts: tuple[Part, ...] = ()) -> tuple[int, ...]:
    """The shape ``(out, in, *kernel)`` of a change; of ``parts`` of the output, their rows alone.

    That of a bare parameter is its own.

    >>> from funcdelta.methods.site import site_of
    >>> [matrix_shape(site_of("0", layer)) for layer in (torch.nn.ConvTranspose1d(4, 6, 3), torch.nn.Embedding(9, 2))]
    [(6, 4, 3), (2, 9)]
    """
    if site.kind == "tensor":
        assert site.weight is not None
        return site.weight
    rows = sum(part.size for part in parts) or site.width
    if "conv" in site.kind:
        assert site.weight is not None
        assert site.in_features is not None
        return (rows, site.in_features // site.option("groups"), *site.weight[2:])
    assert site.in_features is not None
    return rows, site.in_features


def to_weight(site: Site, change: Tensor, parts: tuple[Part, ...] = ()) -> Tensor:
    """A change, of parts of the output or of all of it, as it is laid out in the layer's weight.

    >>> from funcdelta.methods.site import site_of
    >>> to_weight(site_of("0", torch.nn.Embedding(9, 2)), torch.zeros(2, 9)).shape
    torch.Size([9, 2])
    """
    if parts:
        change = place(change.split([part.size for part in parts], 0), parts, site.width, 0)
    return _other_way(site, change)


def from_weight(site: Site, weight: Tensor) -> Tensor:
    """The layer's weight as a matrix ``(out, in, *kernel)``: the inverse of :func:`to_weight`.

    >>> from funcdelta.methods.site import site_of
    >>> from_weight(site_of("0", torch.nn.Embedding(9, 2)), torch.zeros(9, 2)).shape
    torch.Size([2, 9])
    """
    return _other_way(site, weight)


def _other_way(site: Site, matrix: Tensor) -> Tensor:
    """From (out, in, *kernel) to the layer's own order of axes, or back: each is the other's inverse."""
    if site.kind in TURNED:
        return matrix.mT
    if site.kind == "transposed_conv":  # (groups · a, b, *kernel) as (groups · b, a, *kernel)
        return matrix.unflatten(0, (site.option("groups"), -1)).transpose(1, 2).flatten(0, 1)
    return matrix


def through(site: Site, change: Tensor, x: Tensor, y: Tensor, parts: tuple[Part, ...] = ()) -> Tensor:
    """What the layer would give for ``x`` with ``change`` as its weight and no bias; ``y`` is what it gave.

    >>> from funcdelta.methods.site import site_of
    >>> layer, x = torch.nn.ConvTranspose1d(2, 3, 2, stride=2, bias=False), torch.randn(1, 2, 5)
    >>> site = site_of("0", layer)
    >>> torch.allclose(through(site, from_weight(site, layer.weight), x, layer(x)), layer(x), atol=1e-6)
    True
    """
    if site.kind == "embedding":
        return spare_padding(site, F.embedding(x, change.mT), x)
    if site.kind in LINEAR:
        rows = F.linear(x, change)
        return place(rows.split([part.size for part in parts], -1), parts, site.width) if parts else rows
    if site.kind == "transposed_conv":
        return _transposed(site, to_weight(site, change), x, y)
    return CONVOLVE[site.kind](x, change, groups=site.option("groups"), **_strides(site))


def through_factors(site: Site, b: Tensor, a: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The same with ``change = B A`` in factors (out, r) and (r, in, *kernel), whose product is never made.

    >>> from funcdelta.methods.site import site_of
    >>> site, x = site_of("0", torch.nn.Conv1d(4, 6, 3, groups=2)), torch.randn(1, 4, 5)
    >>> b, a = torch.randn(6, 2), torch.randn(2, 2, 3)
    >>> dense = through(site, (b @ a.flatten(1)).view(6, 2, 3), x, x)
    >>> torch.allclose(through_factors(site, b, a, x, x), dense, atol=1e-5)
    True
    """
    if site.kind == "embedding":
        return spare_padding(site, F.embedding(x, a.mT) @ b.mT, x)
    if site.kind in LINEAR:
        return F.linear(F.linear(x, a), b)
    groups = site.option("groups")
    if site.kind == "transposed_conv":
        hidden = _transposed(site, a.transpose(0, 1).repeat(groups, *[1] * (a.ndim - 1)), x, y)
    else:
        hidden = CONVOLVE[site.kind](x, a.repeat(groups, *[1] * (a.ndim - 1)), groups=groups, **_strides(site))
    return POINTWISE[a.ndim - 2](hidden, b.view(*b.shape, *[1] * (a.ndim - 2)), groups=groups)


def spare_padding(site: Site, change: Tensor, x: Tensor) -> Tensor:
    """``change`` of an embedding's rows: the table gives ``padding_idx`` a value and no gradient, so this does, too.

    >>> from funcdelta.methods.site import site_of
    >>> spare_padding(site_of("0", torch.nn.Embedding(4, 2)), torch.ones(1, 2), torch.tensor([3]))
    tensor([[1., 1.]])
    """
    padding = site.option("padding_idx")
    return change if padding is None else torch.where((x == padding).unsqueeze(-1), change.detach(), change)


def formula_holds(site: Site) -> bool:
    """Whether the layer computes what :func:`through` does, so that a change of its weight is one of its output.

    >>> from funcdelta.methods.site import site_of
    >>> layers = (torch.nn.Conv1d(2, 2, 3, padding_mode=mode) for mode in ("zeros", "circular"))
    >>> [formula_holds(site_of("0", layer)) for layer in layers]
    [True, False]
    """
    if site.own_forward:
        return False
    if site.kind == "embedding":
        # Rows that are shortened are not linear in the weight, and its gradient is divided by counts of tokens.
        return site.option("max_norm") is None and not site.option("scale_grad_by_freq")
    return site.kind not in CONVOLVE or site.option("padding_mode") == "zeros"


def _strides(site: Site) -> dict[str, Any]:
    return {key: site.option(key) for key in ("stride", "padding", "dilation")}


def _transposed(site: Site, weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """A transposed convolution to the size of ``y``: a caller may have asked for another than the layer's own."""
    axes = weight.ndim - 2
    stride, padding, dilation = site.option("stride"), site.option("padding"), site.option("dilation")
    kernel = weight.shape[2:]
    sizes = zip(x.shape[-axes:], y.shape[-axes:], stride, padding, dilation, kernel, strict=True)
    more = [out - ((size - 1) * s - 2 * p + d * (k - 1) + 1) for size, out, s, p, d, k in sizes]
    groups = site.option("groups")
    return TRANSPOSED[axes](x, weight, None, stride, padding, more, groups, dilation)
