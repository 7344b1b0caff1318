"""A sample depends on (seed, update, row, sample number) alone; the distribution is the model's own."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from lit_ppo import LitSFT
from lit_ppo.functional import inverse_cdf
from lit_ppo.generation.config import checked_generation, generation_config, stop_ids
from lit_ppo.generation.distribution import reshaping_fields
from lit_ppo.generation.transformers import generate, uniforms
from lit_ppo.models.actor_critic import Actor
from lit_ppo.models.load import load_causal_lm, load_tokenizer
from tests.helpers.tiny import make_causal_lm, make_tokenizer
from tests.helpers.toys import make_module

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


def test_bf16_sampling_has_logits_that_are_not_rounded(tmp_path):
    """They are the head's products of its bf16 inputs in float32; the head is as before afterwards."""
    model, config = make(make_causal_lm(tmp_path, "llama", scale=6.0))
    states, logits = [], []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: states.append(args[0]) or logits.append(output))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        generate(model, *padded(PROMPTS), config, seeds(4))
    handle.remove()
    assert "forward" not in vars(head)
    for x, y in zip(states, logits, strict=True):
        assert y.dtype == torch.float32
        exact = x.bfloat16().double() @ head.weight.bfloat16().double().T
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_inverse_cdf_hits_each_token_as_often_as_its_probability_says():
    """By hand: probabilities 0.5, 0, 0.25, 0.25 cumulate to 0.5, 0.5, 0.75, 1."""
    logits = torch.tensor([0.5, 0.0, 0.25, 0.25], dtype=torch.float64).log().expand(7, 4)
    draws = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(logits, draws).tolist() == [0, 0, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("n_tokens", [5, 128, 129, 1000, 1024])
def test_inverse_cdf_of_a_large_vocabulary_is_that_of_plain_sums(n_tokens):
    """Against numpy, token by token; a third of the tokens cannot occur, among them the last 130."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(400, n_tokens, generator=generator) * 4
    logits[:, ::3] = logits[:, min(n_tokens - 130, 2) :][:, -130:] = -torch.inf
    logits[:, 1] = 0.0
    draws = torch.rand(400, generator=generator, dtype=torch.float64)
    draws[:3] = torch.tensor([0.0, 1 - 2**-53, 1 - 2**-52], dtype=torch.float64)
    found = inverse_cdf(logits, draws)
    assert logits.gather(1, found.unsqueeze(1)).isfinite().all()
    cdf = np.cumsum(torch.softmax(logits, -1).double().numpy(), axis=1)
    expected = (cdf > (draws.numpy() * cdf[:, -1])[:, None]).argmax(1)
    assert found[3:].tolist() == expected[3:].tolist()


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
        ({"max_new_tokens": 4, "cache_implementation": "quantized"}, "must be one of 'static', 'dynamic'"),
        ({"max_new_tokens": 4, "max_cache_len": 64}, "the cache has the size of prompt and max_new_tokens"),
        ({"max_new_tokens": 4, "compile_config": {"modes": "default"}}, "has no field 'modes'; the fields are fullg"),
        ({"max_new_tokens": 4, "compile_config": {"backend": "tvn"}}, "backend='tvn'.*must be one of"),
        ({"max_new_tokens": 4, "compile_config": {}, "disable_compile": True}, "leave one of them out"),
        ({"max_new_tokens": 4, "compile_config": {}, "cache_implementation": "dynamic"}, "leave one of them out"),
        ({"max_new_tokens": 4, "guidance_scale": 1.5}, "mixes in a second distribution"),
        ({"max_new_tokens": 4, "encoder_repetition_penalty": 1.5}, "padding of shorter prompts.*give repetition_pena"),
        ({"max_new_tokens": 4, "no_repeat_ngram_size": 1}, "forbids the padding token"),
        ({"max_new_tokens": 4, "encoder_no_repeat_ngram_size": 1}, "forbids the padding token"),
        ({"max_new_tokens": 4, "top_kk": 2}, "GenerationConfig has no field 'top_kk'"),
    ],
)
def test_what_generation_cannot_be_asked_is_refused(generation, message):
    with pytest.raises(ValueError, match=rf"^LitPPO\(generation.*{message}"):
        checked_generation("LitPPO", generation)


@pytest.mark.parametrize(
    "knobs",
    [
        {"min_new_tokens": 3},  # its four stop ids are as many as the rows
        {"repetition_penalty": 3.0},
        {"encoder_no_repeat_ngram_size": 2},
    ],
)
def test_rows_that_end_leave_the_others_their_logits_processors(lm, knobs):
    """Some processors hold a number per row, others one per stop token."""
    model, config = make(lm, eos_token_id=[20, 24, 28, 32], pad_token_id=0, **knobs)
    together = [sampled(model, *padded(PROMPTS), config, seeds(4, seed)) for seed in range(3)]
    alone = [
        [sampled(model, *padded([row]), config, seeds(4, seed)[i : i + 1])[0] for i, row in enumerate(PROMPTS)]
        for seed in range(3)
    ]
    assert together == alone
    assert len({len(row) for rows in together for row in rows}) > 2


def test_no_setting_of_a_checkpoint_reaches_any_policy(tmp_path):
    """The reference is the actor with other settings beside it: their samples must be the same."""
    actor = make_causal_lm(tmp_path / "actor", scale=6.0)
    reference = make_causal_lm(tmp_path / "reference", scale=6.0)
    GenerationConfig(
        do_sample=True, min_p=0.5, top_h=0.3, epsilon_cutoff=0.1, eta_cutoff=0.1, forced_bos_token_id=37,
        forced_eos_token_id=1, suppress_tokens=[*range(4, 20)], begin_suppress_tokens=[*range(20, 36)],
        bad_words_ids=[[21], [22]], sequence_bias=[[[30], 9.0]], exponential_decay_length_penalty=[0, 3.0],
        encoder_repetition_penalty=4.0, no_repeat_ngram_size=1, min_new_tokens=7, guidance_scale=2.0, penalty_alpha=0.6,
        stop_strings=["good"], eos_token_id=1,
    ).save_pretrained(reference)  # fmt: skip
    module = make_module(actor, reference=str(reference))
    for greedy in (False, True):
        ours, theirs = (
            module.rollout(["the film", "a"] * 4, policy=policy, do_sample=not greedy, stream="test", logprobs=False)
            for policy in ("actor", "reference")
        )
        assert ours.response_ids.equal(theirs.response_ids)


def test_a_response_ends_at_every_stop_token_that_checkpoint_or_tokenizer_names(tmp_path, caplog):
    """As with Qwen's base models after SFT; what is said names both, and SFT exports both, its own first."""
    caplog.set_level("INFO")
    path = make_causal_lm(tmp_path / "lm", scale=6.0)
    GenerationConfig(eos_token_id=20).save_pretrained(path)
    stops = {1, 20}
    ids = [row for seed in range(9) for row in sampled(*_prompted(path), seeds(4, seed))]
    assert {row[-1] for row in ids if len(row) < 12} == stops
    make_module(path).configure_model()
    (other,) = make_tokenizer().convert_ids_to_tokens([20])
    assert f"Responses end at '[EOS]' (id 1, tokenizer), '{other}' (id 20, generation_config)" in caplog.text
    LitSFT(str(path)).save_pretrained(tmp_path / "sft")
    assert GenerationConfig.from_pretrained(tmp_path / "sft").eos_token_id == [1, 20]
    assert make(path, eos_token_id=5)[1].eos_token_id == 5  # the user's own word is the last


def _prompted(path):
    model, config = make(path)
    ids, mask = padded(PROMPTS)
    return model, ids, mask, config


@pytest.mark.parametrize(
    ("knob", "reshapes"),
    [
        ({"min_new_tokens": 2}, True),
        ({"suppress_tokens": [5]}, True),
        ({"begin_suppress_tokens": [5]}, True),
        ({"bad_words_ids": [[5]]}, True),
        ({"sequence_bias": [[[5], -2.0]]}, True),
        ({"exponential_decay_length_penalty": [2, 1.5]}, True),
        ({"forced_eos_token_id": 1}, True),
        ({"watermarking_config": {"greenlist_ratio": 0.5}}, True),
        ({"min_p": 0.1}, True),
        ({"top_k": 5}, True),
        ({"no_repeat_ngram_size": 2}, True),
        ({"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, "min_new_tokens": 0, "epsilon_cutoff": 0.0}, False),
        ({"renormalize_logits": True, "remove_invalid_values": True, "eos_token_id": [1, 5]}, False),
    ],
)
def test_fields_that_reshape_the_distribution_are_those_that_make_transformers_process_logits(lm, knob, reshapes):
    model, config = make(lm, temperature=0.7, **knob)
    assert reshaping_fields(model, config, {"max_new_tokens": 12, **knob}) == (list(knob) if reshapes else [])


def test_a_value_that_transformers_refuses_is_refused_in_our_words(lm):
    model, config = make(lm, bad_words_ids=[])
    with pytest.raises(
        ValueError, match=r"^LitPPO\(generation={'bad_words_ids': \[\]}\): .*; leave it out or correct it"
    ):
        reshaping_fields(model, config, {"bad_words_ids": []})
