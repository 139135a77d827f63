"""Text vectors without a language model: scikit-learn's TF-IDF and truncated SVD, fitted once and stored."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from ..files import atomic_file


EMBEDDER_NAME = "tfidf_embedder.safetensors"

# Single characters count as words: sizes and model numbers ("M 6") distinguish products.
TFIDF_SETTINGS = {"sublinear_tf": True, "ngram_range": (1, 2), "token_pattern": r"(?u)\w+", "max_features": 100_000}


class TfidfEmbedder:
    """
    Embeds texts by TF-IDF of words and word pairs, reduced by truncated SVD.

    Prefer a sentence-transformers model (see [`text_embeddings`]) where one can be downloaded: it also knows synonyms.

    Args:
        dim (`int`, *optional*, defaults to `256`):
            Width of the vectors. If the fitted texts have fewer words or fewer texts than `dim`, the last columns are
            zero.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomised SVD.

    Example:

    ```python
    >>> from lasar_hf.semantic_ids import TfidfEmbedder

    >>> embedder = TfidfEmbedder(dim=2).fit(["red nail polish", "blue nail polish", "capacitor relay"])
    >>> embedder.transform(["green nail polish"]).shape
    (1, 2)
    ```
    """

    def __init__(self, dim: int = 256, seed: int = 0):
        self.dim, self.seed = dim, seed
        self.vectorizer: TfidfVectorizer | None = None  # None if no fitted text has a word
        self.components: np.ndarray | None = None  # (width, V) float32, width <= dim

    def fit(self, texts: Sequence[str]) -> "TfidfEmbedder":
        """Learn the vocabulary, the weights of its words, and the directions of largest variance."""
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"texts is {texts!r}; expected a sequence of at least one text.")
        if self.dim < 1:
            raise ValueError(f"dim is {self.dim}; expected at least 1.")
        self.vectorizer = TfidfVectorizer(**TFIDF_SETTINGS)
        try:
            weights = self.vectorizer.fit_transform(texts)  # (N, V)
        except ValueError:  # scikit-learn's "empty vocabulary"
            self.vectorizer, self.components = None, np.zeros((0, 0), dtype=np.float32)
            return self
        if weights.shape[1] == 1:  # TruncatedSVD needs two columns
            self.components = np.ones((1, 1), dtype=np.float32)
            return self
        svd = TruncatedSVD(min(self.dim, *weights.shape), random_state=self.seed)
        with np.errstate(invalid="ignore"):  # one text has no variance to explain
            svd.fit(weights)
        # Directions beyond the rank of the matrix are arbitrary and would add noise to the vectors of new texts.
        svd.components_[svd.singular_values_ <= 1e-6 * svd.singular_values_[0]] = 0
        self.components = svd.components_.astype(np.float32)
        return self

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors `(N, dim)`, float32. Unknown words are ignored; a text without a known word gets a zero row."""
        self._check_fitted()
        vectors = np.zeros((len(texts), self.dim), dtype=np.float32)
        if self.vectorizer is not None and len(texts):
            vectors[:, : len(self.components)] = self.vectorizer.transform(texts) @ self.components.T
        return vectors

    def fit_transform(self, texts: Sequence[str]) -> np.ndarray:
        """The same as `fit(texts).transform(texts)`: vectors of shape `(N, dim)`, float32."""
        return self.fit(texts).transform(texts)

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write one safetensors file, the same byte for byte after the same fit, into a folder, created if missing."""
        self._check_fitted()
        words = [] if self.vectorizer is None else self.vectorizer.get_feature_names_out().tolist()
        idf = np.zeros(0) if self.vectorizer is None else self.vectorizer.idf_
        config = json.dumps({"dim": self.dim, "seed": self.seed, "vocabulary": words})
        with atomic_file(Path(save_directory) / EMBEDDER_NAME) as temporary:
            tensors = {"components": np.ascontiguousarray(self.components), "idf": idf}
            save_file(tensors, temporary, metadata={"config": config})

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> "TfidfEmbedder":
        """Load an embedder that [`~TfidfEmbedder.save_pretrained`] wrote; its vectors are exactly the same."""
        with safe_open(Path(save_directory) / EMBEDDER_NAME, "np") as file:
            config = json.loads(file.metadata()["config"])
            components, idf = file.get_tensor("components"), file.get_tensor("idf")
        embedder = cls(config["dim"], config["seed"])
        embedder.components = components
        if config["vocabulary"]:
            embedder.vectorizer = TfidfVectorizer(vocabulary=config["vocabulary"], **TFIDF_SETTINGS)
            embedder.vectorizer.idf_ = idf
        return embedder

    def _check_fitted(self) -> None:
        if self.components is None:
            raise ValueError("TfidfEmbedder is not fitted; call fit(texts) or from_pretrained(folder) first.")
