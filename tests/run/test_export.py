"""The exported model is used as its starting checkpoint was, and says where it comes from."""

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lit_ppo import ExportModel, LitRewardModel, LitSFT, RewardModel, StepCheckpoint
from lit_ppo.callbacks import AdaptiveKL
from lit_ppo.models.card import write_card
from lit_ppo.models.export import save_model
from tests.helpers.cli_toys import Toy
from tests.helpers.supervised import fit, text_batch
from tests.helpers.tiny import make_causal_lm, make_reward_model, make_tokenizer
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to",
    "ignore:`is_gradient_checkpointing` is deprecated",
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
)
LORA = {"r": 2}
MADE: dict[str, Callable[[Path], Any]] = {
    "ppo": lambda path: make_module(path, temperature=0.7),
    "lora": lambda path: make_module(path, actor_lora=LORA),
    "sft": lambda path: LitSFT(str(path)),
    "reward": lambda path: LitRewardModel(str(path)),
}


@pytest.mark.parametrize("name", ["ppo", "lora", "lora alone", "sft"])
def test_settings_of_generation_are_those_of_the_start_but_for_the_stops(tmp_path: Path, name: str) -> None:
    """They contradict each other, as some published ones do: transformers saves no such config once it is changed."""
    start = make_causal_lm(tmp_path / "start", "llama", tokenizer=make_tokenizer(pad=False, chat=True))
    own = {"max_new_tokens": 99, "temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 20}
    (start / "generation_config.json").write_text(json.dumps(own))
    files = {file: (start / file).read_bytes() for file in ("tokenizer.json", "tokenizer_config.json")}
    module = MADE[name.split()[0]](start)
    module.tokenizer(["the film was good", "a"], truncation=True, max_length=2, padding=True)
    if name != "sft":
        module.rollout(["the film was", "a"], stream="test")
    module.save_pretrained(tmp_path / "end", **({"adapter": True} if "alone" in name else {}))
    written = json.loads((tmp_path / "end/generation_config.json").read_text())
    written.pop("transformers_version")
    assert written == own | {"eos_token_id": [0, 20]}
    assert {file: (tmp_path / "end" / file).read_bytes() for file in files} == files  # no pad token, no lengths
    if "alone" not in name:
        config = json.loads((start / "config.json").read_text())
        assert json.loads((tmp_path / "end/config.json").read_text()) == config


def test_a_folder_that_the_module_reads_is_never_written(tmp_path: Path, tiny_lm: Path, tiny_reward: Path) -> None:
    """By another name, too; neither actor nor reference, critic or reward; nor that of a supervised module."""
    (tmp_path / "link").symlink_to(tiny_reward)
    ppo = make_module(tiny_lm, critic=str(tiny_reward), rewards=RewardModel(str(tiny_reward)))
    for module, folder, setting in (
        (ppo, tiny_lm, "LitPPO.actor"),
        (ppo, tmp_path / "link", "LitPPO.critic"),
        (LitSFT(str(tiny_lm)), tiny_lm, "LitSFT.model"),
    ):
        before = {path: path.read_bytes() for path in Path(folder).iterdir()}
        with pytest.raises(ValueError, match=rf"^save_pretrained\(.*\): the run reads this folder \({setting}\); name"):
            module.save_pretrained(folder)
        assert {path: path.read_bytes() for path in Path(folder).iterdir()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^save_pretrained\(.*file'\): is a file; name a folder"):
        ppo.save_pretrained(tmp_path / "file")


def test_stops_are_those_of_training(tmp_path: Path, tiny_lm: Path) -> None:
    module = make_module(tiny_lm, generation={"max_new_tokens": 3, "eos_token_id": [7, 9]})
    module.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [7, 9]


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "bfloat16, not in its config", "float16, as .bin"])
@pytest.mark.parametrize("name", MADE)
def test_the_dtype_is_that_of_the_start_unless_another_is_asked_for(tmp_path: Path, name: str, stored: str) -> None:
    """Untrained weights come back bit for bit, and tied ones once; the config says what transformers' auto reads."""
    start = (make_reward_model if name == "reward" else make_causal_lm)(tmp_path / "start")
    dtype = getattr(torch, stored.split(",")[0])
    weights = {key: value.to(dtype) for key, value in load_file(start / "model.safetensors").items()}
    config = json.loads((start / "config.json").read_text()) | {"dtype": stored.split(",")[0]}
    if "," in stored:
        del config["dtype"]
    (start / "config.json").write_text(json.dumps(config))
    save_file(weights, start / "model.safetensors", {"format": "pt"})
    if "bin" in stored:
        (start / "model.safetensors").unlink()
        torch.save(weights, start / "pytorch_model.bin")
    module = MADE[name](start)
    module.save_pretrained(tmp_path / "end")
    found = load_file(tmp_path / "end/model.safetensors")
    assert found.keys() == weights.keys()
    assert all(found[key].dtype == dtype and found[key].equal(weights[key]) for key in weights)
    assert json.loads((tmp_path / "end/config.json").read_text())["dtype"] == stored.split(",")[0]
    module.save_pretrained(tmp_path / "full", dtype="float32")
    assert {w.dtype for w in load_file(tmp_path / "full/model.safetensors").values()} == {torch.float32}
    with pytest.raises(ValueError, match=r"save_pretrained\(dtype='int8'\): must be one of 'float32', 'bfloat16'"):
        module.save_pretrained(tmp_path / "full", dtype="int8")


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in MADE), ("lora", {"adapter": True})])
def test_weights_have_the_permissions_of_their_neighbours(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Those of the umask: a team reads what one of them exports."""
    module = MADE[name]((make_reward_model if name == "reward" else make_causal_lm)(tmp_path / "start"))
    before = os.umask(0o027)
    try:
        module.save_pretrained(tmp_path / "end", **options)
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "end").iterdir()} == dict.fromkeys(
        (file.name for file in (tmp_path / "end").iterdir()), 0o640
    )


def test_a_dtype_of_training_that_was_asked_for_stays(tmp_path: Path, tiny_lm: Path) -> None:
    LitSFT(str(tiny_lm), model_kwargs={"dtype": "bfloat16"}).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_weights_that_transformers_keeps_in_float32_are_not_cast(tmp_path: Path, tiny_lm: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_lm)
    model._keep_in_fp32_modules_strict = {"ln_f"}
    save_model(model, None, tmp_path, dtype=torch.bfloat16)
    kept = {k for k, w in load_file(tmp_path / "model.safetensors").items() if w.dtype == torch.float32}
    assert kept == {"transformer.ln_f.weight", "transformer.ln_f.bias"}


def test_an_adapter_finds_its_base_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_causal_lm(tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    module = make_module(Path("start"), actor_lora=LORA)
    module.save_pretrained("here", adapter=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert json.loads((tmp_path / "here/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "start"
    )
    assert peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "here")
    module.actor.model.peft_config["default"].base_model_name_or_path = "Qwen/Qwen2.5-0.5B"
    module.save_pretrained("hub", adapter=True)
    assert json.loads(Path("hub/adapter_config.json").read_text())["base_model_name_or_path"] == "Qwen/Qwen2.5-0.5B"


def test_the_card_of_a_ppo_run(tmp_path: Path, tiny_lm: Path) -> None:
    """Figures are those of the logger: with two updates, each end is one of them. A resumed run keeps its beginning."""
    rewards = {"good": {"source": count_good, "weight": 2.0}, "short": short}
    callbacks = [AdaptiveKL(), ExportModel(str(tmp_path / "model"))]
    options: dict[str, Any] = {"kl_coef": 0.25, "rewards": rewards, "actor_optimizer": sgd, "critic_optimizer": sgd}
    first = make_trainer(
        tmp_path, max_steps=1, callbacks=[*callbacks, StepCheckpoint(dirpath=str(tmp_path))], enable_checkpointing=True
    )
    callbacks[1].command = "lit-ppo fit --model.model_kwargs.token=hf_secret --x.max_new_tokens 3"
    first.fit(make_module(tiny_lm, **options), make_data(tmp_path))
    export = ExportModel(str(tmp_path / "model"))
    export.command = "lit-ppo fit --ckpt_path last"
    second = make_trainer(tmp_path, callbacks=[AdaptiveKL(), export])
    second.fit(make_module(tiny_lm, **options), make_data(tmp_path), ckpt_path=str(tmp_path / "step-000001.ckpt"))
    text = (tmp_path / "model/README.md").read_text()
    data = ModelCard.load(tmp_path / "model/README.md").data
    assert (data.library_name, data.pipeline_tag, data.base_model) == ("transformers", "text-generation", None)
    for cells in (
        f"base | `{tiny_lm}`", "KL | 0.25 x k1 in the rewards, to the starting model", "tricks | AdaptiveKL",
        "reward | good: 2 x `RewardFunction(count_good)`, short: 1 x `RewardFunction(short)`",
        f"data | `{tmp_path}/prompts.jsonl` (PromptDataModule)", "sampling | max_new_tokens 10, temperature 1",
    ):  # fmt: skip
        assert f"| {cells} |" in text
    (one,), (two,) = logged(first), logged(second)
    for metric in ("objective/score", "objective/kl"):
        assert f"| {metric} | {one[metric]:.4g} | {two[metric]:.4g} |" in text
    assert "of 2 updates" in text
    commands = "lit-ppo fit --model.model_kwargs.token=*** --x.max_new_tokens 3\nlit-ppo fit --ckpt_path last"
    assert f"```sh\n{commands}\n```" in text


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def short(responses: list[str]) -> list[float]:
    return [-len(response) / 100 for response in responses]


def test_the_card_of_supervised_runs_and_of_hub_names(tmp_path: Path, tiny_lm: Path, tiny_reward: Path) -> None:
    module: Any = LitSFT(str(tiny_lm))
    fit(module, [text_batch([[3, 4, 5]])] * 2, tmp_path, callbacks=[ExportModel(str(tmp_path / "sft"))])
    text = (tmp_path / "sft/README.md").read_text()
    assert re.search(rf"trained from `{tiny_lm}` .*\(SFT\).*given by the training script.*\| train/loss \|", text, re.S)
    LitRewardModel(str(tiny_reward)).save_pretrained(tmp_path / "reward")
    assert ModelCard.load(tmp_path / "reward/README.md").data.pipeline_tag == "text-classification"
    module.source.model = "Qwen/Qwen2.5-0.5B"
    write_card(tmp_path, {**module.card(), "dataset": "openai/gsm8k"}, adapter=True)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.base_model, data.datasets) == ("peft", "Qwen/Qwen2.5-0.5B", ["openai/gsm8k"])


def test_the_folder_is_pushed_in_one_commit(tmp_path: Path, tiny_lm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in takes the place of the hub. If it fails, the error says how to push the model later."""
    calls: list[Any] = []
    made = type("Repository", (), {"repo_id": "me/mine"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)) or made)
    monkeypatch.setattr(HfApi, "create_commit", lambda self, **options: calls.append(options))
    export = ExportModel(str(tmp_path / "model"), push_to_hub="mine", private=True)
    with pytest.warns(UserWarning, match="no token of the hub.*hf auth login"):
        fit(LitSFT(str(tiny_lm)), [text_batch([[3, 4, 5]])], tmp_path, callbacks=[export])
    assert calls[0] == ("mine", {"private": True, "exist_ok": True})
    assert calls[1]["repo_id"] == "me/mine"
    pushed = {operation.path_in_repo: operation.path_or_fileobj for operation in calls[1]["operations"]}
    assert pushed == {file.name: str(file) for file in (tmp_path / "model").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= pushed.keys()
    for module in (make_module(tiny_lm), LitSFT(str(tiny_lm))):
        module.save_pretrained(tmp_path / "code", push_to_hub="me/code")
        assert calls[-2] == ("me/code", {"private": None, "exist_ok": True})
        assert {operation.path_in_repo for operation in calls[-1]["operations"]} == pushed.keys()
        with pytest.raises(ValueError, match=r"save_pretrained\(push_to_hub='a/b/c'\): give the repository's name"):
            module.save_pretrained(tmp_path / "code", push_to_hub="a/b/c")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: 1 / 0)
    problem = rf"ExportModel\(push_to_hub='mine'\): not pushed.*model is in {tmp_path}/model; .*hf upload mine"
    with pytest.raises(RuntimeError, match=problem), warnings.catch_warnings(action="ignore"):
        fit(LitSFT(str(tiny_lm)), [text_batch([[3, 4, 5]])], tmp_path, callbacks=[export])


@pytest.mark.parametrize("name", ["true", "a/b/c", "a b", "datasets/me/x", ""])
def test_a_repository_needs_a_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"ExportModel\(push_to_hub='{name}'\): give the repository's name .* me/"):
        ExportModel(push_to_hub=name)


@pytest.mark.parametrize(("argument", "value"), [("dirpath", "out"), ("push_to_hub", "me/x"), ("dtype", "float32")])
def test_a_module_that_cannot_do_it_is_refused_before_training(tmp_path: Path, argument: str, value: str) -> None:
    with pytest.raises(TypeError, match=rf"ExportModel\({argument}='{value}'\): .*; .*leave export\.{argument} out"):
        ExportModel(**{argument: value}).setup(make_trainer(tmp_path), L.LightningModule(), "fit")  # type: ignore[arg-type]
    if argument == "dtype":
        with pytest.raises(TypeError, match=r"Toy\.save_pretrained takes no dtype"):
            ExportModel(dtype="float32").setup(make_trainer(tmp_path), Toy(), "fit")
