"""Cut chains of thought into segments where the meaning shifts; their number is a sample's depth label `N`."""

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize


Embed = Callable[[list[str]], np.ndarray]
_GAPS = 65_536  # compared at a time
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def segment(
    texts: Sequence[str],
    embed: Embed | None = None,
    max_segments: int = 8,
    min_words: int = 6,
    threshold: float = 0.0,
) -> list[list[str]]:
    """
    Split each text into sentences, and cut between neighbours that are unlike each other (METHOD.md, section 4).

    Args:
        texts (`Sequence[str]`):
            Chains of thought.
        embed, max_segments, min_words, threshold:
            As for [`Segmenter`], which takes more texts than fit into memory.

    Returns:
        `list[list[str]]`: 1 to `max_segments` segments of each text, in order; joined by spaces they are the text.

    Raises:
        ValueError: a text without words, or `max_segments` below 1.
    """
    return Segmenter(embed, max_segments, min_words, threshold).fit([texts]).cut(texts)


class Segmenter:
    """
    Cuts chains of thought, a batch at a time, where the meaning shifts (METHOD.md, section 4).

    A gap between two sentences is a candidate when their cosine similarity lies below `mean - threshold * std` over
    the gaps of all texts, so that a coherent text stays whole. The deepest valleys are cut first, as long as no more
    than `max_segments` segments come out and both sides of a cut keep `min_words` words. Each distinct sentence is
    embedded once. Kept in memory are the distinct sentences with their vectors, and twelve bytes a gap.

    Args:
        embed (`Callable`, *optional*):
            From a list of `n` sentences to an array `(n, d)`: `tfidf_embedder` of the sentences at hand if not given,
            `functools.partial(text_embeddings, model="BAAI/bge-small-en-v1.5")` for the paper's.
        max_segments (`int`, *optional*, defaults to `8`):
            Most segments of a text, the model's `max_latent_steps`.
        min_words (`int`, *optional*, defaults to `6`):
            Fewest words of a segment of a text that is cut.
        threshold (`float`, *optional*, defaults to `0.0`):
            Standard deviations below the mean; the larger, the fewer cuts.

    Raises:
        ValueError: `max_segments` below 1.

    Example:

    ```python
    >>> segmenter = Segmenter().fit(batches)
    >>> segments = [segmenter.cut(texts) for texts in batches]
    ```
    """

    def __init__(
        self, embed: Embed | None = None, max_segments: int = 8, min_words: int = 6, threshold: float = 0.0
    ):
        if max_segments < 1:
            raise ValueError(f"`max_segments` is {max_segments}, expected at least 1.")
        self.embed, self.max_segments, self.min_words, self.threshold = embed, max_segments, min_words, threshold
        self._row: dict[str, int] = {}
        self._vectors = np.empty((0, 0))
        self._limit = 0.0

    def fit(self, batches: Iterable[Sequence[str]]) -> "Segmenter":
        """
        Learn the similarity below which a gap is a candidate.

        Args:
            batches (`Iterable[Sequence[str]]`):
                All texts, in batches of any size.

        Returns:
            [`Segmenter`]: itself.

        Raises:
            ValueError: a text without words.
        """
        left, right = array("i"), array("i")
        for number, text in enumerate(chain.from_iterable(batches)):
            rows = [self._row.setdefault(part, len(self._row)) for part in split_sentences(text)]
            if not rows:
                raise ValueError(f"text {number} is empty: every sample needs a chain of thought.")
            left.extend(rows[:-1])
            right.extend(rows[1:])
        if left:
            sentences = list(self._row)
            self._vectors = normalize((self.embed or tfidf_embedder(sentences))(sentences))
            similarity = self._similarity(np.asarray(left), np.asarray(right))
            self._limit = similarity.mean() - self.threshold * similarity.std()
        return self

    def cut(self, texts: Sequence[str]) -> list[list[str]]:
        """
        Cut texts that were among those of `fit`.

        Args:
            texts (`Sequence[str]`):
                Chains of thought.

        Returns:
            `list[list[str]]`: 1 to `max_segments` segments of each text, in order; joined by spaces they are the text.
        """
        segments = []
        for parts in map(split_sentences, texts):
            rows = np.array([self._row[part] for part in parts])
            gaps = self._similarity(rows[:-1], rows[1:])
            cuts = _cuts(gaps, [len(part.split()) for part in parts], self._limit, self.max_segments, self.min_words)
            edges = zip([0, *cuts], [*cuts, len(parts)], strict=True)
            segments.append([" ".join(parts[first:last]) for first, last in edges])
        return segments

    def _similarity(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Cosine similarity `(gaps,)` of the sentences before and behind each gap."""
        similarity = np.empty(len(left), dtype=self._vectors.dtype)
        for start in range(0, len(left), _GAPS):
            part = slice(start, start + _GAPS)
            np.einsum("gd,gd->g", self._vectors[left[part]], self._vectors[right[part]], out=similarity[part])
        return similarity


def split_sentences(text: str) -> list[str]:
    """Sentences of a text: cut after `.`, `!` or `?` before white space, and at line breaks; none is empty."""
    return [" ".join(part.split()) for part in _SENTENCE_END.split(text) if part.strip()]


def tfidf_embedder(sentences: Sequence[str], dim: int = 64, seed: int = 0) -> Embed:
    """
    Offline sentence embedder: TF-IDF over words and word pairs, then truncated SVD, fitted to the given sentences.

    Args:
        sentences (`Sequence[str]`):
            What to fit to, without repetitions.
        dim (`int`, *optional*, defaults to `64`):
            Width of the vectors; less when there are few sentences or words.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomised SVD.

    Returns:
        `Callable`: from `n` sentences to an array `(n, dim)`.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, dtype=np.float32)
    try:
        matrix = vectorizer.fit_transform(sentences)
    except ValueError:  # not one word in all the sentences: nothing tells them apart
        return lambda texts: np.zeros((len(texts), 1), dtype=np.float32)
    rank = min(dim, *(size - 1 for size in matrix.shape))
    if rank < 1:
        return lambda texts: vectorizer.transform(texts).toarray()
    svd = TruncatedSVD(rank, random_state=seed).fit(matrix)
    return lambda texts: svd.transform(vectorizer.transform(texts))


def _cuts(gaps: np.ndarray, words: list[int], limit: float, max_segments: int, min_words: int) -> list[int]:
    """Sentence numbers before which to cut, ascending; of equal valleys the earlier is cut first."""
    before = np.concatenate([[0], np.cumsum(words)])
    cuts: list[int] = []
    for gap in np.argsort(gaps, kind="stable"):
        if gaps[gap] >= limit or len(cuts) == max_segments - 1:
            break
        position = int(gap) + 1
        first = max((cut for cut in cuts if cut < position), default=0)
        last = min((cut for cut in cuts if cut > position), default=len(words))
        if min(before[position] - before[first], before[last] - before[position]) >= min_words:
            cuts.append(position)
    return sorted(cuts)
