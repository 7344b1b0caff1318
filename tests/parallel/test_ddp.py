"""Two processes give the numbers of one."""

import pytest
import torch

from lit_ppo.ppo import collect
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import logged, make_data, make_module, make_trainer, write_prompts
from tests.helpers.two_ranks import JOBS, train_on_two


def test_two_ranks_sample_learn_log_and_validate_as_one(tmp_path):
    """Groups of two responses to 7 and 5 prompts, which two ranks do not divide; 5 prompts are held out.

    Plain SGD, since an Adam step hides errors. With a critic: tests/parallel/test_equivalence.py.
    """
    actor = make_causal_lm(tmp_path / "lm", scale=4.0)
    held_out = str(write_prompts(tmp_path / "held_out.jsonl", 5))
    module, trainer = make_module(actor, **JOBS["group"]), make_trainer(tmp_path)
    trainer.fit(module, make_data(tmp_path, val_path=held_out))
    two = train_on_two(tmp_path, actor, "group")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(logged(trainer), two["logged"], strict=True):
        for name, value in ours.items():
            if not name.startswith(("time/", "throughput/", "memory/")):
                assert theirs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    validated = [row for row in trainer.logger.rows if "val/score" in row]  # before the first update, after the last
    assert len(validated) == len(two["validated"]) == 2
    assert "val/win_rate/letters" in validated[0]
    for ours, theirs in zip(validated, two["validated"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4, abs=1e-5)


def test_different_prompts_on_ranks_are_refused(tiny_lm, monkeypatch):
    """As Lightning's sampler would deal them out for a plain DataLoader."""
    module = make_module(tiny_lm)
    gather = collect.gather_shares
    monkeypatch.setattr(collect, "gather_shares", lambda share: [*gather(share), ([[9, 9]], {}, None)])
    with pytest.raises(ValueError, match=r"ranks were given different prompts.*use PromptDataModule"):
        module.rollout(["the film", "a movie"])
