"""Rewards that are Python functions, and the only place where score sources are called and their results checked."""

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

from lit_ppo.constructor import constructor
from lit_ppo.rewards.arrays import ONE_EACH, as_array, dense, no_sequence, of_array
from lit_ppo.rewards.signature import FUNCTION, TEXTS, check_plain, hidden_column, imported, parameters, texts_of
from lit_ppo.shown import reason, shown, written
from lit_ppo.validate import mapping

T = TypeVar("T")
_STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]


class RewardFunction:
    """Scores with any Python function ``(prompts, responses, **columns) -> sequence of float``.

    Every argument is matched by name: ``prompts`` (chat prompts as lists of messages), ``responses`` or
    ``completions`` (the same texts), a column of the data set, or one of ``kwargs``. A function with ``**`` gets all
    columns. All of them are copies, which the function may change, except for ``kwargs``. Data with a column of the
    name of a text are refused if the function takes this name, or all names.

    Args:
        function: The function, or its import path (``package.module.function``).
        kwargs: Further arguments with the same value at every call.

    >>> from types import SimpleNamespace
    >>> shout = RewardFunction(lambda responses: [float(text.isupper()) for text in responses])
    >>> shout(SimpleNamespace(prompts=["a", "b"], responses=["YES", "no"], columns={}))
    [1.0, 0.0]
    """

    @constructor
    def __init__(self, function: str | Callable[..., Any], kwargs: dict[str, Any] | None = None) -> None:
        where = f"RewardFunction(function={written(function)})"
        self.function: Any = call_foreign(f"{where}: importing it", lambda: imported(function), only_exits=True)
        check_plain(where, self.function)
        self.name = function if isinstance(function, str) else _name(function)
        self.kwargs = mapping(self, "kwargs", kwargs)
        self._read_signature()

    def _read_signature(self) -> None:
        """Read from the signature how to call the function; refuse one that cannot be called."""
        found = parameters(self.function)
        named = [p for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self._positional = [p for p in named if p.kind is p.POSITIONAL_ONLY]
        self._names = [p.name for p in named]
        self._required = [p.name for p in named if p.default is p.empty]
        self._takes_all = any(p.kind is p.VAR_KEYWORD for p in found)
        self._texts = texts_of(self._names, takes_all=self._takes_all)
        if not self._takes_all and set(TEXTS).isdisjoint(self._names):
            takes = ", ".join(map(str, found)) or "nothing"
            raise TypeError(
                f"RewardFunction(function={self.name}): takes neither prompts nor responses (or completions), but "
                f"{takes}, and arguments are matched by name; {FUNCTION}"
            )
        self._response_names = [name for name in TEXTS[1:] if name in self._names] or ["responses"]
        unknown = sorted(name for name in self.kwargs if name in TEXTS or not self._accepts(name))
        if unknown:
            raise ValueError(
                f"RewardFunction(kwargs={written(self.kwargs)}): {self.name} takes no argument {', '.join(unknown)}; "
                f"its arguments are {', '.join(p.name for p in found)}"
            )

    def _accepts(self, name: str) -> bool:
        return name in self._names or self._takes_all

    def check_columns(self, columns: Iterable[str]) -> None:
        """Check that every required argument is a text, a column or one of ``kwargs``, and that no column is hidden.

        Args:
            columns: Names of the columns of the data.

        Raises:
            TypeError: There is nothing for an argument, or both a text and a column.
        """
        columns = list(columns)
        if hidden := [name for name in self._texts if name in columns]:
            raise hidden_column(str(self), hidden[0], self._names, columns)
        offered = [*TEXTS, *self.kwargs, *columns]
        missing = [name for name in self._required if name not in offered]
        if missing:
            there = ["prompts", "responses (or completions)", *columns]
            raise TypeError(f"RewardFunction({self.name}): needs {', '.join(missing)}; there are {', '.join(there)}")

    def __str__(self) -> str:
        return f"RewardFunction({self.name})"

    def __call__(self, experience: Any) -> Any:
        """What the function returns for these responses; see :func:`check_scores`.

        Raises:
            RuntimeError: The function raised.
            TypeError: It needs a column that is not there.
        """
        self.check_columns(experience.columns)
        prompts = experience.columns.get("messages", experience.prompts)
        responses = dict.fromkeys(self._response_names, experience.responses)
        offered = {**experience.columns, **self.kwargs, "prompts": prompts, **responses}
        passed = {name: value for name, value in offered.items() if self._accepts(name)}
        positional = [passed.pop(p.name, p.default) for p in self._positional]
        return call_foreign(str(self), lambda: self.function(*positional, **passed), expected=FUNCTION)


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__)


def source_names(source: Any) -> list[str]:
    """Names of the sources that a weighted sum consists of; empty for any other source."""
    return list(getattr(source, "sources", {}))


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
    values = dense(scores, source) if isinstance(scores, Tensor) else _as_tensor(scores, count, source)
    if values.is_complex():
        raise TypeError(f"{source}: returned complex numbers; {ONE_EACH}")
    if values.shape != (count,):
        got = f"{len(values)} values" if values.ndim == 1 else f"values of shape {tuple(values.shape)}"
        raise ValueError(f"{source}: returned {got} for {count} responses; {ONE_EACH}, shape ({count},)")
    values = values.detach().to(torch.float32, copy=True)
    if not values.isfinite().all():
        row = int((~values.isfinite()).nonzero()[0])
        which = "" if responses is None else f", {responses[row][:80]!r}"
        raise ValueError(
            f"{source}: returned {values[row].item()} for response {row} of {count}{which}; {ONE_EACH}, all finite"
        )
    return values


def _as_tensor(scores: Any, count: int, source: str) -> Tensor:
    if isinstance(scores, (str, bytes, bytearray, Mapping, Set)) or not isinstance(scores, Iterable):
        raise no_sequence(scores, source)
    values: Any = scores
    if hasattr(scores, "__array__"):
        values = call_foreign(source, lambda: as_array(scores))
        if values.dtype.kind != "O" or values.ndim != 1 or isinstance(values, np.ma.MaskedArray):
            return of_array(values, source)
    numbers = call_foreign(source, lambda: list(islice(values, count + 1)))  # a generator may have no end
    if len(numbers) > count and not hasattr(values, "__len__"):
        raise ValueError(f"{source}: returned more than {count} values for {count} responses; {ONE_EACH}")
    numbers = numbers if len(numbers) <= count else list(values)
    read = [(value, f"for response {row}") for row, value in enumerate(numbers)]
    floats = call_foreign(source, lambda: [_number(*each, source) for each in read], only_exits=True)
    return torch.tensor(floats, dtype=torch.float64)


def _number(value: Any, which: str, source: str) -> float:
    try:
        is_complex = value.is_complex() if isinstance(value, Tensor) else isinstance(value, Complex)
        is_real = not is_complex or isinstance(value, Real)  # float() drops imaginary parts
        if isinstance(value, _NO_NUMBERS) or value is np.ma.masked or getattr(value, "ndim", 0) > 0 or not is_real:
            raise TypeError  # float() takes them
        return float(value)
    except Exception:
        kind = f"{type(value).__name__} {shown(value)}"
        raise TypeError(f"{source}: returned {kind} {which}; {ONE_EACH}") from None


_NO_NUMBERS = (str, bytes, bytearray, np.timedelta64)
