"""CounterfactualActions: other tokens, what the critic says of them, and the loss over them, by plain means."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from lit_ppo.callbacks import AdvantageNormalization, CounterfactualActions, LeastSquaresCritic, RewardWhitening
from lit_ppo.models.packing import read_others
from tests.helpers.spies import Spy
from tests.helpers.tiny import make_causal_lm
from tests.helpers.toy import Toy
from tests.helpers.toy_data import TOKENS
from tests.helpers.toy_runs import run_updates
from tests.helpers.toys import make_data, make_module, make_trainer
from tests.helpers.trick import Trick

TRICK = {
    "CounterfactualActions": Trick(acts={"n": 2}, refuses={"n": 0}, knobs={"n": ({}, {"n": 3})}, needs="critic"),
}


@pytest.mark.parametrize("clip", [None, 0.3])
def test_the_loss_is_the_mean_over_the_tokens_that_count(clip: float | None):
    """By loops, on the toy's first step, where ratios are 1: its critic gives another token a the value V + a.

    Token 0 ends a response, and behind the last place there is none.
    """
    seen: list[Any] = []
    keep = Spy("on_advantages", lambda module, experience: seen.append(experience))
    module = Toy(kl_coef=0.1)
    before = {m: (m.weight.detach().clone(), m.bias.detach().clone()) for m in (module.actor, module.reference)}
    run_updates([AdvantageNormalization(clip=clip), CounterfactualActions(2), keep], module=module)
    (experience,) = seen
    mask, ids = experience.response_mask, torch.randint(
        TOKENS, (*experience.response_mask.shape, 2), generator=torch.Generator().manual_seed(0)
    )  # fmt: skip
    policy, reference = ((experience.features @ w.T + b).log_softmax(-1) for w, b in before.values())
    plain = (experience.returns - experience.values)[mask]
    total, n_tokens = 0.0, int(mask[:4].sum())
    for i in range(4):  # the first minibatch
        for t in range(int(mask[i].sum())):
            advantages = [experience.advantages[i, t].item()]
            for a in ids[i, t].tolist():
                if a > 0 and t < mask.shape[1] - 1:
                    one = a - 0.1 * (policy[i, t, a] - reference[i, t, a]).item()
                    normalised = (one - plain.mean().item()) / plain.std().item()
                    advantages.append(normalised if clip is None else min(max(normalised, -clip), clip))
            total -= sum(advantages) / len(advantages) / n_tokens
    assert module.losses[0]["policy"] == pytest.approx(total, rel=1e-4)


def test_values_behind_the_response_s_own_tokens_are_those_of_the_next_place():
    random, mask = torch.Generator().manual_seed(0), torch.arange(5) < torch.arange(12)[:, None] % 5 + 1
    raw, states, rewards = (torch.randn(*shape, generator=random) for shape in ((12, 5), (12, 5, 2), (12, 5)))
    experience = SimpleNamespace(
        values=raw, rewards=rewards, response_mask=mask, group=torch.arange(12), extras={"critic_states": states}
    )
    critic = LeastSquaresCritic(ridge=1.0)
    critic.on_rewards(None, SimpleNamespace(), experience)  # type: ignore[arg-type]
    found = critic.values_after(raw[:, [1, 2, 3, 4, 4], None], states[:, [1, 2, 3, 4, 4], None])[..., 0]
    both = mask[:, 1:]
    torch.testing.assert_close(found[:, :-1][both], experience.values[:, 1:][both], rtol=1e-4, atol=1e-5)


CRITICS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "llama": ("llama", {"num_key_value_heads": 1}),
    "mistral with a window": ("mistral", {"sliding_window": 3}),
    "gemma2": ("gemma2", {"sliding_window": 3, "attn_logit_softcapping": 0.5}),
}


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("critic", CRITICS)
def test_other_tokens_are_read_as_the_plain_models_read_them(tmp_path: Path, critic: str, precision: torch.dtype):
    family, kwargs = CRITICS[critic]
    paths = [
        make_causal_lm(tmp_path / "actor", seed=0, scale=4.0),
        make_causal_lm(tmp_path / "reference", seed=1, scale=4.0),
        make_causal_lm(tmp_path / "critic", family, seed=2, scale=4.0, **kwargs),
    ]
    actor, reference, backbone = (str(path) for path in paths)
    module = make_module(actor, reference=reference, critic=backbone, temperature=0.7, micro_batch_size=2)
    module.n_actions, module.n_critic_states = 3, 1000
    module.configure_model()
    torch.nn.init.normal_(module.critic.value_head.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        experience = module.rollout(["the film", "a movie was", "plot"])
    found, ids = experience.extras, experience.extras["action_ids"]
    rtol, atol = (1e-3, 1e-4) if precision == torch.float32 else (0.05, 0.1)
    weight, bias = module.critic.value_head.weight[0], module.critic.value_head.bias
    models = [AutoModelForCausalLM.from_pretrained(path).eval() for path in paths]
    assert torch.equal(ids[..., 0], experience.response_ids)
    n_last = experience.response_ids.shape[1] - 1
    for i in range(3):
        tokens = torch.cat([experience.prompt_ids[i][experience.prompt_mask[i]],
                            experience.response_ids[i][experience.response_mask[i]]])  # fmt: skip
        first = int(experience.prompt_mask[i].sum())
        for t in range(len(tokens) - first):
            own, others = ids[i, t], ids[i, t, 1:]
            with torch.no_grad():
                logits = [model(tokens[None, : first + t]).logits[0, -1] / 0.7 for model in models[:2]]
                rows = torch.cat([tokens[: first + t].expand(3, -1), others[:, None]], dim=1)
                states = models[2].base_model(rows).last_hidden_state[:, -1]
                before = models[2].base_model(tokens[None, : first + t]).last_hidden_state[0, -1]
            for name, x in zip(("action_logprobs", "action_ref_logprobs"), logits, strict=True):
                torch.testing.assert_close(found[name][i, t], x.log_softmax(-1)[own], rtol=rtol, atol=atol)
            torch.testing.assert_close(found["critic_states"][i, t], before, rtol=rtol, atol=atol)
            # the states are right, so values can be as exact as the head is
            value = found["critic_states"][i, t] @ weight + bias[0]
            torch.testing.assert_close(experience.values[i, t], value, rtol=1e-5, atol=1e-5)
            read = found["action_mask"][i, t]
            assert read.tolist() == [t < n_last and a != module.tokenizer.eos_token_id for a in others.tolist()]
            torch.testing.assert_close(found["action_states"][i, t][read], states[read], rtol=rtol, atol=atol)
            values = (found["action_states"][i, t] @ weight + bias)[read]
            torch.testing.assert_close(found["action_values"][i, t][read], values, rtol=1e-5, atol=1e-5)


def test_rows_on_both_sides_of_a_bound_of_rope_are_read_as_each_alone(tmp_path: Path):
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 5.0, 9.0, 17.0],
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(make_causal_lm(tmp_path, "llama", scale=6.0, rope_parameters=rope))
    backbone = model.eval().base_model
    random = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(3, 30, (3, 11), generator=random), torch.ones(3, 11, dtype=torch.bool)
    mask[1, :4] = False  # seven tokens, the others have eleven
    actions = torch.randint(3, 30, (3, 4, 2), generator=random)
    wanted = torch.rand(3, 4, 2, generator=random) < 0.7
    with torch.no_grad():
        states, number, after = read_others(backbone, ids, mask, actions, wanted)
        alone = [read_others(backbone, *(x[i : i + 1] for x in (ids, mask, actions, wanted))) for i in range(3)]
        plain = backbone(ids[1:2, 4:]).last_hidden_state[0]
    torch.testing.assert_close(states, torch.cat([one[0] for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, torch.cat([one[2] for one in alone]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[number[1, 4:]], plain, rtol=1e-4, atol=1e-5)


def test_other_tokens_do_not_depend_on_micro_batches(tmp_path: Path):
    actor, found = make_causal_lm(tmp_path / "a", scale=4.0), []
    for size in (1, 3):
        module = make_module(actor, micro_batch_size=size)
        module.n_actions = 4
        found.append(module.rollout(["the film", "a movie was", "plot"]).extras["action_ids"])
    assert torch.equal(*found)


@pytest.mark.parametrize("problem", ["takes no tree", "reads another"])
def test_a_model_that_reads_no_tree_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str):
    module = make_module(make_causal_lm(tmp_path / "a", scale=4.0))
    module.n_actions = 2
    module.configure_model()
    forward = module.critic.backbone.forward

    def plain(attention_mask: Any = None, position_ids: Any = None, tree: Any = None, **inputs: Any) -> Any:
        if tree is not None and problem == "takes no tree":
            raise TypeError("unexpected argument 'tree'")
        module.critic.backbone.config._attn_implementation = "sdpa"
        return forward(**inputs)

    monkeypatch.setattr(module.critic.backbone, "forward", plain)
    with pytest.raises(
        ValueError, match=r"^CounterfactualActions or AdvantageRegression: GPT2Model does not read other"
    ):
        module.rollout(["the film"])


def test_a_family_whose_layers_mix_packed_rows_is_refused():
    """LFM2 has convolutions, which attention's arguments do not reach; of equal tokens its states would look right."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    lfm2 = AutoModel.from_config(AutoConfig.for_model("lfm2", **sizes, layer_types=["conv", "full_attention"])).eval()
    zeros, ones = torch.zeros(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="AdvantageRegression: Lfm2Model does not read other tokens"):
        read_others(lfm2, zeros, ones, zeros[:, :3, None], ones[:, :3, None])


