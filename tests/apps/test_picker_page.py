"""The page in a real browser: by mouse, by keyboard, and as it is told to a screen reader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from chromium import Page, chromium
from handmade import MLP, raises_saying
from test_picker_server import QUERY, bert
from torch import nn

import funcdelta as fd
from funcdelta.methods.config import METHODS

pytestmark = pytest.mark.slow
pytest.importorskip("flask", reason="needs the extra 'web'")


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture
def picked(driver: Any) -> Callable[..., list[str]]:
    """``picked(model, act)``: what ``fd.pick`` gives while ``act(page)`` works on the page."""

    def pick(model: nn.Module, act: Callable[[Page], None], **options: Any) -> list[str]:
        names = fd.pick(model, open_browser=lambda address: act(Page(driver, address)), timeout=60, **options)
        # Whatever the page did, it broke no rule of its own policy and raised nothing.
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        return names

    return pick


def test_a_folded_row_selects_all_its_real_modules(picked: Callable[..., list[str]]) -> None:
    model = bert()
    expected = [f"bert.encoder.layer.{i}.attention.self.{n}" for i in range(4) for n in ("query", "key", "value")]

    def act(page: Page) -> None:
        page.method("lora")
        page.click_row("query,key,value")
        assert page.row("query,key,value")["selected"] == "true"
        delta = fd.LoraModel(model, modified_modules=expected)
        count = sum(math.prod(shape) for name, shape in delta.shapes.items() if delta.trainable(name))
        assert page.figures() == ("12", f"{count:,}")
        assert page.text("status") == f"12 sites, {count:,} parameters"
        assert page.text("text") == 'modified_modules=["query", "key", "value"]'
        page.done()
        assert page.text("ended") == "12 modules handed back"

    assert picked(model, act) == expected


def test_unfolding_gives_the_members_and_folding_takes_them_back(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        page.click_row("0-3", ".fold")
        assert [name for name in page.names() if name.isdigit()] == ["0", "1", "2", "3"]
        page.click_row("1", ".twist")
        page.click_row("attention", ".twist")
        page.click_row("self", ".twist")
        page.click_row("query,key,value", ".fold")
        page.click_row("query")
        assert page.row("query")["label"] == "query, Linear, 72 parameters"
        page.click_row("2")
        page.click_row("1", ".fold")
        assert page.row("0-3")["selected"] == "false"
        assert "1 selected" in page.row("0-3")["label"]
        page.done()

    assert picked(bert(), act) == ["bert.encoder.layer.1.attention.self.query", "bert.encoder.layer.2"]


def test_a_fold_that_is_not_contiguous_selects_the_real_modules(picked: Callable[..., list[str]]) -> None:
    model = bert(8)
    model.get_submodule("bert.encoder.layer")[3] = nn.Linear(8, 8)  # pyright: ignore[reportIndexIssue]

    def act(page: Page) -> None:
        page.click_row("0-2,4-7")
        page.figures()
        assert page.text("text") == r'modified_modules=[r"[r]layer\.(?:[0-2]|[4-7])"]'
        page.done()

    assert picked(model, act) == [f"bert.encoder.layer.{i}" for i in (0, 1, 2, 4, 5, 6, 7)]


def test_everything_by_keyboard(picked: Callable[..., list[str]]) -> None:
    up, down, left, right, home, end = "\ue013", "\ue015", "\ue012", "\ue014", "\ue011", "\ue010"
    tab, enter = "\ue004", "\ue007"

    def act(page: Page) -> None:
        for _ in range(20):
            if page.focused:
                break
            page.keys(tab)
        assert page.focused == "bert"
        page.keys(end)
        assert page.focused == page.names()[-1] == "classifier"
        page.keys(home, left)
        assert (page.names(), page.row("bert")["expanded"]) == (["bert", "classifier"], "false")
        page.keys(right)
        assert page.row("bert")["expanded"] == "true"
        page.keys(right, down)
        assert page.focused == page.names()[2]
        page.keys(up, left)
        assert (page.focused, page.row("embeddings")["expanded"]) == ("embeddings", "false")
        page.keys(left)
        assert page.focused == "bert"
        page.keys("q")
        assert page.focused == "query,key,value"
        page.keys("+")
        assert page.focused == "query"
        page.keys(" ", down, down, enter)
        assert [page.row(name)["selected"] for name in ("query", "key", "value")] == ["true", "false", "true"]
        page.keys("-")
        assert page.focused == "query,key,value"
        assert "8 selected" in page.row("query,key,value")["label"]
        page.keys("\ue009z")  # control
        page.figures()
        page.keys("+", " ")
        assert page.focused == "query"
        page.keys(" ")
        assert page.row("query")["selected"] == "true"
        page.done()
        assert page.run("return document.activeElement.id") == "end"

    assert picked(bert(), act) == [QUERY.format(i) for i in range(4)]


def test_what_a_screen_reader_is_told(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        page.click_row("query,key,value")
        page.click_row("0-3", ".twist")
        rows = page.rows()
        assert [row["tabindex"] for row in rows].count(0) == 1
        assert rows[0]["parent"] == "tree"
        assert {row["parent"] for row in rows[1:-1]} == {"group"}
        assert all(row["selected"] in ("true", "false") for row in rows)
        assert [row["level"] for row in rows[:3]] == [1, 2, 3]
        assert [row["place"] for row in rows if row["level"] == 1] == [[1, 2], [2, 2]]
        layer = page.row("0-3")
        assert layer["expanded"] == "false"
        for words in ("0-3", "BertLayer", "4 modules", "12 selected inside", "folded"):
            assert words in layer["label"]
        assert page.row("word_embeddings")["expanded"] is None
        assert page.run("return document.getElementById('tree').getAttribute('aria-multiselectable')") == "true"
        unnamed = page.run(
            "return [...document.querySelectorAll('button, input, select')].filter(e => !e.closest('[aria-hidden]') &&"
            " !(e.textContent.trim() || e.labels?.length || e.ariaLabel)).map(e => e.id)"
        )
        assert unnamed == []
        # The focus of a row that was reached by a key can be seen.
        page.keys("\ue015")
        assert page.run("return getComputedStyle(document.activeElement.firstChild).boxShadow") != "none"
        page.run("document.querySelector('#tree > li:last-child').click()")  # as a screen reader does
        assert page.focused == "classifier"
        page.done()

    assert len(picked(bert(), act)) == 13


def test_a_method_that_cannot_act_says_why_and_takes_them_out(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        page.method("lora")
        page.click_row("query,key,value")
        page.click_row("LayerNorm")
        assert page.figures() == ("–", "–")
        for words in ("lora cannot act at bert.embeddings.LayerNorm", "not LayerNorm"):
            assert words in page.text("reason")
        assert page.row("LayerNorm")["refused"]
        page.method("bitfit")
        assert page.figures()[0] == "13"
        assert not page.row("LayerNorm")["refused"]
        page.method("lora")
        page.figures()
        page.click("remove")
        assert page.figures()[0] == "12"
        assert page.row("LayerNorm")["selected"] == "false"
        page.click("undo")
        assert page.figures() == ("–", "–")
        page.click("clear")
        assert page.figures() == ("0", "0")
        assert page.run("return document.getElementById('done').disabled")
        page.click("usual")
        assert page.figures()[0] == "8"
        page.done()

    assert picked(bert(), act, compact=True) == ["query", "value"]


def test_every_method_can_be_chosen_and_the_given_config_comes_first(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        options = page.run("return [...document.getElementById('method').options].map(o => o.label)")
        assert options == ["lora (as given)", *METHODS]
        page.click_row("a")
        assert page.figures() == ("1", "36")
        # A double click is one answer; a second one would be refused, which the browser logs.
        page.run("document.getElementById('done').click(), document.getElementById('done').click()")
        page.until(lambda: page.text("ended"))

    assert picked(MLP(), act, config=fd.LoraConfig(lora_r=3)) == ["a"]


def test_the_filter_finds_and_selects(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        page.keys("/")
        page.keys("LayerNorm")
        page.until(lambda: "word_embeddings" not in page.names())
        assert page.names().count("LayerNorm") == 3
        page.click("matches")
        assert page.figures()[0] in ("9", "–")
        page.click("clear")
        filter = page.driver.find_element("id", "filter")
        filter.clear()
        filter.send_keys("layer.2.att")
        page.until(lambda: "LayerNorm" not in page.names())
        page.click("matches")
        page.figures()
        filter.clear()
        filter.send_keys("no such thing")
        page.until(lambda: not page.names())
        assert "No module" in page.text("nothing")
        filter.clear()
        filter.send_keys("w")
        page.done()

    assert picked(bert(), act) == ["bert.encoder.layer.2.attention"]


def test_modules_without_parameters_are_shown_on_request(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        assert page.names() == ["0", "2"]
        page.click("bare")
        assert page.names() == ["0", "1", "2"]
        page.click_row("1")
        page.done()

    assert picked(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), act) == ["1"]


def test_the_text_is_copied(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        page.driver.execute_cdp_cmd(
            "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
        )
        page.click_row("a")
        page.figures()
        page.click("copy")
        page.until(lambda: page.text("copy") == "Copied")
        read = "navigator.clipboard.readText().then(arguments[0])"
        assert page.driver.execute_async_script(read) == 'modified_modules=["a"]'
        page.done()

    picked(MLP(), act)


def test_it_is_dark_in_the_dark_and_fits_a_phone(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        background = "return getComputedStyle(document.body).backgroundColor"
        light = page.run(background)
        dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
        assert page.run(background) != light
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
        phone = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        page.click_row("bert")
        page.done()
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    assert picked(bert(), act) == ["bert"]


def test_everything_comes_from_this_server(picked: Callable[..., list[str]]) -> None:
    def act(page: Page) -> None:
        page.click_row("a")
        page.figures()
        loaded = page.run("return performance.getEntriesByType('resource').map(e => e.name)")
        address = page.driver.current_url
        assert len(loaded) >= 4
        assert all(name.startswith(address) for name in loaded)
        page.done()

    picked(MLP(), act)


def test_cancelling_raises_and_a_page_left_over_says_so(driver: Any) -> None:
    def act(address: str) -> None:
        page = Page(driver, address)
        page.click_row("a")
        page.click("cancel")
        page.until(lambda: page.text("ended") == "Cancelled")

    with raises_saying(fd.errors.PickError, "cancelled on the page"):
        fd.pick(MLP(), open_browser=act, timeout=60)
    left: list[Page] = []
    with raises_saying(fd.errors.PickError, "within 0.1 s"):
        fd.pick(MLP(), open_browser=lambda address: left.append(Page(driver, address)), timeout=0.1)
    left[0].click_row("a")
    left[0].until(lambda: "no longer listening" in left[0].text("reason"))
    driver.get_log("browser")
