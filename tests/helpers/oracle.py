"""PPO once more, slowly: stock models, one unpadded row at a time, loops over tokens, float64 outside the models."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM


class Oracle:
    """Replays updates from recorded rows; shares no code with the package.

    Args:
        path: The actor's folder; reference and critic start from it too.
        settings: ``kl_coef, clip_range, temperature, reduction, lr, gamma, lam``.
    """

    def __init__(self, path: Path, **settings: Any) -> None:
        self.__dict__.update(settings)
        self.actor = AutoModelForCausalLM.from_pretrained(path).double().eval()
        self.reference = AutoModelForCausalLM.from_pretrained(path).double().eval()
        self.backbone = AutoModel.from_pretrained(path).double().eval()
        self.head = torch.nn.Linear(self.backbone.config.hidden_size, 1).double()
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def logprobs(self, model: Any, prompt: list[int], response: list[int]) -> Tensor:
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0] / self.temperature
        table = torch.log_softmax(logits, dim=-1)
        return torch.stack([table[len(prompt) + t - 1, token] for t, token in enumerate(response)])

    def values(self, prompt: list[int], response: list[int]) -> Tensor:
        states = self.backbone(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
        return self.head(states).squeeze(-1)[len(prompt) - 1 : -1]

    @torch.no_grad()
    def look(self, rows: list[tuple[list[int], list[int]]], scores: list[float]) -> list[dict[str, Any]]:
        """Old log-probs, KL, rewards, advantages and returns of each row."""
        seen = []
        for (prompt, response), score in zip(rows, scores, strict=True):
            old = self.logprobs(self.actor, prompt, response)
            kl = old - self.logprobs(self.reference, prompt, response)
            values = self.values(prompt, response)
            rewards = [-self.kl_coef * float(k) for k in kl]
            rewards[-1] += score
            advantages, after, carried = [0.0] * len(response), 0.0, 0.0
            for t in range(len(response) - 1, -1, -1):
                carried = rewards[t] + self.gamma * after - float(values[t]) + self.gamma * self.lam * carried
                advantages[t], after = carried, float(values[t])
            returns = [a + float(v) for a, v in zip(advantages, values, strict=True)]
            seen.append({"old": old, "kl": kl, "advantages": advantages, "returns": returns, "rewards": rewards})
        return seen

    def step(self, rows: list[tuple[list[int], list[int]]], seen: list[dict[str, Any]]) -> dict[str, float]:
        """One optimizer step of plain gradient descent; returns what should be logged of it."""
        policy, value, stats = [], [], {"ratio": [], "approx_kl": [], "clip_fraction": []}
        for (prompt, response), row in zip(rows, seen, strict=True):
            new, values = self.logprobs(self.actor, prompt, response), self.values(prompt, response)
            losses = []
            for t, advantage in enumerate(row["advantages"]):
                ratio = torch.exp(new[t] - row["old"][t])
                below, above = clip if isinstance(clip := self.clip_range, tuple) else (clip, clip)
                low, high = 1 - below, 1 + above
                losses.append(-min(ratio * advantage, ratio.clamp(low, high) * advantage, key=Tensor.item))
                stats["ratio"].append(ratio.item())
                stats["approx_kl"].append(ratio.item() - 1 - math.log(ratio.item()))
                stats["clip_fraction"].append(float(not low <= ratio.item() <= high))
            policy.append(torch.stack(losses))
            value.append(0.5 * (values - torch.tensor(row["returns"], dtype=torch.float64)) ** 2)
        policy_loss, value_loss = self.reduce(policy), self.reduce(value)
        norms = {}
        for name, loss, models in (
            ("actor", policy_loss, [self.actor]),
            ("critic", value_loss, [self.backbone, self.head]),
        ):
            parameters = [p for model in models for p in model.parameters()]
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            norms[f"{name}_grad_norm"] = math.sqrt(sum(float((g**2).sum()) for g in grads if g is not None))
            with torch.no_grad():
                for parameter, grad in zip(parameters, grads, strict=True):
                    if grad is not None:
                        parameter -= self.lr * grad
        means = {name: sum(values) / len(values) for name, values in stats.items()}
        means |= {"ratio_min": min(stats["ratio"]), "ratio_max": max(stats["ratio"])}
        return {"policy_loss": policy_loss.item(), "value_loss": value_loss.item(), **means, **norms}

    def reduce(self, rows: list[Tensor]) -> Tensor:
        if self.reduction == "token_mean":
            return torch.cat(rows).mean()
        if self.reduction == "sequence_mean":
            return torch.stack([row.mean() for row in rows]).mean()
        return torch.cat(rows).sum() / (len(rows) * self.reduction)
