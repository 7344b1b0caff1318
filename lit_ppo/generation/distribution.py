"""Which generation settings sample from another distribution than the model's own."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    PreTrainedModel,
    TemperatureLogitsWarper,
)

from lit_ppo.generation.config import neutral, stop_ids
from lit_ppo.generation.transformers import call_generate
from lit_ppo.shown import first_line
from lit_ppo.validate import refuse

KEEP_DISTRIBUTION = (TemperatureLogitsWarper, LogitNormalization, InfNanRemoveLogitsProcessor)


def reshaping_fields(model: PreTrainedModel, config: GenerationConfig, generation: dict[str, Any]) -> list[str]:
    """Fields with which sampling draws from another distribution than the one whose log-probs PPO compares.

    They are those for which transformers builds a logits processor that does more than apply the temperature. No
    forward runs.

    Args:
        model: Causal LM.
        config: From :func:`lit_ppo.generation.config.generation_config`.
        generation: The user's fields.

    Raises:
        ValueError: transformers refuses a field's value.
    """
    found = []
    one_token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    for name, value in generation.items():
        built: list[Any] = []

        def decode(model: Any, input_ids: Tensor, logits_processor: Any, built: list[Any] = built, **_: Any) -> None:
            built.extend(logits_processor)

        special = {"eos_token_id": stop_ids(config) or None, "pad_token_id": config.pad_token_id}
        alone = neutral(max_new_tokens=config.max_new_tokens, **special)
        setattr(alone, name, getattr(config, name))
        try:
            call_generate(model, one_token, torch.ones_like(one_token, dtype=torch.bool), alone, decode)
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            refuse("LitPPO", "generation", {name: value}, f"{first_line(error)}; leave it out or correct it")
        holds_nothing_back = (name, value) == ("min_new_tokens", 0)  # transformers builds a processor all the same
        if any(not isinstance(processor, KEEP_DISTRIBUTION) for processor in built) and not holds_nothing_back:
            found.append(name)
    return found
