"""Adapters of low rank: what is trained, what the reference is, what is saved; nothing but the adapter moves."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

import lit_ppo.models.lora
from lit_ppo import LitSFT
from lit_ppo.callbacks import ReferenceUpdate
from lit_ppo.experience import Minibatch
from lit_ppo.models.actor_critic import Reference, actor_forward
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.models.packing import NAME
from lit_ppo.parallel.ranks import n_ranks
from lit_ppo.run.checkpoint import StepCheckpoint
from lit_ppo.run.export import ExportModel
from tests.helpers.ranks import on_ranks
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # what peft itself asks

PROMPTS = ["the film was really", "a", "we saw"]
EVERYWHERE = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def make(lm: Path, **overrides: Any) -> Any:
    """Both models with an adapter, in steps large enough to be seen."""
    arguments = {"actor_lora": EVERYWHERE, "critic_lora": EVERYWHERE, "actor_optimizer": adam}
    return make_module(lm, **{**arguments, **overrides})


def fit(folder: Path, lm: Path, *callbacks: Any, updates: int = 2, start: Path | None = None, **overrides: Any) -> Any:
    module = make(lm, **overrides)
    saves = any(isinstance(callback, StepCheckpoint) for callback in callbacks)
    trainer = make_trainer(folder, callbacks=[*callbacks], max_steps=updates, enable_checkpointing=saves)
    trainer.fit(module, make_data(folder), ckpt_path=None if start is None else str(start), weights_only=True)
    return module, trainer


def stock_logprobs(model: Any, experience: Any) -> torch.Tensor:
    """Log-softmax of a model's logits, each row alone and unpadded."""
    found = torch.zeros_like(experience.logprobs)
    for row in range(len(experience)):
        prompt = experience.prompt_ids[row][experience.prompt_mask[row]]
        response = experience.response_ids[row][experience.response_mask[row]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, response]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        found[row, : len(response)] = logits.log_softmax(-1).gather(1, response.unsqueeze(1)).squeeze(1)
    return found


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_causal_lm(tmp_path_factory.mktemp(request.param), request.param, scale=4.0)


