"""Let the reference follow the actor."""

from typing import Any

import lightning as L
import torch

from lit_ppo.callbacks.base import ExperienceLike, PPOCallback, PPOModule
from lit_ppo.callbacks.checks import refuse_beside, require, require_model
from lit_ppo.constructor import constructor
from lit_ppo.functional import moving_average
from lit_ppo.validate import exactly_one, fraction_or_none, integer


class ReferenceUpdate(PPOCallback):
    """Moves the reference to the actor, completely every few updates or partly after each update.

    Use it when the KL to the start keeps the policy from states where the reward still grows: the penalty then limits
    how fast the policy moves, not how far. Costs one pass over the weights each time, and the size of the reference in
    each checkpoint. Needs a reference with the same architecture as the actor, in float32.

    Args:
        every: Copy the actor every so many updates; the KL starts at 0 again. Give this or ``decay``.
        decay: Moving average after each update: the weight of the reference; the rest is the weight of the actor.
            With 0.99 the reference is about 100 updates behind.

    Reads ``pl_module.actor``; writes ``pl_module.reference``, and ``pl_module.checkpoint_reference`` so that
    checkpoints contain it. The module logs the KL to the moved reference as ``objective/kl``.
    Source: Gorbatovski et al. 2024, arXiv:2404.09656 (hard and soft update); Ramé et al. 2024,
    arXiv:2406.16768 (moving average as the anchor).
    """

    @constructor
    def __init__(self, every: int | None = None, decay: float | None = None) -> None:
        exactly_one(self, every=every, decay=decay)
        self.every = None if every is None else integer(self, "every", every)
        self.decay = fraction_or_none(self, "decay", decay)
        self._done = 0

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        refuse_beside(self, trainer, ReferenceUpdate, why="both would move the reference")
        pl_module.checkpoint_reference = True

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        require(self, pl_module, "actor")
        require_model(self, pl_module, "reference")
        wrong = _unlike(_parameters(pl_module.actor), _parameters(pl_module.reference))
        if wrong is not None:
            raise ValueError(
                f"ReferenceUpdate cannot move {type(pl_module).__name__}'s reference to its actor: {wrong}"
            )

    @torch.no_grad()
    def on_update_end(self, trainer: L.Trainer, pl_module: PPOModule, experience: ExperienceLike) -> None:
        self._done += 1
        if self.every is not None and self._done % self.every:
            return
        actor = _parameters(pl_module.actor)
        for name, reference in _parameters(pl_module.reference).items():
            new = actor[name].to(reference.dtype)
            reference.copy_(new if self.decay is None else moving_average(reference, new, self.decay))

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._done = state_dict["done"]


def _parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters by name, tied ones once. Buffers of language models are constants."""
    return dict(model.named_parameters()) if hasattr(model, "named_parameters") else {}


def _unlike(actor: dict[str, torch.nn.Parameter], reference: dict[str, torch.nn.Parameter]) -> str | None:
    """The reason why the reference cannot take the weights of the actor, or None."""
    shared = [name for name, parameter in actor.items() if any(parameter is other for other in reference.values())]
    if shared:
        return f"they share {shared[0]}, so there is no second copy to move; train the full actor, without an adapter"
    shapes = [{name: tuple(parameter.shape) for name, parameter in model.items()} for model in (actor, reference)]
    for name in {**shapes[0], **shapes[1]}:
        ours, theirs = (shape.get(name, "missing") for shape in shapes)
        if ours != theirs:
            return f"{name} is {ours} in the actor, {theirs} in the reference; use the same architecture"
    low = {parameter.dtype for parameter in reference.values()} - {torch.float32, torch.float64}
    if low:
        return f"the reference is in {low.pop()}, which rounds small changes away; use reference_dtype='float32'"
    return None
