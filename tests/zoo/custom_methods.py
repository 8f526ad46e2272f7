"""Methods registered from outside the package, as a user would: by registration alone they get every law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import funcdelta as fd
from funcdelta.methods.layers import from_weight, spare_padding, to_weight


@fd.register("test_gate")
@dataclass(frozen=True)
class GateConfig(fd.BaseDeltaConfig):
    """``g tanh(y)`` added to what leaves the site, and ``x`` shifted by a multiple of itself before it."""

    identity_at_start: ClassVar[bool] = True

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"gate": torch.zeros(()), "shift": torch.zeros(())}

    def before(self, site: fd.Site, p: dict[str, Tensor], x: Tensor) -> Tensor:
        return x + p["shift"] * x if x.is_floating_point() else x

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["gate"] * torch.tanh(y)

    def tokenwise(self, site: fd.Site) -> bool:
        return True


@fd.register("test_rows")
@dataclass(frozen=True)
class RowScaleConfig(fd.BaseDeltaConfig):
    """``(1 + s) W``: a method that only rewrites weights, with a constant ``size``."""

    identity_at_start: ClassVar[bool] = True

    def check(self, site: fd.Site) -> str | None:
        return None if site.weight is not None else f"{site.module_type} has no weight"

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        assert site.weight is not None
        rows = torch.zeros(site.weight[0], *[1] * (len(site.weight) - 1))
        return {"rows": rows, "size": fd.Leaf(torch.tensor(0.5), trains=False)}

    def weights(self, site: fd.Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        return w | {"weight": w["weight"] * (1 + p["size"] * p["rows"])}


@fd.register("test_shared")
@dataclass(frozen=True)
class SharedGainConfig(fd.BaseDeltaConfig):
    """``y + c g tanh(y)``: the gain g stands once for all sites, c once a site."""

    identity_at_start: ClassVar[bool] = True

    def shared(self, sites: tuple[fd.Site, ...], rng: torch.Generator) -> dict[str, Tensor]:
        return {"gain": torch.randn((), generator=rng)}

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {"own": torch.zeros(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["own"] * p["gain"] * torch.tanh(y)


@fd.register("test_written")
@dataclass(frozen=True)
class WrittenConfig(fd.BaseDeltaConfig):
    """``y + gᵢ tanh(y)``, where one table writes the gains of all sites, gᵢ = Tᵢ·c, or each site owns its gain."""

    written: bool = True

    def shared(self, sites: tuple[fd.Site, ...], rng: torch.Generator) -> dict[str, Tensor]:
        if not self.written:
            return {}
        return {"code": torch.randn(3, generator=rng), "table": torch.randn(len(sites), 3, generator=rng)}

    def expand(self, sites: tuple[fd.Site, ...], p: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        gains = p["table"] @ p["code"]
        return {site.path: {"gain": gain} for site, gain in zip(sites, gains.unbind(), strict=True)}

    def baked(self) -> WrittenConfig:
        return self.replace(written=False)

    def init(self, site: fd.Site, rng: torch.Generator) -> dict[str, Tensor]:
        return {} if self.written else {"gain": torch.zeros(())}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y + p["gain"] * torch.tanh(y)


@fd.register("test_ia3")
@dataclass(frozen=True)
class ScaledOutputConfig(fd.BaseDeltaConfig):
    """``l · y``, the output of a layer scaled feature by feature, bias included: IA3 (Liu et al. 2022)."""

    identity_at_start: ClassVar[bool] = True

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"scaled": torch.ones(site.width)}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        return y * p["scaled"].view(-1, *[1] * (-1 - site.features_axis(y)))


@fd.register("test_hadamard")
@dataclass(frozen=True)
class HadamardConfig(fd.Additive):
    """``ΔW = (B₁ A₁) ⊙ (B₂ A₂)`` on every kind of layer, from ``change`` alone: LoHa (Hyeon-Woo et al. 2021)."""

    identity_at_start: ClassVar[bool] = True
    rank: int = 2

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        rows, *columns = self.matrix_shape(site)
        flat = math.prod(columns)
        return {
            "b1": fd.Leaf(torch.zeros(rows, self.rank), ". first"),
            "a1": fd.Leaf(torch.randn(self.rank, flat, generator=rng), "first ."),
            "b2": fd.Leaf(torch.randn(rows, self.rank, generator=rng), ". second"),
            "a2": fd.Leaf(torch.randn(self.rank, flat, generator=rng), "second ."),
        }

    def change(self, site: fd.Site, p: dict[str, Tensor]) -> Tensor:
        product = (p["b1"] @ p["a1"]) * (p["b2"] @ p["a2"])
        return product.view(self.matrix_shape(site))


@fd.register("test_chain")
@dataclass(frozen=True)
class ChainedConfig(fd.methods.ChainConfig):
    """LoRA, and an adapter on what it gives."""

    composed: ClassVar[bool] = False
    parts: tuple[fd.BaseDeltaConfig, ...] = (fd.LoraConfig(lora_r=2), fd.AdapterConfig(bottleneck_dim=3))


@fd.register("test_average")
@dataclass(frozen=True)
class AveragedConfig(fd.methods.AverageConfig):
    """Two LoRAs of unlike rank, and their shares."""

    composed: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = True
    parts: tuple[fd.BaseDeltaConfig, ...] = (fd.LoraConfig(lora_r=2), fd.LoraConfig(lora_r=3))
    shares: tuple[float, ...] | None = (0.7, 0.4)


@fd.register("test_mixture")
@dataclass(frozen=True)
class MixedConfig(fd.methods.MixtureConfig):
    """LoRAs mixed by gates that each token sets, as in X-LoRA (Buehler and Buehler 2024), and a chain among them."""

    composed: ClassVar[bool] = False
    identity_at_start: ClassVar[bool] = True
    parts: tuple[fd.BaseDeltaConfig, ...] = (
        fd.LoraConfig(lora_r=2),
        fd.parallel(fd.LoraConfig(lora_r=1), GateConfig(), name="both"),
    )


@fd.register("test_dora")
@dataclass(frozen=True)
class DoraConfig(fd.Additive):
    """``m (W + B A) / ‖W + B A‖``, row by row: DoRA (Liu et al. 2024), in factors, from the site's own weight.

    ``detach_norm`` takes the norm for a constant in gradients, as the paper does to save memory, and PEFT.
    """

    identity_at_start: ClassVar[bool] = True
    acts_on_parts: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ("weight", "bias")
    rank: int = 2
    detach_norm: bool = False

    def leaves(self, site: fd.Site, own: Mapping[str, Tensor], rng: torch.Generator) -> fd.Leaves:
        rows, *columns = self.matrix_shape(site)
        weight = from_weight(site, own["weight"].float())
        return {
            "b": fd.Leaf(torch.zeros(rows, self.rank), ". rank"),
            "a": fd.Leaf(torch.randn(self.rank, *columns, generator=rng), " ".join(["rank", *"." * len(columns)])),
            "magnitude": weight.flatten(1).norm(dim=1),
        }

    def low_rank(self, site: fd.Site, p: dict[str, Tensor]) -> fd.LowRank:
        return fd.LowRank(p["b"], p["a"], p["b"].new_ones(()))

    def tokenwise(self, site: fd.Site) -> bool:
        return False

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        axis = site.features_axis(y)
        scale = self._scale(site, p, from_weight(site, p["own.weight"])).view(-1, *[1] * (-1 - axis))
        bare = y - p["own.bias"].view(-1, *[1] * (-1 - axis)) if "own.bias" in p else y
        change = (scale - 1) * bare + scale * (super().after(site, p, y, x) - y)
        return y + (spare_padding(site, change, x) if site.kind == "embedding" else change)

    def weights(self, site: fd.Site, p: dict[str, Tensor], w: dict[str, Tensor]) -> dict[str, Tensor]:
        weight = from_weight(site, w["weight"])
        scale = self._scale(site, p, weight).view(-1, *[1] * (weight.ndim - 1))
        return w | {"weight": to_weight(site, scale * (weight + self.change(site, p)))}

    def acts(self, site: fd.Site) -> fd.Acts:
        return dataclasses.replace(super().acts(site), factors=None, unfactored="it scales rows of the weight")

    def _scale(self, site: fd.Site, p: dict[str, Tensor], weight: Tensor) -> Tensor:
        norm = (weight + self.change(site, p)).flatten(1).norm(dim=1)
        return p["magnitude"] / (norm.detach() if self.detach_norm else norm)

    def takes_tensors(self) -> bool:
        return False


@fd.register("test_vera")
@dataclass(frozen=True)
class VeraConfig(fd.Additive):
    """``ΔW = diag(b) B diag(d) A``: VeRA (Kopiczko et al. 2024). A and B are one copy for all members and all sites."""

    identity_at_start: ClassVar[bool] = True
    rank: int = 3

    def shared(self, sites: tuple[fd.Site, ...], rng: torch.Generator) -> fd.Leaves:
        shapes = [self.matrix_shape(site) for site in sites]
        longest, widest = max(rows for rows, *_ in shapes), max(math.prod(columns) for _, *columns in shapes)
        a, b = torch.randn(self.rank, widest, generator=rng), torch.randn(longest, self.rank, generator=rng)
        return {"a": fd.Leaf(a, of="all"), "b": fd.Leaf(b, of="all")}

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        return {"d": torch.full((self.rank,), 0.1), "lambda": torch.zeros(self.matrix_shape(site)[0])}

    def low_rank(self, site: fd.Site, p: dict[str, Tensor]) -> fd.LowRank:
        rows, *columns = self.matrix_shape(site)
        a = p["d"].unsqueeze(1) * p["a"][:, : math.prod(columns)]
        return fd.LowRank(p["lambda"].unsqueeze(1) * p["b"][:rows], a.unflatten(1, columns), a.new_ones(()))

    def tokenwise(self, site: fd.Site) -> bool:
        return False

    def takes_tensors(self) -> bool:
        return False


# Where attention modules of Transformers keep their projections of keys and values.
PROJECTIONS = (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v"), ("key_proj", "value_proj"))


@fd.register("test_llama_adapter")
@dataclass(frozen=True)
class LlamaAdapterConfig(fd.BaseDeltaConfig):
    """``run(q, k, v) + g softmax(q K_Pᵀ / √d) V_P``: LLaMA-Adapter (Zhang et al. 2023).

    K_P and V_P are the rows of a prompt through the module's own frozen projections, and gates g, one a head, start
    at 0. A module whose projections are not layers of their own gets rows of keys and values instead of a prompt.
    """

    identity_at_start: ClassVar[bool] = True
    prompt_rows: int = 3

    def describe(self, site: fd.Site, module: nn.Module) -> fd.Site:
        layers = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        found = next((pair for pair in PROJECTIONS if layers.issuperset(pair)), ("", ""))
        return dataclasses.replace(site, options=(("projections", found),))

    def leaves(self, site: fd.Site, own: Mapping[str, Tensor], rng: torch.Generator) -> fd.Leaves:
        layers, shape, rows = self.layers(site), site.attention, self.prompt_rows
        gates = {"gate": torch.zeros(shape.query_heads)}
        if layers:
            return {"prompt": torch.randn(rows, own[f"{layers[0]}.weight"].shape[1], generator=rng), **gates}
        keys, values = (torch.randn(rows, width, generator=rng) for width in (shape.key_width, shape.value_width))
        return {"keys": keys, "values": values, **gates}

    def around(
        self, site: fd.Site, p: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, run: fd.methods.acts.Attention
    ) -> Tensor:
        heads, groups = site.attention.heads, site.attention.query_heads // site.attention.heads
        layers = self.layers(site)
        made = [F.linear(p["prompt"], p[f"own.{one}.weight"], p.get(f"own.{one}.bias")) for one in layers]
        keys, values = (
            rows.unflatten(-1, (heads, -1)).transpose(0, 1).repeat_interleave(groups, 0)
            for rows in made or (p["keys"], p["values"])
        )
        seen = (q @ keys.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return run(q, k, v) + p["gate"].view(-1, 1, 1) * (seen @ values)

    def acts(self, site: fd.Site) -> fd.Acts:
        reads = tuple(f"{layer}.{name}" for layer in self.layers(site) for name in ("weight", "bias"))
        return dataclasses.replace(super().acts(site), reads=reads)

    def layers(self, site: fd.Site) -> tuple[str, ...]:
        """The projections of keys and values, where they are layers of their own."""
        return tuple(filter(None, dict(site.options)["projections"]))


@fd.register("test_pissa")
@dataclass(frozen=True)
class PissaConfig(fd.Additive):
    """``W - B₀ A₀ + B A`` from the largest singular values of W: PiSSA (Meng et al. 2024)."""

    identity_at_start: ClassVar[bool] = True
    acts_on_parts: ClassVar[bool] = False
    rank: int = 2

    def leaves(self, site: fd.Site, own: Mapping[str, Tensor], rng: torch.Generator) -> fd.Leaves:
        weight = from_weight(site, own["weight"].double()).flatten(1)
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        root = s[: self.rank].sqrt()
        b, a = (u[:, : self.rank] * root).float(), (root.unsqueeze(1) * vh[: self.rank]).float()
        return {"b": b, "a": a, "b0": fd.Leaf(b, of="all"), "a0": fd.Leaf(a, of="all")}

    def change(self, site: fd.Site, p: dict[str, Tensor]) -> Tensor:
        return (p["b"] @ p["a"] - p["b0"] @ p["a0"]).view(self.matrix_shape(site))

    def takes_tensors(self) -> bool:
        return False


@fd.register("test_loreft")
@dataclass(frozen=True)
class LoreftConfig(fd.BaseDeltaConfig):
    """``h + Rᵀ (W h + b - R h)`` on the first and the last tokens of the prompt: LoReFT (Wu et al. 2024).

    The rows of R are orthonormal: they are those of Q in ``rotateᵀ = Q U``. Tokens that are generated from a cache
    stay as they are. Without a cache the text so far is the prompt.
    """

    conditions: ClassVar[tuple[str, ...]] = ("mask", "positions", "lengths", "cached")
    rank: int = 2
    first: int = 1
    last: int = 2

    def init(self, site: fd.Site, rng: torch.Generator) -> fd.Leaves:
        rotate = torch.linalg.qr(torch.randn(site.width, self.rank, generator=rng)).Q.mT
        project = torch.randn(self.rank, site.width, generator=rng) / site.width**0.5
        return {"rotate": rotate.contiguous(), "project": project, "bias": torch.zeros(self.rank)}

    def after(self, site: fd.Site, p: dict[str, Tensor], y: Tensor, x: Tensor) -> Tensor:
        rotate = torch.linalg.qr(p["rotate"].mT).Q.mT
        moved = y + (fd.linear(y, p["project"], p["bias"]) - fd.linear(y, rotate)) @ rotate
        return torch.where(self.chosen(p).unsqueeze(-1), moved, y)

    def chosen(self, p: dict[str, Tensor]) -> Tensor:
        """Which tokens are changed, (rows, tokens)."""
        at, lengths = p["call.positions"], p["call.lengths"].unsqueeze(-1)
        ends = (at < self.first) | (at >= lengths - self.last)
        return p["call.mask"] & ends & (p["call.cached"] == 0)
