"""A site: what a delta method may know of the module that it acts on, as static data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import MatchError
from ..match import below
from ..structures.modules.forwards import Shown, channel_axis, family, is_known, is_plain, shown
from ..structures.parts import Part

MADE_WITH: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d"), ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size")
    ),
    "transposed_conv": (*("stride", "padding", "output_padding", "dilation", "groups", "padding_mode", "kernel_size"),),
    "embedding": ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
}
"""The arguments of a layer that a formula on activations has to heed, by its kind."""

NORMS_OVER_CHANNELS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)


@dataclass(frozen=True)
class AttentionShape:
    """What an attention module hands to its attention function: heads of keys and values, a head's sizes, and the
    heads of queries, of which several share a key where they are more.

    >>> AttentionShape(heads=2, key_size=8, value_size=4, query_heads=6).value_width
    8
    """

    heads: int
    key_size: int
    value_size: int
    query_heads: int

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
        tensor: the parameter that is meant, where a name means one of the module's own parameters and not the module.
        kind: the layout of the weight: ``linear``, ``transposed_linear`` (Transformers' Conv1D), ``embedding``,
            ``conv1d``, ``conv2d``, ``conv3d``, ``transposed_conv``, ``norm``, ``tensor`` (a bare parameter), ``other``
            or ``span`` (see ``exit``).
        module_type: the module's class name.
        weight, bias: shapes of the module's own ``weight`` and ``bias``, ``None`` where there is none.
        in_features, out_features: widths of the hidden input and output.
        channel_axis: axis of the hidden output that holds the features (-1, or 1 after convolutions); of a value that
            may come without rows see ``features_axis``.
        dtype, device: of the module's tensors.
        options: the arguments that a convolution or an embedding was made with.
        training: whether the call is made in training mode.
        shape_of_attention: heads and sizes of its keys and values, measured where a method acts on attention.
        fused: the parts of an output that is several projections at once, where the backbone's family is known.
        parts: those of them that are meant; empty: the whole output. Only a method that declares ``acts_on_parts``
            meets any.
        exit: where the hidden output of a span leaves, if not at ``path``, where its input enters.
        own_forward: whether the module computes something else than the kind says, or something that is not known
            (a subclass that scales or pads, a patched forward, a hook, a layer whose weight the module above reads
            without calling it), so that formulas on activations do not hold and only its weights can be changed.
        packed: whether the weight does not hold the numbers of the matrix (quantised layers, weights that a hook
            computes), so that only activations can be changed.
        axes: what the axes of the delta's own leaves are called there, pairs of a leaf and its names; known once a
            delta has been built.
        why: of a module that looks like a layer and is ``other``, what is in the way.

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
    own_forward: bool = False
    packed: bool = False
    tensor: str = ""
    axes: tuple[tuple[str, str], ...] = ()
    why: str = ""

    @property
    def address(self) -> str:
        """The dotted name that selected it: the module's path, or that of the one parameter that is meant."""
        return below(self.path, self.tensor) if self.tensor else self.path

    @property
    def leaf_dtype(self) -> torch.dtype:
        """The dtype of fresh leaves: float32 where the module is half precision or quantised, else its own."""
        return self.dtype if self.dtype in (torch.float32, torch.float64) else torch.float32

    def dtype_of(self, leaf: Tensor) -> torch.dtype:
        """The dtype that a method's fresh ``leaf`` gets here: numbers of floating point that of all leaves.

        >>> site = site_of("0", torch.nn.Linear(2, 2).half())
        >>> site.dtype_of(torch.ones(1, dtype=torch.float64)), site.dtype_of(torch.ones(1, dtype=torch.int8))
        (torch.float32, torch.int8)
        """
        return self.leaf_dtype if leaf.is_floating_point() else leaf.dtype

    def placed(self, leaf: Tensor) -> Tensor:
        """A fresh ``leaf`` in that dtype, on the site's device.

        >>> site_of("0", torch.nn.Linear(2, 2)).placed(torch.ones(1, dtype=torch.float64)).dtype
        torch.float32
        """
        return leaf.to(self.device, self.dtype_of(leaf))

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
            raise MatchError(f"{self.path} ({self.module_type}) is not an attention site, so its heads are not known.")
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

    def features_axis(self, value: Tensor) -> int:
        """Which axis of a hidden value holds the features: of a convolution the one before those that it runs over.

        >>> conv = site_of("conv", torch.nn.Conv1d(3, 8, 3))
        >>> conv.features_axis(torch.zeros(2, 8, 5)), conv.features_axis(torch.zeros(8, 5))
        (-2, -2)
        """
        if "conv" in self.kind and self.weight is not None:
            return 1 - len(self.weight)
        return self.channel_axis % value.ndim - value.ndim

    def option(self, name: str) -> Any:
        """The argument ``name`` that the module was made with."""
        return dict(self.options)[name]


