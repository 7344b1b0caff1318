"""What LitPPO asks of an engine, and what it makes of the answers."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo import Engine, LitPPO, TransformersEngine
from lit_ppo.callbacks import ImportanceCorrection
from lit_ppo.console.progress import ProgressLine
from lit_ppo.engines.sampler import ATTEMPTS, checked, grouped, number_of
from lit_ppo.generation.config import neutral
from tests.helpers.engines import CopyEngine
from tests.helpers.spies import Spy
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer


def fit(folder: Path, module: LitPPO, **trainer: Any) -> tuple[list[Any], list[dict[str, float]]]:
    """Train for two updates; returns the experiences and what was logged."""
    seen: list[Any] = []
    watch = Spy("on_update_end", lambda module, experience: seen.append(experience))
    trained = make_trainer(folder, callbacks=[watch, *trainer.pop("callbacks", [])], **trainer)
    trained.fit(module, make_data(folder))
    return seen, logged(trained)


def test_an_engine_gets_new_weights_and_samples(tmp_path: Path, lm: Path):
    """A copy of the model that gets its weights by sync samples from the policy: differences are rounding."""
    engine = CopyEngine(str(lm))
    module = make_module(lm, engine=engine, samples_per_prompt=2)
    seen, rows = fit(tmp_path, module)
    assert engine.calls[:4] == ["wake", "sync", "generate", "sleep"]  # of the preflight
    assert engine.calls[-8:] == ["wake", "sync", "generate", "sleep"] * 2
    for experience, row in zip(seen, rows, strict=True):
        assert len(experience) % 2 == 0
        torch.testing.assert_close(experience.sampling_logprobs, experience.logprobs, rtol=1e-4, atol=1e-4)
        assert row["rollout/sampling_logprob_difference"] < 1e-4
        assert row["rollout/sampling_ess"] == pytest.approx(1.0, abs=1e-4)
        assert row["rollout/sampling_kl"] == pytest.approx(0.0, abs=1e-6)
    assert engine.seeds[-1] != engine.seeds[-2]
    assert len(set(engine.seeds[-2])) == 14


def test_the_same_run_twice_and_resumed(tmp_path: Path, lm: Path):
    full, _ = fit(tmp_path, make_module(lm, engine=CopyEngine(str(lm))))
    again, _ = fit(tmp_path, make_module(lm, engine=CopyEngine(str(lm))))
    assert [e.responses for e in again] == [e.responses for e in full]
    first = make_trainer(tmp_path, max_steps=1)
    first.fit(make_module(lm, engine=CopyEngine(str(lm))), make_data(tmp_path))
    first.save_checkpoint(tmp_path / "one.ckpt")
    seen: list[Any] = []
    rest = make_trainer(tmp_path, callbacks=[Spy("on_update_end", lambda module, e: seen.append(e))])
    rest.fit(make_module(lm, engine=CopyEngine(str(lm))), make_data(tmp_path), ckpt_path=tmp_path / "one.ckpt")
    assert [e.responses for e in seen] == [full[1].responses]


def test_numbers_of_an_engine_that_samples_otherwise(tmp_path: Path, lm: Path):
    """At double temperature: KL and differences by their definitions from the recorded log-probs."""
    (first, _), (row, _) = fit(tmp_path, make_module(lm, engine=CopyEngine(str(lm), temper=2.0)))
    mask = first.response_mask
    log_ratio = (first.logprobs - first.sampling_logprobs)[mask].double()
    weights = log_ratio.exp()
    assert row["rollout/sampling_logprob_difference"] == pytest.approx(float(log_ratio.abs().max()), rel=1e-4)
    assert row["rollout/sampling_logprob_difference_mean"] == pytest.approx(float(log_ratio.abs().mean()), rel=1e-4)
    assert row["rollout/sampling_kl"] == pytest.approx(float((weights - 1 - log_ratio).mean()), rel=1e-3)
    assert row["rollout/sampling_ess"] == pytest.approx(float(weights.mean() ** 2 / (weights**2).mean()), rel=1e-3)
    assert row["rollout/sampling_kl"] > 0.01


def test_reference_greedy_and_validation(tmp_path: Path, lm: Path):
    """The reference samples by its own loop; validation syncs only when weights have changed."""
    engine = CopyEngine(str(lm))
    module = make_module(lm, engine=engine)
    own = make_module(lm)
    prompts = ["the film", "a story was"]
    greedy = module.rollout(prompts, do_sample=False)
    assert greedy.responses == own.rollout(prompts, do_sample=False).responses
    assert greedy.sampling_logprobs is None
    before = len(engine.calls)
    by_reference = module.rollout(prompts, policy="reference", stream="val")
    assert len(engine.calls) == before
    assert by_reference.responses == own.rollout(prompts, policy="reference", stream="val").responses
    module.rollout(prompts, stream="val")
    assert engine.calls[before:] == ["wake", "generate", "sleep"]
    with torch.no_grad():
        next(module.actor.parameters()).mul_(1.5)
    module.rollout(prompts, stream="val")
    assert engine.calls[-4:] == ["wake", "sync", "generate", "sleep"]


def test_validation_after_an_update_uses_the_new_weights(tmp_path: Path, lm: Path):
    """Also with the default optimizer, whose fused steps torch's version counters do not see."""
    seen: list[Any] = []

    class Watched(CopyEngine):
        def generate(self, *args: Any) -> Any:
            seen.append(next(iter(self.model.parameters())).clone())
            return super().generate(*args)

    module = make_module(lm, engine=Watched(str(lm)))
    adam = LitPPO(
        str(lm), rewards=count_good, generation={"max_new_tokens": 4}, engine=Watched(str(lm)), minibatch_size=7
    )
    for one in (module, adam):
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(one, make_data(tmp_path))
        trainer.validate(one, make_data(tmp_path, val_path=str(tmp_path / "prompts.jsonl")), verbose=False)
        assert torch.equal(seen[-1], next(iter(one.actor.model.parameters())))
        assert not torch.equal(seen[-1], seen[0])