@pytest.fixture(scope="module")
def trained(lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two updates with a checkpoint after each: folder, module, trainer."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = StepCheckpoint(every_n_train_steps=1, keep=9, dirpath=str(folder / "checkpoints"))
    return folder, *fit(folder, lm, checkpoint)


def test_it_starts_as_its_own_reference(lm: Path) -> None:
    """An adapter's second half starts at zero: not one bit differs."""
    module = make(lm)
    experience = module.rollout(PROMPTS)
    assert not experience.kl.any()
    assert module.actor.model.config._attn_implementation == NAME  # packed as without an adapter
    torch.testing.assert_close(
        experience.logprobs, stock_logprobs(AutoModelForCausalLM.from_pretrained(lm), experience), rtol=0, atol=1e-5
    )
    again, _ = actor_forward(module.actor, experience.model_inputs(), experience.kl.shape[1], module.temperature)
    assert (again - experience.logprobs).exp()[experience.response_mask].detach() == pytest.approx(1.0, abs=1e-5)


def test_after_training_only_the_adapter_has_moved(lm: Path, trained: Any) -> None:
    _, module, _ = trained
    before = AutoModelForCausalLM.from_pretrained(lm).state_dict()
    after = {name.replace(".base_layer", ""): p for name, p in module.actor.model.state_dict().items()}
    assert before.keys() == {name for name in after if ".lora_" not in name}
    assert all(after[name].equal(value) for name, value in before.items())
    backbone = {name.replace(".base_layer", ""): p for name, p in module.critic.backbone.state_dict().items()}
    prefix = AutoModelForCausalLM.from_pretrained(lm).base_model_prefix
    assert all(before[f"{prefix}.{name}"].equal(p) for name, p in backbone.items() if ".lora_" not in name)
    start = make(lm)
    start.configure_model()
    moved = {name for name, p in module.named_parameters() if not p.equal(start.get_parameter(name))}
    assert moved == {name for name, p in module.named_parameters() if p.requires_grad}
    assert {".lora_" in name for name in moved} == {True, False}
    assert {name for name in moved if ".lora_" not in name} == {"critic.value_head.weight", "critic.value_head.bias"}
    assert any(name.startswith("critic.backbone.") for name in moved)


def test_the_reference_is_still_the_stock_model(lm: Path, trained: Any) -> None:
    _, module, _ = trained
    experience = module.rollout(PROMPTS, stream="test")
    stock = AutoModelForCausalLM.from_pretrained(lm)
    torch.testing.assert_close(experience.ref_logprobs, stock_logprobs(stock, experience), rtol=0, atol=1e-5)
    assert (experience.ref_logprobs - experience.logprobs).abs().max() > 0.05
    plain = make_module(lm).rollout(PROMPTS, stream="test")
    assert module.rollout(PROMPTS, stream="test", policy="reference").response_ids.equal(plain.response_ids)
    assert not experience.response_ids.equal(plain.response_ids)


def test_exact_kl_is_that_of_the_two_distributions(lm: Path, trained: Any) -> None:
    """By hand over the whole vocabulary; and its gradient reaches the adapter alone."""
    _, module, _ = trained
    experience = module.rollout(PROMPTS, stream="test")
    kl = module.exact_kl(Minibatch.of(experience, range(3), "token_mean"))
    stock = AutoModelForCausalLM.from_pretrained(lm)
    for row in range(3):
        prompt = experience.prompt_ids[row][experience.prompt_mask[row]]
        response = experience.response_ids[row][experience.response_mask[row]]
        ids, first = torch.cat([prompt, response]).unsqueeze(0), len(prompt) - 1
        with torch.no_grad():
            ours, theirs = (model(ids).logits[0, first:-1].log_softmax(-1) for model in (module.actor.model, stock))
        expected = (ours.exp() * (ours - theirs)).sum(-1)
        torch.testing.assert_close(kl[row, : len(response)].detach(), expected, rtol=1e-4, atol=1e-5)
    module.zero_grad()
    kl.sum().backward()
    assert {".lora_" in name for name, p in module.named_parameters() if p.grad is not None} == {True}
    module.zero_grad()


def test_there_is_no_second_copy(lm: Path, trained: Any) -> None:
    """GPT-2 and Llama of 2 blocks: the weights are those of two models, the optimizers' of the adapters."""
    _, module, _ = trained
    size = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(lm).parameters())
    whole = make_module(lm)
    whole.configure_model()
    backbone = sum(p.numel() for p in whole.critic.parameters())
    adapters = sum(p.numel() for name, p in module.named_parameters() if ".lora_" in name)
    assert sum(p.numel() for p in module.parameters()) == size + backbone + adapters
    assert sum(p.numel() for p in whole.parameters()) == 2 * size + backbone
    assert not [name for name, _ in module.named_modules() if name.startswith("reference")]
    kept = sum(p.numel() for group in module.actor_optimizer.param_groups for p in group["params"])
    assert kept == sum(p.numel() for name, p in module.actor.named_parameters() if ".lora_" in name) < size


def test_checkpoints_hold_adapters_alone(trained: Any) -> None:
    folder, module, _ = trained
    saved = torch.load(folder / "checkpoints/step-000002.ckpt", weights_only=True)["state_dict"]
    assert saved.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert all(saved[name].equal(module.get_parameter(name)) for name in saved)


def test_resuming_changes_nothing(tmp_path: Path, lm: Path, trained: Any) -> None:
    folder, whole, _ = trained
    module, _ = fit(tmp_path, lm, start=folder / "checkpoints/step-000001.ckpt")
    assert all(p.equal(whole.get_parameter(name)) for name, p in module.named_parameters())


def test_checkpoints_of_other_adapters_are_refused(tmp_path: Path, trained: Any) -> None:
    folder, module, _ = trained
    lm, start = Path(module.model_settings.actor), folder / "checkpoints/step-000001.ckpt"
    with pytest.raises(ValueError, match=r"does not match this LitPPO; missing: actor\.model\."):
        fit(tmp_path, lm, start=start, actor_lora=None)
    with pytest.raises(ValueError, match=r"adapters of this LitPPO; unexpected: actor\.model\.\S+lora_A"):
        fit(tmp_path, lm, start=start, actor_lora={**EVERYWHERE, "exclude_modules": r".*\.0\..*"})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(tmp_path, lm, start=start, actor_lora={**EVERYWHERE, "r": 2})


