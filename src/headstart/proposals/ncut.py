"""Eigen attention: the normalised cut of a feature map into what stands out and the rest.

JoinDet (supplement, section 4), after Shi and Malik, "Normalized Cuts and Image Segmentation", PAMI 2000, and TokenCut
(Wang et al., CVPR 2022, arXiv 2202.11539). Numbers in, numbers out; nothing here knows of images or networks.

    Eq. 1, the graph U                      similar
    Eq. 4, (D - U) y = lambda D y           second_eigenvector
    y_1 as a map M                          attention_map
    boxes of its connected parts            regions
    several objects, one cut after another  objects

The second eigenvector is the largest one of ``D^-1/2 U D^-1/2`` that is orthogonal to the first, which is known:
``D^1/2 1``. Lanczos' method finds it from products with U alone, and ``U = eps 1 1^T + (1 - eps) A`` with a matrix A of
zeros and ones. benchmarks/eigen.py compares it with ``scipy.linalg.eigh``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.linalg
import scipy.ndimage
from scipy.linalg.blas import dsymv
from scipy.sparse import csr_array
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

TAU, EPS = 0.2, 1e-5  # TokenCut's; JoinDet's supplement gives none
FEW = 32  # nodes up to which all eigenvectors are found faster than one
TOLERANCE = 1e-10  # relative, of the eigenvalue; the machine's own takes half as many products more
SPARSE = 0.15  # share of joined pairs below which a sparse matrix is faster
FLAT = 1e-9  # 1 - lambda below which all nodes are alike, and no cut is better than another


def similar(features: np.ndarray, tau: float = TAU) -> np.ndarray:
    """Eq. 1: features (n, D) -> (n, n) bool, cos >= tau. A node is similar to itself, whatever its features.

    Raises:
        ValueError: features that are not finite.
    """
    if not np.isfinite(features).all():
        raise ValueError("the features hold numbers that are not finite")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(features.dtype).tiny)
    joined = unit @ unit.T >= tau
    np.fill_diagonal(joined, True)
    return joined


def centred(features: np.ndarray) -> np.ndarray:
    """Features (h, w, D) without their mean over the map.

    Networks that end in a ReLU need it: none of their features is below zero, so that nearly all cosines are above any
    small tau (all of them on photos, with random weights), and where all are joined there is nothing to cut.
    """
    return features - features.mean(axis=(0, 1))


def second_eigenvector(joined: np.ndarray, eps: float = EPS) -> tuple[float, np.ndarray]:
    """The second smallest eigenvalue of ``(D - U) y = lambda D y``, and its y; U is 1 where ``joined``, else ``eps``.

    The sign is such that the largest absolute value is positive. Where all nodes are joined with all others (and where
    there is one alone) every cut is as good as any other: lambda is 1 then, and y is 0.

    Args:
        joined: (n, n) bool, symmetric, True on the diagonal; n >= 1.
    """
    n = len(joined)
    degree = eps * n + (1 - eps) * joined.sum(axis=1)
    root = np.sqrt(degree)
    first = root / np.linalg.norm(root)

    values, vectors = (_all_of if n <= FEW else _largest)(joined, eps, root, first)
    if values[-1] < FLAT:
        return 1.0, np.zeros(n)
    y = vectors[:, -1] / root
    return float(1 - values[-1]), y * np.sign(y[np.abs(y).argmax()])


# Both of D^-1/2 U D^-1/2 - 2 first first^T, which moves the first eigenvector from the top, 1, to the bottom, -1.


def _all_of(joined: np.ndarray, eps: float, root: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ascending eigenvalues (n,) and their vectors (n, n)."""
    return scipy.linalg.eigh(np.where(joined, 1.0, eps) / root[:, None] / root - 2 * np.outer(first, first))


def _largest(joined: np.ndarray, eps: float, root: np.ndarray, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest eigenvalue (1,) and its vector (n, 1)."""
    n = len(joined)
    # Reading the matrix is what takes time. Where there is little in it, that little; else, as it is symmetric, half of
    # it, and its rows may pass for Fortran's columns.
    sparse = np.count_nonzero(joined) < SPARSE * n * n
    adjacency: Any = csr_array(joined, dtype=np.float64) if sparse else joined.astype(np.float64).T

    def product(x: np.ndarray) -> np.ndarray:
        x = x.ravel()
        scaled = x / root
        near = (1 - eps) * (adjacency @ scaled) if sparse else dsymv(1 - eps, adjacency, scaled)
        return (eps * scaled.sum() + near) / root - 2 * first * (first @ x)

    # The same start every time, or the same image would get other boxes.
    start = np.random.default_rng(0).standard_normal(n)
    try:
        return eigsh(LinearOperator((n, n), product, dtype=np.float64), k=1, which="LA", v0=start, tol=TOLERANCE)
    except ArpackNoConvergence:
        return _all_of(joined, eps, root, first)


def attention_map(
    features: np.ndarray, tau: float = TAU, eps: float = EPS, left: np.ndarray | None = None
) -> np.ndarray:
    """The eigen attention map M (h, w) float64 of ``features`` (h, w, D): large where something stands out.

    Args:
        left: (h, w) bool, cells that take part; all others get the smallest value there is.
    """
    h, w = features.shape[:2]
    inside = np.ones((h, w), bool) if left is None else left
    if not inside.any():
        return np.zeros((h, w))
    _, y = second_eigenvector(similar(features[inside], tau), eps)
    found = np.full((h, w), y.min())
    found[inside] = y
    return found


def foreground(attention: np.ndarray, left: np.ndarray | None = None) -> np.ndarray:
    """(h, w) bool: cells above the mean of the map, of those ``left`` where it says which take part."""
    if left is None:
        return attention > attention.mean()
    return left & (attention > attention[left].mean()) if left.any() else left


def regions(attention: np.ndarray, above: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the connected parts (by sides, not corners) of the foreground, best first.

    Args:
        above: (h, w) bool, the foreground, where it is not :func:`foreground` of the whole map.

    Returns:
        boxes (k, 4) int64 xyxy in cells, and scores (k,): the mean inside the box of the map rescaled to [0, 1].
    """
    above = foreground(attention) if above is None else above
    labels, _ = scipy.ndimage.label(above)
    places = scipy.ndimage.find_objects(labels)
    low, high = attention.min(), attention.max()
    scaled = (attention - low) / (high - low) if high > low else np.zeros_like(attention)
    boxes = np.array([[x.start, y.start, x.stop, y.stop] for y, x in places], np.int64).reshape(-1, 4)
    scores = np.array([scaled[place].mean() for place in places], np.float64)
    order = np.argsort(-scores, kind="stable")
    return boxes[order], scores[order]


def objects(
    features: np.ndarray, rounds: int = 1, tau: float = TAU, eps: float = EPS
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut, take away what stands out, and cut what is left: (map, foreground), both (h, w), of each round.

    Ends before ``rounds`` when nothing stands out any more.
    """
    left = np.ones(features.shape[:2], bool)
    for _ in range(rounds):
        attention = attention_map(features, tau, eps, left)
        above = foreground(attention, left)
        if not above.any():
            return
        yield attention, above
        left = left & ~above
