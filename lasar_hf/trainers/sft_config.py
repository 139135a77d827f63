"""Arguments of [`LasarSFTTrainer`]."""

from dataclasses import dataclass, field

from transformers import TrainingArguments
from trl import SFTConfig

from ..arguments import check_choices
from .hub import check_hub_strategy
from .losses import DISTANCES
from .sharding import refuse_unused_search


@dataclass
class LasarSFTConfig(SFTConfig):
    r"""
    Configuration of [`LasarSFTTrainer`], for both stages. All other arguments are inherited from [`~trl.SFTConfig`].

    Args:
        sid_loss (`str`, *optional*, defaults to `"catalog"`):
            Normalisation of the cross-entropy at SID positions: over the codes that continue an item of the catalogue
            (`"catalog"`), or over the whole vocabulary as in the paper (`"vocab"`).
        alignment (`str`, *optional*, defaults to `"kl"`):
            Distance between latent states and semantic anchors: `"kl"` as in the paper, `"cosine"`, `"mse"`,
            `"item_kl"` or `"none"`. `"item_kl"` compares the distributions over the items that the states stand for,
            see [`~lasar_hf.trainers.item_embeddings`].
        alignment_weight (`float`, *optional*, defaults to `0.1`):
            Weight `α` of the alignment loss.
        anchors_at_any_depth (`bool`, *optional*, defaults to `False`):
            Allow examples whose number of latent steps is not their number of segments. A step then has the anchor at
            the same place in the chain of thought.
        depth_weights (`list[float]`, *optional*):
            Weights of the cross-entropy after 0, 1, 2, … latent steps. One chain of latent steps serves all depths of
            an example, whose own depth is that of its anchors and its policy label. Without it, an example is trained
            at its own depth only, as in the paper.
        neighbour_targets (`float`, *optional*, defaults to `0.0`):
            Probability that an item that other users took in its place replaces the target of an example, drawn
            afresh at each visit from its column `neighbours` (not in the paper). With `depth_weights`, the
            probability falls linearly to 0 at the deepest row: targets are broad at first and sharp at the end.
        policy_weight (`float`, *optional*, defaults to `0.0`):
            Weight `β` of the policy head's cross-entropy. At 0 (stage 1) the policy head is frozen.
        policy_label_smoothing (`float`, *optional*, defaults to `0.0`):
            Share of the policy's label that is spread over all depths (not in the paper). A policy that is certain
            has no gradient that reinforcement learning could start from.
        max_tokens_per_batch (`int`, *optional*):
            Fill the batches of each process with all samples of a user together, up to this many tokens, instead of
            `per_device_train_batch_size` random examples. The history of a user is read once for all samples, and a
            shared token counts once. Every example weighs the same, also if batches differ in size. Replaces
            `train_sampling_strategy`.
        license (`str`, *optional*):
            Licence of the checkpoint, such as `"apache-2.0"`, for its model card. Defaults to that of the checkpoint
            that the training began with. A card without a licence says so.
        dataset (`str`, *optional*):
            Name of the data set, for the model card. Defaults to the names of its files, if they are known.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`. Truncation would remove the answer at the end of an
    >   example; `max_history` of the processor limits the prompt instead.
    > - `router_aux_loss_coef`: Pinned to `0.0` instead of `None`. The latent loop returns no router loss.
    > - `ddp_find_unused_parameters`: Defaults to `False`, which `None` means too. `True` is refused: the search fails
    >   on the policy head.
    """

    max_length: int | None = field(default=None, metadata={"help": "Maximum length of an example."})
    sid_loss: str = field(
        default="catalog",
        metadata={"help": "Softmax over the catalogue or the vocabulary.", "choices": ["catalog", "vocab"]},
    )
    alignment: str = field(
        default="kl",
        metadata={"help": "Distance of latent states and anchors.", "choices": [*DISTANCES, "item_kl", "none"]},
    )
    alignment_weight: float = field(default=0.1, metadata={"help": "Weight of the alignment loss, alpha."})
    anchors_at_any_depth: bool = field(
        default=False, metadata={"help": "Latent steps of an example may differ from its segments."}
    )
    depth_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights of the cross-entropy after 0, 1, 2, … latent steps; unset: at one depth only."},
    )
    neighbour_targets: float = field(
        default=0.0, metadata={"help": "Probability that a neighbour replaces the target of an example."}
    )
    policy_weight: float = field(default=0.0, metadata={"help": "Policy loss weight, beta; 0 freezes the head."})
    policy_label_smoothing: float = field(
        default=0.0, metadata={"help": "Share of the policy's label that is spread over all depths."}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Batches of users with this many tokens; a shared prefix counts once."}
    )
    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "Keep it at 0."})
    license: str | None = field(default=None, metadata={"help": "Licence of the model, such as mit, for its card."})
    dataset: str | None = field(default=None, metadata={"help": "Name of the data set, for the model card."})
    hub_strategy: str = field(default="end", metadata={"help": "Keep it at end: the complete model is pushed."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Keep it at False."})

    __repr__ = TrainingArguments.__str__  # hides the tokens, which that of a dataclass shows

    def __post_init__(self):
        check_choices(self)
        if self.router_aux_loss_coef != 0:
            raise ValueError(
                f"router_aux_loss_coef is {self.router_aux_loss_coef}, but no router loss is added; expected 0."
            )
        if not 0 <= self.policy_label_smoothing < 1:
            raise ValueError(f"policy_label_smoothing is {self.policy_label_smoothing}; expected 0 to below 1.")
        if self.depth_weights is not None:
            self._check_depth_weights()
        if not 0 <= self.neighbour_targets <= 1:
            raise ValueError(f"neighbour_targets is {self.neighbour_targets}; expected a probability.")
        refuse_unused_search(self)
        super().__post_init__()
        check_hub_strategy(self)

    def _check_depth_weights(self):
        weights = self.depth_weights
        if not weights or min(weights) < 0 or sum(weights) == 0:
            raise ValueError(f"depth_weights is {weights}; expected weights of at least 0, not all of them 0.")
        if self.sid_loss != "catalog" or self.loss_type != "nll":
            raise ValueError(
                f'depth_weights needs sid_loss="catalog" and loss_type="nll"; they are {self.sid_loss!r} and '
                f"{self.loss_type!r}."
            )
