"""The catalogue-normalised head under TRL's protocol.

TRL's trainers call `model(..., labels=labels, fused_lm_head=True)` and read log-probabilities per token. With this
head instead of TRL's, their losses and metrics use the distribution of decoding_lasar.
"""

import types

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput, maybe_gather_lm_head_ctx, selective_log_softmax_and_entropy

from ..model.catalog_lasar import SidCatalog
from ..model.decoding_lasar import child_log_probs
from ..model.modeling_lasar import LasarForGenerativeRec
from ..model.trie_lasar import ItemFilter, SidTrie


def add_catalog_head(model: LasarForGenerativeRec, catalog: SidCatalog, temperature: float = 1.0) -> None:
    """
    Let `model(..., labels=labels, fused_lm_head=True)` score SID labels over the catalogue, see [`score_labels`].

    The log-probabilities of a sequence are multiplied by its entry in `loss_weights` `(B,)`, if it is passed. Every
    other call is the model's own forward. A label outside the catalogue raises a `ValueError`.

    Args:
        model ([`LasarForGenerativeRec`]), catalog ([`SidCatalog`]):
            Model to patch, and its items. A head that TRL added before is replaced.
        temperature (`float`, *optional*, defaults to `1.0`):
            Temperature the logits are divided by.
    """
    catalog.check_matches(model.config.num_sid_levels, model.config.codebook_size)

    def forward(
        self, input_ids, attention_mask=None, labels=None, fused_lm_head=False, loss_weights=None, **kwargs
    ):  # fmt: skip
        if not fused_lm_head:
            return type(self).forward(self, input_ids, attention_mask, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        mask = without_last_token(self.config, input_ids, attention_mask)  # (B, L)
        hidden_states = self.model(input_ids, mask, **kwargs).last_hidden_state  # (B, L, H)
        trie = catalog.trie(input_ids.device)
        output = score_labels(self, hidden_states, input_ids, labels, trie, temperature)
        if loss_weights is not None:
            output.log_probs = output.log_probs * loss_weights[:, None]
        return output

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def without_last_token(config, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    The attention mask `(B, L)` without the last token of each sequence, which predicts no label and need not be read.
    A last token that is part of the latent region stays, since its state is used, and so does a single token.
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    following = attention_mask.flip(1).cumsum(dim=1).flip(1)  # (B, L): 1 at the last token
    region = torch.tensor([config.latent_start_token_id, config.latent_token_id], device=input_ids.device)
    is_last = (following == 1) & (attention_mask == 1) & ~torch.isin(input_ids, region)  # (B, L)
    is_last = is_last & (attention_mask.sum(dim=1, keepdim=True) > 1)
    return attention_mask * ~is_last


@torch.no_grad()
def item_embeddings(model: LasarForGenerativeRec, catalog: SidCatalog) -> torch.Tensor:
    """
    Vectors `(I, H)` of the items: the sum of the head's rows of their codes. The product with a hidden state is a
    score of each item, so a state can be compared with another one by the items that it stands for (not in the paper).
    """
    config, weight = model.config, model.lm_head.weight  # (V, H)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    with maybe_gather_lm_head_ctx(weight):
        levels = torch.arange(config.num_sid_levels, device=weight.device)
        tokens = config.sid_token_offset + levels * config.codebook_size + catalog.codes.to(weight.device)  # (I, M)
        return weight[tokens].sum(dim=1)  # (I, H)


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

    The paper (LASAR, arXiv 2605.10207, stage 1) normalises SID tokens over the vocabulary instead. `hidden_states` are
    the final ones `(B, L, H)`; `labels` `(B, L)` are not shifted and -100 where nothing is scored. The tensors of the
    output have shape `(B, L - 1)`, zero where the label is -100; its loss is the mean negative log-probability.
    """
    # 1. The level of each SID label, -1 for text. Position p of targets is predicted by hidden state p.
    config = model.config
    targets = labels[:, 1:]  # (B, L - 1)
    label_mask = targets != -100  # (B, L - 1)
    sid = targets - config.sid_token_offset  # (B, L - 1), level · K + code
    is_sid = label_mask & (sid >= 0) & (sid < config.num_sid_tokens)  # (B, L - 1)
    level_of = torch.where(is_sid, sid // config.codebook_size, -1)  # (B, L - 1)

    # 2. The items of each sequence, if those before a label have no probability: the leaf of the item that ends in
    #    each column (B, L), and the columns of the D items (B, D).
    items = None
    if config.exclude_history:
        leaves = trie.leaves_in(input_ids - config.sid_token_offset, config.codebook_size)
        count = int((leaves >= 0).sum(dim=1).max())
        items = leaves, (leaves < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]

    indices, scores = [], []  # of the labels of each level, then of text
    weight = model.lm_head.weight  # (V, H)
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
    with maybe_gather_lm_head_ctx(weight):
        # 3. SID labels, level by level, with that level's K rows of the head: n labels are scored at once.
        for level in range(config.num_sid_levels):
            index = (level_of == level).nonzero(as_tuple=True)  # 2 × (n,)
            first = config.sid_token_id(level, 0)
            head = weight[first : first + config.codebook_size]  # (K, H)
            nodes = _prefix_nodes(input_ids, index, level, trie, config)  # (n,)
            codes = sid[index] - level * config.codebook_size  # (n,)
            history = None if items is None else _history_of_labels(items, index, level, trie)
            indices.append(index)
            scores.append(_score_level(hidden_states[index], head, trie, level, nodes, codes, temperature, history))

        # 4. Text labels, with the whole head.
        index = (label_mask & ~is_sid).nonzero(as_tuple=True)  # 2 × (n,)
        if len(index[0]):
            logits = nn.functional.linear(hidden_states[index], weight).float() / temperature  # (n, V)
            is_top1 = (logits.argmax(dim=-1) == targets[index]).float()  # (n,)
            indices.append(index)
            scores.append((*selective_log_softmax_and_entropy(logits, targets[index]), is_top1))

    # 5. Put the scores at their labels. The last line connects a batch without labels to the graph.
    index = [torch.cat(parts) for parts in zip(*indices, strict=True)]
    zeros = hidden_states.new_zeros(targets.shape, dtype=torch.float32)  # (B, L - 1)
    log_probs, entropy, is_top1 = (zeros.index_put(index, torch.cat(parts)) for parts in zip(*scores, strict=True))
    log_probs = log_probs + 0 * hidden_states[:, :1, 0]
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / label_mask.sum().clamp(min=1),
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=label_mask,
    )


def _prefix_nodes(input_ids: torch.Tensor, index, level: int, trie: SidTrie, config) -> torch.Tensor:
    """Trie node `(n,)` of the `level` codes up to each position, -1 if no item begins with them."""
    sequence, position = index
    nodes = torch.zeros_like(sequence)
    for i in range(level):
        tokens = input_ids[sequence, (position - (level - 1) + i).clamp(min=0)]  # (n,)
        nodes = trie.descend(i, nodes, tokens - config.sid_token_id(i, 0))  # (n,)
    return nodes


def _history_of_labels(items: tuple[torch.Tensor, torch.Tensor], index, level: int, trie: SidTrie) -> ItemFilter:
    """
    Exclude the items that end before the item of each label begins, but not that item: the targets of a few users may
    repeat.
    """
    (leaves, columns), (sequence, position) = items, index
    # A label of this level is predicted `level` columns after the column before its item.
    last = (position - level + trie.num_levels).clamp(max=leaves.shape[1] - 1)  # (n,), last code of the label's item
    is_before = columns[sequence] <= position[:, None]  # (n, D)
    history = torch.where(is_before, leaves.gather(1, columns)[sequence], -1)  # (n, D)
    return ItemFilter.without_leaves(trie, history, kept=leaves[sequence, last])


def _score_level(hidden_states, head, trie: SidTrie, level: int, nodes, target_codes, temperature: float, history):
    """Log-probability, entropy and top-1 hit `(n,)` of each label among the children of its node."""
    # 1. Distribution over the children of each node; C columns, child -1 where a node has fewer.
    log_probs, codes, child = child_log_probs(
        hidden_states, head, trie, level, nodes.clamp(min=0), temperature, history
    )
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
    # 3. Metrics over the children with a probability.
    is_missing = log_probs == -torch.inf  # (n, C)
    with torch.no_grad():
        is_top1 = (target >= log_probs.max(dim=1).values).float()
    finite = log_probs.masked_fill(is_missing, 0)  # (n, C)
    entropy = -(finite.exp() * finite).masked_fill(is_missing, 0).sum(dim=1)
    return target, entropy, is_top1
