"""No argument of a public class is silently ignored: each has two values whose runs differ.

A run's fingerprint is its weights, what it logged and what it printed. Arguments of tricks are tried in
``tests/callbacks/test_contract.py``, which demands a pair for each of them, too.
"""

import inspect
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

import lit_ppo
import lit_ppo.advantages
import lit_ppo.optim.schedules
import lit_ppo.rewards
from lit_ppo import LitRewardModel, LitSFT, PreferenceDataModule, PromptDataModule, TextDataModule
from lit_ppo.advantages import GAE, GroupRelative
from lit_ppo.cli.report import RunReport
from lit_ppo.optim.schedules import WarmupCosine
from lit_ppo.rewards import RewardFunction, RewardModel
from lit_ppo.run.checkpoint import StepCheckpoint
from lit_ppo.run.export import ExportModel
from tests.helpers.tiny import WORDS, make_causal_lm, make_reward_model, make_tokenizer
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
    for name, options in {"lm": {}, "lm2": {"seed": 7}}.items():
        make_causal_lm(folder / name, scale=4.0, **options)
    make_tokenizer(folder / "reversed", words=[*reversed([*WORDS, "user", "assistant"])])
    make_reward_model(folder / "reward")
    make_reward_model(folder / "reward2", seed=5)
    make_reward_model(folder / "two", num_labels=2)
    words = [" ".join(WORDS[i : i + 2 + i % 5]) for i in range(12)]
    rows = [
        {
            "prompt": text, "text": text, "other": f"{text} {WORDS[-i - 1]}", "chosen": f"good {text}",
            "rejected": f"bad {text}", "prefix": "The", "label": i % 2, "label2": 1 - i % 2, "part": i // 2,
        }
        for i, text in enumerate(words)
    ]  # fmt: skip
    for name, some in {"rows": rows, "more": rows[::-1][:7], "held": rows[:3], "held2": rows[5:9]}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    (folder / "sub").mkdir()
    (folder / "sub/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[4:]))
    loud = [{**row, "text": row["text"].upper(), "prompt": row["prompt"].upper()} for row in rows]
    loud = [{**row, "chosen": row["chosen"].upper()} for row in loud]
    (folder / "loud.jsonl").write_text("".join(json.dumps(row) + "\n" for row in loud))
    table = "".join(f"{row['text']},{row['other']},{row['chosen']},{row['rejected']}\n" for row in rows)
    (folder / "table.csv").write_text(table)
    return folder


def fingerprint(trainer: L.Trainer, module: Any) -> str:
    """Weights and logged numbers; nothing that hangs on the clock."""
    logger: Any = trainer.logger
    logged = [{k: v for k, v in row.items() if not re.match("time|throughput", k)} for row in logger.rows]
    return repr([logged, {name: w.double().sum().item() for name, w in sorted(module.state_dict().items())}])


def ppo_run(module: Any, data: PromptDataModule, *callbacks: L.Callback, **trainer: Any) -> str:
    """Two updates; an error is a result, too."""
    trainer = make_trainer(Path(), callbacks=list(callbacks), num_sanity_val_steps=0, **trainer)
    try:
        trainer.fit(module, data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return fingerprint(trainer, module)


def run_ppo(**arguments: Any) -> str:
    held_out = "held.jsonl" if "eval_rewards" in arguments else None
    data = PromptDataModule("rows.jsonl", val_path=held_out, batch_size=7, seed=0)
    return ppo_run(make_module(arguments.pop("actor"), **arguments), data)


def run_prompts(**arguments: Any) -> str:
    """Trains on them, or evaluates where other files are named."""
    data = PromptDataModule(**{"path": "rows.jsonl", "batch_size": 7, "seed": 0, **arguments})
    module = make_module(Path("lm"), minibatch_size=2)
    for name, stage in (("test_path", "test"), ("predict_path", "predict")):
        if name in arguments:
            trainer = make_trainer(Path())
            return repr(getattr(trainer, stage)(module, data, **({"verbose": False} if stage == "test" else {})))
    return ppo_run(module, data, max_steps=2, val_check_interval=1, check_val_every_n_epoch=None)


def run_sft(module: Any = None, **arguments: Any) -> str:
    """Trains a causal LM."""
    data = TextDataModule(**{"path": "rows.jsonl", "batch_size": 4, "seed": 0, "max_length": 16, **arguments})
    module = module or LitSFT("lm", optimizer=sgd(0.1))
    return supervised_run(module, data)


def run_preferences(module: Any = None, **arguments: Any) -> str:
    """Trains a reward model."""
    data = PreferenceDataModule(**{"path": "rows.jsonl", "batch_size": 4, "seed": 0, "max_length": 16, **arguments})
    return supervised_run(module or LitRewardModel("reward", optimizer=sgd(0.1)), data)


def supervised_run(module: Any, data: Any) -> str:
    L.seed_everything(0, verbose=False)  # dropout
    trainer = make_trainer(Path(), max_steps=-1, max_epochs=1, num_sanity_val_steps=0)
    trainer.fit(module, data)
    return fingerprint(trainer, module)


def run_model(module_class: Any, run: Callable[..., str]) -> Callable[..., str]:
    return lambda **arguments: run(module_class(**{"optimizer": sgd(0.1), **arguments}))


def run_with(argument: str) -> Callable[[type], Callable[..., str]]:
    """PPO with an object of the class as this argument."""
    return lambda made_class: lambda **arguments: run_ppo(actor=Path("lm"), **{argument: made_class(**arguments)})


def run_schedule(**arguments: Any) -> str:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    if "optimizer" in arguments:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments["optimizer"])
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    schedule = WarmupCosine(optimizer, **{k: v for k, v in arguments.items() if k != "optimizer"})
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    return repr(rates)


def run_callback(callback_class: type) -> Callable[..., str]:
    """PPO with one of the command's own callbacks: what it printed and the files it left."""

    def run(capture: Any, **arguments: Any) -> str:
        module = make_module(Path("lm"), actor_lora={"r": 2})
        data = PromptDataModule("rows.jsonl", batch_size=7, seed=0)
        before = set(Path().iterdir())
        ppo_run(module, data, callback_class(**arguments), max_steps=4, enable_checkpointing=True)
        left = set(Path().iterdir()) - before
        files = sorted(str(file) for folder in left for file in folder.rglob("*"))
        for folder in left:  # the next run shall find none of it
            shutil.rmtree(folder)
        return repr([capture.readouterr().out, files])

    return run


class Knobs:
    """How a public class is run, and for each of its arguments two sets that differ in it.

    Args:
        run: Arguments -> fingerprint.
        base: Arguments of every run.
        pairs: For each argument the two sets, laid over ``base``; or why no run can differ.
    """

    def __init__(self, run: Callable[..., str], base: Arguments, pairs: dict[str, tuple[Any, Any] | str]) -> None:
        self.run, self.base, self.pairs = run, base, pairs


def values(argument: str, one: Any, other: Any, **also: Any) -> tuple[Arguments, Arguments]:
    """Two values of an argument, beside others that both runs have."""
    return {argument: one, **also}, {argument: other, **also}


def pairs_of(**pairs: Any) -> dict[str, Any]:
    """``name=(one, other)`` or ``name=(one, other, {what both have})``, or a reason."""
    return {
        name: pair if isinstance(pair, str) else values(name, *pair[:2], **(pair[2] if len(pair) > 2 else {}))
        for name, pair in pairs.items()
    }


CRITIC_FREE: Arguments = {"actor": Path("lm"), "critic": None, "kl_coef": 0.0}
READ = {
    "path": ("rows.jsonl", "more.jsonl"),
    "val_path": (None, "held.jsonl"),
    "val_fraction": (0.0, 0.3),
    "split_column": (None, "part", {"val_fraction": 0.5}),
    "batch_size": (7, 5),
    "lower_case": (False, True, {"path": "loud.jsonl"}),
    "tokenizer": ("lm", "reversed"),
    "data_root": (None, "sub"),
    "seed": (0, 1),
}
MODEL = {
    "model": ("lm", "lm2"),
    "tokenizer": (None, "reversed"),
    "optimizer": (sgd(0.1), sgd(0.2)),
    "scheduler": (None, halved),
    "model_kwargs": (None, {"layer_norm_epsilon": 0.1}),
}
COLUMNS = ["text", "other", "chosen", "rejected"]
SPLIT = "results do not hang on it (tests/ppo/test_module.py: micro-batches); it bounds the memory of a forward"
KNOBS = {
    "LitPPO": Knobs(
        run_ppo,
        {"actor": Path("lm")},
        pairs_of(
            actor=(Path("lm"), Path("lm2")),
            tokenizer=(None, "reversed"),
            critic=("actor", "lm2"),
            reference=("actor", "lm2"),
            reference_dtype=("float32", "bfloat16"),
            actor_lora=(None, {"r": 2}),
            critic_lora=(None, {"r": 2}),
            rewards=(count_good, by_length),
            eval_rewards=({"judge": count_good}, {"judge": by_length}),
            advantages=(GAE(), GAE(lam=0.5)),
            generation=({"max_new_tokens": 10}, {"max_new_tokens": 5}),
            temperature=(1.0, 0.5),
            samples_per_prompt=(1, 2),
            kl_coef=(0.1, 1.0),
            kl_estimator=("k1", "k3"),
            clip_range=(None, 0.01),
            ppo_epochs=(1, 2),
            minibatch_size=(5, 3),
            micro_batch_size=SPLIT,
            micro_batch_tokens=SPLIT,
            sampling_logprobs_tolerance=(None, 1e-3),
            loss_reduction=("token_mean", "sequence_mean"),
            actor_optimizer=(sgd(0.1), sgd(0.2)),
            critic_optimizer=(sgd(0.1), sgd(0.2)),
            actor_scheduler=(None, halved),
            critic_scheduler=(None, halved),
            max_grad_norm=(None, 0.01),
            activation_checkpointing="results stay the same (tests/parallel/test_equivalence.py); it bounds the memory",
            compile_blocks="results do not hang on it (tests/parallel/test_equivalence.py); it is for speed",
            max_skipped_steps=(0, 100, {"actor_optimizer": sgd(float("inf"))}),
            reward_timeout=(None, 0.05, {"rewards": slow}),
            model_kwargs=(None, {"layer_norm_epsilon": 0.1}),
            seed=(0, 1),
        ),
    ),
    "FSDP2Strategy": Knobs(
        run_ppo,
        {},
        pairs_of(
            mixed_precision="on two ranks: tests/parallel/test_sharding.py",
            offload_frozen="on two ranks: tests/parallel/test_sharding.py",
            sync_every_micro_batch="on two ranks: tests/parallel/test_sharding.py",
            process_group_backend="Lightning's own",
            timeout="Lightning's own",
        ),
    ),
    "LitSFT": Knobs(run_model(LitSFT, run_sft), {"model": "lm"}, pairs_of(**MODEL)),
    "LitRewardModel": Knobs(
        run_model(LitRewardModel, run_preferences),
        {"model": "reward"},
        pairs_of(**MODEL | {"model": ("reward", "reward2")}),
    ),
    "PromptDataModule": Knobs(
        run_prompts,
        {},
        pairs_of(
            **READ,
            prompt_column=("prompt", "other"),
            test_path=("held.jsonl", "held2.jsonl"),
            predict_path=("held.jsonl", "held2.jsonl"),
            max_prompt_length=(None, 2),
            column_names=(COLUMNS, COLUMNS[::-1], {"path": "table.csv", "prompt_column": "text"}),
        ),
    ),
    "TextDataModule": Knobs(
        run_sft,
        {},
        pairs_of(
            **READ,
            text_column=("text", "other"),
            max_length=(16, 3),
            packing=(False, True),
            append_eos=(True, False),
            column_names=(COLUMNS, COLUMNS[::-1], {"path": "table.csv"}),
            tokenizer_path="it goes with tokenizer_vocab_size (below); the folder's name changes nothing but the place",
            tokenizer_vocab_size="a model has to be as large (tests/data/test_text.py looks at the tokenizer written)",
        ),
    ),
    "PreferenceDataModule": Knobs(
        run_preferences,
        {},
        pairs_of(
            **READ,
            chosen_column=("chosen", "other"),
            rejected_column=("rejected", "other"),
            prompt_column=(None, "other"),
            text_column=("text", "other", {"label_column": "label"}),
            label_column=("label", "label2", {"text_column": "text"}),
            max_length=(16, 3),
            column_names=(COLUMNS, COLUMNS[::-1], {"path": "table.csv"}),
        ),
    ),
    "GAE": Knobs(run_with("advantages")(GAE), {}, pairs_of(gamma=(1.0, 0.9), lam=(0.95, 0.5))),
    "GroupRelative": Knobs(
        lambda scale: run_ppo(advantages=GroupRelative(scale), samples_per_prompt=2, **CRITIC_FREE),
        {},
        pairs_of(scale=(True, False)),
    ),
    "LeaveOneOut": Knobs(run_ppo, {}, {}),
    "Reinforce": Knobs(run_ppo, {}, {}),
    "RewardModel": Knobs(
        run_with("rewards")(RewardModel),
        {"model": "reward"},
        pairs_of(
            model=("reward", "reward2"),
            tokenizer=(None, "reversed"),
            aggregation=("last", "mean"),
            label=(0, 1, {"model": "two"}),
            batch_size="scores do not hang on it (tests/rewards/test_model.py); it bounds the memory of a forward",
            batch_tokens="scores do not hang on it (tests/rewards/test_model.py); it bounds the memory of a forward",
            model_kwargs=(None, {"layer_norm_epsilon": 0.1}),
        ),
    ),
    "RewardFunction": Knobs(
        run_with("rewards")(RewardFunction),
        {"function": offset},
        pairs_of(function=(offset, count_good), kwargs=(None, {"by": 1.0})),
    ),
    "WarmupCosine": Knobs(
        run_schedule,
        {"warmup_steps": 2, "total_steps": 6},
        pairs_of(
            optimizer=(1.0, 2.0),
            warmup_steps=(2, 3),
            final_fraction=(0.0, 0.5),
            total_steps=(6, 5),
            last_epoch=(-1, 1),
        ),
    ),
    "RunReport": Knobs(run_callback(RunReport), {}, pairs_of(prompts=(3, 5), samples=(1, 3))),
    "StepCheckpoint": Knobs(
        run_callback(StepCheckpoint),
        {"every_n_train_steps": 1, "dirpath": "checkpoints"},
        pairs_of(
            every_n_train_steps=(1, 2, {"dirpath": "every"}),
            keep=(1, 2, {"dirpath": "keep"}),
            dirpath=("one", "other"),
        ),
    ),
    "ExportModel": Knobs(run_callback(ExportModel), {}, pairs_of(dirpath=("here", "there"), adapter=(False, True))),
}  # fmt: skip
TRIED = [
    (name, argument) for name in KNOBS for argument, pair in KNOBS[name].pairs.items() if not isinstance(pair, str)
]


def public_classes() -> dict[str, type]:
    """What users construct, but for the tricks."""
    found = {name: getattr(lit_ppo, name) for name in lit_ppo.__all__}
    found |= {
        c.__name__: c for c in (RewardModel, RewardFunction, WarmupCosine, RunReport, StepCheckpoint, ExportModel)
    }
    estimators = vars(lit_ppo.advantages).items()
    return found | {
        name: c
        for name, c in estimators
        if inspect.isclass(c) and issubclass(c, lit_ppo.advantages.AdvantageEstimator) and not inspect.isabstract(c)
    }


def test_every_argument_of_every_public_class_is_tried_or_excused() -> None:
    classes = public_classes()
    classes.pop("Experience")  # data, not configuration
    assert classes.keys() == KNOBS.keys()
    for name, public in classes.items():
        assert KNOBS[name].pairs.keys() == inspect.signature(public).parameters.keys(), name
        reasons = [pair for pair in KNOBS[name].pairs.values() if isinstance(pair, str)]
        for cited in re.findall(r"tests/\w+\.py", " ".join(reasons)):
            assert (Path(__file__).parent.parent / cited).exists()


@pytest.mark.filterwarnings("default")  # odd settings, and Lightning's advice on tiny data
@pytest.mark.parametrize(("name", "argument"), TRIED, ids=lambda value: str(value))
def test_two_values_make_two_runs(
    name: str, argument: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(folder)
    knobs = KNOBS[name]
    one, other = (knobs.base | arguments for arguments in knobs.pairs[argument])  # type: ignore[operator, union-attr]
    assert argument in one.keys() & other.keys()
    capture = {"capture": capsys} if name in ("RunReport", "StepCheckpoint", "ExportModel") else {}
    first, second = knobs.run(**one, **capture), knobs.run(**other, **capture)
    assert first != second
    assert [argument for run in (first, second) if re.match(r"\w+(Error|Exception): ", run)] in (
        [],
        ["max_skipped_steps"],
        ["reward_timeout"],
    )
