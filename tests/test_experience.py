"""Rows are selected together; minibatches cover every row; means are exact however a step is split."""

import pickle

import pytest
import torch

from lit_ppo.experience import Experience, Minibatch
from lit_ppo.parallel.ranks import deal
from tests.helpers.experiences import make_experience


def test_select_and_keep_take_the_rows_of_every_field():
    experience = make_experience()
    experience.extras = {"difficulty": torch.arange(5.0), "names": list("abcde"), "note": "kept"}
    chosen = experience.select([3, 1, 1])
    assert chosen.prompts == ["p3", "p1", "p1"]
    assert chosen.columns == {"level": [3, 1, 1]}
    assert chosen.prompt_index.tolist() == [30, 10, 10]
    assert chosen.logprobs.equal(experience.logprobs[[3, 1, 1]])
    assert chosen.extras["difficulty"].tolist() == [3.0, 1.0, 1.0]
    assert chosen.extras["names"] == ["d", "b", "b"]
    assert chosen.extras["note"] == "kept"
    chosen.extras["new"] = 1
    assert "new" not in experience.extras
    assert experience.select(torch.tensor([True, False, False, False, True])).responses == ["r0", "r4"]
    assert len(experience) == 5
    experience.keep([4, 0])
    assert experience.responses == ["r4", "r0"]
    assert experience.response_mask.sum(1).tolist() == [4, 3]


def test_reading_a_field_too_early_names_it():
    with pytest.raises(AttributeError, match=r"Experience\.rewards is not set yet"):
        _ = make_experience().rewards


def test_a_misspelt_field_raises():
    with pytest.raises(AttributeError, match="socres"):
        make_experience().socres = 1
    with pytest.raises(AttributeError, match="no field 'socres'"):
        _ = make_experience().socres


def test_pickling_keeps_what_is_set_and_what_is_not():
    copy = pickle.loads(pickle.dumps(make_experience()))
    assert copy.prompts == make_experience().prompts
    with pytest.raises(AttributeError, match="not set yet"):
        _ = copy.scores


@pytest.mark.parametrize(("size", "counts"), [(2, [2, 2, 1]), (5, [5]), (7, [5])])
def test_minibatches_cover_every_row_once_an_epoch(size, counts):
    minibatches = list(make_experience().minibatches(size, epochs=3, seed=(0, 1), reduction="token_mean"))
    assert [len(m) for m in minibatches] == counts * 3
    for epoch in range(3):
        rows = [p for m in minibatches[epoch * len(counts) : (epoch + 1) * len(counts)] for p in m.prompts]
        assert sorted(rows) == make_experience().prompts


def test_the_order_changes_with_epoch_update_and_seed():
    def order(*seed: int) -> list[str]:
        experience = make_experience(lengths=(1,) * 30, prompts=(1,) * 30)
        return [p for m in experience.minibatches(30, epochs=2, seed=seed, reduction="token_mean") for p in m.prompts]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1)[:30] != order(0, 1)[30:]


@pytest.mark.parametrize(("n_ranks", "micro_batch_size"), [(1, 1), (1, 2), (2, 2), (3, 1), (3, 5)])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_means_are_exact_however_the_step_is_split(n_ranks, micro_batch_size, reduction):
    """Averaged over ranks and summed over micro-batches, as gradients are; NaN outside the mask never leaks in."""
    experience = make_experience()
    x = torch.rand(5, 4, dtype=torch.float64)
    rows = [x[i][experience.response_mask[i]] for i in range(5)]
    expected = torch.cat(rows).mean() if reduction == "token_mean" else torch.stack([r.mean() for r in rows]).mean()
    experience.extras["x"] = torch.where(experience.response_mask, x, torch.nan)
    minibatch = Minibatch.of(experience, range(5), reduction)
    assert minibatch.mean(experience.extras["x"]).item() == pytest.approx(expected.item(), rel=1e-6)
    parts, logged = [], 0.0
    for share in deal([2] * 5, n_ranks, micro_batch_size=micro_batch_size):
        minibatch.metrics = {}
        for micro in minibatch.micro_batches(share, n_ranks):
            parts.append(micro.mean(micro.extras["x"]))
            micro.log("x", micro.extras["x"])
        logged += minibatch.metrics["x"]
    assert (sum(parts) / n_ranks).item() == pytest.approx(expected.item(), rel=1e-6)
    assert logged.item() == pytest.approx(torch.cat(rows).mean().item(), rel=1e-6)  # metrics are token means


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_a_response_without_tokens_has_no_weight(reduction):
    """As a callback leaves it that masks whole responses out: means are those of the others."""
    experience = make_experience(lengths=(3, 0, 4), prompts=(1, 1, 1))
    minibatch = Minibatch.of(experience, range(3), reduction)
    x = torch.arange(12.0).reshape(3, 4)
    expected = {"token_mean": (0 + 1 + 2 + 8 + 9 + 10 + 11) / 7, "sequence_mean": (1 + 9.5) / 2}[reduction]
    parts = [micro.mean(x[i : i + 1]) for i, micro in enumerate(minibatch.micro_batches([[0], [1], [2]], 1))]
    assert sum(parts).item() == pytest.approx(expected)


