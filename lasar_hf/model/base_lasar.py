"""The base model of LASAR (arXiv 2605.10207): a backbone with the latent loop and the depth policy head.

The loop is below the language-model head, so TRL's fused heads, PEFT and `generate` use it too.

The path of a batch from `input_ids` `(B, L)` to hidden states `(B, L, H)`:

1. `BatchLayout` cuts each sequence into prompt, `N` latent slots and answer.
2. `PrefixTrees` joins sequences whose prompts share a prefix. The samples of a user become one tree: the longest
   history is its trunk, and each sample is a path that leaves the trunk after its own history. Equal prompts, such as
   those of a GRPO batch, share the path, whatever their depths: one chain of latent steps serves them all.
3. `run_latent_steps` calls the backbone once for the prompts and once for each latent step but the last, which reads
   a slot of every path. Depths may differ: steps are aligned at their end, and a path that has not begun is masked.
4. `read_tokens` calls the backbone once more, for the last latent slots together with the answers. The attention mask
   separates the paths of a tree and the answers of a path, and hides the steps after the depth of an answer. A tree
   has one copy of the trunk's keys.
5. `_read_branches` puts every hidden state back into the column of its token.

Keys and values are in append-only linked blocks (`LinkedCache`), so gradient checkpointing can replay a layer, and a
latent step keeps no copy of the prompt's keys.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .batching_lasar import BatchLayout, PrefixTrees, ReasoningState
from .cache_lasar import LinkedCache
from .configuration_lasar import LasarConfig
from .static_lasar import StaticCache


@dataclass
class LasarModelOutput(ModelOutput):
    """
    Output of [`LasarModel`].

    Args:
        last_hidden_state (`torch.Tensor` of shape `(B, L, H)`):
            Final hidden states of the tokens, `h_t` at the t-th latent slot, zero at padding.
        past_key_values ([`~transformers.Cache`], *optional*):
            Keys and values in the columns of `input_ids`, if `use_cache` is set.
        latent_states (`torch.Tensor` of shape `(B, 1 + max N, H)`, *optional*):
            `h_0 … h_N` of each sequence, zero after its depth.
        latent_steps (`torch.Tensor` of shape `(B,)`, *optional*):
            Depth `N` of each sequence.
        depth_logits (`torch.Tensor` of shape `(B, C)`, *optional*):
            Logits of the policy head on `h_0`; class `k` means `k + min_latent_steps` steps.
    """

    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    latent_states: torch.Tensor | None = None
    latent_steps: torch.Tensor | None = None
    depth_logits: torch.Tensor | None = None


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
                "use_reentrant is True, but the latent loop cannot run under reentrant gradient checkpointing. Pass "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """
        As [`~transformers.PreTrainedModel.resize_token_embeddings`]. Semantic-ID and control tokens keep their ids; a
        `ValueError` refuses a size without them.
        """
        config = self.config
        last_sid = config.sid_token_id(config.num_sid_levels - 1, config.codebook_size - 1)
        last = max(last_sid, config.latent_start_token_id, config.latent_token_id, config.latent_end_token_id)
        if new_num_tokens is not None and new_num_tokens <= last:
            raise ValueError(
                f"new_num_tokens is {new_num_tokens}, but the last of the Semantic-ID and control tokens is {last}. "
                f"Keep at least {last + 1} tokens."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


class DepthPolicyHead(nn.Module):
    """
    Policy over the number of latent steps (LASAR, arXiv 2605.10207). With `k` the class and `N = k + 1` the steps (or
    `N = k` with `min_latent_steps=0`, which is not in the paper),

        π(N | h_0) = softmax(W_2 tanh(W_1 h_0 + b_1) + b_2)_k

    The module returns the logits `(B, C)` of the `C` classes, before the softmax, of `h_0` `(B, H)`.
    """

    def __init__(self, hidden_size: int, num_depths: int):
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, num_depths)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(torch.tanh(self.dense(hidden_states)))


class LatentInput(nn.Module):
    """
    Input of a latent slot from the state before it (not in the paper, which feeds back `h_{t-1}` itself):

        LayerNorm(h_{t-1} + h_0) + e_t,    t = 1 … N_max

    so that the slots' inputs are on the scale of the embeddings, remember `h_0`, and know their step. The module takes
    `h_{t-1}` and `h_0` `(B, H)` and `t - 1` `(B,)`, and returns the inputs `(B, H)`.
    """

    def __init__(self, hidden_size: int, max_latent_steps: int):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.step = nn.Embedding(max_latent_steps, hidden_size)

    def forward(self, states: torch.Tensor, start_states: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        return self.norm(states + start_states) + self.step(step)


def most_likely_depth(depth_logits: torch.Tensor, min_latent_steps: int = 1) -> torch.Tensor:
    """Most likely numbers of latent steps `(B,)` under the policy head's logits `(B, C)`."""
    if depth_logits.isnan().any():
        raise ValueError(
            "The policy head's logits contain NaN. Check the weights and the data type (bfloat16 or float32), or pass "
            "latent_steps."
        )
    return depth_logits.argmax(dim=-1) + min_latent_steps


