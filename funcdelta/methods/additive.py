"""Methods that add to a weight: ``W + ΔW``, by activations as ``y + layer(x; ΔW)``, on every kind of layer.

A method is its ``init`` and either ``change``, the matrix ΔW, or ``low_rank``, its factors. The form on activations,
the one on weights, merging, factors for :mod:`funcdelta.algebra` and half precision follow from that.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..errors import ConfigError
from ..functional.dropout import dropout
from ..structures.parts import Part
from .acts import Acts, Factors
from .config import BaseDeltaConfig, packed_weight
from .layers import KINDS, LINEAR, NAMES, TURNED, formula_holds, matrix_shape, through, to_weight
from .low_rank import LowRank
from .site import Site


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
    dropout_field: ClassVar[str] = ""
    """The field with the probability of dropout on what enters the change, if the method has one."""

    def change(self, site: Site, p: dict[str, Tensor]) -> Tensor:
        """ΔW of one member, of the shape :meth:`matrix_shape`."""
        factors = self.low_rank(site, p)
        if factors is None:
            raise ConfigError(f"{type(self).__name__} gives neither change(self, site, p) nor low_rank(self, site, p).")
        if not isinstance(factors, LowRank):
            raise ConfigError(
                f"{type(self).__name__}.low_rank gave {type(factors).__name__} at {site.address}; expected "
                f"fd.LowRank(b, a, scale)."
            )
        factors.check(self.matrix_shape(site), f"{type(self).__name__}.low_rank at {site.address}")
        return factors.dense(self.parts(site))

    def low_rank(self, site: Site, p: dict[str, Tensor]) -> LowRank | None:
        """ΔW in factors, where the method has some; its dense form is then made for merging alone."""
        return None

    def entering(self, site: Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        """What the change sees instead of ``x``: in training what the method's ``dropout_field`` leaves of it."""
        if not self.dropout_field or site.kind == "embedding" or not site.training:
            return x
        probability = p[self.dropout_field] if self.dropout_field in p else getattr(self, self.dropout_field)
        return dropout(x, probability, True)

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
            return self._check_dropout(site)
        if site.kind not in KINDS or site.out_features is None or site.in_features is None:
            why = f": {site.why}" if site.why else ""
            return f"it changes {NAMES}, not {site.module_type}{why}"
        if site.weight is None and site.kind not in LINEAR:
            return f"{site.module_type} has no weight tensor"
        return self._check_dropout(site)

    def _check_dropout(self, site: Site) -> str | None:
        dropped = getattr(self, self.dropout_field) if self.dropout_field else 0
        if not dropped or site.kind == "embedding" or self.holds_on_values(site):
            return None
        return (
            f"{self.dropout_field}={dropped} drops what enters the change, and here the change is added to the weight "
            f"of {site.module_type} instead, because no formula on its activations holds. Write {self.dropout_field}=0 "
            f"for this site"
        )

    def after(self, site: Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        """``y + layer(x; ΔW)``, through the factors where there are some."""
        x, parts, factors = self.entering(site, p, x), self.parts(site), self.low_rank(site, p)
        if factors is not None:
            return factors.onto(site, y, x, parts)
        return y + through(site, self._checked(site, self.change(site, p)), x, y, parts)

    def weights(self, site: Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        """``W + ΔW``, in the layout of the module's weight."""
        name = site.tensor or "weight"
        change = self._checked(site, self.change(site, p))
        return w | {name: w[name] + to_weight(site, change, self.parts(site))}

    def _checked(self, site: Site, change: Any) -> Tensor:
        """``change`` if it has the shape of ΔW: others would spread over the weight, or fail inside of torch."""
        expected = self.matrix_shape(site)
        if not isinstance(change, Tensor) or change.shape != expected:
            found = tuple(change.shape) if isinstance(change, Tensor) else type(change).__name__
            raise ConfigError(
                f"{type(self).__name__} gave the change {found} at {site.address}; expected a matrix of the shape "
                f"{expected}, which is self.matrix_shape(site): the rows of the output first."
            )
        return change

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
        if not self.has_factors or acts.conditions:
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
