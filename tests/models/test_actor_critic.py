"""Log-probs are the stock model's on each row alone, whatever the padding; families that cannot be served refuse."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_ppo.activations import checkpoint_activations
from lit_ppo.generation.config import generation_config
from lit_ppo.models import head
from lit_ppo.models.actor_critic import Actor, Reference
from lit_ppo.models.compute import compile_blocks, halve_frozen
from lit_ppo.models.load import load_causal_lm, load_critic, load_tokenizer
from lit_ppo.parallel.sharding import blocks
from tests.helpers.tiny import make_causal_lm, make_reward_model, make_tokenizer

ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]  # the last two tokens of each are targets


def batch(left: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ROWS left-padded, with ``left`` more columns of padding."""
    width = max(map(len, ROWS)) + left
    ids = torch.tensor([[0] * (width - len(row)) + row for row in ROWS])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in ROWS])
    return ids, mask, mask[:, -2:]


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "phi", "opt"])
def test_logprobs_are_the_stock_models_on_each_row_alone(tmp_path, family):
    path, temperature = make_causal_lm(tmp_path, family, scale=4.0), 0.6
    actor = Actor(load_causal_lm("actor", str(path), {}))
    stock = AutoModelForCausalLM.from_pretrained(path).eval()
    ids, mask, target_mask = batch(left=5)
    logprobs, entropy = actor(ids, mask, target_mask=target_mask, temperature=temperature)
    for i, row in enumerate(ROWS):
        distribution = torch.log_softmax(stock(input_ids=torch.tensor([row])).logits[0] / temperature, dim=-1)
        expected = distribution[[-3, -2], row[-2:]]
        torch.testing.assert_close(logprobs[i], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            entropy[i], -(distribution.exp() * distribution).sum(-1)[-3:-1], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("family", "name"), [("gemma2", "Gemma2ForCausalLM"), ("cohere", "CohereForCausalLM")])
def test_families_that_change_their_logits_after_the_head_are_refused_by_name(tmp_path, family, name):
    path = make_causal_lm(tmp_path, family)
    with pytest.raises(ValueError, match=f"{name}: not supported"):
        Actor(load_causal_lm("actor", str(path), {}))