def test_a_second_fit_without_it_asks_for_nothing(tmp_path: Path):
    module = make_module(make_causal_lm(tmp_path / "a", scale=4.0))
    tricks = [LeastSquaresCritic(), AdvantageNormalization(), CounterfactualActions(2)]
    make_trainer(tmp_path, callbacks=tricks, max_steps=1).fit(module, make_data(tmp_path))
    assert (module.n_actions, module.n_critic_states, module.critic_frozen) == (0, 0, False)


def test_a_tolerance_that_would_do_nothing_is_refused(tmp_path: Path):
    module = make_module(make_causal_lm(tmp_path / "a", scale=4.0), sampling_logprobs_tolerance=0.1)
    trainer = make_trainer(tmp_path, callbacks=[AdvantageNormalization(), CounterfactualActions(2)])
    with pytest.raises(ValueError, match=r"LitPPO\(sampling_logprobs_tolerance=0.1\): CounterfactualActions needs the"):
        trainer.fit(module, make_data(tmp_path))


def test_in_a_loop_of_one_s_own_each_rollout_teaches_once(tmp_path: Path):
    """Least squares would count a response towards its own value; and one from before ``attach`` has no states."""
    module = make_module(make_causal_lm(tmp_path / "a", scale=4.0), rewards=None, minibatch_size=4)
    early = module.rollout(["the film"] * 4)
    tricks = [LeastSquaresCritic(), AdvantageNormalization(), CounterfactualActions(2)]
    with module.attach(make_trainer(tmp_path, callbacks=tricks)):
        experience = module.rollout(["the film"] * 4)
        for one in (early, experience):
            one.scores = [0.0, 1.0, 2.0, 3.0]
        with pytest.raises(ValueError, match="it has no critic_states, which a callback asks of rollouts"):
            module.step(early)
        module.step(experience)
        with pytest.raises(ValueError, match="it has no critic_states"):
            module.step(experience)


