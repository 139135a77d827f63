"""LASAR (arXiv 2605.10207) with its language-model head: making it from a backbone, its loss, and `recommend`."""

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import ModelOutput

from .base_lasar import (
    DepthPolicyHead,
    LasarModel,
    LasarPreTrainedModel,
    LatentInput,
    check_backbone,
)
from .batching_lasar import PrefixTrees, ReasoningState, check_token_tensor
from .catalog_lasar import SidCatalog
from .checkpoint_lasar import CheckpointMixin
from .configuration_lasar import (
    CONTROL_TOKENS,
    LATENT_INPUTS,
    LATENT_START_TOKEN,
    LasarConfig,
    check_sizes,
    sid_tokens,
)
from .decoding_lasar import RecommendOutput, beam_search, history_filter, mix_memory, rank_items
from .memory_lasar import ItemMemory, Recall
from .mode_lasar import ModeMixin
from .new_rows_lasar import add_embeddings
from .prompts_lasar import checked_prompts
from .static_lasar import StaticPasses
from .trie_lasar import ItemFilter


@dataclass
class LasarOutput(ModelOutput):
    """
    Output of [`LasarForGenerativeRec`]. The other fields are those of [`LasarModelOutput`].

    Args:
        loss (`torch.Tensor`, *optional*):
            Mean next-token cross-entropy over the vocabulary, when labels are given.
        logits (`torch.Tensor` of shape `(B, L, V)`):
            Next-token logits.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    latent_states: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None


class LasarForGenerativeRec(CheckpointMixin, ModeMixin, LasarPreTrainedModel, GenerationMixin):
    """
    LASAR with its language-model head: it reasons in hidden states, then writes the Semantic ID of an item.

    Args:
        config ([`LasarConfig`]):
            Configuration.

    Example:

    ```python
    >>> from lasar_hf import LasarForGenerativeRec, LasarProcessor

    >>> processor = LasarProcessor.from_pretrained("path/to/checkpoint")
    >>> model = LasarForGenerativeRec.from_pretrained("path/to/checkpoint")
    >>> output = model.recommend(**processor([["12", "40"]]), top_k=10)
    >>> processor.decode_recommendations(output)
    ```
    """

    def __init__(self, config: LasarConfig):
        super().__init__(config)
        self.model = LasarModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie_to_backbone()
        self.static_passes: StaticPasses | None = None  # set by compile_for_serving
        self.post_init()

    def _tie_to_backbone(self) -> None:
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self._no_split_modules = self.model._no_split_modules

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        num_sid_levels: int = 4,
        codebook_size: int = 256,
        max_latent_steps: int = 8,
        min_latent_steps: int = 1,
        **kwargs,
    ) -> "LasarForGenerativeRec":
        """
        Make a recommender from a causal language model: add the tokens, resize the embeddings, keep the weights.

        Args:
            backbone (`str` or [`~transformers.PreTrainedModel`]):
                Name or path of a causal language model, or the model itself, which is changed, not copied.
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer, to which the Semantic-ID and control tokens are added as special tokens.
            num_sid_levels, codebook_size, max_latent_steps, min_latent_steps (`int`, *optional*):
                As for [`LasarConfig`].
            kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained` when `backbone` is a name.

        Returns:
            [`LasarForGenerativeRec`]: the model. New embeddings are drawn around the mean of the old ones. New rows of
            the head of a pre-trained model are moved so that they have a probability of about 1e-5 in text that the
            model writes itself, and are nearly uniform among themselves.

        Raises:
            `ValueError`: if a number is out of range, the ids of the Semantic-ID tokens are not contiguous, the
            backbone is refused by [`LasarModel`], or its head has a bias or is followed by scaled or capped logits.
        """
        # 1. Refuse backbones that the recommender cannot use, or that a checkpoint could not reproduce.
        if isinstance(backbone, str):
            # `kwargs` may name the revision.
            backbone = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)  # nosec B615
        check_sizes(num_sid_levels, codebook_size, max_latent_steps)
        is_model = isinstance(backbone, PreTrainedModel) and not isinstance(backbone, LasarPreTrainedModel)
        if not is_model or backbone.get_output_embeddings() is None:
            raise ValueError(
                f"backbone is a {type(backbone).__name__}; expected a causal language model as loaded by "
                "AutoModelForCausalLM, with adapters merged."
            )
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "ZeRO-3 has sharded the backbone's weights, so no tokens can be added. Make the model inside "
                "lasar_hf.trainers.unsharded_weights()."
            )
        check_backbone(backbone.base_model)
        _check_plain_head(backbone)

        # 2. Register the tokens. Token ids are computed as `sid_token_offset + level * K + code`.
        num_old = len(tokenizer)
        tokens = sid_tokens(num_sid_levels, codebook_size)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [*CONTROL_TOKENS, *tokens]}, replace_extra_special_tokens=False
        )
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(
                "The ids of the tokenizer's Semantic-ID tokens are not contiguous. Start from the backbone's own "
                "tokenizer, or keep the numbers of levels and codes that this tokenizer was made with."
            )

        # 3. Resize, and put the backbone into the recommender.
        add_embeddings(backbone, num_old, len(tokenizer))
        if os.path.exists(backbone.config._name_or_path):
            backbone.config._name_or_path = ""  # it is saved with the configuration, and a local path is private
        start_id, latent_id, end_id = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
        config = LasarConfig(
            backbone_config=backbone.config,
            num_sid_levels=num_sid_levels,
            codebook_size=codebook_size,
            sid_token_offset=ids[0],
            max_latent_steps=max_latent_steps,
            min_latent_steps=min_latent_steps,
            latent_start_token_id=start_id,
            latent_token_id=latent_id,
            latent_end_token_id=end_id,
            dtype=backbone.dtype,
        )
        return cls._around(backbone, config)

    @classmethod
    def _around(cls, language_model: PreTrainedModel, config: LasarConfig) -> "LasarForGenerativeRec":
        with torch.device("meta"):
            model = cls(config)
        head = language_model.get_output_embeddings()
        base = model.model
        base.backbone, model.lm_head = language_model.base_model, head
        base.prepare_backbone()
        model._tie_to_backbone()
        policy_head = DepthPolicyHead(config.hidden_size, config.num_depths)
        policy_head.apply(model._init_weights)
        base.policy_head = policy_head.to(head.weight.device, head.weight.dtype)
        # A new generation config, since sampling defaults of the backbone would corrupt the beam search. The prompt
        # opens the latent region, so the model must not write its tokens.
        model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            temperature=1.0,
            top_p=1.0,
            typical_p=1.0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=config.backbone_config.pad_token_id,
            eos_token_id=config.backbone_config.eos_token_id,
            suppress_tokens=[config.latent_start_token_id, config.latent_token_id],
        )
        return model.train(language_model.training)

    @torch.no_grad()
    def set_sid_embeddings(self, codebooks: torch.Tensor, std: float = 0.05) -> None:
        """
        Initialise the Semantic-ID embeddings and head weights from the quantizer's codebooks, for backbones trained
        from scratch: codes with near centres start with near embeddings. Principal components project the centres to
        the hidden size.

        Args:
            codebooks (`torch.Tensor` of shape `(M, K, D)`):
                Centres of each level.
            std (`float`, *optional*, defaults to `0.05`):
                Standard deviation of the embeddings' entries.

        Raises:
            `ValueError`: if the codebooks are not `M` levels of `K` centres.
        """
        config = self.config
        if codebooks.shape[:2] != (config.num_sid_levels, config.codebook_size):
            raise ValueError(
                f"codebooks has shape {tuple(codebooks.shape)}; expected (M, K, D) with M={config.num_sid_levels} and "
                f"K={config.codebook_size}."
            )
        # 1. Principal components, at most H of them.
        left, scale, _ = torch.linalg.svd(codebooks.flatten(0, 1).float(), full_matrices=False)
        embeddings = (left * scale)[:, : config.hidden_size]
        embeddings = nn.functional.pad(embeddings, (0, config.hidden_size - embeddings.shape[1]))  # (M * K, H)
        # 2. A random rotation spreads them over all dimensions, which rotary positions and heads treat differently.
        embeddings = embeddings @ torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q
        embeddings = embeddings / embeddings.std() * std
        start = config.sid_token_id(0, 0)
        for weight in (self.get_input_embeddings().weight, self.lm_head.weight):
            weight[start : start + config.num_sid_tokens] = embeddings.to(weight.device, weight.dtype)

    @torch.no_grad()
    def set_latent_input(self, latent_input: str) -> None:
        """
        Change what a latent slot reads. New weights start on the scale of the embeddings, with steps that differ
        little.

        Args:
            latent_input (`str`):
                As for [`LasarConfig`].

        Raises:
            `ValueError`: if it is not `"raw"`, `"normalized"` or `"pause"`.
        """
        if latent_input == self.config.latent_input:
            return
        if latent_input not in LATENT_INPUTS:
            raise ValueError(f"latent_input is {latent_input!r}; expected one of {', '.join(LATENT_INPUTS)}.")
        if self.config.latent_input == "normalized":
            del self.model.latent_input
        self.config.latent_input = latent_input
        if latent_input == "normalized":
            embeddings = self.get_input_embeddings()
            weight = embeddings.weight
            # Gemma multiplies its weights by a constant.
            inputs = embeddings(torch.arange(len(weight), device=weight.device))  # (V, H)
            scale = float(inputs.float().square().mean().sqrt())
            module = LatentInput(self.config.hidden_size, self.config.max_latent_steps)
            nn.init.constant_(module.norm.weight, scale)
            nn.init.normal_(module.step.weight, std=0.1 * scale)
            self.model.latent_input = module.to(weight.device, weight.dtype)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> LasarOutput:
        r"""
        Other arguments as for [`LasarModel.forward`].

        Args:
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Tokens to predict, -100 at positions without loss.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to `0`):
                Number of last positions to score, or the positions themselves; 0 for all.

        Returns:
            [`LasarOutput`].
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)  # Trainer's number of labels of a whole step
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, self.config.vocab_size, num_items_in_batch)
        return LasarOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            latent_states=outputs.latent_states,
            latent_steps=outputs.latent_steps,
            depth_logits=outputs.depth_logits,
        )

    def generate(self, inputs: torch.Tensor | None = None, *args, **kwargs):
        r"""
        Write tokens after prompts, see [`~transformers.GenerationMixin.generate`], whose arguments these are.

        To get items use [`~LasarForGenerativeRec.recommend`]: `generate` neither chooses a depth nor adds latent
        slots, so those and `<|latent_end|>` are part of its prompts. It knows no catalogue either, unless
        `logits_processor` has a [`~decoding_lasar.SidLogitsProcessor`]. Prompts without `<|latent_start|>` are plain
        text, which continues as in the backbone.

        Raises:
            `ValueError`: if `<|latent_start|>` is not followed by latent slots or `<|latent_end|>`.
        """
        input_ids, config = kwargs.get("input_ids", inputs), self.config
        if input_ids is not None:
            following = nn.functional.pad(input_ids[:, 1:], (0, 1), value=-1)  # (B, L)
            has_region = (following == config.latent_token_id) | (following == config.latent_end_token_id)
            is_open = ((input_ids == config.latent_start_token_id) & ~has_region).any(dim=1)  # (B,)
            if is_open.any():
                raise ValueError(
                    f"Prompt {int(is_open.nonzero()[0])} has no latent slots after {LATENT_START_TOKEN}. Use "
                    "recommend to get items, or append the slots and <|latent_end|>."
                )
        return super().generate(inputs, *args, **kwargs)

    def init_continuous_batching(self, *args, **kwargs):
        """Refused: the packed sequences of `generate_batch` and `cache_implementation="paged"` cannot be read."""
        raise ValueError('generate_batch and cache_implementation="paged" are not supported. Use generate.')

    def encode_prompts(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        latent_steps: int | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
        static_num_beams: int | None = None,
    ) -> ReasoningState:
        """
        Read prompts and take their latent steps, for [`~decoding_lasar.beam_search`] and
        [`~decoding_lasar.sample_items`]. Arguments as for [`~LasarForGenerativeRec.recommend`]; `latent_steps` may
        also be a function from the policy head's logits `(B, C)` to the steps `(B,)`. With `static_num_beams`, the
        passes are those of [`~LasarForGenerativeRec.compile_for_serving`] for a search of at most that width, and the
        next call invalidates the returned state.
        """
        layout, latent_steps = checked_prompts(self.config, input_ids, attention_mask, latent_steps)
        static_cache = None
        if static_num_beams is not None:
            static_cache = self.static_passes.cache(self.model, len(input_ids), layout.max_prompt, static_num_beams)
        return self.model.run_latent_steps(*layout.prompts(), latent_steps, static_cache=static_cache)

    def encode_prompt_trees(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        latent_steps: int | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[ReasoningState, PrefixTrees]:
        """
        As [`~LasarForGenerativeRec.encode_prompts`], but prompts that are prefixes of one another are read once. In
        the returned trees, `path` `(B,)` is the index of each prompt in the state, and so in the results of the
        search, and `member` `(U,)` a prompt of each index.
        """
        layout, latent_steps = checked_prompts(self.config, input_ids, attention_mask, latent_steps)
        trees = PrefixTrees(layout, self.config.hidden_size, self.model.share_prefixes, join_equal=False)
        token_ids, visible = trees.prompts(layout)  # (T, P + R), (U, P + R)
        if not callable(latent_steps):
            latent_steps = latent_steps[trees.member]  # (U,)
        return self.model.run_latent_steps(token_ids, visible, latent_steps), trees

    def compile_for_serving(
        self,
        prompt_buckets: Sequence[int] = (128, 256, 512),
        batch_buckets: Sequence[int] = (1, 8, 64),
        num_beams: int = 50,
        mode: str | None = "reduce-overhead",
        **kwargs,
    ) -> None:
        """
        Let [`~LasarForGenerativeRec.recommend`] run the backbone in compiled passes of fixed shape. A request uses the
        next larger bucket; results do not change. A bucket compiles at most three graphs (prompts, latent slots,
        beams), at its first request, whatever the number of latent steps.

        Call it after the model was moved, cast and loaded. A bucket keeps keys and values for all its prompts, latent
        steps and beams on the device. Requests of several threads wait for one another, and CUDA graphs need all of
        them in one thread, as in `lasar serve`. Attention is `"sdpa"` or `"eager"`: a branch needs an explicit mask,
        which flash attention does not have and which flex attention only has as a block mask.

        Args:
            prompt_buckets (`list[int]`, *optional*, defaults to `(128, 256, 512)`):
                Prompt lengths in tokens. Longer prompts are refused.
            batch_buckets (`list[int]`, *optional*, defaults to `(1, 8, 64)`):
                Numbers of prompts of a request. Larger requests are refused.
            num_beams (`int`, *optional*, defaults to `50`):
                Largest width of the beam search.
            mode (`str`, *optional*, defaults to `"reduce-overhead"`):
                Mode of `torch.compile`; this one uses CUDA graphs on a GPU.
            kwargs:
                Other options of `torch.compile`, such as `backend` (then with `mode=None`).

        Raises:
            `ValueError`: if a number is below 1.

        Example:

        ```python
        >>> model = LasarForGenerativeRec.from_pretrained("path/to/checkpoint").to("cuda", torch.bfloat16)
        >>> model.compile_for_serving(prompt_buckets=[128, 256], batch_buckets=[1, 8])
        >>> model.recommend(**processor([["12", "40"]]).to("cuda"), catalog=processor.catalog, top_k=10)
        ```
        """
        self.static_passes = StaticPasses(prompt_buckets, batch_buckets, num_beams, mode=mode, **kwargs)

    def recommend(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        catalog: SidCatalog | None = None,
        top_k: int = 10,
        num_beams: int = 50,
        latent_steps: int | torch.Tensor | None = None,
        allow: Sequence[torch.Tensor | None] | None = None,
        deny: Sequence[torch.Tensor | None] | None = None,
        allow_empty: bool = False,
        memory: ItemMemory | None = None,
        exclude_history: bool | None = None,
    ) -> RecommendOutput:
        """
        Recommend items of a catalogue: latent steps, then beam search over the catalogue's Semantic IDs (LASAR, arXiv
        2605.10207, inference).

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts that end in `<|latent_start|>`.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                0 at padding, on either side.
            catalog ([`SidCatalog`], *optional*):
                Items to choose from. Defaults to those of the checkpoint, `model.catalog`.
            top_k (`int`, *optional*, defaults to `10`):
                Number of items per prompt, `k`.
            num_beams (`int`, *optional*, defaults to `50`):
                Width of the beam search; `top_k` if that is larger.
            latent_steps (`int` or `torch.Tensor` of shape `(B,)`, *optional*):
                Latent steps, 0 for direct generation. Defaults to the policy head's most likely number.
            allow (`list[torch.Tensor | None]` of length `B`, *optional*):
                Item indices that each prompt may get (a region, items in stock); `None` for all.
            deny (`list[torch.Tensor | None]` of length `B`, *optional*):
                Item indices that each prompt may not get (already bought). Neither list changes the scores, which are
                those of the whole catalogue.
            allow_empty (`bool`, *optional*, defaults to `False`):
                Whether `allow` and `deny` may leave a prompt without any item. Its result is then all padding.
            memory ([`ItemMemory`], *optional*):
                Mix the model's distribution with the memory of this catalogue. Candidates are the items of the beams
                and the same number of the memory's most likely items, and scores are log-probabilities of the mixture.
            exclude_history (`bool`, *optional*):
                Leave out the items of the prompt. Defaults to `config.exclude_history`; `True` for a model that was
                trained without it has the effect of `deny`.

        Returns:
            [`RecommendOutput`] with `items` `(B, k)`, `scores` `(B, k)` and `latent_steps` `(B,)`; with a `memory`
            also `model_scores` and `memory_scores` `(B, k)`.

        Raises:
            `ValueError`: if a prompt does not end in its only control token `<|latent_start|>`, has unknown token ids
            or padding between tokens, or is too long for the backbone, `latent_steps` is not `0 … max_latent_steps`,
            `catalog` is missing or does not match the model, `exclude_history` is `False` for a model that was trained
            with it, `top_k` or `num_beams` is not a whole number of at least
            1, the request is larger than the sizes of `compile_for_serving`, a list is invalid, a prompt may get no
            item, `memory` is that of another catalogue or used after `compile_for_serving`, or the logits contain NaN.
            `RuntimeError`: if another thread has the model in training mode.
        """
        catalog = self.catalog if catalog is None else catalog
        if catalog is None:
            raise ValueError("The model has no catalog. Pass catalog=SidCatalog(codes, item_ids).")
        if not isinstance(top_k, Integral) or not isinstance(num_beams, Integral) or top_k < 1 or num_beams < 1:
            raise ValueError(f"top_k is {top_k} and num_beams is {num_beams}; expected whole numbers of at least 1.")
        check_token_tensor(input_ids)
        catalog.check_matches(self.config.num_sid_levels, self.config.codebook_size)
        if memory is not None:
            memory.check_matches(catalog)
            if self.static_passes is not None:
                raise ValueError("memory is not supported after compile_for_serving. Leave one of them out.")
        if exclude_history is not None:
            self.config.check_exclusion(exclude_history)
        if exclude_history and not self.config.exclude_history:
            _, own = self._prompt_items(catalog, input_ids)  # (B, L)
            deny = [
                items[items >= 0] if denied is None else torch.cat([items[items >= 0], denied.to(items.device)])
                for items, denied in zip(own, [None] * len(own) if deny is None else deny, strict=True)
            ]
        item_filter = None
        if allow is not None or deny is not None:
            trie = catalog.trie(input_ids.device)
            item_filter = ItemFilter.from_lists(trie, len(input_ids), allow, deny, allow_empty)
        one_at_a_time = nullcontext() if self.static_passes is None else self.static_passes.lock
        with self.evaluation_mode(), one_at_a_time:
            width = max(num_beams, top_k)
            static_num_beams = None if self.static_passes is None else width
            state = self.encode_prompts(input_ids, attention_mask, latent_steps, static_num_beams)
            trie = catalog.trie(state.depths.device)
            history = history_filter(self.config, trie, input_ids)
            leaves, scores = beam_search(self, state, trie, width, item_filter, history)
            if memory is not None:
                recall = self._recall(memory, catalog, input_ids)
                return mix_memory(self, state, trie, leaves, scores, recall, top_k, item_filter, history)
        items, scores = rank_items(leaves, scores, trie, top_k, item_filter)
        return RecommendOutput(items=items, scores=scores, latent_steps=state.depths)

    def _prompt_items(self, catalog: SidCatalog, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The items of prompts, and those that can be excluded, both `(B, L)`; -1 pads. Items that share a Semantic ID
        are represented by the first of them, and not excluded.
        """
        every_item = catalog.trie_of_all(input_ids.device)
        leaves = every_item.leaves_in(input_ids - self.config.sid_token_offset, self.config.codebook_size)  # (B, L)
        sharing = every_item.items(leaves.clamp(min=0))  # (B, L, C)
        history = torch.where(leaves >= 0, sharing[..., 0], -1)
        return history, torch.where((sharing >= 0).sum(dim=-1) == 1, history, -1)

    def _recall(self, memory: ItemMemory, catalog: SidCatalog, input_ids: torch.Tensor) -> Recall:
        """The memory's distribution over the items that the trie has, given the items of the prompts."""
        trie = catalog.trie(input_ids.device)
        history, own = self._prompt_items(catalog, input_ids)
        excluded = own if self.config.exclude_history else None
        is_available = trie.item_positions[: len(memory)] < len(trie.item_indices)  # (I,)
        return memory.to(input_ids.device).recall(history, excluded, is_available)


@torch.no_grad()
def _check_plain_head(language_model: PreTrainedModel) -> None:
    """Refuse a head with a bias, and logits that are not the head's output: scaled, capped or masked ones."""
    head, name = language_model.get_output_embeddings(), type(language_model).__name__
    if head.bias is not None:
        raise ValueError(
            f"The head of {name} has a bias, which a checkpoint would lose. Use a backbone without one, such as Qwen3 "
            "or Llama."
        )
    # In one pass replace the head's output by a range that any cap would change, whatever the weights are.
    head_inputs, head_outputs = [], []

    def replace_output(module, inputs, output):
        head_inputs.append(inputs[0])
        head_outputs.append(torch.linspace(-1e3, 1e3, output.numel()).to(output).view_as(output))
        return head_outputs[0].clone()  # the model may change it in place

    was_training = language_model.training
    language_model.eval()
    hook = head.register_forward_hook(replace_output)
    ids = torch.arange(4, device=language_model.device)[None]
    try:
        hidden_states = language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        logits = language_model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
        language_model.train(was_training)
    is_plain = len(head_outputs) == 1  # a model may also compute its logits without calling its head
    if is_plain:
        tolerance = 1e-2 * float(hidden_states.abs().max())
        is_plain = torch.allclose(head_inputs[0].to(hidden_states), hidden_states, rtol=0, atol=tolerance)
        is_plain = is_plain and torch.equal(logits, head_outputs[0].to(logits))
    if not is_plain:
        raise ValueError(
            f"{name} scales, caps or masks its logits, or computes them without its head, which LASAR does not "
            "support. Use a backbone whose logits are a matrix times its last hidden states, such as Qwen3 or Llama."
        )


__all__ = ["LasarForGenerativeRec", "LasarModel", "LasarOutput", "LasarPreTrainedModel"]
