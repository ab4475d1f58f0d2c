import numpy as np
import pytest
import scipy.linalg

from headstart.proposals.ncut import (
    FEW,
    attention_map,
    foreground,
    objects,
    regions,
    second_eigenvector,
    similar,
)

EPS = 1e-5


def planted(h, w, parts, noise=0.0, seed=0, depth=16):
    """Features (h, w, depth) of a ground and ``parts``, boxes xyxy in cells, each of another direction."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(rng.standard_normal((depth, depth)))[0]
    features = np.tile(directions[0], (h, w, 1))
    for number, (x1, y1, x2, y2) in enumerate(parts, 1):
        features[y1:y2, x1:x2] = directions[number]
    return features + noise * rng.standard_normal(features.shape)


def by_scipy(features, tau=0.2, eps=EPS):
    """The generalised problem as the supplement prints it, entry by entry."""
    flat = features.reshape(-1, features.shape[-1])
    n = len(flat)
    U = np.empty((n, n))
    for i in range(n):
        for j in range(n):
            cos = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            U[i, j] = 1.0 if i == j or cos >= tau else eps
    D = np.diag(U.sum(axis=1))
    values, vectors = scipy.linalg.eigh(D - U, D, subset_by_index=[0, 1])
    y = vectors[:, 1]
    return values[1], y * np.sign(y[np.abs(y).argmax()])


@pytest.mark.parametrize(
    "features",
    [
        planted(9, 12, [(2, 3, 6, 7)], noise=0.25),
        planted(8, 8, [(0, 0, 3, 3), (5, 4, 8, 8)], noise=0.3, seed=1),
        planted(4, 5, [(1, 1, 3, 3)], noise=0.2),  # few nodes: another solver
        planted(1, 40, [(5, 0, 15, 1)], noise=0.2),
        planted(8, 8, [(0, 0, 3, 3), (5, 4, 8, 8)]),  # three parts that nothing but eps joins
        np.random.default_rng(3).standard_normal((7, 9, 5)),  # no structure
        np.random.default_rng(5).standard_normal((8, 9, 64)),  # few are joined: a sparse matrix
        np.random.default_rng(4).standard_normal((7, 9, 5)).clip(0) + 1e-3,  # nearly all alike, as after a ReLU
    ],
)
def test_value_vector_and_sign_are_scipys(features):
    value, vector = by_scipy(features)
    n = features.shape[0] * features.shape[1]
    ours, y = second_eigenvector(similar(features.reshape(n, -1)))
    assert ours == pytest.approx(value, abs=1e-9)
    cosine = vector @ y / np.linalg.norm(vector) / np.linalg.norm(y)  # not its absolute value: the sign counts
    assert cosine == pytest.approx(1, abs=1e-6)
    assert y[np.abs(y).argmax()] > 0


def test_a_planted_part_is_found_to_the_cell():
    features = planted(10, 14, [(3, 2, 8, 7)], noise=0.1)
    attention = attention_map(features)
    truth = np.zeros((10, 14), bool)
    truth[2:7, 3:8] = True
    np.testing.assert_array_equal(foreground(attention), truth)
    boxes, scores = regions(attention)
    np.testing.assert_array_equal(boxes, [[3, 2, 8, 7]])
    assert 0.9 < scores[0] <= 1


def test_the_smaller_side_stands_out():
    attention = attention_map(planted(10, 10, [(0, 0, 10, 8)], noise=0.1))  # the "part" is most of it
    np.testing.assert_array_equal(regions(attention)[0], [[0, 8, 10, 10]])


def test_several_objects_one_cut_after_another():
    parts = [(1, 1, 5, 5), (7, 8, 12, 13), (10, 1, 13, 4)]
    features = planted(14, 14, parts, noise=0.05)
    found = [regions(*pair)[0].tolist() for pair in objects(features, rounds=3)]
    boxes = {tuple(box) for each in found for box in each}
    assert set(parts) <= boxes
    above = np.array([mask for _, mask in objects(features, rounds=3)])
    assert above.sum(axis=0).max() == 1  # what was found is not found again


def test_no_more_rounds_than_there_are_things():
    features = planted(8, 8, [(2, 2, 5, 5)])
    assert len(list(objects(features, rounds=9))) == 1  # then the ground is left, all alike


def test_regions_of_a_hand_made_map():
    attention = np.zeros((5, 6))
    attention[0:2, 0:2] = 4.0
    attention[2, 2] = 2.0  # touches the first by a corner only
    attention[4, 3:6] = 3.0
    boxes, scores = regions(attention)
    np.testing.assert_array_equal(boxes, [[0, 0, 2, 2], [3, 4, 6, 5], [2, 2, 3, 3]])
    np.testing.assert_allclose(scores, [1.0, 0.75, 0.5])


def test_the_score_counts_what_else_is_in_the_box():
    attention = np.zeros((4, 4))
    attention[0:3, 0] = attention[2, 0:3] = 1.0  # an L of 5 cells in a box of 9
    boxes, scores = regions(attention)
    np.testing.assert_array_equal(boxes, [[0, 0, 3, 3]])
    np.testing.assert_allclose(scores, [5 / 9])


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (6, 7), (1, FEW + 8)])
def test_features_all_alike_have_no_foreground(shape):
    features = np.ones((*shape, 3))
    value, y = second_eigenvector(similar(features.reshape(-1, 3)))
    assert value == 1
    assert not y.any()
    assert regions(attention_map(features))[0].shape == (0, 4)
    assert list(objects(features, rounds=3)) == []


def test_two_nodes_that_differ():
    attention = attention_map(np.array([[[1.0, 0.0], [0.0, 1.0]]]))
    assert sorted(attention.ravel().tolist())[0] == pytest.approx(-attention.max())
    assert len(regions(attention)[0]) == 1


def test_features_of_zeros_are_similar_to_themselves_alone():
    features = np.ones((40, 3))
    features[7] = 0
    joined = similar(features)
    assert joined[7].sum() == joined[:, 7].sum() == 1
    _, y = second_eigenvector(joined)
    assert y.argmax() == 7


def test_features_that_are_not_finite_are_an_error():
    features = np.ones((4, 3))
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        similar(features)


def test_the_same_every_time():
    features = planted(9, 12, [(2, 3, 6, 7)], noise=0.4).astype(np.float32)
    np.testing.assert_array_equal(attention_map(features), attention_map(features.copy()))


def test_a_solver_that_does_not_converge_is_replaced(monkeypatch):
    from scipy.sparse.linalg import ArpackNoConvergence

    from headstart.proposals import ncut

    features = planted(9, 12, [(2, 3, 6, 7)], noise=0.25)
    expected = attention_map(features)

    def gives_up(*args, **kwargs):
        raise ArpackNoConvergence("no", np.zeros(0), np.zeros((0, 0)))

    monkeypatch.setattr(ncut, "eigsh", gives_up)
    np.testing.assert_allclose(attention_map(features), expected, atol=1e-9)
