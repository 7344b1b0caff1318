"""Models, rollouts and scores: the half of LitPPO that fires no hooks and takes no steps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from time import monotonic, perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lit_ppo.experience import Experience, model_inputs
from lit_ppo.functional import KLEstimator, kl_estimate
from lit_ppo.models.actor_critic import Actor, Critic
from lit_ppo.models.lora import WithoutAdapter
from lit_ppo.parallel.ranks import Plan, deal, gather_shares, n_ranks, rank
from lit_ppo.parallel.sharding import gathered
from lit_ppo.ppo.sampling import Sampling
from lit_ppo.rewards import reward_models, scores_of, source_names
from lit_ppo.rewards.time_limit import time_limit


class Policy(Sampling):
    """Rollouts and scores over all ranks: a global batch goes in, a global batch comes out."""

    rewards: Callable[[Any], Tensor]
    eval_rewards: Callable[[Any], Tensor] | None
    kl_estimator: KLEstimator
    samples_per_prompt: int
    micro_batch_size: int | None
    micro_batch_tokens: int | None
    temperature: float
    sampling_difference: float | None  # of log-probs, sampling against training pass
    reward_timeout: float | None
    phase: str
    phase_since: float | None  # by time.monotonic
    seconds: dict[str, float]

    @torch.inference_mode(False)
    @torch.no_grad()
    def rollout(
        self,
        prompts: Any,
        *,
        samples_per_prompt: int | None = None,
        do_sample: bool = True,
        policy: Literal["actor", "reference"] = "actor",
        logprobs: bool = True,
        stream: str | None = None,
    ) -> Experience:
        """Sample responses; the same on every rank, however rows are dealt to them.

        Args:
            prompts: Strings, lists of chat messages, a ``PromptBatch``, or an ``Experience`` (the first row of
                each group).
            samples_per_prompt: The module's by default.
            do_sample: False is greedy.
            policy: Who writes.
            logprobs: Also compute log-probs, reference log-probs, KL and values.
            stream: Where the random numbers come from: None is the training stream, which moves on with each
                rollout; a name is a fixed stream of its own.

        Raises:
            ValueError: No prompts, or prompt plus new tokens beyond the model's positions.
        """
        self.configure_model()  # without a Trainer nobody else does
        batch = self._as_batch(prompts)
        experience = self._sample(batch, samples_per_prompt or self.samples_per_prompt, do_sample, policy, stream)
        if stream is None:
            self.rollouts += 1
        if logprobs:
            self.phase_detail = "log-probs"
            self._add_statistics(experience)
        self.phase_detail = ""
        return experience

    @torch.inference_mode(False)
    @torch.no_grad()
    def score(self, experience: Experience) -> Tensor:
        """Scores of the responses; with several sources each one's are left in ``extras`` under its name.

        Shapes:
            -> (B,) float32.
        """
        named = self.scores_by(self.rewards, experience)
        scores = named.pop("")
        experience.extras.update(named)
        return scores

    @torch.inference_mode(False)
    @torch.no_grad()
    def scores_by(self, source: Callable[[Any], Tensor], experience: Experience) -> dict[str, Tensor]:
        """Scores by any source, under the empty name; where it is of several, each one's under its own.

        Shapes:
            -> (B,) float32 each.
        """
        self.configure_model()
        plan = deal([1] * len(experience), n_ranks())
        rows = plan[rank()][0]

        def share() -> dict[str, Tensor]:
            if not rows:
                return {}
            mine = experience.select(rows)
            with time_limit(self.reward_timeout, f"rewards of {len(mine)} responses (reward_timeout)"):
                scores = scores_of(source, mine)
            return {"": scores.cpu(), **{name: mine.extras[name].cpu() for name in source_names(source)}}

        with ExitStack() as whole:
            for model in reward_models(source):
                whole.enter_context(gathered(model.model))
            parts = gather_shares(share)
        names = {name for part in parts for name in part}
        named = {name: torch.empty(len(experience), dtype=torch.float32, device=self.device) for name in names}
        for part, micro_batches in zip(parts, plan, strict=True):
            for name, values in part.items():
                named[name][micro_batches[0]] = values.to(self.device)
        return named

    def actor_forward(self, model: Actor | WithoutAdapter, rows: Experience, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The one training forward, on some rows: log-probs and entropy (or exact KL), (b, T)."""
        ids, mask, target_mask = model_inputs(rows)
        first, second = model(ids, mask, target_mask=target_mask, temperature=self.temperature, **kwargs)
        return _widen(first, rows), _widen(second, rows)

    def critic_forward(self, critic: Critic, rows: Experience) -> Tensor:
        """Values of some rows, (b, T)."""
        ids, mask, target_mask = model_inputs(rows)
        return _widen(critic(ids, mask, target_mask=target_mask), rows)

    def plan(self, lengths: Sequence[int]) -> Plan:
        """Rows dealt to ranks and micro-batches."""
        return deal(
            lengths, n_ranks(), micro_batch_size=self.micro_batch_size, micro_batch_tokens=self.micro_batch_tokens
        )

    @property
    def source_names(self) -> list[str]:
        """Names of the rewards where there are several; ``score`` leaves each one's in ``extras``."""
        return source_names(self.rewards)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the phase at work, and its seconds, which are an update's."""
        start = perf_counter()
        try:
            with self.at_work(phase):
                yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + perf_counter() - start

    @contextmanager
    def at_work(self, phase: str) -> Iterator[None]:
        """Note the phase at work, for the progress bar."""
        before = self.phase, self.phase_since
        self.phase, self.phase_since = phase, monotonic()
        try:
            yield
        finally:
            (self.phase, self.phase_since), self.phase_detail = before, ""

    def _add_statistics(self, experience: Experience) -> None:
        """Log-probs of actor and reference, KL and values, by the same forwards that training uses."""
        sampled = self._checked_logprobs(experience)

        def of_rows(rows: Experience) -> dict[str, Tensor]:
            computed = {}
            if sampled is None:
                computed["logprobs"] = self.actor_forward(self.actor, rows)[0]
            if self.reference is not None:
                computed["ref_logprobs"] = self.actor_forward(self.reference, rows)[0]
            if self.critic is not None:
                computed["values"] = self.critic_forward(self.critic, rows)
            return computed

        computed = self._map_rows(of_rows, experience)
        experience.logprobs = computed["logprobs"] if sampled is None else sampled
        experience.ref_logprobs = computed.get("ref_logprobs")
        experience.values = computed.get("values")
        if experience.ref_logprobs is None:
            experience.kl = torch.zeros_like(experience.logprobs)
        else:
            experience.kl = kl_estimate(experience.logprobs, experience.ref_logprobs, self.kl_estimator)

    def _checked_logprobs(self, experience: Experience) -> Tensor | None:
        """The sampling pass's log-probs, where the training pass gives the same on one micro-batch a rank."""
        sampled: Tensor | None = getattr(experience, "logprobs", None)
        if sampled is None or self.sampling_logprobs_tolerance is None:
            return None
        plan = self.plan([sum(both) for both in experience.lengths])
        rows = [row for micro_batches in plan for row in micro_batches[0]]
        trained = self._map_rows(
            lambda some: {"logprobs": self.actor_forward(self.actor, some)[0]}, experience.select(rows)
        )["logprobs"]
        self.sampling_difference = float((trained - sampled[rows]).abs().max())
        return sampled if self.sampling_difference <= self.sampling_logprobs_tolerance else None

    def _map_rows(
        self, function: Callable[[Experience], dict[str, Tensor]], experience: Experience
    ) -> dict[str, Tensor]:
        """Run over this rank's micro-batches and gather the rows of all; every rank runs as many forwards."""
        plan = self.plan([sum(both) for both in experience.lengths])

        def share() -> list[dict[str, Tensor]]:
            parts = [function(experience.select(rows or [0])) for rows in plan[rank()]]
            return [{name: value.float().cpu() for name, value in part.items()} for part in parts]

        gathered: dict[str, Tensor] = {}
        for micro_batches, parts in zip(plan, gather_shares(share), strict=True):
            for rows, part in zip(micro_batches, parts, strict=True):
                for name, value in part.items():
                    whole = gathered.setdefault(name, value.new_zeros(experience.response_ids.shape))
                    whole[rows] = value[: len(rows)]
        return {name: value.to(self.device) for name, value in gathered.items()}


def _widen(x: Tensor, rows: Experience) -> Tensor:
    """Back to the experience's T columns."""
    return pad(x, (0, rows.response_ids.shape[1] - x.shape[1]))
