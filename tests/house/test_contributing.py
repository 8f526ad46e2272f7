"""What .github/ tells contributors is so: blocks run, links lead somewhere, and a method added by its steps works."""

from __future__ import annotations

import doctest
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import funcdelta as fd
from funcdelta import structures
from funcdelta.methods.config import METHODS, BaseDeltaConfig

ROOT = Path(__file__).resolve().parents[2]
GITHUB = ROOT / ".github"
PAGES = {name: (GITHUB / name).read_text("utf-8") for name in ("CONTRIBUTING.md", "CHANGELOG.md")}


@pytest.fixture
def pages_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the blocks of CONTRIBUTING.md define, run one after the other."""
    monkeypatch.chdir(tmp_path)
    methods, families = dict(METHODS), dict(structures.FAMILIES)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGES["CONTRIBUTING.md"], re.MULTILINE | re.DOTALL):
        exec(compile(code, "CONTRIBUTING.md", "exec"), namespace)
    yield namespace
    for known, before in ((METHODS, methods), (structures.FAMILIES, families)):
        known.clear()
        known.update(before)


def test_the_method_does_what_a_method_does(pages_code: dict[str, Any]) -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    backbone = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    delta = fd.AutoDeltaModel.from_config({"delta_type": "rescale"}, backbone)
    assert len(delta.sites) == 2
    stack = {name: leaf + 0.1 * torch.randn(leaf.shape) for name, leaf in delta.init(0, n=3).items()}
    ids = torch.arange(6).view(2, 3)
    with torch.no_grad():
        folded = delta.apply_many(stack, input_ids=ids, engine="fold").last_hidden_state
        for i in range(3):
            one = fd.take(stack, i)
            torch.testing.assert_close(folded[i], delta.apply(one, input_ids=ids).last_hidden_state)
            torch.testing.assert_close(folded[i], delta.merged(one)(input_ids=ids).last_hidden_state)
    with pytest.raises(fd.errors.MatchError, match="acts on what has a matrix, not on LayerNorm"):
        fd.DeltaModel(backbone, pages_code["RescaleConfig"](modified_modules=["LayerNorm"]))
    runner = doctest.DocTestRunner()
    text = pages_code["RescaleConfig"].__doc__
    runner.run(doctest.DocTestParser().get_doctest(text, pages_code | {"fd": fd}, "RescaleConfig", None, 0))
    assert (runner.tries, runner.failures) == (2, 0)


def test_the_table_gives_every_method_its_sites(pages_code: dict[str, Any]) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.mlp = nn.Module(), nn.Module()
            self.attn.qkv, self.attn.out = nn.Linear(4, 12), nn.Linear(4, 4)
            self.mlp.up, self.mlp.down = nn.Linear(4, 8), nn.Linear(8, 4)

    model = nn.Module()
    model.h = nn.ModuleList([Layer(), Layer()])
    model.config = type("Config", (), {"model_type": "tiny"})()  # pyright: ignore[reportArgumentType]
    assert fd.LoraModel(model).sites == ("h.0.attn.qkv", "h.1.attn.qkv")
    assert fd.LoraModel(model, lora_r=1).shapes["h.0.attn.qkv.lora.lora_B"] == (8, 1)  # q and v of q, k, v
    assert fd.inspect.common_names(model)["h.1.mlp.down"] == "decoder@.block@.1.ff@.w2@"


def test_the_format_lists_what_does_not_fit(pages_code: dict[str, Any]) -> None:
    other = fd.AdapterModel(nn.Sequential(nn.Linear(4, 6)), bottleneck_dim=2, modified_modules=["0"])
    with pytest.raises(fd.errors.CheckpointError, match="holds LoRA alone, found adapter"):
        pages_code["save_it"](other, other.init(0), "other")
    folder, backbone = pages_code["save_it"](pages_code["delta"], pages_code["params"], "again"), pages_code["backbone"]
    pages_code["save_file"]({"x": torch.zeros(1)}, folder / "it.safetensors")
    with pytest.raises(fd.errors.CheckpointError, match=r"missing \['0.lora_A', .*not known \['x'\]"):
        pages_code["load_it"](folder, backbone)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in target]
    assert not [target for target in links if not (GITHUB / target).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_files_and_functions_that_are_named_are_there(page: str) -> None:
    text = PAGES[page]
    named = {name for name in re.findall(r"\b(?:tests/)?(test_\w+\.py)", text) if name != "test_rescale.py"}
    assert not [name for name in named if not list(ROOT.glob(f"tests/*/{name}"))]
    for path in set(re.findall(r"\bfd((?:\.[A-Za-z_]\w*)+)", text)):
        value: Any = fd
        for part in path[1:].split("."):
            value = getattr(value, part)
    rows = re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE)
    functions = {name for row in rows for name in re.sub(r"\(.*?\)|[`,]", " ", row).split()}
    assert not [name for name in functions if not hasattr(BaseDeltaConfig, name)]


def test_the_changelog_tells_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert re.findall(r"^## (\S+)", PAGES["CHANGELOG.md"], re.MULTILINE)[0] == version


def test_the_workflow_calls_what_decides() -> None:
    workflow = (GITHUB / "workflows" / "ci.yml").read_text("utf-8")
    assert re.findall(r"^ +- run: (.*)$", workflow, re.MULTILINE) == [".ci/run"]
