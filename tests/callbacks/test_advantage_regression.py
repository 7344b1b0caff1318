"""AdvantageRegression: the loss by loops, earlier responses in a step, and gradients that do not depend on padding."""

from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_ppo.callbacks import AdvantageRegression, KLLoss, LeastSquaresCritic, RewardNormalization, RewardScaling
from lit_ppo.callbacks.replay_buffer import ReplayBuffer
from lit_ppo.experience import Minibatch
from tests.helpers.spies import Spy
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy import Toy
from tests.helpers.toy_data import TOKENS
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "AdvantageRegression": Trick(
        acts={"n": 2, "replay": 1},
        refuses={"n": 0, "replay": -1, "memory": 0},
        knobs={"n": ({}, {"n": 3}), "replay": ({"replay": 0}, {}), "memory": ({}, {"memory": 1})},
        needs=("critic", "reference"),
    ),
}


def test_the_loss_compares_the_tokens_of_each_place():
    """By loops, on the toy's first step: its critic gives another token a the value V + a, so A = a for it.

    Token 0 ends a response, and behind the last place there is none.
    """
    seen: list[Any] = []
    keep = Spy("on_advantages", lambda module, experience: seen.append(experience))
    module = Toy(kl_coef=0.1)
    before = {m: (m.weight.detach().clone(), m.bias.detach().clone()) for m in (module.actor, module.reference)}
    run_updates([AdvantageRegression(2, replay=0), keep], module=module)
    (experience,) = seen
    mask = experience.response_mask
    others = torch.randint(TOKENS, (*mask.shape, 2), generator=torch.Generator().manual_seed(0))
    policy, reference = ((experience.features @ w.T + b).log_softmax(-1) for w, b in before.values())
    own = experience.returns - experience.values + 0.1 * experience.kl  # which the toy spreads evenly
    total, n_tokens = 0.0, int(mask[:4].sum())
    for i in range(4):  # the first minibatch
        for t in range(int(mask[i].sum())):
            tokens = [int(experience.response_ids[i, t])]
            advantages = [own[i, t].item()]
            for a in others[i, t].tolist():
                if a > 0 and t < mask.shape[1] - 1:
                    tokens.append(a)
                    advantages.append(float(a))
            errors = [
                (policy[i, t, token] - reference[i, t, token]).item() - advantage / 0.1
                for token, advantage in zip(tokens, advantages, strict=True)
            ]
            mean = sum(errors) / len(errors)
            total += 0.05 * sum((error - mean) ** 2 for error in errors) / len(errors) / n_tokens
    assert module.losses[0]["policy"] == pytest.approx(total, rel=1e-4)


def test_steps_have_earlier_responses_from_the_second_update_on():
    """Six responses an update in steps of four and two: twice as many earlier ones each, as far as there are any."""
    sizes: list[int] = []
    count = Spy("on_minibatch_start", lambda module, minibatch: sizes.append(len(minibatch.response_mask)))
    run_updates([AdvantageRegression(2, replay=2), count], 3, module=Toy(episodes=6, kl_coef=0.1))
    assert sizes == [4, 2, 4 + 6, 2 + 4, 4 + 8, 2 + 4]
    sizes.clear()
    run_updates([AdvantageRegression(2, replay=9, memory=1), count], 3, module=Toy(episodes=6, kl_coef=0.1))
    assert sizes == [4, 2, 4 + 6, 2 + 6, 4 + 6, 2 + 6]


def test_earlier_responses_count_as_new_ones_of_the_same_text(tmp_path: Path):
    """A step with half of an experience as earlier responses has the loss and gradients of one with all of it.

    They have another length of prompts and responses, so both sides are padded.
    """
    path = str(make_causal_lm(tmp_path / "lm", scale=4.0))
    module = make_module(path, critic="actor", micro_batch_size=2, minibatch_size=4, kl_coef=0.1)
    found: list[tuple[float, dict[str, torch.Tensor]]] = []

    def compare(module: Any, experience: Any) -> None:
        trick = module.trainer.callbacks[0]
        first = Minibatch.of(experience, range(4), "token_mean")
        for extend in (False, True):
            if extend:
                short = experience.select([2, 3])
                p, t = (int(x.sum(1).max()) for x in (short.prompt_mask, short.response_mask))
                for name in ("prompt_ids", "prompt_mask"):
                    setattr(short, name, getattr(short, name)[:, -p:])
                for name in ("response_ids", "response_mask", "logprobs", "ref_logprobs", "values", "kl", "advantages",
                             "returns", "rewards"):  # fmt: skip
                    setattr(short, name, getattr(short, name)[:, :t])
                short.extras = {k: x[:, :t] for k, x in short.extras.items() if isinstance(x, torch.Tensor)}
                trick._buffer.add(short)
                trick.replay = 1
                first = Minibatch.of(experience, [0, 1], "token_mean")
            metrics = module.backward_minibatch(first)
            gradients = {name: p.grad.clone() for name, p in module.actor.named_parameters() if p.grad is not None}
            found.append((metrics["policy_loss"], gradients))
        experience.exhausted = True

    trainer = make_trainer(
        tmp_path, max_steps=1, callbacks=[AdvantageRegression(3, replay=0), Spy("on_advantages", compare)]
    )
    trainer.fit(module, make_data(tmp_path, seed=0))
    (loss, gradients), (again, others) = found
    assert again == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-7)


