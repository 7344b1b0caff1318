"""Every argument of every public class: it works, or an error names class, argument, value and remedy."""

import inspect
import math
import re
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lit_ppo
from lit_ppo import LitPPO, LitSFT, RewardModel, callbacks
from lit_ppo.optim.settings import build_optimizer
from tests.helpers.rewards import lengths
from tests.helpers.toys import make_module

GENERATION = {"max_new_tokens": 4}
TEXTS = lit_ppo.TextDataModule([{"text": "a"}])
MINIMAL: dict[str, dict[str, Any]] = {
    "LitPPO": {"actor": "x", "generation": GENERATION},
    **{name: {"model": "x"} for name in ("LitSFT", "LitRewardModel", "RewardModel")},
    "LitCritic": {"model": "x", "rewards": lengths, "response_tokens": 4},
    **{name: {"path": "x"} for name in ("PromptDataModule", "TextDataModule", "PreferenceDataModule")},
    "RewardFunction": {"function": lengths},
    "VLLMEngine": {"mode": "server", "address": "http://localhost:8000"},
    "AlignmentTax": {"data": TEXTS},
    "CriticWarmup": {"updates": 2},
    "CurriculumSampling": {"column": "level", "updates": 3},
    "KLEarlyStop": {"target": 0.1},
    "KLLoss": {"coef": 0.1},
    "LearningRateAdaptation": {"target": 0.1},
    "LengthPenalty": {"budget": 3, "coef": 0.1},
    "MissingEndPenalty": {"penalty": 1.0},
    "PTXLoss": {"data": TEXTS, "coef": 0.1},
    "PrioritizedSampling": {"threshold": 0.5},
    "ReferenceUpdate": {"every": 2},
    "RejectionSampling": {"k": 2},
    "RewardClipping": {"limit": 1.0},
}


def minimal(name: str) -> dict[str, Any]:
    """The arguments that a class cannot do without."""
    if name == "WarmupCosine":  # a schedule leaves its traces in the optimizer
        return {"optimizer": torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)}
    return MINIMAL.get(name, {})


BASES = {"AdvantageEstimator", "Engine", "PPOCallback", "Experience"}  # abstract, without arguments, rows of tensors
CLASSES = {
    name: getattr(room, name)
    for room in (lit_ppo, callbacks)
    for name in room.__all__
    if inspect.isclass(getattr(room, name)) and name not in BASES
}
ARGUMENTS = sorted(
    (name, argument) for name, kind in CLASSES.items() for argument in inspect.signature(kind).parameters
)


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    __eq__ = __bool__ = __fspath__ = __repr__  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
LOOP: dict[str, Any] = {}
LOOP["a"] = LOOP
SCALARS = [np.int64(4), np.float32(0.5), np.bool_(True), np.array(3), torch.tensor(3), torch.tensor(0.5)]
ODD = [
    *SCALARS, np.float32("nan"), np.array([1, 2]), np.datetime64("2020-01-01"), torch.tensor([1, 2]), torch.tensor(1j),
    torch.empty((), device="meta"), torch.float32, torch.nn.Linear(1, 1), torch.optim.AdamW, int, print, ..., object(),
    Unprintable(), DEEP, LOOP, range(10**15), list(range(10**5)), "y" * 10**6, "a\0b", "\ud800", "\x1b[2J", Path("x"),
    10**400, -(10**400), 10**6000, 1e300, 1e-300, 1e40, 1e9, 10**11, math.nan, math.inf, 2.5, 2.0, 1j, "1", "", " ",
]  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.binary(max_size=3)
VALUES = st.sampled_from(ODD) | st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
DETERMINISTIC = settings(
    derandomize=True, database=None, deadline=None, max_examples=10, suppress_health_check=list(HealthCheck)
)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that an annotation names; True for annotations of other types than these."""
    if get_origin(hint) in (Union, UnionType):
        return any(fits(value, one) for one in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e13
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return not isinstance(hint, type) or hint not in (str, bool, NoneType) or isinstance(value, hint)


def message(call: Any) -> str | None:
    """What a constructor says; None: it works."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_an_argument_works_or_is_refused_by_name(name: str, argument: str) -> None:
    kind = CLASSES[name]
    hint = get_type_hints(kind.__init__)[argument]
    assert message(lambda: kind(**minimal(name))) is None

    @given(VALUES)
    @DETERMINISTIC
    def check(value: Any) -> None:
        said = message(lambda: kind(**{**minimal(name), argument: value}))
        if said is None:
            scalar = value.item() if any(value is one for one in SCALARS) else value
            assert fits(scalar, hint) or isinstance(scalar, Path), f"{name}({argument}={scalar!r}) is not a {hint}"
        else:
            owners = f"{name}|RewardFunction" if argument in ("rewards", "gold") else name
            assert re.match(rf"({owners})\(.*({argument}|function).*\): .{{9,}}", said), said[:200]
            assert len(said) < 1000
            assert said.isprintable()

    check()


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_wrong_names_of_arguments_are_refused(name: str) -> None:
    kind = CLASSES[name]
    with pytest.raises(TypeError, match=rf"^{name}\(no_such='x{{90,}}\.\.\.x+'\): there is no such argument; "):
        kind(**minimal(name), no_such="x" * 10**6)
    with pytest.raises(TypeError, match=rf"^{name}\(.*\): only \d+ can be given by position"):
        kind(*range(99))
    required = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    if required:
        with pytest.raises(TypeError, match=rf"^{name}\({required[0]}=...\): is missing"):
            kind()


