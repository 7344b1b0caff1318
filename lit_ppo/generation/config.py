"""What users may ask of generation, and the neutral configuration that sampling starts from."""

from typing import Any, NoReturn

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from lit_ppo.parallel.isolated import isolated
from lit_ppo.shown import first_line
from lit_ppo.validate import integer, refuse

# transformers' own defaults for what is unset are neutral, except for this one
NEUTRAL: dict[str, Any] = {"do_sample": True, "top_k": 0}
ELSEWHERE = {
    "temperature": "it is LitPPO's own argument, since log-probs use it too",
    "do_sample": "training always samples; rollout(do_sample=False) is greedy",
    "max_length": "give max_new_tokens, which does not depend on the prompt",
    "min_length": "give min_new_tokens, which does not depend on the prompt",
    "num_return_sequences": "it is LitPPO's samples_per_prompt",
    "stop_strings": "responses end in a token: give eos_token_id, a list of ids if there are several",
    "use_cache": "sampling needs it",
    "max_time": "it would make samples depend on the clock",
    "guidance_scale": "it mixes in a second distribution, without the prompt, which log-probs would not know",
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
        if name in ELSEWHERE and (name, value) not in (("guidance_scale", None), ("guidance_scale", 1)):
            refuse("LitPPO", "generation", {name: value}, f"{name} is not set here; {ELSEWHERE[name]}")
        if name not in known:
            refuse("LitPPO", "generation", {name: value}, f"transformers.GenerationConfig has no field {name!r}")
    integer("LitPPO", "generation.max_new_tokens", generation.get("max_new_tokens"))
    try:
        mode = neutral(**generation).get_generation_mode()
    except (ValueError, TypeError) as error:
        refuse("LitPPO", "generation", generation, f"{first_line(error)}; correct it or leave it out")
    if mode != GenerationMode.SAMPLE:
        refuse("LitPPO", "generation", generation, f"asks for {mode.value}; PPO needs plain sampling")


def neutral(**fields: Any) -> GenerationConfig:
    """A configuration that samples from the model's own distribution, with some fields set."""
    return GenerationConfig(**{**NEUTRAL, **fields})


def generation_config(
    generation: dict[str, Any], temperature: float, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """A neutral configuration with the user's fields; only the stop and start ids of the checkpoint are kept.

    Args:
        generation: The user's fields.
        temperature: Of sampling and of all log-probs.
        model: Its checkpoint names stop ids, and so may its tokenizer: a response ends at any of them.
        tokenizer: Also names the pad id.
    """
    ids = {
        "eos_token_id": named_stops(model, tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return neutral(**{**ids, **generation, "temperature": temperature})


def say_stops(
    config: GenerationConfig, generation: dict[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> str:
    """One line that names the stop tokens of a run; the arguments are those of :func:`generation_config`."""
    sources = {} if "eos_token_id" in generation else stop_sources(model, tokenizer)
    named = [
        f"{tokenizer.convert_ids_to_tokens(stop)!r} (id {stop}, {' and '.join(sources.get(stop, ['generation']))})"
        for stop in stop_ids(config)
    ]
    return (
        f"Responses end at {', '.join(named)}" if named else "Responses end at max_new_tokens: no stop token is named"
    )


def stop_ids(config: GenerationConfig) -> list[int]:
    """The tokens that end a response."""
    ids = config.eos_token_id
    return [int(i) for i in (ids if isinstance(ids, list | tuple) else [ids]) if i is not None]


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that a chat template puts behind the assistant's words; None: it puts none, or fails."""
    words = "litppo"
    turns = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]

    def fail(_: int, problem: str) -> NoReturn:
        raise ValueError(problem)

    try:
        [text] = isolated(lambda _: str(tokenizer.apply_chat_template(turns, tokenize=False)), 1, fail)
    except Exception:  # the template's own code; rendering the prompts says what is wrong
        return None
    behind = tokenizer(text.rpartition(words)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}
    return next((int(token) for token in behind if token in special), None)


def named_stops(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: int | None = None
) -> int | list[int] | None:
    """All stop tokens that a checkpoint or its tokenizer names, as ``eos_token_id``.

    Args:
        model: Its generation config is read.
        tokenizer: Its end-of-sequence token comes before the model's.
        first: Another one that comes before both.
    """
    stops = list(dict.fromkeys([*([] if first is None else [first]), *stop_sources(model, tokenizer)]))
    return stops[0] if len(stops) == 1 else stops or None


def stop_sources(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[int, list[str]]:
    """The stop tokens that a checkpoint names, and where: its tokenizer, its generation_config.json, or both."""
    own: Any = model.generation_config
    sources: dict[int, list[str]] = {}
    for where, ids in (("tokenizer", tokenizer.eos_token_id), ("generation_config", own and own.eos_token_id)):
        for token_id in ids if isinstance(ids, list | tuple) else [ids]:
            if token_id is not None:
                sources.setdefault(int(token_id), []).append(where)
    return sources
