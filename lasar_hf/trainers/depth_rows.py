"""An example at several depths, so that one chain of latent steps is trained to answer after each of them."""

from typing import Any


class DepthRows:
    """
    Rows of an example for the loss at several depths (not in the paper, which trains an example at one depth):

        L_CE = Σ_d w_d · L_CE(depth d) / Σ_d w_d

    The rows differ in their number of latent slots only. [`LasarModel`] reads their common prompt once and takes the
    latent steps of the deepest row; each answer leaves that chain after its own steps.

    Args:
        weights (`list[float]`):
            Weights `w_0, w_1, …` of the depths. Depths without a weight have no row, except for the depth that the
            example comes with, whose row has the anchors and the label of the policy. Without a weight, that row has
            no labels.
        latent_token_id (`int`):
            Id of `<|latent|>`.
        latent_end_token_id (`int`):
            Id of `<|latent_end|>`. Examples without it, such as plain text, are one row.
    """

    def __init__(self, weights: list[float], latent_token_id: int, latent_end_token_id: int):
        self.weights, self.latent_token_id, self.latent_end_token_id = weights, latent_token_id, latent_end_token_id

    def depths(self, input_ids: list[int]) -> list[int]:
        """Depths of the rows of an example."""
        if self.latent_end_token_id not in input_ids:
            return [0]
        weighted = {depth for depth, weight in enumerate(self.weights) if weight > 0}
        return sorted(weighted | {input_ids.count(self.latent_token_id)})

    def path_length(self, input_ids: list[int], start_token_id: int) -> int:
        """Tokens from `<|latent_start|>` on that the model reads for all rows of an example."""
        if start_token_id not in input_ids:
            return 1
        rest = len(input_ids) - input_ids.index(start_token_id) - 1
        depths, own = self.depths(input_ids), input_ids.count(self.latent_token_id)
        return 1 + max(depths) + len(depths) * (rest - own)

    def expand(self, example: dict[str, Any]) -> list[dict[str, Any]]:
        """
        The rows of an example with `input_ids` and `labels`. `loss_weight` is the share of a row in the loss, which
        sums to 1: an example weighs the same with any number of rows. `is_own` marks the row of the depth that the
        example comes with, and `neighbour_share` falls from 1 at depth 0 to 0 at the deepest row.
        """
        ids, labels = list(example["input_ids"]), list(example["labels"])
        if self.latent_end_token_id not in ids:
            return [example | {"loss_weight": 1.0, "is_own": True, "neighbour_share": 1.0}]
        depths, own, end = self.depths(ids), ids.count(self.latent_token_id), ids.index(self.latent_end_token_id)
        total, rows = sum(self.weights), []
        for depth in depths:
            weight = self.weights[depth] if depth < len(self.weights) else 0.0
            row_labels = [*labels[: end - own], *[-100] * depth, *labels[end:]]
            row = {
                "input_ids": [*ids[: end - own], *[self.latent_token_id] * depth, *ids[end:]],
                "labels": row_labels if weight > 0 else [-100] * len(row_labels),
                "loss_weight": weight / total, "is_own": depth == own,
                "neighbour_share": 1 - depth / max(depths[-1], 1),
            }  # fmt: skip
            rows.append(example | row)
        return rows
