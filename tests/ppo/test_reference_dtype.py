"""A reference in bfloat16: half the memory, log-probs a little off, and nothing that would round away in silence."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_ppo.experience import Minibatch
from lit_ppo.models.load import load_causal_lm
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toys import count_good, logged, make_data, make_module, make_trainer

PROMPTS = ["the film was really", "a", "we saw"]
EPSILON = 2**-8  # between neighbouring bfloat16 numbers near 1


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request, tmp_path_factory):
    return make_causal_lm(tmp_path_factory.mktemp(request.param), request.param, scale=4.0)


def test_models_are_float32_by_default_even_from_a_bfloat16_checkpoint(tmp_path, lm):
    AutoModelForCausalLM.from_pretrained(lm).to(torch.bfloat16).save_pretrained(tmp_path)
    module = make_module(tmp_path, tokenizer=str(lm))
    module.configure_model()
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_its_logprobs_are_float32_and_off_by_bfloat16s_rounding(lm):
    """The actor's own start in bfloat16: the KL is not 0, but as small as a few roundings of logits."""
    module = make_module(lm, reference_dtype="bfloat16", samples_per_prompt=8)
    experience = module.rollout(PROMPTS)
    assert experience.ref_logprobs.dtype == experience.kl.dtype == torch.float32
    off = (experience.ref_logprobs - experience.logprobs)[experience.response_mask].abs()
    largest = logits_of(lm).abs().max()
    assert 0 < off.max() < 4 * EPSILON * largest
    assert 0 < experience.kl.abs().sum(1).mean() < 10 * EPSILON * largest  # 10 tokens
    assert make_module(lm, samples_per_prompt=8).rollout(PROMPTS).kl.abs().max() == 0


def logits_of(path: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        return model(torch.arange(40).reshape(4, 10)).logits


def test_exact_kl_of_a_float32_actor_to_a_bfloat16_reference(tmp_path, lm):
    """Against another model: far larger than the rounding, and differentiable."""
    other = make_causal_lm(tmp_path, scale=4.0, seed=5)
    kl, gradients = {}, {}
    for dtype in ("float32", "bfloat16"):
        module = make_module(lm, reference=str(other), reference_dtype=dtype)
        experience = module.rollout(PROMPTS)
        minibatch = Minibatch.of(experience, range(3), "token_mean")
        kl[dtype] = module.exact_kl(minibatch)
        assert kl[dtype].dtype == torch.float32
        minibatch.mean(kl[dtype]).backward()
        gradients[dtype] = torch.cat([p.grad.flatten() for p in module.actor.parameters()])
    off = (kl["bfloat16"] - kl["float32"]).abs()
    assert 0 < off.max() < 0.01 * kl["float32"].max()
    assert torch.cosine_similarity(gradients["bfloat16"], gradients["float32"], dim=0) > 0.999


def test_a_run_trains_with_it_and_keeps_it_frozen(tmp_path, lm):
    module = make_module(lm, reference_dtype="bfloat16")
    make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert {p.dtype for p in module.reference.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in (*module.actor.parameters(), *module.critic.parameters())} == {torch.float32}
    start = load_causal_lm("reference", str(lm), {}, torch.bfloat16).state_dict()
    assert all(value.equal(start[name]) for name, value in module.reference.model.state_dict().items())
    assert not any(name.startswith("reference.") for name in module.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reference_dtype": "float16"}, r"LitPPO\(reference_dtype='float16'\): must be one of 'float32', 'bfloat16'"),
        (
            {"reference_dtype": "bfloat16", "reference": None},
            r"LitPPO\(reference_dtype='bfloat16'\): there is no reference; leave it out, or give a reference",
        ),
    ],
)
def test_what_is_refused(tiny_lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_module(tiny_lm, **arguments)


def test_a_reference_that_a_callback_moves_must_be_float32(tmp_path, tiny_lm):
    """Found before the first rollout, and where the checkpoint is written, if it says so later."""
    message = r"LitPPO\(reference_dtype='bfloat16'\): a callback moves the reference .*use 'float32'"
    module = make_module(tiny_lm, reference_dtype="bfloat16")
    module.checkpoint_reference = True
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path).fit(module, make_data(tmp_path))
    assert module.rollouts == 0
    with pytest.raises(ValueError, match=message):
        module.state_dict()
    module.checkpoint_reference = False
    assert module.state_dict()


def test_double_precision_would_undo_it(tmp_path, tiny_lm):
    with pytest.raises(ValueError, match=r"reference_dtype='bfloat16'\): Trainer\(precision='64-true'\)"):
        make_trainer(tmp_path, precision="64-true").fit(
            make_module(tiny_lm, reference_dtype="bfloat16"), make_data(tmp_path)
        )


def test_double_precision_trains(tmp_path, tiny_lm):
    """Scores are float32, whatever the default dtype of a new tensor."""
    module, trainer = make_module(tiny_lm, rewards={"good": count_good}), make_trainer(tmp_path, precision="64-true")
    trainer.fit(module, make_data(tmp_path))
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert module.score(module.rollout(["the film"])).dtype == torch.float32
    assert all(row["policy/ratio"] == pytest.approx(1.0, abs=0.1) for row in logged(trainer))
