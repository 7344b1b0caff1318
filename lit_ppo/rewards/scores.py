"""Call a score source, and check what it gives: the only place where results of sources are checked."""

import copy
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import islice
from numbers import Complex, Real
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_ppo.shown import reason, shown

T = TypeVar("T")
FUNCTION = "expected is a function (prompts, responses, **columns) that returns one number a response"
_ONE_EACH = "expected is a sequence with one number a response"
_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


def scores_of(source: Any, experience: Any, name: str = "rewards") -> Tensor:
    """Call a score source on a copy of the rows' texts and columns, and check its result.

    Args:
        source: See :func:`lit_ppo.rewards.as_source`.
        experience: Rows to score.
        name: Shown in an error for a source without a ``__str__`` of its own.

    Raises:
        RuntimeError: The source's code raised.
        TypeError: The result is not numbers.
        ValueError: It has a wrong shape, or a value that is not finite.

    Shapes:
        -> (B,), float32.
    """
    who = name_of(source, name)
    responses = list(experience.responses)
    if any(cls.__module__.startswith("lit_ppo.") for cls in type(source).__mro__):
        scores = call_foreign(who, lambda: source(with_copies(experience)), only_exits=True)
    else:
        scores = call_foreign(who, lambda: source(with_copies(experience)))
    return check_scores(scores, len(responses), who, responses)


def name_of(source: Any, name: str = "rewards") -> str:
    """The name of a source in messages; ``name`` where it has no ``__str__`` of its own."""
    return str(source) if hasattr(source, "check_columns") or hasattr(source, "score_texts") else name


def with_copies(experience: Any) -> Any:
    """The rows with copies of all texts and columns, so that a source cannot change those of the run or the data."""
    rows = copy.copy(experience)
    for name in {"prompts", "responses", "columns"}.intersection(dir(experience)):
        given = getattr(experience, name)
        copies = {key: _copied(values) for key, values in given.items()} if name == "columns" else _copied(given)
        object.__setattr__(rows, name, copies)  # other modules' experience may be frozen
    return rows


def _copied(values: Any) -> list[Any]:
    """Values of rows, which are objects of their own in each row; what cannot be copied is shared."""
    copies = []
    for value in values:
        try:
            copies.append(value if isinstance(value, str) else copy.deepcopy(value))
        except Exception:  # such as an open file
            copies.append(value)
    return copies


def call_foreign(who: str, call: Callable[[], T], *, expected: str = "", only_exits: bool = False) -> T:
    """Call code of the user's; whatever it raises, ``SystemExit`` included, becomes an error that names it.

    Only what a stop signal raises in it goes through, such as the ``KeyboardInterrupt`` of Ctrl-C.

    Args:
        who: Start of the message.
        call: Calls the code.
        expected: End of the message.
        only_exits: Errors (``Exception``) go through too, since they name their place already.

    Raises:
        RuntimeError: The code raised.
    """
    with _noted_signals() as received:
        try:
            return call()
        except BaseException as error:
            if received or (only_exits and isinstance(error, Exception)):
                raise
            exits = ", which would have ended the process" if isinstance(error, SystemExit) else ""
            raise RuntimeError(
                f"{who}: raised {reason(error)}{_place(error)}{exits}{expected and f'; {expected}'}"
            ) from error


def _place(error: BaseException) -> str:
    """Where it was raised: the last line that has a file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """The stop signals that arrive meanwhile; their handlers are called as before."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # signals raise nothing here
        return

    def noting(handler: Any) -> Callable[[int, FrameType | None], Any]:
        def note(number: int, frame: FrameType | None) -> Any:
            received.append(number)
            return handler(number, frame)

        return note

    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    notes = {number: noting(handler) for number, handler in before.items() if callable(handler)}
    for number, note in notes.items():
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, note in notes.items():
            if signal.getsignal(number) is note:
                signal.signal(number, before[number])


