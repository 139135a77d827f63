"""Rewards of the RL stage. A reward is any `f(completion_ids, target, **kwargs) -> list[float]`, as in TRL.

`completion_ids` are the token ids of each candidate, `target` the index of its prompt's target item in the catalogue.
The candidates of a prompt follow each other in descending order of probability. `kwargs` has the columns of the
training examples and `items`, the index of each candidate in the catalogue.
"""

import math
from collections.abc import Callable
from itertools import accumulate

from ..arguments import import_dotted
from ..model.catalog_lasar import SidCatalog
from ..model.configuration_lasar import LasarConfig


class ExactMatchReward:
    """
    1 for a candidate that is the target item, 0 for any other.

    Candidates are read from `completion_ids`, since decoded text leaves out special tokens.

    Args:
        catalog, config ([`SidCatalog`] and [`LasarConfig`]):
            The items, and the configuration of the model for the token ids.
    """

    __name__ = "exact_match"

    def __init__(self, catalog: SidCatalog, config: LasarConfig):
        offsets = [config.sid_token_id(level, 0) for level in range(config.num_sid_levels)]
        self.answer_ids = (catalog.codes + catalog.codes.new_tensor(offsets)).tolist()

    def __call__(self, completion_ids: list[list[int]], target: list[int], **kwargs) -> list[float]:
        num_items = len(self.answer_ids)
        invalid = [item for item in target if not 0 <= item < num_items]
        if invalid:
            raise ValueError(f"target is {invalid[0]}; expected an index of the catalogue, 0 to {num_items - 1}.")
        pairs = zip(completion_ids, target, strict=True)
        return [float(list(token_ids) == self.answer_ids[item]) for token_ids, item in pairs]


class RankingReward(ExactMatchReward):
    """
    Penalty for wrong candidates by their rank, in groups that contain the target.

    If one of a group's `G` candidates is the target, a wrong one at rank `r` gets
    `−(1 / log2(r + 1)) / Σ_j (1 / log2(j + 1))`; all others get 0. LASAR, arXiv 2605.10207, RL stage. Use it together
    with [`ExactMatchReward`], which rewards the target.

    Args:
        catalog, config, num_generations:
            As for [`ExactMatchReward`], and the number of candidates per group, `G` (`int`).

    Example:

    ```python
    >>> completion_ids, target = processor.answer_ids([4, 7, 2]), [7, 7, 7]
    >>> ExactMatchReward(catalog, model.config)(completion_ids, target)
    [0.0, 1.0, 0.0]
    >>> RankingReward(catalog, model.config, num_generations=3)(completion_ids, target)
    [-0.46927872602275644, 0.0, -0.23463936301137822]
    ```
    """

    __name__ = "ranking"

    def __init__(self, catalog: SidCatalog, config: LasarConfig, num_generations: int):
        super().__init__(catalog, config)
        weights = [1 / math.log2(rank + 1) for rank in range(1, num_generations + 1)]
        self.penalties = [-weight / sum(weights) for weight in weights]

    def __call__(self, completion_ids: list[list[int]], target: list[int], **kwargs) -> list[float]:
        hits = super().__call__(completion_ids, target)
        group_size = len(self.penalties)
        rewards = []
        for start in range(0, len(hits), group_size):
            group = hits[start : start + group_size]
            pairs = zip(group, self.penalties, strict=True)
            rewards += [penalty if any(group) and not hit else 0.0 for hit, penalty in pairs]
        return rewards


class PrefixReward(ExactMatchReward):
    """
    Credit for the leading codes of a wrong candidate that agree with the target's: `0.2 · (agreeing codes) / M` (not
    in the paper). The target itself gets 0, since [`ExactMatchReward`] rewards it.

    Args:
        catalog, config:
            As for [`ExactMatchReward`].
    """

    __name__ = "prefix"
    scale = 0.2  # so that no prefix is worth as much as the target

    def __call__(self, completion_ids: list[list[int]], target: list[int], **kwargs) -> list[float]:
        hits = super().__call__(completion_ids, target)
        rewards = []
        for token_ids, item, hit in zip(completion_ids, target, hits, strict=True):
            answer = self.answer_ids[item]
            agreeing = list(accumulate((a == b for a, b in zip(token_ids, answer, strict=True)), min))
            rewards.append(0.0 if hit else self.scale * sum(agreeing) / len(answer))
        return rewards


def load_rewards(
    names: list[str], catalog: SidCatalog, config: LasarConfig, num_generations: int
) -> list[Callable[..., list[float]]]:
    """
    Reward functions by name, as a recipe lists them.

    Args:
        names (`list[str]`):
            `"exact_match"`, `"ranking"`, `"prefix"`, or the dotted path of a function such as
            `"my_rewards.half_match"`; the current directory is searched too.
        catalog, config, num_generations:
            As for [`RankingReward`].
    """
    built_in: dict[str, Callable[..., list[float]]] = {
        "exact_match": ExactMatchReward(catalog, config), "prefix": PrefixReward(catalog, config),
        "ranking": RankingReward(catalog, config, num_generations),
    }  # fmt: skip
    rewards: list[Callable[..., list[float]]] = []
    for name in names:
        if name in built_in:
            rewards.append(built_in[name])
            continue
        try:
            rewards.append(import_dotted(name))
        except ValueError as error:
            raise ValueError(
                f"Unknown reward {name!r}; expected {', '.join(built_in)}, or the dotted path of a function. {error}"
            ) from error
    return rewards
