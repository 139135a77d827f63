"""Arguments of [`LasarSFTTrainer`]."""

from dataclasses import dataclass, field

from trl import SFTConfig

from ..arguments import check_choices


@dataclass
class LasarSFTConfig(SFTConfig):
    r"""
    Configuration of [`LasarSFTTrainer`], both stages. What is not listed is inherited from [`~trl.SFTConfig`].

    Args:
        sid_loss (`str`, *optional*, defaults to `"catalog"`):
            Normalisation of the cross-entropy at SID positions: over the codes that continue some item of the
            catalogue (`"catalog"`), or over the whole vocabulary as in the paper (`"vocab"`).
        alignment (`str`, *optional*, defaults to `"kl"`):
            Distance between latent states and semantic anchors: `"kl"`, `"cosine"`, `"mse"` or `"none"`.
        alignment_weight (`float`, *optional*, defaults to `0.1`):
            Weight `α` of the alignment loss. It acts on rows that have latent slots.
        policy_weight (`float`, *optional*, defaults to `0.0`):
            Weight `β` of the depth policy's cross-entropy. At 0 (stage 1) the policy head is frozen.

    > [!NOTE]
    > These parameters have default values different from [`~trl.SFTConfig`]:
    > - `max_length`: Defaults to `None` instead of `1024`: cutting a row would cut off its answer. Prompts are limited
    >   by the number of items they show.
    """

    max_length: int | None = field(
        default=None, metadata={"help": "Maximum length of a row. Cutting a row cuts off its answer."}
    )
    sid_loss: str = field(
        default="catalog",
        metadata={
            "help": "Normalisation at SID positions: over the catalogue's continuations or over the vocabulary.",
            "choices": ["catalog", "vocab"],
        },
    )
    alignment: str = field(
        default="kl",
        metadata={
            "help": "Distance between latent states and semantic anchors.", "choices": ["kl", "cosine", "mse", "none"]
        },
    )
    alignment_weight: float = field(default=0.1, metadata={"help": "Weight of the alignment loss, alpha."})
    policy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the depth policy's cross-entropy, beta; 0 freezes the policy head."}
    )

    def __post_init__(self):
        check_choices(self)
        super().__post_init__()
