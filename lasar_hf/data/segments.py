"""Cut chains of thought into segments where the meaning shifts; their number is a sample's depth label `N`."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize


Embed = Callable[[list[str]], np.ndarray]
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

    A gap between two sentences is a candidate when their cosine similarity lies below `mean - threshold * std` over
    the gaps of all texts, so that a coherent text stays whole. The deepest valleys are cut first, as long as no more
    than `max_segments` segments come out and both sides of a cut keep `min_words` words. Each distinct sentence is
    embedded once.

    Args:
        texts (`Sequence[str]`):
            Chains of thought.
        embed (`Callable`, *optional*):
            From a list of `n` sentences to an array `(n, d)`: `tfidf_embedder` of the sentences at hand if not given,
            `sentence_embedder("BAAI/bge-small-en-v1.5")` for the paper's.
        max_segments (`int`, *optional*, defaults to `8`):
            Most segments of a text, the model's `max_latent_steps`.
        min_words (`int`, *optional*, defaults to `6`):
            Fewest words of a segment of a text that is cut.
        threshold (`float`, *optional*, defaults to `0.0`):
            Standard deviations below the mean; the larger, the fewer cuts.

    Returns:
        `list[list[str]]`: 1 to `max_segments` segments of each text, in order; joined by spaces they are the text.

    Raises:
        ValueError: a text without words, or `max_segments` below 1.
    """
    if max_segments < 1:
        raise ValueError(f"`max_segments` is {max_segments}, expected at least 1.")
    sentences = [split_sentences(text) for text in texts]
    for row, parts in enumerate(sentences):
        if not parts:
            raise ValueError(f"text {row} is empty: every sample needs a chain of thought.")
    unique: dict[str, int] = {}
    ids = [[unique.setdefault(part, len(unique)) for part in parts] for parts in sentences]
    left = np.array([row for parts in ids for row in parts[:-1]], dtype=np.int64)
    right = np.array([row for parts in ids for row in parts[1:]], dtype=np.int64)
    if not len(left):
        return sentences
    vectors = normalize((embed or tfidf_embedder(list(unique)))(list(unique)))
    similarity = np.einsum("gd,gd->g", vectors[left], vectors[right])
    limit = similarity.mean() - threshold * similarity.std()
    segments, start = [], 0
    for parts in sentences:
        gaps = similarity[start : start + len(parts) - 1]
        start += len(gaps)
        cuts = _cuts(gaps, [len(part.split()) for part in parts], limit, max_segments, min_words)
        edges = zip([0, *cuts], [*cuts, len(parts)], strict=True)
        segments.append([" ".join(parts[first:last]) for first, last in edges])
    return segments


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


def sentence_embedder(model: str, batch_size: int = 256) -> Embed:
    """
    Embedder of a sentence-transformers model; needs the extra `embed`.

    Args:
        model (`str`):
            Name or folder of the model; the paper uses `BAAI/bge-small-en-v1.5`.
        batch_size (`int`, *optional*, defaults to `256`):
            Sentences a pass.

    Returns:
        `Callable`: from `n` sentences to an array `(n, d)`.

    Raises:
        ImportError: sentence-transformers is not installed.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(f'{model} needs sentence-transformers: pip install "lasar_hf[embed]".') from error
    encoder = SentenceTransformer(model)
    return lambda texts: encoder.encode(texts, batch_size=batch_size, convert_to_numpy=True)


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