def test_log_probs_of_several_tokens_have_the_gradient_of_a_plain_softmax(tmp_path: Path):
    actor = make_causal_lm(tmp_path / "a", scale=4.0)
    module, plain = make_module(actor), AutoModelForCausalLM.from_pretrained(actor).eval()
    experience = module.rollout(["the film"])
    ids = torch.cat([experience.prompt_ids, experience.response_ids], dim=1)
    n = experience.response_ids.shape[1]
    others = torch.arange(n * 4).view(1, n, 4) % 7  # some of them twice
    weights = torch.randn(1, n, 5, generator=torch.Generator().manual_seed(0))
    inputs = experience.model_inputs()
    found = module.actor(
        inputs.input_ids, inputs.attention_mask, target_mask=inputs.target_mask, actions=others, temperature=1.0
    )
    (found[0] * weights).sum().backward()
    all_ids = torch.cat([experience.response_ids[..., None], others], dim=-1)
    logprobs = plain(ids).logits[:, -n - 1 : -1].log_softmax(-1).gather(-1, all_ids)
    (logprobs * weights).sum().backward()
    for (name, mine), (other, theirs) in zip(
        module.actor.model.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert name == other
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("callbacks", "problem"),
    [
        ([CounterfactualActions(1), AdvantageNormalization()], "put AdvantageNormalization first"),
        ([AdvantageNormalization("minibatch"), CounterfactualActions(1)], "needs one scale for the batch"),
        ([RewardWhitening(), CounterfactualActions(1)], "no whitened rewards; keep one of them"),
    ],
)
def test_what_does_not_go_together_is_refused(callbacks: list[Any], problem: str):
    with pytest.raises(ValueError, match=problem):
        run_updates(callbacks)


def test_it_trains_with_least_squares_on_lit_ppo(tmp_path: Path):
    """The same run twice, bit for bit; in one micro-batch or several, but for rounding."""
    actor, found = make_causal_lm(tmp_path / "lm", scale=4.0), []
    for size in (4, 4, 2):
        module = make_module(actor, critic="actor", micro_batch_size=size)
        tricks = [LeastSquaresCritic(), AdvantageNormalization(), CounterfactualActions(3)]
        make_trainer(tmp_path, callbacks=tricks).fit(module, make_data(tmp_path))
        found.append(torch.cat([p.detach().flatten() for p in module.actor.parameters()]))
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-4)
