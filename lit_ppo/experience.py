"""What flows through an update: the experience of all ranks, and the minibatches cut from it."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_ppo.functional import select_rows, to_device

Numbers = Tensor | np.ndarray[Any, Any] | Sequence[float]  # one per row, as your own loop may set scores
LossReduction = Literal["token_mean", "sequence_mean"] | int  # an integer: tokens that a response counts for

# For the error of a field that is read before it is set.
SET_BY = {
    "logprobs": "rollout(logprobs=True)",
    "ref_logprobs": "rollout(logprobs=True)",
    "values": "rollout(logprobs=True)",
    "kl": "rollout(logprobs=True)",
    "raw_scores": "score",
    "scores": "score",
    "rewards": "update",
    "advantages": "update",
    "returns": "update",
    "new_logprobs": "the actor's forward of a micro-batch",
    "new_entropy": "the actor's forward of a micro-batch",
    "new_values": "the critic's forward of a micro-batch",
}


class ModelInputs(NamedTuple):
    """What the models read of some rows, cut to their longest prompt and response (p <= P, t <= T tokens)."""

    input_ids: Tensor  # (b, p + t)
    attention_mask: Tensor  # (b, p + t), on the host: this spares a GPU a synchronisation
    target_mask: Tensor  # (b, t), on the host


@dataclass(slots=True, kw_only=True, repr=False, eq=False)
class Experience:
    """The rows of an update, the same on every rank.

    Callbacks rebind fields; tensors are not edited in place. Reading a field before it is set raises.

    Shapes:
        B responses, P prompt tokens (left-padded), T response tokens (right-padded); the mask ends with the
        first stop token, included. Per-token numbers are (B, T) float32, 0 where masked.
    """

    prompts: list[str]
    responses: list[str]
    columns: dict[str, list[Any]]
    prompt_index: Tensor
    group: Tensor
    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    response_mask: Tensor
    ended: Tensor
    sampling_logprobs: Tensor | None = None  # of an engine that sampled; None: the policy itself did
    logprobs: Tensor = field(init=False)
    ref_logprobs: Tensor | None = field(init=False)
    values: Tensor | None = field(init=False)
    kl: Tensor = field(init=False)
    if TYPE_CHECKING:  # ``step`` makes tensors of the numbers that a loop of the user's own has set

        @property
        def raw_scores(self) -> Tensor: ...
        @raw_scores.setter
        def raw_scores(self, value: Numbers) -> None: ...
        @property
        def scores(self) -> Tensor: ...
        @scores.setter
        def scores(self, value: Numbers) -> None: ...

    else:
        raw_scores: Tensor = field(init=False)
        scores: Tensor = field(init=False)
    rewards: Tensor = field(init=False)
    advantages: Tensor = field(init=False)
    returns: Tensor | None = field(init=False)
    exhausted: bool = False
    extras: dict[str, Any] = field(default_factory=dict)
    origin: Any = None  # where it was rolled out, for ``step``

    def __getattr__(self, name: str) -> Any:
        """Explain why a field cannot be read; Python calls this only for empty slots."""
        if name in SET_BY:
            raise AttributeError(f"{type(self).__name__}.{name} is not set yet: {SET_BY[name]} sets it")
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __repr__(self) -> str:
        """The fields that are set, tensors by their shapes."""
        values = {name: getattr(self, name) for name in set_fields(self) if name != "origin"}
        shown = {k: tuple(v.shape) if isinstance(v, Tensor) else v for k, v in values.items()}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in shown.items())})"

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> list[tuple[int, int]]:
        """Tokens of each row's prompt and response, on the host."""
        both = torch.stack([self.prompt_mask.sum(1), self.response_mask.sum(1)], dim=1)
        return [(n_prompt, n_response) for n_prompt, n_response in both.tolist()]

    def select(self, rows: Tensor | Sequence[int]) -> "Experience":
        """A copy with some of the rows.

        Args:
            rows: Row numbers (may repeat), or a (B,) boolean tensor.
        """
        chosen = copy.copy(self)
        chosen.extras = dict(self.extras)
        chosen.keep(rows)
        return chosen

    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Cut to some rows in place. Allowed up to ``on_scores``: later fields are computed across rows.

        Args:
            rows: Row numbers, or a (B,) boolean tensor.
        """
        index = torch.as_tensor(rows)
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index.long()
        n, listed, index = len(self), index.tolist(), to_device(index, self.response_ids.device)
        shared = ("metrics", "least", "greatest")  # all micro-batches of a step add to the same dicts
        for name in [name for name in set_fields(self) if name not in shared]:
            setattr(self, name, select_rows(getattr(self, name), index, listed, n))

    def model_inputs(self) -> ModelInputs:
        """What the models read of these rows."""
        n_prompt, n_response = torch.tensor(self.lengths).unsqueeze(-1).unbind(1)  # (b, 1) each
        p, t = int(n_prompt.max()), max(1, int(n_response.max()))
        start = self.prompt_ids.shape[1] - p
        ids = torch.cat([self.prompt_ids[:, start:], self.response_ids[:, :t]], dim=1)
        target_mask = torch.arange(t) < n_response
        return ModelInputs(ids, torch.cat([torch.arange(p) >= p - n_prompt, target_mask], dim=1), target_mask)

    def micro_batch(self, rows: Sequence[int]) -> ModelInputs:
        """What the models read of some rows; see :func:`rows_or_stand_in` for no rows."""
        return self.select(rows_or_stand_in(rows)).model_inputs()

    def minibatches(
        self, size: int, *, epochs: int, seed: Sequence[int], reduction: LossReduction
    ) -> Iterator["Minibatch"]:
        """Cut ``epochs`` permutations of all rows into minibatches; a smaller last one is kept.

        Args:
            size: Responses in a minibatch, over all ranks.
            epochs: Passes over the experience.
            seed: Integers that identify this update; the epoch is appended.
            reduction: What ``Minibatch.mean`` averages over.
        """
        lengths = self.lengths
        for epoch in range(epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(self))
            for start in range(0, len(self), size):
                rows = order[start : start + size].tolist()
                yield Minibatch.of(self, rows, reduction, [lengths[row] for row in rows])


@dataclass(slots=True, kw_only=True, repr=False, eq=False)
class Minibatch(Experience):
    """The rows of one optimizer step over all ranks, or one micro-batch of them.

    A micro-batch also has the outputs of the models: ``new_logprobs``, ``new_entropy``, ``new_values``, (B, T) and
    differentiable.
    """

    new_logprobs: Tensor = field(init=False)
    new_entropy: Tensor = field(init=False)
    new_values: Tensor = field(init=False)
    weights: Tensor = field(init=False)  # (B, T), each token's share of the mean; they sum to 1 over the step
    n_tokens: Tensor = field(init=False)  # response tokens of the whole step
    lengths: list[tuple[int, int]] = field(init=False)  # read from the device once an update
    reduction: LossReduction = "token_mean"
    ranks: int = 1  # gradients are averaged over ranks, so the mean is multiplied by their number
    metrics: dict[str, Tensor] = field(default_factory=dict)  # this rank's part of the step's means
    least: dict[str, Tensor] = field(default_factory=dict)  # minima over this rank's tokens
    greatest: dict[str, Tensor] = field(default_factory=dict)  # maxima

    @classmethod
    def of(
        cls,
        experience: Experience,
        rows: Sequence[int],
        reduction: LossReduction,
        lengths: list[tuple[int, int]] | None = None,
    ) -> "Minibatch":
        """The minibatch of some rows of an experience.

        Args:
            experience: All rows of the update.
            rows: Row numbers.
            reduction: See ``mean``.
            lengths: The rows' lengths, if they are known already.
        """
        chosen = experience.select(rows)
        minibatch = cls(**{f.name: getattr(chosen, f.name) for f in fields(Experience) if f.init})
        for name in set_fields(chosen):
            setattr(minibatch, name, getattr(chosen, name))
        minibatch.reduction = reduction
        minibatch.lengths = chosen.lengths if lengths is None else lengths
        minibatch.weigh()
        return minibatch

    def weigh(self) -> None:
        """Set each token's share of the mean; a response without tokens has none."""
        mask = self.response_mask.float()
        self.n_tokens = mask.sum().clamp(min=1)
        if self.reduction == "token_mean":
            self.weights = mask / self.n_tokens
        elif self.reduction == "sequence_mean":
            self.weights = mask / (mask.sum(1, keepdim=True).clamp(min=1) * mask.any(1).sum().clamp(min=1))
        else:
            self.weights = mask / (self.reduction * len(mask))

    def micro_batches(self, plan: Sequence[Sequence[int]], ranks: int) -> Iterator["Minibatch"]:
        """This rank's micro-batches. An empty one has one row of weight 0, see :func:`rows_or_stand_in`.

        Args:
            plan: Rows of each micro-batch.
            ranks: Number of ranks that share the step.
        """
        self.weigh()  # a callback may have replaced the mask
        self.metrics = {name: value / ranks for name, value in self.metrics.items()}  # every rank has logged them
        for rows in plan:
            micro = self.select(rows_or_stand_in(rows))
            assert isinstance(micro, Minibatch)
            micro.ranks = ranks
            if not rows:
                micro.weights = torch.zeros_like(micro.weights)
            yield micro

    def mean(self, x: Tensor) -> Tensor:
        """This micro-batch's part of the mean of ``x`` over the full optimizer step, as ``loss_reduction`` says.

        The parts, summed over micro-batches and averaged over ranks as gradients are, give the exact mean.

        Shapes:
            (B, T) -> scalar.
        """
        return self.ranks * (x.masked_fill(self.weights == 0, 0.0) * self.weights).sum()

    def log(self, name: str, x: Tensor) -> None:
        """Add the mean of ``x`` over all response tokens of this step to its metrics.

        Shapes:
            x (B, T).
        """
        self.log_all({name: x})

    def log_all(self, means: dict[str, Tensor], extremes: dict[str, Tensor] | None = None) -> None:
        """Add several metrics over all response tokens of this step.

        Args:
            means: Logged under their names, as means.
            extremes: Logged as ``<name>_min`` and ``<name>_max``.

        Shapes:
            (B, T) each.
        """
        outside = self.weights == 0
        for name, x in means.items():
            total = x.detach().masked_fill(outside, 0.0).sum()
            self._add(name, self.ranks * total / self.n_tokens)
        for name, x in (extremes or {}).items():
            low = x.detach().masked_fill(outside, torch.inf).amin()
            high = x.detach().masked_fill(outside, -torch.inf).amax()
            self.least[f"{name}_min"] = torch.minimum(self.least.get(f"{name}_min", low), low)
            self.greatest[f"{name}_max"] = torch.maximum(self.greatest.get(f"{name}_max", high), high)

    def log_parts(self, parts: dict[str, Tensor]) -> None:
        """Add values that are already parts of the step's mean, as losses made with :meth:`mean` are."""
        for name, part in parts.items():
            self._add(name, part)

    def _add(self, name: str, part: Tensor) -> None:
        self.metrics[name] = self.metrics.get(name, torch.zeros_like(part)) + part.detach() / self.ranks


def rows_or_stand_in(rows: Sequence[int]) -> Sequence[int]:
    """Row 0 in place of no rows. Its results do not count: sharded models must run as many forwards on every rank."""
    return rows or [0]


def set_fields(experience: Experience) -> Iterable[str]:
    """Names of the fields that have a value."""
    for f in fields(experience):
        try:
            object.__getattribute__(experience, f.name)
        except AttributeError:
            continue
        yield f.name
