"""How well advantages point the actor's gradient: ``python -m benchmarks.learning.gradients FOLDER --data_root DIR``.

At the start of a run, for each ``lam`` of GAE: the gradient of batches of responses, compared with the gradient of the
true return (``lam`` 1), which has no bias. Values come from a critic that starts as the reward model and has made some
passes, and from ``LeastSquaresCritic`` with the reward model as it is. Averages over pairs of different batches cancel
the noise, so none of the numbers needs a long run.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning.run import commit
from benchmarks.learning.task import MODELS, RESULTS, ROWS, make_scorer, training_prompts
from lit_ppo import LitPPO
from lit_ppo.callbacks import LeastSquaresCritic
from lit_ppo.experience import Experience
from lit_ppo.functional import gae, token_rewards, value_loss
from lit_ppo.models.actor_critic import actor_forward, critic_forward


def quality(estimates: Tensor, truths: Tensor) -> dict[str, float]:
    r"""How good the gradients of single batches are.

    With :math:`s^2 = E\langle g_i, g_j \rangle` over :math:`i \ne j`, the squared norm of an estimator's mean:

    - ``signal``: :math:`s^2 / E|g_i|^2`, the share of a batch's squared gradient that is not noise;
    - ``bias_cosine``: of the estimator's mean with the mean of the truths, what is left with endless batches;
    - ``cosine``: of a batch's gradient with the mean of the truths, on average.

    Args:
        estimates: Gradients of G batches.
        truths: Gradients of an estimator without bias on the same batches.

    Shapes:
        (G, D), (G, D).
    """
    norm, own = float(estimates.square().sum(1).mean()), _pairs(estimates, estimates)
    both, true = _pairs(estimates, truths), _pairs(truths, truths)
    return {
        "norm": norm**0.5,
        "signal": own / norm,
        "bias_cosine": both / max(own * true, 1e-30) ** 0.5,
        "cosine": both / max(norm * true, 1e-30) ** 0.5,
    }


def _pairs(a: Tensor, b: Tensor) -> float:
    """Mean of the products of different batches."""
    n = len(a)
    return float((a.sum(0) @ b.sum(0) - (a * b).sum()) / (n * (n - 1)))


def rolled_out(module: Any, prompts: list[str], stream: str) -> Experience:
    """One response to each prompt, with scores and token rewards."""
    experience: Experience = module.rollout(prompts, samples_per_prompt=1, logprobs=False, stream=stream)
    add_rewards(module, experience)
    return experience


def add_rewards(module: Any, experience: Experience) -> None:
    """Scores, and token rewards without a penalty on the KL."""
    experience.scores, mask = module.score(experience), experience.response_mask
    experience.rewards = token_rewards(experience.scores, torch.zeros(mask.shape), mask, kl_coef=0.0)


def chunks(n: int) -> list[list[int]]:
    """Rows of each forward."""
    return [list(range(start, min(start + ROWS, n))) for start in range(0, n, ROWS)]


def values_of(module: Any, experience: Experience) -> Tensor:
    """The critic's values."""
    n_columns = experience.response_ids.shape[1]
    with torch.no_grad():
        parts = [critic_forward(module.critic, experience.select(rows).model_inputs(), n_columns)
                 for rows in chunks(len(experience))]  # fmt: skip
    return torch.cat(parts)


def states_of(module: Any, experience: Experience, n_states: int) -> Tensor:
    """The critic's hidden states, as training rollouts leave them for least squares."""
    n_columns, parts = experience.response_ids.shape[1], []
    with torch.no_grad():
        for rows in chunks(len(experience)):
            ids, mask, target_mask = experience.select(rows).model_inputs()
            states = module.critic(ids, mask, target_mask=target_mask, n_states=n_states)[1]
            parts.append(torch.nn.functional.pad(states, (0, 0, 0, n_columns - states.shape[1])))
    return torch.cat(parts)


def train_critic(module: Any, experience: Experience, rate: float, passes: int) -> None:
    """Regress the scores at every token, as the critic of GAE with ``value_lam`` 1 does."""
    optimizer = torch.optim.AdamW(module.critic.parameters(), lr=rate, weight_decay=0.0)
    for number in range(passes):
        order = torch.randperm(len(experience), generator=torch.Generator().manual_seed(number))
        for rows in order.split(ROWS):
            some = experience.select(rows)
            values = critic_forward(module.critic, some.model_inputs(), some.response_ids.shape[1])
            loss = value_loss(values, some.scores[:, None].expand_as(values))[some.response_mask].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.critic.parameters(), 1.0)
            optimizer.step()


