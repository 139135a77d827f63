"""Arguments of a recipe's model."""

from dataclasses import dataclass, field, fields
from typing import Any

from trl import ModelConfig

from ..arguments import check_choices


# Fields of TRL that have to keep their defaults.
UNSUPPORTED = (
    "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage",
    "lora_modules_to_save", "lora_target_parameters", "lora_task_type",
)  # fmt: skip


@dataclass
class LasarModelConfig(ModelConfig):
    r"""
    Arguments of the model and its LoRA. The only change w.r.t. [`~trl.ModelConfig`] is that quantised weights, other
    attention than `"sdpa"` and `"eager"`, and the LoRA fields that [`lasar_lora_config`] sets itself are refused;
    everything else is inherited.
    """

    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation.", "choices": ["sdpa", "eager"]}
    )

    def __post_init__(self):
        check_choices(self)
        changed = [f.name for f in fields(self) if f.name in UNSUPPORTED and getattr(self, f.name) != f.default]
        if changed:
            raise ValueError(
                f"{', '.join(changed)} is not supported: weights are not quantised, and LoRA always trains the token "
                "rows and the policy head. Leave it out."
            )
        super().__post_init__()

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """Arguments of `from_pretrained`, and `model_init_kwargs` of a trainer."""
        return {"revision": self.model_revision, "dtype": self.dtype, "attn_implementation": self.attn_implementation}
