"""Callbacks on modules that are not ours: what would leave them without effect is an error, in one sentence."""

import re
import runpy
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import make_dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch

import lit_ppo.callbacks as tricks_of
from lit_ppo.callbacks import Experience, PPOCallback, fire
from lit_ppo.callbacks.fields import FIELDS, OTHERS
from lit_ppo.callbacks.hooks import HOOKS
from tests.helpers.command import REPOSITORY
from tests.helpers.spies import Recorder, Spy
from tests.helpers.toy import Toy
from tests.helpers.toy_runs import run_updates
from tests.helpers.traced import Seen, traced
from tests.helpers.trick import made, make_trick, tricks

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Monitor", "ignore:DynamicSampling", "ignore:.*does not have many workers:"
)


def traced_row(name: str) -> list[list[str]]:
    """What a trick waits for, reads and writes with any of its arguments; the cells of its row in the table."""
    trick, seen, hooks = tricks()[name], Seen(), set()
    acts = made(trick.acts)
    modes = [
        x for pair in trick.knobs.values() for x in pair if any(k not in acts or _is_mode(v) for k, v in x.items())
    ]
    for laid in [{}, *modes]:
        callback = make_trick(name, **laid)
        logger = Recorder(Path()) if trick.monitor else None
        module = run_updates(traced(callback, seen), 3, **{"logger": logger, **trick.toy})
        hooks |= callback.waits_for(module)
    rows = [[field for field in (*FIELDS, *OTHERS) if field in seen.get(f"rows {what}", ())] for what in DONE]
    dicts = [f'{d}["{key}"]' for d in ("metrics", "losses") for key in sorted(_of(seen, d))]
    return [[hook for hook in HOOKS if hook in hooks], *rows, dicts, sorted(_of(seen, "module") - LIGHTNINGS)]


DONE = ("read", "written")
LIGHTNINGS = {"log", "logger", "hparams", "strict_loading", "trainer"}


def _of(seen: Seen, name: str) -> set[str]:
    return {key for what in DONE for key in seen.get(f"{name} {what}", ()) if not key.startswith("ptx/")}


def _is_mode(value: Any) -> bool:
    return isinstance(value, bool) or not isinstance(value, int | float)


def test_the_table_has_what_each_trick_waits_for_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs/own_module.md").read_text().split("\n## What each trick")[1]
    rows = [re.findall(r"\|([^|]*)", line)[:6] for line in page.splitlines() if line.startswith("| `")]
    table = {re.findall(r"`(.+?)`", name)[0]: [re.findall(r"`(.+?)`", cell) for cell in cells] for name, *cells in rows}
    assert table == {name: traced_row(name) for name in sorted(tricks(), key=str.lower)}
    for name, (_, read, *_) in table.items():
        assert set(getattr(tricks_of, name).reads) == {field for field in read if field in FIELDS}, name


def test_the_table_of_fields_is_the_one_that_is_checked() -> None:
    page = (REPOSITORY / "docs/own_module.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| \((.+?)\) \| (\w+) \|", page, re.MULTILINE)
    assert {name: tuple(row) for name, *row in rows} == {name: field[:2] for name, field in FIELDS.items()}


# hooks that never come

WAITS = [
    (name, hook)
    for name, trick in tricks().items()
    for hook in sorted(make_trick(name).waits_for(SimpleNamespace(critic=1, _fired=SimpleNamespace(ever=set()))))
]


