"""Responses that an engine samples in a thread while the actor trains."""

from collections.abc import Callable, Iterable, Sequence
from threading import Thread
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ppo.generation.engine import Seed
from lit_ppo.shown import message_of

Answers = tuple[list[list[int]], list[list[float]]]  # ids of each response, and their log-probs


class Ahead:
    """The responses of this rank to a rollout that has not come yet, known by their seeds.

    They are used by the rollout that asks for the same prompts with the same seeds, and by no other.
    """

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._result: Answers | BaseException | None = None
        self._asked: tuple[list[list[int]], list[Seed]] = ([], [])
        self._rows: dict[Seed, tuple[list[int], list[int], list[float]]] = {}  # prompt, response, log-probs

    @property
    def is_running(self) -> bool:
        """Whether the engine is at work in the thread."""
        return self._thread is not None

    def start(self, prompt_ids: list[list[int]], seeds: list[Seed], sample: Callable[[], Answers]) -> None:
        """Sample in a thread.

        Args:
            prompt_ids: The prompt of each row of this rank.
            seeds: Of each row.
            sample: Asks the engine; may call no collective.
        """
        if self._rows:
            self._rows = {}
            rank_zero_warn(
                "LitPPO(rollout_ahead=1): responses that were sampled ahead are dropped, since a callback has changed "
                "the prompts or samples_per_prompt of the update; they cost time and gain none with this callback"
            )
        self._asked = prompt_ids, seeds

        def run() -> None:
            try:
                self._result = sample()
            except BaseException as error:
                self._result = error

        # a daemon: a run that fails does not wait for a server
        self._thread = Thread(target=run, name="rollout_ahead", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait for the thread. Responses of a program that was lost are asked for again by the rollout itself."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if isinstance(self._result, ConnectionError):
            problem = message_of(self._result, 2000)
            rank_zero_info(f"{problem}; while it sampled ahead: the newest weights sample these responses instead")
            self._result = None
        elif not isinstance(self._result, BaseException) and self._result is not None:
            rows = zip(self._asked[0], *self._result, strict=True)
            self._rows, self._result = dict(zip(self._asked[1], rows, strict=True)), None

    def take(self, prompt_ids: list[list[int]], seeds: Sequence[Seed]) -> Answers | None:
        """The responses to these rows, once; None where they were not sampled ahead.

        Raises:
            BaseException: What the engine has raised in the thread.
        """
        if isinstance(self._result, BaseException):
            error, self._result = self._result, None
            raise error
        rows = [self._rows.get(seed) for seed in seeds]
        found = [row for row, ids in zip(rows, prompt_ids, strict=True) if row is not None and row[0] == ids]
        if not found or len(found) < len(seeds):
            return None
        self._rows = {}
        return [ids for _, ids, _ in found], [logprobs for _, _, logprobs in found]

    def state(self) -> list[tuple[Any, ...]]:
        """What a checkpoint needs: seed, prompt, response and log-probs of each row."""
        return [(list(seed), *row) for seed, row in self._rows.items()]

    def load(self, state: Iterable[tuple[Any, ...]]) -> None:
        """Restore what :meth:`state` gave on any number of ranks."""
        self._rows = {tuple(seed): (list(ids), list(new), list(x)) for seed, ids, new, x in state}
