"""Arguments of a recipe's model: which one, loaded how, trained whole or with LoRA."""

from dataclasses import dataclass, field
from typing import Any

from ..arguments import check_choices


@dataclass
class LasarModelConfig:
    r"""
    What LASAR supports of [`~trl.ModelConfig`], under the same names. Quantised weights are not among it: a recipe
    refuses `load_in_4bit` as an unknown key instead of ignoring it.

    Args:
        model_name_or_path (`str`, *optional*):
            Name or path of the backbone (stage 1) or of the checkpoint of the stage before.
        model_revision (`str`, *optional*, defaults to `"main"`):
            Branch, tag or commit on the Hub.
        dtype (`str`, *optional*, defaults to `"float32"`):
            Data type of the weights: `"auto"`, `"bfloat16"`, `"float16"` or `"float32"`. Mixed precision (`bf16`)
            keeps float32 weights.
        attn_implementation (`str`, *optional*):
            `"sdpa"` or `"eager"`; transformers' choice if not given.
        use_peft (`bool`, *optional*, defaults to `False`):
            Whether to train with LoRA, see [`lasar_lora_config`].
        lora_r (`int`, *optional*, defaults to `16`):
            Rank of the adapters.
        lora_alpha (`int`, *optional*, defaults to `32`):
            Adapters are scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.05`):
            Dropout before the adapters.
        lora_target_modules (`list[str]`, *optional*):
            Names of the backbone's linear layers to adapt, all if not given.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Whether to scale by `lora_alpha / sqrt(lora_r)` instead.
        use_dora (`bool`, *optional*, defaults to `False`):
            Whether to adapt magnitude and direction apart (DoRA).
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Backbone, or the stage before."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    dtype: str = field(
        default="float32",
        metadata={"help": "Data type of the weights.", "choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "How to compute attention.", "choices": ["sdpa", "eager"]}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train with LoRA."})
    lora_r: int = field(default=16, metadata={"help": "LoRA: rank."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA: adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "LoRA: dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "LoRA: names of the backbone's linear layers; all if not given."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "LoRA: scale by lora_alpha / sqrt(lora_r)."})
    use_dora: bool = field(default=False, metadata={"help": "LoRA: adapt magnitude and direction apart."})

    def __post_init__(self):
        check_choices(self)

    @property
    def init_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` gets beside the name, for `model_init_kwargs` of a trainer too."""
        return {"revision": self.model_revision, **self.from_config_kwargs}

    @property
    def from_config_kwargs(self) -> dict[str, Any]:
        """What `from_config` gets, for a backbone that is trained from scratch."""
        return {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
