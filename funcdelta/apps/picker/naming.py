"""Short names for chosen modules: a small set of names whose matches are exactly the chosen modules.

A name is what ``modified_modules`` takes (:mod:`funcdelta.match`): a whole-token suffix, or ``[r]regex``. A name is
*exact* if it matches nothing but chosen modules; names cover the choice if every chosen module is matched by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from ...errors import MatchError
from ...match import REGEX_PREFIX, matches, near

MOST_SINGLE_NAMES = 3
"""With more names than this that match one module each, regular expressions are tried instead."""

Box = tuple[tuple[str, ...], ...]
"""A set of paths as a product: the tokens that may occur at each position."""


def paths_of(model: nn.Module) -> dict[str, str]:
    """``{path: the path under which the module is known}``; two paths of one module have the same value.

    >>> shared = torch.nn.Linear(2, 2)
    >>> paths_of(torch.nn.Sequential(shared, torch.nn.ReLU(), shared))
    {'0': '0', '1': '1', '2': '0'}
    """
    known = {id(module): path for path, module in model.named_modules()}
    return {path: known[id(module)] for path, module in model.named_modules(remove_duplicate=False) if path}


def exact_names(paths: Mapping[str, str], chosen: Iterable[str]) -> list[str]:
    """One name a chosen module: its full path, or ``[r]^path$`` where the path is also the end of another one.

    >>> exact_names({"0": "0", "block": "block", "block.0": "block.0"}, ["block", "0"])
    ['[r]^0$', 'block']
    """
    wanted = _known(paths, chosen)
    found = _hits(paths)
    return [_alone(path) if found[path] - {path} else path for path in wanted]


def short_names(paths: Mapping[str, str], chosen: Iterable[str]) -> list[str]:
    """A few short names that together match exactly ``chosen``, which are paths in ``paths`` (:func:`paths_of`).

    Whole-token suffixes first, those that cover most, then the shortest; where many would cover one module each,
    regular expressions over the tokens that differ.

    >>> layers = [f"layer.{i}.{name}" for i in range(12) for name in ("attn.query", "attn.key", "out")]
    >>> paths = {path: path for path in layers}
    >>> short_names(paths, [path for path in layers if path.endswith(("query", "out"))])
    ['query', 'out']
    >>> short_names(paths, [f"layer.{i}.attn.{name}" for i in (0, 1, 2, 11) for name in ("query", "key")])
    ['[r]layer\\\\.(?:[0-2]|11)\\\\.attn\\\\.(?:query|key)']
    """
    wanted = _known(paths, chosen)
    found = _hits(paths)
    allowed = set(wanted)
    order = {path: position for position, path in enumerate(wanted)}
    # In the order of the modules, short before long: what max() finds first wins a tie.
    suffixes = {s: found[s] for path in wanted for s in _suffixes(path) if found[s] <= allowed}
    names: list[str] = []
    missing = set(wanted)
    while missing and suffixes:
        best = max(suffixes, key=lambda name: (len(suffixes[name] & missing), -name.count(".")))
        gain = suffixes.pop(best) & missing
        if not gain:
            break
        if len(gain) == 1 and len(missing) > MOST_SINGLE_NAMES:
            break
        names.append(best)
        missing -= gain
    for box in _boxes(sorted(missing, key=order.__getitem__)):
        names.append(_box_name(box, paths, allowed))
    names = _needed(names, paths, wanted)
    return sorted(names, key=lambda name: min(order[paths[path]] for path in paths if matches(path, name)))


def selected(paths: Mapping[str, str], names: Sequence[str]) -> list[str]:
    """The modules that ``names`` match, in the order of ``paths``: what a delta does with ``modified_modules``.

    >>> selected({"a.q": "a.q", "b.q": "b.q", "b.k": "b.k"}, ["q"])
    ['a.q', 'b.q']
    """
    return list(dict.fromkeys(known for path, known in paths.items() if any(matches(path, name) for name in names)))


def _known(paths: Mapping[str, str], chosen: Iterable[str]) -> list[str]:
    """The chosen modules under their known paths, in the model's order."""
    wanted = set()
    for path in chosen:
        if path not in paths:
            raise MatchError(f"There is no module {path!r}.{near(path, list(paths))}")
        wanted.add(paths[path])
    return [path for path, known in paths.items() if path == known and path in wanted]