def test_the_progress_line_names_the_engine(lm: Path):
    shown: list[str] = []

    class Watched(CopyEngine):
        def generate(self, *args: Any) -> Any:
            bar = ProgressLine()
            bar.clock = lambda: module.progress.since
            bar._trainer = SimpleNamespace(lightning_module=module)
            shown.append(bar._phase())
            return super().generate(*args)

    module = make_module(lm, engine=Watched(str(lm)))
    module.progress.start("rollout")
    module.rollout(["the film", "it"], samples_per_prompt=3)
    module.progress.start("update")
    assert shown == ["(rollout (copy), 6 responses)"]
    assert module.progress.engine == ""


def test_lora_is_merged(tmp_path: Path, lm: Path):
    pytest.importorskip("peft")
    module = make_module(lm, engine=CopyEngine(str(lm)), actor_lora={"r": 2, "target_modules": "all-linear"})
    with torch.no_grad():
        for name, parameter in module.models.actor.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.5)
    experience = module.rollout(["the film", "a story was very"], samples_per_prompt=4)
    torch.testing.assert_close(experience.sampling_logprobs, experience.logprobs, rtol=1e-3, atol=1e-3)
    difference = experience.logprobs - experience.ref_logprobs
    assert difference.abs().max() > 0.1  # the adapter matters


class Lost:
    """Raises at the given calls, counted from 1."""

    def __init__(self, *calls: int) -> None:
        self.count, self.calls = 0, calls

    def __call__(self) -> None:
        self.count += 1
        if self.count in self.calls:
            raise ConnectionError("the program is gone")


def test_a_lost_program_is_asked_again(lm: Path):
    prompts = ["the film", "a story was"]
    expected = make_module(lm, engine=CopyEngine(str(lm))).rollout(prompts).responses
    engine = CopyEngine(str(lm), lose=Lost(1))
    assert make_module(lm, engine=engine).rollout(prompts).responses == expected
    assert engine.calls == ["wake", "sync", "generate", "sync", "generate", "sleep"]
    with pytest.raises(RuntimeError, match=rf"the program is gone; lost {ATTEMPTS} times in one rollout"):
        make_module(lm, engine=CopyEngine(str(lm), lose=Lost(1, 2, 3))).rollout(prompts)


def test_arguments_that_an_engine_leaves_without_effect_are_refused(lm: Path):
    unused = {"sampling_logprobs_tolerance": 0.1, "rollout_batch_size": 2, "rollout_batch_tokens": 99}
    for name, value in unused.items():
        with pytest.raises(ValueError, match=rf"LitPPO\({name}={value}\): .*engine=CopyEngine"):
            make_module(lm, engine=CopyEngine(str(lm)), **{name: value})
        make_module(lm, engine=TransformersEngine(), **{name: value})
    with pytest.raises(ValueError, match=r"LitPPO\(engine='vllm'\): must be an Engine"):
        make_module(lm, engine="vllm")


