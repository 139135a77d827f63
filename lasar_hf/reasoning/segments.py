"""Cuts chains of thought into segments where the meaning shifts; their number is a sample's depth label `N`.

LASAR, arXiv 2605.10207, stage 2 (SFT), which leaves the rule for a cut open.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
from sklearn.preprocessing import normalize

from ..semantic_ids.text_embedder import TfidfEmbedder


Embed = Callable[[list[str]], np.ndarray]
BATCH_SIZE = 65_536  # sentences embedded, and gaps compared, at a time
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def segment(
    texts: Sequence[str], embed: Embed | None = None, max_segments: int = 8, min_words: int = 6, threshold: float = 0.0
) -> list[list[str]]:
    """
    Cut texts that fit into memory; arguments as for [`Segmenter`].

    Returns:
        `list[list[str]]`: 1 to `max_segments` segments of each text, in order. Joined by spaces they are the text.
    """
    return Segmenter(embed, max_segments, min_words, threshold).fit([texts]).cut(texts)


class Segmenter:
    """
    Cuts chains of thought, a batch at a time, where the meaning shifts.

    A gap between two sentences is a candidate if their cosine similarity is less than `mean - threshold * std` over
    the gaps of all texts, so that a coherent text stays whole. Candidates with the lowest similarity are cut first,
    while there are at most `max_segments` segments and both sides of a cut keep `min_words` words. Memory holds the
    distinct sentences, their vectors, and twelve bytes per gap.

    Args:
        embed (`Callable`, *optional*):
            Function from a list of `n` sentences to an array `(n, d)`. Defaults to a [`TfidfEmbedder`] fitted to the
            sentences. For the paper's: `functools.partial(text_embeddings, model="BAAI/bge-small-en-v1.5")`.
        max_segments (`int`, *optional*, defaults to `8`):
            Maximum number of segments of a text, at least 1: the model's `max_latent_steps`.
        min_words (`int`, *optional*, defaults to `6`):
            Minimum number of words of a segment, unless the text is not cut.
        threshold (`float`, *optional*, defaults to `0.0`):
            Standard deviations below the mean similarity; higher values give fewer cuts.

    Example:

    ```python
    >>> segmenter = Segmenter().fit(batches)
    >>> segments = [segmenter.cut(texts) for texts in batches]
    ```
    """

    def __init__(self, embed: Embed | None = None, max_segments: int = 8, min_words: int = 6, threshold: float = 0.0):
        if max_segments < 1:
            raise ValueError(f"max_segments is {max_segments}; expected at least 1.")
        self.embed, self.max_segments, self.min_words, self.threshold = embed, max_segments, min_words, threshold
        self._index: dict[str, int] = {}  # of each distinct sentence in `_vectors`
        self._vectors = np.empty((0, 0), dtype=np.float32)  # (sentences, d), unit length
        self._limit = 0.0

    def fit(self, batches: Iterable[Sequence[str]]) -> "Segmenter":
        """Learn from all texts, in batches of any size, below which similarity a gap is a candidate; return `self`."""
        # 1. Number the distinct sentences, and note which two meet at each gap.
        left, right = array("i"), array("i")
        for number, text in enumerate(chain.from_iterable(batches)):
            indices = [self._index.setdefault(sentence, len(self._index)) for sentence in split_sentences(text)]
            if not indices:
                raise ValueError(f"texts: text {number} is empty; every sample needs a chain of thought.")
            left.extend(indices[:-1])
            right.extend(indices[1:])
        if not left:
            return self

        # 2. Embed each distinct sentence once.
        sentences = list(self._index)
        embed = self.embed or TfidfEmbedder(dim=64).fit(sentences).transform
        parts = (sentences[start : start + BATCH_SIZE] for start in range(0, len(sentences), BATCH_SIZE))
        self._vectors = np.concatenate([normalize(embed(part)) for part in parts])

        # 3. The limit, from the similarities at all gaps.
        similarity = self._similarity(np.asarray(left), np.asarray(right))
        self._limit = similarity.mean() - self.threshold * similarity.std()
        return self

    def cut(self, texts: Sequence[str]) -> list[list[str]]:
        """Cut texts that [`~Segmenter.fit`] has seen; returns the same as [`segment`]."""
        segments = []
        for sentences in map(split_sentences, texts):
            indices = np.array([self._index[sentence] for sentence in sentences])
            cuts = self._cuts(self._similarity(indices[:-1], indices[1:]), [len(part.split()) for part in sentences])
            edges = zip([0, *cuts], [*cuts, len(sentences)], strict=True)
            segments.append([" ".join(sentences[start:end]) for start, end in edges])
        return segments

    def _similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosine similarity `(gaps,)` of the sentences before and after each gap."""
        similarity = np.empty(len(left), dtype=self._vectors.dtype)
        for start in range(0, len(left), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            np.einsum("gd,gd->g", self._vectors[left[part]], self._vectors[right[part]], out=similarity[part])
        return similarity

    def _cuts(self, similarity: np.ndarray, num_words: list[int]) -> list[int]:
        """Ascending indices of the sentences that start a segment; of equal gaps the earlier is cut first."""
        words_before = np.concatenate([[0], np.cumsum(num_words)])
        cuts: list[int] = []
        for gap in np.argsort(similarity, kind="stable"):
            if similarity[gap] >= self._limit or len(cuts) == self.max_segments - 1:
                break
            cut = int(gap) + 1
            start = max((other for other in cuts if other < cut), default=0)
            end = min((other for other in cuts if other > cut), default=len(num_words))
            sides = words_before[cut] - words_before[start], words_before[end] - words_before[cut]
            if min(sides) >= self.min_words:
                cuts.append(cut)
        return sorted(cuts)


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: split after `.`, `!` or `?` before white space, and at line breaks; none is empty."""
    return [" ".join(part.split()) for part in _SENTENCE_END.split(text) if part.strip()]
