"""A run on one machine reserves its port; what else starts ranks is left alone."""

import errno
import socket

import lightning as L
import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment

import lit_ppo.parallel.strategies  # noqa: F401  # registers fsdp2
from lit_ppo.parallel.environment import ReservedPort, reserve_port


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
