"""Errors of funcdelta: each says where it happened, what was expected and found, and what to write instead."""

from __future__ import annotations

import re

__all__ = [
    "CheckpointError",
    "ConfigError",
    "EngineError",
    "EngineWarning",
    "FactorMeanWarning",
    "FoldError",
    "FuncdeltaError",
    "MatchError",
    "MergeError",
    "ParamsError",
    "PickError",
    "RecomputeError",
    "StackError",
    "StaleBackboneError",
    "UnreachedWarning",
]


class FuncdeltaError(Exception):
    """The base of every error that funcdelta raises on purpose.

    >>> import funcdelta as fd
    >>> try:
    ...     fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["1"])
    ... except fd.errors.FuncdeltaError as error:
    ...     print(type(error).__name__)
    MatchError
    """


class MatchError(FuncdeltaError, ValueError):
    """A name selects nothing, or selects something that the method cannot act on.

    >>> fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["query"])
    Traceback (most recent call last):
    ...
    funcdelta.errors.MatchError: modified_modules: 'query' matches no module of Sequential...
    """


class ConfigError(FuncdeltaError, ValueError):
    """A config has an unknown field or an impossible value, or does not fit the other configs.

    >>> fd.AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_rank": 4})
    Traceback (most recent call last):
    ...
    funcdelta.errors.ConfigError: LoraConfig has no field 'lora_rank'...
    """


class ParamsError(FuncdeltaError, ValueError):
    """Params have an unknown key, lack a key, or have a leaf of the wrong shape.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["0"])
    >>> try:
    ...     delta.apply({"0.lora.lora_a": torch.zeros(8, 2)}, torch.zeros(1, 2))
    ... except fd.errors.ParamsError as error:
    ...     print("lora_A" in str(error))
    True
    """


class StackError(ParamsError):
    """One member was given where a stack belongs, or a stack where one member belongs.

    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["0"])
    >>> try:
    ...     delta.apply(delta.init(0, n=3), torch.zeros(1, 2))
    ... except fd.errors.StackError as error:
    ...     print("apply_many" in str(error))
    True
    """


class EngineError(FuncdeltaError, RuntimeError):
    """The chosen engine cannot run this model on these inputs; another one can.

    >>> issubclass(fd.errors.FoldError, fd.errors.EngineError), issubclass(fd.errors.EngineError, RuntimeError)
    (True, True)
    """


class FoldError(EngineError):
    """The backbone mixes rows, or an output has no batch axis, so members cannot share one batch.

    >>> class Mean(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).mean()
    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2), Mean(2, 1)), modified_modules=["0"])
    >>> try:
    ...     delta.apply_many(delta.init(0, n=3), torch.zeros(4, 2), engine="fold")
    ... except fd.errors.FoldError as error:
    ...     print(type(error).__name__)
    FoldError
    >>> delta.apply_many(delta.init(0, n=3), torch.zeros(4, 2), engine="vmap").shape
    torch.Size([3])
    """


class RecomputeError(EngineError):
    """Gradient checkpointing cannot recompute this kind of call.

    >>> class Checkpointed(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)
    >>> delta = fd.LoraModel(torch.nn.Sequential(Checkpointed(2, 2)), modified_modules=["0"])
    >>> try:
    ...     torch.func.grad(lambda params: delta.apply(params, torch.zeros(1, 2)).sum())(delta.init(0))
    ... except fd.errors.RecomputeError as error:
    ...     print(str(error)[:38])
    0 checkpoints its activations, which t
    """


class MergeError(FuncdeltaError, ValueError):
    """The delta cannot be expressed as a change of weights, or changes only one end of a tied pair.

    >>> delta = fd.AdapterModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), modified_modules=["0"])
    >>> delta.merge(delta.init(0))
    Traceback (most recent call last):
    ...
    funcdelta.errors.MergeError: adapter at 0 cannot be merged: adapter has no weights form...
    """


class CheckpointError(FuncdeltaError, ValueError):
    """A folder cannot be read, or does not belong to this backbone.

    >>> try:
    ...     fd.AutoDeltaModel.from_finetuned("./no-such-folder", torch.nn.Sequential(torch.nn.Linear(2, 2)))
    ... except fd.errors.CheckpointError as error:
    ...     print("no-such-folder" in str(error))
    True
    """


class PickError(FuncdeltaError, RuntimeError):
    """Nothing was picked: the user cancelled, time ran out, no port is free, or no web library is installed.

    >>> try:
    ...     fd.pick(torch.nn.Sequential(torch.nn.Linear(2, 2)), open_browser=False, timeout=0.01)
    ... except fd.errors.PickError as error:
    ...     print("timeout=None" in str(error))
    Pick modules of Sequential at http://127.0.0.1:.../ (Ctrl-C cancels)
    True
    """


class StaleBackboneError(FuncdeltaError, RuntimeError):
    """The backbone's tensors moved (``backbone.to(...)``) after the delta was built.

    >>> backbone = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> delta = fd.LoraModel(backbone, modified_modules=["0"])
    >>> params, x = delta.init(0), torch.zeros(1, 2)
    >>> backbone = backbone.double()
    >>> try:
    ...     delta.apply(params, x.double())
    ... except fd.errors.StaleBackboneError as error:
    ...     print("refresh" in str(error))
    True
    """


class FactorMeanWarning(UserWarning):
    """The mean of factors was taken, which is not the mean of the members' effects (of their ΔW).

    >>> issubclass(FactorMeanWarning, UserWarning)
    True
    """


class EngineWarning(UserWarning):
    """A call runs on a slower engine than the one that was tried first; the message says why.

    >>> import warnings
    >>> class Mean(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).mean()
    >>> delta = fd.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2), Mean(2, 1)), modified_modules=["0"])
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     _ = delta.apply_many(delta.init(0, n=3), torch.zeros(4, 2))
    >>> told[0].category.__name__, str(told[0].message)[:24]
    ('EngineWarning', "apply_many runs by 'vmap")
    """


class UnreachedWarning(UserWarning):
    """The first call did not reach some sites, so the delta has no effect there.

    >>> import warnings
    >>> class Texts(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.text, self.images = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    ...     def forward(self, x, images=None):
    ...         return self.text(x) if images is None else self.text(x) + self.images(images)
    >>> delta = fd.LoraModel(Texts(), modified_modules=["text", "images"])
    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     _ = delta.apply(delta.init(0), torch.zeros(4, 2))
    >>> told[0].category.__name__, str(told[0].message)[:36]
    ('UnreachedWarning', 'This call did not pass through image')
    """


def shown(value: object, most: int = 100) -> str:
    """``repr(value)`` for a message; if longer than ``most``, its middle is left out.

    >>> shown("lora_A"), shown("z" * 1000, 20)
    ("'lora_A'", "'zzzzzzzzz...zzzzzzzzz'")
    """
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"  # repr() refuses very long integers
    text = repr(value)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-(most // 2) :]}"


ENGINE = re.compile(r',? or use engine="[^"]*"|(?:^| )(?:Or use|Use) engine=.*?(?:\.(?= |$)|$)')
"""A clause or sentence that advises choosing an engine."""


def without_engines(message: str) -> str:
    """``message`` without its advice to choose another ``engine=``, for callers that have no such argument.

    >>> without_engines('The model mixes rows. Use engine="auto" or "loop", or leave b out. Rows are axis 0.')
    'The model mixes rows. Rows are axis 0.'
    >>> without_engines('Pad x, or use engine="loop".')
    'Pad x.'
    """
    return ENGINE.sub("", message)
