"""Configuration of LASAR: backbone, Semantic-ID vocabulary, latent steps, and the names of the tokens."""

import string

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


LATENT_START_TOKEN = "<|latent_start|>"
LATENT_TOKEN = "<|latent|>"
LATENT_END_TOKEN = "<|latent_end|>"
CONTROL_TOKENS = (LATENT_START_TOKEN, LATENT_TOKEN, LATENT_END_TOKEN)
LATENT_INPUTS = ("raw", "normalized", "pause")


def sid_token(level: int, code: int) -> str:
    """Token of a code, as in the `.index.json` files of other projects: `sid_token(1, 255)` is `<b_255>`."""
    return f"<{string.ascii_lowercase[level]}_{code}>"


def sid_tokens(num_sid_levels: int, codebook_size: int) -> list[str]:
    """All Semantic-ID tokens; level `l`, code `c` has the index `l * codebook_size + c`."""
    return [sid_token(level, code) for level in range(num_sid_levels) for code in range(codebook_size)]


def check_sizes(num_sid_levels: int, codebook_size: int, max_latent_steps: int) -> None:
    if not 1 <= num_sid_levels <= len(string.ascii_lowercase):
        raise ValueError(f"num_sid_levels is {num_sid_levels}; expected 1 to 26 (a to z).")
    if codebook_size < 1:
        raise ValueError(f"codebook_size is {codebook_size}; expected at least 1.")
    if max_latent_steps < 1:
        raise ValueError(f"max_latent_steps is {max_latent_steps}; expected at least 1.")


class LasarConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LasarForGenerativeRec`].

    Args:
        backbone_config (`dict` or [`~transformers.PreTrainedConfig`], *optional*):
            Configuration of the decoder-only backbone, Qwen3's defaults if not given.
        num_sid_levels (`int`, *optional*, defaults to `4`):
            Codes of one Semantic ID, `M`.
        codebook_size (`int`, *optional*, defaults to `256`):
            Codes per level, `K`.
        sid_token_offset (`int`, *optional*):
            Token id of level 0, code 0. Level `l`, code `c` has the id `sid_token_offset + l * K + c`.
        max_latent_steps (`int`, *optional*, defaults to `8`):
            Largest number of latent steps, `N_max`.
        min_latent_steps (`int`, *optional*, defaults to `1`):
            Smallest number that the policy head chooses, 0 or 1. Its class `k` means `k + min_latent_steps` steps.
        latent_start_token_id, latent_token_id, latent_end_token_id (`int`, *optional*):
            Ids of `<|latent_start|>`, the last token of a prompt, `<|latent|>`, the slot of one latent step, and
            `<|latent_end|>`, which closes the latent region.
        latent_input (`str`, *optional*, defaults to `"raw"`):
            Input of the t-th latent slot. `"raw"`: the state before it, `h_{t-1}`, as in the paper. `"normalized"`:
            `LayerNorm(h_{t-1} + h_0) + e_t` with a learned vector `e_t` for each step. `"pause"`: the embedding of
            `<|latent|>`, so that no state is fed back. This is a control with the same amount of computation.
        exclude_history (`bool`, *optional*, defaults to `False`):
            Whether the items of the prompt have no probability, in training, sampling and recommending. The code
            probabilities are then normalised over prefixes that lead to at least one other item. For data in which
            nobody takes an item twice.

    Example:

    ```python
    >>> from transformers import Qwen3Config
    >>> from lasar_hf import LasarConfig

    >>> config = LasarConfig(backbone_config=Qwen3Config(), sid_token_offset=151672)
    >>> config.sid_token_id(level=1, code=3)
    151931
    ```
    """

    model_type = "lasar"
    sub_configs_defaults = {"backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="qwen3")}

    backbone_config: dict | PreTrainedConfig | None = None
    num_sid_levels: int = 4
    codebook_size: int = 256
    sid_token_offset: int | None = None
    max_latent_steps: int = 8
    min_latent_steps: int = 1
    latent_start_token_id: int | None = None
    latent_token_id: int | None = None
    latent_end_token_id: int | None = None
    latent_input: str = "raw"
    exclude_history: bool = False

    def __post_init__(self, **kwargs):
        # The remote code of a checkpoint. `save_pretrained` would only write the entry of its own class.
        auto_map = {
            "AutoConfig": "configuration_lasar.LasarConfig",
            "AutoModel": "modeling_lasar.LasarForGenerativeRec",
            "AutoModelForCausalLM": "modeling_lasar.LasarForGenerativeRec",
        }
        self.auto_map = kwargs.pop("auto_map", None) or auto_map
        self.custom_pipelines = {
            "generative-recommendation": {
                "impl": "pipeline_lasar.GenerativeRecommendationPipeline", "pt": ["AutoModel"],
            }
        }  # fmt: skip
        kwargs.pop("custom_pipelines", None)
        # A backbone's configuration object keeps its implementations, which transformers would reset to the defaults.
        # That of the experts is only set where the experts are.
        experts = None
        if isinstance(self.backbone_config, PreTrainedConfig):
            kwargs.setdefault("attn_implementation", self.backbone_config._attn_implementation)
            experts = kwargs.get("experts_implementation") or self.backbone_config._experts_implementation
        super().__post_init__(**kwargs)
        if experts is not None:
            self.backbone_config._experts_implementation = experts
        check_sizes(self.num_sid_levels, self.codebook_size, self.max_latent_steps)
        if self.min_latent_steps not in (0, 1):
            raise ValueError(f"min_latent_steps is {self.min_latent_steps}; expected 0 or 1.")
        if self.latent_input not in LATENT_INPUTS:
            raise ValueError(f"latent_input is {self.latent_input!r}; expected one of {', '.join(LATENT_INPUTS)}.")
        self.tie_word_embeddings = self.backbone_config.tie_word_embeddings

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """The backbone's configuration, where transformers and TRL look for the vocabulary, sizes and layer types."""
        return self.backbone_config

    @property
    def hidden_size(self) -> int:
        """Width of the backbone's hidden states, `H`."""
        return self.backbone_config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Tokens of the backbone's embedding matrix, `V`."""
        return self.backbone_config.vocab_size

    @property
    def num_depths(self) -> int:
        """Number of classes of the policy head, `C`."""
        return self.max_latent_steps - self.min_latent_steps + 1

    @property
    def num_sid_tokens(self) -> int:
        """Number of Semantic-ID tokens, `M * K`."""
        return self.num_sid_levels * self.codebook_size

    def check_depth(self, name: str, depth: int | None) -> None:
        """Refuse, with a `ValueError`, a setting with more latent steps than the model takes; `None` is none."""
        if depth is not None and not 0 <= depth <= self.max_latent_steps:
            raise ValueError(
                f"{name} is {depth}; expected 0 to {self.max_latent_steps} latent steps, the model's max_latent_steps."
            )

    def check_exclusion(self, exclude_history: bool) -> None:
        """Refuse, with a `ValueError`, items of the history of a model that gives them no probability."""
        if self.exclude_history and not exclude_history:
            raise ValueError(
                "exclude_history is False, but the model was trained with exclude_history=True, so items of the "
                "history have no probability. Use True, or train with exclude_history=False."
            )

    def sid_token_id(self, level: int, code: int) -> int:
        """Token id of a code."""
        if not (0 <= level < self.num_sid_levels and 0 <= code < self.codebook_size):
            raise ValueError(
                f"Level {level}, code {code} is outside {self.num_sid_levels} levels of {self.codebook_size} codes."
            )
        return self.sid_token_offset + level * self.codebook_size + code


__all__ = ["LasarConfig"]