def sampled_depth(depth_logits: torch.Tensor, min_latent_steps: int = 1) -> torch.Tensor:
    """Numbers of latent steps `(B,)` sampled from the policy `π(· | h_0)` with logits `(B, C)`."""
    return torch.multinomial(depth_logits.float().softmax(dim=-1), 1)[:, 0] + min_latent_steps


def check_backbone(backbone: PreTrainedModel) -> None:
    """Refuse backbones that cannot read a prompt, its latent slots and its branches in separate calls."""
    config, name = backbone.config, type(backbone).__name__
    layer_types = set(getattr(config, "layer_types", None) or [])
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    sparse = getattr(config, "keep_window_size", None) is not None  # Doge keeps that number of keys
    if "sliding_attention" in layer_types or (sliding and not layer_types) or sparse:
        raise ValueError(
            f"{name} has sliding-window or sparse attention, so the answer could not see the whole prompt. Use a "
            "backbone with full attention in every layer, such as Qwen3 or Llama."
        )
    if config.is_encoder_decoder or layer_types - {"full_attention"} or not backbone._supports_attention_backend:
        raise ValueError(
            f"{name} is not supported; expected a decoder-only backbone with full attention in every layer, such as "
            "Qwen3 or Llama."
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        raise ValueError(
            f"{name} has rope_type 'longrope', whose frequencies depend on the longest sequence of a batch, so prompt "
            "and answer could disagree. Use a backbone with other positions, such as Qwen3 or Llama."
        )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{name} has output_router_logits=True, but LASAR's losses have no term for the router. Set "
            "output_router_logits to False in the backbone's configuration."
        )
    # A configuration of several models (text and images) has no hidden_size of its own.
    width, hidden_size = backbone.get_input_embeddings().embedding_dim, getattr(config, "hidden_size", None)
    if width != hidden_size:
        raise ValueError(
            f"{name} has token embeddings of size {width} and a hidden_size of {hidden_size}; expected equal sizes, "
            "since hidden states are the inputs of latent slots. Use a backbone such as Qwen3 or Llama."
        )


