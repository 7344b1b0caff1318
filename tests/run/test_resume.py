"""A run that is resumed after any update ends as the uninterrupted run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from lit_ppo import LitCritic, LitRewardModel, LitSFT, PreferenceDataModule, RewardModel, TextDataModule
from lit_ppo.callbacks import AdaptiveKL, CriticWarmup, ReferenceUpdate, RewardNormalization
from lit_ppo.run.checkpoint import RUN, StepCheckpoint, find_checkpoints
from tests.helpers.equal import same
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model, write_rows
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer

UPDATES = 5  # two batches an epoch: into the third epoch


def callbacks(folder: Path, **saving: Any) -> list[Any]:
    return [
        AdaptiveKL(target=0.01, horizon=50),
        CriticWarmup(updates=2),
        RewardNormalization(),
        StepCheckpoint(**{"every_n_train_steps": 1, "keep": 9, "dirpath": str(folder / "checkpoints"), **saving}),
    ]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def halve(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def fit(
    folder: Path, actor: Path, ckpt_path: Path | None = None, updates: int = UPDATES, **saving: Any
) -> tuple[Any, list[dict[str, float]]]:
    module = make_module(actor, actor_optimizer=adam, critic_optimizer=adam, actor_scheduler=halve)
    trainer = make_trainer(folder, callbacks=callbacks(folder, **saving), max_steps=updates, enable_checkpointing=True)
    trainer.fit(module, make_data(folder), ckpt_path=None if ckpt_path is None else str(ckpt_path), weights_only=False)
    return module, logged(trainer)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    actor = make_causal_lm(folder / "lm", scale=4.0)
    module, rows = fit(folder, actor)
    assert len(rows) == UPDATES
    return folder, actor, module.state_dict(), rows


def test_a_finished_run_resumes_with_more_updates(tmp_path, uninterrupted):
    """It ends in the middle of an epoch, which Lightning counts as finished at the end of training."""
    _, actor, weights, rows = uninterrupted
    saving = {"every_n_train_steps": 50}
    fit(tmp_path, actor, updates=3, **saving)
    module, resumed = fit(tmp_path, actor, tmp_path / "checkpoints" / "step-000003.ckpt", **saving)
    assert [row["epoch"] for row in resumed] == [row["epoch"] for row in rows[3:]] == [1, 2]
    assert all(value.equal(weights[name]) for name, value in module.state_dict().items())


def test_a_checkpoint_holds_only_the_metrics_that_its_step_logs(tmp_path, uninterrupted):
    """Every other update is logged: of updates 0 to 3 those that are 1 and 3, after steps 2 and 4."""
    saving = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(tmp_path / "checkpoints"))
    options = {"max_steps": 4, "enable_checkpointing": True, "log_every_n_steps": 2}
    trainer = make_trainer(tmp_path, callbacks=[saving], **options)
    trainer.fit(make_module(uninterrupted[1]), make_data(tmp_path))
    runs = [torch.load(path, weights_only=True)[RUN] for path in find_checkpoints(tmp_path)]
    assert [run["steps_logged"] for run in runs] == [0, 1, 2, 3]
    assert [run["logged"].get("objective/score") for run in runs[::2]] == [None, None]
    scores = [row["objective/score"] for row in logged(trainer)]
    assert [run["logged"]["objective/score"] for run in runs[1::2]] == scores


def supervised(kind: str, folder: Path, actor: Path) -> tuple[Any, Any]:
    """A module and three batches an epoch."""
    rows = [{"text": word, "prompt": word, "chosen": f"{word} good", "rejected": word} for word in WORDS[:5]]
    path, module = write_rows(folder / "rows.jsonl", rows), LitSFT if kind == "SFT" else LitRewardModel
    data = TextDataModule if kind == "SFT" else PreferenceDataModule
    return module(str(actor), optimizer=adam, scheduler=halve), data(path, val_path=path, batch_size=2, seed=1)


@pytest.mark.parametrize("kind", ["SFT", "reward model", "PPO", "own loop"])
def test_a_run_resumed_between_epochs_has_the_checkpoints_of_the_uninterrupted_one(
    tmp_path: Path, kind: str, uninterrupted: Any
) -> None:
    """Three updates an epoch, and a checkpoint at each epoch's end: the next resume starts from the same state."""
    actor = uninterrupted[1]

    def fit(folder: Path, start: Path | None = None) -> dict[str, Any]:
        saving = StepCheckpoint(every_n_train_steps=3, keep=9, dirpath=str(folder))
        limits = {"max_steps": -1, "max_epochs": 4, "enable_checkpointing": True, "num_sanity_val_steps": 0}
        trainer = make_trainer(folder, callbacks=[saving], **limits)
        module: Any = make_module(actor, minibatch_size=2, actor_optimizer=adam, critic_optimizer=adam)
        data: Any = make_data(tmp_path, batch_size=4, val_path=str(tmp_path / "prompts.jsonl"))
        if kind in ("SFT", "reward model"):
            module, data = supervised(kind, tmp_path, actor)
        if kind == "own loop":
            with module.attach(trainer, data, ckpt_path=start) as batches:
                for prompts in batches:
                    experience = module.rollout(prompts)
                    experience.scores = count_good(experience.prompts, experience.responses)
                    module.step(experience)
        else:
            trainer.fit(module, data, ckpt_path=start)
        saved = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.ckpt"))}
        return {name: {key: x for key, x in checkpoint.items() if key != RUN} for name, checkpoint in saved.items()}

    full = fit(tmp_path / "full")
    assert [*full] == [f"step-{step:06d}.ckpt" for step in (3, 6, 9, 12)]
    rest = fit(tmp_path / "rest", tmp_path / "full/step-000003.ckpt")
    assert [*rest] == [*full][1:]
    for name, checkpoint in rest.items():
        assert same(checkpoint, full[name]), name


