"""The leaves of LoRA at one site as PEFT's factors: the inverse of :mod:`.pieces`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...deltas import LoraConfig
from ...errors import CheckpointError
from ...kinds import MOST
from ...plan.attachment import Attachment
from ...structures.parts import place
from . import experts
from .keys import PREFIX

_HERE = "Save it here: delta.save_finetuned(params, path)."
_TWICE = (
    "PEFT up to 0.21 adds the change of the output projection of torch.nn.MultiheadAttention twice, so that it would "
    'compute something else. Write compat="peft" to have half of it written, which it then doubles, and read it with '
    "the same."
)


@dataclass(frozen=True)
class Written:
    """The factors of one site.

    Attributes:
        name: the module or parameter, as patterns mean it.
        module: the module that PEFT wraps.
        key: what the keys of the factors begin with, after the model's own prefix.
        a, b: the factors.
        scale: s.
        config: the fields of the site's config.
        parameter: whether ``target_parameters`` has to name it.
        embedding: whether its factors are those of an embedding.
        turned: whether the weight of the layer is (in, out).
        owns_rank: whether it has a rank and an alpha of its own in PEFT.
    """

    name: str
    module: str
    key: str
    a: Tensor
    b: Tensor
    scale: float
    rank: int
    config: LoraConfig
    parameter: bool = False
    embedding: bool = False
    turned: bool = False
    owns_rank: bool = True

    @property
    def dropout(self) -> float:
        """On what enters A."""
        return self.config.lora_dropout

    def alpha(self, rslora: bool) -> float:
        """Alpha with ``s = alpha / r``, or by √r: the config's own where it is that."""
        divisor = math.sqrt(self.rank) if rslora else self.rank
        if not abs(self.scale * divisor) <= MOST:
            raise CheckpointError(
                f"{self.name}: the scale {self.scale} has no alpha that PEFT's files may hold (at most {MOST})."
            )
        for given in (self.config.lora_alpha, round(self.scale * divisor)):
            if float(torch.tensor(given / divisor)) == self.scale:
                return given
        return self.scale * divisor

    def pattern(self, paths: Sequence[str]) -> str:
        """The key of ``rank_pattern`` that means this site alone."""
        others = any(path.endswith(f".{self.name}") for path in paths)
        return rf"(?<!\.){re.escape(self.name)}" if others else re.escape(self.name)

    def tensors(self) -> dict[str, Tensor]:
        """The two tensors by their key."""
        kind, own = ("lora_embedding", "") if self.embedding else ("lora", ".weight")
        return {f"{PREFIX}{self.key}.{kind}_A{own}": self.a, f"{PREFIX}{self.key}.{kind}_B{own}": self.b}


def written_at(backbone: nn.Module, attachment: Attachment, p: Mapping[str, Tensor], doubled: bool) -> Written:
    """The factors at the site of ``attachment``, whose leaves are ``p``; raises where PEFT has none.

    >>> delta = fd.LoraModel(nn.Sequential(nn.Conv2d(3, 8, 3)), lora_r=2, modified_modules=["0"])
    >>> made = written_at(delta.backbone, delta.plan.all()[0], delta.plan.all()[0].of(delta.init(0)), False)
    >>> made.key, made.b.shape, made.scale
    ('0', torch.Size([8, 2, 1, 1]), 8.0)
    """
    site, config = attachment.site, attachment.config
    assert isinstance(config, LoraConfig)
    a, b, scale = p["lora_A"].detach(), p["lora_B"].detach(), float(p["scale"])
    if site.kind == "tensor":
        return _of_tensor(backbone, attachment, a, b, scale, config)
    if site.kind == "transposed_conv" or ("conv" in site.kind and site.option("groups") > 1):
        raise CheckpointError(
            f"PEFT has no LoRA on {site.module_type} at {site.path} that is a change of its weight. {_HERE}"
        )
    parts = config.parts(site)
    if parts:
        a, b = _whole(a, b, [(part.size, part) for part in parts], site.width)
    if "conv" in site.kind:
        b = b.view(*b.shape, *[1] * (a.ndim - 2))
    parent = site.path.rpartition(".")[0]
    inside = isinstance(backbone.get_submodule(parent), nn.MultiheadAttention)
    if inside and not doubled:
        raise CheckpointError(f"{site.path}: {_TWICE} {_HERE}")
    return Written(
        name=site.path,
        module=parent if inside else site.path,
        key=f"{parent}.base_layer.{site.path.rpartition('.')[2]}" if inside else site.path,
        a=a,
        b=b,
        scale=scale,
        rank=len(a),
        config=config,
        embedding=site.kind == "embedding",
        turned=site.kind == "transposed_linear",
        owns_rank=not inside,
    )


def settled(backbone: nn.Module, written: Sequence[Written]) -> list[Written]:
    """The factors of all sites, each as PEFT has it beside the others of its module.

    Parameters of one module are wrapped one in the other, the first that was declared innermost. An attention module
    has one rank and one scale for both projections, and PEFT adds the change of the output projection twice.
    """
    inputs = {one.module: one for one in written if one.owns_rank}
    found: list[Written] = []
    for one in written:
        if one.parameter:
            order = [f"{one.module}.{own}" for own in backbone.get_submodule(one.module)._parameters]
            beside = [other.name for other in written if other.module == one.module]
            outside = sum(order.index(name) > order.index(one.name) for name in beside)
            one = dataclasses.replace(one, key=one.key + ".base_layer" * outside)
        elif not one.owns_rank:
            other = inputs.get(one.module)
            if other is None or other.rank != one.rank:
                raise CheckpointError(
                    f"{one.name}: PEFT has one rank for both projections of an attention module: give "
                    f"{one.module}.in_proj_weight a LoRA of the rank {one.rank}, too. {_HERE}"
                )
            one = dataclasses.replace(one, b=one.b * (one.scale / (2 * other.scale)), scale=other.scale)
        found.append(one)
    return found


def _whole(a: Tensor, b: Tensor, parts: Sequence[tuple[int, object]], width: int) -> tuple[Tensor, Tensor]:
    """Factors of the whole output, of those of its parts: each B among the rows of all, in columns of its own."""
    sizes, own = [size for size, _ in parts], tuple(part for _, part in parts)
    rows = torch.block_diag(*b.split(sizes)) if len(a) != b.shape[1] else b
    return a, place(list(rows.split(sizes)), own, width, 0)  # pyright: ignore[reportArgumentType]


def _of_tensor(
    backbone: nn.Module, attachment: Attachment, a: Tensor, b: Tensor, scale: float, config: LoraConfig
) -> Written:
    """The factors of a bare parameter."""
    site = attachment.site
    module = backbone.get_submodule(site.path)
    rank = b.shape[-1]
    if isinstance(module, nn.MultiheadAttention) and site.tensor == "in_proj_weight":
        return Written(site.path, site.path, site.path, a, b, scale, rank, config)
    if isinstance(module, nn.MultiheadAttention) or not site.path or len(site.weight or ()) not in (2, 3):
        raise CheckpointError(
            f"PEFT has no LoRA on the parameter {site.address} of {site.module_type}: it takes matrices and tables of "
            f"experts, in modules below the model. {_HERE}"
        )
    if len(site.weight or ()) == 3:
        a, b = experts.to_peft(a, b, experts.is_turned(module))
    return Written(site.address, site.path, site.path, a, b, scale, rank, config, parameter=True)
