"""Classifies every key of a file: a leaf of some delta at some module, a tensor of the backbone, or unknown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...match import below
from .spelling import SPELLINGS, attribute_name, attribute_of, owners_of

OLD_BUFFERS = ("position_ids", "attn.bias", "attn.masked_bias", "attention.bias", "attention.masked_bias", "inv_freq")
"""Suffixes of constant buffers that old versions of Transformers kept in state dicts."""


@dataclass
class Group:
    """The keys of one delta in the file, by module path and leaf; ``shared`` leaves are under the first site's path."""

    own: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, dict[str, str]] = field(default_factory=dict)


@dataclass
class Keys:
    """The keys of a file, classified.

    Attributes:
        deltas: leaves of deltas, by delta type and the delta's number among those of its type.
        backbone: keys that name a tensor of the backbone.
        fresh: ``{module path: {own name: key}}`` of tensors that a module of the backbone could have but lacks.
        unused: keys of tensors that no output depends on.
        unknown: the rest.
    """

    deltas: dict[tuple[str, int], Group] = field(default_factory=dict)
    backbone: list[str] = field(default_factory=list)
    fresh: dict[str, dict[str, str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def names(self) -> dict[str, tuple[str, int]]:
        """``{name in the file: (delta type, number)}``."""
        return {attribute_name(*which): which for which in self.deltas}


def sort_keys(keys: Iterable[str], backbone: nn.Module) -> Keys:
    """Classify ``keys`` for ``backbone``.

    >>> backbone = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> found = sort_keys(["0.lora.lora_A", "1.lora_B", "0.weight", "2.weight"], backbone)
    >>> found.deltas["lora", 0].own, found.backbone, found.unknown
    ({'0': {'lora_A': '0.lora.lora_A'}, '1': {'lora_B': '1.lora_B'}}, ['0.weight'], ['2.weight'])
    """
    modules = {path for path, _ in backbone.named_modules(remove_duplicate=False)}
    tensors = {name for name, _ in backbone.named_parameters(remove_duplicate=False)}
    tensors |= {name for name, _ in backbone.named_buffers(remove_duplicate=False)}
    fresh_names = {name for spelling in SPELLINGS.values() for name in spelling.own}
    found = Keys()
    for key in keys:
        path, _, own = key.rpartition(".")
        if key in tensors:
            found.backbone.append(key)
        elif not _add_leaf(found, key, modules):
            if path and path in modules and own in fresh_names and not key.endswith(OLD_BUFFERS):
                found.fresh.setdefault(path, {})[own] = key
            elif key.endswith(OLD_BUFFERS) and any(path == part or path.startswith(f"{part}.") for part in modules):
                found.unused.append(key)
            else:
                found.unknown.append(key)
    return found


def only_kind(keys: Iterable[str], backbone: nn.Module) -> str | None:
    """The delta type of the leaves among ``keys``, if there is exactly one.

    >>> only_kind(["0.adapter.modulelist.up_proj.bias", "0.bias"], nn.Sequential(nn.Linear(2, 2)))
    'adapter'
    """
    kinds = {delta_type for delta_type, _ in sort_keys(keys, backbone).deltas}
    return kinds.pop() if len(kinds) == 1 else None


def _add_leaf(found: Keys, key: str, modules: set[str]) -> bool:
    """Add ``key`` to its delta's group if it is a leaf at one of ``modules``; returns whether it is."""
    tokens = key.split(".")
    for position, token in enumerate(tokens[:-1]):
        which, path = attribute_of(token), ".".join(tokens[:position])
        if which is None or path not in modules or below(path, token) in modules:
            continue
        delta_type, attribute, number = which
        spelling = SPELLINGS[delta_type]
        if not path and spelling.sites:
            continue  # the backbone as a whole is not a site
        leaf = ".".join(tokens[position + 1 :])
        if leaf in spelling.unused:
            found.unused.append(key)
            return True
        if attribute == spelling.attribute:
            if not leaf.startswith(spelling.inner):
                return False
            leaf = leaf.removeprefix(spelling.inner)
        if any(attribute_of(inner) for inner in leaf.split(".")):
            return False  # a delta on a delta
        group = found.deltas.setdefault((delta_type, number), Group())
        place = group.own if attribute == spelling.attribute else group.shared
        place.setdefault(path, {})[leaf] = key
        return True
    path, _, leaf = key.rpartition(".")
    for delta_type in owners_of(leaf) if path and path in modules else ():
        found.deltas.setdefault((delta_type, 0), Group()).own.setdefault(path, {})[leaf] = key
        return True
    return False


def moved(keys: Iterable[str], backbone: nn.Module) -> dict[str, str]:
    """``{key: key on backbone}``, with one beginning added to or removed from all paths, if that makes them fit.

    This finds a delta that was made on a model inside a wrapper, or on a wrapper around the model. If the keys already
    fit, or there are several ways to make them fit, they stay as they are.

    >>> wrapped = nn.ModuleDict({"inner": nn.ModuleDict({"query": nn.Linear(2, 2)})})
    >>> moved(["query.lora.lora_A"], wrapped)
    {'query.lora.lora_A': 'inner.query.lora.lora_A'}
    """
    keys = list(keys)
    same = {key: key for key in keys}
    unknown = sort_keys(keys, backbone).unknown
    if not unknown:
        return same
    paths = [path for path, _ in backbone.named_modules() if path]
    ways: dict[tuple[str, ...], dict[str, str]] = {}
    for less, more in _beginnings(unknown[0], paths):
        target = {key: more + key.removeprefix(less) for key in keys}
        if len(set(target.values())) == len(keys) and not sort_keys(target.values(), backbone).unknown:
            ways.setdefault(tuple(target.values()), target)
    return next(iter(ways.values())) if len(ways) == 1 else same


def _beginnings(key: str, paths: Iterable[str]) -> set[tuple[str, str]]:
    """Pairs ``(beginning to remove, beginning to add)`` with which ``key`` may fit the backbone."""
    tokens = key.split(".")
    found: set[tuple[str, str]] = set()
    for start in range(len(tokens) - 1):
        if any(token.isdigit() for token in tokens[:start]):
            break  # a wrapper's name is not a layer's number
        less = "".join(f"{token}." for token in tokens[:start])
        found.add((less, ""))
        for path in paths:
            # The first remaining token is the name of a module that is elsewhere in this backbone.
            before, _, last = path.rpartition(".")
            if last == tokens[start] and before:
                found.add((less, f"{before}."))
    return found


def repeats(tensors: Mapping[str, Tensor], group: Group, known: Mapping[str, Mapping[str, str]]) -> bool:
    """Whether ``group`` only repeats leaves of ``known``, tensor for tensor.

    >>> tensors = {"a": torch.ones(2), "b": torch.ones(2)}
    >>> repeats(tensors, Group({"w2": {"bias": "b"}}), {"w1": {"bias": "a"}})
    True
    """

    def again(at: Mapping[str, str], other: Mapping[str, str]) -> bool:
        return at.keys() == other.keys() and all(tensors[at[leaf]].equal(tensors[other[leaf]]) for leaf in at)

    return bool(group.own) and all(any(again(at, other) for other in known.values()) for at in group.own.values())
