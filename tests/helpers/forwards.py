"""What actor and critic compute, and how often."""

from typing import Any

from torch import Tensor, nn

from lit_ppo.models.actor_critic import actor_forward, critic_forward


def logprobs_of(module: Any, rows: Any) -> Tensor:
    """The actor's log-probs of the response tokens, (B, T)."""
    n_columns = rows.response_ids.shape[1]
    return actor_forward(module.actor, rows.model_inputs(), n_columns, module.temperature)[0]


def values_of(module: Any, rows: Any) -> Tensor:
    """The critic's values of the response tokens, (B, T)."""
    return critic_forward(module.critic, rows.model_inputs(), rows.response_ids.shape[1])


def sizes_of_forwards(model: nn.Module) -> list[int]:
    """A list that gets the rows of each forward of an actor or a critic from now on; sampling runs none of these."""
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])))
    return sizes
