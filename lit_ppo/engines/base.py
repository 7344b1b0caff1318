"""The interface of what samples responses."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import GenerationConfig

Sampled = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]] | None]


class Engine(ABC):
    """Samples responses to training prompts; subclass it for a program of your own.

    The default is :class:`lit_ppo.TransformersEngine`, which samples with the actor itself. Before a rollout LitPPO
    calls :meth:`wake`, then :meth:`sync` if the weights have changed, then :meth:`generate` on every rank for its share
    of the prompts, then :meth:`sleep`. Log-probs, values and KL always come from the training
    forward; an engine's log-probs only measure how far its samples are from the policy.

    A ``ConnectionError`` means that the engine's program was lost: LitPPO calls :meth:`sync` again, which should wait
    for the program, and then :meth:`generate` for what is missing. Any other exception ends the run.
    """

    name: ClassVar[str] = "engine"  # on the progress line
    own_weights: ClassVar[bool] = True  # False: it samples with the actor itself, and there is nothing to sync
    every_rank: ClassVar[bool] = False  # False: only the first rank calls wake, sync and sleep
    adapter: bool = False  # True: sync gets the weights of a LoRA adapter alone, as peft names them
    overlaps: bool = False  # True: generate may run in a thread while the actor trains (LitPPO(rollout_ahead=1))
    ranks_per_copy: int = 1  # ranks that share a copy of the model, and get the same prompts

    def check(self, model: Any, config: GenerationConfig) -> None:  # noqa: B027  # nothing to check is the default
        """Check, before the first rollout, that the engine can sample for this model.

        Args:
            model: The actor's Hugging Face model.
            config: As for :meth:`generate`.
        """

    @abstractmethod
    def generate(
        self, prompt_ids: list[list[int]], n: int, config: GenerationConfig, seeds: list[int] | None
    ) -> Sampled:
        """Sample ``n`` responses to each prompt.

        Args:
            prompt_ids: Token ids of each prompt, without padding.
            n: Responses to each prompt.
            config: ``max_new_tokens``, ``temperature``, ``eos_token_id`` (one id or a list) and the user's fields.
            seeds: One for each response, prompt by prompt, below 2^63; None: greedy.

        Returns:
            Token ids of each response, prompt by prompt, with the stop token that ended it, and the log-probs of these
            tokens in the distribution that was sampled from; None where the actor itself sampled.
        """

    @abstractmethod
    def sync(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Take new weights.

        Args:
            weights: Name, as in a Hugging Face checkpoint, and tensor, one after another: keep none longer than needed.
        """

    def sleep(self) -> None:  # noqa: B027  # an engine on other devices has nothing to free
        """Free the memory that training needs; the weights may go, since :meth:`sync` brings new ones."""

    def wake(self) -> None:  # noqa: B027
        """Make ready for :meth:`sync` and :meth:`generate`."""
