"""What each rank runs in tests of engines."""

import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_ppo import FSDP2Strategy
from lit_ppo.callbacks import ImportanceCorrection
from tests.helpers.engines import CopyEngine
from tests.helpers.spies import Spy
from tests.helpers.toys import make_data, make_module, make_trainer


class OnEveryRank(CopyEngine):
    """A copy of the model in each process."""

    every_rank = True


class Shared(OnEveryRank):
    """Both ranks are asked for the same responses, as those that share a copy are."""

    ranks_per_copy = 2


def rollouts_on_shards(model: str, folder: str) -> None:
    """Under FSDP2, engines of several kinds sample what one process samples, with the weights of each update."""
    own = Path(folder) / str(dist.get_rank())
    own.mkdir()
    responses = []
    for kind in (OnEveryRank, Shared):
        seen: list[Any] = []
        watch = Spy("on_update_end", lambda module, experience, seen=seen: seen.append(experience))
        engine = kind(model)
        trainer = make_trainer(own, devices=2, strategy=FSDP2Strategy(), callbacks=[watch])
        trainer.fit(make_module(Path(model), engine=engine), make_data(own))
        for experience in seen:
            torch.testing.assert_close(experience.sampling_logprobs, experience.logprobs, rtol=1e-4, atol=1e-4)
        responses.append([experience.responses for experience in seen])
        asked = len(engine.seeds[-1] or [])
        assert asked == (5 if kind is Shared else 3 - dist.get_rank())  # of 5 prompts
    assert responses[0] == responses[1]
    lost = make_module(Path(model), engine=_LostOnce(model))
    plain = make_module(Path(model), engine=OnEveryRank(model))
    prompts = ["the film", "it", "a story"]
    assert lost.rollout(prompts).responses == plain.rollout(prompts).responses
    assert dist.get_rank() == 1 or "sync" in lost.sampler.engine.calls  # type: ignore[union-attr]


class _LostOnce(OnEveryRank):
    """Lost on one rank; both bring the weights again."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.lose = self._lose

    def _lose(self) -> None:
        if dist.get_rank() == 1 and self.calls.count("generate") == 1:
            raise ConnectionError("gone")


class Overlapping(CopyEngine):
    """May sample in a thread while the actor trains."""

    overlaps = True


class _OverlappingOnEveryRank(Overlapping):
    every_rank = True


def rollouts_ahead_on_ranks(model: str, folder: str, expected: list[list[str]]) -> None:
    """Under DDP, each rank samples its share ahead; the second update's checkpoint holds those of all ranks."""
    seen: list[Any] = []
    watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
    own = Path(folder) / f"ahead-{dist.get_rank()}"
    own.mkdir()
    module = make_module(Path(model), engine=_OverlappingOnEveryRank(model), rollout_ahead=1)
    callbacks = [ImportanceCorrection(), watch, _SaveSecond("on_scores", lambda *_: None)]
    callbacks[-1].path = Path(folder) / "two.ckpt"  # type: ignore[attr-defined]
    trainer = make_trainer(own, devices=2, strategy="ddp", max_steps=3, callbacks=callbacks)
    trainer.fit(module, make_data(own))
    assert [experience.responses for experience in seen] == expected


class _SlowOnOneRank(Overlapping):
    """A server that both ranks ask; notes when it samples ahead for the second one, and when it gets weights."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.sampled: list[float] = []
        self.synced: list[float] = []

    def generate(self, *args: Any) -> Any:
        is_ahead = threading.current_thread() is not threading.main_thread()
        if is_ahead and dist.get_rank() == 1:
            time.sleep(1.0)
        answer = super().generate(*args)
        if is_ahead:
            self.sampled.append(time.monotonic())
        return answer

    def sync(self, weights: Any) -> None:
        self.synced.append(time.monotonic())
        super().sync(weights)


def weights_wait_for_all_ranks(model: str, folder: str) -> None:
    """No rank sends weights while the server samples ahead for another one."""
    own = Path(folder) / f"slow-{dist.get_rank()}"
    own.mkdir()
    engine = _SlowOnOneRank(model)
    trainer = make_trainer(own, devices=2, strategy="ddp", callbacks=[ImportanceCorrection()])
    trainer.fit(make_module(Path(model), engine=engine, rollout_ahead=1), make_data(own))
    logs: list[Any] = [None, None]
    dist.all_gather_object(logs, (engine.sampled, engine.synced))
    (_, synced), (sampled, _) = logs
    assert len(sampled) == 1
    assert synced[-1] > sampled[0]  # those of the second update
    assert synced[-2] < sampled[0] - 1.0  # those of the first


class _SaveSecond(Spy):
    path: Path

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            trainer.save_checkpoint(self.path)