def _additive_mask(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(T, Q, keys)` as `(T, 1, Q, keys)`. Eager attention needs this form, and SDPA would make one per layer."""
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]


class LasarModel(LasarPreTrainedModel):
    """
    Backbone with the latent loop and the depth policy head.

    With `X` a prompt that ends in `<|latent_start|>` and `E_X` its embeddings, the states of `N` latent steps are
    (LASAR, arXiv 2605.10207)

        h_0 = f(X),    h_t = f([E_X, h_0, …, h_{t-1}]),    t = 1 … N

    `h_0` is the backbone's last hidden state at `<|latent_start|>`. The t-th `<|latent|>` slot has `h_{t-1}` as its
    input instead of a token embedding, or another input that `config.latent_input` names. The tokens after the slots
    are ordinary tokens over the same keys and values, and gradients flow through all steps.

    Args:
        config ([`LasarConfig`]):
            Configuration.

    Raises:
        `ValueError`: if the backbone has sliding-window, sparse, recurrent or encoder-decoder layers, returns router
        logits, or has token embeddings that are not of its hidden size, or the configuration lacks a token id.
    """

    def __init__(self, config: LasarConfig):
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        self.prepare_backbone()
        config.check_token_ids()
        self.policy_head = DepthPolicyHead(config.hidden_size, config.num_depths)
        if config.latent_input == "normalized":
            self.latent_input = LatentInput(config.hidden_size, config.max_latent_steps)
        self.share_prefixes = True  # prompts that share a prefix are read once
        self.detach_policy = False  # no gradient from the policy head into the backbone
        self.post_init()

    def prepare_backbone(self) -> None:
        """Check the backbone and set what depends on it; called again when it is replaced."""
        check_backbone(self.backbone)
        self._no_split_modules = self.backbone._no_split_modules
        for module in self.backbone.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._can_checkpoint_with_cache = True  # safe with LinkedCache, see its docstring

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
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
            raise ValueError("output_attentions and output_hidden_states are not supported by LasarModel.")
        if kwargs.pop("inputs_embeds", None) is not None:  # PEFT passes None
            raise ValueError("inputs_embeds is not supported: LasarModel finds the latent slots in input_ids.")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._continue(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

        # 1. Cut the sequences into prompt, latent slots and answer, and find the prompts that share a prefix.
        layout = BatchLayout(input_ids, attention_mask, self.config)
        trees = PrefixTrees(layout, self.config.hidden_size, self.share_prefixes)
        max_depth, is_shared = self._agree(layout.max_depth, trees.num_trees < len(input_ids))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.backbone_config)
        if max_depth == 0 and not is_shared:
            return self._read_plain(layout, attention_mask, past_key_values, use_cache, **kwargs)

        # 2. Read one trunk per tree and take the latent steps of its paths.
        token_ids, visible = trees.prompts(layout)  # (T, P + R), (U, P + R)
        state = self.run_latent_steps(token_ids, visible, trees.depth, max_depth, **kwargs)

        # 3. Read the answers, and put every hidden state back into the column of its token.
        hidden_states, key_index = self._read_branches(state, layout, trees, **kwargs)  # (B, L, H), (B, L)
        if use_cache:
            self._fill_cache(past_key_values, state, trees.path // trees.num_paths, key_index)
        return LasarModelOutput(
            last_hidden_state=self._connect_latent_input(hidden_states, max_depth),
            past_key_values=past_key_values if use_cache else None,
            latent_states=self._latent_states(state, layout, trees),
            latent_steps=layout.depth,
            depth_logits=state.depth_logits[trees.path],
        )

    def _latent_states(self, state: ReasoningState, layout: BatchLayout, trees: PrefixTrees) -> torch.Tensor:
        """`h_0 … h_N` of each sequence, `(B, 1 + max N, H)`, zero after its depth."""
        # Cut to the depths of this batch: with sharded parameters, another process may have deeper prompts.
        states = state.latent_states()[trees.path, : 1 + layout.max_depth]
        steps = torch.arange(states.shape[1], device=states.device)  # (1 + max N,)
        return states.masked_fill((steps > layout.depth[:, None])[..., None], 0)

    def _continue(self, input_ids, attention_mask, position_ids, past_key_values, **kwargs) -> LasarModelOutput:
        if (input_ids == self.config.latent_token_id).any():
            raise ValueError(
                "input_ids has <|latent|> slots after a cached prefix. Pass the prompt and its slots together."
            )
        if position_ids is None and attention_mask is not None:
            # Padding is not counted, as in the first pass. A backbone would count it.
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
            **kwargs,
        )
        return LasarModelOutput(outputs.last_hidden_state, past_key_values)

    def _agree(self, max_depth: int, is_shared: bool) -> tuple[int, bool]:
        """
        Maximum of `max_depth` and `is_shared` over the processes. With sharded parameters every call of the backbone
        is a collective operation, so all processes must make the same number of calls.
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return max_depth, is_shared
        # FSDP2 is detected by its modules, since the weights look unsharded inside a forward pass.
        is_fsdp = any(isinstance(part, FSDPModule) for part in self.backbone.modules())
        if not is_fsdp and not is_deepspeed_zero3_enabled():
            return max_depth, is_shared
        plan = torch.tensor([max_depth, int(is_shared)], device=self.policy_head.dense.weight.device)
        dist.all_reduce(plan, op=dist.ReduceOp.MAX)
        return int(plan[0]), bool(plan[1])

    def _read_plain(self, layout: BatchLayout, attention_mask, past_key_values, use_cache, **kwargs):
        """Read a batch without latent slots or equal prompts in one ordinary pass. Returns [`LasarModelOutput`]."""
        outputs = self.backbone(
            input_ids=layout.input_ids,
            attention_mask=attention_mask,
            position_ids=layout.position.clamp(min=0),
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state.masked_fill(~layout.valid[..., None], 0)
        start = layout.last_prompt_column()[..., None].expand(-1, -1, hidden_states.shape[-1])
        start_states = hidden_states.gather(1, start)  # (B, 1, H)
        return LasarModelOutput(
            last_hidden_state=self._connect_latent_input(hidden_states, max_depth=0),
            past_key_values=past_key_values if use_cache else None,
            latent_states=start_states,
            latent_steps=layout.depth,
            depth_logits=self._depth_logits(start_states[:, 0]),
        )

    def _depth_logits(self, start_states: torch.Tensor) -> torch.Tensor:
        """Logits `(U, C)` of the policy on `h_0` `(U, H)`."""
        return self.policy_head(start_states.detach() if self.detach_policy else start_states)

    def _connect_latent_input(self, hidden_states: torch.Tensor, max_depth: int) -> torch.Tensor:
        """Weights that a batch without latent slots does not use get a gradient of 0, for which DDP waits."""
        if max_depth > 0 or self.config.latent_input != "normalized":
            return hidden_states
        return hidden_states + 0 * sum(weight.sum() for weight in self.latent_input.parameters())

    def run_latent_steps(
        self,
        token_ids: torch.LongTensor,
        visible: torch.Tensor,
        depths: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
        max_depth: int | None = None,
        static_cache: StaticCache | None = None,
        **kwargs,
    ) -> ReasoningState:
        """
        Read prompts and take all their latent steps but the last, which [`~LasarModel.read_tokens`] reads together
        with the next tokens to save a call of the backbone.

        `token_ids` `(T, P + R)` are left-padded trunks and the last prompt tokens of their paths. `visible`
        `(U, P + R)` says which of them a path sees, the last path of a tree all of its trunk. With one path per tree
        they are left-padded prompts and their mask. `depths` are the latent steps `(U,)`, or a function from the
        policy head's logits `(U, C)` to them. `max_depth` is the number of iterations, larger than all depths if
        another process has deeper prompts. With a `static_cache`, all calls have the fixed shapes of its bucket.
        """
        implementation = self.backbone.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                f"attn_implementation is {implementation!r}, but latent steps need an explicit attention mask. Load "
                "the model with attn_implementation='sdpa'."
            )
        # 1. Read the prompts: hidden_states (T, P + R, H).
        num_paths = len(visible) // len(token_ids)  # R
        cache: LinkedCache | StaticCache = LinkedCache(self.config.backbone_config.num_hidden_layers)
        attention_mask, position_ids = visible.long(), (visible.cumsum(dim=1) - 1).clamp(min=0)  # (T, P + 1)
        if num_paths > 1:
            # A trunk token sees the tokens before it, and the last token of a prompt those of its path.
            by_tree = visible.unflatten(0, (-1, num_paths))  # (T, R, P + R)
            causal = torch.ones(token_ids.shape[1:] * 2, dtype=torch.bool, device=token_ids.device).tril()
            mask = torch.cat([by_tree[:, -1:] & causal[:-num_paths], by_tree], dim=1)  # (T, P + R, P + R)
            attention_mask = _additive_mask(mask, self.backbone.dtype)
            position_ids = (mask.sum(dim=-1) - 1).clamp(min=0)  # (T, P + R)
        if static_cache is not None:
            cache = static_cache
            causal = torch.ones(token_ids.shape[1:] * 2, dtype=torch.bool, device=token_ids.device).tril()
            mask = _additive_mask(visible[:, None] & causal, self.backbone.dtype)
            hidden_states = cache.read(self.get_input_embeddings()(token_ids), mask, position_ids)
        else:
            hidden_states = self.backbone(
                input_ids=token_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=False,
                **kwargs,
            ).last_hidden_state
        # 2. Choose the depths from h_0.
        start_states = hidden_states[:, -num_paths:].flatten(0, 1)  # (U, H), h_0
        depth_logits = self._depth_logits(start_states)  # (U, C)
        if callable(depths):
            depths = depths(depth_logits)
        if max_depth is None:
            max_depth = self._agree(int(depths.max()), is_shared=False)[0]
        state = ReasoningState(
            hidden_states=hidden_states,
            depth_logits=depth_logits,
            depths=depths,
            cache=cache,
            visible=visible,
            position=visible.sum(dim=1),
            slot=None,
            slot_states=[],
            num_paths=num_paths,
        )
        # 3. Steps are aligned at their end: a path of depth N begins in iteration max_depth - N.
        own_slot = torch.eye(num_paths, dtype=torch.bool, device=visible.device).repeat(len(token_ids), 1)  # (U, R)
        for step in range(max_depth):
            remaining = max_depth - step
            states = start_states
            if step > 0:
                # Read the slots by themselves: h_t = f([E_X, h_0, …, h_{t-1}]).
                outputs = self._read_slots(state, **kwargs)  # (U, H)
                # The state before the next slot is this output, or h_0 where a path begins.
                states = torch.where((depths == remaining)[:, None], start_states, outputs)  # (U, H)
            state.slot = self._slot_inputs(states, start_states, (depths - remaining).clamp(min=0))  # (U, H)
            # Paths that have not begun neither see the slot nor advance their position.
            is_active = depths >= remaining  # (U,)
            state.visible = torch.cat([state.visible, own_slot & is_active[:, None]], dim=1)
            state.position = state.position + is_active
        return state

    def _slot_inputs(self, states: torch.Tensor, start_states: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """Inputs `(U, H)` of the next slots, from the states before them, `h_0` and their steps, counted from 0."""
        if self.config.latent_input == "normalized":
            return self.latent_input(states, start_states, step)
        if self.config.latent_input == "pause":
            return self.get_input_embeddings()(torch.full_like(step, self.config.latent_token_id))
        return states

    def _read_slots(self, state: ReasoningState, **kwargs) -> torch.Tensor:
        """Read the latest latent slot of every path. Returns the states `(U, H)`."""
        parts = state.slot, (state.position - 1).clamp(min=0), state.visible
        embeds, position, visible = (part.unflatten(0, (-1, state.num_paths)) for part in parts)  # (T, R, …)
        outputs, state.cache = self._extend(state.cache, embeds, position, visible, **kwargs)
        state.slot_states.append(outputs.flatten(0, 1))
        return state.slot_states[-1]

    def read_tokens(
        self,
        state: ReasoningState,
        token_ids: torch.LongTensor,
        visible: torch.Tensor,
        depths: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """
        Read tokens `(U, Q)` after the latent region, several branches side by side, and append them to the state.
        Returns their final hidden states `(U, Q, H)`.

        Each token sees the prompt and the latent slots of its path, or the first `depths` `(U, Q)` of these slots.
        `visible` `(U, Q, C + Q)` says which of the `C` tokens read before and of these `Q` it sees in addition: its
        ancestors and itself. Their number gives its position.
        """
        # 1. Every token sees the prompt and the slots (S keys), then its ancestors and itself.
        num_paths = state.num_paths
        embeds = self.get_input_embeddings()(token_ids)  # (U, Q, H)
        positions = state.position[:, None] + visible.sum(dim=-1) - 1  # (U, Q)
        prompt_visible = state.visible[:, None].expand(-1, token_ids.shape[1], -1)  # (U, Q, S)
        if depths is not None:
            # The last slots of the path are those of the last iterations.
            skipped = state.depths[:, None] - depths  # (U, Q)
            from_end = torch.arange(state.visible.shape[1], 0, -1, device=skipped.device)  # (S,), 1 for the last key
            prompt_visible = prompt_visible & (from_end > num_paths * skipped[..., None])  # (U, Q, S)
            positions = positions - skipped
        mask = torch.cat([prompt_visible, state.keys_of_tokens(visible)], dim=-1)  # (U, Q, S + R · (C + Q))
        state.num_read.append(token_ids.shape[1])
        # The tokens of all paths of a tree are one sequence.
        parts = (part.unflatten(0, (-1, num_paths)).flatten(1, 2) for part in (embeds, positions, mask))
        embeds, positions, mask = parts  # (T, R · Q, …)

        # 2. Read the last latent slots in the same call, as first tokens that do not see the others.
        if state.slot is not None:
            slots = state.slot.unflatten(0, (-1, num_paths)).to(embeds.dtype)  # (T, R, H)
            slot_positions = (state.position - 1).clamp(min=0).view(-1, num_paths)  # (T, R)
            slot_mask = state.visible.unflatten(0, (-1, num_paths))  # (T, R, S)
            slot_mask = nn.functional.pad(slot_mask, (0, mask.shape[-1] - slot_mask.shape[-1]))
            embeds, positions = torch.cat([slots, embeds], dim=1), torch.cat([slot_positions, positions], dim=1)
            mask = torch.cat([slot_mask, mask], dim=1)
        outputs, state.cache = self._extend(state.cache, embeds, positions, mask, **kwargs)
        if state.slot is not None:
            state.slot_states.append(outputs[:, :num_paths].flatten(0, 1))
            state.slot, outputs = None, outputs[:, num_paths:]
        return outputs.unflatten(1, (num_paths, -1)).flatten(0, 1)

    def _extend(self, cache, inputs_embeds, position_ids, visible, **kwargs):
        """
        One call of the backbone on top of a cache, with an explicit mask `(T, Q, keys)`. Returns outputs and cache.
        """
        mask = _additive_mask(visible, inputs_embeds.dtype)
        if isinstance(cache, StaticCache):
            return cache.read(inputs_embeds, mask, position_ids), cache
        block = LinkedCache(len(cache.layers), parent=cache)
        with block.keeping_blocks():
            outputs = self.backbone(
                inputs_embeds=inputs_embeds,
                attention_mask=mask,
                position_ids=position_ids,
                past_key_values=block,
                use_cache=False,
                **kwargs,
            )
        return outputs.last_hidden_state, block

    def _read_branches(self, state: ReasoningState, layout: BatchLayout, trees: PrefixTrees, **kwargs):
        """
        Read the answers as branches of their paths. Returns the hidden states `(B, L, H)` of all tokens and the index
        `(B, L)` of each token among the keys of its tree.
        """
        # 1. Answers by path and branch, `W` branches of `A` tokens side by side.
        answers, width, num_branches = layout.answers(), layout.max_answer, trees.num_branches
        token_ids = answers.new_zeros(len(trees.member), num_branches, width)  # (U, W, A)
        token_ids[trees.path, trees.branch] = answers
        # A token sees the tokens of its own branch up to itself: a block-diagonal causal mask.
        causal = torch.ones(width, width, dtype=torch.bool, device=answers.device).tril()
        same_branch = torch.eye(num_branches, dtype=torch.bool, device=answers.device)
        visible = torch.kron(same_branch, causal).expand(len(trees.member), -1, -1)  # (U, W · A, W · A)
        depths = trees.depth[:, None].repeat(1, num_branches)  # (U, W)
        depths[trees.path, trees.branch] = layout.depth
        depths = depths.repeat_interleave(width, dim=1)  # (U, W · A)
        branch_states = self.read_tokens(state, token_ids.flatten(1), visible, depths, **kwargs)  # (U, W · A, H)

        # 2. All hidden states of a tree, in the order of its keys: trunk, starts, slots of each step, branches.
        num_paths, num_slots = trees.num_paths, len(state.slot_states)
        shape = trees.num_trees, -1, branch_states.shape[-1]
        parts = [part.reshape(shape) for part in (*state.slot_states, branch_states)]
        states = torch.cat([state.hidden_states, *parts], dim=1)  # (T, P + R + R · max N + R · W · A, H)

        # 3. The index of each token among them, from its position after the body of its prompt.
        tree, path = trees.path // num_paths, trees.path % num_paths  # (B,)
        body_length = layout.prompt_length - 1  # (B,)
        offset = layout.position - body_length[:, None]  # (B, L): 0 for the last prompt token, then slots, then answer
        trunk_padding = layout.max_prompt - layout.prompt_length[trees.longest][tree]  # (B,)
        in_trunk = layout.position + trunk_padding[:, None]  # (B, L)
        # Slots are aligned at the last step of the path. An answer comes after the branches before it.
        step = torch.where(offset > 0, offset + (num_slots - trees.depth[trees.path])[:, None], 0)  # (B, L)
        in_path = layout.max_prompt - 1 + step * num_paths + path[:, None]
        branch = trees.branch + num_branches * path  # (B,)
        in_answer = layout.max_prompt - 1 + (1 + num_slots) * num_paths + (branch * width)[:, None]
        in_answer = in_answer + offset - layout.depth[:, None] - 1
        key_index = torch.where(offset < 0, in_trunk, torch.where(offset <= layout.depth[:, None], in_path, in_answer))
        key_index = torch.where(layout.valid, key_index, 0)

        # 4. Gather, with zeros at padding.
        flat = (tree[:, None] * states.shape[1] + key_index).flatten()
        hidden_states = states.flatten(0, 1).index_select(0, flat).view(*key_index.shape, -1)
        return hidden_states.masked_fill(~layout.valid[..., None], 0), key_index

    def _fill_cache(self, past_key_values: Cache, state: ReasoningState, tree, key_index: torch.Tensor) -> None:
        """Copy the keys and values to an ordinary cache, in the columns of `input_ids`."""
        for layer_index, layer in enumerate(state.cache.layers):
            keys, values = (
                states[tree].gather(2, key_index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
                for states in layer.states()
            )
            past_key_values.update(keys, values, layer_index)
