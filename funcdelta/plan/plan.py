"""The plan: which delta acts where, under which leaf names; resolved once when a delta is built."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..match import within
from ..methods.site import Shapes
from .attachment import Attachment
from .kinds import Kinds
from .sharing import Shared


@dataclass
class Plan:
    """Everything static about a delta on its backbone.

    Attributes:
        attachments: by the path of the module where they act (a span: where it ends), in the order in which they act.
        trained: backbone leaves that are trained too: ``{name: every name of the same tensor}``.
        fresh: those of ``trained`` that start anew instead of as a copy.
        ends: every parameter and buffer of the backbone, ``{name: every name of the same tensor}``.
        shared: the leaves that the sites of one delta share.
        names: one name a config, in their order.
        fixed: what all members have together, ``{key: tensor}``, once.
        measured: shapes of what enters and leaves modules whose weights do not tell their widths.
    """

    attachments: dict[str, tuple[Attachment, ...]]
    trained: dict[str, tuple[str, ...]]
    fresh: frozenset[str]
    ends: dict[str, tuple[str, ...]]
    shared: tuple[Shared, ...] = ()
    names: tuple[str, ...] = ()
    measured: Mapping[str, Shapes] = field(default_factory=dict)
    fixed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of the deltas, shared ones first."""
        return {key: shape for part in (*self.shared, *self.all()) for key, shape in part.shapes.items()}

    @property
    def constants(self) -> tuple[str, ...]:
        """The keys of all leaves that never train."""
        return tuple(key for part in (*self.shared, *self.all()) for key in part.constants)

    @functools.cached_property
    def kinds(self) -> Kinds:
        """Which dtypes the leaves may have."""
        dtypes = {key: dtype for part in (*self.shared, *self.all()) for key, dtype in part.dtypes.items()}
        constants = set(self.constants)
        floating = {key for key, dtype in dtypes.items() if dtype.is_floating_point}
        used = [a.leaves.values() for a in self.all()] + [group.leaves.values() for group in self.shared]
        together: dict[tuple[str, ...], None] = {}
        beside: dict[str, str] = {}
        for keys in used:
            trains = tuple(key for key in keys if key in floating and key not in constants)
            if trains:
                together[trains] = None
                beside |= {key: trains[0] for key in keys if key in floating and key in constants}
        return Kinds(dtypes | dict.fromkeys(self.trained, torch.float32), list(together), beside)

    @functools.cached_property
    def read(self) -> frozenset[str]:
        """The backbone's tensors that methods read."""
        return frozenset(name for a in self.all() for _, name in a.reads)

    def keys(self) -> dict[str, frozenset[str]]:
        """``{delta name: the keys of its leaves in params}``."""
        found: dict[str, frozenset[str]] = {a.name: frozenset() for a in self.all()}
        for part in (*self.shared, *self.all()):
            found[part.name] |= frozenset(part.shapes)
        return found

    @property
    def order(self) -> tuple[str, ...]:
        """The names of all leaves, in their one order."""
        return (*self.shapes, *self.trained)

    def __post_init__(self) -> None:
        found = {path: tuple(a for a in group if a.by_weights) for path, group in self.attachments.items()}
        self.rewriting = {path: group for path, group in found.items() if group}
        """The attachments that act by rewriting tensors, by the path of their site."""
        self.conditions = tuple(dict.fromkeys(name for a in self.all() for name in a.acts().conditions))
        """What the methods want to know of each call, all together."""

    @property
    def own_tensors(self) -> frozenset[str]:
        """The modules whose own tensors may differ by member."""
        ends = (end for names in self.trained.values() for end in names)
        return frozenset(self.rewriting) | {end.rpartition(".")[0] for end in ends}

    @property
    def uncalled(self) -> set[str]:
        """Sites whose tensors are read by the module above, which never calls them: they act by their weights."""
        return {path for path, group in self.attachments.items() if any(a.read_by_parent for a in group)}

    def owners(self, params: Mapping[str, Any]) -> dict[str, list[str]]:
        """Modules whose own tensors differ by member, each with the keys of params that say how."""
        found: dict[str, list[str]] = {}
        for name, ends in self.trained.items():
            for end in ends if name in params else ():
                found.setdefault(end.rpartition(".")[0], []).append(name)
        for attachment in self.all():
            if attachment.by_weights and attachment.among(params):
                path = attachment.site.path
                reader = path.rpartition(".")[0] if attachment.read_by_parent else path
                found.setdefault(reader, []).extend(attachment.leaves.values())
        return found

    def outermost(self, params: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The outermost modules that run with tensors of one member, each with the keys of params used in it."""
        found = self.owners(params)
        outermost = [path for path in found if not any(path != other and within(path, other) for other in found)]
        keys_of: dict[str, tuple[str, ...]] = {}
        for path in outermost:
            keys = [key for other, keys in found.items() if within(other, path) for key in keys]
            acting = [a for a in self.all() if any(within(end, path) for end in a.ends)]
            keys += [key for a in acting for key in a.leaves.values() if key in params]
            keys_of[path] = tuple(dict.fromkeys(keys))
        return keys_of

    def present(self, params: Mapping[str, Any]) -> frozenset[str]:
        """Which deltas and which trained leaves ``params`` hold; the structure that a layout belongs to."""
        deltas = {a.name for a in self.all() if a.among(params)}
        return frozenset(deltas | {name for name in self.trained if name in params})

    def all(self) -> list[Attachment]:
        """Every attachment, site by site."""
        return [attachment for group in self.attachments.values() for attachment in group]


class Planned(Protocol):
    """What has a backbone and a plan: a delta, or its program."""

    @property
    def backbone(self) -> nn.Module: ...

    @property
    def plan(self) -> Plan: ...


def shapes_of(planned: Planned) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of one member, in their one order: the deltas' own, then the backbone's trained ones.

    >>> delta = fd.BitFitModel(nn.Sequential(nn.Linear(4, 2)), modified_modules=["0"])
    >>> shapes_of(delta.program)
    {'0.bitfit.bias': (2,)}
    """
    plan, parameters = planned.plan, dict(planned.backbone.named_parameters())
    return plan.shapes | {name: tuple(parameters[name].shape) for name in plan.trained}