def test_the_default_engine_is_an_engine(tmp_path: Path, lm: Path):
    """A rollout asks its generate, for the actor and for the reference, and it samples what the decode loop samples."""
    asked: list[int] = []

    class Watched(TransformersEngine):
        def generate(self, prompt_ids: Any, n: int, config: Any, seeds: Any) -> Any:
            asked.append(len(prompt_ids) * n)
            return super().generate(prompt_ids, n, config, seeds)

    named, _ = fit(tmp_path, make_module(lm, engine=Watched(), samples_per_prompt=2))
    assert asked == [2, 1, 14, 10]  # two checks at the start, and two updates
    plain, rows = fit(tmp_path, make_module(lm, samples_per_prompt=2))
    assert [e.responses for e in named] == [e.responses for e in plain]
    assert plain[0].sampling_logprobs is None
    assert not [name for name in rows[0] if "sampling" in name]
    with pytest.raises(RuntimeError, match=r"TransformersEngine\.generate: .*call that"):
        TransformersEngine().generate([[3]], 1, neutral(max_new_tokens=4), [1])


def test_several_samples_in_one_call_are_those_of_a_call_each(lm: Path):
    """The interface's n: prompt by prompt, with one seed a response; plain numbers are seeds, too."""
    answers: list[Any] = []

    class Twice(TransformersEngine):
        def generate(self, prompt_ids: Any, n: int, config: Any, seeds: Any) -> Any:
            first = super().generate(prompt_ids, 2, config, [7, 8, 9, 10])
            second = super().generate([ids for ids in prompt_ids for _ in range(2)], 1, config, [7, 8, 9, 10])
            answers.extend([first, second])
            return super().generate(prompt_ids, n, config, seeds)

    make_module(lm, engine=Twice()).rollout(["the film", "it"])
    assert answers[0] == answers[1]
    assert len(answers[0][0]) == 4


def test_rows_of_a_prompt_are_asked_for_together():
    assert grouped([[5], [5], [6], [6]]) == ([[5], [6]], 2)
    assert grouped([[5], [5], [6]]) == ([[5], [5], [6]], 1)


def test_a_subclass_of_the_default_engine_is_not_passed_over(lm: Path):
    """Else the actor would sample in its place in silence."""

    class Fixed(TransformersEngine):
        def generate(self, prompt_ids: Any, n: int, config: Any, seeds: Any) -> Any:
            return [[5, 6]] * (len(prompt_ids) * n), [[-1.0, -2.0]] * (len(prompt_ids) * n)

    experience = make_module(lm, engine=Fixed()).rollout(["the film", "it"], samples_per_prompt=2)
    assert experience.response_ids.tolist() == [[5, 6]] * 4
    assert experience.sampling_logprobs is not None
    assert experience.sampling_logprobs.tolist() == [[-1.0, -2.0]] * 4


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ([[1]], "returned a list"),
        (([[1]], [[-1.0]]), "returned 1 responses"),
        (([[1], []], [[-1.0], []]), "has 0 tokens"),
        (([[1], [4, 5]], [[-1.0], [-1.0]]), "2 tokens and 1 log-probs"),
        (([[1], [4] * 4], [[-1.0], [-1.0] * 4]), "max_new_tokens=3"),
        (([[1], [4]], [[-1.0], [-math.inf]]), "not finite"),
        (([[1], [4]], None), "2 responses and no log-probs"),
    ],
)
def test_what_is_no_answer_is_refused(answer: Any, problem: str):
    class Mine(Engine):
        def generate(self, *args: Any) -> Any: ...

        def sync(self, weights: Any) -> None: ...

    with pytest.raises((TypeError, ValueError), match=rf"Mine\.generate: .*{problem}"):
        checked(Mine(), answer, 2, neutral(max_new_tokens=3, eos_token_id=[1, 2]))


def test_tokens_behind_a_stop_token_are_dropped():
    config = neutral(max_new_tokens=3, eos_token_id=[1, 2])
    answer = [[5, 2, 7], [5, 6, 7]], [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]]
    assert checked(TransformersEngine(), answer, 2, config) == ([[5, 2], [5, 6, 7]], [[-1.0, -2.0], [-1.0, -2.0, -3.0]])


def test_seeds_are_numbers_that_differ():
    numbers = set(map(number_of, itertools.product((0, 1), (7,), (0, 1), (0, 1, 10), (0, 1))))
    assert len(numbers) == 24
    assert all(0 <= number < 2**63 for number in numbers)


def test_the_correction_reads_what_the_engine_returned(tmp_path: Path, lm: Path):
    module = make_module(lm, engine=CopyEngine(str(lm), temper=2.0))
    _, rows = fit(tmp_path, module, callbacks=[ImportanceCorrection(cap=1.2)])
    assert 0 < rows[0]["policy/importance_capped_fraction"] < 1
    assert rows[0]["policy/importance_weight"] < 1.2