def _suffixes(path: str) -> list[str]:
    """Whole-token suffixes, the shortest first; no bare numbers, which mean nothing to a reader."""
    tokens = path.split(".")
    found = [".".join(tokens[-n:]) for n in range(1, len(tokens) + 1)]
    return [suffix for suffix in found if not suffix.isdigit() or suffix == path]


def _hits(paths: Mapping[str, str]) -> dict[str, set[str]]:
    """``{suffix: the modules that it matches}`` for every suffix there is."""
    found: dict[str, set[str]] = {}
    for path, known in paths.items():
        tokens = path.split(".")
        for n in range(1, len(tokens) + 1):
            found.setdefault(".".join(tokens[-n:]), set()).add(known)
    return found


def _alone(path: str) -> str:
    return f"{REGEX_PREFIX}^{re.escape(path)}$"


def _boxes(paths: Sequence[str]) -> list[Box]:
    """``paths`` as a union of products, by merging two that differ at one position until none do."""
    start: list[Box] = [tuple((token,) for token in path.split(".")) for path in paths]
    width = max((len(box) for box in start), default=0)
    # Which position is merged first can matter: the better of the two directions.
    return min((_merged(start, positions) for positions in (range(width), range(width)[::-1])), key=len)


def _merged(boxes: list[Box], positions: Sequence[int]) -> list[Box]:
    count = None
    while count != len(boxes):
        count = len(boxes)
        for i in positions:
            groups: dict[tuple[Box, Box], dict[str, None]] = {}
            rest: list[Box] = []
            for box in boxes:
                if i < len(box):
                    groups.setdefault((box[:i], box[i + 1 :]), {}).update(dict.fromkeys(box[i]))
                else:
                    rest.append(box)
            boxes = [(*left, tuple(tokens), *right) for (left, right), tokens in groups.items()] + rest
    return boxes


def _box_name(box: Box, paths: Mapping[str, str], allowed: set[str]) -> str:
    """The shortest end of the box's pattern that matches nothing but what is allowed."""
    if all(len(tokens) == 1 for tokens in box):
        path = ".".join(tokens[0] for tokens in box)
        ends = [end for end in _suffixes(path) if set(selected(paths, [end])) <= allowed]
        return ends[0] if ends else _alone(path)
    pattern = [_alternatives(tokens) for tokens in box]
    whole = f"{REGEX_PREFIX}^" + r"\.".join(pattern) + "$"
    members = set(selected(paths, [whole]))
    for first in range(next(i for i, tokens in enumerate(box) if len(tokens) > 1), -1, -1):
        if first and box[first][0].isdigit():
            continue  # layer.[0-3] reads better than [0-3]
        name = REGEX_PREFIX + r"\.".join(pattern[first:])
        # Only the leftmost match of a pattern counts, so that an end may find less than the whole.
        if members <= set(selected(paths, [name])) <= allowed:
            return name
    return whole


def _alternatives(tokens: Sequence[str]) -> str:
    """A pattern for one of ``tokens``: numbers as ranges, ``[0-5]``, words by ``|``."""
    if len(tokens) == 1:
        return re.escape(tokens[0])
    digits = sorted({int(token) for token in tokens if token.isdigit() and len(token) == 1})
    parts: list[str] = []
    for run in _runs(digits):
        parts.append(str(run[0]) if len(run) == 1 else f"[{run[0]}{'-' if len(run) > 2 else ''}{run[-1]}]")
    parts += [re.escape(token) for token in tokens if not (token.isdigit() and len(token) == 1)]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """Neighbouring numbers together."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _needed(names: list[str], paths: Mapping[str, str], wanted: Sequence[str]) -> list[str]:
    """``names`` without those that the others make redundant."""
    for name in list(names):
        others = [other for other in names if other != name]
        if others and set(selected(paths, others)) == set(wanted):
            names = others
    return names
