"""Checks of the fields of ``generation``: their types and ranges, and their token ids once the vocabulary is known."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch.compiler import list_backends
from transformers import CompileConfig

from lit_ppo.validate import boolean, integer, mapping, number, one_of, plain, refuse

LONGEST_RESPONSE = 2**24
Check = Callable[[object, str, Any], Any]

_id = partial(integer, at_least=0)
_count = partial(integer, at_least=0)
_share = partial(number, at_least=0, below=1)


def _ngram(owner: object, name: str, value: Any) -> int:
    """Tokens that may not come twice together; 0: off."""
    if (size := _count(owner, name, value)) == 1:
        problem = "forbids the padding token where a prompt is shorter than others of its batch; give 2 or more"
        refuse(owner, name, value, problem)
    return size


def _ids(owner: object, name: str, value: Any) -> list[int]:
    """A list of token ids, at least one."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(values, list | tuple | set) or not values:
        refuse(owner, name, value, "must be a list of token ids, at least one; or leave it out")
    return [_id(owner, name, entry) for entry in values]


def _id_or_ids(owner: object, name: str, value: Any) -> int | list[int]:
    value = plain(value)
    several = isinstance(value, list | tuple) or hasattr(value, "tolist")
    return _ids(owner, name, value) if several else _id(owner, name, value)


def _words(owner: object, name: str, value: Any) -> list[list[int]]:
    """A list of words, each a list of token ids."""
    if not isinstance(value, list | tuple) or not value:
        refuse(owner, name, value, "must be a list of words, each a list of token ids; or leave it out")
    return [_ids(owner, name, word) for word in value]


def _compile_config(owner: object, name: str, value: Any) -> dict[str, Any]:
    """Arguments of ``torch.compile``, with the names and defaults of ``transformers.CompileConfig``."""
    given = mapping(owner, name, value.to_dict() if isinstance(value, CompileConfig) else value)
    for key, entry in given.items():
        entry = plain(entry)
        if key not in COMPILING:
            refuse(owner, name, value, f"has no field {key!r}; the fields are {', '.join(COMPILING)}")
        if entry is not None:
            given[key] = COMPILING[key](owner, f"{name}.{key}", entry)
    if given.get("options") and given.get("mode") not in (None, "reduce-overhead"):
        refuse(owner, name, value, "has both mode and options, which torch.compile does not take; give one of them")
    return given


def _backend(owner: object, name: str, value: Any) -> Any:
    return one_of(owner, name, value, list_backends(exclude_tags=()))


COMPILING: dict[str, Check] = {
    "fullgraph": boolean,
    "dynamic": boolean,
    "backend": _backend,
    "mode": partial(one_of, choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")),
    "options": mapping,
}

# Fields that are not here are left to transformers.
CHECKS: dict[str, Check] = {
    "min_new_tokens": partial(integer, at_least=0, at_most=LONGEST_RESPONSE),
    "top_k": _count,  # 0 is off
    "no_repeat_ngram_size": _ngram,
    "encoder_no_repeat_ngram_size": _ngram,
    "top_p": partial(number, above=0, at_most=1),
    "top_h": partial(number, above=0, at_most=1),
    "min_p": partial(number, at_least=0, at_most=1),
    "typical_p": partial(number, above=0, at_most=1),
    "epsilon_cutoff": _share,
    "eta_cutoff": _share,
    "repetition_penalty": partial(number, above=0),
    "length_penalty": number,
    "diversity_penalty": number,
    "penalty_alpha": partial(number, at_least=0, at_most=1),
    "num_beams": integer,
    "num_beam_groups": integer,
    "eos_token_id": _id_or_ids,
    "pad_token_id": _id,
    "bos_token_id": _id,
    "decoder_start_token_id": _id,
    "forced_bos_token_id": _id,
    "forced_eos_token_id": _id_or_ids,
    "suppress_tokens": _ids,
    "begin_suppress_tokens": _ids,
    "bad_words_ids": _words,
    "cache_implementation": partial(one_of, choices=("static", "dynamic")),
    "compile_config": _compile_config,
    **dict.fromkeys(
        (
            "renormalize_logits", "remove_invalid_values", "token_healing", "low_memory", "return_dict_in_generate",
            "output_attentions", "output_hidden_states", "output_scores", "output_logits", "disable_compile",
        ),
        boolean,
    ),
}  # fmt: skip


def checked_field(owner: object, name: str, value: Any) -> Any:
    """A field's value, with scalars of numpy and torch as Python's.

    Raises:
        ValueError: Names class, field and value, and says what is allowed.
    """
    value = plain(value)
    return value if value is None or name not in CHECKS else CHECKS[name](owner, f"generation.{name}", value)


def check_vocabulary(owner: object, generation: dict[str, Any], stops: list[int], size: int) -> None:
    """Check the user's token ids against the vocabulary of the actor.

    Args:
        owner: The object with the argument, for messages.
        generation: From :func:`checked_field`.
        stops: Tokens that end a response, which ``min_new_tokens`` holds back.
        size: Tokens in the vocabulary.

    Raises:
        ValueError: An id is outside the vocabulary, or no token is left to sample.
    """
    for name, value in generation.items():
        if name.endswith("_token_id") or name in ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids"):
            for token in _flat(value):
                if token >= size:
                    problem = f"the actor's vocabulary has no token {token}; its ids are 0 to {size - 1}"
                    refuse(owner, f"generation.{name}", value, problem)
    given = {name: generation[name] for name in ("suppress_tokens", "begin_suppress_tokens") if generation.get(name)}
    words = [word[0] for word in generation.get("bad_words_ids") or [] if len(word) == 1]
    held_back = stops if generation.get("min_new_tokens") else []
    if len({*_flat(list(given.values())), *words, *held_back}) >= size:
        which = next(iter(given), "bad_words_ids")
        refuse(owner, f"generation.{which}", generation.get(which), "leaves no token to sample; suppress fewer")


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for entry in value:
            yield from _flat(entry)
    elif value is not None:
        yield value
