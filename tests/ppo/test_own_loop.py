"""A loop of the user's own: the numbers of ``Trainer.fit``, its checks, its checkpoints and its end."""

import copy
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lit_ppo import StepCheckpoint, callbacks
from tests.helpers.own_loops import by_fit, by_hand, check_same, numbers, on_each_rank, tricks
from tests.helpers.ranks import on_ranks
from tests.helpers.toys import count_good, make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*bf16 matrix products take",
    "ignore:.*many workers",
    "ignore:.*smaller than minibatch_size",
    "ignore:.*LeafSpec",
)
PROMPTS = ["the film", "a story was", "we saw", "it felt", "that plot", "they loved", "music"]


def one_step(module, prompts=PROMPTS, scores=None, **options):
    experience = module.rollout(prompts, **options)
    experience.scores = count_good(experience.prompts, experience.responses) if scores is None else scores
    return module.step(experience)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_numbers_hooks_and_states_are_those_of_fit(precision, tmp_path, lm):
    validated = {"val_fraction": 0.2}
    arguments = {"precision": precision, "val_check_interval": 2, "check_val_every_n_epoch": None}
    fit = by_fit(tmp_path, lm, callbacks=tricks(), data=validated, **arguments)
    own = by_hand(tmp_path, lm, callbacks=tricks(), data=validated, **arguments)
    check_same(own, fit)
    assert [{k: v for k, v in step.items() if not k.startswith("val/")} for step in own["steps"]] == fit["logged"]
    assert ["val/kl" in step for step in own["steps"]] == [False, True, False, True]
    assert {"on_rollout_start", "on_rollout_end", "on_scores", "on_update_end", "on_validation_end"} <= {*own["hooks"]}


def test_without_attach_in_any_mode(tmp_path, lm):
    """The module alone: prompts from a loader, scores made in inference mode, rollouts for other ends in between."""
    fit = by_fit(tmp_path, lm, max_steps=3)
    module, data, steps = make_module(lm, rewards=None), make_data(tmp_path, tokenizer=str(lm)), []
    data.setup("fit")
    while len(steps) < 3:
        for prompts in data.train_dataloader():
            with torch.inference_mode():
                experience = module.rollout(prompts)
                experience.scores = torch.tensor(count_good(experience.prompts, experience.responses))
            before = copy.deepcopy(experience)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                steps.append(module.step(experience))
                assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (False, True)
            module.rollout(PROMPTS, stream="test")
            assert repr(before) == repr(experience)  # neither scores nor fields of the update
            if len(steps) == 3:
                break
    module.loop.close()
    check_same({**fit, "logged": [*map(numbers, steps)], "weights": module.state_dict()}, fit)
    assert module.loop.ended
    moved = make_module(lm).to("meta")
    assert {parameter.device.type for parameter in moved.models.actor.parameters()} == {"meta"}


@pytest.mark.parametrize("own_first", [True, False])
def test_each_resumes_what_the_other_has_saved(own_first, tmp_path, lm):
    """Two updates by one and the third of their epoch by the other."""
    job = {"data": {"batch_size": 5}, "max_steps": -1, "max_epochs": 1}
    full = by_fit(tmp_path, lm, callbacks=tricks(), **job)
    checkpoint = StepCheckpoint(every_n_train_steps=100, dirpath=str(tmp_path / "saved"))
    saving = {**job, "callbacks": [*tricks(), checkpoint], "enable_checkpointing": True}
    if own_first:
        by_hand(tmp_path, lm, updates=2, **saving)
    else:
        by_fit(tmp_path, lm, **{**saving, "max_steps": 2})
    (path,) = (tmp_path / "saved").iterdir()
    rest = (by_fit if own_first else by_hand)(tmp_path, lm, ckpt_path=path, callbacks=tricks(), **job)
    check_same({**rest, "hooks": full["hooks"]}, {**full, "logged": full["logged"][2:]})


