"""Sampling in parts gives the same samples; errors of memory name the argument to lower."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_ppo.models.actor_critic import Actor
from tests.helpers.toys import make_data, make_module, make_trainer

PROMPTS = ["the film was", "a", "the plot of this movie was", "we saw"]


def rollout(lm: Path, monkeypatch: pytest.MonkeyPatch, **limits: int) -> tuple[Any, list[int]]:
    sizes, generate = [], Actor.generate

    def noted(actor: Actor, ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(ids))
        return generate(actor, ids, *args, **kwargs)

    monkeypatch.setattr(Actor, "generate", noted)
    module = make_module(lm, generation={"max_new_tokens": 6}, sampling_logprobs_tolerance=1e-4, **limits)
    experience = module.rollout(PROMPTS, samples_per_prompt=3)
    monkeypatch.undo()
    return experience, sizes


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"rollout_batch_size": 5}, [5, 5, 2]),
        # with 6 new tokens: three rows of 12, 9, 8 and 7; two of 12 are 24, and 9 + 9, and so on, padded to the longest
        ({"rollout_batch_tokens": 24}, [2, 2, 2, 3, 3]),
        ({"rollout_batch_tokens": 1}, [1] * 12),
    ],
)
def test_parts_sample_what_all_together_do(
    lm: Path, monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], expected: list[int]
) -> None:
    together, all_rows = rollout(lm, monkeypatch)
    parts, sizes = rollout(lm, monkeypatch, **limits)
    assert (all_rows, sizes) == ([12], expected)
    assert parts.response_ids.equal(together.response_ids)
    assert (parts.responses, parts.ended.tolist()) == (together.responses, together.ended.tolist())
    torch.testing.assert_close(parts.logprobs, together.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "options", "message"),
    [
        ("generate", {}, r"LitPPO\(rollout_batch_size=None\): out of memory in the rollout; set it to 7 or less"),
        (
            "generate",
            {"rollout_batch_tokens": 64},
            r"LitPPO\(rollout_batch_tokens=64\): .*rollout; set it to 32 or less",
        ),
        ("forward", {}, r"LitPPO\(micro_batch_size=3\): out of memory in the update; set it to 1 or less"),
    ],
)
def test_errors_of_memory_name_the_argument_and_a_value(
    tmp_path: Path, lm: Path, monkeypatch: pytest.MonkeyPatch, where: str, options: dict[str, int], message: str
) -> None:
    """Seven prompts, two samples each: 14 rows."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    module = make_module(lm, samples_per_prompt=2, **options)
    monkeypatch.setattr(Actor, where, full)
    with pytest.raises(torch.OutOfMemoryError, match=message + r".*Tried to allocate 2.00 GiB"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
