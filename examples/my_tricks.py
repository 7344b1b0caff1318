"""Tricks of your own: callbacks that change what an update has computed."""

# --8<-- [start:short]
from lit_ppo.callbacks import PPOCallback


class ShortAnswers(PPOCallback):
    """Subtracts ``coef`` from the score for every token of the response."""

    def __init__(self, coef: float = 0.01) -> None:
        self.coef = coef

    def on_scores(self, trainer, pl_module, experience):
        experience.scores = experience.scores - self.coef * experience.response_mask.sum(dim=1)


# --8<-- [end:short]
# --8<-- [start:state]
class MovingBaseline(PPOCallback):
    """Subtracts a moving average of earlier scores from the scores of the update."""

    reads = ("scores",)

    def __init__(self, decay: float = 0.9) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"MovingBaseline(decay={decay!r}): must be at least 0 and below 1")
        self.decay = decay
        self.mean = None

    def on_scores(self, trainer, pl_module, experience):
        now = float(experience.scores.mean())
        baseline = now if self.mean is None else self.mean
        experience.scores = experience.scores - baseline
        self.mean = self.decay * baseline + (1 - self.decay) * now
        pl_module.log("reward/moving_baseline", baseline)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state_dict):
        self.mean = state_dict["mean"]


# --8<-- [end:state]
