"""What actor and critic know of the advantages of tokens.

``python -m benchmarks.learning.token_advantages FOLDER --data_root DIR --actor MODEL --name NAME``

At places within responses to held-out prompts: other tokens that the policy could have chosen, and many continuations
behind each, whose mean score is the token's true value. Compared with it: the value by ``LeastSquaresCritic``, and the
log-ratio of the actor to the reference, which is proportional to the advantage in a policy at the limit. Advantages are
less the mean over the tokens of a place. The results of all actors are in one file.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learning.gradients import add_rewards
from benchmarks.learning.run import commit
from benchmarks.learning.task import MODELS, RESULTS, held_out_prompts, make_scorer, training_prompts
from lit_ppo import LitPPO
from lit_ppo.callbacks import LeastSquaresCritic
from lit_ppo.data.batch import PromptBatch
from lit_ppo.experience import Experience
from lit_ppo.generation.transformers import continuations

BATCH = 128  # responses of a rollout
PLACES = 5  # evenly spread over a response; each response has one
ROWS = 512  # continuations sampled together


def agreement(estimates: Tensor, samples: Tensor) -> dict[str, float]:
    r"""Correlation of estimated with true advantages, of which noisy samples are known; and the slope of truth.

    With the variance of the samples' means known, :math:`E[\hat A\, \bar A] / \sqrt{E[\hat A^2]\,
    (E[\bar A^2] - E[\mathrm{var}(\bar A)])}` has no bias from too few samples.

    Args:
        estimates: Of the tokens of each place.
        samples: K scores after each token.

    Shapes:
        (S, n), (S, n, K).
    """
    estimated, truth = (x - x.mean(1, keepdim=True) for x in (estimates, samples.mean(2)))
    noise = samples.var(2).mean() / samples.shape[2] * (1 - 1 / samples.shape[1])
    both, own = (estimated * truth).mean(), estimated.square().mean()
    variance = (truth.square().mean() - noise).clamp(min=1e-12)
    return {
        "correlation": float(both / (own * variance).sqrt().clamp(min=1e-12)),
        "slope": float(both / own.clamp(min=1e-12)),
        "deviation": float(variance.sqrt()),
    }


def correlation(x: Tensor, y: Tensor) -> float:
    """Over the tokens of all places, less the mean at each.

    Shapes:
        (S, n), (S, n).
    """
    x, y = (z - z.mean(1, keepdim=True) for z in (x, y))
    return float((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt().clamp(min=1e-12))


def train_critic(module: Any, prompts: list[str]) -> LeastSquaresCritic:
    """Least squares of the policy's returns on responses to these prompts, update by update."""
    solver = LeastSquaresCritic()
    module.n_critic_states = solver.n_states
    for start in range(0, len(prompts), BATCH):
        solve(module, solver, module.rollout(prompts[start : start + BATCH], samples_per_prompt=1))
    return solver


def solve(module: Any, solver: LeastSquaresCritic, experience: Experience) -> None:
    """One update of the regression."""
    add_rewards(module, experience)
    solver.on_rewards(None, module, experience)  # type: ignore[arg-type]


def scores_behind(module: Any, experience: Experience, place: int, samples: int) -> Tensor:
    """Scores of continuations behind the other tokens at a place of each response.

    Args:
        module: The LitPPO.
        experience: With other tokens, ``extras["action_ids"]``.
        place: Tokens before them.
        samples: Continuations behind each, K.

    Shapes:
        -> (B, n, K).
    """
    tokens = experience.extras["action_ids"][:, place, 1:].tolist()
    rows = zip(experience.prompts, experience.prompt_ids, experience.prompt_mask, experience.response_ids, strict=True)
    texts, prompts, begun = [], [], []
    for own, (text, ids, mask, response) in zip(tokens, rows, strict=True):
        for token in own:
            texts.append(text)
            prompts.append(ids[mask].tolist())
            begun.append([*response[:place].tolist(), token])
    generation, longest = module.generation, module.generation.max_new_tokens
    generation.max_new_tokens = longest - place - 1
    found, step = [], max(1, ROWS // samples)
    for start in range(0, len(prompts), step):
        some = slice(start, start + step)
        ids = [prompt + first for prompt, first in zip(prompts[some], begun[some], strict=True)]
        batch = PromptBatch(texts[some], ids, torch.arange(len(ids)), {})
        after = module.rollout(batch, samples_per_prompt=samples, logprobs=False, stream=f"behind/{place}/{start}")
        ends = [row[kept].tolist() for row, kept in zip(after.response_ids, after.response_mask, strict=True)]
        group = [start + int(number) for number in after.group]
        full = [begun[number] + end for number, end in zip(group, ends, strict=True)]
        responses = continuations(module.tokenizer, [prompts[number] for number in group], full, True)
        found.append(module.score(dataclasses.replace(after, responses=responses)).view(-1, samples))
    generation.max_new_tokens = longest
    return torch.cat(found).view(len(tokens), -1, samples)


def measure(module: Any, critic_prompts: list[str], prompts: list[str], n: int, samples: int) -> dict[str, Any]:
    """Correlations of what actor and critic say of tokens with the truth, and with each other.

    Args:
        module: The LitPPO: the actor, a critic that is the reward model, and the reference.
        critic_prompts: For the regression, with one response each.
        prompts: For the places.
        n: Other tokens at each place.
        samples: Continuations behind each.
    """
    solver = train_critic(module, critic_prompts)
    module.n_actions = n
    experience = module.rollout(prompts, samples_per_prompt=1)
    solve(module, solver, experience)
    extras, columns = experience.extras, experience.response_ids.shape[1]
    values = solver.values_after(extras["action_values"], extras["action_states"])
    ratios = (extras["action_logprobs"] - extras["action_ref_logprobs"])[..., 1:]
    truth, by_critic, by_actor = [], [], []
    for number in range(PLACES):
        place = (2 * number + 1) * columns // (2 * PLACES)
        mine = torch.arange(len(prompts)) % PLACES == number  # where nothing can follow a token, there is no value
        rows = (mine & extras["action_mask"][:, place].all(1)).nonzero().squeeze(1).tolist()
        if rows:
            truth.append(scores_behind(module, experience.select(rows), place, samples))
            by_critic.append(values[rows, place])
            by_actor.append(ratios[rows, place])
    scores, critic, actor = torch.cat(truth), torch.cat(by_critic), torch.cat(by_actor)
    return {
        "places": len(scores),
        "tokens": n,
        "continuations": samples,
        "critic_episodes": len(critic_prompts),
        "critic": agreement(critic, scores),
        "actor": agreement(actor, scores),
        "actor_with_critic": correlation(actor, critic),
    }


def main() -> None:
    """Measure one actor, store, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.token_advantages", description=__doc__)
    parser.add_argument("folder", type=Path, help="Of the checkpoints.")
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--actor", type=Path, required=True, help="Folder of the model, as lit-ppo fit exports it.")
    parser.add_argument("--name", required=True, help="In the results.")
    parser.add_argument("--critic", default="reward", help="Folder of the critic that least squares read.")
    parser.add_argument("--max_new_tokens", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=240, help="One place each.")
    parser.add_argument("--tokens", type=int, default=8, help="At each place.")
    parser.add_argument("--samples", type=int, default=32, help="Continuations behind each token.")
    parser.add_argument("--critic_episodes", type=int, default=4096)
    parser.add_argument("--results", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    module = LitPPO(
        str(asked.actor),
        critic=asked.critic,
        reference=str(asked.folder / MODELS / "sft" / "model"),
        rewards=make_scorer(asked.folder, "reward", "mean"),
        generation={"max_new_tokens": asked.max_new_tokens},
        seed=7,
    )
    prompts = training_prompts(asked.data_root, asked.critic_episodes), held_out_prompts(asked.data_root, asked.prompts)
    found = measure(module, *prompts, asked.tokens, asked.samples)
    file = asked.results / "token_advantages.json"
    stored = json.loads(file.read_text()) if file.exists() else {}
    stored[asked.name] = {"commit": commit(), "max_new_tokens": asked.max_new_tokens, **found}
    file.write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(stored[asked.name], indent=1))


if __name__ == "__main__":
    main()
