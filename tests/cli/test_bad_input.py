"""Bad input through the command: no traceback, and a last line that names place, value and remedy."""

import json

import pytest

from tests.helpers.command import run_command
from tests.helpers.ppo_command import ppo_arguments
from tests.helpers.tiny import WORDS, make_causal_lm, make_tokenizer

REWARDS = """
import torch

def raises(prompts, responses):
    return [1 / 0 for _ in responses]

def too_few(prompts, responses):
    return [1.0] * (len(responses) - 1) if len(responses) > 1 else []

def not_a_number(prompts, responses):
    return [float("nan")] * len(responses)

def wrong_shape(prompts, responses):
    return torch.zeros(len(responses), 2)

def text(prompts, responses):
    return ["good"] * len(responses)
"""


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", ["ZeroDivisionError", "my_rewards.py", "line 5"]),
        ("too_few", ["too_few", "0", "1"]),
        ("not_a_number", ["not_a_number", "nan"]),
        ("wrong_shape", ["wrong_shape", "(1, 2)"]),
        ("text", ["text", "'good'"]),
        ("missing", ["my_rewards", "missing"]),
    ],
)
def test_a_bad_reward_function_is_found_before_the_first_update(function, words, tmp_path, tiny_lm, tiny_reward):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    rewards = ["--model.rewards=RewardFunction", f"--model.rewards.function=my_rewards.{function}"]
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), *rewards]
    result = run_command("fit", *arguments, cwd=tmp_path).refused(*words)
    assert "update 1" not in result.out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "the film"', ["prompts.jsonl", "line 3"]),
        ('{"prompt": ""}', ["prompts.jsonl", "line 3", "empty"]),
        ('{"prompt": null}', ["prompts.jsonl", "line 3"]),
        ('["the film"]', ["prompts.jsonl", "line 3"]),
        ('{"question": "the film"}', ["prompts.jsonl", "line 3", "prompt"]),
    ],
)
def test_a_bad_line_of_prompts_names_file_and_line(line, words, tmp_path, tiny_lm, tiny_reward):
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    (tmp_path / "prompts.jsonl").write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    run_command("fit", *arguments, cwd=tmp_path).refused(*words)


def test_actor_and_reference_of_different_vocabularies(tmp_path, tiny_lm, tiny_reward):
    other = make_causal_lm(tmp_path / "other", tokenizer=make_tokenizer(words=WORDS[:20]))
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), f"--model.reference={other}"]
    run_command("fit", *arguments, cwd=tmp_path).refused("LitPPO(reference=", "23", "43", "must share one")


def test_a_tokenizer_without_pad_token_trains(tmp_path, tiny_reward):
    actor = make_causal_lm(tmp_path / "actor", tokenizer=make_tokenizer(pad=False))
    run_command("fit", *ppo_arguments(tmp_path, actor, tiny_reward), "--trainer.max_steps=1", cwd=tmp_path).ok()


def test_chat_prompts_for_a_tokenizer_without_template(tmp_path, tiny_lm, tiny_reward):
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    rows = [json.dumps({"prompt": [{"role": "user", "content": word}]}) for word in WORDS]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    run_command("fit", *arguments, cwd=tmp_path).refused("PromptDataModule", "no chat template")


def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_checkpoint(tmp_path, tiny_lm, tiny_reward):
    """A learning rate beyond all reason: NaN after the first step; the batch's facts are told."""
    rate = "--model.actor_optimizer.lr=1e30"
    arguments = [*ppo_arguments(tmp_path, tiny_lm, tiny_reward), rate, "--model.ppo_epochs=1"]
    run_command("fit", *arguments, "--checkpoint.every_n_train_steps=1", cwd=tmp_path).refused(
        "update", "not finite", "max_skipped_steps=0", "responses"
    )
