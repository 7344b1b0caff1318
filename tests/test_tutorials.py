"""The tutorials of the manual, on tiny models."""

import re
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest

from lit_ppo import LitPPO
from tests.helpers.command import run_command
from tests.helpers.manual import EXAMPLES, PAGES, blocks, commands, shipped
from tests.helpers.tiny import make_causal_lm, make_tokenizer, write_rows


@pytest.mark.filterwarnings("ignore:.*smaller than minibatch_size", "ignore:.*bf16")
def test_the_loop_for_users_of_trl(tiny_lm: Path) -> None:
    (block,) = (block for block in blocks("python", "from_trl.md") if "ppo.step(experience)" in block)
    assert "LitPPO(" in block
    names: dict[str, Any] = {
        "LitPPO": LitPPO, "loader": [["the film", "a plot"]] * 2, "my_scores": lambda *texts: [0.0, 1.0]
    }  # fmt: skip
    exec(block.replace("64", "4").replace("runs/sft/version_0/model", str(tiny_lm)), names)  # a path may hold 64
    names["ppo"].loop.close()
    assert names["metrics"]["objective/score"] == 0.5


def test_the_chat_tutorial(tmp_path: Path) -> None:
    """Its three stages, on tiny models and its own rows, repeated."""
    page = "tutorials/chat.md"
    base = make_causal_lm(tmp_path / "base", tokenizer=make_tokenizer(chat=True))
    titled = re.findall(r"^```json title=\"(\w+\.jsonl)\"\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)
    for title, text in titled:
        (tmp_path / title).write_text(text * 8)
    assert len(titled) == 3
    sizes = {
        "sft": ["--data.batch_size=4", "--data.val_fraction=0", "--trainer.accumulate_grad_batches=1"],
        "reward": ["--data.batch_size=4", "--data.val_fraction=0.5", "--trainer.accumulate_grad_batches=1"],
        "ppo": ["--data.batch_size=4", "--model.minibatch_size=4", "--data.val_fraction=0.5",
                "--model.generation.max_new_tokens=4"],
        "predict": [],
    }  # fmt: skip
    for command, kind in zip([c for c in commands(page) if c[0] == "lit-ppo"][:4], sizes, strict=True):
        words = [w.replace("Qwen/Qwen2.5-0.5B", str(base)) for w in command[1:]]
        names = iter(words)
        arguments = [a for w in names for a in (shipped(next(names)) if w == "--config" else [w])]
        steps = ["--trainer.max_steps=2"] if kind != "predict" else []
        run_command(*arguments, *sizes[kind], *steps, "--trainer.accelerator=cpu", cwd=tmp_path).ok()
    assert (tmp_path / "runs/ppo/version_1/predictions.jsonl").is_file()


def test_the_gsm8k_tutorial(tmp_path: Path) -> None:
    """Its configuration and rewards on rows in the format of the data set."""
    for name in ("gsm8k.py", "gsm8k.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    gsm8k = runpy.run_path(str(EXAMPLES / "gsm8k.py"))
    rows = [{"question": f"{i} films and {i} more", "answer": f"{i}+{i}=<<{i}+{i}={2 * i}>>{2 * i}\n#### {2 * i},000"}
            for i in range(8)]  # fmt: skip
    for split in ("train", "test"):
        write_rows(tmp_path / f"gsm8k_{split}.jsonl", map(gsm8k["row"], rows))
    actor = make_causal_lm(tmp_path / "actor", tokenizer=make_tokenizer(chat=True))
    sizes = ["--model.samples_per_prompt=2", "--model.minibatch_size=4", "--data.batch_size=4", "--trainer.max_steps=1",
             "--model.generation.max_new_tokens=4", "--data.val_fraction=0.25", "--trainer.accelerator=cpu",
             "--trainer.precision=32-true", f"--model.actor={actor}", "--data.max_prompt_length=24"]  # fmt: skip
    run_command("fit", *shipped("grpo"), "--config", "gsm8k.yaml", *sizes, cwd=tmp_path).ok()
    assert (tmp_path / "runs/gsm8k/version_0/model/config.json").is_file()
