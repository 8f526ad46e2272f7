"""Resolves names in a config on a backbone: common names, OpenDelta's older ones without ``@``, and the backbone's."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import MatchError
from ..match import matches, near
from .families import FAMILIES, rows_of
from .parts import Part
from .rows import Translation, translate

Parts = tuple[Part, ...]
"""Parts of a fused output; empty for the whole output."""


class Names:
    """All names of all modules of ``backbone``.

    A module's path is translated by the table of the innermost Transformers model that contains it, relative to that
    model, so a BERT and a T5 inside one module each use their own table.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self._backbone = backbone
        self._modules = dict(backbone.named_modules(remove_duplicate=False))
        self._region: dict[str, tuple[str, str]] = {}
        self._config: dict[str, Any] = {}
        self._translations: dict[str, Translation] = {}
        for path, module in self._modules.items():
            above = path.rpartition(".")[0]
            start, outer = self._region[above] if path else ("", "")
            config = getattr(module, "config", None)
            kind = getattr(config, "model_type", None)
            if not isinstance(kind, str) or not kind:
                kind, config = outer, self._config[above] if path else None
            # A module of the same type belongs to the enclosing model; another type starts a new model.
            self._region[path] = (start if kind == outer else path, kind)
            self._config[path] = config

    @property
    def families(self) -> list[str]:
        """The families found, in the order of their first modules."""
        return [kind for kind in dict.fromkeys(kind for _, kind in self._region.values()) if kind in FAMILIES]

    def of(self, path: str) -> Translation:
        """The names of the module or parameter at ``path``.

        >>> Names(torch.nn.Sequential(torch.nn.Linear(2, 2))).of("0.weight").name
        '0.weight'
        """
        known = self._translations.get(path)
        if known is None:
            owner = path
            while owner not in self._modules:
                owner = owner.rpartition(".")[0]
            start, kind = self._region[owner]
            known = Translation((path,))
            if kind in FAMILIES and path != start:
                found = translate(path[len(start) + 1 if start else 0 :].split("."), rows_of(kind))
                known = found.under(start)
            self._translations[path] = known
        return known

    def parts(self, path: str) -> Parts:
        """The parts of the output of the module at ``path``, if it is fused and its layout is known.

        >>> Names(torch.nn.Sequential(torch.nn.Linear(2, 2))).parts("0")
        ()
        """
        fused = self.of(path).fused
        width = _width(self._modules[path])
        if fused is None or width is None:
            return ()
        found = fused.layout(self._config[path], fused.names, width)
        # In a layer that was cut (by pruning, or across devices) rows have other meanings.
        return found if sum(part.size for part in found) == width else ()

    def find(self, target: str, common: bool | None, among: Iterable[str] | None = None) -> dict[str, Parts]:
        """``{path: parts}`` of the modules (or of the dotted names ``among``) that ``target`` matches.

        A target with ``@`` is a common name, one without ``@`` a name of the backbone. If ``common`` is true, a target
        without ``@`` is OpenDelta's older common name (``attn.q``), or a name of the backbone if that matches nothing.

        >>> Names(torch.nn.Sequential(torch.nn.Linear(2, 2))).find("0", None)
        {'0': ()}
        """
        paths = [path for path in (self._modules if among is None else among) if path]
        if "@" not in target and not common:
            return {path: () for path in paths if matches(path, target)}
        self._demand_family(target)
        if "@" in target and common is False:
            raise MatchError(
                f"common_structure=False means that names are the backbone's own, but {target!r} is a common name: "
                f"leave out common_structure."
            )
        old = "@" not in target
        found: dict[str, Parts] = {}
        for path in paths:
            if isinstance(self._modules.get(path), nn.Identity):
                continue  # a placeholder for something that this layer lacks
            called = self.of(path)
            if any(matches(_plain(name) if old else name, target) for name in called.names):
                found[path] = ()
            elif called.fused is not None:
                names = {part: called.part_name(part) for part in called.fused.names}
                meant = [part for part, name in names.items() if matches(_plain(name) if old else name, target)]
                if meant:
                    found[path] = self._named_parts(path, meant)
        if old and not found:
            return {path: () for path in paths if matches(path, target)}
        return found

    def nearest(self, target: str, common: bool | None, others: Iterable[str] = ()) -> str:
        """A sentence with the names most similar to ``target``, for the end of an error message."""
        if "@" not in target and not common:
            return near(target, [*(path for path in self._modules if path), *others])
        known: dict[str, None] = {}
        for path in self._modules:
            called = self.of(path)
            pieces = [called.part_name(part) for part in called.fused.names] if called.fused else []
            for name in (*called.names, *pieces):
                tokens = [token for token in name.split(".") if "@" in token]
                if name.endswith("@"):
                    known[".".join(tokens[-2:] if tokens[-2:-1] != ["block@"] else tokens[-1:])] = None
        return near(target, [_plain(name) for name in known] if "@" not in target else list(known))

    def _named_parts(self, path: str, meant: list[str]) -> Parts:
        parts = {part.name: part for part in self.parts(path)}
        if not parts:
            module = self._modules[path]
            raise MatchError(
                f"{path} ({type(module).__name__}) computes several projections at once, and it is unknown where "
                f"{', '.join(meant)} are in its {_width(module)} outputs: name the whole layer, {self.of(path).name!r}."
            )
        return tuple(parts[name] for name in meant)

    def _demand_family(self, target: str) -> None:
        if not self.families:
            raise MatchError(
                f"{type(self._backbone).__name__} belongs to no family with common names ({', '.join(FAMILIES)}), so "
                f"{target!r} matches nothing: give the backbone's own names, such as modified_modules=[...]."
            )