def test_exports_merged_and_alone(tmp_path: Path, lm: Path, trained: Any) -> None:
    """Both give the trained actor's log-probs, and neither is the model that it started from."""
    _, module, _ = trained
    experience = module.rollout(PROMPTS, stream="test")
    module.save_pretrained(tmp_path / "merged")
    module.save_pretrained(tmp_path / "adapter", adapter=True)
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "tokenizer.json"}
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    stock = AutoModelForCausalLM.from_pretrained(lm)
    assert whole.state_dict().keys() == stock.state_dict().keys()
    assert whole.generation_config.max_new_tokens is None  # training's 10 do not become the default
    adapted = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(lm), tmp_path / "adapter")
    alone = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert len(alone) == sum(p.requires_grad for p in module.actor.parameters())
    for model in (whole, adapted, peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")):
        torch.testing.assert_close(stock_logprobs(model, experience), experience.logprobs, rtol=0, atol=1e-5)
    assert (stock_logprobs(stock, experience) - experience.logprobs).abs().max() > 0.05
    for folder in ("merged", "adapter"):  # the module is as it was
        module.save_pretrained(tmp_path / f"{folder}-again", adapter=folder == "adapter")
        for file in (tmp_path / folder).iterdir():
            assert (tmp_path / f"{folder}-again" / file.name).read_bytes() == file.read_bytes()
    torch.testing.assert_close(module.rollout(PROMPTS, stream="test").logprobs, experience.logprobs, rtol=0, atol=0)
    assert make(tmp_path / "merged").rollout(PROMPTS).kl.abs().max() == 0
    again = make(tmp_path / "adapter")  # an adapter on top of a merged one
    torch.testing.assert_close(again.rollout(PROMPTS, stream="test").logprobs, experience.logprobs, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"the actor '.*adapter' is itself an adapter.*the full model is written"):
        again.save_pretrained(tmp_path / "third", adapter=True)


def test_a_merged_export_has_the_dtype_of_the_start(tmp_path: Path, tiny_lm: Path) -> None:
    """Also under ``precision="bf16-true"``."""
    module = make(tiny_lm)
    module.configure_model()
    module.actor.to(torch.bfloat16)
    for dtype in (None, "bfloat16"):
        module.save_pretrained(tmp_path / "merged", dtype=dtype)
        weights = load_file(tmp_path / "merged" / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype or "float32")}


def test_an_adapter_that_nobody_trains_is_not_exported(tmp_path: Path, tiny_lm: Path) -> None:
    for module in (make(tiny_lm, actor_lora=None), LitSFT(str(tiny_lm))):
        name = type(module).__name__
        with pytest.raises(ValueError, match=rf"ExportModel\(adapter=True\): {name} trains no adapter"):
            ExportModel(adapter=True).setup(make_trainer(tmp_path), module, "fit")
    with pytest.raises(ValueError, match=r"save_pretrained\(adapter=True\): LitPPO trains no adapter"):
        make_module(tiny_lm).save_pretrained(tmp_path, adapter=True)


def test_a_reference_of_its_own_stays_possible(tmp_path: Path, lm: Path) -> None:
    other = make_causal_lm(tmp_path / "other", scale=4.0, seed=5)
    module = make(lm, reference=str(other), reference_dtype="bfloat16")
    assert module.rollout(PROMPTS).kl.abs().max() > 0.1
    assert type(module.reference) is Reference
    module = make(lm, reference=None)
    module.configure_model()
    assert module.reference is None


def test_one_model_with_an_adapter_and_the_other_without(tmp_path: Path, tiny_lm: Path) -> None:
    module, _ = fit(tmp_path, tiny_lm, updates=1, critic_lora=None)
    assert all(p.requires_grad for p in module.critic.parameters())
    names = module.state_dict().keys()
    assert sum(name.startswith("critic.") for name in names) == len(module.critic.state_dict())
    assert {".lora_" in name for name in names if name.startswith("actor.")} == {True}
    module, _ = fit(tmp_path, tiny_lm, updates=1, actor_lora=None)
    assert type(module.reference) is Reference
    assert {".lora_" in name for name in module.state_dict() if name.startswith("critic.backbone.")} == {True}
    assert all(p.requires_grad for p in module.actor.parameters())


