"""What users may ask of generation, and the neutral configuration that sampling starts from."""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from lit_ppo.validate import integer, refuse

# Everything that changes the distribution is off: a checkpoint's own settings must not be inherited.
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "use_cache": True,
}
FILTERS = ("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
ELSEWHERE = {
    "temperature": "it is LitPPO's own argument, since log-probs use it too",
    "do_sample": "training always samples; rollout(do_sample=False) is greedy",
    "max_length": "give max_new_tokens, which does not depend on the prompt",
    "min_length": "give min_new_tokens, which does not depend on the prompt",
    "num_return_sequences": "it is LitPPO's samples_per_prompt",
    "stop_strings": "responses end in a token: give eos_token_id, a list of ids if there are several",
    "use_cache": "sampling needs it",
    "max_time": "it would make samples depend on the clock",
}


def check_generation(generation: dict[str, Any]) -> None:
    """Check the user's generation settings before any model is loaded.

    Args:
        generation: Fields of ``transformers.GenerationConfig``.

    Raises:
        ValueError: An unknown field, one that is set elsewhere, or a mode other than sampling.
    """
    known = GenerationConfig().to_dict()
    for name, value in generation.items():
        if name in ELSEWHERE:
            refuse("LitPPO", "generation", {name: value}, f"{name} is not set here; {ELSEWHERE[name]}")
        if name not in known:
            refuse("LitPPO", "generation", {name: value}, f"transformers.GenerationConfig has no field {name!r}")
    integer("LitPPO", "generation.max_new_tokens", generation.get("max_new_tokens"))
    mode = GenerationConfig(**{**NEUTRAL, **generation, "do_sample": True}).get_generation_mode()
    if mode != GenerationMode.SAMPLE:
        refuse("LitPPO", "generation", generation, f"asks for {mode.value}; PPO needs plain sampling")


def reshaping_fields(generation: dict[str, Any]) -> list[str]:
    """Fields with which sampling draws from another distribution than the one whose log-probs PPO compares."""
    suspects = (*FILTERS, "repetition_penalty", "no_repeat_ngram_size")
    given = {name: value for name, value in generation.items() if name in suspects and value is not None}
    return [name for name, value in given.items() if name not in NEUTRAL or value != NEUTRAL[name]]


def generation_config(
    generation: dict[str, Any], temperature: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """A neutral configuration with the user's fields; only the stop and start ids of the checkpoint are kept.

    Args:
        generation: The user's fields.
        temperature: Of sampling and of all log-probs.
        model: Its checkpoint names the stop ids.
        tokenizer: Names the pad id, and the stop id where the checkpoint has none.
    """
    own = model.generation_config
    stop = own.eos_token_id if own is not None and own.eos_token_id is not None else tokenizer.eos_token_id
    ids = {"eos_token_id": stop, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**{**NEUTRAL, **ids, **generation, "do_sample": True, "temperature": temperature})