def test_masked_targets_are_zero_and_all_positions_can_be_targets(tiny_lm):
    """As the next-token loss on text wants it: every token but the first."""
    actor = Actor(load_causal_lm("actor", str(tiny_lm), {}))
    ids = torch.tensor([ROWS[0]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    targets = mask.clone()
    targets[0, [0, 3]] = False
    logprobs, _ = actor(ids, mask, target_mask=targets)
    stock = torch.log_softmax(actor.model(input_ids=ids, attention_mask=mask.long()).logits[0], dim=-1)
    expected = [0.0] + [stock[t - 1, ROWS[0][t]].item() for t in range(1, 6)]
    expected[3] = 0.0
    torch.testing.assert_close(logprobs[0], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_dropout_never_comes_on(tmp_path):
    path = make_causal_lm(tmp_path, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    actor = Actor(load_causal_lm("actor", str(path), {})).train()
    ids, mask, target_mask = batch()
    first, second = (actor(ids, mask, target_mask=target_mask)[0] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("left", [0, 4])
def test_values_come_from_the_token_before_and_ignore_padding(tiny_lm, left):
    critic = load_critic("critic", str(tiny_lm), {})
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    ids, mask, target_mask = batch(left)
    values = critic(ids, mask, target_mask=target_mask)
    backbone = AutoModel.from_pretrained(tiny_lm).eval()
    for i, row in enumerate(ROWS):
        states = backbone(input_ids=torch.tensor([row])).last_hidden_state[0, -3:-1]
        torch.testing.assert_close(values[i], (states @ critic.value_head.weight[0]), rtol=1e-5, atol=1e-5)


def test_a_rescaled_head_scales_and_shifts_every_value(tiny_lm):
    critic = load_critic("critic", str(tiny_lm), {})
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(critic.value_head.bias, 0.5)
    ids, mask, target_mask = batch()
    before = critic(ids, mask, target_mask=target_mask)
    critic.rescale_head(3.0, -2.0)
    after = critic(ids, mask, target_mask=target_mask)
    torch.testing.assert_close(after, (3.0 * before - 2.0) * target_mask, rtol=1e-5, atol=1e-5)
    assert critic.value_head.weight.requires_grad


@pytest.mark.parametrize(("num_labels", "label"), [(1, None), (3, 2)])
def test_a_critic_from_a_reward_model_starts_at_its_scores(tmp_path, num_labels, label):
    path = make_reward_model(tmp_path, num_labels=num_labels)
    critic = load_critic("critic", str(path), {}, label)
    stock = AutoModelForSequenceClassification.from_pretrained(path).eval()
    ids, mask, target_mask = batch()
    values = critic(ids, mask, target_mask=target_mask)
    score = stock(input_ids=torch.tensor([ROWS[1][:-1]])).logits[0, label or 0]  # the state before the last token
    torch.testing.assert_close(values[1, -1], score, rtol=1e-5, atol=1e-5)


def test_a_bidirectional_critic_is_refused(tmp_path):
    with pytest.raises(ValueError, match="DistilBertModel reads later tokens"):
        load_critic("critic", str(make_reward_model(tmp_path, "distilbert")), {})


def test_a_path_that_holds_nothing_names_the_argument(tmp_path):
    with pytest.raises(ValueError, match=r"LitPPO\(actor='.*'\): the folder holds no complete model"):
        load_causal_lm("LitPPO(actor", str(tmp_path), {})
    with pytest.raises(ValueError, match=r"LitPPO\(actor='nowhere/to-be-found'\): no such folder"):
        load_causal_lm("LitPPO(actor", "nowhere/to-be-found", {})


def test_a_tokenizer_without_pad_token_pads_with_its_stop_token(tmp_path):
    make_tokenizer(tmp_path, pad=False)
    tokenizer = load_tokenizer("tokenizer", str(tmp_path))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_values_are_not_rounded_to_bf16_under_autocast(tiny_lm):
    critic = load_critic("critic", str(tiny_lm), {})
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    states = []
    critic.value_head.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    ids, mask, target_mask = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        values = critic(ids, mask, target_mask=target_mask)
    expected = states[0].double() @ critic.value_head.weight.double().squeeze(0)
    torch.testing.assert_close(values[target_mask].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_checkpointed_activations_are_computed_again_and_give_the_same_gradients(tmp_path, family):
    """Two blocks: two forwards, and two again in the backward."""
    path = make_causal_lm(tmp_path, family)
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    gradients, counts = [], []
    for checkpointed in (False, True):
        actor = Actor(load_causal_lm("actor", str(path), {}))
        mlps = [block.mlp for block in blocks(actor)]
        calls: list[int] = []
        for mlp in mlps:
            mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointed:
            checkpoint_activations(actor)
        logprobs, entropy = actor(ids, mask, target_mask=mask[:, 1:])
        (logprobs.sum() + entropy.sum()).backward()
        gradients.append([p.grad for p in actor.parameters()])
        counts.append(len(calls))
    assert counts == [2, 4]
    assert all(one.equal(other) for one, other in zip(*gradients, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch itself
def test_one_compiled_graph_serves_all_blocks_and_lengths_and_sampling_none(tmp_path, monkeypatch):
    """Three blocks, three lengths; the head has one graph each for values and gradients."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    head._compiled.cache_clear()
    path = make_causal_lm(tmp_path, "llama", num_hidden_layers=3)
    actors = [Actor(load_causal_lm("actor", str(path), {})) for _ in range(2)]
    compile_blocks(actors[1])
    counters.clear()
    for length in (6, 9, 13):
        ids, mask = torch.arange(2 * length).view(2, length), torch.ones(2, length, dtype=torch.bool)
        for actor in actors:
            logprobs, entropy = actor(ids, mask, target_mask=mask[:, 1:])
            (logprobs.sum() + entropy.sum()).backward()
    assert counters["stats"]["unique_graphs"] == 1 + 2
    for one, other in zip(actors[0].parameters(), actors[1].parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-5, atol=1e-6)
    config = generation_config({"max_new_tokens": 5}, 1.0, actors[0].model, make_tokenizer())
    with torch.no_grad():
        first, second = (actor.generate(ids, mask, config, [(0,), (1,)]) for actor in actors)
    assert first == second
    assert counters["stats"]["unique_graphs"] == 1 + 2
    for actor in actors:  # a rollout's log-probs come from the code of the update: the first ratio is 1
        logprobs = actor(ids, mask, target_mask=mask[:, 1:])[0]
        with torch.no_grad():
            tokens, again = actor(ids, mask, target_mask=mask[:, 1:], entropy=False)
        assert torch.equal(tokens[..., 0], ids[:, 1:])
        torch.testing.assert_close(again[..., 0], logprobs, rtol=1e-6, atol=1e-6)


def test_states_narrower_than_hidden_size(tmp_path):
    """OPT-350M projects its states; the value head must fit what comes out."""
    path = make_causal_lm(tmp_path / "lm", "opt", word_embed_proj_dim=8, scale=4.0)
    critic = load_critic("critic", str(path), {})
    torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    ids, mask, target_mask = batch()
    states = AutoModel.from_pretrained(path).eval()(input_ids=torch.tensor([ROWS[0]])).last_hidden_state[0, -3:-1]
    assert states.shape[-1] == 8
    values = critic(ids, mask, target_mask=target_mask)
    torch.testing.assert_close(values[0], states @ critic.value_head.weight[0], rtol=1e-5, atol=1e-5)
    logprobs, _ = Actor(load_causal_lm("actor", str(path), {}))(ids, mask, target_mask=target_mask)
    stock = AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=torch.tensor([ROWS[0]])).logits[0]
    torch.testing.assert_close(logprobs[0], stock.log_softmax(-1)[[-3, -2], ROWS[0][-2:]], rtol=1e-5, atol=1e-5)
    reward = make_reward_model(tmp_path / "rm", "opt", word_embed_proj_dim=8)
    assert load_critic("critic", str(reward), {}, 0).value_head.weight.shape == (1, 8)


def test_frozen_blocks_in_bfloat16_share_a_compiled_graph(tmp_path, monkeypatch):
    """As references and the models under adapters on a GPU; the head's values have a graph of their own."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    head._compiled.cache_clear()
    counters.clear()
    reference = Reference(load_causal_lm("reference", str(make_causal_lm(tmp_path, "llama", num_hidden_layers=4)), {}))
    halve_frozen(reference)
    ids, mask, target_mask = batch()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = reference(ids, mask, target_mask=target_mask)[0]
        compile_blocks(reference)
        found = reference(ids, mask, target_mask=target_mask)[0]
    assert counters["stats"]["unique_graphs"] == 1 + 1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
