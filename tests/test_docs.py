"""The pages in docs/ say what is there."""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_ppo
import lit_ppo.callbacks
from lit_ppo import (
    ExportModel,
    LitPPO,
    LitRewardModel,
    LitSFT,
    PreferenceDataModule,
    PromptDataModule,
    StepCheckpoint,
    TextDataModule,
)
from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import write_prompts

FROM_TRL = (REPOSITORY / "docs/from_trl.md").read_text()


def test_metrics_named_there_are_logged_here(tmp_path: Path, tiny_lm: Path, tiny_reward: Path) -> None:
    """By the migrated configuration itself, on small models."""
    write_prompts(tmp_path, 32)
    (block,) = re.findall(r"```yaml\n(.*?)```", FROM_TRL, re.DOTALL)
    block = block.replace("runs/sft/version_0/model", str(tiny_lm)).replace(
        "runs/reward/version_0/model", str(tiny_reward)
    )
    (tmp_path / "migrated.yaml").write_text(block)
    arguments = ["--config", "migrated.yaml", "--model.generation.max_new_tokens=4", "--trainer.max_steps=2"]
    run_command("fit", *arguments, cwd=tmp_path).ok()
    events = EventAccumulator(str(tmp_path / "runs/migrated/version_0")).Reload()
    table = FROM_TRL.split("## Metrics\n")[1].split("\n## ")[0]
    ours = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][1:]
    named = {name for row in ours for name in re.findall(r"`(\w+/\w+)`", row)}
    assert len(named) > 10
    assert named <= set(events.Tags()["scalars"])
    # as TRL: 3e-6 at the first of ceil(10,000 / 32) = 313 updates, less a 313th of it with each
    assert "max_steps: 313 " in block
    for tag in ("policy/lr", "value/lr"):
        assert [point.value for point in events.Scalars(tag)] == pytest.approx([3e-6, 3e-6 * 312 / 313], rel=1e-5)


def test_the_command_that_switches_the_monitors_on(tmp_path: Path) -> None:
    """What stands behind a configuration on the command line is said to its callback."""
    page = (REPOSITORY / "docs/monitoring.md").read_text()
    (block,) = re.findall(r"```bash\n(lit-ppo .*?)\ntensorboard", page, re.DOTALL)
    gold = ["--trainer.callbacks.init_args.gold", "my_rewards.truth"]
    arguments = shlex.split(block.replace("\\\n", ""))[1:]
    behind = arguments.index("monitors/reward_hacking_monitor") + 1
    arguments[behind:behind] = gold
    printed = yaml.safe_load(run_command(*arguments, "--print_config", cwd=tmp_path).ok().out)
    callbacks = printed["trainer"]["callbacks"]
    given = {callback["class_path"].split(".")[-1]: callback["init_args"] for callback in callbacks}
    assert given.keys() - {"AdvantageNormalization"} == {
        path.stem.title().replace("_", "") for path in (REPOSITORY / "configs/monitors").iterdir()
    }
    assert given["AlignmentTax"]["data"]["init_args"]["path"] == "reviews.jsonl"
    assert given["RewardHackingMonitor"]["gold"] == "my_rewards.truth"


LOGGERS = {"TensorBoardLogger", "WandbLogger", "MLFlowLogger", "CSVLogger"}
OWNERS: dict[str, tuple[Any, ...]] = {
    "model": (LitPPO, LitSFT, LitRewardModel),
    "data": (PromptDataModule, TextDataModule, PreferenceDataModule),
    "trainer": (L.Trainer,),
    "checkpoint": (StepCheckpoint,),
    "export": (ExportModel,),
}


def test_every_argument_and_class_that_the_page_names_exists() -> None:
    """In the right columns: ``owner.argument``, an argument alone, ``Class`` and ``Class(argument=...)``."""
    owned = {
        name: {a for made in classes for a in (*inspect.signature(made).parameters, *dir(made))}
        for name, classes in OWNERS.items()
    }
    ours = {name: getattr(lit_ppo, name) for name in lit_ppo.__all__}
    ours |= {name: value for name, value in vars(lit_ppo.callbacks).items() if inspect.isclass(value)}
    rows = [line.split(" | ", 1)[1] for line in FROM_TRL.splitlines() if line.startswith("| ")]
    named = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    checked = 0
    for name in named:
        if match := re.match(r"(model|data|trainer|checkpoint|export)\.(\w+)", name):
            assert match[2] in owned[match[1]], name
        elif match := re.fullmatch(r"([A-Z]\w+)(\(.*\))?", name):
            assert match[1] in LOGGERS | ours.keys(), name
            arguments = re.findall(r"(\w+)=", match[2] or "")
            assert not arguments or set(arguments) <= inspect.signature(ours[match[1]]).parameters.keys(), name
        elif re.fullmatch(r"(actor|critic)_\w+", name):
            assert name in owned["model"], name
        else:
            continue
        checked += 1
    assert checked > 150
    for file in re.findall(r"`lit-ppo fit --config (\S+)`", FROM_TRL):
        assert (REPOSITORY / f"configs/{file}.yaml").is_file() or file == "migrated.yaml"


def test_the_port_in_python_is_that_in_yaml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All arguments of the module, of the data and of the tricks; the optimizers are looked at once they are made."""
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", FROM_TRL, re.DOTALL) if "trainer.fit(" in block)
    fitted: list[Any] = []
    monkeypatch.setattr(L.Trainer, "fit", lambda trainer, *given: fitted.extend((trainer, *given)))
    exec(code, {})
    trainer, module, data = fitted
    (block,) = re.findall(r"```yaml\n(.*?)```", FROM_TRL, re.DOTALL)
    config = yaml.safe_load(block)
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_lightning_class_args(L.LightningModule, "model", subclass_mode=True)
    parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
    other = parser.instantiate(parser.parse_object({key: config[key] for key in ("model", "data")}))
    for one, two in ((module, other.model), (data, other.data)):
        plain = {k: v for k, v in vars(one).items() if isinstance(v, str | int | float | tuple | None)}
        assert plain == {k: vars(two)[k] for k in plain}
    assert module.model_settings == other.model.model_settings
    assert repr((module.advantages, str(module.rewards))) == repr((other.model.advantages, str(other.model.rewards)))
    weights = [torch.nn.Parameter(torch.zeros(1))]
    for name, made in module.factories.items():
        optimizers = [make(weights) for make, _ in (made, other.model.factories[name])]
        assert optimizers[0].defaults == optimizers[1].defaults
        schedules = [made[1](optimizers[0]), other.model.factories[name][1](optimizers[1])]
        assert schedules[0].state_dict() == schedules[1].state_dict()
    assert trainer.max_steps == config["trainer"]["max_steps"]
    tricks = {type(c).__name__: vars(c) for c in trainer.callbacks if isinstance(c, lit_ppo.callbacks.PPOCallback)}
    for entry in config["trainer"]["callbacks"]:
        assert (entry.get("init_args") or {}).items() <= tricks.pop(entry["class_path"]).items()
    assert not tricks
