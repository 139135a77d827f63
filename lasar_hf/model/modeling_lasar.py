"""LASAR: a decoder-only language model that reasons in hidden states before it writes a Semantic ID.

[`LasarForGenerativeRec`] is the head on the trunk of `trunk_lasar.py`: next-token logits, and `recommend`.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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

from .base_lasar import DepthPolicyHead, LasarModel, LasarPreTrainedModel, _check_backbone, most_likely_depth
from .batching_lasar import BatchLayout, ReasoningState, valid_tokens
from .cache_lasar import LinkedCache
from .catalog_lasar import SidCatalog
from .configuration_lasar import CONTROL_TOKENS, LATENT_START_TOKEN, LasarConfig, check_sizes, sid_tokens
from .decoding_lasar import RecommendOutput, beam_search, rank_items
from .trie_lasar import ItemFilter


@dataclass
class LasarOutput(ModelOutput):
    """
    Output of [`LasarForGenerativeRec`].

    Args:
        loss (`torch.Tensor`, *optional*):
            Mean next-token cross-entropy over the vocabulary, when labels are given.
        logits (`torch.Tensor` of shape `(B, L, V)`):
            Next-token logits.
        past_key_values ([`~transformers.Cache`], *optional*):
            Keys and values in the columns of `input_ids`, when `use_cache` is set.
        latent_states (`torch.Tensor` of shape `(B, 1 + max N, H)`, *optional*):
            `h_0 … h_N` of each row, zero beyond the row's depth.
        latent_steps (`torch.Tensor` of shape `(B,)`, *optional*):
            Depth `N` of each row.
        depth_logits (`torch.Tensor` of shape `(B, N_max)`, *optional*):
            Logits of the policy head on `h_0`; class `k` means `k + 1` steps.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    latent_states: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None


