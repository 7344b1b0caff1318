"""For callbacks: losses on text batches (PTX, alignment tax), and the exact KL."""

from typing import Any

import torch
from torch import Tensor

from lit_ppo.experience import Experience, rows_or_stand_in
from lit_ppo.functional import to_device
from lit_ppo.models.actor_critic import Actor, actor_forward
from lit_ppo.models.positions import token_limit
from lit_ppo.parallel.ranks import my_micro_batches, n_ranks, sum_over_ranks
from lit_ppo.ppo.optimize import accumulate, total_norm


def backward_on_text(module: Any, batch: dict[str, Tensor], coef: float) -> tuple[float, float]:
    """Add the gradient of ``coef`` times the next-token loss on a text batch to the actor's gradients.

    The actor steps where PPO's own losses make it step. Called before them, this needs no second set of gradients.

    Args:
        module: The LitPPO.
        batch: ``input_ids``, ``attention_mask`` and ``labels`` (-100 where there is nothing to predict), (B, L); the
            same on every rank.
        coef: Weight of the loss.

    Returns:
        The loss without ``coef``, a mean over tokens, and the norm of the added gradient, over all ranks.

    Raises:
        ValueError: The labels are not the ids of the same place, or a text exceeds the actor's token limit.
    """
    actor: Actor = module.actor
    batch, targets, n_tokens = _prepare(actor, batch)
    before = {p: p.grad.clone() for p in actor.parameters() if p.grad is not None}
    total = torch.zeros((), device=module.device)
    micro_batches = my_micro_batches(batch["attention_mask"].sum(1).tolist(), **module.limits)
    for rows in accumulate(micro_batches, module.trainer.strategy):
        loss = _sum_of_losses(actor, batch, targets, rows, module.device) / n_tokens
        module.manual_backward(coef * n_ranks() * loss)
        total += loss.detach()
    added = [p.grad - before[p] if p in before else p.grad for p in actor.parameters() if p.grad is not None]
    found = sum_over_ranks({"loss": total}, alike={"norm": total_norm(added)})
    return found["loss"], found["norm"]


@torch.no_grad()
def loss_on_text(module: Any, batch: dict[str, Tensor]) -> tuple[float, int]:
    """The actor's next-token loss on a text batch; leaves no gradients.

    Args:
        module: The LitPPO.
        batch: See :func:`backward_on_text`.

    Returns:
        The loss over all ranks, a mean over tokens, and the number of tokens.

    Raises:
        ValueError: See :func:`backward_on_text`.
    """
    batch, targets, n_tokens = _prepare(module.actor, batch)
    micro_batches = my_micro_batches(batch["attention_mask"].sum(1).tolist(), **module.limits)
    losses = [_sum_of_losses(module.actor, batch, targets, rows, module.device) for rows in micro_batches]
    return sum_over_ranks({"loss": torch.stack(losses).sum()})["loss"] / n_tokens, n_tokens


def _prepare(actor: Actor, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor, int]:
    """The batch on the host, which tokens are predicted, and how many."""
    batch = {name: tensor.cpu() for name, tensor in batch.items()}
    targets = text_targets(batch, token_limit(actor.model))
    return batch, targets, max(1, int(targets.sum()))


def _sum_of_losses(
    actor: Actor, batch: dict[str, Tensor], targets: Tensor, rows: list[int], device: torch.device
) -> Tensor:
    """Sum over the target tokens of some rows; no rows give 0, by a forward of a row that does not count."""
    some = list(rows_or_stand_in(rows))
    ids, mask = to_device(batch["input_ids"][some], device), batch["attention_mask"][some].bool()
    logprobs: Tensor = actor(ids, mask, target_mask=targets[some])[0]
    return -logprobs.sum() * bool(rows)


def text_targets(batch: dict[str, Tensor], limit: int | None) -> Tensor:
    """Which tokens of a text batch are predicted: those with a label and another token before them.

    Args:
        batch: See :func:`backward_on_text`.
        limit: Token limit of the model; None: unlimited.

    Raises:
        ValueError: See :func:`backward_on_text`.

    Shapes:
        -> (B, L), boolean.
    """
    real = batch["attention_mask"].bool()
    longest = int(real.sum(1).max())
    if limit is not None and longest > limit:
        raise ValueError(
            f"backward_on_text: a text of {longest} tokens exceeds the token limit of the actor, {limit}; lower the "
            "data's max_length"
        )
    targets = (batch["labels"] != -100) & real & (real.cumsum(1) > 1)
    if (batch["labels"] != batch["input_ids"])[targets].any():
        raise ValueError(
            "backward_on_text: labels must be input_ids, or -100 where there is nothing to predict; do not shift them"
        )
    return targets


def exact_kl(module: Any, minibatch: Experience) -> Tensor:
    """KL of the actor to the reference over the whole vocabulary, per token and differentiable.

    Args:
        module: The LitPPO.
        minibatch: Rows of one micro-batch.

    Raises:
        ValueError: There is no reference.

    Shapes:
        -> (B, T).
    """
    if module.reference is None:
        raise ValueError("exact_kl: there is no reference; give LitPPO one")
    inputs = minibatch.model_inputs()
    ids, mask, target_mask = inputs
    with torch.no_grad():
        head = module.reference(ids, mask, target_mask=target_mask, head_inputs=True)
    n_columns = minibatch.response_ids.shape[1]
    return actor_forward(module.actor, inputs, n_columns, module.temperature, kl_to=head)[1]