def check_scores(scores: Any, count: int, source: str, responses: Sequence[str] | None = None) -> Tensor:
    """The scores as a new float32 tensor, if they are one finite number a response.

    Args:
        scores: What the source gave: a tensor, an array, a table's column or a sequence of numbers.
        count: Number of responses.
        source: Who gave it, for the error.
        responses: Their texts, for the error.

    Raises:
        RuntimeError: Reading it raised, as a generator may.
        TypeError: It is not numbers.
        ValueError: Wrong count or shape, or a value that is missing, NaN or infinite (in float32).

    Shapes:
        -> (count,).
    """
    values = _of_tensor(scores, source) if isinstance(scores, Tensor) else _as_tensor(scores, count, source)
    if values.is_complex():
        raise TypeError(f"{source}: returned complex numbers; {_ONE_EACH}")
    if values.shape != (count,):
        got = f"{len(values)} values" if values.ndim == 1 else f"values of shape {tuple(values.shape)}"
        raise ValueError(f"{source}: returned {got} for {count} responses; {_ONE_EACH}, shape ({count},)")
    values = values.detach().to(torch.float32, copy=True)
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0])
        which = "" if responses is None else f", {responses[row][:80]!r}"
        raise ValueError(
            f"{source}: returned {values[row].item()} for response {row} of {count}{which}; {_ONE_EACH}, all finite"
        )
    return values


def _of_tensor(values: Tensor, source: str) -> Tensor:
    """A dense tensor of numbers."""
    if values.is_nested or values.is_meta:
        kind = "a nested tensor" if values.is_nested else "a tensor on the meta device, which has no values"
        raise TypeError(f"{source}: returned {kind}; {_ONE_EACH}")
    values = values.dequantize() if values.is_quantized else values
    return values if values.layout == torch.strided else values.to_dense()


def _as_tensor(scores: Any, count: int, source: str) -> Tensor:
    if isinstance(scores, (str, bytes, bytearray, Mapping, Set)) or not isinstance(scores, Iterable):
        order = ", which has no order" if isinstance(scores, Set) else ""
        raise TypeError(f"{source}: returned {type(scores).__name__} {shown(scores)}{order}; {_ONE_EACH}")
    values: Any = scores
    if hasattr(scores, "__array__"):
        values = call_foreign(source, lambda: np.asanyarray(scores) if _is_masked(scores) else np.asarray(scores))
        if _is_masked(values) and (missing := np.ma.getmaskarray(values)).any():
            row = int(missing.reshape(-1).argmax())
            raise ValueError(f"{source}: returned a masked value for response {row}; {_ONE_EACH}, none missing")
        if values.dtype.kind in "biufc":
            return torch.from_numpy(np.array(values, dtype=np.complex128 if values.dtype.kind == "c" else np.float64))
        if values.dtype.kind != "O" or values.ndim != 1:
            kind = f"an array that is not numbers (dtype {shown(values.dtype)}, shape {values.shape})"
            raise TypeError(f"{source}: returned {kind}; {_ONE_EACH}")
    numbers = call_foreign(source, lambda: list(islice(values, count + 1)))  # a generator may have no end
    if len(numbers) > count and not hasattr(values, "__len__"):
        raise ValueError(f"{source}: returned more than {count} values for {count} responses; {_ONE_EACH}")
    numbers = numbers if len(numbers) <= count else list(values)
    read = [(value, f"for response {row}") for row, value in enumerate(numbers)]
    floats = call_foreign(source, lambda: [_number(*each, source) for each in read], only_exits=True)
    return torch.tensor(floats, dtype=torch.float64)


def _is_masked(values: Any) -> bool:
    return isinstance(values, np.ma.MaskedArray)


def _number(value: Any, which: str, source: str) -> float:
    try:
        is_complex = value.is_complex() if isinstance(value, Tensor) else isinstance(value, Complex)
        is_real = not is_complex or isinstance(value, Real)  # float() drops imaginary parts
        if isinstance(value, _NO_NUMBERS) or value is np.ma.masked or getattr(value, "ndim", 0) > 0 or not is_real:
            raise TypeError  # float() takes them
        return float(value)
    except Exception:
        kind = f"{type(value).__name__} {shown(value)}"
        raise TypeError(f"{source}: returned {kind} {which}; {_ONE_EACH}") from None


_NO_NUMBERS = (str, bytes, bytearray, np.timedelta64)