def test_fit_resumes_prompts_of_a_loader(tmp_path, lm):
    """A checkpoint that knows no position in the data: batch u is update u's, whoever has drawn the ones before."""
    full = by_fit(tmp_path, lm)
    module, data = make_module(lm, rewards=None), make_data(tmp_path, tokenizer=str(lm))
    data.setup("fit")
    checkpoint = StepCheckpoint(2, dirpath=str(tmp_path / "saved"))
    with module.attach(make_trainer(tmp_path, callbacks=[checkpoint], enable_checkpointing=True)):
        for prompts in data.train_dataloader():
            one_step(module, prompts)
    rest = by_fit(tmp_path, lm, ckpt_path=tmp_path / "saved/step-000002.ckpt")
    check_same({**rest, "states": full["states"]}, {**full, "logged": full["logged"][2:]})


def test_ranks_give_the_numbers_of_fit(tmp_path, lm):
    on_ranks(2, on_each_rank, tmp_path, lm, folder=tmp_path / "ranks")


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda batches: DataLoader(batches, batch_size=None)])
def test_prompts_are_drawn_as_they_are_given(kind, tmp_path, lm):
    batches, drawn = [PROMPTS[:5], PROMPTS[2:]], []
    module = make_module(lm)
    with module.attach(make_trainer(tmp_path, max_steps=-1, max_epochs=1), kind(batches)) as prompts:
        for batch in prompts:
            drawn.append(batch)
            one_step(module, batch)
    assert drawn == batches


class Ends(L.Callback):
    """Keeps how the run ends; raises where it is told to."""

    def __init__(self, error=None) -> None:
        self.ends, self.error = [], error

    def on_scores(self, trainer, pl_module, experience):
        if self.error is not None:
            raise self.error

    def on_train_end(self, trainer, pl_module):
        self.ends.append("train_end")

    def on_exception(self, trainer, pl_module, exception):
        self.ends.append(type(exception).__name__)


def test_a_limit_of_the_trainer_is_said(tmp_path, lm):
    module, ends = make_module(lm), Ends()
    loop = module.attach(make_trainer(tmp_path, max_steps=1, min_epochs=3, callbacks=[ends]))
    assert not loop.ended
    one_step(module)
    assert (loop.ended, ends.ends) == (True, ["train_end"])
    with pytest.raises(RuntimeError, match=r"ended after 1 updates \(max_steps=1.*attach a Trainer"):
        one_step(module)
    with module.attach(make_trainer(tmp_path, max_steps=9, min_steps=5, callbacks=[ends]), make_data(tmp_path)) as loop:
        assert not loop.ended  # and the module can be trained again; close() overrules min_steps
    assert ends.ends == ["train_end"] * 2


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_errors_arrive_and_end_the_run(error, tmp_path, lm):
    """In an update and in the user's own code; Ctrl-C is not turned into an exit, and works afterwards."""
    module, ends, kind = make_module(lm), Ends(error), type(error)
    handler = signal.getsignal(signal.SIGINT)  # Python's, or none in a background process
    with pytest.raises(kind), module.attach(make_trainer(tmp_path, callbacks=[ends])):
        one_step(module)
    with pytest.raises(
        RuntimeError, match=f"ended with {'ValueError: mine' if kind is ValueError else 'an interrupt'}"
    ):
        one_step(module)
    ends.error = None
    with pytest.raises(kind), module.attach(make_trainer(tmp_path, callbacks=[ends])):
        raise error
    assert ends.ends == [kind.__name__] * 2
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize("failed", [False, True])
def test_a_forgotten_loop_ends_at_exit(failed, tmp_path, lm, monkeypatch):
    module, ends = make_module(lm), Ends()
    module.attach(make_trainer(tmp_path, callbacks=[ends]))
    if failed:
        monkeypatch.setattr(sys, "last_value", KeyError("x"), raising=False)
    module.loop._at_exit()
    assert ends.ends == ["KeyError" if failed else "train_end"]


