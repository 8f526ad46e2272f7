"""Short names match exactly what was chosen, whatever was chosen: checked by what a delta makes of them."""

from __future__ import annotations

import random
import re

import pytest
from handmade import MLP, Layers, raises_saying
from torch import nn
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

import funcdelta as fd
from funcdelta.apps.picker.choice import pasted
from funcdelta.apps.picker.naming import exact_names, paths_of, selected, short_names


def bert(layers: int = 12) -> nn.Module:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 10}
    return BertModel(BertConfig(num_hidden_layers=layers, **sizes))


BERT = bert()
PATHS = paths_of(BERT)


def chosen_by(pattern: str) -> list[str]:
    return [path for path in PATHS if re.search(pattern, path)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        (r"query$", ["query"]),
        (r"(query|value)$", ["query", "value"]),
        (r"attention\.output\.dense$", ["attention.output.dense"]),
        (r"attention\.output$", ["attention.output"]),
        (r"^encoder\.layer\.1$", ["layer.1"]),
        (r"layer\.[01]\..*query$", ["0.attention.self.query", "1.attention.self.query"]),
        (r"\d\.output\.dense$", [r"[r]layer\.(?:[0-9]|10|11)\.output\.dense"]),
        (r"layer\.([0-2]|[4-7])$", [r"[r]layer\.(?:[0-2]|[4-7])"]),
        (r"layer\.(8|9|10)\..*(query|key)$", [r"[r]layer\.(?:[89]|10)\.attention\.self\.(?:query|key)"]),
        (r"value$|layer\.[0-5]\..*query$", [r"[r]layer\.[0-5]\.attention\.self\.query", "value"]),
    ],
)
def test_the_names_are_the_ones_that_a_person_would_write(pattern: str, names: list[str]) -> None:
    assert short_names(PATHS, chosen_by(pattern)) == names


@pytest.mark.parametrize("seed", range(40))
def test_any_choice_is_named_exactly(seed: int) -> None:
    draw = random.Random(seed)
    chosen = draw.sample(list(PATHS), draw.randint(1, 40))
    for names in (short_names(PATHS, chosen), exact_names(PATHS, chosen)):
        assert set(selected(PATHS, names)) == set(chosen)
    assert len(short_names(PATHS, chosen)) <= len(chosen)


def test_a_delta_takes_the_names_as_the_choice() -> None:
    linears = chosen_by(r"layer\.([0-3]|11)\..*(key|dense)$")
    for names in (short_names(PATHS, linears), exact_names(PATHS, linears)):
        assert list(fd.LoraModel(BERT, modified_modules=names).sites) == linears


def test_a_path_that_ends_another_one_stays_exact() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    paths = paths_of(model)
    for chosen in (["0"], ["1.0"], ["0", "1.0"], ["0", "1.1"]):
        for names in (short_names(paths, chosen), exact_names(paths, chosen)):
            assert list(fd.LoraModel(model, modified_modules=names).sites) == chosen
    assert exact_names(paths, ["0", "1.0"]) == ["[r]^0$", "1.0"]
    assert short_names(paths, ["0", "1.0"]) == ["0"]


def test_layer_1_is_not_layer_10() -> None:
    paths = paths_of(Layers())
    assert selected(paths, short_names(paths, ["layer.1"])) == ["layer.1"]
    assert selected(paths, short_names(paths, ["layer.1", "layer.10", "layer.11", "layer.3"])) == [
        "layer.1",
        "layer.3",
        "layer.10",
        "layer.11",
    ]


def test_names_with_hyphens_and_commas_are_names() -> None:
    model = nn.ModuleDict({"a-b": nn.Linear(2, 2), "c,d": nn.Linear(2, 2), "0-1": nn.Linear(2, 2)})
    paths = paths_of(model)
    for chosen in (["a-b"], ["c,d"], ["0-1"], ["a-b", "c,d", "0-1"]):
        assert selected(paths, short_names(paths, chosen)) == chosen


def test_a_module_with_two_names_is_one_site() -> None:
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=10, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=2, decoder_start_token_id=0)
    )
    twice = nn.Sequential(model, nn.ModuleList([model.encoder]))
    paths = paths_of(twice)
    assert paths["1.0.block"] == "0.encoder.block"
    chosen = ["1.0.block.1.layer.0.SelfAttention.q"]
    names = short_names(paths, chosen)
    assert list(fd.LoraModel(twice, modified_modules=names).sites) == ["0.encoder.block.1.layer.0.SelfAttention.q"]


def test_nothing_chosen_and_something_unknown() -> None:
    assert short_names(PATHS, []) == []
    with raises_saying(fd.errors.MatchError, "qurey", "Near names: query"):
        short_names(PATHS, ["encoder.layer.0.attention.self.qurey"])


def test_the_text_is_python() -> None:
    for names in (["query"], [r"[r]layer\.[0-5]", 'odd"name'], [f"layer.{i}.some.longer.name" for i in range(4)]):
        found: dict[str, list[str]] = eval(f"dict({pasted(names)})")
        assert found["modified_modules"] == names
    assert fd.find_key("a", short_names(paths_of(MLP()), ["a"]))
