"""A fixed split of labelled texts: stratified, and decided by the texts alone, not by a generator or row order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from ...match import near
from .data import Texts
from .errors import JobError

VALIDATION, TEST = 200, 400
"""How many texts are set aside at most."""
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2
"""The share of the texts that is set aside where the data is small."""


@dataclass(frozen=True)
class Split:
    """Three parts of labelled texts, and the classes of the training part.

    >>> rows = Texts(tuple(f"text {i}" for i in range(40)), ("a", "b") * 20)
    >>> parts = split(rows)
    >>> len(parts.train), len(parts.validation), len(parts.test), parts.classes
    (28, 4, 8, ('a', 'b'))
    """

    train: Texts
    validation: Texts
    test: Texts
    repeated: int = 0
    """How many rows were left out because their text had come before."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that are learnt, in alphabetical order."""
        return self.train.classes

    def numbers(self, part: Texts) -> list[int]:
        """The class numbers of the labels of ``part``.

        >>> rows = Texts(tuple("abcdef"), ("x", "y") * 3)
        >>> split(rows).numbers(Texts(("g",), ("y",)))
        [1]
        """
        places = {label: number for number, label in enumerate(self.classes)}
        return [places[label] for label in part.labels]

    def digest(self) -> str:
        """One sha256 for all three parts in their order.

        >>> rows = Texts(tuple("abcdef"), ("x", "y") * 3)
        >>> len(split(rows).digest())
        64
        """
        parts = [self.train.digest(), self.validation.digest(), self.test.digest()]
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def split(data: Texts, test: Texts | None = None) -> Split:
    """Train, validation and test parts of ``data``; with ``test`` given, only validation is set aside.

    In every class, the texts with the smallest sha256 are set aside, so that the split does not depend on the order of
    the rows and hardly changes with a new row. Repeated texts are dropped first, as are training texts that are also in
    ``test``. Raises `JobError` if there is only one class, if a class is too small to be in every part, and if a label
    of ``test`` occurs in no training text.

    >>> rows = Texts(tuple("abcdef"), ("x", "y") * 3)
    >>> backwards = rows.take(reversed(range(6)))
    >>> split(rows).test == split(backwards).test
    True
    """
    given = len(data) + (len(test) if test else 0)
    if test is not None:
        test = test.distinct()
    data = data.distinct(seen=test.texts if test else ())
    _check_classes(data, parts=2 if test else 3)
    order = sorted(range(len(data)), key=lambda row: hashlib.sha256(data.texts[row].encode()).digest())
    wanted = {"validation": min(VALIDATION, round(VALIDATION_SHARE * len(data)))}
    if test is None:
        wanted = {"test": min(TEST, round(TEST_SHARE * len(data)))} | wanted
    rows: dict[str, list[int]] = {"test": [], "validation": []}
    sizes = _sizes(data, order)
    for part, total in wanted.items():
        # At least one text of every class is left for each part still to come.
        left = apportion(sizes, total)
        taken = []
        for row in order:
            if left[data.labels[row]]:
                left[data.labels[row]] -= 1
                taken.append(row)
        rows[part] = taken
        order = [row for row in order if row not in set(taken)]
        sizes = _sizes(data, order)
    found = test if test is not None else data.take(rows["test"])
    parts = Split(data.take(sorted(order)), data.take(rows["validation"]), found)
    _check_labels(parts)
    return Split(parts.train, parts.validation, parts.test, repeated=given - sum(map(len, _parts(parts))))


def apportion(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` shared out among classes in proportion to ``sizes``, by largest remainders, at least one each.

    >>> apportion({"a": 60, "b": 30, "c": 10}, 10)
    {'a': 6, 'b': 3, 'c': 1}
    >>> apportion({"a": 98, "b": 2}, 10)
    {'a': 9, 'b': 1}
    """
    total = max(total, len(sizes))
    everything = sum(sizes.values())
    exact = {name: size * total / everything for name, size in sizes.items()}
    shares = {name: max(1, int(value)) for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: (shares[name] - exact[name], name))
    for name in by_remainder[: max(0, total - sum(shares.values()))]:
        shares[name] += 1
    while sum(shares.values()) > total:
        # The largest classes make up for those that were raised to one.
        shares[max(shares, key=lambda name: (shares[name], name))] -= 1
    return shares


def _sizes(data: Texts, rows: list[int]) -> dict[str, int]:
    sizes = dict.fromkeys(data.classes, 0)
    for row in rows:
        sizes[data.labels[row]] += 1
    return sizes


def _parts(parts: Split) -> tuple[Texts, Texts, Texts]:
    return parts.train, parts.validation, parts.test


def _check_classes(data: Texts, parts: int) -> None:
    sizes = _sizes(data, list(range(len(data))))
    if not sizes:
        raise JobError("No training text is left: every text of --data is also in --test-data.")
    if len(sizes) < 2:
        raise JobError(f"The data has one label ({', '.join(sizes)}): a classifier needs at least two.")
    small = [name for name, size in sizes.items() if size < parts]
    if small:
        raise JobError(
            f"Label {small[0]!r} has {sizes[small[0]]} different texts: every label needs at least {parts}, one for "
            f"each part. Is --label the right column? There are {len(sizes)} labels for {len(data)} texts."
        )


def _check_labels(parts: Split) -> None:
    for part in (parts.validation, parts.test):
        for row, label in enumerate(part.labels):
            if label not in parts.classes:
                raise JobError(
                    f"Unknown label {label!r} of the test text {part.texts[row][:40]!r}: no training text has it."
                    f"{near(label, parts.classes)}"
                )
