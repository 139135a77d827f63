"""LASAR: a decoder-only language model that reasons in hidden states before it writes a Semantic ID.

The latent loop (METHOD.md 2) lives in [`LasarModel`], under the head, so that whatever calls the trunk (TRL's fused
heads, PEFT, `generate`) gets it. The rows of a batch are cut at `<|latent_start|>` into a prompt, `N` latent slots and
an answer, and the backbone runs once for the prompts, once for each latent step and once for the answers:

* Rows with equal prompt and depth run prompt and latent steps once; their answers are branches of one row, told apart
  by the attention mask. A GRPO batch pays for a prompt once, however often it is repeated.
* Depths may differ. Short chains are aligned at their end: a row whose chain has not begun is masked, and the last slot
  of every row is read together with the answers, which saves one pass a sample.
* Keys and values live in linked segments that only ever append, so that gradient checkpointing can replay a layer
  without harm, and a latent step never owns a copy of the prompt's keys.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_lasar import CONTROL_TOKENS, LATENT_START_TOKEN, LasarConfig, sid_tokens
from .decoding_lasar import RecommendOutput, SidCatalog, beam_search, rank_items


@dataclass
class LasarModelOutput(ModelOutput):
    """
    Output of [`LasarModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, L, H)`):
            Final hidden states of the tokens, `h_t` at the t-th latent slot, zero at padding.
        past_key_values ([`~transformers.Cache`], *optional*):
            Keys and values in the columns of `input_ids`, when `use_cache` is set.
        latent_states (`torch.Tensor` of shape `(B, 1 + max N, H)`, *optional*):
            `h_0 … h_N` of each row, zero beyond the row's depth.
        latent_steps (`torch.Tensor` of shape `(B,)`, *optional*):
            Depth `N` of each row.
        depth_logits (`torch.Tensor` of shape `(B, N_max)`, *optional*):
            Logits of the policy head on `h_0`; class `k` means `k + 1` steps.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    latent_states: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None


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


class _SegmentLayer(DynamicLayer):
    """One layer's keys and values of one segment, linked to those of the segments before it."""

    def __init__(self, parent: "_SegmentLayer | None"):
        super().__init__()
        self.parent = parent

    def update(self, key_states, value_states, *args, **kwargs):
        # A segment is written once; a second write is the replay of gradient checkpointing and stores equal values.
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return self.states()

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `(B, heads, S, head dim)` of this segment and all before it."""
        if self.parent is None:
            return self.keys, self.values
        segments, layer = [], self
        while layer is not None:
            segments.append(layer)
            layer = layer.parent
        keys = torch.cat([segment.keys for segment in reversed(segments)], dim=-2)
        values = torch.cat([segment.values for segment in reversed(segments)], dim=-2)
        return keys, values

    def get_seq_length(self) -> int:
        own = self.keys.shape[-2] if self.is_initialized else 0
        return own + (self.parent.get_seq_length() if self.parent is not None else 0)


class LinkedCache(Cache):
    """
    Append-only cache made of linked segments, one for each call of the backbone.

    `DynamicCache` under grad copies the prompt's keys and values at every step, and transformers drops any cache under
    gradient checkpointing because a layer that is replayed in the backward pass would append twice. A segment only
    stores its own keys and values and returns its parents' and its own, so writing it again is harmless.

    Args:
        num_layers (`int`):
            Layers of the backbone.
        parent ([`LinkedCache`], *optional*):
            Segment that this one continues.
    """

    def __init__(self, num_layers: int, parent: "LinkedCache | None" = None):
        parents = parent.layers if parent is not None else [None] * num_layers
        super().__init__(layers=[_SegmentLayer(layer) for layer in parents])


@dataclass
class LatentChain:
    """
    Prompts that were read and reasoned about, ready for answers.

    Args:
        hidden_states (`torch.Tensor` of shape `(U, P, H)`):
            Final hidden states of the left-padded prompts.
        depth_logits (`torch.Tensor` of shape `(U, N_max)`):
            Logits of the policy head on `h_0`.
        depths (`torch.Tensor` of shape `(U,)`):
            Latent steps `N` of each row.
        cache ([`LinkedCache`]):
            Keys and values read so far.
        visible (`torch.Tensor` of shape `(U, S)`):
            Which keys of prompt and latent slots exist.
        position (`torch.Tensor` of shape `(U,)`):
            Position of the first token after the latent slots.
        slot (`torch.Tensor` of shape `(U, H)`, *optional*):
            Input of the last latent slot, which is read together with the next tokens. `None` without latent steps.
        slot_states (`list[torch.Tensor]` of shape `(U, H)`):
            Outputs of the latent slots read so far, one for each step; rows end at the last.
    """

    hidden_states: torch.Tensor
    depth_logits: torch.Tensor
    depths: torch.Tensor
    cache: LinkedCache
    visible: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor | None
    slot_states: list[torch.Tensor]

    def latent_states(self) -> torch.Tensor:
        """`h_0 … h_N` of each row, `(U, 1 + max N, H)`, zero beyond the row's depth."""
        states = torch.stack([self.hidden_states[:, -1], *self.slot_states], dim=1)
        num_steps = len(self.slot_states)
        step = torch.arange(1 + num_steps, device=states.device)
        # Chains are aligned at their end, so step t of a row stands `num_steps - N` places later.
        place = torch.where(step > 0, step + num_steps - self.depths[:, None], 0)
        inside = (step <= self.depths[:, None])[..., None]
        states = states.gather(1, place.clamp(max=num_steps)[..., None].expand(-1, -1, states.shape[-1]))
        return states.masked_fill(~inside, 0)


