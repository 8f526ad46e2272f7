"""A site: what a delta method may know of the module that it acts on, as static data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import MatchError
from .parts import Part

CONVOLUTIONS = {nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.Conv3d: "conv3d"}
TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMS_OVER_LAST_AXIS = ("LayerNorm", "RMSNorm")
NORMS_OVER_CHANNELS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class AttentionShape:
    """What an attention module hands to its attention function: heads of keys and values, and a head's sizes.

    >>> AttentionShape(heads=2, key_size=8, value_size=4).value_width
    8
    """

    heads: int
    key_size: int
    value_size: int

    @property
    def key_width(self) -> int:
        """The keys' numbers a token, all heads together."""
        return self.heads * self.key_size

    @property
    def value_width(self) -> int:
        """The values' numbers a token."""
        return self.heads * self.value_size


Shapes = tuple[tuple[int, ...] | None, tuple[int, ...]]
"""Of the hidden value that enters a module, ``None`` where no features do, and of the one that leaves it."""


@dataclass(frozen=True)
class Site:
    """The module path and the facts of the module there; hashable, the same for every member.

    Attributes:
        path: dotted path in the backbone.
        kind: ``linear``, ``transposed_linear`` (Transformers' Conv1D), ``embedding``, ``conv1d``, ``conv2d``,
            ``conv3d``, ``transposed_conv``, ``norm``, ``other`` or ``span`` (see ``exit``).
        module_type: the module's class name.
        weight, bias: shapes of the module's own ``weight`` and ``bias``, ``None`` where there is none.
        in_features, out_features: widths of the hidden input and output.
        channel_axis: axis of the hidden output that holds the features (-1, or 1 after convolutions).
        dtype, device: of the module's tensors.
        options: the arguments that a convolution or an embedding was made with.
        training: whether the call is made in training mode.
        shape_of_attention: heads and sizes of its keys and values, measured where a method adds some.
        fused: the parts of an output that is several projections at once, where the backbone's family is known.
        parts: those of them that are meant; empty: the whole output. Only a method that declares ``acts_on_parts``
            meets any.
        exit: where the hidden output of a span leaves, if not at ``path``, where its input enters.

    >>> site_of("0", torch.nn.Linear(3, 5, bias=False)).out_features
    5
    """

    path: str
    kind: str
    module_type: str
    weight: tuple[int, ...] | None
    bias: tuple[int, ...] | None
    in_features: int | None
    out_features: int | None
    channel_axis: int = -1
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    options: tuple[tuple[str, Any], ...] = ()
    training: bool = False
    shape_of_attention: AttentionShape | None = None
    fused: tuple[Part, ...] = ()
    parts: tuple[Part, ...] = ()
    exit: str | None = None

    @property
    def leaf_dtype(self) -> torch.dtype:
        """The dtype of fresh leaves: float32 where the module is half precision or quantised, else its own."""
        return self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32

    @property
    def width(self) -> int:
        """The number of features that leave the site."""
        if self.out_features is None:
            raise MatchError(f"The width of {self.path} ({self.module_type}) is not known; build with example=inputs.")
        return self.out_features

    @property
    def attention(self) -> AttentionShape:
        """Heads and sizes of the site's keys and values."""
        if self.shape_of_attention is None:
            raise MatchError(f"{self.path} ({self.module_type}) is no attention site, so its heads are not known.")
        return self.shape_of_attention

    @property
    def input_width(self) -> int:
        """The number of features that enter the site."""
        if self.in_features is None:
            raise MatchError(
                f"The width of what enters {self.path} ({self.module_type}) is not known: it was called without a "
                f"tensor of features."
            )
        return self.in_features

    def option(self, name: str) -> Any:
        """The argument ``name`` that the module was made with."""
        return dict(self.options)[name]


def site_of(path: str, module: nn.Module) -> Site:
    """The facts of ``module`` at ``path``; widths are ``None`` where its weights do not tell them.

    >>> site = site_of("conv", torch.nn.Conv2d(3, 8, 3, padding=1))
    >>> site.kind, site.in_features, site.out_features, site.option("padding"), site.channel_axis
    ('conv2d', 3, 8, (1, 1), 1)
    """
    weight, bias = _shape(module, "weight"), _shape(module, "bias")
    like = next((t for t in [*module.parameters(), *module.buffers()] if t.is_floating_point()), None)
    facts: dict[str, Any] = {
        "path": path,
        "module_type": type(module).__name__,
        "weight": weight,
        "bias": bias,
        "dtype": like.dtype if like is not None else torch.int8,
        "device": like.device if like is not None else _device(module),
        "training": module.training,
    }
    for kind, name in CONVOLUTIONS.items():
        if isinstance(module, kind):
            made_with = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size")
            return Site(
                kind=name,
                in_features=int(getattr(module, "in_channels")),  # noqa: B009  (typed Any)
                out_features=int(getattr(module, "out_channels")),  # noqa: B009
                channel_axis=1,
                options=tuple((key, getattr(module, key)) for key in made_with),
                **facts,
            )
    if isinstance(module, TRANSPOSED_CONVOLUTIONS):
        return Site(
            kind="transposed_conv",
            in_features=int(getattr(module, "in_channels")),  # noqa: B009  (typed Any)
            out_features=int(getattr(module, "out_channels")),  # noqa: B009
            channel_axis=1,
            **facts,
        )
    if isinstance(module, nn.Embedding):
        return Site(kind="embedding", in_features=module.num_embeddings, out_features=module.embedding_dim, **facts)
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return Site(kind="linear", in_features=features[0], out_features=features[1], **facts)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf") and weight is not None:
        return Site(kind="transposed_linear", in_features=weight[0], out_features=weight[1], **facts)
    if isinstance(module, NORMS_OVER_CHANNELS):
        width = int(getattr(module, "num_features", getattr(module, "num_channels", 0)))
        return Site(kind="norm", in_features=width, out_features=width, channel_axis=1, **facts)
    if type(module).__name__.endswith(NORMS_OVER_LAST_AXIS) and weight is not None:
        return Site(kind="norm", in_features=weight[-1], out_features=weight[-1], **facts)
    return Site(kind="other", in_features=None, out_features=None, **facts)


def _shape(module: nn.Module, name: str) -> tuple[int, ...] | None:
    """The shape of the module's tensor, without running the computation that a parametrised one is read by."""
    for own in (module._parameters, module._buffers, vars(module)):
        tensor = own.get(name)
        if isinstance(tensor, Tensor):
            return tuple(tensor.shape)
    if is_parametrized(module, name):
        originals: Any = getattr(module, "parametrizations")[name]  # noqa: B009  (typed as a tensor or a module)
        return max(
            (tuple(tensor.shape) for tensor in originals._parameters.values()), key=lambda s: torch.Size(s).numel()
        )
    return None


def _device(module: nn.Module) -> torch.device:
    return next((t.device for t in [*module.parameters(), *module.buffers()]), torch.device("cpu"))
