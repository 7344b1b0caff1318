"""The next batch is sampled while the update runs, with the weights before it."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_ppo import LitPPO, TransformersEngine
from lit_ppo.callbacks import ImportanceCorrection, RejectionSampling
from lit_ppo.engines.ahead import Ahead
from tests.helpers.engine_jobs import Overlapping, rollouts_ahead_on_ranks, weights_wait_for_all_ranks
from tests.helpers.ranks import on_ranks
from tests.helpers.spies import Spy
from tests.helpers.toys import logged, make_data, make_module, make_trainer


class Weighing(Overlapping):
    """Notes the weights with which it samples."""

    def __init__(self, path: str, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.weights: list[Tensor] = []

    def generate(self, *args: Any) -> Any:
        self.weights.append(next(iter(self.model.parameters())).clone())
        return super().generate(*args)


def fit(folder: Path, module: LitPPO, *callbacks: Any, updates: int = 4, **fit: Any) -> tuple[list[Any], Any]:
    """Train over the two batches of an epoch, twice; returns the experiences and the trainer."""
    seen: list[Any] = []
    watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
    trainer = make_trainer(folder, max_steps=updates, callbacks=[ImportanceCorrection(), watch, *callbacks])
    trainer.fit(module, make_data(folder), **fit)
    return seen, trainer


def ahead(lm: Path, engine: Any = None, **arguments: Any) -> LitPPO:
    return make_module(lm, engine=engine or Overlapping(str(lm)), rollout_ahead=1, **arguments)


def test_samples_are_those_of_the_weights_before_the_update(tmp_path: Path, lm: Path):
    """Update u trains on samples of the weights before update u - 1; log-probs are of the weights that train."""
    engine = Weighing(str(lm))
    before: list[Tensor] = []
    module = ahead(lm, engine)
    note = Spy("on_rollout_start", lambda module, prompts: before.append(next(iter(module.actor.parameters())).clone()))
    seen, trainer = fit(tmp_path, module, note)
    used = engine.weights[2:]  # the first two are of the checks at the start
    assert len(used) == len(seen) == 4  # and none for an update that does not come
    for update, weights in enumerate(used):
        assert torch.equal(weights, before[max(update - 1, 0)]), update
    assert not torch.equal(before[0], before[1])
    first, *others = logged(trainer)
    assert first["rollout/sampling_logprob_difference"] < 1e-4
    assert all(row["rollout/sampling_logprob_difference"] > 1e-3 for row in others)
    assert [sorted(set(e.prompt_index.tolist())) for e in seen[:2]] == [
        sorted(set(e.prompt_index.tolist())) for e in fit(tmp_path, make_module(lm, seed=3), updates=2)[0]
    ]


def test_it_samples_during_the_update(tmp_path: Path, lm: Path):
    """The engine answers only once the update has made a step, which a rollout that waits would never see."""
    stepped = threading.Event()
    waited: list[bool] = []

    class Patient(Overlapping):
        def generate(self, *args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                waited.append(stepped.wait(60))
            return super().generate(*args)

    def step(module: Any, *_: Any) -> None:
        stepped.set()

    fit(tmp_path, ahead(lm, Patient(str(lm))), Spy("on_minibatch_end", step), updates=2)
    assert waited == [True]


def test_the_first_update_is_that_of_a_run_without(tmp_path: Path, lm: Path):
    with_it, _ = fit(tmp_path, ahead(lm))
    without, _ = fit(tmp_path, make_module(lm, engine=Overlapping(str(lm))))
    assert with_it[0].responses == without[0].responses
    assert with_it[1].prompts == without[1].prompts
    again, _ = fit(tmp_path, ahead(lm))
    assert [e.responses for e in again] == [e.responses for e in with_it]


@pytest.mark.parametrize("updates", [1, 2])
def test_a_resumed_run_trains_on_the_same_samples(tmp_path: Path, lm: Path, updates: int):
    """The checkpoint holds the responses that were sampled ahead, with the old weights' log-probs."""
    full, _ = fit(tmp_path, ahead(lm))
    saved = tmp_path / "saved.ckpt"

    class Save(Spy):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == updates:
                trainer.save_checkpoint(saved)

    interrupted, _ = fit(tmp_path, ahead(lm), Save("on_scores", lambda *_: None))
    assert [e.responses for e in interrupted] == [e.responses for e in full]
    rest, _ = fit(tmp_path, ahead(lm), ckpt_path=saved)
    assert [e.responses for e in rest] == [e.responses for e in full[updates:]]
    for found, expected in zip(rest, full[updates:], strict=True):
        torch.testing.assert_close(found.sampling_logprobs, expected.sampling_logprobs, rtol=0, atol=0)
        torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=0)


