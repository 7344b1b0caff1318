"""What users may ask of generation, and the neutral configuration that sampling starts from."""

from typing import Any, NoReturn

from transformers import CompileConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from lit_ppo.generation.fields import LONGEST_RESPONSE, check_vocabulary, checked_field
from lit_ppo.parallel.isolated import isolated
from lit_ppo.shown import message_of
from lit_ppo.validate import integer, mapping, refuse

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
    "max_cache_len": "the cache has the size of prompt and max_new_tokens",
    "cache_config": "it is for quantized caches, which change the distribution",
    "max_time": "it would make samples depend on the clock",
    "guidance_scale": "it mixes in a second distribution, without the prompt, which log-probs would not know",
    "encoder_repetition_penalty": "it takes the padding of shorter prompts for a token of theirs, so that samples "
    "would depend on the other rows of a batch; give repetition_penalty",
}
MAY_BE_OFF = ("guidance_scale", "encoder_repetition_penalty")  # by None or 1


def checked_generation(owner: object, generation: Any) -> dict[str, Any]:
    """The argument ``generation``, checked before any model is loaded.

    Args:
        owner: The object with the argument, for messages.
        generation: Fields of ``transformers.GenerationConfig``.

    Raises:
        ValueError: An unknown field, one that is set elsewhere, a value out of range, or a mode other than sampling.
    """
    known = GenerationConfig().to_dict()
    if generation is None:
        refuse(owner, "generation", None, "give at least {max_new_tokens: 64}, the most tokens of a response")
    fields = mapping(owner, "generation", generation)
    for name, value in fields.items():
        if name in ELSEWHERE and not (name in MAY_BE_OFF and value in (None, 1)):
            refuse(owner, "generation", {name: value}, f"{name} is not set here; {ELSEWHERE[name]}")
        if name not in known:
            refuse(owner, "generation", {name: value}, f"transformers.GenerationConfig has no field {name!r}")
    fields = {name: checked_field(owner, name, value) for name, value in fields.items()}
    longest = integer(owner, "generation.max_new_tokens", fields.get("max_new_tokens"), at_most=LONGEST_RESPONSE)
    if (least := fields.get("min_new_tokens")) is not None and least > longest:
        refuse(owner, "generation.min_new_tokens", least, f"must be at most max_new_tokens={longest}")
    if fields.get("compile_config") is not None:
        for name, value in (("cache_implementation", "dynamic"), ("disable_compile", True)):
            if fields.get(name) == value:
                problem = "compile_config compiles the step on a static cache; leave one of them out"
                refuse(owner, "generation", {name: value}, problem)
    try:
        mode = neutral(**fields).get_generation_mode()
    except Exception as error:  # transformers' own checks
        refuse(owner, "generation", fields, f"{message_of(error)}; correct it or leave it out")
    if mode != GenerationMode.SAMPLE:
        refuse(owner, "generation", fields, f"asks for {mode.value}; PPO needs plain sampling")
    return fields


def neutral(**fields: Any) -> GenerationConfig:
    """A configuration that samples from the model's own distribution, with some fields set."""
    if isinstance(compiling := fields.get("compile_config"), dict):
        fields["compile_config"] = CompileConfig(**{"mode": "default", **compiling})
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
    config = neutral(**{**ids, **generation, "temperature": temperature})
    check_vocabulary("LitPPO", generation, stop_ids(config), model.config.get_text_config().vocab_size)
    return config


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
