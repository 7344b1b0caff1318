"""What users hand over: everything that ``rollout`` takes as prompts, and the scored experience of ``step``."""

import copy
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn
from weakref import ref

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_ppo.callbacks.base import PPOCallback
from lit_ppo.data.batch import PromptBatch
from lit_ppo.data.chat import Options
from lit_ppo.data.encoding import encode_prompts
from lit_ppo.data.objects import messages_as_lists
from lit_ppo.data.table import WRITTEN_CHAT
from lit_ppo.experience import Experience, set_fields
from lit_ppo.generation.config import end_of_turn, stop_ids
from lit_ppo.parallel.ranks import gather_shares
from lit_ppo.rewards import check_columns
from lit_ppo.rewards.function import check_scores
from lit_ppo.validate import refuse

ACCEPTED = (
    "give strings, lists of chat messages, rows or a mapping with a column 'prompt', or a mapping with 'input_ids' and "
    "'attention_mask'"
)


def as_batch(prompts: Any, tokenizer: PreTrainedTokenizerBase, options: Options | None = None) -> PromptBatch:
    """A batch of encoded prompts.

    Args:
        prompts: A batch of a ``PromptDataModule``; strings; lists of chat messages; a mapping of columns, or a list of
            rows, with ``prompt`` (either kind) or with ``input_ids`` and ``attention_mask``, whose other columns go to
            the reward; an ``Experience`` (the first row of each group).
        tokenizer: The actor's.
        options: Variables of the chat template.

    Raises:
        ValueError: Anything else; names its keys or types.
    """
    if isinstance(prompts, PromptBatch):
        return prompts
    if isinstance(prompts, Experience):
        return _first_of_groups(prompts)
    if isinstance(prompts, Mapping):
        return _of_columns(dict(prompts), tokenizer, options)
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        _refuse(prompts, "is one prompt" if isinstance(prompts, str) else f"is {type(prompts).__name__}")
    if isinstance(prompts, Tensor):
        _refuse(f"tensor of shape {tuple(prompts.shape)}", "has no mask that tells prompts from padding")
    rows = list(prompts)
    if rows and all(isinstance(row, Mapping) for row in rows):
        return _of_columns(_columns(rows), tokenizer, options)
    return _encoded(rows, {}, tokenizer, options)


def _refuse(prompts: object, problem: str) -> NoReturn:
    raise ValueError(f"rollout(prompts={' '.join(str(prompts).split())[:80]}): {problem}; {ACCEPTED}")


def _first_of_groups(experience: Experience) -> PromptBatch:
    first_of_group = {group: row for row, group in reversed(list(enumerate(experience.group.tolist())))}
    first = experience.select(sorted(first_of_group.values()))
    ids = [row[mask].tolist() for row, mask in zip(first.prompt_ids, first.prompt_mask, strict=True)]
    return PromptBatch(first.prompts, ids, first.prompt_index, first.columns)


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as columns; a row without a value for one has None there, but each row has a prompt."""
    if all({"role", "content"} <= row.keys() for row in rows):
        _refuse(rows, "is one chat prompt")
    names = dict.fromkeys(name for row in rows for name in row)
    for name in {"prompt", "input_ids"} & names.keys():
        lacking = [number for number, row in enumerate(rows) if row.get(name) is None]
        if lacking:
            _refuse(rows[lacking[0]], f"row {lacking[0]} has no {name!r}, others have")
    return {name: [row.get(name) for row in rows] for name in names}


def _of_columns(columns: dict[str, Any], tokenizer: PreTrainedTokenizerBase, options: Options | None) -> PromptBatch:
    keys = ", ".join(map(repr, columns))
    given = [name for name in ("prompt", "input_ids") if name in columns]
    if len(given) != 1:
        _refuse(f"a mapping with {keys}", "has both prompts and their tokens" if given else "has no column of prompts")
    prompts, mask = columns.pop(given[0]), columns.pop("attention_mask", None) if given == ["input_ids"] else None
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        _refuse(f"a mapping with {keys}", f"{given[0]!r} is {type(prompts).__name__}, not one value per prompt")
    prompts = list(prompts)
    if prompts and all(isinstance(turn, Mapping) and isinstance(turn.get("role"), list | tuple) for turn in prompts):
        prompts = list(map(list, zip(*map(_rows, prompts), strict=True)))  # chats of as many turns, collated by torch
    others = {}
    for name, values in columns.items():
        others[name] = _listed(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
        if len(others[name]) != len(prompts):
            count = len(others[name]) or "no"
            _refuse(f"a mapping with {keys}", f"{name!r} has {count} values for {len(prompts)} prompts")
    if mask is None and given == ["prompt"]:
        return _encoded(prompts, others, tokenizer, options)
    return _of_tokens(prompts, mask, others, tokenizer)


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A mapping of columns as rows: what the default collation of torch makes of a mapping in each row."""
    parts = {name: _listed(values) for name, values in columns.items()}
    return [dict(zip(parts, row, strict=True)) for row in zip(*parts.values(), strict=True)]


