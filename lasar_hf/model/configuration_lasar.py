"""Configuration of LASAR: backbone, Semantic-ID vocabulary, latent steps, and the names of the tokens."""

import string
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


LATENT_START_TOKEN = "<|latent_start|>"
LATENT_TOKEN = "<|latent|>"
LATENT_END_TOKEN = "<|latent_end|>"
CONTROL_TOKENS = (LATENT_START_TOKEN, LATENT_TOKEN, LATENT_END_TOKEN)
# Fields of the configuration with the first id of some tokens, and how many these are; None for the Semantic IDs.
TOKEN_IDS = {
    "sid_token_offset": None, "latent_start_token_id": 1, "latent_token_id": 1, "latent_end_token_id": 1,
}  # fmt: skip
LATENT_INPUTS = ("raw", "normalized", "pause")


def sid_token(level: int, code: int) -> str:
    """Token of a code, as in the `.index.json` files of other projects: `sid_token(1, 255)` is `<b_255>`."""
    return f"<{string.ascii_lowercase[level]}_{code}>"


def sid_tokens(num_sid_levels: int, codebook_size: int) -> list[str]:
    """All Semantic-ID tokens; level `l`, code `c` has the index `l * codebook_size + c`."""
    return [sid_token(level, code) for level in range(num_sid_levels) for code in range(codebook_size)]


def is_integer(value: Any) -> bool:
    """Whether a field read from JSON is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    """Refuse, with a `ValueError`, what is no whole number from `low` to `high`."""
    if not is_integer(value) or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} is {value!r}; expected a whole number {limits}.")


def check_sizes(num_sid_levels: int, codebook_size: int, max_latent_steps: int) -> None:
    check_integer("num_sid_levels", num_sid_levels, 1, len(string.ascii_lowercase))  # a to z
    check_integer("codebook_size", codebook_size, 1)
    check_integer("max_latent_steps", max_latent_steps, 1)


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

    Raises:
        `ValueError`: if a value has another type or is out of range, token ids overlap or exceed the vocabulary, or
        an argument is unknown and looks like a misspelt one.

    Example:

    ```python
    >>> from transformers import Qwen3Config
    >>> from lasar_hf import LasarConfig

    >>> config = LasarConfig(backbone_config=Qwen3Config(vocab_size=152960), sid_token_offset=151672)
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
        self._check_names(kwargs)
        super().__post_init__(**kwargs)
        if experts is not None:
            self.backbone_config._experts_implementation = experts
        self._check_values()
        self.tie_word_embeddings = self.backbone_config.tie_word_embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """As [`~transformers.PreTrainedConfig.from_pretrained`]; an invalid value is a `ValueError`."""
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (ValueError, TypeError, AttributeError, RecursionError, StrictDataclassError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"config.json of {pretrained_model_name_or_path} is invalid: {reason}") from error

    def _check_names(self, unknown: dict) -> None:
        """Refuse misspelt fields, which would be kept without effect. transformers keeps any other name."""
        for name in unknown:
            meant = get_close_matches(name, LasarConfig.__annotations__, n=1, cutoff=0.85)
            if meant:
                raise ValueError(f"LasarConfig has no {name}. Did you mean {meant[0]}?")

    def _check_values(self) -> None:
        check_sizes(self.num_sid_levels, self.codebook_size, self.max_latent_steps)
        check_integer("min_latent_steps", self.min_latent_steps, 0, 1)
        if self.latent_input not in LATENT_INPUTS:
            raise ValueError(f"latent_input is {self.latent_input!r}; expected one of {', '.join(LATENT_INPUTS)}.")
        if not isinstance(self.exclude_history, bool):
            raise ValueError(f"exclude_history is {self.exclude_history!r}; expected True or False.")
        used: dict[str, range] = {}
        for name, size in TOKEN_IDS.items():
            first = getattr(self, name)
            if first is None:  # not known yet
                continue
            size = size or self.num_sid_tokens
            if not is_integer(first) or not 0 <= first <= self.vocab_size - size:
                raise ValueError(
                    f"{name} is {first!r} for {size} token ids; expected ids in the vocabulary of {self.vocab_size}."
                )
            for other, ids in used.items():
                if first < ids.stop and ids.start < first + size:
                    raise ValueError(f"{name} is {first}, which is also a token of {other}; expected other ids.")
            used[name] = range(first, first + size)

    def check_token_ids(self) -> None:
        """Refuse, with a `ValueError`, a configuration that does not know the ids of its tokens."""
        for name in TOKEN_IDS:
            if getattr(self, name) is None:
                raise ValueError(
                    f"{name} is not set in the configuration (config.json); expected the id in the tokenizer."
                )

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
        """Raise `ValueError` if a setting has more latent steps than the model takes. `None` is accepted."""
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
