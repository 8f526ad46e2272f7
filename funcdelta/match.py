"""Matches names to modules: whole-token suffixes, ``[r]`` regular expressions, and near names for errors.

The rules are OpenDelta's (its ``find_key`` and ``endswith_in``), with one difference: a name that matches nothing is
an error that lists the nearest names, never an empty selection.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from .errors import MatchError, shown

REGEX_PREFIX = "[r]"


def matches(key: str, target: str) -> bool:
    """Whether ``target`` matches the end of ``key``: as a whole-token suffix, or as ``[r]pattern``.

    A suffix starts at a token: ``attention.query`` matches ``layer.0.attention.query`` but not
    ``layer.0.cross_attention.query``. A pattern is searched once, from the left; its match must start at a token and
    reach to the end of the key.

    >>> matches("layer.0.attention.query", "attention.query"), matches("layer.10.attention", "0.attention")
    (True, False)
    >>> matches("layer.10.attention", r"[r][0-5]\\.attention"), matches("layer.3.attention", r"[r][0-5]\\.attention")
    (False, True)
    """
    if target.startswith(REGEX_PREFIX):
        try:
            found = re.search(target[len(REGEX_PREFIX) :], key)
        except re.error as error:
            raise MatchError(f"{target!r} is not a regular expression after {REGEX_PREFIX!r}: {error}.") from error
        if found is None or found.end() != len(key):
            return False
        start = found.start()
    else:
        if not target or not key.endswith(target):
            return False
        start = len(key) - len(target)
    return start == 0 or key[start - 1] == "."


def exactly(name: str) -> str:
    """The target that means ``name`` alone, and nothing that only ends like it.

    >>> exactly("classifier.weight")
    '[r]^classifier\\\\.weight$'
    """
    return f"{REGEX_PREFIX}^{re.escape(name)}$"


def explicit(paths: Iterable[str], known: Sequence[str]) -> tuple[str, ...]:
    """Targets that mean exactly these of the ``known`` names: themselves, or fixed at both ends if another ends alike.

    >>> explicit(["a", "b.a"], ["a", "b", "b.a"])
    ('[r]^a$', 'b.a')
    """
    return tuple(exactly(path) if sum(matches(other, path) for other in known) != 1 else path for path in paths)


def find_key(key: str, targets: str | Iterable[str]) -> bool:
    """Whether any of ``targets`` matches the dotted name ``key`` (whole-token suffix or ``[r]regex``).

    >>> find_key("encoder.layer.1.output.dense", ["query", "output.dense"])
    True
    >>> find_key("encoder.layer.1.output.dense", "put.dense")
    False
    """
    return any(matches(key, target) for target in as_names(targets))


def within(key: str, prefix: str) -> bool:
    """Whether ``key`` is ``prefix`` or below it, compared token by token.

    >>> within("layer.1.output", "layer.1"), within("layer.10.output", "layer.1"), within("layer", "")
    (True, False, True)
    """
    return not prefix or key == prefix or key.startswith(prefix + ".")


def below(path: str, name: str) -> str:
    """The dotted name of ``name`` in the module at ``path``; the model itself is at ``""``.

    >>> below("layer.1", "weight"), below("", "weight")
    ('layer.1.weight', 'weight')
    """
    return f"{path}.{name}" if path else name


def find_module(root: nn.Module, key: str) -> tuple[nn.Module, str, nn.Module]:
    """The parent, the child's name and the child at the dotted path ``key`` of ``root``.

    >>> root = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    >>> parent, name, child = find_module(root, "0.0")
    >>> parent is root[0], name, child
    (True, '0', Linear(in_features=2, out_features=3, bias=True))
    """
    parent_path, _, name = key.rpartition(".")
    names = [path for path, _ in root.named_modules() if path]
    if not key or key not in names:
        raise MatchError(f"There is no module {key!r} in {type(root).__name__}.{near(key, names)}")
    return root.get_submodule(parent_path), name, root.get_submodule(key)


def as_names(names: str | Iterable[str]) -> tuple[str, ...]:
    """``names`` as a tuple; a single string counts as one name.

    >>> as_names("query"), as_names(["query", "value"])
    (('query',), ('query', 'value'))
    """
    if isinstance(names, str):
        return (names,)
    # Tensors are iterable, too, or raise on iteration.
    found = tuple(names) if isinstance(names, Iterable) and not isinstance(names, Tensor) else (None,)
    if not all(isinstance(name, str) for name in found):
        raise MatchError(f"Expected a name or a list of names; found {shown(names)}.")
    return found  # pyright: ignore[reportReturnType]


def near(name: str, names: Sequence[str], most: int = 5) -> str:
    """A sentence with the names most similar to ``name``, for the end of an error message.

    Whole dotted names and their last tokens are compared, because people misspell the last token.

    >>> near("qurey", ["layer.0.query", "layer.0.value"])
    ' Near names: query (layer.0.query).'
    >>> near("zzz", [])
    ''
    """
    last_tokens: dict[str, str] = {}
    for path in names:
        last_tokens.setdefault(path.rpartition(".")[2], path)
    wanted = name.removeprefix(REGEX_PREFIX)
    close = difflib.get_close_matches(wanted.rpartition(".")[2], list(last_tokens), n=most, cutoff=0.6)
    found = [f"{token} ({last_tokens[token]})" for token in close]
    if "." in wanted and len(found) < most:
        found += difflib.get_close_matches(wanted, list(names), n=most - len(found), cutoff=0.7)
    if found:
        return f" Near names: {', '.join(dict.fromkeys(found))}."
    words = [token for token in last_tokens if not token.isdigit()]
    return f" There are: {', '.join(words[:12])}{', …' if len(words) > 12 else ''}." if words else ""
