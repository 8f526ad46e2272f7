"""A saved view is a delta's folder: Trainer resumes from it, and nobody takes it for a whole model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_snapshot import assert_unchanged, snapshot
from handmade import assert_acts, assert_close, random_params
from torch import Tensor, nn
from zoo import ZOO

import funcdelta as fd

transformers: Any = pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def llava() -> nn.Module:
    """A model whose tensors Transformers renames when it saves them."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (ZOO["bert"].build, {"modified_modules": ["query"], "unfrozen_modules": ["deltas", "classifier"]}),
    "llava": (llava, {"modified_modules": ["language_model.layers.0.self_attn.q_proj"]}),
    "mixtral": (ZOO["mixtral"].build, {"modified_modules": ["q_proj"]}),
}


def subject(name: str) -> tuple[fd.DeltaModel, list[dict[str, Any]]]:
    """A delta, and examples to train it on."""
    build, options = SUBJECTS[name]
    delta = fd.LoraModel(build(), lora_r=2, **options)
    ids = torch.randint(4, 50, (8, 6), generator=torch.Generator().manual_seed(0))
    labels: list[Any] = [i % 3 for i in range(8)] if name == "bert" else list(ids)
    rows = zip(ids, labels, strict=True)
    return delta, [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": label} for i, label in rows]


def train(view: nn.Module, data: list[Any], folder: Path, steps: int, **options: Any) -> dict[str, Tensor]:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, learning_rate=0.05,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    transformers.Trainer(view, arguments, train_dataset=data).train(**options)
    return fd.unbind(view)


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_trainer_saves_and_resumes(name: str, tmp_path: Path) -> None:
    delta, data = subject(name)
    before = snapshot(delta.backbone)
    trained = train(delta.bind(delta.init(0)), data, tmp_path, 2)
    checkpoint = tmp_path / "checkpoint-2"
    resumed = train(delta.bind(delta.init(1)), data, tmp_path, 2, resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(leaf, trained[key]) for key, leaf in resumed.items())
    assert any(not torch.equal(leaf, delta.init(0)[key]) for key, leaf in trained.items())
    _, loaded = fd.AutoDeltaModel.from_finetuned(checkpoint, backbone_model=delta.backbone)
    assert all(torch.equal(leaf, trained[key]) for key, leaf in loaded.items())
    further = train(delta.bind(delta.init(1)), data, tmp_path, 4, resume_from_checkpoint=True)
    straight = train(delta.bind(delta.init(0)), data, tmp_path / "straight", 4)
    for key, leaf in straight.items():
        assert_close(further[key], leaf, 1e-4)
    assert_unchanged(delta.backbone, before)


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    delta, _ = subject("bert")
    params, inputs = random_params(delta), ZOO["bert"].inputs(2)
    view: Any = delta.bind(params)
    view.save_pretrained(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "delta.safetensors", "model.safetensors"]
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["delta_type"] == "lora"
    assert "fd.AutoDeltaModel.from_finetuned" in data["transformers_weights"]
    again, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=delta.backbone)
    assert_close(again.bind(loaded)(**inputs).logits, view(**inputs).logits, 1e-6)
    (tmp_path / "optimizer.pt").write_text("of a trainer")
    view.save_pretrained(tmp_path, is_main_process=False)
    view.save_pretrained(tmp_path)  # over the old one, and what others wrote stays
    assert (tmp_path / "optimizer.pt").read_text() == "of a trainer"


@pytest.mark.parametrize("load", ["its class", "another class", "AutoModel", "pipeline", "the view's class"])
def test_nobody_takes_it_for_a_whole_model(load: str, tmp_path: Path) -> None:
    delta, _ = subject("bert")
    view: Any = delta.bind(delta.init(0))
    view.save_pretrained(tmp_path)
    loads: dict[str, Callable[[Path], Any]] = {
        "its class": type(delta.backbone).from_pretrained,  # type: ignore[attr-defined]
        "another class": transformers.BertModel.from_pretrained,
        "AutoModel": transformers.AutoModel.from_pretrained,
        "pipeline": lambda folder: transformers.pipeline("text-classification", model=str(folder)),
        "the view's class": type(view).from_pretrained,
    }
    with pytest.raises(ValueError, match=r"fd\.AutoDeltaModel\.from_finetuned|Unrecognized model"):
        loads[load](tmp_path)


def test_leaves_that_a_trainer_gathered_are_saved(tmp_path: Path) -> None:
    delta, _ = subject("bert")
    view: Any = delta.bind(delta.init(0))
    gathered = random_params(delta)
    view.save_pretrained(tmp_path, state_dict={**gathered, "something": torch.zeros(1)})
    _, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=delta.backbone)
    assert all(torch.equal(leaf, gathered[key]) for key, leaf in loaded.items())


def test_a_routed_view_saves_its_stack(tmp_path: Path) -> None:
    delta, _ = subject("bert")
    stack = random_params(delta, 3)
    view: Any = delta.bind_rows(stack, [0, 2])
    view.save_pretrained(tmp_path)
    _, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path, backbone_model=delta.backbone)
    assert all(torch.equal(leaf, stack[key]) for key, leaf in loaded.items())


def test_what_a_trainer_teaches_batch_norms_is_saved_and_resumed(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.head(self.norm(self.layer(x)))
            loss = nn.functional.cross_entropy(logits, labels) if labels is not None else logits.sum()
            return {"loss": loss, "logits": logits}

    delta = fd.LoraModel(Classifier(), lora_r=2, modified_modules=["layer", "head"])
    data = [{"x": torch.randn(4), "labels": i % 3} for i in range(8)]
    trained = train(delta.bind(delta.init(0)), data, tmp_path, 2)
    resumed = train(delta.bind(delta.init(1)), data, tmp_path, 2, resume_from_checkpoint=True)
    assert "norm.running_mean" in trained
    assert all(torch.equal(leaf, trained[key]) for key, leaf in resumed.items())


def test_a_view_in_a_sentence_transformer(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    config = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "base")
    transformers.BertModel(transformers.BertConfig(vocab_size=8, **config)).save_pretrained(tmp_path / "base")
    first = modules.Transformer(str(tmp_path / "base"))
    model = library.SentenceTransformer(modules=[first, modules.Pooling(16)], device="cpu")
    backbone = first.model
    delta = fd.LoraModel(backbone, modified_modules=["query"])
    params, plain = random_params(delta), torch.as_tensor(model.encode(["a b c"]))
    first.model = delta.bind(params)
    assert_acts(torch.as_tensor(model.encode(["a b c"])), plain)
    model.save(str(tmp_path / "saved"))
    _, loaded = fd.AutoDeltaModel.from_finetuned(tmp_path / "saved", backbone_model=backbone)
    assert all(torch.equal(leaf, params[key]) for key, leaf in loaded.items())
    with pytest.raises(ValueError, match="Unrecognized model"):
        library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