def test_the_seed_makes_the_adapter_and_leaves_other_draws_alone(tiny_lm: Path) -> None:
    def first_half(seed: int) -> torch.Tensor:
        module = make(tiny_lm, seed=seed)
        module.configure_model()
        return torch.cat([p.flatten() for n, p in module.actor.named_parameters() if "lora_A" in n])

    assert first_half(3).equal(first_half(3))
    assert not first_half(3).equal(first_half(4))
    states = []
    for adapted in (True, False):
        torch.manual_seed(7)
        (make if adapted else make_module)(tiny_lm).configure_model()
        states.append(torch.get_rng_state())
    assert states[0].equal(states[1])


def test_rank_and_alpha_scale_what_the_adapter_adds(tiny_lm: Path) -> None:
    """Alpha over the rank, or over its root; names and numbers of layers say where the adapter lies."""
    scales, counts = {}, {}
    for name, fields in {
        "plain": EVERYWHERE,
        "alpha": {**EVERYWHERE, "lora_alpha": 16},
        "rslora": {**EVERYWHERE, "use_rslora": True},
        "rank": {**EVERYWHERE, "r": 8},
        "but the first": {**EVERYWHERE, "exclude_modules": r".*\.0\..*"},
        "default": {"lora_dropout": 0.0, "bias": "none"},
        "first": {"layers_to_transform": [0]},
    }.items():
        module = make(tiny_lm, actor_lora=fields)
        module.configure_model()
        layers = lit_ppo.models.lora._adapted_layers(module.actor)
        scales[name] = {layer.scaling["default"] for layer in layers}
        counts[name] = len(layers)
    assert scales["plain"] == {2.0}
    assert (scales["alpha"], scales["rslora"], scales["rank"]) == ({4.0}, {4.0}, {1.0})
    assert counts["but the first"] == counts["plain"] / 2
    assert 0 < counts["first"] == counts["default"] / 2 < counts["plain"] / 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no fields": ({"actor_lora": 16}, r"LitPPO\(actor_lora=16\): must be fields of peft\.LoraConfig"),
    "dropout": ({"actor_lora": {"lora_dropout": 0.1}}, r"LitPPO\(actor_lora=.*\): lora_dropout=0\.1 is not supported"),
    "biases": ({"critic_lora": {"bias": "all"}}, r"LitPPO\(critic_lora=.*\): bias='all' is not supported"),
    "typing error": ({"actor_lora": {"rank": 8}}, r"rank=8 is not supported.*give r, lora_alpha"),
    "half a reference": (
        {"reference_dtype": "bfloat16"},
        r"LitPPO\(reference_dtype='bfloat16'\): the reference is the actor without its adapter",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused_at_once(tiny_lm: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_lm, **arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_modules": ["nothing"]}, r"LitPPO\(actor_lora=.*\): .*nothing.* not found"),
        ({"target_modules": ["lm_head", "c_attn"]}, r"LitPPO\(actor_lora=.*\): target_modules hold the embeddings or"),
        ({"target_modules": ["wte", "c_attn"]}, r"LitPPO\(actor_lora=.*\): target_modules hold the embeddings or"),
        ({"r": 0}, r"LitPPO\(actor_lora.r=0\): must be an integer, at least 1"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about tied weights
def test_what_peft_cannot_make_names_the_argument(tiny_lm: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tiny_lm, actor_lora=fields).configure_model()


def test_no_critic_no_adapter(tiny_lm: Path) -> None:
    from lit_ppo.advantages import Reinforce

    with pytest.raises(ValueError, match=r"LitPPO\(critic_lora=.*\): there is no critic; leave it out"):
        make(tiny_lm, critic=None, advantages=Reinforce())


def test_without_peft_it_says_what_to_install(tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_ppo.models.lora, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"LitPPO\(actor_lora=.*\): needs peft; pip install 'lit-ppo\[peft\]'"):
        make(tiny_lm)
    make_module(tiny_lm)


def test_a_reference_that_is_the_actor_cannot_be_moved(tmp_path: Path, tiny_lm: Path) -> None:
    module = make(tiny_lm)
    with pytest.raises(ValueError, match=r"ReferenceUpdate cannot move LitPPO.s reference to its actor: they share"):
        make_trainer(tmp_path, callbacks=[ReferenceUpdate(every=1)]).fit(module, make_data(tmp_path))
    assert module.rollouts == 0
    module = make(tiny_lm)
    module.checkpoint_reference = True
    with pytest.raises(ValueError, match=r"LitPPO\(actor_lora=.*\): a callback moves the reference"):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert module.rollouts == 0


def test_an_error_while_the_adapter_is_off_leaves_it_on(tiny_lm: Path) -> None:
    module = make(tiny_lm)
    module.configure_model()
    assert isinstance(module.reference, WithoutAdapter)
    with pytest.raises(TypeError):
        module.reference(no="arguments")
    layers = lit_ppo.models.lora._adapted_layers(module.actor)
    assert layers
    assert not any(layer.disable_adapters for layer in layers)
    with lit_ppo.models.lora.adapter_off(module.actor):
        assert all(layer.disable_adapters for layer in layers)
        assert all(p.requires_grad for n, p in module.actor.named_parameters() if ".lora_" in n)


def fit_on_ranks(folder: Path, lm: Path, strategy: Any, start: Path | None = None, updates: int = 2) -> Any:
    """Leaves a checkpoint and both kinds of export in the folder."""
    callbacks = [
        StepCheckpoint(every_n_train_steps=9, dirpath=str(folder)),
        ExportModel(str(folder / "model")),
        ExportModel(str(folder / "adapter"), adapter=True),
    ]
    module = make(lm, critic_optimizer=adam)
    trainer = make_trainer(
        folder, devices=n_ranks(), strategy=strategy, max_steps=updates, callbacks=callbacks, enable_checkpointing=True
    )
    trainer.fit(module, make_data(folder), ckpt_path=None if start is None else str(start), weights_only=True)
    return module


def on_each_rank(folder: Path, lm: Path) -> None:
    for name in ("fsdp2", "ddp"):
        module = fit_on_ranks(folder / name, lm, name, folder / "one-1/step-000001.ckpt")
        held = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in module.parameters())
        shares: list[Any] = [None] * n_ranks()
        dist.all_gather_object(shares, held)
        assert name == "ddp" or held < 0.6 * sum(shares)


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("lm", ["gpt2"], indirect=True)
def test_ranks_resume_save_and_export_as_one_process(tmp_path: Path, lm: Path) -> None:
    """Checkpoints of any strategy load in any other and hold whole adapters; exports are the same byte for byte."""
    for name in ("one-1", "one-2", "fsdp2", "ddp", "fsdp2-again", "ddp-again"):
        (tmp_path / name).mkdir()
    fit_on_ranks(tmp_path / "one-1", lm, "auto", updates=1)
    fit_on_ranks(tmp_path / "one-2", lm, "auto")
    on_ranks(2, on_each_rank, tmp_path, lm, folder=tmp_path / "ranks")
    one = torch.load(tmp_path / "one-2/step-000002.ckpt", weights_only=True)["state_dict"]
    for name in ("fsdp2", "ddp"):
        saved = torch.load(tmp_path / name / "step-000002.ckpt", weights_only=True)["state_dict"]
        assert saved.keys() == one.keys()
        for key, weight in saved.items():  # Adam steps of 0.01, whose size hangs on the sign of rounding errors
            assert (weight - one[key]).abs().mean() < 5e-4, (name, key)
        again = fit_on_ranks(tmp_path / f"{name}-again", lm, "auto", start=tmp_path / name / "step-000002.ckpt")
        assert all(weight.equal(again.get_parameter(key)) for key, weight in saved.items())
        for kind, kept in (("model", "model.safetensors"), ("adapter", "adapter_config.json")):
            ours, theirs = (
                {path.name: path.read_bytes() for path in (tmp_path / folder / kind).iterdir()}
                for folder in (name, f"{name}-again")
            )
            assert kept in ours
            cards = [files.pop("README.md").decode() for files in (ours, theirs) if files.pop("lit_ppo_files.json")]
            assert cards[0] == cards[1].replace(
                f"{name}-again/prompts.jsonl", f"{name}/prompts.jsonl"
            )  # their own data
            assert ours == theirs