def _plain(name: str) -> str:
    """A common name as OpenDelta wrote it before 0.3."""
    return name.replace("@", "")


def _width(module: nn.Module) -> int | None:
    """The number of output features of a linear layer; ``None`` for other modules."""
    width = getattr(module, "out_features", None) or getattr(module, "nf", None)
    return width if isinstance(width, int) else None


def common_names(model: nn.Module) -> dict[str, str]:
    """``{path: common name}`` of every module of ``model``; ``MatchError`` if it belongs to no known family.

    Tokens that end with ``@`` are common. The others are the model's own: wrappers, numbers of layers, and modules that
    the family's table leaves out. The root has no name.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> names = common_names(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2)))
    >>> names["transformer.h.0.mlp.c_fc"], names["transformer.h.0.attn.c_attn"]
    ('transformer.decoder@.block@.0.ff@.w1@', 'transformer.decoder@.block@.0.attn@.q,k,v@')
    """
    names = Names(model)
    if not names.families:
        raise MatchError(
            f"{type(model).__name__} belongs to no family with common names. The families are: {', '.join(FAMILIES)}."
        )
    return {path: names.of(path).name for path, _ in model.named_modules(remove_duplicate=False) if path}


def families(model: nn.Module) -> list[str]:
    """The families found in ``model`` or inside any wrapper, by their Transformers model type.

    >>> families(torch.nn.Linear(2, 2))
    []
    """
    return Names(model).families


def resolve(backbone: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """``names`` with common names replaced by the backbone's own; names without ``@`` stay as they are.

    Each resulting name matches exactly one module. The common name of a part becomes the name of the whole fused layer.

    >>> resolve(torch.nn.Sequential(), ("query",))
    ('query',)
    """
    known = Names(backbone)
    paths = [path for path, _ in backbone.named_modules(remove_duplicate=False)]
    targets: list[str] = []
    for name in names:
        if "@" not in name:
            targets.append(name)
            continue
        found = known.find(name, None)
        if not found:
            raise MatchError(f"{', '.join(known.families)} has no common name {name!r}.{known.nearest(name, None)}")
        for path in found:
            alone = not any(other.endswith("." + path) for other in paths)
            targets.append(path if alone else f"[r]^{re.escape(path)}$")
    return tuple(dict.fromkeys(targets))