def gradients(module: Any, batches: list[Experience], lams: list[float]) -> dict[float, Tensor]:
    """The gradient of each batch with its values and each ``lam``, (G, D)."""
    parameters = [p for p in module.actor.parameters() if p.requires_grad]
    found = {lam: torch.zeros(len(batches), sum(p.numel() for p in parameters)) for lam in lams}
    for number, batch in enumerate(batches):
        mask = batch.response_mask
        advantages = {lam: gae(batch.rewards, batch.values, mask, 1.0, lam)[0] for lam in lams}
        for rows in chunks(len(batch)):
            inputs = batch.select(rows).model_inputs()
            logprobs = actor_forward(module.actor, inputs, mask.shape[1], module.temperature)[0]
            for lam in lams:
                loss = -(advantages[lam][rows] * logprobs).sum() / mask.sum()
                parts = torch.autograd.grad(loss, parameters, retain_graph=lam != lams[-1])
                found[lam][number] += torch.cat([part.flatten() for part in parts])
    return found


def measure(module: Any, prompts: list[str], batch: int, lams: list[float], critic: dict[str, Any]) -> dict[str, Any]:
    """Quality of the gradient by ``lam``.

    Args:
        module: The LitPPO, at its start.
        prompts: The first ``critic["episodes"]`` are for the critic, the rest for gradients.
        batch: Responses of a gradient.
        lams: The last is 1, the truth.
        critic: ``episodes``, ``rate`` and ``passes``.
    """
    n = critic["episodes"]
    first = rolled_out(module, prompts[:n], "critic")
    batches = [rolled_out(module, prompts[i : i + batch], f"batch/{i}") for i in range(n, len(prompts), batch)]
    solver, explained, rows = LeastSquaresCritic(), {}, {}
    for experience in (first, *batches):
        experience.values = values_of(module, experience)
        experience.extras["critic_states"] = states_of(module, experience, solver.n_states)
    explained["start"] = _explained(batches)
    for experience in (first, *batches):
        solver.on_rewards(None, module, experience)  # type: ignore[arg-type]
    explained["least_squares"], least_squares = _explained(batches), gradients(module, batches, lams)
    train_critic(module, first, critic["rate"], critic["passes"])
    for experience in batches:
        experience.values = values_of(module, experience)
    explained["critic"], trained = _explained(batches), gradients(module, batches, lams)
    for name, found in (("critic", trained), ("least_squares", least_squares)):
        rows[name] = {str(lam): quality(gradient, trained[lams[-1]]) for lam, gradient in found.items()}
    return {"critic": critic, "r_squared": explained, "responses": batch, "batches": len(batches), "lam": rows}


def _explained(batches: list[Experience]) -> float:
    """R² of the values: 1 is perfect, 0 the mean score's, below 0 worse."""
    values = torch.cat([batch.values for batch in batches])  # type: ignore[misc]
    mask = torch.cat([batch.response_mask for batch in batches])
    scores = torch.cat([batch.scores for batch in batches])[:, None].expand_as(values)[mask]
    return float(1 - (scores - values[mask]).square().mean() / scores.var(correction=0))


def main() -> None:
    """Measure, store, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.gradients", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--critic_episodes", type=int, default=1024)
    parser.add_argument("--critic_passes", type=int, default=1)
    parser.add_argument("--aggregation", choices=["last", "mean"], default="mean", help="Of the reward model.")
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    models = asked.folder / MODELS
    module = LitPPO(
        str(models / "sft" / "model"),
        critic="reward",
        reference=None,
        kl_coef=0.0,
        rewards=make_scorer(asked.folder, "reward", asked.aggregation),
        generation={"max_new_tokens": asked.max_new_tokens},
        seed=7,
    )
    critic = {"episodes": asked.critic_episodes, "rate": 5e-4, "passes": asked.critic_passes}
    prompts = training_prompts(asked.data_root, critic["episodes"] + 128 * asked.batches)
    found = measure(module, prompts, 128, [0.0, 0.3, 0.5, 0.8, 0.95, 1.0], critic)
    facts = {"commit": commit(), "max_new_tokens": asked.max_new_tokens, "aggregation": asked.aggregation}
    file = asked.results / "gradients.json"
    file.write_text(json.dumps(facts | found, indent=1) + "\n")
    print(file.read_text())


if __name__ == "__main__":
    main()
