"""Under bf16-mixed the models compute in bfloat16; all that is kept, and every gradient, is as in float32."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import lit_ppo.ppo.collect
import lit_ppo.ppo.module
from lit_ppo import LitPPO
from lit_ppo.callbacks import AlignmentTax, Cockpit, RewardHackingMonitor, SampleLogger
from lit_ppo.functional import policy_loss, value_loss
from lit_ppo.generation.config import neutral
from lit_ppo.generation.transformers import generate
from lit_ppo.models.actor_critic import Actor
from tests.helpers.forwards import logprobs_of, values_of
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import make_data, make_module, make_trainer, texts

# Responses drawn in bfloat16 and trained in bfloat16 have a ratio of 1: to the last bit on a CPU with bf16 units. Other
# kernels may round a number of another batch shape otherwise now and then, by up to 2e-3 where seen.
RATIO_TOLERANCE, MEAN_TOLERANCE = 1e-2, 2e-4
NUMBERS = ("logprobs", "ref_logprobs", "values", "kl", "scores", "rewards", "advantages", "returns")

pytestmark = pytest.mark.filterwarnings("ignore:.*bf16 matrix products take")  # slow CPUs run these tests too


class Recorder(L.Callback):
    """Keeps the experiences; and of each step the weights before it, what was computed, and the gradients."""

    def __init__(self) -> None:
        self.experiences: list[Any] = []
        self.steps: list[dict[str, Any]] = []

    def on_minibatch_start(self, trainer: Any, pl_module: Any, minibatch: Any) -> None:
        weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.steps.append({"weights": weights, "micro_batches": []})

    def on_actor_loss(self, trainer: Any, pl_module: Any, minibatch: Any, losses: Any) -> None:
        assert losses["policy"].dtype == torch.float32
        self.steps[-1]["micro_batches"].append(minibatch)

    def on_minibatch_end(self, trainer: Any, pl_module: Any, experience: Any, metrics: dict[str, float]) -> None:
        gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}
        self.steps[-1] |= {"gradients": gradients, "metrics": metrics}

    def on_update_end(self, trainer: Any, pl_module: Any, experience: Any) -> None:
        self.experiences.append(experience)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request, tmp_path_factory):
    return make_causal_lm(tmp_path_factory.mktemp(request.param), request.param, scale=4.0)


@pytest.fixture(scope="module")
def recorded(lm, tmp_path_factory):
    """One update of three steps, large enough to be seen; each minibatch is the full experience."""
    folder, recorder = tmp_path_factory.mktemp("run"), Recorder()
    rate = {"actor_optimizer": lambda params: torch.optim.SGD(params, lr=2.0)}
    module = make_module(lm, minibatch_size=28, samples_per_prompt=4, ppo_epochs=3, **rate)
    make_trainer(folder, precision="bf16-mixed", callbacks=[recorder], max_steps=1).fit(module, make_data(folder))
    return module, recorder


@pytest.fixture
def single(lm):
    """A module that computes in float32, as it is before the first step."""
    module = make_module(lm)
    module.configure_model()
    return module


def test_what_is_kept_is_float32(recorded):
    module, recorder = recorded
    (experience,) = recorder.experiences
    assert {name: getattr(experience, name).dtype for name in NUMBERS} == dict.fromkeys(NUMBERS, torch.float32)
    trained = (*module.actor.parameters(), *module.critic.parameters())
    gradients = recorder.steps[0]["gradients"].values()
    assert {p.dtype for p in trained} == {gradient.dtype for gradient in gradients} == {torch.float32}
    assert all(p.isfinite().all() for p in trained)


def test_the_first_ratio_is_1(recorded, single):
    """As rollout and update both compute in bfloat16; float32's log-probs of the same tokens differ by more."""
    _, recorder = recorded
    off, differ = [], []
    for micro in recorder.steps[0]["micro_batches"]:
        mask = micro.response_mask
        off.append((micro.new_logprobs - micro.logprobs).exp()[mask] - 1)
        differ.append((logprobs_of(single, micro) - micro.logprobs)[mask])
    assert torch.cat(off).abs().max() < RATIO_TOLERANCE
    assert torch.cat(off).abs().mean() < MEAN_TOLERANCE < 3 * MEAN_TOLERANCE < torch.cat(differ).abs().mean()
    kl = recorder.experiences[0].kl.abs()  # actor and reference compute alike
    assert kl.max() < RATIO_TOLERANCE
    assert kl.mean() < MEAN_TOLERANCE


