"""The trunk of LASAR: a backbone with the latent loop (METHOD.md 2) and the depth policy head.

The loop lives here, under the head, so that whatever calls the trunk (TRL's fused heads, PEFT, `generate`) gets it.
The rows of a batch are cut at `<|latent_start|>` into a prompt, `N` latent slots and an answer, and the backbone runs
once for the prompts, once for each latent step and once for the answers:

* Rows with equal prompt and depth run prompt and latent steps once; their answers are branches of one row, told apart
  by the attention mask. A GRPO batch pays for a prompt once, however often it is repeated.
* Depths may differ. Short chains are aligned at their end: a row whose chain has not begun is masked, and the last
  slot of every row is read together with the answers, which saves one pass a sample.
* Keys and values live in linked segments that only ever append, so that gradient checkpointing can replay a layer
  without harm, and a latent step never owns a copy of the prompt's keys.
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

from .batching_lasar import BatchLayout, PromptGroups, ReasoningState, valid_tokens
from .cache_lasar import LinkedCache
from .configuration_lasar import LasarConfig


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
    """Latent steps `(B,)` that the policy head finds most likely, from its logits `(B, N_max)`; NaN is an error."""
    if depth_logits.isnan().any():
        raise ValueError(
            "The policy head's logits hold NaN: check the weights and the data type (bfloat16 or float32), or pass "
            "latent_steps."
        )
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
            f"{name} has sliding-window attention, whose window would cut the prompt off from the answer: use a "
            "backbone with full attention in every layer, such as Qwen3 or Llama."
        )
    if config.is_encoder_decoder or layer_types - {"full_attention"} or not backbone._supports_attention_backend:
        raise ValueError(
            f"{name} is not a decoder-only model with full attention in every layer: use one, such as Qwen3 or Llama."
        )


class LasarModel(LasarPreTrainedModel):
    """
    Backbone with the latent loop and the depth policy head.

    `h_0` is the backbone's last hidden state at `<|latent_start|>`. The input of the t-th `<|latent|>` slot is not
    looked up: it is `h_{t-1}`, and the output there is `h_t`. What follows the slots is read as ordinary tokens over
    the same keys and values, and gradients flow through the whole chain (METHOD.md 2).

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
        if kwargs.pop("inputs_embeds", None) is not None:  # PEFT passes None
            raise ValueError("LasarModel finds the latent slots in token ids: pass input_ids, not inputs_embeds.")
        if past_key_values is not None and past_key_values.get_seq_length() > 0:
            return self._continue(input_ids, attention_mask, position_ids, past_key_values, **kwargs)

        layout = BatchLayout(input_ids, valid_tokens(input_ids, attention_mask), self.config)
        prompt_ids, prompt_mask = layout.prompts()
        groups = PromptGroups(prompt_ids, prompt_mask, layout.depth, layout.max_answer, self.share_prefixes)
        is_shared = groups.num_groups < len(input_ids)
        max_depth, is_shared = self._agree(layout.max_depth, is_shared)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config.backbone_config)
        if max_depth == 0 and not is_shared:
            return self._read_plain(layout, attention_mask, past_key_values, use_cache, **kwargs)

        first = groups.first
        chain = self.run_latent_steps(prompt_ids[first], prompt_mask[first], layout.depth[first], max_depth, **kwargs)
        hidden_states, columns = self._read_branches(chain, layout, groups, **kwargs)
        if use_cache:
            self._fill_cache(past_key_values, chain, groups, columns)
        return LasarModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            # Other processes may reason longer: what is returned must not depend on them.
            latent_states=chain.latent_states()[groups.group, : 1 + layout.max_depth],
            latent_steps=layout.depth,
            depth_logits=chain.depth_logits[groups.group],
        )

    def _continue(self, input_ids, attention_mask, position_ids, past_key_values, **kwargs) -> LasarModelOutput:
        if (input_ids == self.config.latent_token_id).any():
            raise ValueError("<|latent|> slots cannot follow a cached prefix: pass the prompt and its slots together.")
        if position_ids is None and attention_mask is not None:
            # A backbone would count padding as positions, which the first pass did not.
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
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
        # FSDP2 is seen by its modules: inside a forward pass it shows whole weights.
        return is_deepspeed_zero3_enabled() or any(isinstance(part, FSDPModule) for part in self.backbone.modules())

    def _read_plain(
        self, layout: BatchLayout, attention_mask, past_key_values, use_cache, **kwargs
    ) -> LasarModelOutput:
        """No latent slot and no equal prompts: one ordinary pass."""
        outputs = self.backbone(
            input_ids=layout.input_ids, attention_mask=attention_mask, position_ids=layout.position.clamp(min=0),
            past_key_values=past_key_values, use_cache=bool(use_cache), **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        start = layout._columns().gather(1, (layout.prompt_length[:, None] - 1).clamp(min=0))
        start_states = hidden_states.gather(1, start[..., None].expand(-1, -1, hidden_states.shape[-1]))
        return LasarModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            latent_states=start_states,
            latent_steps=layout.depth,
            depth_logits=self.policy_head(start_states[:, 0]),
        )

    def run_latent_steps(
        self,
        prompt_ids: torch.LongTensor,
        prompt_mask: torch.Tensor,
        depths: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] = most_likely_depth,
        max_depth: int | None = None,
        **kwargs,
    ) -> ReasoningState:
        """
        Read prompts and take the latent steps, all but the last, which [`~LasarModel.read_tokens`] reads with the next
        tokens.

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
            [`ReasoningState`].

        Raises:
            `ValueError`: if the attention implementation takes no explicit mask.
        """
        implementation = self.backbone.config._attn_implementation
        if implementation not in ("sdpa", "eager"):
            raise ValueError(
                "Latent steps and branches need an explicit attention mask, which "
                f"{implementation!r} cannot take: load the model with attn_implementation='sdpa'."
            )
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
        chain = ReasoningState(
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

    def _take_step(self, chain: ReasoningState, **kwargs) -> None:
        """Read the pending slot by itself: `h_t = f([…, h_{t-1}])`."""
        slot = chain.slot[:, None]
        position = (chain.position - 1).clamp(min=0)[:, None]
        states, chain.cache = self._extend(chain.cache, slot, position, chain.visible[:, None], **kwargs)
        chain.slot_states.append(states[:, 0])

    def read_tokens(
        self, chain: ReasoningState, token_ids: torch.LongTensor, visible: torch.Tensor, **kwargs
    ) -> torch.Tensor:
        """
        Read tokens after the latent region, several branches side by side, and append them to the chain.

        Args:
            chain ([`ReasoningState`]):
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
        # Additive, since eager needs it so and SDPA would make, and keep, one of its own for every layer.
        mask = torch.zeros_like(visible, dtype=inputs_embeds.dtype).masked_fill(
            ~visible, torch.finfo(inputs_embeds.dtype).min
        )[:, None]
        segment = LinkedCache(len(cache.layers), parent=cache)
        with segment.keeping_blocks():
            outputs = self.backbone(
                inputs_embeds=inputs_embeds, attention_mask=mask, position_ids=position_ids, past_key_values=segment,
                use_cache=False, **kwargs,
            )
        return outputs.last_hidden_state, segment

    def _read_branches(self, chain: ReasoningState, layout: BatchLayout, groups: PromptGroups, **kwargs):
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
        branch_states = self.read_tokens(chain, token_ids, visible, **kwargs)

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

    def _fill_cache(
        self, past_key_values: Cache, chain: ReasoningState, groups: PromptGroups, columns: torch.Tensor
    ) -> None:
        """Hand the keys and values to an ordinary cache, in the columns of `input_ids`."""
        for index, layer in enumerate(chain.cache.layers):
            keys, values = (
                states[groups.group].gather(
                    2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
                )
                for states in layer.states()
            )
            past_key_values.update(keys, values, index)
