"""The command with an engine: the shipped configuration, and an engine of one's own in YAML."""

from pathlib import Path

from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.fake_vllm import FakeVLLM
from tests.helpers.ppo_command import ppo_arguments

VLLM = str(REPOSITORY / "configs/vllm.yaml")
MINE = """
from tests.helpers.engines import CopyEngine

class Mine(CopyEngine):
    def __init__(self, model: str) -> None:
        super().__init__(model)
        print("my engine samples")
"""


def test_vllm_overlay(tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    """Trains, resumes and tests with a server; without one, the address is named in one line."""
    server = FakeVLLM(tiny_lm)
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), "--config", VLLM, "--trainer.max_steps=2"]
    address = ["--model.engine.init_args.address", server.address]
    run_command("fit", *arguments, *address, cwd=tmp_path).ok()
    assert len(server.requests) > 4
    assert server.calls.count("lit_ppo_finish") >= 3
    saved = (tmp_path / "runs/ppo/version_0/config.yaml").read_text()
    assert "VLLMEngine" in saved
    assert "ImportanceCorrection" in saved
    server.stop_after = len(server.requests) - 3  # near the end of the same run
    died = run_command("fit", *arguments, *address, "--model.engine.init_args.restart_timeout=0.5", cwd=tmp_path)
    died.refused(f"VLLMEngine(address='{server.address}'): no server answered for 0.5 s (restart_timeout)")
    server.stop_after = -1
    server.start()
    run_command("fit", *arguments, *address, "--ckpt_path=last", cwd=tmp_path).ok()
    server.stop()
    gone = [*address, "--model.engine.init_args.restart_timeout=0"]
    run_command("fit", *arguments, *gone, cwd=tmp_path).refused(
        f"VLLMEngine(address='{server.address}'): no server answered for 0 s", "start one with: VLLM_SERVER_DEV_MODE=1"
    )
    checkpoint = next((tmp_path / "runs/ppo/version_0").rglob("*.ckpt"))
    run_command("export", "--ckpt_path", checkpoint, "--output=exported", cwd=tmp_path).ok()


def test_an_engine_of_ones_own_and_a_wrong_one(tmp_path: Path, tiny_lm: Path, tiny_reward: Path):
    (tmp_path / "mine.py").write_text(MINE)
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), "--trainer.max_steps=1"]
    own = ["--model.engine=mine.Mine", "--model.engine.init_args.model", tiny_lm]
    assert "my engine samples" in run_command("fit", *arguments, *own, cwd=tmp_path).ok().out
    run_command("fit", *arguments, "--model.engine=TransformersEngine", cwd=tmp_path).ok()
    wrong = ["--model.engine=VLLMEngine", "--model.engine.init_args.mode=server"]
    run_command("fit", *arguments, *wrong, cwd=tmp_path).refused("VLLMEngine(address=None): mode='server' needs")
