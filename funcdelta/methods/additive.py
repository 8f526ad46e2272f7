"""Methods that add to a weight: ``W + ΔW``, by activations as ``y + layer(x; ΔW)``, on every kind of layer.

A method is its ``init`` and either ``change``, the matrix ΔW, or ``low_rank``, its factors. The form on activations,
the one on weights, merging, factors for :mod:`funcdelta.algebra` and half precision follow from that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional.tokenwise import linear
from ..sites.parts import Part, place
from ..sites.site import Site
from .acts import Acts, Factors
from .config import BaseDeltaConfig, packed_weight
from .layers import KINDS, LINEAR, NAMES, TURNED, formula_holds, matrix_shape, through, through_factors, to_weight


@dataclass(frozen=True)
class LowRank:
    """``ΔW = s B A``; with several pairs each writes one of the parts of the output.

    Attributes:
        b: B (out, r), the rows of all parts one below the other.
        a: A (r, in, *kernel), or (k r, in) where each of k parts has a pair of its own.
            Of a bare parameter that holds many matrices both have its leading axes first.
        scale: s.

    >>> LowRank(torch.ones(3, 1), torch.ones(1, 2), torch.tensor(2.0)).dense(()).tolist()
    [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    b: Tensor
    a: Tensor
    scale: Tensor

    def dense(self, parts: tuple[Part, ...]) -> Tensor:
        """ΔW of one member."""
        if self.b.ndim > 2:  # one matrix an expert
            return self.scale * self.b @ self.a
        b, a = self.scale * self.b, self.a.flatten(1)
        if not self._in_pairs():
            return (b @ a).unflatten(1, self.a.shape[1:])
        pairs = zip(b.split([part.size for part in parts], 0), a.chunk(len(parts), 0), strict=True)
        return torch.cat([rows @ columns for rows, columns in pairs])

    def onto(self, site: Site, y: Tensor, x: Tensor, parts: tuple[Part, ...]) -> Tensor:
        """``y + s B (A x)``: two thin products; of a linear layer for one member or, tokenwise, for each of many."""
        if site.kind not in LINEAR:
            return y + through_factors(site, self.scale * self.b, self.a, x, y)
        if self._in_pairs():
            hidden = linear(x, self.a).chunk(len(parts), -1)
            rows = (self.scale * self.b).split([part.size for part in parts], -2)
            return y + place([linear(h, row) for h, row in zip(hidden, rows, strict=True)], parts, site.width)
        # Scaled between the two products, where there are fewest numbers.
        hidden = linear(x, self.a) * self.scale
        if parts:
            rows = linear(hidden, self.b).split([part.size for part in parts], -1)
            return y + place(rows, parts, site.width)
        if self.a.ndim == 2 or y.dtype.itemsize < 4:  # half precision rounds as it does for one member
            return y + linear(hidden, self.b)
        return torch.baddbmm(y, hidden, self.b.mT)

    def _in_pairs(self) -> bool:
        return self.a.shape[-2] != self.b.shape[-1] and self.a.ndim == self.b.ndim


@dataclass(frozen=True)
class Additive(BaseDeltaConfig):
    """The base of methods that add ΔW, a matrix ``(out, in, *kernel)``, to the weight of a layer.

    >>> @dataclass(frozen=True)
    ... class Outer(Additive):
    ...     def init(self, site, rng):
    ...         rows, *columns = self.matrix_shape(site)
    ...         return {"u": torch.zeros(rows), "v": torch.randn(columns, generator=rng)}
    ...     def change(self, site, p):
    ...         return torch.tensordot(p["u"].unsqueeze(1), p["v"].unsqueeze(0), 1)
    >>> delta = fd.DeltaModel(torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3)), Outer(modified_modules=["0"]))
    >>> params, x = {"0.outer.u": torch.ones(3), "0.outer.v": torch.ones(2, 3, 3)}, torch.randn(1, 2, 5, 5)
    >>> merged = torch.func.functional_call(delta.backbone, delta.merge(params), x)
    >>> torch.allclose(delta.apply(params, x), merged, atol=1e-5)
    True
    """

    acts_on_parts: ClassVar[bool] = True

    def change(self, site: Site, p: dict[str, Tensor]) -> Tensor:
        """ΔW of one member, of the shape :meth:`matrix_shape`."""
        factors = self.low_rank(site, p)
        if factors is None:
            raise ConfigError(f"{type(self).__name__} gives neither change(self, site, p) nor low_rank(self, site, p).")
        return factors.dense(self.parts(site))

    def low_rank(self, site: Site, p: dict[str, Tensor]) -> LowRank | None:
        """ΔW in factors, where the method has some; its dense form is then made for merging alone."""
        return None

    def entering(self, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        """What the change sees instead of ``x``: dropout in training."""
        return x

    def takes_tensors(self) -> bool:
        return True

    def parts(self, site: Site) -> tuple[Part, ...]:
        """The parts of the output that are changed; empty: all of it."""
        return site.parts

    def matrix_shape(self, site: Site) -> tuple[int, ...]:
        """The shape ``(out, in, *kernel)`` of ΔW at ``site``."""
        return matrix_shape(site, self.parts(site))

    # -- what follows from it --------------------------------------------------------------------------------------

    def check(self, site: Site) -> str | None:
        if site.kind == "tensor" and not site.why:
            return None
        if site.kind not in KINDS or site.out_features is None or site.in_features is None:
            why = f": {site.why}" if site.why else ""
            return f"it adds to the weight of {NAMES}, and this is {site.module_type}{why}"
        return None if site.weight is not None or site.kind in LINEAR else f"{site.module_type} has no weight tensor"

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        """``y + layer(x; ΔW)``, through the factors where there are some."""
        x, parts = self.entering(site, p, x), self.parts(site)
        if self.has_factors:
            factors = self.low_rank(site, p)
            assert factors is not None
            return factors.onto(site, y, x, parts)
        return y + through(site, self.change(site, p), x, y, parts)

    def weights(self, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        """``W + ΔW``, in the layout of the module's weight."""
        name = site.tensor or "weight"
        return w | {name: w[name] + to_weight(site, self.change(site, p), self.parts(site))}

    def holds_on_values(self, site: Site) -> bool:
        return formula_holds(site)

    def tokenwise(self, site: Site) -> bool:
        return self.has_factors and site.kind in LINEAR

    def unmergeable(self, site: Site) -> str | None:
        if site.weight is None:
            return f"{site.module_type} has no weight tensor"
        return packed_weight(site) if site.packed else None

    def acts(self, site: Site) -> Acts:
        parts, acts = self.parts(site), super().acts(site)
        if not self.has_factors:
            return acts
        if parts:
            names = ", ".join(part.name for part in parts)
            return dataclasses.replace(acts, unfactored=f"it acts on parts ({names}) of the output")
        if site.kind == "transposed_conv":
            return dataclasses.replace(acts, unfactored=f"the weight of {site.module_type} mixes rows and columns")
        if site.kind == "tensor" and len(site.weight or ()) != 2:
            return dataclasses.replace(acts, unfactored=f"{site.tensor} is not one matrix")
        return dataclasses.replace(acts, factors=lambda p: self._factors(site, p))

    def _factors(self, site: Site, p: dict[str, Tensor]) -> Factors:
        """``(s B, A)``; with the weight's axes the other way round ``(Aᵀ, s Bᵀ)``."""
        found = self.low_rank(site, p)
        assert found is not None
        b, a = found.scale * found.b, found.a.flatten(1)
        return {site.tensor or "weight": (a.mT, b.mT) if site.kind in TURNED else (b, a)}

    @property
    def has_factors(self) -> bool:
        """Whether the method gives ``low_rank``."""
        return type(self).low_rank is not Additive.low_rank