def site_of(path: str, module: nn.Module, above: Iterable[nn.Module] = ()) -> Site:
    """The facts of ``module`` at ``path``; widths are ``None`` where its weights do not tell them.

    What has no tensor to compute with computes in the precision of the innermost module ``above`` that has one.

    >>> site = site_of("conv", torch.nn.Conv2d(3, 8, 3, padding=1))
    >>> site.kind, site.in_features, site.out_features, site.option("padding"), site.channel_axis
    ('conv2d', 3, 8, (1, 1), 1)
    """
    kind, tensors = family(module), [*module.parameters(), *module.buffers()]
    own = module._parameters.values()
    # A layer that computes in complex numbers is one, whatever else it keeps.
    candidates = [t for t in own if t is not None and t.is_complex()]
    candidates += [t for t in tensors if t.is_floating_point()] or [t for t in tensors if t.is_complex()]
    around = (t for holder in above for t in (*holder.parameters(), *holder.buffers()) if t.is_floating_point())
    like = candidates[0] if candidates else next(around, None)
    facts: dict[str, Any] = {
        "path": path,
        "module_type": type(module).__name__,
        "weight": _shape(module, "weight"),
        "bias": _shape(module, "bias"),
        "dtype": like.dtype if like is not None else torch.int8,
        "device": like.device if like is not None else next((t.device for t in tensors), torch.device("cpu")),
        "training": module.training,
    }
    known = kind is not None and is_known(module)
    if kind is None or (not known and not _is_laid_out(module, kind)):
        return _by_evidence(module, kind, facts)
    widths = _widths(module, kind, facts["weight"])
    axis = 1 if "conv" in kind or isinstance(module, NORMS_OVER_CHANNELS) else -1
    if kind == "norm" and not known and widths[1] is not None:
        axis = channel_axis(module, widths[1]) or axis
    options = tuple((key, getattr(module, key)) for key in MADE_WITH.get(kind, ()))
    return Site(
        kind=kind if widths[1] is not None else "other",
        in_features=widths[0],
        out_features=widths[1],
        channel_axis=axis,
        options=options,
        own_forward=not known,
        # A hook computes it anew before each call, from tensors of other names.
        packed=isinstance(vars(module).get("weight"), Tensor),
        **facts,
    )


def site_of_tensor(path: str, module: nn.Module, name: str) -> Site:
    """The site of one parameter of ``module``, such as a table of experts (experts, rows, columns).

    >>> attention = torch.nn.MultiheadAttention(4, 2)
    >>> site = site_of_tensor("attention", attention, "in_proj_weight")
    >>> site.address, site.kind, site.weight
    ('attention.in_proj_weight', 'tensor', (12, 4))
    """
    tensor = module._parameters[name]
    assert tensor is not None
    shape = tuple(tensor.shape)
    return Site(
        path=path,
        tensor=name,
        kind="tensor",
        module_type=type(module).__name__,
        weight=shape,
        bias=None,
        in_features=shape[-1] if shape else None,
        out_features=shape[-2] if len(shape) > 1 else None,
        dtype=tensor.dtype,
        device=tensor.device,
        training=module.training,
        own_forward=True,  # what the module makes of it is not known
        packed=not is_plain(tensor),
        why=f"{name} has one axis" if len(shape) < 2 else "",
    )


def _widths(module: Any, kind: str, weight: tuple[int, ...] | None) -> tuple[int, int] | tuple[None, None]:
    """How many features enter and leave one of torch's layers."""
    if kind == "linear":
        return int(module.in_features), int(module.out_features)
    if kind == "embedding":
        return int(module.num_embeddings), int(module.embedding_dim)
    if kind == "norm":
        if weight is None and isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            return None, None
        width = int(getattr(module, "num_features", getattr(module, "num_channels", weight[-1] if weight else 0)))
        return width, width
    if kind == "transposed_linear":
        return (weight[0], weight[1]) if weight is not None else (None, None)
    return int(module.in_channels), int(module.out_channels)


def _is_laid_out(module: Any, kind: str) -> bool:
    """Whether the weight of a layer with a forward of its own is the plain tensor that its class says."""
    weight = module._parameters.get("weight")
    if kind == "linear":
        return is_plain(weight) and tuple(weight.shape) == (module.out_features, module.in_features)
    if kind == "embedding":
        return is_plain(weight) and tuple(weight.shape) == (module.num_embeddings, module.embedding_dim)
    return True


def _by_evidence(module: nn.Module, kind: str | None, facts: dict[str, Any]) -> Site:
    """The site of a module that is not a layer of torch's, or whose weight is packed."""
    looks = Shown(why="its weight is packed") if kind == "embedding" else shown(module)
    told = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if kind == "embedding":
        told = getattr(module, "num_embeddings", None), getattr(module, "embedding_dim", None)
    widths = looks.features if looks.kind is not None else told
    if not all(isinstance(width, int) for width in widths):
        widths = (None, None)
    own = any(tensor is not None for tensor in module._parameters.values())
    return Site(
        kind=looks.kind or "other",
        in_features=widths[0],
        out_features=widths[1],
        channel_axis=looks.channel_axis,
        # Without tensors of its own there is no weights form that a formula could differ from.
        own_forward=not looks.exact if looks.kind is not None else own,
        packed=looks.packed,
        why=looks.why,
        **facts,
    )


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
