from lit_ppo import LitPPO


class BestHalf(LitPPO):
    """Learns from the better half of the responses."""

    def collect(self, prompts):
        experience = super().collect(prompts)
        best = experience.scores.argsort(descending=True)[: len(experience) // 2]
        return experience.select(best)
