"""Configurations as people have them: what PEFT computes with a LoRA is reproduced, everything else refused by name."""

from __future__ import annotations

import json
import os
import types
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft_made import cases_in, gradients_here, gradients_of, quiet, read_by_peft
from safetensors.torch import load_file
from torch import Tensor, nn

import funcdelta as fd

# 6 to 160: found in public use; from 901 on: made up, for rarer fields.
LORA = (
    *(3, 9, 12, 15, 18, 21, 24, 27, 30, 33, 36, 39, 45, 48, 51, 54, 57, 60, 63, 69, 72, 75, 78, 81, 84, 87, 93, 96),
    *(99, 105, 111, 127, 130, 147, 159),
    *(901, 902, 906, 908, 912, 914, 918, 920, 922, 926, 930, 932, 934, 940, 942, 943, 944),
)
REFUSED = {
    "LeRobot": (6,),
    "not written by PEFT": (42,),
    "MLX-LM": (66,),
    "cosmos3-native-lora": (90,),
    "AdapterHub": (114,),
    "no tensors": (102,),
    "DoRA": (128, 146, 916),
    "KaSA": (129,),
    "BD-LoRA": (131,),
    "trainable tokens": (904,),
    "layer replication": (910,),
    "IA3": (108, 118, 119, 145),
    "ADALORA": (117, 919),
    "VERA": (120, 928),
    "PREFIX_TUNING": (123, 124, 924, 938),
    "LN_TUNING": (126, 936),
    "TRAINABLE_TOKENS": (121,),
    "P_TUNING": (122,),
    "PROMPT_TUNING": (125,),
    "LOHA": (132,),
    "LOKR": (133,),
    "OFT": (134,),
    "BOFT": (135,),
    "HRA": (136,),
    "FOURIERFT": (137,),
    "ADAPTION_PROMPT": (138,),
    "RANDLORA": (139,),
    "VBLORA": (140,),
    "ROAD": (141,),
    "SHIRA": (142,),
    "C3A": (143,),
    "MISS": (144,),
    "DELORA": (148,),
    "GRALORA": (149,),
    "WAVEFT": (150,),
    "PVERA": (151,),
    "OSF": (152,),
    "TINYLORA": (153,),
    "PSOFT": (154,),
    "LILY": (155,),
    "HIRA": (156,),
    "UNILORA": (157,),
}
NAMED = {number: name for name, numbers in REFUSED.items() for number in numbers}
MISREAD = (940, 942, 944)
"""Read here, and by PEFT 0.21 read in part or not at all."""
TIED = (922,)
"""Trained at both ends of a tied tensor, which are two tensors in PEFT and one here: gradients add up."""


@pytest.fixture(scope="session")
def cases(shared_folder: Callable[[str], Path]) -> types.ModuleType:
    return cases_in(shared_folder("peft_cases"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where cases are made; a folder that is kept saves the time of a run."""
    kept = os.environ.get("FUNCDELTA_PEFT_CASES")
    return Path(kept) if kept else tmp_path_factory.mktemp("peft_cases")


def case_of(cases: types.ModuleType, number: int, made: Path) -> types.SimpleNamespace:
    with quiet():
        return cases.load(number, made)


def backbone_of(case: types.SimpleNamespace) -> nn.Module:
    with quiet():
        return case.backbone()


def out_of(cases: types.ModuleType, call: Callable[..., object], inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), quiet():
        return cases.logits(call(**inputs)).float()


def test_every_case_is_read_or_refused(cases: types.ModuleType) -> None:
    assert sorted([*LORA, *NAMED]) == cases.numbers()


@pytest.mark.parametrize("number", LORA)
def test_logits_gradients_and_the_way_back(number: int, cases: types.ModuleType, made: Path, tmp_path: Path) -> None:
    case = case_of(cases, number, made)
    backbone = backbone_of(case)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fields that are not known|.*alpha_pattern all match")
        delta, params = fd.load_peft(case.adapter, backbone)
    got = out_of(cases, lambda **inputs: delta.apply(params, **inputs), case.inputs)
    torch.testing.assert_close(got, case.expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())

    folder = fd.save_peft(delta, params, tmp_path / "again")
    read = read_by_peft(backbone, folder)
    torch.testing.assert_close(out_of(cases, read.get_base_model(), case.inputs), case.expected, rtol=1e-5, atol=1e-5)

    def loss(call: Callable[..., object]) -> Tensor:
        with quiet():
            return cases.logits(call(**case.inputs)).float().square().mean()

    theirs = gradients_of(read, lambda model: loss(model.get_base_model()))
    ours = gradients_here(delta, params, loss)
    if number not in TIED:
        assert theirs.keys() == ours.keys()
        for key, gradient in theirs.items():
            size = float(gradient.abs().max())
            torch.testing.assert_close(ours[key] / size, gradient / size, rtol=1e-5, atol=1e-5, msg=key)

    again, same = fd.load_peft(folder, backbone)
    assert again.configs == delta.configs
    assert all(torch.equal(same[name], params[name]) for name in delta.names)
    if number not in (*MISREAD, 918, 920, 943):  # and tensor for tensor the same file
        written = load_file(folder / "adapter_model.safetensors")
        given = {key for key in case.info["keys"] if not key.endswith("base_layer.weight")}
        assert written.keys() == given


@pytest.mark.parametrize("number", NAMED)
def test_refused_by_name(number: int, cases: types.ModuleType, tmp_path: Path) -> None:
    """What the config says is refused before any tensor is read."""
    given = cases.spec(number)[0]
    (tmp_path / "adapter_config.json").write_text(given if isinstance(given, str) else json.dumps(given))
    with pytest.raises(fd.errors.CheckpointError, match=NAMED[number]) as caught:
        fd.load_peft(tmp_path, nn.Linear(1, 1))
    assert len(str(caught.value)) < 600