class _Layout:
    """
    How the rows of a batch are cut: `X … <|latent_start|>` (prompt), `<|latent|>` x N, answer.

    A row without `<|latent_start|>` (plain text) is all prompt. Rows may be padded on the left, on the right or not.

    Args:
        input_ids (`torch.Tensor` of shape `(B, L)`):
            Token ids.
        valid (`torch.Tensor` of shape `(B, L)`):
            Which tokens are not padding.
        config ([`LasarConfig`]):
            Configuration with the control tokens.
    """

    def __init__(self, input_ids: torch.Tensor, valid: torch.Tensor, config: LasarConfig):
        self.input_ids, self.valid = input_ids, valid
        self.position = valid.cumsum(dim=1) - 1
        self.length = valid.sum(dim=1)
        is_start = valid & (input_ids == config.latent_start_token_id)
        is_slot = valid & (input_ids == config.latent_token_id)
        start = torch.where(is_start, self.position, -1).amax(dim=1)
        self.depth = is_slot.sum(dim=1)
        self.prompt_length = torch.where(start >= 0, start + 1, self.length)
        self.answer_length = self.length - self.prompt_length - self.depth
        offset = self.position - self.prompt_length[:, None]
        in_place = (start >= 0)[:, None] & (offset >= 0) & (offset < self.depth[:, None])
        misplaced = (is_slot & ~in_place).any(dim=1)
        too_deep = self.depth > config.max_latent_steps
        self.max_prompt, self.max_depth, self.max_answer, errors = torch.stack(
            [self.prompt_length.max(), self.depth.max(), self.answer_length.max(), (misplaced | too_deep).sum()]
        ).tolist()
        if errors:
            self._raise(misplaced, config.max_latent_steps)

    def _raise(self, misplaced: torch.Tensor, max_latent_steps: int):
        if misplaced.any():
            row = int(misplaced.nonzero()[0])
            raise ValueError(
                f"Row {row}: the <|latent|> slots must follow <|latent_start|> directly and without a gap."
            )
        row = int((self.depth > max_latent_steps).nonzero()[0])
        raise ValueError(
            f"Row {row} has {int(self.depth[row])} latent slots but max_latent_steps is {max_latent_steps}: "
            "use fewer slots or a model with more steps."
        )

    def _columns(self) -> torch.Tensor:
        """Column of each row's r-th token that is not padding, `(B, L)`."""
        return torch.argsort((~self.valid).to(torch.uint8), dim=1, stable=True)

    def prompts(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-padded prompts and their mask, both `(B, P)`."""
        device = self.input_ids.device
        rank = torch.arange(self.max_prompt, device=device) - (self.max_prompt - self.prompt_length[:, None])
        columns = self._columns().gather(1, rank.clamp(min=0))
        return self.input_ids.gather(1, columns).masked_fill(rank < 0, 0), rank >= 0

    def answers(self) -> torch.Tensor:
        """Right-padded answers, `(B, A)`."""
        rank = torch.arange(self.max_answer, device=self.input_ids.device).expand(len(self.length), -1)
        first = self.prompt_length + self.depth
        columns = self._columns().gather(1, (first[:, None] + rank).clamp(max=self.input_ids.shape[1] - 1))
        return self.input_ids.gather(1, columns).masked_fill(rank >= self.answer_length[:, None], 0)


class _Groups:
    """
    Rows of equal (prompt, depth): one trunk row for each group, the members' answers are its branches.

    Args:
        prompt_ids (`torch.Tensor` of shape `(B, P)`):
            Left-padded prompts.
        prompt_mask (`torch.Tensor` of shape `(B, P)`):
            Their mask.
        depth (`torch.Tensor` of shape `(B,)`):
            Latent steps of each row.
        share (`bool`):
            Whether to look for equal rows at all.
    """

    def __init__(self, prompt_ids: torch.Tensor, prompt_mask: torch.Tensor, depth: torch.Tensor, share: bool):
        batch_size, device = len(depth), depth.device
        rows = torch.arange(batch_size, device=device)
        self.num_groups = batch_size
        self.group, self.first = rows, rows  # (B,) group of each row; (U,) one member of each group
        self.branch, self.num_branches = torch.zeros_like(rows), 1  # (B,) branch of each row in its group
        if not share or batch_size == 1:
            return
        keys = torch.cat([prompt_ids.masked_fill(~prompt_mask, -1), depth[:, None]], dim=1)
        unique, group, counts = torch.unique(keys, dim=0, return_inverse=True, return_counts=True)
        if len(unique) == batch_size:
            return
        self.num_groups, self.group, self.num_branches = len(unique), group, int(counts.max())
        members = torch.argsort(group, stable=True)  # group after group
        begin = counts.cumsum(0) - counts
        self.first = members[begin]
        self.branch = torch.empty_like(rows)
        self.branch[members] = rows - begin[group[members]]


class LasarPreTrainedModel(PreTrainedModel):
    config_class = LasarConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **kwargs):
        options = getattr(gradient_checkpointing_func, "keywords", None) or {}
        if enable and options.get("use_reentrant"):
            raise ValueError(
                "The latent loop cannot run under reentrant gradient checkpointing: pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class DepthPolicyHead(nn.Module):
    """
    Policy over the number of latent steps (METHOD.md 2): `softmax(W_2 tanh(W_1 h_0 + b_1) + b_2)`, here its logits.

    Args:
        hidden_size (`int`):
            Width of `h_0`.
        max_latent_steps (`int`):
            Classes, `N_max`; class `k` means `k + 1` steps.
    """

    def __init__(self, hidden_size: int, max_latent_steps: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, max_latent_steps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits `(B, N_max)` of `h_0` `(B, H)`."""
        return self.out_proj(torch.tanh(self.dense(hidden_states)))


def most_likely_depth(depth_logits: torch.Tensor) -> torch.Tensor:
    """Latent steps `(B,)` that the policy head finds most likely, from its logits `(B, N_max)`."""
    return depth_logits.argmax(dim=-1) + 1


def sampled_depth(depth_logits: torch.Tensor) -> torch.Tensor:
    """Latent steps `(B,)` drawn from the policy `π(· | h_0)`, from its logits `(B, N_max)`."""
    return torch.multinomial(depth_logits.float().softmax(dim=-1), 1)[:, 0] + 1


def _check_backbone(backbone: PreTrainedModel) -> None:
    """Refuse backbones whose layers cannot read a prompt, latent slots and branches in separate calls."""
    config, name = backbone.config, type(backbone).__name__
    layer_types = set(getattr(config, "layer_types", None) or [])
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    if "sliding_attention" in layer_types or (sliding and not layer_types):
        raise ValueError(
            f"{name} has sliding-window attention, whose window would cut the prompt off from the answer: use a backbone "
            "with full attention in every layer, such as Qwen3 or Llama."
        )
    if config.is_encoder_decoder or layer_types - {"full_attention"} or not backbone._supports_attention_backend:
        raise ValueError(
            f"{name} is not a decoder-only model with full attention in every layer: use one, such as Qwen3 or Llama."
        )


class LasarModel(LasarPreTrainedModel):
    """
    Backbone with the latent loop and the depth policy head.

    `h_0` is the backbone's last hidden state at `<|latent_start|>`. The input of the t-th `<|latent|>` slot is not
    looked up: it is `h_{t-1}`, and the output there is `h_t`. What follows the slots is read as ordinary tokens over the
    same keys and values, and gradients flow through the whole chain (METHOD.md 2).

    Args:
        config ([`LasarConfig`]):
            Configuration.

    Raises:
        `ValueError`: if the backbone has sliding-window, recurrent or encoder-decoder layers.
    """

    def __init__(self, config: LasarConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.policy_head = DepthPolicyHead(config.hidden_size, config.max_latent_steps)
        self.share_prefixes = True  # rows with equal prompt and depth run prompt and latent steps once
        self._adopt_backbone()
        self.post_init()

    def _adopt_backbone(self) -> None:
        _check_backbone(self.backbone)
        self._no_split_modules = self.backbone._no_split_modules
        for module in self.backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._can_checkpoint_with_cache = True  # safe with LinkedCache, see there

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's embedding matrix."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the backbone's embedding matrix."""
        self.backbone.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> LasarModelOutput:
        r"""
        Read prompts, reason at the `<|latent|>` slots, read answers.

        Args:
            input_ids (`torch.LongTensor` of shape `(B, L)`):
                Token ids, `X … <|latent_start|>` `<|latent|>` x N `<|latent_end|>` `s_1 … s_M`; `N` may differ.
            attention_mask (`torch.Tensor` of shape `(B, L)`, *optional*):
                0 at padding, on either side.
            position_ids (`torch.LongTensor` of shape `(B, L)`, *optional*):
                Only used when a cache is continued; otherwise positions count the tokens that are not padding.
            past_key_values ([`~transformers.Cache`], *optional*):
                Cache to fill (empty) or to continue with tokens after the latent region.
            use_cache (`bool`, *optional*):
                Whether to return keys and values.

        Returns:
            [`LasarModelOutput`].

        Raises:
            `ValueError`: if slots are not contiguous after `<|latent_start|>`, a depth exceeds `max_latent_steps`, or
            slots follow a cached prefix.
        """
        if kwargs.pop("output_attentions", None) or kwargs.pop("output_hidden_states", None):
            raise ValueError("LasarModel returns neither attentions nor the hidden states of each layer.")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._continue(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        layout = _Layout(input_ids, valid, self.config)
        prompt_ids, prompt_mask = layout.prompts()
        groups = _Groups(prompt_ids, prompt_mask, layout.depth, self.share_prefixes)
        is_shared = groups.num_groups < len(input_ids)
        max_depth, is_shared = self._agree(layout.max_depth, is_shared)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.backbone_config)
        if max_depth == 0 and not is_shared:
            return self._read_plain(layout, attention_mask, past_key_values, use_cache, **kwargs)

        first = groups.first
        chain = self.reason(prompt_ids[first], prompt_mask[first], layout.depth[first], max_depth, **kwargs)
        hidden_states, columns = self._read_branches(chain, layout, groups, **kwargs)
        if use_cache:
            self._fill_cache(past_key_values, chain, groups, columns)
        return LasarModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            latent_states=chain.latent_states()[groups.group],
            latent_steps=layout.depth,
            depth_logits=chain.depth_logits[groups.group],
        )

    def _continue(self, input_ids, attention_mask, position_ids, past_key_values, **kwargs) -> LasarModelOutput:
        if (input_ids == self.config.latent_token_id).any():
            raise ValueError("<|latent|> slots cannot follow a cached prefix: pass the prompt and its slots together.")
        outputs = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=True, **kwargs,
        )
        return LasarModelOutput(outputs.last_hidden_state, past_key_values)

    def _agree(self, max_depth: int, is_shared: bool) -> tuple[int, bool]:
        """
        With parameters sharded over processes, every call of the backbone is a collective: all must make as many.
        """
        if not (dist.is_initialized() and dist.get_world_size() > 1 and self._is_sharded()):
            return max_depth, is_shared
        plan = torch.tensor([max_depth, int(is_shared)], device=self.policy_head.dense.weight.device)
        dist.all_reduce(plan, op=dist.ReduceOp.MAX)
        return int(plan[0]), bool(plan[1])

    def _is_sharded(self) -> bool:
        weight = self.get_input_embeddings().weight
        return is_deepspeed_zero3_enabled() or isinstance(weight, dist.tensor.DTensor)

    def _read_plain(self, layout: _Layout, attention_mask, past_key_values, use_cache, **kwargs) -> LasarModelOutput:
        """No latent slot and no equal prompts: one ordinary pass."""
        outputs = self.backbone(
            input_ids=layout.input_ids, attention_mask=attention_mask, position_ids=layout.position.clamp(min=0),
            past_key_values=past_key_values, use_cache=bool(use_cache), **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        start = layout._columns().gather(1, layout.prompt_length[:, None] - 1)
        start_states = hidden_states.gather(1, start[..., None].expand(-1, -1, hidden_states.shape[-1]))
        return LasarModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            latent_states=start_states,
            latent_steps=layout.depth,
            depth_logits=self.policy_head(start_states[:, 0]),
        )

    def reason(
        self,
        prompt_ids: torch.LongTensor,
        prompt_mask: torch.Tensor,
        depths: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] = most_likely_depth,
        max_depth: int | None = None,
        **kwargs,
    ) -> LatentChain:
        """
        Read prompts and take the latent steps, all but the last, which [`~LasarModel.read`] reads with the next tokens.

        Args:
            prompt_ids (`torch.LongTensor` of shape `(U, P)`):
                Prompts, left-padded, ending in `<|latent_start|>`.
            prompt_mask (`torch.Tensor` of shape `(U, P)`):
                `False` at padding.
            depths (`torch.Tensor` of shape `(U,)` or `Callable`, *optional*):
                Latent steps of each row, or what chooses them from the policy head's logits `(U, N_max)`; the most
                likely ones if not given.
            max_depth (`int`, *optional*):
                Steps of the loop, at least `depths.max()`; more when processes must stay in step.

        Returns:
            [`LatentChain`].
        """
        cache = LinkedCache(self.config.backbone_config.num_hidden_layers)
        hidden_states = self.backbone(
            input_ids=prompt_ids, attention_mask=prompt_mask.long(), past_key_values=cache, use_cache=False,
            position_ids=(prompt_mask.cumsum(dim=1) - 1).clamp(min=0), **kwargs,
        ).last_hidden_state
        depth_logits = self.policy_head(hidden_states[:, -1])
        if callable(depths):
            depths = depths(depth_logits)
        if max_depth is None:
            max_depth = self._agree(int(depths.max()), is_shared=False)[0]
        chain = LatentChain(
            hidden_states=hidden_states, depth_logits=depth_logits, depths=depths, cache=cache,
            visible=prompt_mask, position=prompt_mask.sum(dim=1), slot=None, slot_states=[],
        )
        for step in range(max_depth):
            if chain.slot is not None:
                self._take_step(chain, **kwargs)
            begins = depths == max_depth - step  # chains are aligned at their end
            last = hidden_states[:, -1]
            chain.slot = last if step == 0 else torch.where(begins[:, None], last, chain.slot_states[-1])
            active = depths >= max_depth - step
            chain.visible = torch.cat([chain.visible, active[:, None]], dim=1)
            chain.position = chain.position + active
        return chain

    def _take_step(self, chain: LatentChain, **kwargs) -> None:
        """Read the pending slot by itself: `h_t = f([…, h_{t-1}])`."""
        slot = chain.slot[:, None]
        position = (chain.position - 1).clamp(min=0)[:, None]
        states, chain.cache = self._extend(chain.cache, slot, position, chain.visible[:, None], **kwargs)
        chain.slot_states.append(states[:, 0])

    def read(self, chain: LatentChain, token_ids: torch.LongTensor, visible: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Read tokens after the latent region, several branches side by side, and append them to the chain.

        Args:
            chain ([`LatentChain`]):
                Prompts and latent steps; its cache grows.
            token_ids (`torch.LongTensor` of shape `(U, Q)`):
                Tokens; every one sees its row's prompt and latent slots.
            visible (`torch.Tensor` of shape `(U, Q, R + Q)`):
                Which of the `R` tokens read before and of these `Q` each token sees besides: its ancestors and itself.
                A token's position follows from their number.

        Returns:
            `torch.Tensor` of shape `(U, Q, H)`: final hidden states of the tokens.
        """
        embeds = self.get_input_embeddings()(token_ids)
        positions = chain.position[:, None] + visible.sum(dim=-1) - 1
        shared = chain.visible[:, None].expand(-1, token_ids.shape[1], -1)
        mask = torch.cat([shared, visible], dim=-1)
        if chain.slot is None:
            states, chain.cache = self._extend(chain.cache, embeds, positions, mask, **kwargs)
            return states
        embeds = torch.cat([chain.slot[:, None].to(embeds.dtype), embeds], dim=1)
        positions = torch.cat([(chain.position - 1).clamp(min=0)[:, None], positions], dim=1)
        slot_mask = nn.functional.pad(chain.visible[:, None], (0, visible.shape[-1]))
        mask = torch.cat([slot_mask, mask], dim=1)
        states, chain.cache = self._extend(chain.cache, embeds, positions, mask, **kwargs)
        chain.slot_states.append(states[:, 0])
        chain.slot = None
        return states[:, 1:]

    def _extend(self, cache, inputs_embeds, position_ids, visible, **kwargs) -> tuple[torch.Tensor, LinkedCache]:
        """One call of the backbone on top of a cache, with an explicit mask `(U, Q, keys)`."""
        implementation = self.backbone.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"Latent steps and branches need an explicit attention mask, which {implementation!r} cannot take: load "
                "the model with attn_implementation='sdpa'."
            )
        mask = visible[:, None]
        if implementation == "eager":
            mask = torch.zeros_like(mask, dtype=inputs_embeds.dtype).masked_fill(
                ~mask, torch.finfo(inputs_embeds.dtype).min
            )
        segment = LinkedCache(len(cache.layers), parent=cache)
        outputs = self.backbone(
            inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, past_key_values=segment,
            use_cache=False, **kwargs,
        )
        return outputs.last_hidden_state, segment

    def _read_branches(self, chain: LatentChain, layout: _Layout, groups: _Groups, **kwargs):
        """
        Read the answers as branches of their group's row and put every hidden state back into its column.

        Returns the hidden states `(B, L, H)` and, for each token, its place `(B, L)` among the group's keys.
        """
        answers, width = layout.answers(), layout.max_answer
        token_ids = answers.new_zeros(groups.num_groups, groups.num_branches, width)
        token_ids[groups.group, groups.branch] = answers
        token_ids = token_ids.flatten(1)
        causal = torch.ones(width, width, dtype=torch.bool, device=answers.device).tril()
        own_branch = torch.eye(groups.num_branches, dtype=torch.bool, device=answers.device)
        visible = torch.kron(own_branch, causal).expand(groups.num_groups, -1, -1)
        branch_states = self.read(chain, token_ids, visible, **kwargs)

        max_prompt, num_slots = chain.hidden_states.shape[1], len(chain.slot_states)
        states = torch.cat([chain.hidden_states, *[s[:, None] for s in chain.slot_states], branch_states], dim=1)
        position = layout.position
        place = position + max_prompt - layout.prompt_length[:, None]  # prompts and chains are aligned at their ends
        place = place + torch.where(place >= max_prompt, num_slots - layout.depth[:, None], 0)
        in_answer = position >= (layout.prompt_length + layout.depth)[:, None]
        place = place + torch.where(in_answer, (groups.branch * width)[:, None], 0)
        place = torch.where(layout.valid, place, 0)
        flat = (groups.group[:, None] * states.shape[1] + place).flatten()
        hidden_states = states.flatten(0, 1).index_select(0, flat).view(*place.shape, -1)
        return hidden_states.masked_fill(~layout.valid[..., None], 0), place

    def _fill_cache(self, past_key_values: Cache, chain: LatentChain, groups: _Groups, columns: torch.Tensor) -> None:
        """Hand the keys and values to an ordinary cache, in the columns of `input_ids`."""
        for index, layer in enumerate(chain.cache.layers):
            keys, values = (
                states[groups.group].gather(2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
                for states in layer.states()
            )
            past_key_values.update(keys, values, index)


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
            `ValueError`: if the tokenizer holds the Semantic-ID tokens elsewhere than in one contiguous run, or the
            backbone has sliding-window, recurrent or encoder-decoder layers.
        """
        if isinstance(backbone, str):
            backbone = AutoModelForCausalLM.from_pretrained(backbone, **kwargs)
        _check_backbone(backbone.base_model)
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
        # A fresh generation config: sampling defaults left over from the backbone would corrupt the search, and a
        # latent region is opened by the prompt, never written.
        model.generation_config = GenerationConfig(
            pad_token_id=config.backbone_config.pad_token_id,
            eos_token_id=config.backbone_config.eos_token_id,
            suppress_tokens=[config.latent_start_token_id, config.latent_token_id],
        )
        return model.train(language_model.training)

    def sid_head(self, level: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Rows of the head that score the codes of a level.

        Args:
            level (`int`):
                Level of the codes.

        Returns:
            `tuple` of `torch.Tensor` of shape `(K, H)` and of shape `(K,)` or `None`: weight and bias.
        """
        start = self.config.sid_token_id(level, 0)
        rows = slice(start, start + self.config.codebook_size)
        bias = self.lm_head.bias
        return self.lm_head.weight[rows], None if bias is None else bias[rows]

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
    def evaluating(self):
        """Without gradients and in evaluation mode; the mode of before afterwards."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.train(was_training)

    def think(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        latent_steps: int | torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> LatentChain:
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
            [`LatentChain`], for [`~decoding_lasar.beam_search`] and [`~decoding_lasar.sample_items`].

        Raises:
            `ValueError`: if a prompt does not end in `<|latent_start|>`, or a depth lies outside `0 … max_latent_steps`.
        """
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        layout = _Layout(input_ids, valid, self.config)
        last = layout._columns().gather(1, layout.length[:, None] - 1)
        unfinished = input_ids.gather(1, last)[:, 0] != self.config.latent_start_token_id
        if unfinished.any():
            row = int(unfinished.nonzero()[0])
            raise ValueError(f"The prompt of row {row} does not end in {LATENT_START_TOKEN}: append it to the prompt.")
        if latent_steps is None:
            latent_steps = most_likely_depth
        if not callable(latent_steps):
            latent_steps = self._checked_depths(latent_steps, len(input_ids), input_ids.device)
        return self.model.reason(*layout.prompts(), latent_steps)

    def _checked_depths(self, latent_steps: int | torch.Tensor, batch_size: int, device) -> torch.Tensor:
        latent_steps = torch.as_tensor(latent_steps, device=device).expand(batch_size)
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

        Returns:
            [`RecommendOutput`] with `items` `(B, k)` (rows of the catalogue, -1 pads), `scores` `(B, k)` and
            `latent_steps` `(B,)`.

        Raises:
            `ValueError`: if there is no catalogue or it does not match the model, a prompt does not end in
            `<|latent_start|>`, a depth lies outside `0 … max_latent_steps`, or the logits hold NaN.
        """
        if catalog is None:
            raise ValueError("recommend needs a catalogue: pass catalog=SidCatalog(codes, item_ids).")
        if top_k < 1 or num_beams < 1:
            raise ValueError(f"top_k is {top_k} and num_beams is {num_beams}: both must be at least 1.")
        catalog.check_matches(self.config.num_sid_levels, self.config.codebook_size)
        trie = catalog.trie(input_ids.device)
        with self.evaluating():
            chain = self.think(input_ids, attention_mask, latent_steps)
            leaves, scores = beam_search(self, chain, trie, max(num_beams, top_k))
        items, scores = rank_items(leaves, scores, trie, top_k)
        return RecommendOutput(items=items, scores=scores, latent_steps=chain.depths)


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


__all__ = ["LasarForGenerativeRec", "LasarModel", "LasarModelOutput", "LasarOutput", "LasarPreTrainedModel"]