def chained(optimizer: Any) -> Any:
    """It has no count of its own."""
    parts = [halve(optimizer), torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)]
    return torch.optim.lr_scheduler.ChainedScheduler(parts, optimizer=optimizer)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["c_attn"]}])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to", "ignore:You're using the WeightAveraging callback")
def test_averaged_weights_and_chained_schedules_resume(tmp_path: Path, lora: Any, uninterrupted: Any) -> None:
    """Lightning's callback averages all of the module, and saves it under names with a prefix."""
    actor = uninterrupted[1]

    def fit(folder: Path, start: Path | None = None) -> dict[str, torch.Tensor]:
        module = make_module(actor, actor_lora=lora, actor_optimizer=adam, actor_scheduler=chained)
        saving = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(folder))
        averages = EMAWeightAveraging(decay=0.5)
        trainer = make_trainer(folder, callbacks=[averages, saving], max_steps=3, enable_checkpointing=True)
        trainer.fit(module, make_data(tmp_path), ckpt_path=start)
        return module.state_dict()

    full = fit(tmp_path / "full")
    rest = fit(tmp_path / "rest", tmp_path / "full/step-000001.ckpt")
    assert rest.keys() == full.keys()
    assert all(value.equal(full[name]) for name, value in rest.items())
    saved = torch.load(tmp_path / "full/step-000002.ckpt", weights_only=False)
    assert not [name for part in ("state_dict", "current_model_state") for name in saved[part] if "reference" in name]
    module = make_module(actor, actor_lora=lora)
    module.load_state_dict(full)  # strict: nothing that it needs is missing
    name, value = full.popitem()
    for weights, problem in ((full, f'Missing key.*"{name}"'), ({**full, name: value, "more": value}, '.*"more"')):
        with pytest.raises(RuntimeError, match=f"(?s){problem}"):
            module.load_state_dict(weights)


def test_a_schedule_that_is_added_starts_from_the_updates_of_its_model(tmp_path: Path, uninterrupted: Any) -> None:
    """Of three updates the actor has learned in the last one: a rate of 0.01 is halved once, then twice."""

    def fit(updates: int, start: Path | None = None, **schedule: Any) -> list[dict[str, float]]:
        module = make_module(uninterrupted[1], actor_optimizer=adam, **schedule)
        saving = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(tmp_path / "checkpoints"))
        options = {"max_steps": updates, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, callbacks=[CriticWarmup(updates=2), saving], **options)
        trainer.fit(module, make_data(tmp_path), ckpt_path=start)
        return logged(trainer)

    fit(3)
    rows = fit(5, tmp_path / "checkpoints/step-000003.ckpt", actor_scheduler=halve)
    assert [row["policy/lr"] for row in rows[-2:]] == pytest.approx([5e-3, 2.5e-3])


def test_a_checkpoint_of_other_models_is_refused(tmp_path, uninterrupted):
    folder, _, _, _ = uninterrupted
    other = make_causal_lm(tmp_path / "lm", n_layer=3)
    with pytest.raises(ValueError, match=r"Checkpoint does not match this LitPPO; missing: actor.model"):
        fit(tmp_path, other, folder / "checkpoints" / "step-000001.ckpt")


LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with models that other weights are copied over later."""
    make_causal_lm(tmp_path / "lm")
    make_causal_lm(tmp_path / "other", seed=5)
    make_reward_model(tmp_path / "rm")
    return tmp_path


def one_more_update(folder: Path, *callbacks: Any, start: bool = True, lm: str = "lm", **more: Any) -> Any:
    """An update, or another one after its checkpoint."""
    saving = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(folder / "saved"))
    rewards = {"good": count_good, "learnt": RewardModel(str(folder / "rm"))}
    module = make_module(folder / lm, rewards=rewards, **more)
    trainer = make_trainer(folder, callbacks=[*callbacks, saving], max_steps=1 + start, enable_checkpointing=True)
    trainer.fit(module, make_data(folder), ckpt_path=str(folder / "saved/step-000001.ckpt") if start else None)
    return trainer


def evaluate(folder: Path, module: Any) -> None:
    data = make_data(folder, val_path=str(folder / "prompts.jsonl"))
    make_trainer(folder).validate(module, data, ckpt_path=str(folder / "saved/step-000001.ckpt"))


def copy_over(source: Path, target: Path) -> None:
    shutil.copy(source / "model.safetensors", target / "model.safetensors")


def test_a_reference_with_other_weights_under_its_path_is_refused(models: Path) -> None:
    """Also for an evaluation of the checkpoint. Weights of actor and critic are in it, so their start may change."""
    one_more_update(models, start=False)
    shutil.copytree(models / "lm", models / "moved")
    copy_over(models / "other", models / "lm")
    where = r"LitPPO\(reference='\S+/lm'\): not the model that the run of \S+/saved/step-000001.ckpt started with"
    with pytest.raises(ValueError, match=where + r".*other content: model.safetensors; restore these files"):
        one_more_update(models)
    one_more_update(models, reference=None, kl_coef=0.0)
    assert one_more_update(models, lm="moved").global_step == 2  # with the same content
    for reference in (str(models / "other"), None):
        evaluate(models, make_module(models / "lm", reference=reference))
    with pytest.raises(ValueError, match=where):
        evaluate(models, make_module(models / "lm"))


def test_a_reward_model_with_other_weights_or_settings_under_its_path_is_refused(models: Path) -> None:
    one_more_update(models, start=False)
    file = models / "rm/config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "transformers_version": "5.0.0"}, indent=8))
    one_more_update(models)
    file.write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(ValueError, match=r"LitPPO\(rewards.learnt='\S+/rm'\).*other content: config.json"):
        one_more_update(models)
    make_reward_model(models / "rm", seed=9)
    with pytest.raises(ValueError, match=r"LitPPO\(rewards.learnt='\S+/rm'\).*other content: model.safetensors"):
        one_more_update(models)


def test_a_reference_that_is_in_the_checkpoint_may_have_other_files(models: Path) -> None:
    one_more_update(models, ReferenceUpdate(every=1), start=False)
    copy_over(models / "other", models / "lm")
    assert one_more_update(models, ReferenceUpdate(every=1)).global_step == 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # what peft itself asks
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_an_adapter_on_another_model_is_refused(models: Path, name: str) -> None:
    adapter: dict[str, Any] = {f"{name}_lora": LORA}
    one_more_update(models, start=False, **adapter)
    shutil.copytree(models / "lm", models / "kept")
    copy_over(models / "other", models / "lm")
    module = make_module(models / "lm", reference=str(models / "kept"), **adapter)
    with pytest.raises(ValueError, match=rf"LitPPO\({name}='\S+/lm'\): not the model"):
        evaluate(models, module)


def test_a_critic_in_pretraining_keeps_its_reward_model(models: Path) -> None:
    data = {"path": write_rows(models / "texts.jsonl", [{"text": " ".join(WORDS[:9])}] * 8), "val_fraction": 0.0}

    def fit_critic(steps: int, start: str | None) -> None:
        saving = StepCheckpoint(every_n_train_steps=1, dirpath=str(models / "saved"))
        trainer = make_trainer(models, callbacks=[saving], max_steps=steps, enable_checkpointing=True)
        module = LitCritic(str(models / "lm"), RewardModel(str(models / "rm")), 3)
        trainer.fit(module, TextDataModule(**data, batch_size=2, max_length=16), ckpt_path=start)

    fit_critic(1, None)
    fit_critic(2, str(models / "saved/step-000001.ckpt"))
    make_reward_model(models / "rm", seed=9)
    with pytest.raises(ValueError, match=r"LitCritic\(rewards='\S+/rm'\): not the model that the run of"):
        fit_critic(3, str(models / "saved/step-000002.ckpt"))


@pytest.mark.parametrize("optimizer", [torch.optim.Adafactor, torch.optim.RMSprop, torch.optim.NAdam])
def test_other_optimizers_resume(tmp_path, uninterrupted, optimizer):
    """Their states have other shapes: factors of rows and columns, numbers that are not tensors."""
    _, actor, *_ = uninterrupted

    def fit(updates: int, start: str | None = None) -> dict[str, torch.Tensor]:
        arguments = {
            name: lambda params: optimizer(params, lr=1e-2) for name in ("actor_optimizer", "critic_optimizer")
        }
        module = make_module(actor, **arguments)
        keep = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(tmp_path / "checkpoints"))
        trainer = make_trainer(tmp_path, callbacks=[keep], max_steps=updates, enable_checkpointing=True)
        trainer.fit(module, make_data(tmp_path), ckpt_path=start, weights_only=True)
        assert all(isinstance(placed.optimizer, optimizer) for placed in module.optimizers())
        return module.state_dict()

    before, expected = fit(1), fit(2)
    found = fit(2, str(tmp_path / "checkpoints/step-000001.ckpt"))
    assert all(value.equal(found[name]) for name, value in expected.items())
    assert any(not value.equal(before[name]) for name, value in expected.items())
