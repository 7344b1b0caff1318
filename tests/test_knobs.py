"""No argument of a public class is silently ignored: another value makes another run.

Tricks are tried in the same way in ``tests/callbacks/test_contract.py``.
"""

import inspect
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch

import lit_ppo
from lit_ppo import (
    GAE,
    GroupRelative,
    LitCritic,
    LitRewardModel,
    LitSFT,
    PreferenceDataModule,
    PromptDataModule,
    Reinforce,
    RewardFunction,
    RewardModel,
    TextDataModule,
)
from lit_ppo.rewards import scores_of
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model, make_tokenizer, write_rows
from tests.helpers.toys import count_good, make_module, make_trainer

Arguments = dict[str, Any]


def sgd(lr: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def halved(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)


def by_length(responses: list[str]) -> list[float]:
    return [float(len(response.split())) for response in responses]


def slow(responses: list[str]) -> list[float]:
    time.sleep(0.1)
    return by_length(responses)


def offset(prompts: list[str], responses: list[str], by: float = 0.0) -> list[float]:
    return [len(response.split()) + by for response in responses]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data of every kind, made once."""
    folder = tmp_path_factory.mktemp("knobs")
    make_causal_lm(folder / "lm", scale=4.0, n_layer=1)
    make_causal_lm(folder / "lm2", scale=4.0, seed=7, n_layer=1)
    make_tokenizer(folder / "reversed", words=[*reversed([*WORDS, "user", "assistant"])])
    make_reward_model(folder / "reward", n_layer=1)
    make_reward_model(folder / "reward2", seed=5, n_layer=1)
    make_reward_model(folder / "two", num_labels=2, n_layer=1)
    words = [" ".join(WORDS[i : i + 2 + i % 5]) for i in range(12)]
    rows = [
        {
            "prompt": text, "text": text, "other": f"{text} {WORDS[-i - 1]}", "chosen": f"good {text}",
            "rejected": f"bad {WORDS[i]}", "prefix": "The", "label": i % 2, "label2": 1 - i % 2, "part": i // 2,
        }
        for i, text in enumerate(words)
    ]  # fmt: skip
    for name, some in {"rows": rows, "more": rows[::-1][:7], "held": rows[:3], "held2": rows[5:9]}.items():
        write_rows(folder / f"{name}.jsonl", some)
    (folder / "sub").mkdir()
    write_rows(folder / "sub/rows.jsonl", rows[4:])
    loud = [row | {name: row[name].upper() for name in ("text", "prompt", "chosen")} for row in rows]
    write_rows(folder / "loud.jsonl", loud)
    table = "".join(f"{row['text']},{row['other']},{row['chosen']},{row['rejected']}\n" for row in rows)
    (folder / "table.csv").write_text(table)
    return folder


def weights(module: Any) -> dict[str, float]:
    return {name: w.double().sum().item() for name, w in module.state_dict().items()}


def run_ppo(updates: int = 1, **arguments: Any) -> Any:
    """The weights; and what was logged, times aside. An error is a result, too."""
    data = PromptDataModule("rows.jsonl", val_path="held.jsonl", batch_size=6, seed=0)
    trainer = make_trainer(Path(), max_steps=updates, num_sanity_val_steps=0, val_check_interval=updates)
    small = {"generation": {"max_new_tokens": 4}, "minibatch_size": 4, "micro_batch_size": None}
    small |= {"reference": "lm2"}  # so that the first update has a KL
    module = make_module(arguments.pop("actor", Path("lm")), **small | arguments)
    try:
        trainer.fit(module, data)
    except Exception as error:
        return f"{type(error).__name__}: {error}", ""
    logger: Any = trainer.logger
    logged = [{k: v for k, v in row.items() if not re.match("time|throughput|memory", k)} for row in logger.rows]
    return repr(weights(module)), repr(logged)


def run_data(made: type) -> Callable[..., str]:
    """All batches of an epoch, and of what is held out."""

    def run(**arguments: Any) -> str:
        data = made(**arguments)
        loaders = []
        for stage in ("fit", *(stage for stage in ("test", "predict") if f"{stage}_path" in arguments)):
            data.setup(stage)
            loaders += [data.train_dataloader(), data.val_dataloader()] if stage == "fit" else []
            loaders += [getattr(data, f"{stage}_dataloader")()] if stage != "fit" else []
        return repr([list(loader) for loader in loaders])

    return run


def run_supervised(module: type, data: type) -> Callable[..., str]:
    def run(**arguments: Any) -> str:
        L.seed_everything(0, verbose=False)  # dropout
        made = module(**{"optimizer": sgd(0.1), **arguments})
        trainer = make_trainer(Path(), max_steps=-1, max_epochs=1)
        trainer.fit(made, data("rows.jsonl", batch_size=4, seed=0, max_length=16))
        return repr(weights(made))

    return run


def run_scores(made: type) -> Callable[..., str]:
    """Scores of two responses."""
    rows = SimpleNamespace(prompts=["the film", "a"], responses=[" was good", " dull plot"], columns={})
    return lambda **arguments: repr(scores_of(made(**arguments), rows))


class Both(NamedTuple):
    """Two values that are tried instead of the base's and another, beside arguments that both runs have."""

    one: Any
    other: Any
    also: Arguments = {}


class Excused(NamedTuple):
    """No run can differ, or it is tried elsewhere."""

    why: str


class Logged(NamedTuple):
    """A value that changes what is logged, but not the weights."""

    value: Any


class Knobs:
    """How a public class is run, and another value of each of its arguments.

    Args:
        run: Arguments -> what came of the run.
        base: Arguments of every run.
        **others: For each argument a value that the base does not have, or :class:`Both`, or :class:`Excused`.
    """

    def __init__(self, run: Callable[..., Any], base: Arguments, **others: Any) -> None:
        self.run, self.base, self.others = run, base, others

    @cache  # noqa: B019  # as long as the tests run
    def base_run(self) -> Any:
        return self.run(**self.base)

    def runs(self, argument: str) -> tuple[Any, Any]:
        other = self.others[argument]
        if isinstance(other, Both):
            runs = [self.run(**self.base | other.also | {argument: value}) for value in other[:2]]
            return runs[0], runs[1]
        value = other.value if isinstance(other, Logged) else other
        return self.base_run(), self.run(**self.base | {argument: value})


COLUMNS = ["text", "other", "chosen", "rejected"]
CHATS = Excused("for chats: tests/data/test_chat.py, tests/ppo/test_collect.py, tests/rewards/test_model.py")
READ = {
    "path": "more.jsonl",
    "val_path": "held.jsonl",
    "val_fraction": 0.3,
    "split_column": Both(None, "part", {"val_fraction": 0.5}),
    "batch_size": 5,
    "lower_case": Both(False, True, {"path": "loud.jsonl"}),
    "tokenizer": "reversed",
    "data_root": "sub",
    "seed": 1,
    "max_rows": 5,
    "chat_template_kwargs": CHATS,
    "max_row_mb": Excused("a limit: tests/data/test_limits.py"),
}
READ_BASE = {"path": "rows.jsonl", "batch_size": 7, "seed": 0, "tokenizer": "lm"}
MODEL = {
    "tokenizer": "reversed",
    "optimizer": sgd(0.2),
    "scheduler": halved,
    "model_kwargs": {"layer_norm_epsilon": 0.1},
    "float32_matmul_precision": Excused("only GPUs have TF32 (tests/optim/test_precision.py: it is applied)"),
}
SPLIT = Excused("results do not depend on it (tests/ppo/test_module.py: micro-batches); it bounds a forward's memory")
SCORED = Excused("scores do not depend on it (tests/rewards/test_model.py); it bounds a forward's memory")
KNOBS = {
    "LitPPO": Knobs(
        run_ppo,
        {},
        actor=Path("lm2"),
        tokenizer="reversed",
        critic="lm2",
        reference="lm",
        reference_dtype="bfloat16",
        actor_lora={"r": 2},
        critic_lora={"r": 2},
        rewards=by_length,
        eval_rewards=Logged({"judge": by_length}),
        advantages=GAE(lam=0.5),
        generation={"max_new_tokens": 5},
        temperature=0.5,
        samples_per_prompt=2,
        kl_coef=1.0,
        kl_estimator="k3",
        clip_range=0.01,
        ppo_epochs=1,
        minibatch_size=3,
        micro_batch_size=SPLIT,
        micro_batch_tokens=SPLIT,
        engine=Excused("one of a user's own samples the same (tests/engines/test_sampler.py)"),
        rollout_ahead=Excused("needs an engine and ImportanceCorrection (tests/engines/test_ahead.py)"),
        rollout_batch_size=Excused("samples do not depend on it (tests/ppo/test_memory.py)"),
        rollout_batch_tokens=Excused("samples do not depend on it (tests/ppo/test_memory.py)"),
        sampling_logprobs_tolerance=Logged(1e-3),
        loss_reduction="sequence_mean",
        actor_optimizer=sgd(0.2),
        critic_optimizer=sgd(0.2),
        actor_scheduler=Both(None, halved, {"updates": 2}),
        critic_scheduler=Both(None, halved, {"updates": 2}),
        max_grad_norm=0.01,
        activation_checkpointing=Excused(
            "results stay the same (tests/parallel/test_equivalence.py); it bounds memory"
        ),
        float32_matmul_precision=Excused("only GPUs have TF32 (tests/ppo/test_precision.py: it is applied)"),
        compile_blocks=Excused("results do not depend on it (tests/parallel/test_equivalence.py)"),
        max_skipped_steps=Both(0, 100, {"actor_optimizer": sgd(1e30)}),
        reward_timeout=Both(None, 0.05, {"rewards": slow}),
        model_kwargs={"layer_norm_epsilon": 0.1},
        chat_template_kwargs=CHATS,
        skip_special_tokens=Excused("tests/ppo/test_collect.py: the text of responses"),
        seed=1,
    ),
    "LitSFT": Knobs(run_supervised(LitSFT, TextDataModule), {"model": "lm"}, model="lm2", **MODEL),
    "LitRewardModel": Knobs(
        run_supervised(LitRewardModel, PreferenceDataModule),
        {"model": "reward"},
        model="reward2",
        append_eos=True,
        **MODEL,
    ),
    "LitCritic": Knobs(
        run_supervised(LitCritic, TextDataModule),
        {"model": "reward", "rewards": by_length, "response_tokens": 2},
        model="reward2",
        rewards=count_good,
        response_tokens=1,
        **MODEL,
    ),
    "PromptDataModule": Knobs(
        run_data(PromptDataModule),
        READ_BASE,
        **READ,
        prompt_column="other",
        test_path=Both("held.jsonl", "held2.jsonl"),
        predict_path=Both("held.jsonl", "held2.jsonl"),
        max_prompt_length=2,
        column_names=Both(COLUMNS, COLUMNS[::-1], {"path": "table.csv", "prompt_column": "text"}),
    ),
    "TextDataModule": Knobs(
        run_data(TextDataModule),
        READ_BASE | {"max_length": 16},
        **READ,
        text_column="other",
        max_length=3,
        packing=True,
        append_eos=False,
        column_names=Both(COLUMNS, COLUMNS[::-1], {"path": "table.csv"}),
        tokenizer_path=Excused("it goes with tokenizer_vocab_size; only the place of a folder depends on it"),
        prompt_column=Both("chosen", "rejected", {"completion_column": "other"}),
        completion_column="other",
        train_on_prompts=Both(False, True, {"completion_column": "other"}),
        tokenizer_vocab_size=Excused("tests/data/test_text.py looks at the tokenizer written"),
    ),
    "PreferenceDataModule": Knobs(
        run_data(PreferenceDataModule),
        READ_BASE | {"max_length": 16},
        **READ,
        chosen_column="other",
        rejected_column="prefix",
        prompt_column="other",
        text_column=Both("text", "other", {"label_column": "label"}),
        label_column=Both("label", "label2", {"text_column": "text"}),
        max_length=3,
        column_names=Both(COLUMNS, COLUMNS[::-1], {"path": "table.csv"}),
    ),
    "GAE": Knobs(lambda **arguments: run_ppo(advantages=GAE(**arguments)), {}, gamma=0.9, lam=0.5, value_lam=0.5),
    "GroupRelative": Knobs(
        lambda scale: run_ppo(advantages=GroupRelative(scale), samples_per_prompt=2, critic=None, kl_coef=0.0),
        {"scale": True},
        scale=False,
    ),
    "Reinforce": Knobs(
        lambda **arguments: run_ppo(advantages=Reinforce(**arguments), samples_per_prompt=2, critic=None),
        {},
        group_baseline=True,
    ),
    "RewardModel": Knobs(
        run_scores(RewardModel),
        {"model": "reward"},
        model="reward2",
        tokenizer="reversed",
        aggregation="mean",
        label=Both(0, 1, {"model": "two"}),
        batch_size=SCORED,
        batch_tokens=SCORED,
        model_kwargs={"layer_norm_epsilon": 0.1},
        append_eos=True,
        pairs=Excused("needs a tokenizer with a separator: tests/rewards/test_model.py"),
        chat_template_kwargs=CHATS,
    ),
    "RewardFunction": Knobs(run_scores(RewardFunction), {"function": offset}, function=count_good, kwargs={"by": 1.0}),
}
TRIED = [(name, arg) for name in KNOBS for arg, other in KNOBS[name].others.items() if not isinstance(other, Excused)]


TRIED_ELSEWHERE = {
    "AdvantageEstimator": "abstract",
    "Engine": "abstract",
    "Experience": "data",
    "ExportModel": "tests/run/test_export.py, tests/models/test_lora.py (adapter and folder)",
    "FSDP2Strategy": "needs two ranks: tests/parallel/test_sharding.py",
    "LeaveOneOut": "has no arguments",
    "StepCheckpoint": "tests/cli/test_command.py: the files that are left",
    "TransformersEngine": "has no arguments",
    "VLLMEngine": "tests/engines/test_vllm_server.py, tests/engines/test_vllm_local.py",
    "WarmupCosine": "tests/optim/test_schedules.py has its rates by hand",
}


def test_every_argument_of_every_public_class_is_tried_or_excused() -> None:
    classes = {name: getattr(lit_ppo, name) for name in lit_ppo.__all__}
    assert classes.keys() - TRIED_ELSEWHERE == KNOBS.keys()
    for name, knobs in KNOBS.items():
        assert knobs.others.keys() == inspect.signature(classes[name]).parameters.keys(), name
        reasons = [other.why for other in knobs.others.values() if isinstance(other, Excused)]
        for cited in re.findall(r"tests/[\w/]+\.py", " ".join([*reasons, *TRIED_ELSEWHERE.values()])):
            assert (Path(__file__).parents[1] / cited).exists(), cited


@pytest.mark.filterwarnings(
    "ignore:.*were cut from the left",
    "ignore:.*the training is unstable",
    "ignore:.*does not have many workers",
)
@pytest.mark.parametrize(("name", "argument"), TRIED)
def test_another_value_makes_another_run(
    name: str, argument: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    first, second = KNOBS[name].runs(argument)
    if isinstance(first, tuple):  # of PPO: weights, and what is logged
        assert first[0] != second[0] or isinstance(KNOBS[name].others[argument], Logged)
    assert first != second
    errors = [run[0] for run in (first, second) if re.match(r"\w+(Error|Exception): ", run[0])]
    assert not errors or argument in ("max_skipped_steps", "reward_timeout")
