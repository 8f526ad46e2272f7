"""A text encoder and labelled texts small enough to run the whole main job in a second or two."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch

WORDS = {
    "animals": ["cat", "dog", "horse", "cow", "sheep", "bird", "fish", "mouse"],
    "weather": ["rain", "snow", "wind", "sun", "cloud", "storm", "frost", "heat"],
    "music": ["song", "drum", "piano", "choir", "violin", "tune", "note", "band"],
}
COMMON = ["the", "a", "of", "and", "to", "in", "it", "was", "on", "for", "with", "at", "by", "from", "this", "that"]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *(w for words in WORDS.values() for w in words)]


def save_backbone(folder: Path, dropout: float = 0.1, layers: int = 3) -> Path:
    """A folder with a random tiny BERT and a word-piece tokenizer, as ``--backbone`` reads it."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(VOCABULARY) + "\n")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(VOCABULARY)}).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config)
        for name, parameter in model.named_parameters():
            if "embeddings" in name and parameter.ndim == 2:
                # Embeddings as small as BERT's initial ones would make all texts alike.
                torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return folder


def write_texts(path: Path, rows: int = 150, seed: int = 0, header: tuple[str, str] = ("text", "label")) -> Path:
    """A csv of texts whose label shows in about half of their words."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in range(rows):
            label = list(WORDS)[row % len(WORDS)]
            words = [rng.choice(WORDS[label] if rng.random() < 0.5 else COMMON) for _ in range(rng.randint(4, 14))]
            writer.writerow([" ".join(words), label])
    return path
