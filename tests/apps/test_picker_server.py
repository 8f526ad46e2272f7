"""The page's protocol: who is let in, what is counted, and how it ends; over real HTTP where that matters."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
import webbrowser
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import MLP, raises_saying
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import funcdelta as fd
from funcdelta.apps.picker.app import AS_GIVEN, FILES, PAGE, Picking, make_app
from funcdelta.apps.picker.picking import served
from funcdelta.methods.config import METHODS

pytest.importorskip("flask", reason="needs the extra 'web'")
BASE = "http://127.0.0.1:4000"
QUERY = "bert.encoder.layer.{}.attention.self.query"


def bert(layers: int = 4) -> nn.Module:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 10}
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).eval()


class Client:
    """Flask's test client that knows the token."""

    def __init__(self, model: nn.Module, config: fd.BaseDeltaConfig | None = None) -> None:
        self.picking = Picking(model, config)
        self.client = make_app(self.picking).test_client()

    def get(self, name: str = "", **options: Any) -> Any:
        return self.client.get(f"/{self.picking.token}/{name}", base_url=BASE, **options)

    def post(self, name: str, **data: Any) -> Any:
        return self.client.post(f"/{self.picking.token}/{name}", base_url=BASE, json=data)


@pytest.fixture
def client() -> Client:
    return Client(bert())


