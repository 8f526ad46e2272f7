"""Spans: sites between two modules. ``after`` gets the input of the one as ``x`` and the output of the other as ``y``.

A span has two names, each of which may match a module in every block; the ends are paired by path. Its leaves belong to
the entry. The input is stashed in the running call, never on a module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..errors import FuncdeltaError, MatchError
from ..methods.config import BaseDeltaConfig
from ..methods.site import Site
from ..transforms import is_wrapped


def select_spans(config: BaseDeltaConfig, select: Callable[[BaseDeltaConfig], Iterable[str]]) -> dict[str, str]:
    """``{entry: exit}`` of the spans of ``config``; ``select`` returns the modules that a config names.

    A span is left out if ``exclude_modules`` excludes one of its ends.
    """
    kept = list(select(config))
    names = config.modified_modules or config.default_names()
    found: dict[str, str] = {}
    for entry_name, end_name in config.spans(names):
        entries, ends = (
            list(select(config.replace(modified_modules=(name,), exclude_modules=())))
            for name in (entry_name, end_name)
        )
        for entry, end in zip(entries, ends, strict=True) if entries == ends else pair(entries, ends):
            if entry not in kept or end not in kept:
                continue
            if found.setdefault(entry, end) != end:
                raise MatchError(
                    f"{config.delta_type} would begin at {entry} twice, to end at {found[entry]} and at {end}. Give "
                    f"the second span its own config, with another name=."
                )
    if not found:
        raise MatchError(
            f"exclude_modules={list(config.exclude_modules or ())} excludes one end of every span, so none is left."
        )
    return {entry: found[entry] for entry in kept if entry in found}


def pair(entries: Sequence[str], exits: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of each exit with the entry in its block: the one whose path shares the most leading tokens with its path.

    Several entries in one module (the two of a gated feed-forward) have the same input, so the first stands for all.
    Raises :class:`MatchError` with the paths if an end has no partner, or more than one.

    >>> pair(["h.0.fc1", "h.1.fc1"], ["h.0.fc2", "h.1.fc2"])
    [('h.0.fc1', 'h.0.fc2'), ('h.1.fc1', 'h.1.fc2')]
    >>> pair(["h.0.mlp.gate", "h.0.mlp.up"], ["h.0.mlp.down"])
    [('h.0.mlp.gate', 'h.0.mlp.down')]
    >>> pair(["h.0.fc1"], ["h.0.fc2", "h.1.fc2"])
    Traceback (most recent call last):
    ...
    funcdelta.errors.MatchError: The span that ends at h.1.fc2 has no entry in its block; entries are h.0.fc1...
    """
    nearest = {entry: _nearest(entry, exits) for entry in entries}
    spans: list[tuple[str, str]] = []
    paired: dict[str, str] = {}
    for end in exits:
        begins = [entry for entry in _nearest(end, entries) if end in nearest[entry]]
        if not begins:
            raise MatchError(
                f"The span that ends at {end} has no entry in its block; entries are {_listed(entries)}. Name modules "
                f"in the same blocks, or leave the exit out: exclude_modules=['{end}']."
            )
        if len({entry.rpartition(".")[0] for entry in begins}) > 1:
            raise MatchError(
                f"The span that ends at {end} could begin at {_listed(begins)}. Name one of them by a longer path."
            )
        for entry in begins:
            if entry in paired:
                raise MatchError(
                    f"The span that begins at {entry} could end at {paired[entry]} or {end}. Name one of them by a "
                    f"longer path."
                )
            paired[entry] = end
        spans.append((begins[0], end))
    alone = [entry for entry in entries if entry not in paired]
    if alone:
        raise MatchError(
            f"The span that begins at {alone[0]} has no exit in its block; exits are {_listed(exits)}. Name modules "
            f"in the same blocks, or leave the entry out: exclude_modules=['{alone[0]}']."
        )
    return spans


def _nearest(path: str, others: Sequence[str]) -> list[str]:
    """Those of ``others`` that share the most leading tokens with ``path``."""
    shared = {other: _common(path, other) for other in others}
    most = max(shared.values(), default=0)
    return [other for other, tokens in shared.items() if tokens == most]


def _common(a: str, b: str) -> int:
    count = 0
    for left, right in zip(a.split("."), b.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count


def _listed(paths: Sequence[str]) -> str:
    return ", ".join(paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def site_between(entry: Site, end: Site) -> Site:
    """The site of a span, with the entry's input width and the exit's output width; ``entry`` if it is both.

    >>> from funcdelta.methods.site import site_of
    >>> span = site_between(site_of("w1", torch.nn.Linear(3, 5)), site_of("w2", torch.nn.Linear(5, 2)))
    >>> span.path, span.exit, span.in_features, span.out_features
    ('w1', 'w2', 3, 2)
    """
    if entry.path == end.path:
        return entry
    if entry.channel_axis != end.channel_axis:
        raise MatchError(
            f"The span from {entry.path} ({entry.module_type}) to {end.path} ({end.module_type}) begins with features "
            f"on axis {entry.channel_axis} and ends with features on axis {end.channel_axis}. Name two modules with "
            f"features on the same axis."
        )
    return Site(
        path=entry.path,
        exit=end.path,
        kind="span",
        module_type=f"{entry.module_type} to {end.module_type}",
        weight=None,
        bias=None,
        in_features=entry.in_features,
        out_features=end.out_features,
        channel_axis=end.channel_axis,
        dtype=entry.dtype,
        device=entry.device,
        options=(("entry", entry.kind), ("exit", end.kind)),
        training=end.training,
    )


Stash = dict[str, tuple[Tensor, int | None, int | None]]
"""The inputs of a call's unfinished spans, by key: the tensor, its axis of rows, and its version then.

A plain dict, because torch.compile has to trace it.
"""


def keep(stash: Stash, key: str, site: Site, x: Tensor, dim: int | None, replace: bool) -> None:
    """Stash the input of the span ``site`` under ``key``, the key of its first leaf.

    Raises ``FuncdeltaError`` if the span has not ended since its last entry. With ``replace`` it does not: the call of
    a view goes on after an error, which may have left a span unfinished.
    """
    if key in stash and not replace:
        raise FuncdeltaError(
            f"{site.path} was called twice before {site.exit} was called once, so the span between them has two "
            f"inputs. Name other modules."
        )
    stash[key] = x, dim, _version(x)


def take(stash: Stash, key: str, site: Site) -> tuple[Tensor, int | None]:
    """The input of the span that now ends, and its axis of rows."""
    if key not in stash:
        raise MatchError(
            f"{site.exit} was called before {site.path}, so the span between them has no input yet. Name an entry that "
            f"runs earlier, or an exit that runs later."
        )
    x, dim, version = stash.pop(key)
    if version != _version(x):
        raise FuncdeltaError(
            f"The input of the span at {site.path} was changed in place before the span ended at {site.exit}, so its "
            f"value is lost. Name a module below or above {site.path} that gets a different tensor."
        )
    return x, dim


def _version(x: Tensor) -> int | None:
    """How often ``x`` was written, or ``None`` if torch does not count it."""
    if torch.compiler.is_compiling() or is_wrapped(x) or x.is_inference():
        return None
    return x._version
