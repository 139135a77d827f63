"""The text view without a language model: TF-IDF and SVD, fitted once, then the same for every later text."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from .svd import truncated_svd


VIEW_WEIGHTS_NAME = "text_view.safetensors"
VIEW_CONFIG_NAME = "text_view.json"

MAX_WORDS = 100_000
# Lone characters count as words: sizes and model numbers ("M 6") tell products apart.
WORDS = {"sublinear_tf": True, "ngram_range": (1, 2), "token_pattern": r"(?u)\w+"}


class TfidfView:
    """
    Vectors of texts: TF-IDF of words and pairs of words, reduced by truncated SVD.

    Args:
        dim (`int`, *optional*, defaults to `256`):
            Width of the vectors. When the fitted texts have less variety than that, the last columns are zero.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the randomised SVD.

    Example:

    ```python
    >>> from lasar_hf.semantic_ids import TfidfView

    >>> view = TfidfView(dim=2).fit(["red nail polish", "blue nail polish", "capacitor relay"])
    >>> view.transform(["green nail polish"]).shape
    (1, 2)
    ```
    """

    def __init__(self, dim: int = 256, seed: int = 0):
        self.dim = dim
        self.seed = seed
        self.components: np.ndarray | None = None  # (width, V) float32
        self._vectorizer: TfidfVectorizer | None = None  # none without words

    def fit(self, texts: Sequence[str]) -> "TfidfView":
        """
        Learn the words, their weights and the directions.

        Args:
            texts (`Sequence[str]`):
                At least one text.

        Returns:
            [`TfidfView`]: itself.
        """
        self.fit_transform(texts)
        return self

    def fit_transform(self, texts: Sequence[str]) -> np.ndarray:
        """Fit and return the vectors of the same texts, `(N, dim)` float32: those of `transform` up to rounding."""
        if isinstance(texts, str) or not len(texts) or self.dim < 1:
            raise ValueError(f"expected at least one text and column, not {texts!r} and dim={self.dim}.")
        self._vectorizer = TfidfVectorizer(max_features=MAX_WORDS, **WORDS)
        try:
            weights = self._vectorizer.fit_transform(texts)
        except ValueError:  # scikit-learn's "empty vocabulary": no text has a word
            self._vectorizer, weights = None, sparse.csr_matrix((len(texts), 0))
        vectors, self.components = truncated_svd(weights, self.dim, self.seed)
        return vectors

    def transform(self, texts: Sequence[str]) -> np.ndarray:
        """
        Vectors of texts, old or new; nothing is fitted again.

        Args:
            texts (`Sequence[str]`):
                `N` texts. Words that the fitted texts do not have are passed over.

        Returns:
            `np.ndarray` of shape `(N, dim)`, float32; zero rows for texts without a known word.

        Raises:
            `ValueError`: nothing was fitted.
        """
        components = self._fitted()
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        if self._vectorizer is not None and len(texts):
            out[:, : len(components)] = self._vectorizer.transform(texts) @ components.T
        return out

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Write `text_view.safetensors` (components, weights of the words) and `text_view.json` (words and settings).

        The JSON file goes first and comes last: where it lies, the weights beside it are its own.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder, created if missing.
        """
        tensors = {"components": np.ascontiguousarray(self._fitted()), "idf": np.zeros(0)}
        config = {"dim": self.dim, "seed": self.seed, "words": {}, "vocabulary": []}
        if self._vectorizer is not None:
            tensors["idf"] = self._vectorizer.idf_
            config["words"] = {name: getattr(self._vectorizer, name) for name in WORDS}
            config["vocabulary"] = self._vectorizer.get_feature_names_out().tolist()
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights, settings = folder / VIEW_WEIGHTS_NAME, folder / VIEW_CONFIG_NAME
        save_file(tensors, f"{weights}.tmp")
        Path(f"{settings}.tmp").write_text(json.dumps(config, ensure_ascii=False) + "\n", encoding="utf-8")
        settings.unlink(missing_ok=True)
        os.replace(f"{weights}.tmp", weights)
        os.replace(f"{settings}.tmp", settings)

    @classmethod
    def from_pretrained(cls, save_directory: str | os.PathLike) -> "TfidfView":
        """
        Read a view that [`~TfidfView.save_pretrained`] wrote; it transforms exactly as before.

        Args:
            save_directory (`str` or `os.PathLike`):
                Folder to read.

        Raises:
            `FileNotFoundError`: one of the two files is missing.
            `ValueError`: the two files do not belong together.
        """
        folder = Path(save_directory)
        for name in (VIEW_CONFIG_NAME, VIEW_WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}: it is not a saved text view.")
        config = json.loads((folder / VIEW_CONFIG_NAME).read_text(encoding="utf-8"))
        tensors, vocabulary = load_file(folder / VIEW_WEIGHTS_NAME), config["vocabulary"]
        columns = tensors["components"].shape[1]
        if not len(vocabulary) == len(tensors["idf"]) == columns:
            raise ValueError(
                f"{folder} holds {len(vocabulary)} words in {VIEW_CONFIG_NAME} and the components of {columns}: save "
                "the view again."
            )
        view = cls(config["dim"], config["seed"])
        view.components = tensors["components"]
        if vocabulary:
            words = config["words"] | {"ngram_range": tuple(config["words"]["ngram_range"])}
            view._vectorizer = TfidfVectorizer(vocabulary=vocabulary, **words)
            view._vectorizer.idf_ = tensors["idf"]
        return view

    def _fitted(self) -> np.ndarray:
        if self.components is None:
            raise ValueError("This text view has no words yet: call fit(texts) or from_pretrained(folder) first.")
        return self.components
