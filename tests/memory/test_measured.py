"""The estimate of each phase against the tensors of a run."""

from pathlib import Path
from typing import Any

import pytest

from lit_ppo.memory.estimate import ACTOR, CRITIC, ROLLOUT, SCORE
from tests.helpers.memory_phases import LORA, predicted_and_measured

LLAMA = {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 352, "max_position_embeddings": 256}
STATIC, LONG = {"cache_implementation": "static"}, {"max_new_tokens": 24}  # 80 tokens; a static cache has 128


@pytest.mark.filterwarnings("ignore:.*min_new_tokens sample from another distribution", "ignore:.*bf16 instructions")
@pytest.mark.parametrize(
    "options",
    [
        {"shape": LLAMA},
        {"shape": LLAMA, "actor_lora": LORA, "critic_lora": LORA, "activation_checkpointing": True},
        {"shape": LLAMA, "precision": "bf16-mixed"},
        {"shape": LLAMA, "micro_batch_size": 32},  # one micro-batch in a step
        {"shape": LLAMA, "generation": STATIC},
        {"shape": LLAMA, "samples_per_prompt": 4, "generation": LONG},
        {"shape": LLAMA, "samples_per_prompt": 4, "generation": STATIC | LONG, "precision": "bf16-mixed"},
        {"shape": LLAMA, "samples_per_prompt": 4, "rollout_batch_size": 30},
    ],
    ids=["full", "lora", "bf16", "one", "static", "samples", "static samples bf16", "split"],
)
def test_each_phase_needs_what_was_estimated(tmp_path: Path, options: dict[str, Any]) -> None:
    found = predicted_and_measured(tmp_path, **options)
    assert found.keys() == {ROLLOUT, SCORE, ACTOR, CRITIC}
    for phase, (predicted, measured) in found.items():
        assert predicted == pytest.approx(measured, rel=0.1), phase
