"""Values as text that is the same in every process and on every machine, to compare data by."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the text of objects that have no other


def as_json(value: Any) -> str:
    r"""JSON of a value, names sorted; so are sets, whose own order differs between processes.

    Arrays are lists. Other values that JSON lacks are their text, without an address in memory.

    >>> as_json({"tags": {"b", "a"}, "of": object()})
    '{"of": "<object object>", "tags": ["a", "b"]}'
    >>> as_json({1: "a", "b": 2})  # names of several types
    '{"\\"b\\"": 2, "1": "a"}'
    """
    try:
        return json.dumps(value, sort_keys=True, default=_of_json)
    except TypeError:
        return json.dumps(_with_text_names(value), sort_keys=True, default=_of_json)


def _of_json(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=as_json)
    return value.tolist() if hasattr(value, "tolist") else ADDRESS.sub("", str(value))


def _with_text_names(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {as_json(name): _with_text_names(part) for name, part in value.items()}
    return [_with_text_names(part) for part in value] if isinstance(value, list | tuple) else value


def unit_hash(key: Sequence[Any]) -> float:
    """A number in [0, 1) that depends only on the values, the same in every process and on every machine.

    >>> unit_hash(["train/pos/5235"]) == unit_hash(["train/pos/5235"]) != unit_hash(["train/pos/5236"])
    True
    """
    texts = [value if isinstance(value, str) else as_json(value) for value in key]
    digest = hashlib.sha256("\x1f".join(texts).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