class LasarForGenerativeRec(LasarPreTrainedModel, GenerationMixin):
    """
    LASAR with its language-model head: reasons in hidden states, then writes the Semantic ID of the item to recommend.

    Args:
        config ([`LasarConfig`]):
            Configuration.

    Example:

    ```python
    >>> from transformers import AutoTokenizer
    >>> from lasar_hf import LasarForGenerativeRec, SidCatalog

    >>> tokenizer = AutoTokenizer.from_pretrained("path/to/checkpoint")
    >>> model = LasarForGenerativeRec.from_pretrained("path/to/checkpoint")
    >>> catalog = SidCatalog.from_pretrained("path/to/checkpoint")
    >>> prompt = tokenizer("Recommend the next item.<a_1><b_7><c_0><d_3><|latent_start|>", return_tensors="pt")
    >>> recommended = model.recommend(**prompt, catalog=catalog, top_k=10)
    >>> [catalog.item_ids[row] for row in recommended.items[0]]
    ```
    """

    def __init__(self, config: LasarConfig):
        super().__init__(config)
        self.model = LasarModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._tie_to_backbone()
        self.post_init()

    def _tie_to_backbone(self) -> None:
        embeddings = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self._no_split_modules = self.model._no_split_modules

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding matrix."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's embedding matrix."""
        self.model.set_input_embeddings(value)

    @classmethod
    def from_backbone(
        cls,
        backbone: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        num_sid_levels: int = 4,
        codebook_size: int = 256,
        max_latent_steps: int = 8,
        **kwargs,
    ) -> "LasarForGenerativeRec":
        """
        Make a recommender out of a causal language model: add the tokens, resize, keep the weights.

        Args:
            backbone (`str` or [`~transformers.PreTrainedModel`]):
                Name or path of a causal language model, or the model itself (which is taken over, not copied).
            tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
                Its tokenizer; the Semantic-ID and control tokens are added to it as special tokens.
            num_sid_levels (`int`, *optional*, defaults to `4`):
                Codes of one Semantic ID, `M`.
            codebook_size (`int`, *optional*, defaults to `256`):
                Codes a level, `K`.
            max_latent_steps (`int`, *optional*, defaults to `8`):
                Largest number of latent steps, `N_max`.
            kwargs:
                Passed to `AutoModelForCausalLM.from_pretrained` when `backbone` is a name.

        Returns:
            [`LasarForGenerativeRec`]: the model; new embedding rows are drawn around the mean of the old ones.

        Raises:
            `ValueError`: if a number is out of range, the tokenizer holds the Semantic-ID tokens elsewhere than in one
            contiguous run, or the backbone has sliding-window, recurrent or encoder-decoder layers.
        """
        if isinstance(backbone, str):
            backbone = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
        check_sizes(num_sid_levels, codebook_size, max_latent_steps)
        _check_backbone(backbone.base_model)
        _check_plain_head(backbone)
        if backbone.get_output_embeddings().bias is not None:
            raise ValueError(
                f"The head of {type(backbone).__name__} has a bias, which a checkpoint would lose: use a backbone "
                "without one, such as Qwen3 or Llama."
            )
        if is_deepspeed_zero3_enabled():
            raise ValueError(
                "ZeRO-3 has split the backbone's weights, which cannot be resized then: make the model inside "
                "lasar_hf.trainers.unsharded_weights()."
            )
        num_old = len(tokenizer)
        tokens = sid_tokens(num_sid_levels, codebook_size)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [*CONTROL_TOKENS, *tokens]}, replace_extra_special_tokens=False
        )
        ids = tokenizer.convert_tokens_to_ids(tokens)
        if ids != list(range(ids[0], ids[0] + len(ids))):
            raise ValueError(
                "The tokenizer already holds some Semantic-ID tokens, not in one run: start from the backbone's own "
                "tokenizer, or keep the number of levels and codes it was made with."
            )
        _add_embedding_rows(backbone, num_old, len(tokenizer))
        start_id, latent_id, end_id = tokenizer.convert_tokens_to_ids(list(CONTROL_TOKENS))
        config = LasarConfig(
            backbone_config=backbone.config, num_sid_levels=num_sid_levels, codebook_size=codebook_size,
            sid_token_offset=ids[0], max_latent_steps=max_latent_steps, latent_start_token_id=start_id,
            latent_token_id=latent_id, latent_end_token_id=end_id, dtype=backbone.dtype,
        )
        return cls._around(backbone, config)

    @classmethod
    def _around(cls, language_model: PreTrainedModel, config: LasarConfig) -> "LasarForGenerativeRec":
        with torch.device("meta"):
            model = cls(config)
        head = language_model.get_output_embeddings()
        trunk = model.model
        trunk.backbone, model.lm_head = language_model.base_model, head
        trunk._adopt_backbone()
        model._tie_to_backbone()
        policy_head = DepthPolicyHead(config.hidden_size, config.max_latent_steps)
        policy_head.apply(model._init_weights)
        trunk.policy_head = policy_head.to(head.weight.device, head.weight.dtype)
        # A fresh generation config with what changes a score pinned: sampling defaults left over from the backbone
        # would corrupt the search. A latent region is opened by the prompt, never written.
        model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, temperature=1.0, top_p=1.0, typical_p=1.0, repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=config.backbone_config.pad_token_id,
            eos_token_id=config.backbone_config.eos_token_id,
            suppress_tokens=[config.latent_start_token_id, config.latent_token_id],
        )
        return model.train(language_model.training)

    @torch.no_grad()
    def set_sid_embeddings(self, codebooks: torch.Tensor, std: float = 0.05) -> None:
        """
        Start the Semantic-ID tokens from the quantizer's codebooks, so that codes with near centres begin alike.

        For backbones trained from scratch: the geometry of the items' embeddings need not be learned again. The
        centres are rotated into the hidden size by principal components; a tied head starts from them too, an untied
        one is set.

        Args:
            codebooks (`torch.Tensor` of shape `(M, K, D)`):
                Centres of each level, of any width `D`.
            std (`float`, *optional*, defaults to `0.05`):
                Standard deviation of the rows' entries.

        Raises:
            `ValueError`: if the codebooks are not `M` levels of `K` centres.
        """
        config = self.config
        if codebooks.shape[:2] != (config.num_sid_levels, config.codebook_size):
            raise ValueError(
                f"codebooks has shape {tuple(codebooks.shape)} but the model has {config.num_sid_levels} levels of "
                f"{config.codebook_size} codes: pass (M, K, D)."
            )
        left, scale, _ = torch.linalg.svd(codebooks.flatten(0, 1).float(), full_matrices=False)
        rows = (left * scale)[:, : config.hidden_size]
        rows = nn.functional.pad(rows, (0, config.hidden_size - rows.shape[1]))
        # Spread the components over all dimensions: rotary positions and attention heads would single some out.
        rows = rows @ torch.linalg.qr(torch.randn(config.hidden_size, config.hidden_size)).Q
        rows = rows / rows.std() * std
        start = config.sid_token_id(0, 0)
        for weight in (self.get_input_embeddings().weight, self.lm_head.weight):
            weight[start : start + config.num_sid_tokens] = rows.to(weight.device, weight.dtype)

    def sid_head(self, level: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Rows of the head that score the codes of a level.

        Args:
            level (`int`):
                Level of the codes.

        Returns:
            `tuple` of `torch.Tensor` of shape `(K, H)` and `None`: weight and bias, which the head does not have.
        """
        start = self.config.sid_token_id(level, 0)
        rows = slice(start, start + self.config.codebook_size)
        return self.lm_head.weight[rows], None

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
        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Token ids, `X … <|latent_start|>` `<|latent|>` x N `<|latent_end|>` `s_1 … s_M`; `N` may differ.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                0 at padding, on either side.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Only used when a cache is continued; otherwise positions count the tokens that are not padding.
            past_key_values ([`~transformers.Cache`], *optional*):
                Cache to fill (empty) or to continue with tokens after the latent region.
            labels (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Tokens to predict, -100 where there is nothing to learn.
            use_cache (`bool`, *optional*):
                Whether to return keys and values.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to `0`):
                Score only the last so many positions (or these), 0 for all.

        Returns:
            [`LasarOutput`].

        Raises:
            `ValueError`: as [`LasarModel.forward`].
        """
        loss_kwargs = {key: kwargs.pop(key) for key in ("num_items_in_batch",) if key in kwargs}
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = ForCausalLMLoss(logits, labels, vocab_size=self.config.vocab_size, **loss_kwargs)
        return LasarOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            latent_states=outputs.latent_states,
            latent_steps=outputs.latent_steps,
            depth_logits=outputs.depth_logits,
        )

    @contextmanager
    def evaluation_mode(self):
        """
        Without gradients, in evaluation mode, on the fastest products; every part is as before afterwards. Threads may
        share a model that is in evaluation mode already; one that is not would be put back by the first to end.
        """
        was_training = [part for part in self.modules() if part.training]
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            for part in was_training:
                part.training = True

    def encode_prompts(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        latent_steps: int | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> ReasoningState:
        """
        Read prompts and take their latent steps.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts that end in `<|latent_start|>`.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                0 at padding, on either side.
            latent_steps (`int`, `torch.Tensor` of shape `(B,)` or `Callable`, *optional*):
                Depth of every row, 0 for direct generation, or what chooses depths from the policy head's logits
                `(B, N_max)`; the most likely ones if not given.

        Returns:
            [`ReasoningState`], for [`~decoding_lasar.beam_search`] and [`~decoding_lasar.sample_items`].

        Raises:
            `ValueError`: if a prompt does not end in `<|latent_start|>`, a depth is no integer or outside
            `0 … max_latent_steps`, or prompt, latent steps and answer are longer than the backbone's positions. Where
            the policy head chooses, `max_latent_steps` must fit.
        """
        layout = self._prompt_layout(input_ids, attention_mask)
        if latent_steps is None:
            latent_steps = most_likely_depth
        if callable(latent_steps):
            self._check_positions(layout.length + self.config.max_latent_steps)
        else:
            latent_steps = self._checked_depths(latent_steps, len(input_ids), input_ids.device)
            self._check_positions(layout.length + latent_steps)
        return self.model.run_latent_steps(*layout.prompts(), latent_steps)

    def _prompt_layout(self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> BatchLayout:
        layout = BatchLayout(input_ids, valid_tokens(input_ids, attention_mask), self.config)
        last = layout._columns().gather(1, (layout.length[:, None] - 1).clamp(min=0))
        unfinished = (input_ids.gather(1, last)[:, 0] != self.config.latent_start_token_id) | (layout.length == 0)
        if unfinished.any():
            row = int(unfinished.nonzero()[0])
            raise ValueError(f"The prompt of row {row} does not end in {LATENT_START_TOKEN}: append it to the prompt.")
        return layout

    def _check_positions(self, length: torch.Tensor) -> None:
        """Lengths `(B,)` of everything before `<|latent_end|>`; it and the Semantic ID must fit behind."""
        limit = getattr(self.config.backbone_config, "max_position_embeddings", None)  # some backbones have no limit
        length = length + 1 + self.config.num_sid_levels
        if limit is not None and (length > limit).any():
            row = int((length > limit).nonzero()[0])
            raise ValueError(
                f"Row {row} needs {int(length[row])} positions for prompt, latent steps and answer, but the backbone "
                f"has max_position_embeddings={limit}: show less of the history."
            )

    def _checked_depths(self, latent_steps: int | torch.Tensor, batch_size: int, device) -> torch.Tensor:
        latent_steps = torch.as_tensor(latent_steps, device=device)
        is_integer = not latent_steps.is_floating_point() and latent_steps.dtype != torch.bool
        if not is_integer or latent_steps.shape not in ((), (batch_size,)):
            raise ValueError(
                f"latent_steps has type {latent_steps.dtype} and shape {tuple(latent_steps.shape)}: pass an integer, "
                f"or one for each of the {batch_size} rows."
            )
        latent_steps = latent_steps.expand(batch_size)
        outside = (latent_steps < 0) | (latent_steps > self.config.max_latent_steps)
        if outside.any():
            row = int(outside.nonzero()[0])
            raise ValueError(
                f"latent_steps is {int(latent_steps[row])} for row {row}, outside 0 … {self.config.max_latent_steps}."
            )
        return latent_steps

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
    ) -> RecommendOutput:
        """
        Recommend items of a catalogue (METHOD.md 6): depth from the policy head, latent steps, trie-constrained beams.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts that end in `<|latent_start|>`.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                0 at padding, on either side.
            catalog ([`SidCatalog`]):
                The items to choose from.
            top_k (`int`, *optional*, defaults to `10`):
                Items to return for each prompt, `k`.
            num_beams (`int`, *optional*, defaults to `50`):
                Width of the beam search; at least `top_k` is searched.
            latent_steps (`int` or `torch.Tensor` of shape `(B,)`, *optional*):
                Depth of every row, 0 for direct generation; the policy head's most likely one if not given.
            allow (`list[torch.Tensor | None]` of length `B`, *optional*):
                Item rows each prompt may get (a region, what is in stock); `None` for all.
            deny (`list[torch.Tensor | None]` of length `B`, *optional*):
                Item rows each prompt may not get (already bought). Both kinds leave the scores as they are: those of
                the whole catalogue.
            allow_empty (`bool`, *optional*, defaults to `False`):
                Whether `allow` and `deny` may leave a prompt without any item, whose result is then all padding.

        Returns:
            [`RecommendOutput`] with `items` `(B, k)` (rows of the catalogue, -1 pads), `scores` `(B, k)` and
            `latent_steps` `(B,)`.

        Raises:
            `ValueError`: if there is no catalogue or it does not match the model, a prompt does not end in
            `<|latent_start|>` or is too long, a depth lies outside `0 … max_latent_steps`, a prompt may get no item,
            or the logits hold NaN.
        """
        self._check_request(catalog, top_k, num_beams)
        item_filter = self._item_filter(input_ids, catalog, allow, deny, allow_empty)
        with self.evaluation_mode():
            chain = self.encode_prompts(input_ids, attention_mask, latent_steps)
            return self._best_items(chain, catalog, top_k, num_beams, item_filter)

    def recommend_with_text(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        catalog: SidCatalog | None = None,
        top_k: int = 10,
        num_beams: int = 50,
        max_new_tokens: int = 128,
        allow: Sequence[torch.Tensor | None] | None = None,
        deny: Sequence[torch.Tensor | None] | None = None,
        allow_empty: bool = False,
    ) -> RecommendOutput:
        """
        Recommend after a written chain of thought, to compare latent steps with: `X`, text, `<|latent_start|>`,
        `<|latent_end|>`, Semantic ID.

        The text is written greedily, until the model writes `<|latent_start|>` or ends its text.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Prompts that end in `<|latent_start|>`, as for `recommend`; the text goes before that token.
            max_new_tokens (`int`, *optional*, defaults to `128`):
                Most tokens of the text, `T`.
            attention_mask, catalog, top_k, num_beams, allow, deny, allow_empty:
                As for [`~LasarForGenerativeRec.recommend`].

        Returns:
            [`RecommendOutput`] with `latent_steps` 0 and `text_ids` `(B, T')`, `T'` at most `T`, besides.

        Raises:
            `ValueError`: as [`~LasarForGenerativeRec.recommend`], and if a prompt is empty before `<|latent_start|>`.
        """
        self._check_request(catalog, top_k, num_beams)
        item_filter = self._item_filter(input_ids, catalog, allow, deny, allow_empty)
        with self.evaluation_mode():
            chain, text_ids = self._think_in_text(input_ids, attention_mask, max_new_tokens)
            output = self._best_items(chain, catalog, top_k, num_beams, item_filter)
        output.text_ids = text_ids
        return output

    def _think_in_text(self, input_ids, attention_mask, max_new_tokens: int) -> tuple[ReasoningState, torch.Tensor]:
        """Write the chain of thought and continue on its cache. Returns the chain and the text `(B, T)`."""
        config = self.config
        layout = self._prompt_layout(input_ids, attention_mask)
        if (layout.length < 2).any():
            raise ValueError(f"Row {int((layout.length < 2).nonzero()[0])} has no prompt before {LATENT_START_TOKEN}.")
        self._check_positions(layout.length + max_new_tokens)
        prompt_ids, prompt_mask = (part[:, :-1] for part in layout.prompts())  # `<|latent_start|>` follows the text
        eos = self.generation_config.eos_token_id
        stops = [config.latent_start_token_id, *([] if eos is None else [eos] if isinstance(eos, int) else eos)]
        pad = self.generation_config.pad_token_id
        pad = stops[-1] if pad is None else pad
        written = self.generate(
            input_ids=prompt_ids, attention_mask=prompt_mask.long(), max_new_tokens=max_new_tokens, do_sample=False,
            num_beams=1, eos_token_id=stops, pad_token_id=pad, return_dict_in_generate=True, use_cache=True,
            suppress_tokens=[config.latent_token_id, config.latent_end_token_id],
        )
        text_ids = written.sequences[:, prompt_ids.shape[1] :]
        is_text = torch.isin(text_ids, torch.tensor(stops, device=text_ids.device)).cumsum(dim=1) == 0
        # Everything but the last token stands in the cache; what follows a stop is never seen.
        cache = LinkedCache(config.backbone_config.num_hidden_layers)
        for index, layer in enumerate(written.past_key_values.layers):
            cache.update(layer.keys, layer.values, index)
        visible = torch.cat([prompt_mask, is_text[:, :-1]], dim=1)
        chain = ReasoningState(
            hidden_states=None, depth_logits=None, depths=torch.zeros_like(layout.length), cache=cache,
            visible=visible, position=visible.sum(dim=1), slot=None, slot_states=[],
        )
        start = torch.full_like(text_ids[:, -1:], config.latent_start_token_id)
        one = torch.ones_like(is_text[:, -1:])
        last = torch.stack([torch.cat([one, ~one], dim=1), torch.cat([is_text[:, -1:], one], dim=1)], dim=1)
        self.model.read_tokens(chain, torch.cat([text_ids[:, -1:], start], dim=1), last)
        chain.visible = torch.cat([visible, is_text[:, -1:], one], dim=1)
        chain.position = chain.visible.sum(dim=1)
        return chain, text_ids.masked_fill(~is_text, pad)

    def _check_request(self, catalog: SidCatalog | None, top_k: int, num_beams: int) -> None:
        if catalog is None:
            raise ValueError("recommend needs a catalogue: pass catalog=SidCatalog(codes, item_ids).")
        if top_k < 1 or num_beams < 1:
            raise ValueError(f"top_k is {top_k} and num_beams is {num_beams}: both must be at least 1.")
        catalog.check_matches(self.config.num_sid_levels, self.config.codebook_size)

    def _item_filter(self, input_ids, catalog: SidCatalog, allow, deny, allow_empty: bool) -> ItemFilter | None:
        if allow is None and deny is None:
            return None
        return ItemFilter(catalog.trie(input_ids.device), len(input_ids), allow, deny, allow_empty)

    def _best_items(self, chain: ReasoningState, catalog, top_k: int, num_beams: int, item_filter) -> RecommendOutput:
        trie = catalog.trie(chain.depths.device)
        leaves, scores = beam_search(self, chain, trie, max(num_beams, top_k), item_filter)
        items, scores = rank_items(leaves, scores, trie, top_k, item_filter)
        return RecommendOutput(items=items, scores=scores, latent_steps=chain.depths)


@torch.no_grad()
def _check_plain_head(language_model: PreTrainedModel) -> None:
    """Refuse heads that scale or cap their logits: LASAR scores the rows of a level by themselves."""
    ids = torch.arange(4, device=language_model.device)[None]
    was_training = language_model.training
    language_model.eval()
    hidden_states = language_model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    plain = language_model.get_output_embeddings()(hidden_states).float()
    logits = language_model(input_ids=ids, use_cache=False).logits.float()
    language_model.train(was_training)
    if not torch.allclose(logits, plain, rtol=0, atol=1e-2 * float(plain.abs().max())):
        raise ValueError(
            f"{type(language_model).__name__} scales or caps its logits, which LASAR does not: use a backbone whose "
            "head is a plain matrix, such as Qwen3 or Llama."
        )


@torch.no_grad()
def _add_embedding_rows(language_model: PreTrainedModel, num_old: int, num_tokens: int) -> None:
    """Make room for new tokens and draw their rows around the mean of the old ones, with the old ones' spread."""
    num_rows = language_model.get_input_embeddings().weight.shape[0]
    if num_tokens > num_rows:
        language_model.resize_token_embeddings(num_tokens, mean_resizing=False)
    matrices = {m.weight.data_ptr(): m.weight for m in
                (language_model.get_input_embeddings(), language_model.get_output_embeddings())}
    for weight in matrices.values():
        old = weight[:num_old].float()
        noise = torch.randn(num_tokens - num_old, old.shape[1], device=old.device)
        weight[num_old:num_tokens] = (old.mean(dim=0) + noise * old.std(dim=0)).to(weight.dtype)


__all__ = ["LasarForGenerativeRec", "LasarModel", "LasarOutput", "LasarPreTrainedModel"]