def test_validation_waits_for_the_engine(tmp_path: Path, lm: Path):
    """It samples with the new weights, and the responses that were sampled ahead are kept for training."""
    engine = Weighing(str(lm))
    plain, _ = fit(tmp_path, ahead(lm), updates=2)
    seen: list[Any] = []
    watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
    data = make_data(tmp_path, val_path=str(tmp_path / "prompts.jsonl"))
    trainer = make_trainer(tmp_path, callbacks=[ImportanceCorrection(), watch], val_check_interval=1)
    trainer.fit(ahead(lm, engine), data)
    assert [e.responses for e in seen] == [e.responses for e in plain]
    validated = engine.weights[-1]
    assert torch.equal(validated, next(iter(trainer.lightning_module.actor.model.parameters())))


def test_a_program_that_is_lost_meanwhile(tmp_path: Path, lm: Path, caplog: pytest.LogCaptureFixture):
    """The rollout asks again, with the newest weights; any other error ends the run with its own message."""

    class Losing(Weighing):
        problem: Exception = ConnectionError("the program is gone")

        def generate(self, *args: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                raise self.problem
            return super().generate(*args)

    engine = Losing(str(lm))
    before: list[Tensor] = []
    note = Spy("on_rollout_start", lambda module, prompts: before.append(next(iter(module.actor.parameters())).clone()))
    with caplog.at_level("INFO"):
        fit(tmp_path, ahead(lm, engine), note, updates=2)
    assert "the program is gone; while it sampled ahead" in caplog.text
    assert torch.equal(engine.weights[-1], before[1])
    engine.problem = ValueError("a response is too long")
    with pytest.raises(ValueError, match="a response is too long"):
        fit(tmp_path, ahead(lm, engine), updates=2)


def test_a_callback_that_changes_the_rollout_is_named(tmp_path: Path, lm: Path):
    """RejectionSampling asks for more responses in every second update."""
    reject = RejectionSampling(k=2, every=2)
    with pytest.warns(UserWarning, match=r"LitPPO\(rollout_ahead=1\): responses .* are dropped, since a callback"):
        seen, _ = fit(tmp_path, ahead(lm), reject, updates=3)
    assert len(seen) == 3


def test_what_it_needs_is_checked(tmp_path: Path, lm: Path):
    class Mine(TransformersEngine):
        overlaps = True  # but it has the weights that training changes

    with pytest.raises(ValueError, match=r"LitPPO\(rollout_ahead=1\): engine=Mine samples in the training process"):
        make_module(lm, engine=Mine(), rollout_ahead=1)
    for engine in (None, TransformersEngine()):
        with pytest.raises(ValueError, match=r"LitPPO\(rollout_ahead=1\): engine=TransformersEngine samples in"):
            make_module(lm, engine=engine, rollout_ahead=1)
    for value in (-1, 2, True, 0.5):
        with pytest.raises((TypeError, ValueError), match=rf"LitPPO\(rollout_ahead={value}\)"):
            make_module(lm, engine=Overlapping(str(lm)), rollout_ahead=value)
    with pytest.raises(ValueError, match=r"LitPPO\(rollout_ahead=1\): .*add the callback ImportanceCorrection"):
        make_trainer(tmp_path).fit(ahead(lm), make_data(tmp_path))
    trainer = make_trainer(tmp_path, callbacks=[ImportanceCorrection()])
    with pytest.raises(ValueError, match=r"LitPPO\(rollout_ahead=1\): .*train with fit and a PromptDataModule"):
        ahead(lm).attach(trainer, make_data(tmp_path))
    trainer = make_trainer(tmp_path, callbacks=[ImportanceCorrection()])
    with pytest.raises(ValueError, match=r"LitPPO\(rollout_ahead=1\): .*train with fit and a PromptDataModule"):
        trainer.fit(ahead(lm), [["the film"] * 7])


def test_responses_are_taken_once_by_the_rows_that_were_asked():
    rows = Ahead()
    rows.start([[5], [6]], [(1, 0), (1, 1)], lambda: ([[7], [8]], [[-1.0], [-2.0]]))
    rows.wait()
    assert rows.take([[5], [5]], [(1, 0), (1, 1)]) is None  # another prompt
    assert rows.take([[5], [6]], [(1, 0), (2, 1)]) is None  # another seed
    other = Ahead()
    other.load(rows.state())
    for ahead in (rows, other):
        assert ahead.take([[6], [5]], [(1, 1), (1, 0)]) == ([[8], [7]], [[-2.0], [-1.0]])
        assert ahead.take([[5], [6]], [(1, 0), (1, 1)]) is None


def test_ranks_share_what_is_sampled_ahead(tmp_path: Path, lm: Path):
    """Two ranks, one process, and one that resumes a checkpoint of two: the same samples."""
    seen, _ = fit(tmp_path, ahead(lm), updates=3)
    responses = [experience.responses for experience in seen]
    on_ranks(2, rollouts_ahead_on_ranks, str(lm), str(tmp_path), responses, folder=tmp_path)
    rest, _ = fit(tmp_path, ahead(lm), updates=3, ckpt_path=tmp_path / "two.ckpt")
    assert [experience.responses for experience in rest] == responses[2:]


def test_weights_wait_for_what_other_ranks_sample(tmp_path: Path, lm: Path):
    on_ranks(2, weights_wait_for_all_ranks, str(lm), str(tmp_path), folder=tmp_path)
