"""Spans: sites between two modules. ``after`` gets as ``x`` what entered the one, as ``y`` what leaves the other.

A span is named by two names, each of which may mean a module in every block; ends are paired by path. Its leaves stand
at the entry. What entered is stashed in the call that is under way, never on a module.
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
    """Where the spans of ``config`` begin, each with where it ends; ``select`` gives the modules that a config names.

    A span with either end left out (``exclude_modules``) is left out.
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
                    f"{config.delta_type} would begin at {entry} twice, to end at {found[entry]} and at {end}: give "
                    f"the second span a config of its own, with a name= of its own."
                )
    if not found:
        raise MatchError(
            f"exclude_modules={list(config.exclude_modules or ())} leaves one end of every span out, so none is left."
        )
    return {entry: found[entry] for entry in kept if entry in found}


def pair(entries: Sequence[str], exits: Sequence[str]) -> list[tuple[str, str]]:
    """Every exit with the entry in its own block: the one whose path shares most leading tokens with the exit's.

    Several entries in one module (the two of a gated feed-forward) read one input, so the first stands for all.
    Raises :class:`MatchError` with the paths where an end has no partner, or more than one.

    >>> pair(["h.0.fc1", "h.1.fc1"], ["h.0.fc2", "h.1.fc2"])
    [('h.0.fc1', 'h.0.fc2'), ('h.1.fc1', 'h.1.fc2')]
    >>> pair(["h.0.mlp.gate", "h.0.mlp.up"], ["h.0.mlp.down"])
    [('h.0.mlp.gate', 'h.0.mlp.down')]
    >>> pair(["h.0.fc1"], ["h.0.fc2", "h.1.fc2"])
    Traceback (most recent call last):
    ...
    funcdelta.errors.MatchError: A span that ends at h.1.fc2 begins nowhere in its block; entries are h.0.fc1...
    """
    nearest = {entry: _nearest(entry, exits) for entry in entries}
    spans: list[tuple[str, str]] = []
    paired: dict[str, str] = {}
    for end in exits:
        begins = [entry for entry in _nearest(end, entries) if end in nearest[entry]]
        if not begins:
            raise MatchError(
                f"A span that ends at {end} begins nowhere in its block; entries are {_listed(entries)}. Name modules "
                f"that stand in the same blocks, or leave the end out: exclude_modules=['{end}']."
            )
        if len({entry.rpartition(".")[0] for entry in begins}) > 1:
            raise MatchError(
                f"A span that ends at {end} could begin at {_listed(begins)}: name one of them by a longer path."
            )
        for entry in begins:
            if entry in paired:
                raise MatchError(
                    f"A span that begins at {entry} could end at {paired[entry]} or {end}: name one of them by a "
                    f"longer path."
                )
            paired[entry] = end
        spans.append((begins[0], end))
    alone = [entry for entry in entries if entry not in paired]
    if alone:
        raise MatchError(
            f"A span that begins at {alone[0]} ends nowhere in its block; exits are {_listed(exits)}. Name modules "
            f"that stand in the same blocks, or leave the beginning out: exclude_modules=['{alone[0]}']."
        )
    return spans


def _nearest(path: str, others: Sequence[str]) -> list[str]:
    """Those of ``others`` that share most leading tokens with ``path``."""
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


def _listed(paths: Sequence[str], most: int = 6) -> str:
    return ", ".join(paths[:most]) + (f" and {len(paths) - most} more" if len(paths) > most else "")


def site_between(entry: Site, end: Site) -> Site:
    """The site of a span: widths of what enters and of what leaves; the entry itself where both ends are one module.

    >>> from funcdelta.methods.site import site_of
    >>> span = site_between(site_of("w1", torch.nn.Linear(3, 5)), site_of("w2", torch.nn.Linear(5, 2)))
    >>> span.path, span.exit, span.in_features, span.out_features
    ('w1', 'w2', 3, 2)
    """
    if entry.path == end.path:
        return entry
    if entry.channel_axis != end.channel_axis:
        raise MatchError(
            f"A span from {entry.path} ({entry.module_type}) to {end.path} ({end.module_type}) has its features on "
            f"axis {entry.channel_axis} where it begins and on axis {end.channel_axis} where it ends: name two modules "
            f"of one layout."
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
"""What entered the spans that have not ended yet, its axis of rows, and how often it had been written; one a call.

A plain dict, because torch.compile traces calls that make one.
"""


def keep(stash: Stash, key: str, site: Site, x: Tensor, dim: int | None, replace: bool) -> None:
    """Hold what enters the span ``site``, whose leaves' first key is ``key``.

    With ``replace`` a new entry takes the place of one whose span did not end, as an error may leave it in a view,
    whose call goes on. Elsewhere that is an error.
    """
    if key in stash and not replace:
        raise FuncdeltaError(
            f"{site.path} was called twice before {site.exit} was called once, so what enters the span between them "
            f"is not one tensor: name other modules."
        )
    stash[key] = x, dim, _version(x)


def take(stash: Stash, key: str, site: Site) -> tuple[Tensor, int | None]:
    """What entered the span that now ends, and its axis of rows."""
    if key not in stash:
        raise MatchError(
            f"{site.exit} was called before {site.path}, so nothing entered the span between them: name a module that "
            f"runs earlier for the beginning, or a later one for the end."
        )
    x, dim, version = stash.pop(key)
    if version != _version(x):
        raise FuncdeltaError(
            f"What entered the span at {site.path} was changed in place before it ended at {site.exit}, and its value "
            f"is lost: name a module below or above {site.path} that gets a tensor of its own."
        )
    return x, dim


def _version(x: Tensor) -> int | None:
    """How often ``x`` was written, where that can be told."""
    if torch.compiler.is_compiling() or is_wrapped(x) or x.is_inference():
        return None
    return x._version
