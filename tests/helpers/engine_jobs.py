"""What each rank runs in tests of engines."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_ppo import FSDP2Strategy
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
