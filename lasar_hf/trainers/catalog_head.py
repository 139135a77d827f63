"""The catalogue-normalised head under TRL's protocol: TRL's trainers score items by the one policy distribution.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` and read per-token log-probabilities. Giving a
model this head in the place of TRL's own makes both trainers, their losses and their metrics use the distribution of
decoding_lasar: SID tokens are normalised over the codes that continue some item, text tokens over the vocabulary.
"""

import types

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx, selective_log_softmax_and_entropy

from ..model.catalog_lasar import SidCatalog
from ..model.decoding_lasar import child_log_probs
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.trie_lasar import SidTrie


def add_catalog_head(model: LasarForGenerativeRec, catalog: SidCatalog, temperature: float = 1.0) -> None:
    """
    Let `model(..., labels=labels, fused_lm_head=True)` score SID labels over the catalogue (METHOD.md 3).

    The call returns TRL's `FusedCausalLMOutput` with `log_probs`, `entropy`, `is_top1` and `label_mask` of shape
    `(B, L - 1)`, zero where the label is -100. Every other call is the model's own forward.

    Args:
        model ([`LasarForGenerativeRec`]):
            Model to patch; a head added before, by TRL for instance, is replaced.
        catalog ([`SidCatalog`]):
            The items.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.

    Raises:
        `ValueError`: if the catalogue does not match the model and, later on, if a label is no item of the catalogue.
    """
    catalog.check_matches(model.config.num_sid_levels, model.config.codebook_size)

    def forward(self, input_ids, attention_mask=None, labels=None, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return type(self).forward(self, input_ids, attention_mask, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        hidden_states = self.model(input_ids, attention_mask, **kwargs).last_hidden_state
        return score_labels(self, hidden_states, input_ids, labels, catalog.trie(input_ids.device), temperature)

    model.forward = types.MethodType(forward, model)


def score_labels(
    model: LasarForGenerativeRec,
    hidden_states: torch.Tensor,
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    trie: SidTrie,
    temperature: float = 1.0,
) -> FusedCausalLMOutput:
    """
    Score next-token labels: SID tokens over the children of their prefix, other tokens over the vocabulary.

    Args:
        model ([`LasarForGenerativeRec`]):
            Model whose head scores.
        hidden_states (`torch.Tensor` of shape `(B, L, H)`):
            Final hidden states.
        input_ids (`torch.Tensor` of shape `(B, L)`):
            Tokens; the codes before a SID label are read from here.
        labels (`torch.Tensor` of shape `(B, L)`):
            Labels, not shifted, -100 where there is nothing to score.
        trie ([`SidTrie`]):
            Trie of the catalogue.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.

    Returns:
        `FusedCausalLMOutput`: `log_probs`, `entropy`, `is_top1` and `label_mask`, `(B, L - 1)`, float32, and `loss`,
        the mean negative log-probability.

    Raises:
        `ValueError`: if the codes of a label continue no item.
    """
    config = model.config
    targets = labels[:, 1:]
    label_mask = targets != -100
    sid = targets - config.sid_token_offset
    is_sid = label_mask & (sid >= 0) & (sid < config.num_sid_tokens)
    level_of = torch.where(is_sid, sid // config.codebook_size, -1)

    scores = [hidden_states.new_zeros(targets.shape, dtype=torch.float32) for _ in range(3)]
    weight = model.lm_head.weight
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    with maybe_gather_lm_head_ctx(weight):
        for level in range(config.num_sid_levels):
            places = (level_of == level).nonzero(as_tuple=True)
            start = config.sid_token_id(level, 0)
            rows = slice(start, start + config.codebook_size)
            head = weight[rows], None
            nodes = _prefix_nodes(input_ids, places, level, trie, config)
            codes = sid[places] - level * config.codebook_size
            part = _score_level(hidden_states[places], head, trie, level, nodes, codes, temperature)
            scores = [whole.index_put(places, values) for whole, values in zip(scores, part, strict=True)]
        places = (label_mask & ~is_sid).nonzero(as_tuple=True)
        if len(places[0]):
            logits = nn.functional.linear(hidden_states[places], weight).float() / temperature
            log_probs, entropy = selective_log_softmax_and_entropy(logits, targets[places])
            is_top1 = (logits.argmax(dim=-1) == targets[places]).float()
            part = (log_probs, entropy, is_top1)
            scores = [whole.index_put(places, values) for whole, values in zip(scores, part, strict=True)]
    log_probs, entropy, is_top1 = scores
    # Connects a batch without labels to the graph, so that it contributes a differentiable zero.
    log_probs = log_probs + 0 * hidden_states[:, :1, 0]
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / label_mask.sum().clamp(min=1),
        log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=label_mask,
    )


def _prefix_nodes(input_ids: torch.Tensor, places, level: int, trie: SidTrie, config) -> torch.Tensor:
    """Trie nodes `(n,)` of the codes that stand before each place, -1 where they begin no item."""
    row, column = places
    nodes = torch.zeros_like(row)
    for depth in range(level):
        token = input_ids[row, (column - (level - 1) + depth).clamp(min=0)]
        nodes = trie.descend(depth, nodes, token - config.sid_token_id(depth, 0))
    return nodes


def _score_level(hidden_states, head, trie: SidTrie, level: int, nodes, target_codes, temperature: float):
    """Log-probability, entropy and top-1 hit `(n,)` of each label among the children of its node."""
    log_probs, codes, child = child_log_probs(hidden_states, head, trie, level, nodes.clamp(min=0), temperature)
    is_target = (codes == target_codes[:, None]) & (child >= 0) & (nodes >= 0)[:, None]
    if not is_target.any(dim=1).all():
        bad = int((~is_target.any(dim=1)).nonzero()[0])
        raise ValueError(
            f"A label has code {int(target_codes[bad])} at level {level}, but no item of the catalogue continues so: "
            "the training rows and the catalogue must come from the same Semantic IDs."
        )
    target = log_probs.gather(1, is_target.float().argmax(dim=1, keepdim=True))[:, 0]
    with torch.no_grad():
        is_top1 = (target >= log_probs.max(dim=1).values).float()
    finite = log_probs.masked_fill(child < 0, 0)
    entropy = -(finite.exp() * finite).masked_fill(child < 0, 0).sum(dim=1)
    return target, entropy, is_top1
