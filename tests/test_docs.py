"""The pages in docs/ say what is there."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
    table = FROM_TRL.split("## Metrics\n")[1]
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
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    page = (REPOSITORY / "docs/monitoring.md").read_text()
    (block,) = re.findall(r"```bash\n(lit-ppo .*?)\ntensorboard", page, re.DOTALL)
    gold = ["--trainer.callbacks.init_args.gold", "my_rewards.truth"]
    arguments = shlex.split(block.replace("\\\n", ""))[1:]
    behind = arguments.index("configs/monitors/reward_hacking_monitor.yaml") + 1
    arguments[behind:behind] = gold
    printed = yaml.safe_load(run_command(*arguments, "--print_config", cwd=tmp_path).ok().out)
    callbacks = printed["trainer"]["callbacks"]
    given = {callback["class_path"].split(".")[-1]: callback["init_args"] for callback in callbacks}
    assert given.keys() - {"AdvantageNormalization"} == {
        path.stem.title().replace("_", "") for path in (REPOSITORY / "configs/monitors").iterdir()
    }
    assert given["AlignmentTax"]["data"]["init_args"]["path"] == "reviews.jsonl"
    assert given["RewardHackingMonitor"]["gold"] == "my_rewards.truth"
