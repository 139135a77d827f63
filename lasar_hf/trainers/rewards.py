"""Rewards of the RL stage (METHOD.md 5), in the form TRL calls them: completions of a prompt follow each other."""

import math

from ..model.catalog_lasar import SidCatalog
from ..model.configuration_lasar import LasarConfig


class ExactMatchReward:
    """
    1 for a candidate that is the target item, 0 for any other.

    Special tokens vanish from decoded text, so the candidate is read from `completion_ids`.

    Args:
        catalog ([`SidCatalog`]):
            The items.
        config ([`LasarConfig`]):
            Configuration of the model, for the token ids.
    """

    __name__ = "exact_match"

    def __init__(self, catalog: SidCatalog, config: LasarConfig):
        offsets = [config.sid_token_id(level, 0) for level in range(config.num_sid_levels)]
        self.sid_ids = (catalog.codes + catalog.codes.new_tensor(offsets)).tolist()

    def __call__(self, completion_ids: list[list[int]], target: list[int], **kwargs) -> list[float]:
        """
        Args:
            completion_ids (`list[list[int]]`):
                Tokens of each candidate.
            target (`list[int]`):
                Row of the target item in the catalogue, for each candidate.

        Returns:
            `list[float]`: rewards.
        """
        outside = next((item for item in target if not 0 <= item < len(self.sid_ids)), None)
        if outside is not None:
            raise ValueError(f"target is {outside}, but the catalogue has the rows 0 … {len(self.sid_ids) - 1}.")
        return [
            float(list(ids) == self.sid_ids[item]) for ids, item in zip(completion_ids, target, strict=True)
        ]


class RankingReward(ExactMatchReward):
    """
    Penalty of the wrong candidates by their rank, in groups that hold the target.

    The `G` candidates of a group come in descending order of probability. When one of them is the target, a wrong one
    at rank `r` gets `−(1 / log2(r + 1)) / Σ_j (1 / log2(j + 1))`; a group without the target gets nothing.

    Args:
        catalog ([`SidCatalog`]):
            The items.
        config ([`LasarConfig`]):
            Configuration of the model, for the token ids.
        num_generations (`int`):
            Candidates a group, `G`.
    """

    __name__ = "ranking"

    def __init__(self, catalog: SidCatalog, config: LasarConfig, num_generations: int):
        super().__init__(catalog, config)
        weights = [1 / math.log2(rank + 1) for rank in range(1, num_generations + 1)]
        self.penalties = [-weight / sum(weights) for weight in weights]

    def __call__(self, completion_ids: list[list[int]], target: list[int], **kwargs) -> list[float]:
        """
        Args:
            completion_ids (`list[list[int]]`):
                Tokens of each candidate, group after group, each in descending order of probability.
            target (`list[int]`):
                Row of the target item in the catalogue, for each candidate.

        Returns:
            `list[float]`: penalties, 0 for the target.
        """
        hits = super().__call__(completion_ids, target)
        size = len(self.penalties)
        rewards = []
        for start in range(0, len(hits), size):
            group = hits[start : start + size]
            holds_target = any(group)
            pairs = zip(group, self.penalties, strict=True)
            rewards += [penalty if holds_target and not hit else 0.0 for hit, penalty in pairs]
        return rewards
