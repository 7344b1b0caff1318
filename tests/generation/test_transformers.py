"""A sample depends on (seed, update, row, sample number) alone; the distribution is the model's own."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from lit_ppo.generation.config import check_generation, generation_config
from lit_ppo.generation.transformers import generate, inverse_cdf, stop_ids, uniforms
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm, load_tokenizer
from tests.helpers.tiny import make_causal_lm

PROMPTS = [[5, 6], [7, 8, 9, 10], [4, 5, 6], [11]]


def padded(rows, extra=0):
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])


def seeds(n, seed=0):
    """One per row, as rollouts make them."""
    return [(seed, 0, 0, row, 0) for row in range(n)]


def sampled(*args, **kwargs):
    return generate(*args, **kwargs).ids


def make(path, temperature=1.0, **generation):
    model = Actor(load_causal_lm("actor", str(path), {})).model
    tokenizer = load_tokenizer("tokenizer", str(path))
    return model, generation_config({"max_new_tokens": 12, **generation}, temperature, model, tokenizer)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def lm(request, tmp_path_factory):
    return make_causal_lm(tmp_path_factory.mktemp(request.param), request.param, scale=6.0)


@pytest.mark.parametrize("extra", [0, 3])
def test_samples_do_not_depend_on_batching_or_padding(lm, extra):
    model, config = make(lm)
    draws = seeds(4)
    together = sampled(model, *padded(PROMPTS, extra), config, draws)
    alone = [sampled(model, *padded([row]), config, draws[i : i + 1])[0] for i, row in enumerate(PROMPTS)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 4


def test_sampling_follows_the_formula_token_by_token(lm):
    """Brute force: the smallest token whose cumulated probability passes the draw, from full forwards."""
    model, config = make(lm, temperature=0.8)
    draws = uniforms(seeds(4, seed=1), 12)
    for row, response in enumerate(sampled(model, *padded(PROMPTS), config, seeds(4, seed=1))):
        text = list(PROMPTS[row])
        for t, token in enumerate(response):
            logits = model(input_ids=torch.tensor([text])).logits[0, -1].double() / 0.8
            cdf = np.cumsum(np.exp(logits.detach().numpy()) / np.exp(logits.detach().numpy()).sum())
            assert token == int(np.argmax(cdf > draws[row, t].item()))
            text.append(token)


def test_responses_end_with_the_first_stop_token_and_rows_leave_one_by_one(lm):
    stops = {0, 1, *range(20, 29)}  # 0 pads as well
    model, config = make(lm, eos_token_id=sorted(stops))
    found = generate(model, *padded(PROMPTS * 8), config, seeds(32))
    responses = found.ids
    assert len({len(row) for row in responses}) > 3
    assert any(row[-1] == 0 for row in responses)
    assert found.ended == [row[-1] in stops for row in responses]
    for row in responses:
        assert not stops & set(row[:-1])
        assert len(row) == 12 or row[-1] in stops


def test_greedy_takes_the_likeliest_token(lm):
    model, config = make(lm)
    (response,) = sampled(model, *padded(PROMPTS[:1]), config, None)
    logits = model(input_ids=torch.tensor([PROMPTS[0] + response])).logits[0]
    assert response == logits[len(PROMPTS[0]) - 1 : -1].argmax(-1).tolist()


def test_min_new_tokens_holds_stop_tokens_back(lm):
    stops = list(range(1, 30))
    model, config = make(lm, eos_token_id=stops, min_new_tokens=6)
    draws = seeds(4)
    assert all(len(row) >= 6 for row in sampled(model, *padded(PROMPTS), config, draws))
    _, config = make(lm, eos_token_id=stops)
    assert any(len(row) < 6 for row in sampled(model, *padded(PROMPTS), config, draws))


@pytest.mark.parametrize("knob", [{"top_k": 1}, {"repetition_penalty": 5.0}, {"max_new_tokens": 3}, {"top_p": 0.01}])
def test_generation_fields_reach_the_sampler(lm, knob):
    model, config = make(lm)
    draws = seeds(4)
    plain = sampled(model, *padded(PROMPTS), config, draws)
    assert sampled(model, *padded(PROMPTS), make(lm, **knob)[1], draws) != plain


def test_a_checkpoints_own_filters_do_not_leak_in_and_its_stop_ids_do(tmp_path):
    path = make_causal_lm(tmp_path, scale=6.0)
    plain, config = make(path)
    draws = seeds(4)
    expected = sampled(plain, *padded(PROMPTS), config, draws)
    GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=3.0, eos_token_id=[1, 2]
    ).save_pretrained(path)
    model, config = make(path)
    assert stop_ids(config) == [1, 2]
    config.eos_token_id = 1
    assert sampled(model, *padded(PROMPTS), config, draws) == expected


def test_numbers_depend_on_each_entry_of_the_seed_and_not_on_other_rows():
    base = uniforms([(0, 1, 0, 3, 0), (0, 1, 0, 4, 0)], 8)
    assert uniforms([(0, 1, 0, 4, 0)], 8).equal(base[1:])
    assert uniforms([(0, 1, 0, 3, 0)], 5).equal(base[:1, :5])
    for other in [(1, 1, 0, 3, 0), (0, 2, 0, 3, 0), (0, 1, 1, 3, 0), (0, 1, 0, 3, 1)]:
        assert not uniforms([other], 8).equal(base[:1])


def test_inverse_cdf_hits_each_token_as_often_as_its_probability_says():
    """By hand: probabilities 0.5, 0, 0.25, 0.25 cumulate to 0.5, 0.5, 0.75, 1."""
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log().expand(7, 4)
    draws = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(logits, draws).tolist() == [0, 0, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({}, "max_new_tokens=None.*must be an integer, at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0.*must be an integer, at least 1"),
        ({"max_new_tokens": 4, "temperature": 0.5}, "it is LitPPO's own argument"),
        ({"max_new_tokens": 4, "do_sample": False}, "training always samples"),
        ({"max_new_tokens": 4, "max_length": 9}, "give max_new_tokens"),
        ({"max_new_tokens": 4, "num_beams": 2}, "plain sampling"),
        ({"max_new_tokens": 4, "num_return_sequences": 2}, "samples_per_prompt"),
        ({"max_new_tokens": 4, "stop_strings": ["."]}, "end in a token"),
        ({"max_new_tokens": 4, "top_kk": 2}, "GenerationConfig has no field 'top_kk'"),
    ],
)
def test_what_generation_cannot_be_asked_is_refused(generation, message):
    with pytest.raises(ValueError, match=rf"^LitPPO\(generation.*{message}"):
        check_generation(generation)