def test_checks_come_before_the_first_rollout(tmp_path, lm):
    """Those of callbacks, of the Trainer, and those of own loops."""
    for trainer, problem in (
        ({"callbacks": [callbacks.PrioritizedSampling(threshold=1.0)]}, "without a data module"),  # in setup
        ({"callbacks": [callbacks.AdaptiveKL()]}, "AdaptiveKL needs a reference"),  # in on_fit_start
        ({"callbacks": [callbacks.RewardBaseline()]}, r"RewardBaseline.*rewards=None"),
        ({"precision": "bf16-true"}, "use 'bf16-mixed'"),
        ({"strategy": "ddp_spawn", "devices": 2}, "in other processes than your loop"),
    ):
        module = make_module(lm, rewards=None, reference=None, kl_coef=0.0)
        with pytest.raises((TypeError, ValueError), match=problem):
            module.attach(make_trainer(tmp_path, **trainer))
        assert module.rollouts == 0
    with pytest.raises(ValueError, match=r"LitPPO\(rewards=None\): fit has nothing to score with"):
        make_trainer(tmp_path).fit(make_module(lm, rewards=None), make_data(tmp_path))


def scores(value):
    return lambda experience: setattr(experience, "scores", value)


STEPS = {
    "no scores": (lambda e: None, {}, "no scores; set experience.scores"),
    "too few": (scores([1.0]), {}, "1 values for 7 responses"),
    "shape": (scores(torch.zeros(7, 1)), {}, r"shape \(7, 1\) for 7 responses"),
    "nan": (scores([float("nan")] * 7), {}, "nan for response 0"),
    "text": (scores("1234567"), {}, "str '1234567'"),
    "no log-probs": (scores([0.0] * 7), {"logprobs": False}, "roll out with logprobs=True"),
    "no rows": (lambda e: (scores([0.0] * 7)(e), e.keep([])), {}, "no rows"),
    "unseen": (scores([0.0] * 7), {"stream": "other"}, "ValueNormalization.on_rollout_end has not seen"),
}


@pytest.fixture(scope="module")
def attached(tmp_path_factory, lm):
    module = make_module(lm)
    with module.attach(make_trainer(tmp_path_factory.mktemp("a"), callbacks=[callbacks.ValueNormalization()])):
        yield module


@pytest.mark.parametrize("case", STEPS)
def test_an_experience_that_cannot_be_learned_from_is_refused_and_the_loop_goes_on(case, attached):
    change, options, problem = STEPS[case]
    experience = attached.rollout(PROMPTS, **options)
    change(experience)
    with pytest.raises((TypeError, ValueError), match=problem):
        attached.step(experience)
    assert not attached.loop.ended


def test_what_a_loop_cannot_take(attached, tmp_path, lm):
    with pytest.raises(TypeError, match="give what rollout returns"):
        attached.step({"scores": [1.0]})
    with pytest.raises(RuntimeError, match="a loop is running already"):
        attached.attach()
    with pytest.raises(RuntimeError, match="call step"):
        attached.collect(PROMPTS)
    experience = attached.rollout(PROMPTS)
    experience.scores = [0.0] * 7
    with pytest.raises(RuntimeError, match="call step"):
        attached.update(experience)
    other = make_module(lm)
    with other.attach(make_trainer(tmp_path)), pytest.raises(ValueError, match="of another run or another module"):
        other.step(experience)
    unattached = make_module(lm).rollout(PROMPTS)
    copied = copy.deepcopy(experience)  # may be of any module, but not of one without a critic
    unattached.scores, copied.values = experience.scores, None
    for foreign in (unattached, copied):
        with other.attach(make_trainer(tmp_path)), pytest.raises(ValueError, match="of another run or another module"):
            other.step(foreign)
    with pytest.raises(RuntimeError, match="its own loop ends here"):
        other.attach() and make_trainer(tmp_path).validate(other, make_data(tmp_path, val_fraction=0.5))
    assert other.loop.ended
    with ThreadPoolExecutor() as threads, pytest.raises(RuntimeError, match="in the same one"):
        threads.submit(attached.step, experience).result()
