"""Every shipped YAML through the command's entry point; families of models through ``ppo.yaml``."""

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_ppo.data.tokenization import train_tokenizer
from tests.helpers.command import REPOSITORY, run_command
from tests.helpers.ppo_command import RECIPES, ppo_arguments
from tests.helpers.tiny import WORDS, make_causal_lm
from tests.helpers.trick import tricks

CONFIGS = REPOSITORY / "configs"
TRICKS = {path.stem: path for path in sorted([*CONFIGS.glob("tricks/*"), *CONFIGS.glob("monitors/*")])}
EXCLUSIVE = [
    (
        "counterfactual_actions",
        "curriculum_sampling",
        "dynamic_sampling",
        "least_squares_critic",
        "reward_normalization",
    ),
    ("dual_clip", "prioritized_sampling", "rejection_sampling", "critic_warmup", "reward_scaling"),
    ("advantage_regression", "least_squares_critic"),
]
ELSEWHERE = {  # which test runs the others
    "supervised/test_configs.py": ("sft.yaml", "reward.yaml", "sentiment"),
    "cli/test_ppo.py": ("ppo.yaml",),
    "test_recipes.py": tuple(f"{name}.yaml" for name in RECIPES),
    "quickstart/test_run.py": ("quickstart", "quickstart.yaml"),
    "parallel/test_strategies.py": ("strategy",),
    "engines/test_command.py": ("vllm.yaml",),
    "test_configs.py": ("tricks", "monitors", "sentiment.yaml", "lora.yaml", "gpu.yaml"),
}


def test_every_yaml_has_a_test():
    assert {path.name for path in CONFIGS.iterdir()} == {name for names in ELSEWHERE.values() for name in names}
    assert all((REPOSITORY / "tests" / test).exists() for test in ELSEWHERE)


def test_every_trick_has_a_file():
    names = {
        path: yaml.safe_load(path.read_text())["trainer"]["callbacks+"][0]["class_path"] for path in TRICKS.values()
    }
    assert sorted(names.values()) == sorted(tricks())
    for path, name in names.items():
        assert path.stem.replace("_", "") == name.lower()
        assert path.parent.name == ("monitors" if tricks()[name].monitor else "tricks")


MOST = TRICKS.keys() - {*EXCLUSIVE[0], *EXCLUSIVE[2]}


@pytest.mark.parametrize("names", [MOST, EXCLUSIVE[0], EXCLUSIVE[2]], ids=["most", "others", "regression"])
def test_tricks_are_switched_on_by_their_files(names, tmp_path, tiny_lm, tiny_reward):
    """All but one of each two that exclude each other, then those."""
    overlays = [path for name, path in TRICKS.items() if name in names]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"the {w} was good"}) + "\n" for w in WORDS))
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    arguments += ["--trainer.callbacks=null", "--trainer.max_steps=2", "--model.samples_per_prompt=2"]
    arguments += [part for path in overlays for part in ("--config", str(path))]
    run_command("fit", *arguments, cwd=tmp_path).ok()
    saved = yaml.safe_load((tmp_path / "runs/ppo/version_0/config.yaml").read_text())
    found = [entry["class_path"].split(".")[-1].lower() for entry in saved["trainer"]["callbacks"]]
    assert found == [path.stem.replace("_", "") for path in overlays]


