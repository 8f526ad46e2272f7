"""structure_graph: the folded tree of any module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ...errors import ConfigError
from ...structures import common_names
from .folding import folded
from .nodes import Node, pruned, tree
from .render import show


def structure_graph(
    model: nn.Module,
    expand_params: bool = False,
    keep_non_params: bool = False,
    common_structure: bool = False,
    only_common: bool = False,
    print_tree: bool = True,
) -> Node:
    """Print the tree of ``model`` with equal siblings folded, and return it: where can a delta go?

    Args:
        expand_params: every tensor on a line of its own.
        keep_non_params: keep modules without parameters, and buffers.
        common_structure: add the backbone-independent names (``attn@.q@``) of modules that have one.
        only_common: show only modules with a common name, and what is above them.
        print_tree: ``False`` returns the tree without printing it, and needs no rich.

    >>> linears = [torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)]
    >>> node = fd.inspect.structure_graph(torch.nn.Sequential(*linears))
    Sequential
    ├── 0 (Linear) weight:[8, 4] bias:[8]
    └── 1-2 (Linear) weight:[8, 8] bias:[8]
    >>> node.children[1].paths
    ('1', '2')
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"structure_graph draws an nn.Module; found {type(model).__name__}. "
            "Write fd.inspect.structure_graph(model), or delta.log(params) for a backbone with a delta in it."
        )
    root = tree(model)
    common = common_names_of(model) if common_structure or only_common else {}
    if only_common:
        root = _with_names(root, common)
    root = folded(root if keep_non_params else pruned(root))
    if print_tree:
        show(root, expand_params, common)
    return root


def common_names_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """``{module path: (its common name,)}``, as ``modified_modules`` takes it, of the modules that have one.

    The full common name also says where the module is; this is the part that targets are written with. Raises
    ``MatchError`` for a model of an unknown family.

    >>> from transformers import BertConfig, BertModel
    >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    >>> common_names_of(BertModel(BertConfig(vocab_size=9, **sizes)))["encoder.layer.0.attention.self.query"]
    ('attn@.q@',)
    """
    found: dict[str, tuple[str, ...]] = {}
    for path, name in common_names(model).items():
        tokens = name.split(".")
        start = max((i + 1 for i, token in enumerate(tokens) if not token.endswith("@")), default=0)
        if start < len(tokens):
            found[path] = (".".join(tokens[start:]),)
    return found


def _with_names(node: Node, common: Mapping[str, tuple[str, ...]]) -> Node:
    """The tree without modules that neither have a common name nor one below them, and without others' tensors."""
    children = [_with_names(child, common) for child in node.children]
    kept = tuple(child for child in children if child.children or child.paths[0] in common)
    return replace(node, children=kept, leaves=node.leaves if node.paths[0] in common else ())