def test_a_misspelt_name_is_corrected() -> None:
    with pytest.raises(TypeError, match=r"^LitPPO\(minibatchsize=3\): .*; did you mean minibatch_size\?$"):
        LitPPO("x", generation=GENERATION, minibatchsize=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"^LitPPO\(actor='y'\): is given twice"):
        LitPPO("x", actor="y", generation=GENERATION)  # type: ignore[misc]


@pytest.mark.parametrize("three", [np.int64(3), np.array(3), torch.tensor(3)], ids=repr)
def test_scalars_of_numpy_and_torch_are_pythons(three: Any) -> None:
    """Also in a checkpoint's hyperparameters, which must load without pickled code; a subclass's are saved too."""

    class Mine(LitPPO):
        def __init__(self, mine: int, **kwargs: Any) -> None:
            super().__init__("x", **kwargs)

    fields = {"max_new_tokens": three, "eos_token_id": [three]}
    module = Mine(7, generation=fields, ppo_epochs=three, kl_coef=np.float32(0.5), seed=three)
    saved = {name: module.hparams[name] for name in ("ppo_epochs", "kl_coef", "seed", "generation", "mine")}
    expected = {"max_new_tokens": 3, "eos_token_id": [3]}
    assert saved == {"ppo_epochs": 3, "kl_coef": 0.5, "seed": 3, "generation": expected, "mine": 7}
    plain = [saved["ppo_epochs"], saved["seed"], *saved["generation"]["eos_token_id"], module.ppo_epochs]
    assert {type(value) for value in plain} == {int}
    assert type(saved["kl_coef"]) is float


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("eos_token_id", [-1, [], [1, -2], True, 2.5, "x", [[1]], 10**30]),
        ("min_new_tokens", [-1, 5, True, math.nan]),
        ("max_new_tokens", [0, 2.0, 10**30, None]),
        ("top_k", [-1, True, 2.5]),
        ("top_p", [math.nan, 0, 2, True, "1"]),
        ("min_p", [2, -1, math.nan]),
        ("typical_p", [5, 0, math.nan]),
        ("epsilon_cutoff", [7, 1.0, -1, True]),
        ("eta_cutoff", [7, math.nan]),
        ("repetition_penalty", [0, math.inf, "x"]),
        ("no_repeat_ngram_size", [-1, 1.5]),
        ("suppress_tokens", [[-1], [True], 5, []]),
        ("bad_words_ids", [[], [[]], [1], [[-1]]]),
        ("renormalize_logits", [1, "x"]),
    ],
)
def test_fields_of_generation_are_checked(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^LitPPO\(generation\.{field}=.*\): must be"):
            LitPPO("x", generation={**GENERATION, field: value})


@pytest.mark.parametrize(
    ("generation", "problem"),
    [
        ({"eos_token_id": [1, 43]}, r"eos_token_id=.*: the actor's vocabulary has no token 43; its ids are 0 to 42"),
        ({"suppress_tokens": [99]}, r"suppress_tokens=.*: the actor's vocabulary has no token 99"),
        ({"suppress_tokens": list(range(43))}, "suppress_tokens=.*: leaves no token to sample"),
        ({"suppress_tokens": [0, *range(2, 43)], "min_new_tokens": 1}, "suppress_tokens=.*: leaves no token to sample"),
        ({"bad_words_ids": [[i] for i in range(43)]}, "bad_words_ids=.*: leaves no token to sample"),
    ],
)
def test_token_ids_are_checked_once_the_vocabulary_is_known(
    tiny_lm: Path, generation: dict[str, Any], problem: str
) -> None:
    module = make_module(tiny_lm, generation=GENERATION | generation)
    with pytest.raises(ValueError, match=rf"^LitPPO\(generation\.{problem}"):
        module.configure_model()


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"no_such": 1}, r".*='.*'\): .*model_kwargs=\{.*'no_such': 1\} \(TypeError: .*no_such"),
        ({"attn_implementation": 5}, r".*='.*'\): .*model_kwargs=\{'attn_implementation': 5"),
        ({"trust_remote_code": "false"}, r"model_kwargs.trust_remote_code='false'\): must be True or False"),
        ({"state_dict": {}}, r"model_kwargs=.*\): state_dict is not set here; leave it out"),
    ],
)
def test_unknown_model_kwargs_are_named(tiny_lm: Path, tiny_reward: Path, kwargs: dict[str, Any], problem: str) -> None:
    for name, build in (
        ("LitPPO", lambda: make_module(tiny_lm, model_kwargs=kwargs).configure_model()),
        ("LitSFT", lambda: LitSFT(str(tiny_lm), model_kwargs=kwargs).configure_model()),
        ("RewardModel", lambda: RewardModel(str(tiny_reward), model_kwargs=kwargs).build()),
    ):
        with pytest.raises(ValueError, match=rf"^{name}\({problem}"):
            build()


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: None, "makes None; it must return a torch Optimizer"),
        (lambda p: torch.optim.SGD(p, lr=-1), "Invalid learning rate: -1; correct its arguments"),
        (lambda p: torch.optim.SGD(p, lrr=1), "SGD.* unexpected keyword argument 'lrr'; correct its arguments"),
    ],
)
def test_what_makes_no_optimizer_is_refused(make: Any, problem: str) -> None:
    module = LitSFT("x", optimizer=make)
    with pytest.raises(ValueError, match=rf"^LitSFT\(optimizer\): {problem}"):
        build_optimizer(module, "", [torch.zeros(1, requires_grad=True)], make, None)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("LitPPO", {"generation": 5}, "must be a dict whose keys are names"),
        ("LitPPO", {"temperature": 1e40}, "must be a finite number, at least 0.001 and at most 1000"),
        ("LitPPO", {"kl_coef": 1e38}, "must be a finite number, at least 0 and at most 1e+06"),
        ("LitPPO", {"samples_per_prompt": 10**11}, "must be an integer, at least 1 and at most 65536"),
        ("LitPPO", {"max_grad_norm": 1e-300}, "too small to compute with; give one between 1e-12 and 1e+12 in size"),
        ("LitPPO", {"reward_timeout": 1e12}, "must be a finite number, above 0 and at most 1e+06"),
        ("LitPPO", {"actor": ""}, "must be a path or a name: a string that is not empty, or a pathlib.Path"),
        ("LitPPO", {"actor_optimizer": "adamw"}, "must be a function that makes it, such as lambda parameters: "),
        ("PromptDataModule", {"batch_size": 10**30}, "must be an integer, at least 1 and at most 2147483647"),
        (
            "TextDataModule",
            {"path": {"a", "b"}},
            "holds no rows in an order; give a path, a data set, or a list of rows",
        ),
        ("CollapseMonitor", {"length": (1e299, 1e300)}, "too large to compute with; give one between 1e-12 and 1e+12"),
        ("Cockpit", {"best_of": 10**9}, "must be an integer, at least 0 and at most 65536"),
        ("RewardModel", {"label": True}, "must be the name of a label of the model, or its index, from 0 on"),
        ("StepCheckpoint", {"keep": "1"}, "must be an integer, at least 1"),
        ("GAE", {"gamma": "1"}, "must be a finite number, at least 0 and at most 1"),
    ],
)
def test_values_out_of_range_are_refused(name: str, arguments: dict[str, Any], problem: str) -> None:
    said = message(lambda: CLASSES[name](**{**minimal(name), **arguments}))
    assert re.match(rf"{name}\({next(iter(arguments))}=.*\): {re.escape(problem)}", str(said))
