"""An experience for modules other than LitPPO."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_ppo.functional import select_rows


class Experience:
    """The rows of an update, of an optimizer step or of a part of one, for a module of your own.

    Give the fields that you have under the names in ``docs/own_module.md``, and any others that you need. Tensors and
    lists with one entry per row follow ``select``, ``keep``, ``minibatches`` and ``split``. A field that a callback
    reads and that is neither given nor has a default is an error that names both.

    Defaults: ``response_mask`` is True everywhere, in the shape of ``logprobs``; ``kl`` is ``logprobs - ref_logprobs``
    if both are given; ``raw_scores`` are the first ``scores``; ``ref_logprobs``, ``values`` and ``returns`` are None;
    ``exhausted`` is False; ``extras`` and ``metrics`` are empty.

    Args:
        **fields: The rows.

    >>> experience = Experience(logprobs=torch.zeros(3, 2), scores=torch.tensor([1.0, 2.0, 6.0]))
    >>> experience.scores = experience.scores - 3.0
    >>> experience.raw_scores, len(experience.select([0, 2])), experience.mean(torch.ones(3, 2))
    (tensor([1., 2., 6.]), 2, tensor(1.))
    """

    response_mask: Tensor

    def __init__(self, **fields: Any) -> None:
        self.ref_logprobs = self.values = self.returns = None
        self.exhausted = False
        self.extras: dict[str, Any] = {}
        self.metrics: dict[str, Tensor] = {}  # what log has added, over all parts of an optimizer step
        self.n_tokens: Tensor | None = None  # response tokens of the optimizer step, if these rows are a part of one
        for name, value in fields.items():
            setattr(self, name, value)
        if "response_mask" not in fields:
            if "logprobs" not in fields:
                raise ValueError("Experience(response_mask=None): give response_mask or logprobs, (B, T) each")
            self.response_mask = torch.ones_like(fields["logprobs"], dtype=torch.bool)
        if "kl" not in fields and fields.get("ref_logprobs") is not None and "logprobs" in fields:
            self.kl = (fields["logprobs"] - fields["ref_logprobs"]).masked_fill(~self.response_mask, 0.0)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scores":
            vars(self).setdefault("raw_scores", value)
        vars(self)[name] = value

    def __getattr__(self, name: str) -> Any:  # only for missing ones; tells type checkers that any field may be there
        raise AttributeError(f"{type(self).__name__}.{name} is not set", name=name, obj=self)

    def __len__(self) -> int:
        return len(self.response_mask)

    def select(self, rows: Tensor | Sequence[int]) -> "Experience":
        """A copy with some of the rows.

        Args:
            rows: Row numbers, or a (B,) boolean tensor.
        """
        index = torch.as_tensor(rows, device=self.response_mask.device)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.long()
        chosen, n, listed = copy.copy(self), len(self), index.tolist()
        for name, value in vars(self).items():
            if name != "metrics":
                vars(chosen)[name] = select_rows(value, index, listed, n)
        return chosen

    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Cut to some rows in place.

        Args:
            rows: Row numbers, or a (B,) boolean tensor.
        """
        for name, value in vars(self.select(rows)).items():
            setattr(self, name, value)

    def minibatches(self, size: int, epochs: int = 1) -> Iterator["Experience"]:
        """The rows of each optimizer step, in a new random order every epoch; a smaller last one is kept.

        Args:
            size: Rows.
            epochs: Passes over the experience.
        """
        for _ in range(epochs):
            for rows in torch.randperm(len(self)).split(size):
                minibatch = self.select(rows)
                minibatch.metrics = {}
                yield minibatch

    def split(self, size: int) -> Iterator["Experience"]:
        """The parts of an optimizer step that have a forward and backward each; their ``mean`` adds up to the step's.

        Args:
            size: Rows.
        """
        self.n_tokens = self.response_mask.sum()
        for rows in torch.arange(len(self)).split(size):
            yield self.select(rows)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` (B, T) over response tokens; of a part, what it adds to the mean over the step."""
        n_tokens = self.response_mask.sum() if self.n_tokens is None else self.n_tokens
        return x.masked_fill(~self.response_mask, 0.0).sum() / n_tokens.clamp(min=1)

    def log(self, name: str, x: Tensor) -> None:
        """Add the mean of ``x`` (B, T) to ``metrics``."""
        part = self.mean(x.detach())
        self.metrics[name] = self.metrics[name] + part if name in self.metrics else part
