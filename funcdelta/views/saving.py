"""``view.save_pretrained`` writes the delta's folder, from which Transformers' Trainer can also resume.

A view's class is the backbone's, so Trainer, SentenceTransformer and pipelines call its ``save_pretrained``.
Transformers' own would write the leaves as if they were a whole model, under names that some classes change. So a view
writes the folder of :meth:`DeltaModel.save_finetuned`, which is marked as a delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Saved:
    """``save_pretrained`` for views whose backbone has it."""

    _funcdelta: Any

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        push_to_hub: bool | str = False,
        **options: Any,
    ) -> None:
        """Write the delta's folder, for :meth:`AutoDeltaModel.from_finetuned` and for resuming with a Trainer.

        ``state_dict`` holds the leaves if a trainer has gathered them from several processes. Of ``options``, those
        about creating a repository count; the others concern model files. ``from_pretrained`` refuses the folder.
        """
        if not is_main_process:
            return
        params = self._funcdelta.params()
        params |= {name: tensor for name, tensor in (state_dict or {}).items() if name in params}
        creating = {key: options[key] for key in ("private", "token", "commit_message") if options.get(key) is not None}
        to = options.get("repo_id") if push_to_hub is True and options.get("repo_id") else push_to_hub
        self._funcdelta.delta.save_finetuned(params, save_directory, resumable=True, push_to_hub=to, **creating)


class Counted:
    """``num_parameters`` for views whose backbone has it."""

    _funcdelta: Any

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters of backbone and delta together; ``only_trainable``: of the delta's that train."""
        counts: Any = super()
        own = counts.num_parameters(only_trainable=only_trainable, exclude_embeddings=exclude_embeddings)
        if only_trainable:
            return own
        with self._funcdelta.calls.looking():
            names = dict(self.named_parameters())  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
            whole = counts.num_parameters(exclude_embeddings=exclude_embeddings)
        return whole + sum(leaf.numel() for name, leaf in self._funcdelta.leaves.items() if name not in names)
