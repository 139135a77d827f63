"""Truncated SVD that always has the width asked for."""

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD


def truncated_svd(matrix: sparse.csr_matrix, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Rows of a matrix in fewer columns, and what takes other rows there.

    Args:
        matrix (`sparse.csr_matrix` of shape `(N, V)`):
            The rows.
        dim (`int`):
            Columns to return.
        seed (`int`):
            Seed of the randomised SVD.

    Returns:
        `tuple`: left singular vectors times singular values `(N, dim)`, zero columns beyond the rank that the shape
        allows, and components `(width, V)`, `width ≤ dim`, both float32; `matrix @ components.T` gives the first
        `width` columns up to rounding.
    """
    width = min(dim, matrix.shape[1] - 1, matrix.shape[0] - 1)
    out = np.zeros((matrix.shape[0], dim), dtype=np.float32)
    if width < 1:  # one row or one column: nothing to reduce
        column = np.asarray(matrix.sum(axis=1), dtype=np.float32)
        out[:, :1] = column.reshape(-1, 1)
        return out, np.ones((1, matrix.shape[1]), dtype=np.float32)
    svd = TruncatedSVD(width, random_state=seed)
    out[:, :width] = svd.fit_transform(matrix)
    components = svd.components_.astype(np.float32)
    # Directions beyond the rank are arbitrary: they would put noise into other rows.
    components[svd.singular_values_ <= 1e-6 * svd.singular_values_[0]] = 0
    return out, components