# ---- who is let in ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/tree", "/page.js", "/x/tree", "/é/", "/{token}x/", "//{token}/"])
def test_without_the_token_nothing_is_served(path: str, client: Client) -> None:
    for method in ("get", "post"):
        answer = getattr(client.client, method)(path.format(token=client.picking.token), base_url=BASE)
        assert answer.status_code == 403
        assert "token" in answer.json["error"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:4000", "192.168.0.1:4000", "0.0.0.0:4000"])
def test_another_host_is_refused(host: str, client: Client) -> None:
    answer = client.get(headers={"Host": host})
    assert answer.status_code == 403
    assert "127.0.0.1" in answer.json["error"]


def test_loopback_hosts_are_served_on_any_port_of_a_tunnel(client: Client) -> None:
    for host in ("127.0.0.1:4000", "localhost:4000", "localhost:9999"):
        assert client.get(headers={"Host": host}).status_code == 200


def test_another_page_is_refused(client: Client) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:1", 403), (BASE, 200)):
        answer = client.client.post(
            f"/{client.picking.token}/count",
            base_url=BASE,
            json={"method": "lora", "paths": []},
            headers={"Origin": origin},
        )
        assert answer.status_code == status, origin


@pytest.mark.parametrize("action", ["count", "usual", "done", "cancel"])
def test_actions_are_posted_as_json(action: str, client: Client) -> None:
    answer = client.get(action)
    assert (answer.status_code, "POST" in answer.headers["Allow"]) == (405, True)
    form = client.client.post(f"/{client.picking.token}/{action}", base_url=BASE, data={"paths": "x", "method": "lora"})
    assert form.status_code == 415
    assert client.post(action).status_code == 400
    assert not client.picking.closed


def test_every_answer_has_the_headers(client: Client) -> None:
    for answer in (client.get(), client.get("page.js"), client.client.get("/", base_url=BASE), client.post("count")):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["X-Frame-Options"] == "DENY"
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"


def test_the_page_comes_from_here_alone(client: Client) -> None:
    for name, (file, kind) in FILES.items():
        answer = client.get(name)
        assert answer.mimetype == kind
        assert answer.data == (PAGE / file).read_bytes()
        assert b"//cdn" not in answer.data
        assert b"http:" not in answer.data
        assert b"https:" not in answer.data
    assert client.get("no.css").status_code == 404


# ---- what it says -------------------------------------------------------------------------------------------------


def test_the_tree_is_folded_and_has_the_real_paths(client: Client) -> None:
    data = client.get("tree").json
    assert data["model"] == "BertForSequenceClassification"
    assert data["root"]["size"] == sum(p.numel() for p in client.picking.model.parameters())
    assert [entry["value"] for entry in data["methods"]] == list(METHODS)
    layers = data["root"]["children"][0]["children"][1]["children"][0]["children"][0]
    assert (layers["name"], layers["paths"]) == ("0-3", [f"bert.encoder.layer.{i}" for i in range(4)])


def test_the_figures_are_those_of_the_delta(client: Client) -> None:
    chosen = [QUERY.format(i) for i in (0, 1, 3)]
    for method in ("lora", "adapter", "bitfit"):
        found = client.post("count", method=method, paths=chosen).json
        delta = fd.DeltaModel(client.picking.model, METHODS[method](modified_modules=chosen))
        trained, _ = fd.partition(delta.init(0), delta.trainable)
        assert (found["sites"], found["error"]) == (len(delta.sites), "")
        assert found["parameters"] == sum(leaf.numel() for leaf in trained.values())
    assert found["names"] == [QUERY.format(i).partition("layer.")[2] for i in (0, 1, 3)]


def test_where_a_method_cannot_act_is_said(client: Client) -> None:
    norms = ["bert.embeddings.LayerNorm", "bert.encoder.layer.0.output.LayerNorm"]
    found = client.post("count", method="lora", paths=[*norms, QUERY.format(0)]).json
    assert [path for path, _ in found["refused"]] == norms
    for words in ("lora cannot act at", norms[0], "LayerNorm", "Linear"):
        assert words in found["error"]
    assert client.post("count", method="adapter", paths=norms).json["sites"] == 2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_counted_or_says_why_not(method: str) -> None:
    client = Client(bert())
    for ends in ("query", "self", "LayerNorm", "encoder", "bert"):
        chosen = [path for path in client.picking.paths if path.endswith(ends)]
        found = client.post("count", method=method, paths=chosen).json
        config = METHODS[method](modified_modules=found["names"])
        if found["error"]:
            with raises_saying(fd.errors.FuncdeltaError, found["error"]):
                fd.DeltaModel(client.picking.model, config)
        else:
            assert found["sites"] == len(fd.DeltaModel(client.picking.model, config).sites)
    usual = client.post("usual", method=method).json
    if "paths" in usual:
        own = fd.DeltaModel(client.picking.model, METHODS[method]())
        found = client.post("count", method=method, paths=usual["paths"]).json
        assert found["parameters"] == sum(math.prod(own.shapes[name]) for name in own.names if own.trainable(name))
    else:
        assert usual["error"]


def test_a_method_of_pairs_acts_beside_every_module(client: Client) -> None:
    chosen = [path for path in client.picking.paths if path.endswith(("query", "value"))]
    found = client.post("count", method="parallel_adapter", paths=chosen).json
    assert (found["sites"], found["names"]) == (8, ["query", "query", "value", "value"])
    words = client.post("usual", method="parallel_adapter").json["error"]
    assert "begin at one module and end at another" in words


def test_a_method_that_breaks_is_not_silent(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, site: fd.Site) -> None:
        raise KeyError("refusal")

    monkeypatch.setattr(fd.LoraConfig, "check", broken)
    answer = client.post("count", method="lora", paths=[QUERY.format(0)])
    assert answer.status_code == 500
    assert "KeyError: 'refusal'" in answer.json["error"]


def test_usual_sites_are_the_methods_own(client: Client) -> None:
    assert client.post("usual", method="lora").json["paths"] == list(fd.LoraModel(client.picking.model).sites)
    unknown = Client(MLP()).post("usual", method="lora").json
    assert "MLP" in unknown["error"]
    assert "paths" not in unknown


def test_a_given_config_is_offered_first() -> None:
    config = fd.LoraConfig(lora_r=3, unfrozen_modules=["deltas", "classifier"])
    client = Client(bert(), config)
    assert client.get("tree").json["methods"][0] == {"value": AS_GIVEN, "label": "lora (as given)"}
    found = client.post("count", method=AS_GIVEN, paths=[QUERY.format(0)]).json
    assert found["parameters"] == 3 * (8 + 8) + 2 * 8 + 2
    assert Client(bert()).post("count", method=AS_GIVEN, paths=[]).status_code == 400


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"paths": ["bert.nothing"]}, "bert.nothing"),
        ({"paths": [3]}, "3"),
        ({"paths": "bert"}, "'paths', a list"),
        ({"paths": []}, "Nothing is selected"),
        ({}, "'paths'"),
    ],
)
def test_a_wrong_answer_is_not_taken(data: dict[str, Any], words: str, client: Client) -> None:
    answer = client.post("done", **data)
    assert answer.status_code == 400
    assert words in answer.json["error"]
    assert not client.picking.closed


