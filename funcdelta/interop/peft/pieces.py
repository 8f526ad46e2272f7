"""The factors of a file at one module of the backbone, as leaves of LoRA there.

| module | in the file | here |
|---|---|---|
| Linear, Conv1D | A (r, in), B (out, r) | the same |
| Conv1d/2d/3d | A (r, in, *kernel), B (out, r, 1, ...) | B (out, r) |
| Embedding | ``lora_embedding_A`` (r, tokens), ``lora_embedding_B`` (features, r) | the same |
| MultiheadAttention | A (r, d), B (3 d, r); its output projection is a layer | of the parameter ``in_proj_weight`` |
| a parameter | A, B; several of one module under ``base_layer``, the first declared one innermost | the same |
| a table of experts | :mod:`.experts` | one pair an expert |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor, nn

from ...errors import CheckpointError
from ...match import below
from ...methods.layers import KINDS, matrix_shape
from ...methods.site import site_of
from . import experts
from .keys import Key
from .settings import Settings

Factors = Mapping[str, Key]
"""``{factor: key}`` of one module, or one parameter of it."""


@dataclass(frozen=True)
class Piece:
    """LoRA at one site.

    Attributes:
        address: the site, a module or a parameter.
        name: what patterns of the file are matched with.
        a, b: the leaves ``lora_A`` and ``lora_B``.
        alpha: of ``s = alpha / rank``, or by √rank.
        dropout: on what enters A.
    """

    address: str
    name: str
    a: Tensor
    b: Tensor
    alpha: float
    dropout: float = 0.0

    @property
    def rank(self) -> int:
        """r."""
        return self.b.shape[-1]


class Places:
    """Makes pieces of the factors at modules of one backbone."""

    def __init__(self, backbone: nn.Module, tensors: Mapping[str, Tensor], settings: Settings, doubled: bool) -> None:
        self.modules = dict(backbone.named_modules(remove_duplicate=False))
        self.tensors, self.settings, self.doubled = tensors, settings, doubled

    def at(self, path: str, name: str, by_depth: Mapping[int, Factors]) -> list[Piece]:
        """The pieces at the module ``path``, which the file calls ``name``."""
        module = self.modules[path]
        targeted = self._targeted(path, name, module, by_depth)
        if isinstance(module, nn.MultiheadAttention) and not targeted:
            return [self._of_tensor(path, "in_proj_weight", name, self._only(path, by_depth))]
        if targeted:
            if sorted(by_depth) != list(range(len(targeted))):
                raise CheckpointError(
                    f"{path}: target_parameters names {len(targeted)} of its parameters ({', '.join(targeted)}), and "
                    f"the file has factors for {len(by_depth)}."
                )
            last = len(targeted) - 1
            return [self._of_tensor(path, own, name, by_depth[last - i], True) for i, own in enumerate(targeted)]
        return [self._of_layer(path, name, module, self._only(path, by_depth))]

    def of_experts(self, holder: str, name: str, found: Mapping[tuple[int, str], Factors]) -> list[Piece]:
        """The pieces of experts that were layers of their own, at the module that holds them as parameters now."""
        module, pieces = self.modules[holder], []
        for own in dict.fromkeys(experts.FUSED[part] for _, part in found):
            each = {at: factors for at, factors in found.items() if experts.FUSED[at[1]] == own}
            pairs = {at: self._pair(f"{holder}.{at[0]}.{at[1]}", factors) for at, factors in each.items()}
            shape = self._shape(module, own)
            made, count = experts.fused(pairs, shape) if len(shape) == 3 else (None, 0)
            alphas = {self.settings.alpha_of(f"{name}.{expert}.{part}") for expert, part in pairs}
            if made is None or len(alphas) > 1 or experts.is_turned(module):
                raise CheckpointError(
                    f"{holder}: its experts are one parameter {own} of shape {shape} here, and the file has factors of "
                    f"each by itself that cannot be put together: all need one rank and one alpha, and none may lack."
                )
            # The same s with a rank that many times as large.
            wider = math.sqrt(count) if self.settings.use_rslora else count
            pieces.append(Piece(f"{holder}.{own}", f"{name}.{own}", *made, alphas.pop() * wider))
        return pieces

    # -- which -----------------------------------------------------------------------------------------------------

    def _targeted(self, path: str, name: str, module: nn.Module, by_depth: Mapping[int, Factors]) -> list[str]:
        """The parameters of ``module`` that the factors are for, as they were declared; none: it is a layer."""
        kind = site_of(path, module).kind
        own = [key for key, tensor in module._parameters.items() if tensor is not None]
        names = [
            key
            for key in own
            if self.settings.names_parameter(below(name, key)) or self.settings.names_parameter(below(path, key))
        ]
        if names or kind in KINDS or isinstance(module, nn.MultiheadAttention):
            plain = kind == "embedding" and "lora_A" in by_depth[0]
            return names or (["weight"] if plain else [])
        matrices = [key for key in own if self._shape(module, key)[1:]]
        return matrices if len(matrices) == len(by_depth) else []

    def _only(self, path: str, by_depth: Mapping[int, Factors]) -> Factors:
        if list(by_depth) != [0]:
            raise CheckpointError(
                f"{path}: expected the factors of one layer, found some for {len(by_depth)} parameters."
            )
        return by_depth[0]

    # -- what ------------------------------------------------------------------------------------------------------

    def _of_layer(self, path: str, name: str, module: nn.Module, factors: Factors) -> Piece:
        """The piece at a layer."""
        site = site_of(path, module)
        if site.kind not in KINDS or site.kind == "transposed_conv":
            inside = [own for own, _ in module.named_children()]
            below_it = f" Below it are: {', '.join(inside[:5])}." if inside else ""
            raise CheckpointError(f"{path}: the file has a LoRA for it, and {site.module_type} is no layer.{below_it}")
        if "conv" in site.kind and site.option("groups") > 1:
            raise CheckpointError(
                f"{path}: PEFT's LoRA of a convolution in groups is not a change of its weight (A sees all channels), "
                f"so it cannot be read. In PEFT, leave the layer out of target_modules."
            )
        a, b = self._pair(path, factors, "lora_embedding" if site.kind == "embedding" else "lora")
        rows, *columns = matrix_shape(site)
        if a.shape[1:] != tuple(columns) or b.shape[0] != rows or b.shape[1] != len(a) or b[0, 0].numel() != 1:
            self._misfit(path, (rows, *columns), a, b)
        dropout = self.settings.dropout
        # Where the change is added to the weight, because the layer computes something of its own, nothing enters A.
        uncalled = isinstance(self.modules.get(path.rpartition(".")[0]), nn.MultiheadAttention)
        if dropout and (uncalled or (site.own_forward and site.kind != "embedding")):
            dropout = 0.0
        doubled = 2 if uncalled and self.doubled else 1
        return Piece(path, name, a, b.flatten(1), self.settings.alpha_of(name) * doubled, dropout)

    def _of_tensor(self, path: str, own: str, name: str, factors: Factors, named: bool = False) -> Piece:
        """The piece at a parameter of the module; ``named``: the file's patterns mean the parameter."""
        module, address = self.modules[path], below(path, own)
        shape = self._shape(module, own)
        a, b = self._pair(address, factors)
        called = below(name, own) if named else name
        if len(shape) == 3:
            turned = experts.is_turned(module) or self.settings.experts_turned
            pair = experts.from_peft(a, b, shape, turned) if a.ndim == b.ndim == 2 else None
            if pair is None:
                self._misfit(address, shape, a, b)
            a, b = pair
        elif (b.shape[0], a.shape[1]) != shape or b.shape[1:] != a.shape[:1]:
            self._misfit(address, shape, a, b)
        return Piece(address, called, a, b, self.settings.alpha_of(called))

    def _pair(self, where: str, factors: Factors, kind: str = "lora") -> tuple[Tensor, Tensor]:
        """A and B, both of them and nothing else."""
        names = (f"{kind}_A", f"{kind}_B")
        others = [key.raw for factor, key in factors.items() if factor not in names]
        if others:
            self._refuse(where, others)
        missing = [name for name in names if name not in factors]
        if missing:
            there = ", ".join(key.raw for key in factors.values())
            raise CheckpointError(f"{where}: the file has {there} and no {' and no '.join(missing)}.")
        a, b = (self.tensors[factors[name].raw] for name in names)
        if a.ndim < 2 or b.ndim < 2 or not len(a):
            self._misfit(where, (), a, b)
        return a, b

    def _refuse(self, where: str, others: list[str]) -> NoReturn:
        for part, what in (
            ("magnitude", "the magnitudes of DoRA, which cannot be read"),
            (".bias", "a bias in B (lora_bias=True), which LoRA here does not have"),
            ("lora_diag", "the diagonal of KaSA, which cannot be read"),
            ("lora_E", "the singular values of AdaLoRA, which cannot be read"),
        ):
            if any(part in key for key in others):
                raise CheckpointError(
                    f"{where}: {others[0]} is {what}. The way out: in PEFT, model.merge_and_unload() gives a plain "
                    f"model that can be a backbone here."
                )
        raise CheckpointError(f"{where}: {', '.join(others)} is no factor of a LoRA at such a module.")

    def _misfit(self, where: str, shape: tuple[int, ...], a: Tensor, b: Tensor) -> NoReturn:
        wanted = f"factors of a change of shape {shape}" if shape else "two matrices"
        raise CheckpointError(
            f"{where}: expected {wanted}, found A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}. Is it the "
            f"backbone that the adapter was made on?"
        )

    def _shape(self, module: nn.Module, own: str) -> tuple[int, ...]:
        tensor = module._parameters.get(own)
        return tuple(tensor.shape) if tensor is not None else ()
