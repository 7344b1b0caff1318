"""Load a reward model and its tokenizer; errors name the argument of ``RewardModel``."""

import math
from pathlib import Path
from typing import Any

from lit_ppo.models.positions import token_limit
from lit_ppo.shown import first_line


def load_classifier(path: str, model_kwargs: dict[str, Any], *, alone: bool = False) -> Any:
    """A frozen sequence classifier in eval mode.

    Args:
        path: Local folder or hub name.
        model_kwargs: Passed to ``from_pretrained``.
        alone: No two texts share a forward.

    Raises:
        ValueError: It cannot be loaded, its head was never trained, or scores depend on the texts beside them.
    """
    from transformers import AutoModelForSequenceClassification  # slow to import; configurations are checked without it

    from lit_ppo.models.family import check_scores_alone
    from lit_ppo.models.pretrained import check_complete, load_pretrained
    from lit_ppo.models.stored import Unusable

    try:
        model, missing = load_pretrained(AutoModelForSequenceClassification, path, **model_kwargs)
    except Unusable as error:
        raise ValueError(f"RewardModel(model={path!r}): {error}") from error
    except (OSError, ValueError) as error:
        raise _cannot_load("model", path, error) from error
    advice = "train it as a reward model first, or name a trained one"
    check_complete(f"RewardModel(model={path!r})", model, missing, advice=advice)
    if not alone:
        check_scores_alone(f"RewardModel(model={path!r})", model.eval())
    return model.eval().requires_grad_(False)


def load_tokenizer(path: str, trust_remote_code: bool, *, needs_offsets: bool) -> Any:
    """A tokenizer that truncates texts at their beginning.

    Args:
        path: Local folder or hub name.
        trust_remote_code: Run code from the folder.
        needs_offsets: It must give the place of each token in the text.

    Raises:
        ValueError: It cannot be loaded, or gives no offsets.
    """
    from transformers import AutoTokenizer

    from lit_ppo.models.pretrained import tokenizer_path

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _cannot_load("tokenizer", path, error) from error
    if needs_offsets and not tokenizer.is_fast:
        raise ValueError(
            f"RewardModel(aggregation='mean'): the tokenizer in {path!r} is not a fast tokenizer and cannot tell which "
            "tokens are the response's; give one with a tokenizer.json, or use aggregation='last'"
        )
    tokenizer.truncation_side = "left"
    return tokenizer


def find_label(label: int | str | None, path: str, config: Any) -> int:
    """The index of a label, given by index or name, or by nothing where the model has only one.

    Args:
        label: The argument.
        path: The model's, for the message.
        config: The model's.

    Raises:
        ValueError: The model has no such label.
    """
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if label is None and len(names) == 1:
        return 0
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return label
    raise ValueError(
        f"RewardModel(label={label!r}): {path!r} has the labels {', '.join(names)}; "
        f"name one of them, or give its index, 0 to {len(names) - 1}"
    )


def max_tokens(model: Any, tokenizer: Any) -> float:
    """The longest text that model and tokenizer can take; tokenizers report 1e30 for "unknown"."""
    return float(min(token_limit(model) or math.inf, tokenizer.model_max_length))


def _cannot_load(argument: str, path: str, error: Exception) -> ValueError:
    is_local = path.startswith(("/", ".", "~")) or path.count("/") > 1 or "\\" in path
    reason = "there is no such folder" if is_local and not Path(path).exists() else first_line(error)
    if "contains custom code" in reason:
        reason = "it contains custom code, which runs only with model_kwargs: {trust_remote_code: true}"
    return ValueError(
        f"RewardModel({argument}={path!r}): cannot be loaded: {reason}; "
        "give a folder that save_pretrained wrote, or the name of a model on the hub"
    )
