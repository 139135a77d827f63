"""The catalogue-normalised head under TRL's protocol: TRL's trainers score items by the distribution of decoding.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` and read log-probabilities per token. With this
head in the place of TRL's own, their losses and metrics use the distribution of decoding_lasar: Semantic IDs (SIDs)
are normalised over the codes that continue an item, text tokens over the vocabulary.
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
    Let `model(..., labels=labels, fused_lm_head=True)` score SID labels over the catalogue, see [`score_labels`].

    Every other call is the model's own forward.

    Args:
        model ([`LasarForGenerativeRec`]):
            Model to patch. A head that TRL added before is replaced.
        catalog ([`SidCatalog`]):
            The items.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.

    Raises:
        `ValueError`: if the catalogue does not match the model or, in a forward, a label is not in the catalogue.
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
    Score next-token labels: a SID code among the codes that continue an item, other tokens over the vocabulary.

        p(c_l | X, c_<l) = softmax over { c : the prefix c_<l followed by c begins the SID of an item }

    The paper (LASAR, arXiv 2605.10207, stage 1) normalises SID tokens over the vocabulary instead.

    Args:
        model ([`LasarForGenerativeRec`]):
            Model whose head scores.
        hidden_states (`torch.Tensor` of shape `(B, L, H)`):
            Final hidden states.
        input_ids, labels (`torch.Tensor` of shape `(B, L)`):
            Tokens, and labels that are not shifted, -100 where nothing is scored.
        trie ([`SidTrie`]):
            Trie of the catalogue.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.

    Returns:
        `FusedCausalLMOutput`: `log_probs`, `entropy`, `is_top1` and `label_mask` of shape `(B, L - 1)`, zero where the
        label is -100, and `loss`, the mean negative log-probability.

    Raises:
        `ValueError`: if a label does not continue an item of the catalogue.
    """
    # 1. The level of each SID label, -1 for text. Position p of targets is predicted by hidden state p.
    config = model.config
    targets = labels[:, 1:]  # (B, L - 1)
    label_mask = targets != -100  # (B, L - 1)
    sid = targets - config.sid_token_offset  # (B, L - 1), level · K + code
    is_sid = label_mask & (sid >= 0) & (sid < config.num_sid_tokens)  # (B, L - 1)
    level_of = torch.where(is_sid, sid // config.codebook_size, -1)  # (B, L - 1)

    log_probs, entropy, is_top1 = (hidden_states.new_zeros(targets.shape, dtype=torch.float32) for _ in range(3))
    weight = model.lm_head.weight  # (V, H)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    with maybe_gather_lm_head_ctx(weight):
        # 2. SID labels, level by level, with that level's K rows of the head: n labels are scored at once.
        for level in range(config.num_sid_levels):
            index = (level_of == level).nonzero(as_tuple=True)  # 2 × (n,)
            first = config.sid_token_id(level, 0)
            head = weight[first : first + config.codebook_size]  # (K, H)
            nodes = _prefix_nodes(input_ids, index, level, trie, config)  # (n,)
            codes = sid[index] - level * config.codebook_size  # (n,)
            scores = _score_level(hidden_states[index], head, trie, level, nodes, codes, temperature)
            log_probs, entropy, is_top1 = _write((log_probs, entropy, is_top1), index, scores)

        # 3. Text labels, with the whole head.
        index = (label_mask & ~is_sid).nonzero(as_tuple=True)  # 2 × (n,)
        if len(index[0]):
            logits = nn.functional.linear(hidden_states[index], weight).float() / temperature  # (n, V)
            hits = (logits.argmax(dim=-1) == targets[index]).float()
            scores = (*selective_log_softmax_and_entropy(logits, targets[index]), hits)
            log_probs, entropy, is_top1 = _write((log_probs, entropy, is_top1), index, scores)

    # 4. Connect a batch without labels to the graph, so that it contributes a differentiable zero.
    log_probs = log_probs + 0 * hidden_states[:, :1, 0]
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / label_mask.sum().clamp(min=1),
        log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=label_mask,
    )


def _write(tensors, index, values):
    return [tensor.index_put(index, new) for tensor, new in zip(tensors, values, strict=True)]


def _prefix_nodes(input_ids: torch.Tensor, index, level: int, trie: SidTrie, config) -> torch.Tensor:
    """Trie node `(n,)` of the `level` codes up to each position, -1 if no item begins with them."""
    sequence, position = index
    nodes = torch.zeros_like(sequence)
    for i in range(level):
        tokens = input_ids[sequence, (position - (level - 1) + i).clamp(min=0)]  # (n,)
        nodes = trie.descend(i, nodes, tokens - config.sid_token_id(i, 0))  # (n,)
    return nodes


def _score_level(hidden_states, head, trie: SidTrie, level: int, nodes, target_codes, temperature: float):
    """Log-probability, entropy and top-1 hit `(n,)` of each label among the children of its node."""
    # 1. Distribution over the children of each node; C columns, child -1 where a node has fewer.
    log_probs, codes, child = child_log_probs(hidden_states, head, trie, level, nodes.clamp(min=0), temperature)
    # 2. The column of the label.
    is_target = (codes == target_codes[:, None]) & (child >= 0) & (nodes >= 0)[:, None]  # (n, C)
    is_unknown = ~is_target.any(dim=1)  # (n,)
    if is_unknown.any():
        code = int(target_codes[is_unknown][0])
        raise ValueError(
            f"labels contain code {code} at level {level}, which does not continue an item of the catalogue. Make the "
            "training examples and the catalogue from the same Semantic IDs."
        )
    target = log_probs.gather(1, is_target.float().argmax(dim=1, keepdim=True))[:, 0]  # (n,)
    # 3. Metrics over the existing children.
    with torch.no_grad():
        is_top1 = (target >= log_probs.max(dim=1).values).float()
    finite = log_probs.masked_fill(child < 0, 0)  # (n, C)
    entropy = -(finite.exp() * finite).masked_fill(child < 0, 0).sum(dim=1)
    return target, entropy, is_top1