def _listed(values: Any) -> list[Any]:
    """The values of a column, one per row."""
    if isinstance(values, Mapping):
        return _rows(values)
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _encoded(
    prompts: list[Any], columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, options: Options | None
) -> PromptBatch:
    prompts = list(map(messages_as_lists, prompts))
    for number, prompt in enumerate(prompts):
        messages = isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt)
        if not isinstance(prompt, str) and not messages:
            _refuse(repr(prompt), f"prompt {number} is neither text nor a list of messages with 'role' and 'content'")
        if isinstance(prompt, str) and WRITTEN_CHAT.fullmatch(prompt):
            _refuse(prompt, f"prompt {number} is chat messages written as text; parse it first")
    chat = bool(prompts) and not isinstance(prompts[0], str)
    if "messages" in columns:
        _refuse("a mapping with 'prompt', 'messages'", "chat prompts go to the reward as 'messages'; rename the column")
    texts, ids = encode_prompts(tokenizer, prompts, where="rollout(prompts)", options=options)
    columns = {**columns, "messages": prompts} if chat else columns
    return PromptBatch(texts, ids, torch.arange(len(texts)), columns)


def _is_message(message: Any) -> bool:
    """Whether this is a chat message. A collated one has lists of many rows' values."""
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


def _of_tokens(
    rows: list[Any], mask: Any, columns: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> PromptBatch:
    """Token prompts; the mask may have its padding on either side."""
    ids = [list(map(int, row)) for row in rows]
    keep = [[1] * len(row) for row in ids] if mask is None else [list(map(int, row)) for row in mask]
    if mask is None and all(isinstance(row, Tensor) for row in rows) and any(tokenizer.pad_token_id in r for r in ids):
        _refuse("a mapping with 'input_ids'", "there is padding, but no 'attention_mask'")
    if list(map(len, keep)) != list(map(len, ids)) or any(value not in (0, 1) for row in keep for value in row):
        _refuse("a mapping with 'input_ids', 'attention_mask'", "the mask is not one 0 or 1 per token")
    ids = [[token for token, kept in zip(*pair, strict=True) if kept] for pair in zip(ids, keep, strict=True)]
    for number, row in enumerate(ids):
        if not row or min(row) < 0 or max(row) >= len(tokenizer):
            _refuse(row, f"prompt {number} has " + ("an id outside the tokenizer's vocabulary" if row else "no token"))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return PromptBatch(texts, ids, torch.arange(len(ids)), columns)


def checked_batch(module: Any, prompts: Any) -> PromptBatch:
    """The prompts of an update as a batch; in the first one, size and columns are checked.

    Only some data modules tell these before training starts. In a loop of the user's own, both are the user's affair.
    """
    batch = as_batch(prompts, module.tokenizer, module.chat_template_kwargs)
    if module.rollouts == 0 and not module.loop:
        told = getattr(
            module.trainer.datamodule, "batch_size", None
        )  # the data may be fewer, and then are one minibatch
        check_batch(module, module.minibatch_size, module.samples_per_prompt, told or len(batch))
        rows = len(batch) * module.samples_per_prompt
        if rows < module.minibatch_size:
            rank_zero_warn(
                f"LitPPO(minibatch_size={module.minibatch_size}): the data give an update only {rows} responses"
            )
        check_columns(batch.columns, module.rewards)
    return batch


def check_batch(owner: object, minibatch_size: int, samples_per_prompt: int, batch_size: int | None) -> None:
    """Refuse a minibatch that no update can fill.

    Args:
        owner: The module.
        minibatch_size: Responses in a minibatch.
        samples_per_prompt: Responses per prompt.
        batch_size: Prompts per update; None: unknown.
    """
    rows = (batch_size or 0) * samples_per_prompt
    if batch_size is not None and minibatch_size > rows:
        refuse(
            owner, "minibatch_size", minibatch_size,
            f"more than the {rows} responses of an update ({batch_size} prompts x {samples_per_prompt}); lower it, or "
            "raise the data's batch_size",
        )  # fmt: skip


class Origin(ref[Any]):
    """The LitPPO that rolled out an experience, a weak reference. Copies, and what is read from a file, have none."""

    loop: Any = None
    """The loop of the user's own, if any, whose callbacks have seen the rollout."""

    def __reduce__(self) -> Any:
        return type(None), ()


def checked_experience(module: Any, experience: Experience) -> Experience:
    """A copy of what ``step`` was given, with all that an update reads, on the module's device.

    Args:
        module: The LitPPO, in a loop of the user's own.
        experience: Its own, with scores.

    Raises:
        ValueError: The module cannot learn from it, or ranks were given different ones.
    """
    ready: list[Experience] = []

    def digest() -> int:
        ready.append(_complete(module, experience))
        parts = (ready[0].prompt_ids, ready[0].response_ids, ready[0].response_mask, ready[0].scores)
        return zlib.crc32(b"".join(part.cpu().numpy().tobytes() for part in parts))

    if len(set(gather_shares(digest))) > 1:
        _refuse_experience(module, "ranks were given different responses or scores; broadcast one rank's scores")
    return ready[0]


def _complete(module: Any, experience: Experience) -> Experience:
    if not isinstance(experience, Experience):
        raise TypeError(f"{type(module).__name__}.step(experience={experience!r}): give what rollout returns")
    found = set(set_fields(experience))
    if not len(experience):
        _refuse_experience(module, "it has no rows")
    if not {"logprobs", "values", "kl"} <= found:
        _refuse_experience(module, "it has no log-probs; roll out with logprobs=True")
    if "scores" not in found:
        _refuse_experience(module, "it has no scores; set experience.scores to one number per response")
    origin: Origin = experience.origin or Origin(module)
    foreign = origin.loop not in (None, module.loop) or origin() is not module
    if foreign or (experience.values is None) != (module.critic is None):
        _refuse_experience(module, "it is of another run or another module; roll out again")
    if origin.loop is None and (hook := _hook_of_rollouts(module.trainer)):
        _refuse_experience(module, f"{hook} has not seen its rollout; roll out after attach, with the default options")
    asked = {"critic_states": module.n_critic_states, "action_ids": module.n_actions}
    for name in (name for name, n in asked.items() if n and experience.extras.get(name) is None):
        problem = f"it has no {name}, which a callback asks of rollouts"
        _refuse_experience(module, f"{problem}; roll out after attach, with the default options, and step once with it")
    if len(experience) < module.minibatch_size:
        rank_zero_warn(
            f"{type(module).__name__}.step: {len(experience)} rows make one minibatch, which is smaller than "
            f"minibatch_size={module.minibatch_size}"
        )
    ready = copy.copy(experience)
    ready.extras = dict(experience.extras)
    experience.extras |= {name: None for name in asked if name in experience.extras}  # a second step would count twice
    for name in ("scores", "raw_scores") if "raw_scores" in found else ("scores",):
        given = getattr(experience, name)
        setattr(ready, name, check_scores(given, len(experience), f"experience.{name}", experience.responses))
    if "raw_scores" not in found:
        ready.raw_scores = ready.scores
    for name in set_fields(ready):
        if isinstance(value := getattr(ready, name), Tensor):
            setattr(ready, name, value.to(module.device))
    return ready


def _hook_of_rollouts(trainer: Any) -> str | None:
    """A callback's hook before ``on_scores``, if there is one."""
    for callback in trainer.callbacks:
        for hook in ("on_rollout_start", "on_rollout_end"):
            function = getattr(callback, hook, None)
            if function is not None and getattr(function, "__func__", None) is not getattr(PPOCallback, hook):
                return f"{type(callback).__name__}.{hook}"
    return None


def _refuse_experience(module: Any, problem: str) -> NoReturn:
    raise ValueError(f"{type(module).__name__}.step(experience): {problem}")


def check_end_of_turn(module: Any, prompts: Any) -> None:
    """Warn if the chat template ends a turn with a special token that ends no response."""
    end = end_of_turn(module.tokenizer) if "messages" in getattr(prompts, "columns", {}) else None
    if end is not None and end not in stop_ids(module.generation):
        rank_zero_warn(
            f"LitPPO(generation): the chat template ends a turn with {module.tokenizer.convert_ids_to_tokens(end)!r} "
            f"(id {end}), which ends no response; give eos_token_id: {[*stop_ids(module.generation), end]}"
        )