def test_the_answer_is_taken_once(client: Client) -> None:
    first = client.post("done", paths=[QUERY.format(2), QUERY.format(0)])
    assert (first.status_code, first.json) == (200, {"count": 2})
    first.close()
    assert client.picking.ended.is_set()
    for answer in (client.post("done", paths=[QUERY.format(1)]), client.post("cancel", cancel=True), client.get()):
        assert answer.status_code == 410
    assert client.picking.answer == [QUERY.format(0), QUERY.format(2)]


# ---- real HTTP on the loopback address ----------------------------------------------------------------------------


def send(address: str, action: str, **data: Any) -> Any:
    request = urllib.request.Request(address + action, json.dumps(data).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_pick_gives_what_was_picked_and_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    model = bert()
    before, threads = snapshot(model), threading.active_count()
    addresses: list[str] = []

    def click(address: str) -> None:
        addresses.append(address)
        with urllib.request.urlopen(address) as page:
            assert b"<title>" in page.read()
        assert send(address, "count", method="bitfit", paths=[QUERY.format(0)])["sites"] == 1
        send(address, "done", paths=[QUERY.format(3), QUERY.format(1)])

    assert fd.pick(model, open_browser=click) == [QUERY.format(1), QUERY.format(3)]
    assert addresses[0] in capsys.readouterr().out
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(addresses[0])
    assert threading.active_count() == threads
    assert_unchanged(model, before)
    names = fd.pick(
        model, open_browser=lambda a: send(a, "done", paths=[QUERY.format(i) for i in range(4)]), compact=True
    )
    assert names == ["query"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads Linux's list of sockets")
def test_a_page_that_is_gone_before_it_is_told_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    # The server never comes to the end of a response whose connection was reset.
    monkeypatch.setattr("funcdelta.apps.picker.app._last", lambda picking, response: response)

    def act(address: str) -> None:
        body = json.dumps({"paths": ["a"]}).encode()
        headers = {"Content-Type": "application/json"}
        urllib.request.urlopen(urllib.request.Request(address + "done", body, headers)).close()

    assert fd.pick(MLP(), open_browser=act, timeout=20) == ["a"]


def test_the_server_listens_on_the_loopback_address_alone() -> None:
    picking = Picking(MLP())
    with served(picking) as address:
        port = int(address.split(":")[2].split("/")[0])
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        assert [row[1] for row in rows if row[1].endswith(f":{port:04X}") and row[3] == "0A"] == [
            f"0100007F:{port:04X}"
        ]
        for path, status in (("", 403), ("x/", 403), (f"{picking.token}/done", 405), (f"{picking.token}/no", 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}")
            assert caught.value.code == status
            caught.value.close()


def test_cancel_timeout_and_a_browser_that_fails_raise() -> None:
    with raises_saying(fd.errors.PickError, "cancelled on the page"):
        fd.pick(MLP(), open_browser=lambda address: send(address, "cancel", cancel=True))
    with raises_saying(fd.errors.PickError, "within 0.05 s", "timeout=None"):
        fd.pick(MLP(), open_browser=False, timeout=0.05)
    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        fd.pick(MLP(), open_browser=lambda address: 1 / 0)
    assert threading.active_count() == threads


def test_ctrl_c_closes_the_server() -> None:
    threads = threading.active_count()
    # What a shell starts in the background ignores the signal, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fd.pick(MLP(), open_browser=lambda address: os.kill(os.getpid(), signal.SIGINT), timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert threading.active_count() == threads


def test_a_port_in_use_is_said_and_can_be_used_again() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with raises_saying(fd.errors.PickError, f"Port {port} of 127.0.0.1 is in use", "port=0"):
            fd.pick(MLP(), port=port, open_browser=False)
    for _ in range(2):
        assert fd.pick(MLP(), port=port, open_browser=lambda a: send(a, "done", paths=["a"])) == ["a"]


@pytest.mark.parametrize("port", [-1, 70000, "8888", True, None, 1.5])
def test_a_port_that_is_none(port: Any) -> None:
    with raises_saying(fd.errors.ConfigError, f"port={port!r}", "65535"):
        fd.pick(MLP(), port=port, open_browser=False)


def test_models_that_nothing_can_be_picked_from() -> None:
    with raises_saying(fd.errors.ConfigError, "str", "nn.Module"):
        fd.pick("bert-base")  # pyright: ignore[reportArgumentType]
    with raises_saying(fd.errors.ConfigError, "Linear", "no modules inside"):
        fd.pick(nn.Linear(2, 2))


def test_without_the_library_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "flask" else find(name))
    with raises_saying(fd.errors.PickError, "Flask", 'pip install "funcdelta[web]"'):
        fd.pick(MLP(), open_browser=False)


def test_only_a_graphical_browser_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser.BackgroundBrowser, "open", lambda self, address: opened.append(address))
    monkeypatch.setattr(webbrowser.GenericBrowser, "open", lambda self, address: pytest.fail("it takes the terminal"))

    def none() -> Any:
        raise webbrowser.Error("could not locate runnable browser")

    for browser in (none, lambda: webbrowser.GenericBrowser("lynx"), lambda: webbrowser.BackgroundBrowser("firefox")):
        monkeypatch.setattr(webbrowser, "get", browser)
        with raises_saying(fd.errors.PickError, "within"):
            fd.pick(MLP(), timeout=0.02)
    assert len(opened) == 1
    assert opened[0].startswith("http://127.0.0.1:")


# ---- interactive_modify -------------------------------------------------------------------------------------------


def answering(monkeypatch: pytest.MonkeyPatch, paths: list[str]) -> list[str]:
    """Whoever waits for an address to be printed answers with ``paths``; the addresses."""
    addresses: list[str] = []

    def say(text: str, **options: Any) -> None:
        addresses.append(text.split(" at ")[1].split(" ")[0])
        send(addresses[-1], "done", paths=paths)

    monkeypatch.setattr("webbrowser.get", lambda: type("None", (), {"open": lambda self, address: None})())
    monkeypatch.setattr(builtins, "print", say)
    return addresses


def test_interactive_modify_sets_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    picked = [QUERY.format(i) for i in range(4)]
    addresses = answering(monkeypatch, picked)
    delta = fd.LoraModel(bert(), lora_r=3, unfrozen_modules=["deltas", "classifier"], interactive_modify=True)
    assert list(delta.sites) == picked
    assert delta.configs[0] == fd.LoraConfig(
        lora_r=3, unfrozen_modules=["deltas", "classifier"], modified_modules=["query"]
    )
    params = delta.init(0)
    with torch.no_grad():
        assert delta.apply(params, input_ids=torch.ones(1, 3, dtype=torch.long)).logits.shape == (1, 2)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fd.AdapterModel(bert(), interactive_modify=port)
    assert f":{port}/" in addresses[-1]


@pytest.mark.parametrize("given", [{"modified_modules": ["a"]}, {"exclude_modules": ["a"]}])
def test_interactive_modify_beside_names_raises(given: dict[str, Any]) -> None:
    with raises_saying(fd.errors.ConfigError, "interactive_modify", next(iter(given)), "['a']", "one of the two"):
        fd.LoraModel(MLP(), interactive_modify=8888, **given)
    with raises_saying(ValueError, "common_structure"):
        fd.LoraModel(MLP(), interactive_modify=True, common_structure=True)