@pytest.mark.parametrize("step", [0, 1, 2])
def test_every_gradient_is_that_of_float32(recorded, single, step):
    """Autocast that kept its bfloat16 copies of weights, from the rollout or from earlier steps, would fail here.

    From the second step on the weights have moved far: log-probs by more than 0.3, what bfloat16 changes is below 0.03.
    """
    taken = recorded[1].steps[step]
    moved = []
    for micro in taken["micro_batches"]:
        with torch.no_grad():
            before = logprobs_of(single, micro)
        moved.append((before - micro.new_logprobs).abs().max().item())
    assert (max(moved) > 0.3) == (step > 0)
    single.load_state_dict(taken["weights"], strict=False)
    for micro in taken["micro_batches"]:
        logprobs, values = logprobs_of(single, micro), values_of(single, micro)
        torch.testing.assert_close(micro.new_logprobs, logprobs, rtol=0, atol=0.03)
        torch.testing.assert_close(micro.new_values, values, rtol=0.02, atol=0.02)
        micro.mean(policy_loss(logprobs, micro.logprobs, micro.advantages, 0.2)).backward()
        micro.mean(value_loss(values, micro.returns)).backward()
    for name, parameter in single.named_parameters():
        if parameter.grad is None:
            assert name.startswith("reference.")
            continue
        if step == 0 and name.startswith("critic.backbone."):  # the value head starts at zero
            assert not parameter.grad.any()
            continue
        ours = taken["gradients"][name]
        assert parameter.grad.any()
        assert torch.cosine_similarity(ours.flatten(), parameter.grad.flatten(), dim=0) > 0.99, name
        assert ours.norm().item() == pytest.approx(parameter.grad.norm().item(), rel=0.1), name


def test_preflight_training_and_validation_compute_alike(tmp_path, tiny_lm, monkeypatch):
    seen: dict[str, set[bool]] = {}
    where = ["preflight"]

    def note() -> None:
        seen.setdefault(where[0], set()).add(torch.is_autocast_enabled("cpu"))

    class Where(L.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            where[0] = "training"

        def on_validation_start(self, *args: Any) -> None:
            where[0] = "validation"

    sample, forward = Actor.generate, Actor.forward
    monkeypatch.setattr(Actor, "generate", lambda *args, **kwargs: (note(), sample(*args, **kwargs))[1])
    monkeypatch.setattr(Actor, "forward", lambda *args, **kwargs: (note(), forward(*args, **kwargs))[1])
    data = make_data(tmp_path, val_fraction=0.25)
    trainer = make_trainer(
        tmp_path, precision="bf16-mixed", callbacks=[Where()], max_steps=1, num_sanity_val_steps=0, val_check_interval=1
    )
    trainer.fit(make_module(tiny_lm), data)
    assert list(seen) == ["preflight", "validation", "training"]
    assert all(autocast == {True} for autocast in seen.values())


def test_monitors_compute_as_steps_do(tmp_path, tiny_lm, monkeypatch):
    """Rollouts by their streams, scores, and the loss on text: all in the trainer's precision."""
    seen: set[tuple[str, bool]] = set()

    def noting(owner: Any, function: str, name: Callable[..., str]) -> None:
        plain = getattr(owner, function)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.add((name(*args), torch.is_autocast_enabled("cpu")))
            return plain(*args, **kwargs)

        monkeypatch.setattr(owner, function, noted)

    noting(lit_ppo.ppo.module, "sample_responses", lambda models, batch, n, stream: stream[1])
    noting(lit_ppo.ppo.collect, "scores_of", lambda *args: "score")
    noting(LitPPO, "loss_on_text", lambda *args: "text")
    monitors = [
        Cockpit(best_of_prompts=2, best_of=2),
        SampleLogger(prompts=2),
        AlignmentTax(texts(tmp_path)),
        RewardHackingMonitor(prompts=2),
    ]
    trainer = make_trainer(tmp_path, precision="bf16-mixed", callbacks=monitors, max_steps=1, num_sanity_val_steps=0)
    trainer.fit(make_module(tiny_lm), make_data(tmp_path, val_fraction=0.25))
    assert {"cockpit", "samples", "text", "reward_hacking", "score"} <= {name for name, _ in seen}
    assert {autocast for _, autocast in seen} == {True}


@pytest.mark.parametrize("trained", [True, False])
def test_sampling_casts_each_weight_once_and_again_for_the_next_rollout(tmp_path, trained):
    """Lightning's autocast keeps no cache; a cache that outlived its rollout would sample from old weights."""
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "gpt2", scale=4.0)).eval()
    model.requires_grad_(trained)
    weight = model.base_model.h[0].mlp.c_fc.weight
    casts = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten._to_copy.default and args[0].data_ptr() == weight.data_ptr():
                casts.append(kwargs["dtype"])
            return function(*args, **(kwargs or {}))

    config = neutral(max_new_tokens=6, eos_token_id=None, pad_token_id=0)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with Casts():
            first = generate(model, ids, torch.ones_like(ids), config, [(3,)])
        assert casts == [torch.bfloat16]
        assert all(p.requires_grad == trained for p in model.parameters())
        model.transformer.wte.weight.mul_(-1.0)
        second = generate(model, ids, torch.ones_like(ids), config, [(3,)])
        fresh = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        fresh.transformer.wte.weight.mul_(-1.0)
        assert second == generate(fresh, ids, torch.ones_like(ids), config, [(3,)])
    assert second != first