@pytest.mark.parametrize(("name", "hook"), WAITS)
def test_a_hook_that_never_came_is_named_with_the_line_to_add(
    name: str, hook: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    logger = Recorder(Path()) if tricks()[name].monitor else None
    module = Toy(**{**tricks()[name].toy, "fires": lambda fired: fired != hook})
    line = re.escape(f'in Toy add fire(self, "{hook}", {HOOKS[hook]})')
    with pytest.raises(TypeError, match=rf"^{name} waits for {hook}, which Toy never fires.*{line}"):
        run_updates(make_trick(name), 3, module=module, logger=logger)
    assert len(module.experiences) <= 1 + (hook == "on_update_end")  # the first update, or the start of the second


def test_a_plain_callback_is_told_too_and_the_hooks_of_other_modes_are_not_missed() -> None:
    silent = {"on_minibatch_start", "on_critic_loss"}
    run_updates(make_trick("AdvantageNormalization", scope="batch"), 2, fires=lambda hook: hook not in silent)
    with pytest.raises(TypeError, match=r"^Spy waits for on_critic_loss, which Toy never fires"):
        run_updates(Spy("on_critic_loss", lambda *_: None), 2, fires=lambda hook: hook not in silent)


def test_hooks_that_wait_for_their_time_are_not_missed() -> None:
    """The actor's while it is frozen, the critic's without one, those of steps in an update that ends before."""
    spies = [Spy(hook, lambda *_: None) for hook in HOOKS]
    warm_up = make_trick("CriticWarmup", updates=2)
    run_updates([warm_up, *spies], 4)
    run_updates([*spies, make_trick("EntropyBonus")], 2, critic=False)
    first = Spy("on_scores", lambda module, rows: setattr(rows, "exhausted", int(module.updates) == 0))
    run_updates([first, *spies], 2)
    with pytest.raises(TypeError, match=r"^EntropyBonus waits for on_actor_loss"):
        run_updates([make_trick("CriticWarmup", updates=2), make_trick("EntropyBonus")], 4,
                    fires=lambda hook: hook != "on_actor_loss")  # fmt: skip


def test_a_single_update_without_an_end_is_noticed_at_the_end_of_the_run() -> None:
    with pytest.raises(TypeError, match=r"^KLLoss waits for on_actor_loss"):
        run_updates(make_trick("KLLoss"), 1, fires=lambda hook: hook in ("on_scores", "on_rewards"))


# what a module hands over

MASK = "on_advantages reads experience.response_mask: (B, T) bool, True at response tokens; Rows has float32 (8, 4)"
COLUMN = "on_scores reads experience.scores: (B) float, scores as callbacks have changed them; Rows has float32 (8, 1)"
LIST = "on_scores reads experience.raw_scores: (B) float, scores as the reward gave them; Rows has a list"
ENDED = "on_scores needs experience.ended: (B) bool, True where a stop token ended the response; Rows lacks it; set it"
BAD: dict[str, tuple[str, Any, str]] = {
    "AdvantageNormalization": ("response_mask", lambda mask: mask.float(), MASK),
    "RewardClipping": ("scores", lambda scores: scores[:, None], COLUMN),
    "PrioritizedSampling": ("raw_scores", lambda scores: scores.tolist(), LIST),
    "RewardNormalization": ("scores", lambda scores: scores.long(), "Rows has int64 (8,)"),
    "MissingEndPenalty": ("ended", None, ENDED),
    "LengthPenalty": ("response_mask", None, "on_scores needs experience.response_mask: (B, T) bool"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_field_that_is_wrong_is_named_with_its_shape(name: str) -> None:
    field, change, words = BAD[name]

    class Own(Toy):
        def fire(self, hook: str, *args: Any) -> None:
            if hook == ("on_advantages" if words is MASK else "on_scores"):
                rows = args[0]
                delattr(rows, field) if change is None else setattr(rows, field, change(getattr(rows, field)))
            super().fire(hook, *args)

    with pytest.raises(TypeError, match=rf"^{name}.*{re.escape(words)}"):
        run_updates(make_trick(name), module=Own())


@pytest.mark.parametrize("name", ["AdvantageNormalization", "RewardClipping", "PrioritizedSampling"])
def test_a_callback_that_writes_a_wrong_field_is_named_before_others_read_it(name: str) -> None:
    field, change, words = BAD[name]
    hook, written = words.split()[0], words.replace("reads", "writes")
    spy = Spy(hook, lambda module, rows: setattr(rows, field, change(getattr(rows, field))))
    with pytest.raises(TypeError, match=rf"^Spy\.{re.escape(written)}"):
        run_updates([spy, make_trick(name)])


def test_a_callback_that_leaves_no_response_is_named() -> None:
    for nothing in ([], torch.zeros(8, dtype=torch.bool)):
        spy = Spy("on_scores", lambda module, rows, nothing=nothing: rows.keep(nothing))
        with pytest.raises(ValueError, match=r"^Spy.on_scores keeps no response; set experience.exhausted = True"):
            run_updates(spy)


@pytest.mark.parametrize(("loss", "shown"), [
    (0.5, "0.5"), (None, "None"), (torch.ones(2, 4), "a tensor of shape (2, 4)"),
])  # fmt: skip
def test_a_loss_that_is_no_scalar_is_named(loss: Any, shown: str) -> None:
    spy = Spy("on_actor_loss", lambda module, rows, losses: losses.update(mine=loss))
    message = f"Spy.on_actor_loss sets losses['mine'] to {shown}; set a scalar tensor, such as minibatch.mean(x)"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        run_updates(spy)


@pytest.mark.parametrize(("trick", "words"), [
    (make_trick("EntropyBonus"), "EntropyBonus.on_actor_loss needs minibatch.mean: mean(x): the mean of x (B, T)"),
    (make_trick("KLLoss", to="reference"), "KLLoss.on_actor_loss needs minibatch.ref_logprobs: (B, T) float, log-"),
])  # fmt: skip
def test_a_minibatch_without_mean_or_without_what_a_reference_gives_is_named(trick: Any, words: str) -> None:
    class Own(Toy):
        def fire(self, hook: str, *args: Any) -> None:
            if hook == "on_actor_loss":
                given = {name: getattr(args[0], name) for name in ("new_logprobs", "new_entropy", "response_mask")}
                mean = {} if "mean" in words[:60] else {"mean": args[0].mean}
                args = SimpleNamespace(**given, **mean, ref_logprobs=None), args[1]
            super().fire(hook, *args)

    with pytest.raises(TypeError, match=f"^{re.escape(words)}.*; SimpleNamespace lacks it"):
        run_updates(trick, module=Own())


@pytest.mark.parametrize(
    ("name", "arguments", "metric"),
    [
        ("KLEarlyStop", {}, "approx_kl"), ("LearningRateAdaptation", {}, "approx_kl"),
        ("EntropyBonus", {"target": 1.0}, "entropy"), ("CriticWarmup", {"value_loss": 0.1}, "value_loss"),
    ],
)  # fmt: skip
def test_a_metric_that_is_missing_is_named(name: str, arguments: dict[str, Any], metric: str) -> None:
    forget = Spy("on_minibatch_end", lambda module, rows, metrics: metrics.pop(metric, None))
    with pytest.raises(TypeError, match=rf"^{name} reads metrics\['{metric}'\] in on_minibatch_end, which Toy lacks"):
        run_updates([forget, make_trick(name, **arguments)])


@pytest.mark.parametrize("at", ["on_minibatch_end", "on_scores"])
def test_a_module_that_goes_on_after_the_end_is_refused(at: str) -> None:
    """Before its optimizers step."""

    class Deaf(Toy):
        def learn(self, experience: Any) -> None:
            experience.returns = experience.advantages = self.reward_tokens(experience)
            self.given = experience
            self.optimizer_step_of(SimpleNamespace(exhausted=False), experience)

        def fire(self, hook: str, *args: Any) -> None:
            super().fire(hook, *args if hook != "on_minibatch_end" else (self.given, args[1]))

    def stop(self: Any, trainer: Any, pl_module: Any, rows: Any, *_: Any) -> None:
        rows.exhausted = True

    module = Deaf()
    weights = module.actor.weight.clone()
    with pytest.raises(
        TypeError, match=r"^Ends has set experience.exhausted = True to end the update, but Deaf goes on"
    ):
        run_updates(type("Ends", (PPOCallback,), {at: stop})(), module=module)
    assert module.actor.weight.equal(weights)


def test_a_module_that_ignores_what_callbacks_set_is_refused() -> None:
    class Deaf(Toy):
        def rollout(self, prompts: Any, **kwargs: Any) -> Any:
            self.samples_per_prompt = 1
            return super().rollout(prompts, **kwargs)

        def backward_of(self, micro: Any) -> None:
            self.fire("on_actor_loss", micro, {})

    with pytest.raises(TypeError, match=r"^a callback has set actor_frozen, but Deaf trains its actor"):
        run_updates(make_trick("CriticWarmup"), module=Deaf())
    with pytest.raises(ValueError, match=r"^RejectionSampling\(k=\d\): each of the 8 responses is alone in its group"):
        run_updates(make_trick("RejectionSampling", every=1), module=Deaf())


@pytest.mark.parametrize("made_of", [{"mask": True}, (1, 2), "frozen"])
def test_rows_whose_fields_cannot_be_set_are_named(made_of: Any) -> None:
    """A dict, a named tuple, a frozen dataclass."""
    fields = ["scores", "response_mask"]
    kinds = {
        dict: lambda **rows: rows,
        tuple: namedtuple("Rows", fields),
        str: make_dataclass("Rows", fields, frozen=True),
    }
    rows = kinds[type(made_of)](scores=torch.zeros(2), response_mask=torch.ones(2, 3, dtype=torch.bool))
    module = SimpleNamespace(log=lambda *_: None)
    trick = make_trick("RewardClipping")
    module.trainer = SimpleNamespace(callbacks=[trick], profiler=SimpleNamespace(profile=lambda _: nullcontext()))
    words = (
        "needs experience.scores" if isinstance(made_of, dict) else "sets fields of the experience, but Rows does not"
    )
    with pytest.raises(TypeError, match=rf"^RewardClipping.on_scores {words}"):
        fire(module, "on_scores", rows)


@pytest.mark.parametrize("name", ["AdaptiveKL", "CriticWarmup", "KLLoss", "ValueClipping"])
def test_a_model_under_another_name_is_accepted(name: str) -> None:
    """None of them reads the attribute."""
    trick, other = make_trick(name), SimpleNamespace(kl_coef=0.1, actor_frozen=False)
    trick.setup(SimpleNamespace(callbacks=[trick]), other, "fit")
    trick.on_fit_start(SimpleNamespace(), other)


# two callbacks and one loss term


def sets(key: str, value: Any, name: str = "Mine", hook: str = "on_actor_loss") -> L.Callback:
    """A callback that sets a loss term to a function of the minibatch and the losses."""

    def on_loss(self: Any, trainer: Any, pl_module: Any, minibatch: Any, losses: dict[str, Any]) -> None:
        losses[key] = value(minibatch, losses)

    return type(name, (L.Callback,), {hook: on_loss})()


def test_the_second_of_two_that_replace_a_loss_term_is_refused() -> None:
    new = {"policy": lambda m, _: m.mean(-m.new_logprobs * m.advantages), "value": lambda m, _: m.mean(m.new_values**2)}
    for callbacks, names in [
        ([make_trick("DualClip"), sets("policy", new["policy"])], "DualClip and Mine"),
        ([sets("policy", new["policy"]), make_trick("DualClip")], "Mine and DualClip"),
        ([sets("policy", new["policy"], "A"), sets("policy", new["policy"], "B")], "A and B"),
        ([make_trick("EntropyBonus"), sets("entropy", new["policy"])], "EntropyBonus and Mine"),
        ([make_trick("ValueClipping"), sets("value", new["value"], hook="on_critic_loss")], "ValueClipping and Mine"),
    ]:
        with pytest.raises(
            ValueError, match=rf"^{names}: both replace the same loss term, losses\['.*keep one of them$"
        ):
            run_updates(callbacks, clip_range=0.2)


def test_a_loss_term_may_be_computed_from_that_of_another_callback() -> None:
    double = sets("policy", lambda m, losses: 2.0 * losses["policy"] + 0.0)
    both = run_updates([make_trick("DualClip"), double], clip_range=0.2)
    plain = run_updates(make_trick("DualClip"), clip_range=0.2)
    assert both.losses[0]["policy"] == pytest.approx(2 * plain.losses[0]["policy"])


# the example, and the experience for other modules


@pytest.mark.parametrize(("name", "arguments"), [
    ("AdvantageNormalization", {}), ("EntropyBonus", {"coef": 10.0}), ("KLLoss", {"coef": 10.0}),
    ("ValueClipping", {"clip_range": 1e-6}), ("KLEarlyStop", {"target": 1e-9}), ("DualClip", {"c": 1.001}),
])  # fmt: skip
def test_tricks_act_on_the_example(name: str, arguments: dict[str, Any]) -> None:
    train = runpy.run_path(str(REPOSITORY / "examples/own_module.py"))["train"]
    others = [make_trick("AdvantageNormalization")] if name == "DualClip" else []  # it needs advantages below 0
    runs = [
        train(callbacks, max_steps=16, **QUIET)
        for callbacks in (others, [*others, getattr(tricks_of, name)(**arguments)])
    ]
    assert any(not a.equal(b) for a, b in zip(*(run.parameters() for run in runs), strict=True))


def test_the_experience_for_other_modules() -> None:
    """Defaults, rows, and a mean that is exact however a step is split: 0 + 1 + 3 + 4 + 5 over five tokens is 2.6."""
    mask = torch.tensor([[True, True, False], [True, True, True]])
    old, reference = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5)
    rows = Experience(response_mask=mask, logprobs=old, ref_logprobs=reference, digits=["a", "b"])
    assert rows.kl.tolist() == [[0.5, 0.5, 0.0], [0.5, 0.5, 0.5]]
    rows.scores = torch.tensor([1.0, 3.0])
    rows.scores = rows.scores - 2.0
    assert (rows.raw_scores.tolist(), rows.exhausted, rows.values) == ([1.0, 3.0], False, None)
    x = torch.arange(6.0).reshape(2, 3)
    parts = []
    for micro, part in zip(rows.split(1), x.split(1), strict=True):
        parts.append(float(micro.mean(part)))
        micro.log("x", part)
    assert [sum(parts), float(rows.mean(x)), float(rows.metrics["x"])] == pytest.approx([2.6] * 3)
    assert [len(part) for _ in range(2) for part in rows.minibatches(1)] == [1] * 4
    rows.keep(torch.tensor([False, True]))
    assert (rows.digits, rows.scores.tolist(), len(rows)) == (["b"], [1.0], 1)
    with pytest.raises(AttributeError, match=r"Experience\.ended is not set"):
        rows.ended  # noqa: B018
