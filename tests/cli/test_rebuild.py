"""``lit-ppo export`` runs nothing that a checkpoint names, unless its own command line says so."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_ppo.cli.main import main
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_module
from tests.helpers.traps import SPRING, with_code, with_pickle

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
EVIL: Any = {"class_path": "evil.Evil"}
# settings that name code of the working directory; an export needs none of them
STORED: dict[str, dict[str, Any]] = {
    "reward": {"rewards": {"class_path": "lit_ppo.RewardFunction", "init_args": {"function": "evil.f"}}},
    "reward by path": {"rewards": "evil.f"},
    "rewards": {"rewards": {"a": {"source": EVIL, "weight": 1.0}}, "eval_rewards": {"b": "evil.f"}},
    "optimizer": {"actor_optimizer": EVIL, "critic_optimizer": EVIL},
    "schedule": {"actor_scheduler": EVIL, "critic_scheduler": "evil.f"},
    "estimator": {"advantages": EVIL},
    "other models": {"critic": "code", "reference": "code", "model_kwargs": {"trust_remote_code": True}},
    "kernels": {"model_kwargs": {"use_kernels": True, "attn_implementation": "evil/kernel", "kernel_config": EVIL}},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a trap: a module, a model with code, and one whose weights are a pickle with a trap."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask
    (tmp_path / "evil.py").write_text(
        f"{SPRING}\nfrom lit_ppo import LitPPO\nclass Evil(LitPPO): pass\ndef f(responses): return responses"
    )
    make_causal_lm(tmp_path / "lm")
    with_code(make_causal_lm(tmp_path / "code"), "GPT2LMHeadModel")
    with_pickle(make_causal_lm(tmp_path / "bin"))
    return tmp_path


def save(folder: Path, model: dict[str, Any]) -> None:
    """A checkpoint of an untrained actor with this configuration."""
    module = make_module(folder / "lm")
    module.configure_model()
    state: dict[str, Any] = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0", "global_step": 1}
    counts = {"rollouts": 0, "skipped_steps": 0, "updates": {"actor": 0, "critic": 0}, "optimizers": {}}
    state |= {"lit_ppo": counts, "lit_ppo_frozen": {}}
    torch.save(state | {"lit_ppo_run": {"config": {"model": model}}}, folder / "x.ckpt")


def stored(**arguments: Any) -> dict[str, Any]:
    arguments = {"actor": "lm", "generation": {"max_new_tokens": 3}, **arguments}
    return {"class_path": "lit_ppo.LitPPO", "init_args": arguments}


@pytest.mark.parametrize("arguments", STORED.values(), ids=STORED.keys())
def test_what_an_export_does_not_need_is_not_looked_at(here: Path, arguments: dict[str, Any]) -> None:
    save(here, stored(**arguments))
    assert main(["export", "--ckpt_path", "x.ckpt", "--output", "out"]) == 0
    assert AutoModelForCausalLM.from_pretrained("out")
    assert not (here / "sprung").exists()
    assert "evil" not in sys.modules


REFUSED: dict[str, tuple[dict[str, Any], list[str], str]] = {
    "class": ({"class_path": "evil.Evil", "init_args": {"actor": "lm"}}, [], "names the class 'evil.Evil'"),
    "another class is trusted": ({"class_path": "evil.Evil"}, ["--trust_class", "os.system"], "add --trust_class"),
    "function": ({"class_path": "os.system"}, ["--trust_class", "os.system"], "is no class"),
    "name like ours": ({"class_path": "evil.LitPPO"}, [], "names the class 'evil.LitPPO'"),
    "class in an argument": (
        {"class_path": "tests.helpers.cli_toys.Toy", "init_args": {"start": EVIL}},
        ["--trust_class", "tests.helpers.cli_toys.Toy"],
        "names the class 'evil.Evil'",
    ),
    "code of the actor": (
        stored(actor="code", model_kwargs={"trust_remote_code": True}), [], "add --trust_remote_code",
    ),
    "code of a model for SFT": (
        {"class_path": "LitSFT", "init_args": {"model": "code", "model_kwargs": {"trust_remote_code": True}}},
        [],
        "add --trust_remote_code",
    ),
    "code is trusted, the class is not": ({"class_path": "evil.Evil"}, ["--trust_remote_code"], "add --trust_class"),
    "pickle": (
        stored(actor="bin", model_kwargs={"weights_only": False}), ["--trust_remote_code"], "loading them would run",
    ),
    "no class": ({"init_args": {}}, [], "no model with class_path"),
    "no mapping": ({"class_path": "LitPPO", "init_args": [1]}, [], "no model with class_path"),
    "other arguments": (stored(colour="red"), [], "does not fit lit_ppo.LitPPO"),
}  # fmt: skip


@pytest.mark.parametrize(("model", "options", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_code_runs_only_by_consent_on_the_command_line(
    here: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], options: list[str], words: str
) -> None:
    save(here, model)
    assert main(["export", "--ckpt_path", "x.ckpt", "--output", "out", *options]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("lit-ppo: error: ")
    assert words in last
    assert not (here / "sprung").exists()
    assert not (here / "out").exists()


def test_consent_is_enough(here: Path) -> None:
    model = stored(actor="code", rewards="evil.f")
    save(here, {**model, "class_path": "evil.Evil"})
    config = json.loads((here / "code/config.json").read_text())
    command = [
        "export",
        "--ckpt_path",
        "x.ckpt",
        "--output",
        "out",
        "--trust_remote_code",
        "--trust_class",
        "evil.Evil",
    ]
    try:
        assert main(command) == 0
    finally:
        sys.modules.pop("evil", None)
    assert (here / "sprung").exists()
    assert json.loads((here / "out/config.json").read_text())["model_type"] == config["model_type"]


def test_classes_of_the_package_have_more_names_than_one(here: Path) -> None:
    for name in ("LitPPO", "lit_ppo.LitPPO", "lit_ppo.ppo.module.LitPPO"):
        save(here, {**stored(), "class_path": name})
        assert main(["export", "--ckpt_path", "x.ckpt", "--output", "out"]) == 0
