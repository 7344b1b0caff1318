"""LeastSquaresCritic with CounterfactualActions or AdvantageRegression: two ranks do what one process does."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_ppo import GAE, RewardModel
from lit_ppo.callbacks import AdvantageNormalization, AdvantageRegression, CounterfactualActions, LeastSquaresCritic
from lit_ppo.parallel.ranks import n_ranks, rank
from tests.helpers.equivalence import weights
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import make_causal_lm, make_reward_model
from tests.helpers.toys import make_data, make_module, make_trainer
from tests.helpers.two_ranks import TrainedRows

TRICKS = {
    "CounterfactualActions": lambda: [AdvantageNormalization(), CounterfactualActions(3)],
    "AdvantageRegression": lambda: [AdvantageRegression(3, replay=1)],
}


def trained(folder: Path, strategy: str, trick: str) -> dict[str, Tensor]:
    """Weights after two updates."""
    rows = TrainedRows()
    module = make_module(
        folder / "lm",
        critic="reward",
        rewards=RewardModel(str(folder / "reward")),
        advantages=GAE(lam=0.3),
        micro_batch_size=2,
        minibatch_size=5,
        actor_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    tricks = [LeastSquaresCritic(ridge=10.0), *TRICKS[trick]()]
    trainer = make_trainer(
        folder / "run", devices=n_ranks(), strategy=strategy, max_steps=2, max_epochs=1, callbacks=[*tricks, rows]
    )
    trainer.fit(module, make_data(folder, seed=0))
    if n_ranks() > 1:
        rows.check_share()
    return weights(module)


def train_here(folder: Path, strategy: str, trick: str) -> None:
    """On each rank; the first one leaves the weights."""
    warnings.simplefilter("ignore")
    found = trained(folder, strategy, trick)
    if rank() == 0:
        torch.save(found, folder / "two.pt")


@pytest.mark.parametrize("strategy", ["ddp_find_unused_parameters_true", "fsdp2"])
@pytest.mark.parametrize("trick", TRICKS)
def test_two_ranks_learn_what_one_process_learns(tmp_path: Path, strategy: str, trick: str):
    make_causal_lm(tmp_path / "lm", "llama", scale=4.0)
    make_reward_model(tmp_path / "reward", "llama")
    make_data(tmp_path, seed=0)  # writes the prompts
    on_ranks(2, train_here, tmp_path, strategy, trick, folder=tmp_path / "ranks")
    many = torch.load(tmp_path / "two.pt", weights_only=True)
    one = trained(tmp_path, "auto", trick)
    start = make_module(tmp_path / "lm")
    start.configure_model()
    for name, before in start.actor.state_dict().items():
        name = f"actor.{name}"
        assert not torch.equal(one[name], before) or "inv_freq" in name
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