def test_a_mask_that_a_callback_rebinds_before_the_step_counts():
    minibatch = Minibatch.of(make_experience(), range(5), "token_mean")
    minibatch.response_mask = minibatch.response_mask & (torch.arange(4) < 1)
    (micro,) = minibatch.micro_batches([list(range(5))], 1)
    assert micro.mean(torch.ones(5, 4)).item() == pytest.approx(1.0)
    assert (micro.weights > 0).sum() == 5


def test_what_is_logged_before_the_micro_batches_counts_once():
    """The global minibatch is there on every rank."""
    logged = 0.0
    for share in deal([2] * 5, 2, micro_batch_size=2):
        minibatch = Minibatch.of(make_experience(), range(5), "token_mean")
        minibatch.log("x", torch.full((5, 4), 3.0))
        list(minibatch.micro_batches(share, 2))
        logged += minibatch.metrics["x"].item()
    assert logged == pytest.approx(3.0)


def test_an_unfinished_experience_can_be_shown():
    assert "response_ids=(5, 4)" in repr(make_experience())
    assert "rewards" not in repr(make_experience())


def test_model_inputs_are_cut_to_the_longest_row():
    experience = make_experience().select([1, 3])  # prompts of 3, responses of 1 and 2
    ids, mask, target_mask = experience.model_inputs()
    assert ids.tolist() == [[3, 4, 5, 104, 105], [9, 10, 11, 112, 113]]
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]
    assert target_mask.tolist() == [[True, False], [True, True]]
    ids, mask, _ = make_experience().select([2]).model_inputs()  # a prompt of 1, a response of 4: without padding
    assert ids.tolist() == [[8, 108, 109, 110, 111]]
    assert mask.all()


def test_lengths_are_read_from_the_device_once_an_update(monkeypatch):
    """Not once a minibatch or micro-batch, each of which would wait for a GPU."""
    reads = []
    lengths = Experience.lengths

    monkeypatch.setattr(Experience, "lengths", property(lambda self: reads.append(1) or lengths.fget(self)))
    experience = make_experience()
    expected = lengths.fget(experience)
    seen = []
    for minibatch in experience.minibatches(2, epochs=2, seed=(0,), reduction="token_mean"):
        for micro in minibatch.micro_batches([[i] for i in range(len(minibatch))], 1):
            seen += micro.lengths
            micro.model_inputs()
    assert sorted(seen) == sorted(expected * 2)
    assert len(reads) == 1


def test_extremes_are_of_the_steps_response_tokens_however_it_is_split():
    """Rows of 3, 1 and 2 tokens: 5, 6, 7; 4; 8, 9. What lies outside is smaller, larger, NaN; a share may be empty."""
    experience = make_experience(lengths=(3, 1, 2), prompts=(1, 1, 1))
    experience.extras["x"] = torch.tensor([[5.0, 6.0, 7.0], [4.0, 99.0, torch.nan], [8.0, 9.0, -99.0]])
    for reduction in ("token_mean", "sequence_mean"):
        minibatch = Minibatch.of(experience, range(3), reduction)
        for micro in minibatch.micro_batches([[0], [1, 2], []], 1):
            micro.log_all({}, extremes={"x": micro.extras["x"]})
        assert (minibatch.least["x_min"].item(), minibatch.greatest["x_max"].item()) == (4.0, 9.0)
    rest = Minibatch.of(experience, range(3), "token_mean")
    (empty,) = rest.micro_batches([[]], 2)  # a rank with nothing to do says nothing
    empty.log_all({}, extremes={"x": empty.extras["x"]})
    assert (rest.least["x_min"].item(), rest.greatest["x_max"].item()) == (float("inf"), -float("inf"))


def test_the_sum_over_a_constant_counts_every_response_and_token_alike():
    """As Dr. GRPO: an eighth of each response's sum, over all three responses, the one without tokens included."""
    experience = make_experience(lengths=(3, 0, 4), prompts=(1, 1, 1))
    x = torch.arange(12.0).reshape(3, 4)
    micros = Minibatch.of(experience, range(3), 8).micro_batches([[0], [1], [2]], 1)
    parts = [micro.mean(x[i : i + 1]) for i, micro in enumerate(micros)]
    assert sum(parts).item() == pytest.approx((0 + 1 + 2 + 8 + 9 + 10 + 11) / (3 * 8))
