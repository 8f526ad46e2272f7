"""A docstring in its pieces: the first line, paragraphs, described names (``Args:``, ``Attributes:``), examples."""

from __future__ import annotations

import doctest
import inspect
import itertools
import re
import textwrap
from dataclasses import dataclass
from typing import Any

SECTION = re.compile(r"^([A-Z][a-z]+):\n((?:    .*(?:\n|$)|\n)+)", re.MULTILINE)
NAMED = re.compile(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*): ", re.MULTILINE)


@dataclass(frozen=True)
class Docstring:
    """The text of a docstring as prose and examples in turn, as the doctests read it.

    >>> text = Docstring.parse("One line.\\n\\nArgs:\\n    x: a number.\\n\\n>>> 1 + 1\\n2\\n")
    >>> text.first, text.described("Args"), text.pieces[1][0].want
    ('One line.', {'x': 'a number.'}, '2\\n')
    """

    pieces: tuple[str | tuple[doctest.Example, ...], ...]

    @classmethod
    def of(cls, value: Any) -> Docstring:
        """The docstring of ``value``, or what it inherits.

        >>> Docstring.of(len).first
        'Return the number of items in a container.'
        """
        return cls.parse(inspect.getdoc(value) or "")

    @classmethod
    def parse(cls, text: str) -> Docstring:
        """The pieces of a docstring's text, which :func:`inspect.cleandoc` has cleaned.

        >>> len(Docstring.parse("A line.\\n\\n>>> x = 1\\n>>> x\\n1\\n\\nAnother.").pieces)
        3
        """
        parsed = [each for each in doctest.DocTestParser().parse(text) if not isinstance(each, str) or each.strip()]
        pieces: list[Any] = []
        for kind, group in itertools.groupby(parsed, type):
            found = tuple(group)
            pieces += found if kind is str else [found]
        return cls(tuple(pieces))

    @property
    def first(self) -> str:
        """The first line, which may go on over the lines of its paragraph."""
        head = self.pieces[0] if self.pieces else ""
        return " ".join(head.strip().partition("\n\n")[0].split()) if isinstance(head, str) else ""

    @property
    def examples(self) -> tuple[doctest.Example, ...]:
        """All examples, in order."""
        return tuple(example for piece in self.pieces if isinstance(piece, tuple) for example in piece)

    def described(self, section: str) -> dict[str, str]:
        """``{name: its description}`` of the section that is called so.

        >>> Docstring.of(fd.LoraConfig).described("Attributes")["lora_r"]
        'the rank r.'
        """
        texts = [piece for piece in self.pieces if isinstance(piece, str)]
        found = [body for text in texts for title, body in SECTION.findall(text) if title == section]
        return {name: text for body in found for name, text in named(body)}


def named(body: str) -> list[tuple[str, str]]:
    """``(name, description)`` of the lines ``a, b: description`` of a section, each with its further lines.

    >>> named("    a, b: both\\n        of them.\\n    c: the third.\\n")
    [('a', 'both of them.'), ('b', 'both of them.'), ('c', 'the third.')]
    """
    _, *parts = NAMED.split(textwrap.dedent(body))
    texts = [" ".join(text.split()) for text in parts[1::2]]
    return [(name, text) for names, text in zip(parts[::2], texts, strict=True) for name in names.split(", ")]


def as_code(examples: tuple[doctest.Example, ...]) -> str:
    """Examples as they were written, with their prompts and what they print.

    >>> as_code(Docstring.parse(">>> for x in [1]:\\n...     print(x)\\n1\\n").examples)
    '>>> for x in [1]:\\n...     print(x)\\n1'
    """
    lines: list[str] = []
    for example in examples:
        first, *more = example.source.rstrip("\n").split("\n")
        lines += [f">>> {first}", *(f"... {line}".rstrip() for line in more), *example.want.splitlines()]
    return "\n".join(lines)
