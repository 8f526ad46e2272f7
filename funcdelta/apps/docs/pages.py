"""The pages: an index, and a page a namespace with an entry a name."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import funcdelta as fd

from .docstring import SECTION, Docstring, as_code, named
from .markdown import Links, code, table
from .public import everything, fields_of, function_of, members_of, names_of
from .signature import default_of, signature_of, type_of

INDEX = "index.md"
TABLES = ("Args", "Attributes")
"""Sections that are shown as a table, with types and defaults."""


def pages() -> dict[str, str]:
    """``{file name: Markdown}`` of the whole reference.

    >>> sorted(pages())[:3]
    ['algebra.md', 'distributed.md', 'errors.md']
    """
    spaces = {"fd": fd} | {path: value for path, value in everything() if isinstance(value, ModuleType)}
    known = links()
    found = {file_of(path): page(path, space, known) for path, space in spaces.items()}
    rows = [(f"[`{path}`]({file_of(path)})", known.text(Docstring.of(space).first)) for path, space in spaces.items()]
    return {INDEX: f"# Reference\n\n{table(('namespace', 'what it holds'), rows)}\n"} | found


def file_of(space: str) -> str:
    """The page of a namespace.

    >>> file_of("fd"), file_of("fd.recipes.soups")
    ('funcdelta.md', 'recipes.soups.md')
    """
    return "funcdelta.md" if space == "fd" else f"{space.removeprefix('fd.')}.md"


def links() -> Links:
    """Where every public name has its entry, and every namespace its page.

    >>> links().where["fd.optim.adamw"], links().where["fd.grad.value_and_grad"]
    ('optim.md#fd.optim.adamw', 'funcdelta.md#fd.value_and_grad')
    """
    where: dict[str, str] = {}
    first: dict[int, str] = {}
    for path, value in sorted(everything(), key=lambda each: each[0].count(".")):
        if isinstance(value, ModuleType):
            where[path] = file_of(path)
            continue
        # A name that is at the top, too, has its entry there.
        home = first.setdefault(id(value), path)
        where[path] = f"{file_of(home.rpartition('.')[0])}#{home}"
        for name, _ in members_of(value) if inspect.isclass(value) else ():
            where[f"{path}.{name}"] = f"{file_of(home.rpartition('.')[0])}#{home}.{name}"
    return Links(where)


def page(path: str, space: ModuleType, known: Links) -> str:
    """The page of one namespace: what it is, a table of its names, and their entries.

    >>> page("fd.metrics", fd.metrics, links()).splitlines()[0]
    '# fd.metrics'
    """
    names = [(f"{path}.{name}", getattr(space, name)) for name in names_of(space)]
    rows = [(f"[`{name}`]({known.where[name]})", known.text(Docstring.of(value).first, path)) for name, value in names]
    about = "\n\n".join(_blocks(Docstring.of(space), path, known))
    entries = [entry(name, value, known) for name, value in names if known.where[name].endswith(f"#{name}")]
    return "\n\n".join([f"# {path}", about, table(("name", "what it is"), rows), *entries]) + "\n"


def told(path: str, known: Links) -> str:
    """The page of a namespace, or the entry of a name or of a method.

    >>> told("fd.DeltaModel.apply", links()).splitlines()[2]
    '### fd.DeltaModel.apply'
    """
    above, value = None, fd
    for name in path.split(".")[1:]:
        above, value = value, getattr(value, name)
    if isinstance(value, ModuleType):
        return page(path, value, known)
    if inspect.isclass(above):
        return "\n\n".join(_head(3, path, value, path.rsplit(".", 2)[0], known))
    return entry(path, value, known)


def entry(path: str, value: Any, known: Links) -> str:
    """What is said of one name: its signature, docstring, fields or arguments, examples, and methods.

    >>> print(entry("fd.tree.add", fd.tree.add, links()).splitlines()[2])
    ## fd.tree.add
    """
    members = members_of(value) if inspect.isclass(value) else ()
    below = (_head(3, f"{path}.{name}", member, path, known) for name, member in members)
    return "\n\n".join([*_head(2, path, value, path, known), *itertools.chain.from_iterable(below)])


def _head(level: int, path: str, value: Any, space: str, known: Links) -> Iterator[str]:
    yield f'<a id="{path}"></a>'
    yield f"{'#' * level} {path}"
    yield code(signature_of(path, value), "python")
    above = [known.to(path) for path, other in everything() if other in getattr(value, "__bases__", ())]
    if above:
        yield f"Built on {', '.join(dict.fromkeys(above))}."
    text = Docstring.of(value)
    yield from _blocks(text, space, known)
    described = {name: about for section in TABLES for name, about in text.described(section).items()}
    if inspect.isclass(value) and (fields := fields_of(value)):
        types = vars(value)["__annotations__"]
        given = {name: (types[name], default) for name, default in fields.items()}
    else:
        parameters = inspect.signature(function_of(value) or value).parameters if described else {}
        given = {name: (each.annotation, each.default) for name, each in parameters.items() if name in described}
    if given:
        shown = {name: (type_of(kind), default_of(default)) for name, (kind, default) in given.items()}
        cells = [
            (f"`{name}`", f"`{kind}`", f"`{default}`" if default else "", known.text(described.get(name, ""), space))
            for name, (kind, default) in shown.items()
        ]
        yield table(("name", "type", "default", "what it is"), cells)


def _blocks(text: Docstring, space: str, known: Links) -> Iterator[str]:
    for piece in text.pieces:
        if not isinstance(piece, str):
            yield code(as_code(piece), "pycon")
        elif prose := SECTION.sub(_section, piece).strip("\n"):
            yield known.text(re.sub(r"\n{3,}", "\n\n", prose), space)


def _section(found: re.Match[str]) -> str:
    """A section as a list; nothing of those that have a table of their own."""
    lines = [f"- {name}: {text}" for name, text in named(found[2])]
    return "" if found[1] in TABLES else "\n".join([f"{found[1]}:\n", *lines, ""])
