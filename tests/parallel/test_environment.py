"""A run on one machine reserves its port; what else starts ranks is left alone, and names what it cannot be sent."""

import errno
import functools
import pickle
import socket
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.plugins.environments import LightningEnvironment

import lit_ppo.parallel.strategies  # noqa: F401  # registers fsdp2
from lit_ppo import LitPPO, LitSFT
from lit_ppo.parallel.environment import ReservedPort, check_can_be_sent, check_starts_commands, reserve_port
from tests.helpers.toys import count_good, make_data, make_module


def test_the_port_is_open_from_the_choice_on(monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    first, second = ReservedPort(), ReservedPort()
    assert first.main_port == first.main_port != second.main_port
    with socket.socket() as other, pytest.raises(OSError, match="in use") as caught:
        other.bind(("", first.main_port))
    assert caught.value.errno == errno.EADDRINUSE


def test_a_port_that_the_user_names_stays(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "12345")
    assert ReservedPort().main_port == 12345


@pytest.mark.parametrize(
    ("name", "kind"), [("fsdp2", ReservedPort), ("ddp", ReservedPort), ("ddp_spawn", LightningEnvironment)]
)
def test_strategies_whose_rank_0_launches_the_others_reserve_it(name, kind):
    strategy = L.Trainer(accelerator="cpu", devices=2, strategy=name, logger=False).strategy
    if name != "fsdp2":  # brings its own
        reserve_port(strategy)
    assert type(strategy.cluster_environment) is kind
    assert strategy.world_size == 2
    assert name == "ddp_spawn" or strategy.launcher.cluster_environment is strategy.cluster_environment


def test_a_rank_that_is_already_started_keeps_its_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    strategy = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False).strategy
    reserve_port(strategy)
    assert type(strategy.cluster_environment) is LightningEnvironment


class Notes(L.Callback):
    def __init__(self, path):
        with open(path, "w") as self.file:
            pass  # a closed file cannot be pickled either


class Numbers(L.LightningDataModule):
    def __init__(self, rows):
        super().__init__()
        self._rows = {"train": [rows]}


def ppo(**arguments):
    return LitPPO("folder", generation={"max_new_tokens": 2}, **{"rewards": count_good, **arguments})


def local():
    return lambda responses: [0.0] * len(responses)


UNSENT = {
    "lambda": (lambda: ppo(rewards=lambda responses: responses), r"LitPPO\(rewards=<function .*<lambda>"),
    "one of several": (lambda: ppo(rewards={"a": count_good, "b": {"source": local()}}), r"LitPPO\(rewards=<function"),
    "partial": (lambda: ppo(eval_rewards={"a": functools.partial(local())}), r"LitPPO\(eval_rewards=<function local"),
    "optimizer": (lambda: ppo(critic_optimizer=lambda p: torch.optim.SGD(p)), r"LitPPO\(critic_optimizer=<function"),
    "schedule": (lambda: ppo(actor_scheduler=lambda o: o), r"LitPPO\(actor_scheduler=<function"),
    "sft": (lambda: LitSFT("folder", optimizer=lambda p: torch.optim.SGD(p)), r"LitSFT\(optimizer=<function"),
    "callback": (lambda: LambdaCallback(on_fit_end=lambda t, m: None), r"LambdaCallback\(on_fit_end=<function"),
    "data": (lambda: Numbers(n for n in range(2)), r"Numbers\(rows=<generator"),
    "loader": (lambda: torch.utils.data.DataLoader([1], collate_fn=lambda rows: rows), r"DataLoader\(collate_fn=<func"),
}


@pytest.mark.parametrize("kind", UNSENT)
def test_what_pickle_cannot_send_is_named(kind):
    make, words = UNSENT[kind]
    with pytest.raises(ValueError, match=f"{words}.*cannot be sent .* top level of a module.* use strategy='ddp'"):
        check_can_be_sent(torch.nn.Linear(1, 1), ppo(), LitSFT("folder"), make())


def test_open_files_are_named_by_their_attribute(tmp_path):
    with pytest.raises(ValueError, match=r"Notes\(file=<_io.TextIOWrapper"):
        check_can_be_sent(Notes(tmp_path / "notes"))


def test_no_rank_is_started_without_what_it_needs(tmp_path, tiny_lm, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "12345")
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp_spawn", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=r"LitPPO\(rewards=<function .*<lambda>"):
        trainer.fit(make_module(tiny_lm, rewards=lambda responses: [0.0]), make_data(tmp_path))
    assert not trainer.strategy.launcher.procs


def test_defaults_travel_and_weights_come_back(tiny_lm):
    """As under ddp_spawn: the module is pickled for the ranks, and the one that stays gets the weights of theirs."""
    sent = pickle.loads(pickle.dumps(ppo(actor_optimizer=torch.optim.SGD)))
    assert sent.factories["critic"][0]([torch.nn.Parameter(torch.ones(1))]).defaults["lr"] == 9e-6
    for make in (lambda: make_module(tiny_lm, rewards=count_good), lambda: LitSFT(str(tiny_lm))):
        trained, stays = make(), make()
        trained.configure_model()
        for parameter in trained.parameters():
            torch.nn.init.constant_(parameter, 0.5)
        stays.load_state_dict(trained.state_dict(), strict=False)
        assert {float(p.detach().sum() / p.numel()) for p in stays.parameters() if p.requires_grad} == {0.5}


def test_the_command_takes_no_strategy_that_sends_objects():
    for strategy in (
        "ddp_spawn",
        "ddp_notebook",
        SimpleNamespace(class_path="DDPStrategy", init_args={"start_method": "fork"}),
    ):
        with pytest.raises(ValueError, match=r"Trainer\(strategy='(ddp_|DDPS)\w+'\): starts processes by .* use 'ddp'"):
            check_starts_commands(strategy)
    for strategy in ("auto", "ddp", "fsdp2", SimpleNamespace(class_path="FSDP2Strategy", init_args={})):
        check_starts_commands(strategy)