def test_another_family_trains_through_ppo_yaml(tmp_path, tiny_reward):
    """Byte-level BPE, as transformers gives any Qwen2 checkpoint its own tokenizer class, which reads nothing else."""
    train_tokenizer([" ".join(WORDS)] * 3, 300, tmp_path / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    actor = make_causal_lm(tmp_path / "actor", "qwen2", tokenizer=tokenizer)
    loaded = AutoTokenizer.from_pretrained(actor)
    assert loaded.decode(loaded("the film was").input_ids).strip() == "the film was"
    arguments = [*ppo_arguments(tmp_path, actor, tiny_reward), "--data.max_prompt_length=40"]
    run_command("fit", *arguments, "--trainer.max_steps=2", cwd=tmp_path).ok()


def test_adapters_are_switched_on_by_their_file(tmp_path, tiny_lm, tiny_reward):
    """Trained and exported; what cannot change is refused."""
    arguments = ppo_arguments(tmp_path, tiny_lm, tiny_reward)
    arguments += [part for name in ("lora", "gpu") for part in ("--config", str(CONFIGS / f"{name}.yaml"))]
    arguments += ["--trainer.max_steps=1", "--export.adapter=true"]
    run_command("fit", *arguments, cwd=tmp_path).ok()
    folder = tmp_path / "runs/ppo/version_0"
    other = run_command("fit", *arguments, "--ckpt_path=last", "--model.init_args.actor_lora.r=3", cwd=tmp_path)
    other.refused("model.init_args.actor_lora.r was 16, now 3", "the checkpoint holds that adapter")
    (checkpoint,) = folder.rglob("*.ckpt")
    for output, extra in (("adapter", ["--adapter"]), ("merged", [])):
        run_command("export", "--ckpt_path", checkpoint, f"--output={output}", *extra, cwd=tmp_path).ok()
    adapter, exported = (
        {path.name: path.read_bytes() for path in where.iterdir()} for where in (tmp_path / "adapter", folder / "model")
    )
    assert "adapter_config.json" in adapter
    assert adapter == exported
    assert not (tmp_path / "merged/adapter_config.json").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)


@pytest.mark.parametrize("overlay", [None, "regression"])
def test_the_film_review_job_on_ready_models(tmp_path, tiny_lm, tiny_reward, overlay):
    """Its stages are tested on their own; here PPO on what they leave, and its evaluation."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"prompt": f" the film {'was ' * i}", "id": str(i), "label": i % 2}) for i in range(12)]
    for split in ("train", "eval"):
        (data / f"imdb_prompts_{split}.jsonl").write_text("\n".join(rows))
    own = ["--config", CONFIGS / f"sentiment/{overlay}.yaml", "--model.critic", tiny_reward] if overlay else []
    arguments = [
        "--config", CONFIGS / "sentiment.yaml", *own, "--stages=null", "--data_root", data,
        "--model.actor", tiny_lm, "--model.rewards.model", tiny_reward, "--model.generation.max_new_tokens=4",
        "--data.path=imdb_prompts_train.jsonl", "--data.test_path=imdb_prompts_eval.jsonl", "--data.batch_size=4",
        "--data.val_fraction=0.2", "--model.minibatch_size=4", "--trainer.limit_train_batches=2",
    ]  # fmt: skip
    out = run_command("fit", *arguments, cwd=tmp_path).ok().out
    assert "prompts before and after" in out
    model = tmp_path / "runs/sentiment/ppo/version_0/model"
    out = run_command("test", *arguments, "--model.actor", model, "--model.reference", tiny_lm, cwd=tmp_path).ok().out
    assert "test/kl" in out


def test_the_judge_beside_the_reward_and_the_configuration_it_prints(tmp_path, tiny_lm, tiny_reward):
    """The full configuration can be run again, also with several rewards."""
    rows = [json.dumps({"prompt": f" the film {'was ' * i}"}) for i in range(3)]
    (tmp_path / "eval.jsonl").write_text("\n".join(rows))
    judged = (CONFIGS / "sentiment/judged.yaml").read_text()
    for name in ("reward", "judge"):
        judged = judged.replace(f"runs/sentiment/{name}/model", str(tiny_reward))
    (tmp_path / "judged.yaml").write_text(judged)
    arguments = [
        "--config", CONFIGS / "sentiment.yaml", "--config", "judged.yaml", "--stages=null", "--model.actor", tiny_lm,
        "--model.generation.max_new_tokens=4", "--data.path=eval.jsonl", "--data.predict_path=eval.jsonl",
        "--data.val_fraction=0",
    ]  # fmt: skip
    run_command("predict", *arguments, cwd=tmp_path).ok()
    folder = tmp_path / "runs/sentiment/ppo"
    printed = run_command("predict", *arguments, "--print_config", cwd=tmp_path).ok().out
    (tmp_path / "full.yaml").write_text(printed)
    run_command("predict", "--config", "full.yaml", cwd=tmp_path).ok()
    first, again = ((folder / f"version_{i}/predictions.jsonl").read_text() for i in (0, 1))
    assert first == again
    assert json.loads(first.splitlines()[0]).keys() == {"prompt", "response", "score", "score/reward", "score/judge"}
