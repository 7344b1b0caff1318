"""What each rank runs in tests with a real vLLM server."""

from pathlib import Path
from typing import Any

import torch

from lit_ppo import FSDP2Strategy, VLLMEngine
from tests.helpers.spies import Spy
from tests.helpers.toys import make_data, make_module, make_trainer

# a critic of width 128 diverges at the rate of the narrower ones
SLOW: dict[str, Any] = {"critic_optimizer": lambda params: torch.optim.SGD(params, lr=0.001)}


def fit_sharded(model: str, address: str, folder: str) -> None:
    """Two updates under FSDP2; the log-probs of the server agree with those of the shards."""
    seen: list[Any] = []
    watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
    module = make_module(Path(model), engine=VLLMEngine(mode="server", address=address), **SLOW)
    own = Path(folder) / str(torch.distributed.get_rank())
    own.mkdir()
    data = make_data(own)
    trainer = make_trainer(Path(folder), devices=2, strategy=FSDP2Strategy(), callbacks=[watch])
    trainer.fit(module, data)
    assert len(seen) == 2
    for experience in seen:
        mask = experience.response_mask
        torch.testing.assert_close(experience.sampling_logprobs[mask], experience.logprobs[mask], rtol=0, atol=2e-3)