def test_values_are_those_of_least_squares_where_it_is_there():
    """With it, a token's target is the difference of two solved values, not of the critic's own."""
    targets: list[torch.Tensor] = []
    keep = Spy("on_advantages", lambda module, experience: targets.append(experience.extras["action_targets"]))
    for tricks in ([], [LeastSquaresCritic(ridge=1.0)]):
        run_updates([*tricks, AdvantageRegression(2, replay=0), keep], module=Toy(kl_coef=0.1))
    assert not torch.allclose(*targets)


def test_earlier_rows_keep_every_dtype_through_a_checkpoint():
    rows = SimpleNamespace(
        response_mask=torch.tensor([[True, True], [True, False]]),
        extras={"half": torch.tensor([[0.5], [1.5]], dtype=torch.bfloat16), "none": torch.zeros(2, 0)},
        texts=["a", "b"],
        exhausted=False,
    )
    first, second = ReplayBuffer(2), ReplayBuffer(2)
    first.add(rows)
    second.load_state_dict(first.state_dict())
    for buffer in (first, second):
        minibatch = deepcopy(rows)
        buffer.extend(minibatch, 2, seed=0)
        order = [minibatch.texts[2:].index(text) for text in ("a", "b")]
        assert minibatch.extras["half"].dtype == torch.bfloat16
        assert minibatch.extras["half"][2:][order].tolist() == [[0.5], [1.5]]
        assert minibatch.response_mask[2:][order].tolist() == [[True, True], [True, False]]
        assert minibatch.extras["none"].shape == (4, 0)


def test_an_update_with_numbers_that_are_not_finite_is_not_learned_from_again():
    """Its own steps are skipped; with replay, later ones would be, too."""

    def break_second(module: Any, experience: Any) -> None:
        if int(module.updates) == 1:
            experience.values = torch.full_like(experience.values, torch.nan)

    trick = AdvantageRegression(2, replay=1)
    run_updates([Spy("on_rollout_end", break_second), trick], 2, module=Toy(kl_coef=0.1))
    (kept,) = trick.state_dict()["updates"]
    targets = torch.frombuffer(bytearray(kept["extras"]["action_targets"]["tensor"]), dtype=torch.float32)
    assert targets.isfinite().all()


def test_what_earlier_rows_lack_is_an_error_and_what_is_not_of_rows_stays():
    rows = SimpleNamespace(response_mask=torch.ones(2, 1) > 0, extras={"threshold": 0.5, "one": torch.zeros(2)})
    buffer, later = ReplayBuffer(2), deepcopy(rows)
    buffer.add(rows)
    buffer.extend(later, 2, seed=0)
    assert later.extras["threshold"] == 0.5
    assert len(later.extras["one"]) == 4
    later = deepcopy(rows)
    later.extras["two"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"^AdvantageRegression adds .* lack extras\['two'\]; set it in every update"):
        buffer.extend(later, 2, seed=0)


def test_another_n_on_resume_is_refused():
    with pytest.raises(ValueError, match=r"^AdvantageRegression\(n=3\): the earlier responses .* have 2 other tokens"):
        AdvantageRegression(3).load_state_dict(AdvantageRegression(2).state_dict())


def test_a_sampled_kl_in_the_loss_is_refused_beside_earlier_responses(tmp_path: Path):
    module = make_module(make_causal_lm(tmp_path / "lm"))
    with pytest.raises(
        ValueError, match=r"^KLLoss\(kind='k2'\): AdvantageRegression adds responses that other policies"
    ):
        make_trainer(tmp_path, callbacks=[KLLoss(0.1), AdvantageRegression()]).fit(module, make_data(tmp_path))


def test_scores_in_changing_units_are_refused_beside_earlier_responses(tmp_path: Path):
    given = RewardNormalization(statistics="given", mean=0.0, std=2.0)
    for tricks, message in (
        ([RewardScaling(), AdvantageRegression()], r"^RewardScaling\(statistics='running'\): AdvantageRegression adds"),
        ([RewardScaling(), AdvantageRegression(replay=0)], None),
        ([given, AdvantageRegression()], None),
    ):
        module = make_module(make_causal_lm(tmp_path / "lm"), critic="actor")
        with nullcontext() if message is None else pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, callbacks=tricks, max_steps=1).fit(module, make_data(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kl_coef": 0.0}, r"kl_coef=0\.0\): AdvantageRegression divides by it; it must be above 0"),
        (
            {"kl_estimator": "k3"},
            r"kl_estimator='k3'\): AdvantageRegression fits log-ratios, which only 'k1' penalises",
        ),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str):
    module = make_module(make_causal_lm(tmp_path / "lm"), **arguments)
    with pytest.raises(ValueError, match=rf"^LitPPO\({message}"):
        make_trainer(tmp_path, callbacks=[AdvantageRegression()]).fit(module, make_data(tmp_path))
