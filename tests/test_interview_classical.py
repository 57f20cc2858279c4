"""interview/classical.py against scikit-learn, scipy, finite differences and brute force."""

import itertools

import numpy as np
import pytest
from scipy.special import expit
from sklearn.cluster import KMeans
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.preprocessing import StandardScaler

from interview import classical

N, D = 41, 6
NAN = float("nan")


def regression(seed=0, n=N, d=D):
    """Correlated features far from mean 0, and a noisy target."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(3, 5, size=d)
    y = X @ rng.normal(size=d) + rng.normal(size=n) + 7
    return X, y


def classification(seed=0, n=N, d=D):
    """Standardised features and labels that no plane separates."""
    rng = np.random.default_rng(seed)
    X = StandardScaler().fit_transform(rng.normal(size=(n, d)))
    y = (rng.random(n) < expit(X @ rng.normal(size=d) + 0.5)).astype(int)
    return X, y


def slopes(loss, w, b):
    """Central differences of loss(w, b): dw and db."""
    point = np.append(w, b)
    h = 1e-5
    steps = h * np.eye(len(point))
    both = [
        (loss(plus[:-1], plus[-1]) - loss(minus[:-1], minus[-1])) / (2 * h)
        for plus, minus in zip(point + steps, point - steps, strict=True)
    ]
    return np.array(both[:-1]), both[-1]


# ---- Linear regression ----------------------------------------------------------------------


def test_squared_error_and_its_gradient():
    X, y = regression()
    rng = np.random.default_rng(1)
    w, b = rng.normal(size=D), 0.7
    rows = list(zip(X, y, strict=True))

    def loss(w, b):
        errors = [b + sum(x * v for x, v in zip(row, w, strict=True)) - t for row, t in rows]
        return sum(error**2 for error in errors) / N

    assert classical.squared_error(X, y, w, b) == pytest.approx(loss(w, b), rel=1e-12)
    dw, db = classical.squared_error_gradient(X, y, w, b)
    expected_dw, expected_db = slopes(loss, w, b)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-6)
    assert db == pytest.approx(expected_db, rel=1e-6)


def test_linear_regression_by_full_batches_reaches_least_squares():
    X, y = regression()
    X = StandardScaler().fit_transform(X)
    w, b = classical.linear_regression(X, y, lr=0.2, epochs=10_000, batch_size=N)
    expected = np.linalg.lstsq(np.column_stack([X, np.ones(N)]), y)[0]
    np.testing.assert_allclose(w, expected[:-1], rtol=0, atol=1e-8)
    assert isinstance(b, float)
    assert b == pytest.approx(expected[-1], abs=1e-8)


def test_linear_regression_a_row_a_step_finds_weights_without_noise():
    X, _ = classification(n=53, d=4)
    true_w, true_b = np.array([1.5, -2.0, 0.0, 0.25]), -0.75
    w, b = classical.linear_regression(X, X @ true_w + true_b, lr=0.02, epochs=200)
    np.testing.assert_allclose(w, true_w, atol=1e-9)
    assert b == pytest.approx(true_b, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_an_epoch_of_sgd_is_the_steps_of_some_order_of_the_rows(batch_size):
    """Each batch is a mean over its own rows, the short last one too; all rows come once."""
    X, y = regression(n=3, d=2)
    y_class = np.array([1, 0, 1])
    lr, l2 = 0.01, 0.3

    def steps(order, gradient):
        w, b = np.zeros(2), 0.0
        for start in range(0, 3, batch_size):
            rows = order[start : start + batch_size]
            each = [gradient(X[i], i, w, b) for i in rows]
            w = w - lr * np.mean([dw for dw, _ in each], axis=0)
            b = b - lr * np.mean([db for _, db in each])
        return np.append(w, b)

    def linear(x, i, w, b):
        error = x @ w + b - y[i]
        return 2 * error * x, 2 * error

    def logistic(x, i, w, b):
        error = 1 / (1 + np.exp(-(x @ w + b))) - y_class[i]
        return error * x + l2 * w, error

    orders = [list(order) for order in itertools.permutations(range(3))]
    for seed in range(4):
        w, b = classical.linear_regression(X, y, lr, 1, batch_size, seed)
        distance = [np.abs(np.append(w, b) - steps(order, linear)).max() for order in orders]
        assert min(distance) < 1e-13
        w, b = classical.logistic_regression(X, y_class, lr, 1, batch_size, l2, seed)
        distance = [np.abs(np.append(w, b) - steps(order, logistic)).max() for order in orders]
        assert min(distance) < 1e-13


def test_epochs_have_orders_of_their_own_and_the_seed_fixes_them():
    rng = np.random.default_rng(0)
    first = np.concatenate(list(classical.batches(11, 4, rng)))
    second = np.concatenate(list(classical.batches(11, 4, rng)))
    assert sorted(first) == sorted(second) == list(range(11))
    assert list(first) != list(second)
    assert [len(batch) for batch in classical.batches(11, 4, rng)] == [4, 4, 3]
    X, y = classification(n=9, d=2)
    runs = [classical.linear_regression(X, y, 0.05, 3, seed=seed)[0] for seed in (0, 0, 1)]
    np.testing.assert_array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


# ---- Logistic regression and binary cross-entropy -------------------------------------------


def test_sigmoid_equals_scipys_and_does_not_overflow():
    z = np.array([-1000.0, -700.0, -30.0, -1.5, 0.0, 0.3, 40.0, 1000.0])
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_allclose(classical.sigmoid(z), expit(z), rtol=1e-12)


def test_binary_cross_entropy_equals_scikit_learns():
    rng = np.random.default_rng(0)
    p, y = rng.random(37), rng.integers(0, 2, 37)
    assert classical.binary_cross_entropy(p, y) == pytest.approx(log_loss(y, p), rel=1e-12)
    p[:4], y[:4] = (0, 0, 1, 1), (0, 1, 0, 1)
    value = classical.binary_cross_entropy(p, y)
    assert isinstance(value, float)
    assert value == pytest.approx(log_loss(y, p), rel=1e-12)


@pytest.mark.parametrize(
    ("p", "y", "expected"), [(0, 0, 0), (1, 1, 0), (0, 1, 36.0437), (1, 0, 36.0437)]
)
def test_binary_cross_entropy_is_finite_where_p_is_certain(p, y, expected):
    assert classical.binary_cross_entropy([p], [y]) == pytest.approx(expected, abs=1e-4)


def test_binary_cross_entropy_takes_soft_labels():
    p, y = np.array([0.2, 0.7]), np.array([0.5, 0.25])
    expected = (
        -(0.5 * np.log(0.2) + 0.5 * np.log(0.8) + 0.25 * np.log(0.7) + 0.75 * np.log(0.3)) / 2
    )
    assert classical.binary_cross_entropy(p, y) == pytest.approx(expected, rel=1e-14)


def test_logistic_loss_and_its_gradient():
    X, y = classification()
    rng = np.random.default_rng(2)
    w, b, l2 = rng.normal(size=D), -0.4, 0.37

    def loss(w, b):
        return log_loss(y, expit(X @ w + b)) + l2 / 2 * w @ w

    assert classical.logistic_loss(X, y, w, b, l2) == pytest.approx(loss(w, b), rel=1e-12)
    dw, db = classical.logistic_gradient(X, y, w, b, l2)
    expected_dw, expected_db = slopes(loss, w, b)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-6)
    assert db == pytest.approx(expected_db, rel=1e-6)


def test_logistic_loss_is_finite_for_large_logits():
    X, y = np.array([[1000.0], [-1000.0]]), np.array([0.0, 1.0])
    assert classical.logistic_loss(X, y, np.ones(1), 0.0) == pytest.approx(1000)


@pytest.mark.parametrize("C", [0.1, 1.0, 20.0])
def test_logistic_regression_equals_scikit_learns(C):
    """The bias is not penalised, and l2 = 1 / (C n)."""
    X, y = classification()
    theirs = LogisticRegression(C=C, tol=1e-12, max_iter=10_000).fit(X, y)
    w, b = classical.logistic_regression(X, y, 0.8, 6000, batch_size=N, l2=1 / (C * N))
    np.testing.assert_allclose(w, theirs.coef_[0], atol=1e-6)
    assert b == pytest.approx(theirs.intercept_[0], abs=1e-6)
    dw, db = classical.logistic_gradient(X, y, w, b, 1 / (C * N))
    assert max(np.abs(dw).max(), abs(db)) < 1e-10


# ---- Ridge and lasso ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 1e-3, 0.5, 30.0, 1e6])
def test_ridge_equals_scikit_learns(alpha):
    X, y = regression()
    w, b = classical.ridge(X, y, alpha)
    theirs = Ridge(alpha=alpha, solver="svd").fit(X, y)
    np.testing.assert_allclose(w, theirs.coef_, rtol=1e-8, atol=1e-10)
    assert b == pytest.approx(theirs.intercept_, rel=1e-8)
    residual = y - X @ w - b
    np.testing.assert_allclose(X.T @ residual, alpha * w, atol=1e-7)
    assert residual.sum() == pytest.approx(0, abs=1e-9)


def test_ridge_with_more_features_than_rows_and_a_constant_column():
    X, y = regression(n=7, d=11)
    X[:, 4] = 0.1
    w, b = classical.ridge(X, y, 0.3)
    theirs = Ridge(alpha=0.3, solver="svd").fit(X, y)
    np.testing.assert_allclose(w, theirs.coef_, rtol=1e-7, atol=1e-9)
    assert b == pytest.approx(theirs.intercept_, rel=1e-7)
    assert w[4] == 0


def test_ridge_with_alpha_0_gives_the_shortest_of_many_solutions():
    X, y = regression(n=7, d=11)
    X[:, 4] = 0.1
    w, b = classical.ridge(X, y, 0)
    np.testing.assert_allclose(X @ w + b, y, atol=1e-9)
    moving = np.delete(X, 4, axis=1)
    shortest = np.linalg.pinv(moving - moving.mean(axis=0), rcond=1e-10) @ (y - y.mean())
    np.testing.assert_allclose(np.delete(w, 4), shortest, atol=1e-9)
    assert w[4] == 0
    almost = classical.ridge(X, y, 1e-7)[0]
    np.testing.assert_allclose(w, almost, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.01, 0.5, 3.0, 1e4])
def test_lasso_equals_scikit_learns(alpha):
    X, y = regression()
    w, b = classical.lasso(X, y, alpha)
    if alpha == 0:
        expected_w, expected_b = classical.ridge(X, y, 0)
    else:
        theirs = Lasso(alpha=alpha, tol=1e-14, max_iter=1_000_000).fit(X, y)
        expected_w, expected_b = theirs.coef_, theirs.intercept_
    np.testing.assert_allclose(w, expected_w, atol=1e-7)
    assert b == pytest.approx(expected_b, abs=1e-6)
    np.testing.assert_array_equal(w == 0, expected_w == 0)


@pytest.mark.parametrize("alpha", [0.05, 1.0, 4.0])
def test_lasso_meets_its_optimality_conditions(alpha):
    """xⱼ·r / n is alpha with the weight's sign; where the weight is 0, at most alpha in size."""
    X, y = regression(seed=3)
    w, b = classical.lasso(X, y, alpha)
    residual = y - X @ w - b
    pull = X.T @ residual / N
    np.testing.assert_allclose(pull[w != 0], alpha * np.sign(w[w != 0]), atol=1e-7)
    assert np.all(np.abs(pull[w == 0]) <= alpha + 1e-9)
    assert residual.sum() == pytest.approx(0, abs=1e-8)


def test_lasso_beyond_the_largest_pull_is_all_0_and_just_below_it_is_not():
    X, y = regression()
    largest = np.abs((X - X.mean(axis=0)).T @ (y - y.mean())).max() / N
    w, b = classical.lasso(X, y, largest * 1.001)
    assert not w.any()
    assert b == pytest.approx(y.mean())
    assert np.count_nonzero(classical.lasso(X, y, largest * 0.999)[0]) == 1


def test_lasso_with_a_constant_column_and_more_features_than_rows():
    X, y = regression(n=7, d=11)
    X[:, 4] = 0.1
    w, _ = classical.lasso(X, y, 0.2)
    theirs = Lasso(alpha=0.2, tol=1e-14, max_iter=1_000_000).fit(X, y)
    np.testing.assert_allclose(w, theirs.coef_, atol=1e-6)
    assert w[4] == 0


def test_soft_threshold_minimises_its_problem():
    for rho, alpha in itertools.product((-2.3, -0.4, 0.0, 0.9, 5.0), (0.0, 0.5, 1.7)):
        w = np.linspace(-6, 6, 120_001)
        expected = w[np.argmin((w - rho) ** 2 / 2 + alpha * np.abs(w))]
        assert classical.soft_threshold(rho, alpha) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "ours, theirs", [(classical.ridge, Ridge()), (classical.lasso, Lasso(tol=1e-8))]
)
def test_the_best_alpha_is_the_one_that_scikit_learns_search_finds(ours, theirs):
    X, y = regression(n=30)
    y = y + np.random.default_rng(5).normal(0, 6, size=30)  # so that some penalty helps
    alphas = np.logspace(-3, 4, 8)
    folds = KFold(5, shuffle=True, random_state=0)
    search = GridSearchCV(theirs, {"alpha": alphas}, cv=folds, scoring="neg_mean_squared_error")
    wanted = search.fit(X, y).best_params_["alpha"]
    assert alphas[0] < wanted < alphas[-1]
    assert classical.best_alpha(ours, X, y, alphas) == wanted


def test_lasso_says_when_it_did_not_converge(monkeypatch):
    monkeypatch.setattr(classical, "MAX_SWEEPS", 2)
    with pytest.warns(UserWarning, match="2 sweeps at alpha=0.01"):
        classical.lasso(*regression(), 0.01)


# ---- k-means --------------------------------------------------------------------------------


def blobs(seed=0):
    rng = np.random.default_rng(seed)
    centers = rng.uniform(-10, 10, size=(5, 3))
    return np.concatenate(
        [c + rng.normal(size=(n, 3)) for c, n in zip(centers, (7, 11, 23, 31, 13), strict=True)]
    )


@pytest.mark.parametrize("seed", range(6))
def test_lloyd_equals_scikit_learns_from_the_same_centres(seed):
    X = np.random.default_rng(seed).normal(size=(67, 3))
    first = X[:4]
    centers, labels, inertia = classical.lloyd(X, first, 300)
    theirs = KMeans(4, init=first, n_init=1, tol=0, algorithm="lloyd").fit(X)
    np.testing.assert_allclose(centers, theirs.cluster_centers_, atol=1e-12)
    np.testing.assert_array_equal(labels, theirs.labels_)
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-12)


def test_k_means_finds_the_best_of_all_groupings():
    X = np.random.default_rng(4).normal(size=(8, 2))
    k = 3
    lowest = np.inf
    for labels in itertools.product(range(k), repeat=len(X)):
        labels = np.array(labels)
        groups = [X[labels == j] for j in range(k)]
        if all(len(group) for group in groups):
            lowest = min(lowest, sum(((group - group.mean(axis=0)) ** 2).sum() for group in groups))
    _, _, inertia = classical.k_means(X, k, n_init=40)
    assert inertia == pytest.approx(lowest, rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 1e7])
def test_k_means_ends_where_neither_step_changes_anything(shift):
    """Far from the origin too, where |x|² − 2 x·c + |c|² would cancel."""
    X = blobs() + shift
    centers, labels, inertia = classical.k_means(X, 5)
    distances = np.array([[np.sum((x - c) ** 2) for c in centers] for x in X])
    np.testing.assert_array_equal(labels, distances.argmin(axis=1))
    means = [X[labels == j].mean(axis=0) for j in range(5)]
    np.testing.assert_allclose(centers, means, rtol=1e-13)
    assert isinstance(inertia, float)
    assert inertia == pytest.approx(distances.min(axis=1).sum(), rel=1e-9)
    theirs = KMeans(5, n_init=20, random_state=0).fit(blobs())
    assert inertia == pytest.approx(theirs.inertia_, rel=1e-6)


def test_k_means_gives_an_empty_cluster_the_farthest_row():
    X = np.array([[0.0], [1.0], [2.0], [30.0]])
    first = np.array([[1.0], [500.0], [600.0]])  # the last two get no row
    labels = np.zeros(4, dtype=int)
    filled = classical.fill_empty(labels, np.array([1.0, 0.0, 1.5, 29.0]), 3)
    np.testing.assert_array_equal(filled, [0, 0, 2, 1])
    centers, labels, inertia = classical.lloyd(X, first, 300)
    assert len(set(labels)) == 3
    assert np.isfinite(centers).all()
    assert inertia == pytest.approx(0.5)  # {0, 1} {2} {30} or {0} {1, 2} {30}


def test_a_clusters_only_row_is_not_taken_from_it():
    labels, distances = np.array([0, 0, 1]), np.array([1.0, 2.0, 99.0])
    np.testing.assert_array_equal(classical.fill_empty(labels, distances, 3), [0, 2, 1])


def test_k_means_of_as_many_clusters_as_rows_of_one_and_of_equal_rows():
    X = np.random.default_rng(5).normal(size=(9, 2))
    _, labels, inertia = classical.k_means(X, 9)
    assert sorted(labels) == list(range(9))
    assert inertia == pytest.approx(0, abs=1e-24)
    centers, _, inertia = classical.k_means(X, 1)
    np.testing.assert_allclose(centers[0], X.mean(axis=0), atol=1e-14)
    assert inertia == pytest.approx(9 * X.var(axis=0).sum())
    centers, labels, inertia = classical.k_means(np.full((6, 2), 0.1), 3)
    np.testing.assert_allclose(centers, 0.1, atol=1e-15)
    assert inertia == pytest.approx(0, abs=1e-28)


def test_k_means_plus_plus_draws_in_proportion_to_the_squared_distance():
    X = np.array([[0.0], [1.0], [3.0]])
    rng = np.random.default_rng(6)
    pairs = [tuple(classical.k_means_plus_plus(X, 2, rng).ravel()) for _ in range(8000)]
    squares = {0: {1: 1, 3: 9}, 1: {0: 1, 3: 4}, 3: {0: 9, 1: 4}}
    for first, seconds in squares.items():
        for second, square in seconds.items():
            expected = square / sum(seconds.values()) / 3
            assert pairs.count((first, second)) / 8000 == pytest.approx(expected, abs=0.02)
    assert not any(first == second for first, second in pairs)


def test_more_starts_are_never_worse_and_max_iter_ends_early():
    X = np.random.default_rng(7).normal(size=(80, 2))
    inertias = [classical.k_means(X, 7, n_init=n)[2] for n in (1, 3, 10)]
    assert inertias == sorted(inertias, reverse=True)
    centers, labels, inertia = classical.k_means(X, 7, n_init=1, max_iter=1)
    distances = ((X[:, None] - centers) ** 2).sum(axis=2)
    np.testing.assert_array_equal(labels, distances.argmin(axis=1))
    assert inertia == pytest.approx(distances.min(axis=1).sum())
    assert inertia > inertias[0]


def test_purity_by_counting():
    labels, target = np.array([0, 0, 0, 2, 2, 5]), np.array([1, 1, 0, 4, 3, 3])
    assert classical.purity(labels, target) == pytest.approx((2 + 1 + 1) / 6)


# ---- Factorisation machine ------------------------------------------------------------------


def machine(seed=0, n_features=D, k=3):
    """A machine with parameters of no special size."""
    rng = np.random.default_rng(seed)
    model = classical.FactorizationMachine(n_features, k, seed)
    model.w0 = 0.8
    model.w = rng.normal(size=n_features)
    model.V = rng.normal(size=(n_features, k))
    return model


def double_sum(model, x):
    """The definition, a pair at a time."""
    total = model.w0 + sum(w * value for w, value in zip(model.w, x, strict=True))
    for i, j in itertools.combinations(range(len(x)), 2):
        total += sum(model.V[i, f] * model.V[j, f] for f in range(model.V.shape[1])) * x[i] * x[j]
    return total


@pytest.mark.parametrize("k", [1, 3, 8])
def test_fm_predicts_the_double_sum_over_pairs(k):
    model = machine(k=k)
    X = np.random.default_rng(8).normal(size=(5, D))
    np.testing.assert_allclose(model.predict(X), [double_sum(model, x) for x in X], rtol=1e-11)


def test_fm_starts_linear_in_0_with_small_v_that_the_seed_fixes():
    first, same, other = (classical.FactorizationMachine(50, 40, seed) for seed in (0, 0, 1))
    assert first.w0 == 0
    assert first.w.shape == (50,)
    assert not first.w.any()
    assert first.V.std() == pytest.approx(0.1, rel=0.05)
    np.testing.assert_array_equal(first.V, same.V)
    assert not np.array_equal(first.V, other.V)


def test_fm_gradients_are_the_slopes_of_the_squared_error():
    model = machine()
    x, y = np.random.default_rng(9).normal(size=D), 1.3
    dw0, dw, dV = model.gradients(x, y)
    start = np.concatenate([[model.w0], model.w, model.V.ravel()])

    def loss(parameters):
        moved = machine()
        moved.w0 = parameters[0]
        moved.w = parameters[1 : D + 1]
        moved.V = parameters[D + 1 :].reshape(D, 3)
        return (double_sum(moved, x) - y) ** 2

    h = 1e-5
    steps = h * np.eye(len(start))
    expected = [(loss(start + step) - loss(start - step)) / (2 * h) for step in steps]
    ours = np.concatenate([[dw0], dw, dV.ravel()])
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def test_an_epoch_of_fm_is_the_steps_of_some_order_of_the_rows():
    X, y = regression(n=3, d=4)
    X, y, lr = X / 10, y / 10, 0.02
    taken = set()
    for seed in range(5):
        fitted = classical.FactorizationMachine(4, 2, seed).fit(X, y, lr, 1)
        end = np.concatenate([[fitted.w0], fitted.w, fitted.V.ravel()])
        distance = {}
        for order in itertools.permutations(range(3)):
            model = classical.FactorizationMachine(4, 2, seed)
            for i in order:
                dw0, dw, dV = model.gradients(X[i], y[i])
                model.w0 = model.w0 - lr * dw0
                model.w = model.w - lr * dw
                model.V = model.V - lr * dV
            other = np.concatenate([[model.w0], model.w, model.V.ravel()])
            distance[order] = np.abs(end - other).max()
        nearest = min(distance, key=distance.get)
        assert distance[nearest] < 1e-13
        taken.add(nearest)
    assert len(taken) > 1  # the order is random


def test_fm_learns_pairs_that_a_linear_model_cannot():
    rng = np.random.default_rng(10)
    X = rng.normal(size=(300, 5))
    y = 1 + X[:, 0] - 2 * X[:, 1] * X[:, 3] + X[:, 2] * X[:, 4]
    model = classical.FactorizationMachine(5, 4, seed=0).fit(X[:200], y[:200], lr=0.01, epochs=60)
    w, b = classical.ridge(X[:200], y[:200], 0)
    linear = np.mean((X[200:] @ w + b - y[200:]) ** 2)
    assert np.mean((model.predict(X[200:]) - y[200:]) ** 2) < 0.01 * linear


# ---- Bad input ------------------------------------------------------------------------------

X2, Y2 = np.arange(12.0).reshape(4, 3) / 10, np.array([0.0, 1.0, 1.0, 0.0])
X_NAN = np.where(X2 == 0.5, NAN, X2)


def linear(X, y, lr=0.1, epochs=2, **settings):
    return classical.linear_regression(X, y, lr, epochs, **settings)


def logistic(X, y, lr=0.1, epochs=2, **settings):
    return classical.logistic_regression(X, y, lr, epochs, **settings)


def ridge(X, y):
    return classical.ridge(X, y, alpha=1.0)


def lasso(X, y):
    return classical.lasso(X, y, alpha=1.0)


def factorization(X, y, lr=0.1, epochs=2):
    return classical.FactorizationMachine(3, 2).fit(X, y, lr, epochs)


@pytest.mark.parametrize("train", [linear, logistic, ridge, lasso, factorization])
@pytest.mark.parametrize(
    ("X", "y", "message"),
    [
        (X2[0], Y2, r"X must be .* not of shape \(3,\)"),
        (X2[:0], Y2[:0], r"X must be .* not of shape \(0, 3\)"),
        (X_NAN, Y2, "X must be finite, but holds nan"),
        (X2, Y2[:, None], r"y must have shape \(4,\).* not \(4, 1\)"),
        (X2, Y2[:3], r"y must have shape \(4,\).* not \(3,\)"),
        (X2, [0, 1, np.inf, 1], "y must be finite, but holds inf"),
    ],
)
def test_bad_rows_are_refused_with_their_value(train, X, y, message):
    with pytest.raises(ValueError, match=message):
        train(X, y)


@pytest.mark.parametrize("train", [linear, logistic, factorization])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0}, "lr must be above 0, not 0"),
        ({"lr": -0.1}, "lr must be .* at least 0, not -0.1"),
        ({"lr": NAN}, "lr must be .* not nan"),
        ({"lr": "fast"}, "lr must be .* not 'fast'"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"epochs": 2.5}, "epochs must be a whole number of at least 1, not 2.5"),
        ({"epochs": True}, "epochs must be a whole number of at least 1, not True"),
    ],
)
def test_bad_settings_are_refused_with_their_value(train, settings, message):
    with pytest.raises(ValueError, match=message):
        train(X2, Y2, **settings)


@pytest.mark.parametrize("train", [linear, logistic])
def test_bad_batch_sizes_are_refused(train):
    with pytest.raises(ValueError, match=r"batch_size must be .* not -3"):
        train(X2, Y2, batch_size=-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("train", [linear, factorization])
def test_a_rate_at_which_training_overflows_is_named(train):
    with pytest.raises(ValueError, match=r"lr=1000.0 is too large.* overflowed in epoch \d+"):
        train(100 * X2, Y2, lr=1000.0, epochs=500)


def test_other_bad_input_is_refused_with_its_value():
    with pytest.raises(ValueError, match=r"labels 0 and 1, but holds 2.0"):
        logistic(X2, [0, 1, 2, 1])
    with pytest.raises(ValueError, match=r"l2 must be .* not -1"):
        logistic(X2, Y2, l2=-1)
    for solve in (classical.ridge, classical.lasso):
        with pytest.raises(ValueError, match=r"alpha must be .* not -0.5"):
            solve(X2, Y2, -0.5)
    for p in (1.2, -0.1, NAN):
        with pytest.raises(ValueError, match=f"p must lie in 0 … 1, but holds {p}"):
            classical.binary_cross_entropy([0.5, p], [0, 1])
    with pytest.raises(ValueError, match=r"y must lie in 0 … 1, but holds 2\.0"):
        classical.binary_cross_entropy([0.5, 0.5], [0, 2])
    with pytest.raises(ValueError, match=r"one shape .* \(2, 1\) and \(2,\)"):
        classical.binary_cross_entropy([[0.5], [0.5]], [0, 1])
    with pytest.raises(ValueError, match="k=5 clusters need as many rows, and X has 4"):
        classical.k_means(X2, 5)
    with pytest.raises(ValueError, match="k must be a whole number of at least 1, not 0"):
        classical.k_means(X2, 0)
    with pytest.raises(ValueError, match=r"n_init must be .* not 0"):
        classical.k_means(X2, 2, n_init=0)
    with pytest.raises(ValueError, match="X must be finite, but holds nan"):
        classical.k_means(X_NAN, 2)
    with pytest.raises(ValueError, match=r"k must be .* not 0"):
        classical.FactorizationMachine(3, 0)
    with pytest.raises(ValueError, match=r"n_features must be .* not -2"):
        classical.FactorizationMachine(-2, 3)
    fm = classical.FactorizationMachine(5, 2)
    with pytest.raises(ValueError, match="X must have 5 features, not 3"):
        fm.predict(X2)
    with pytest.raises(ValueError, match="X must have 5 features, not 3"):
        fm.fit(X2, Y2, 0.1, 1)


# ---- Shown on real data ---------------------------------------------------------------------


def test_the_two_balls_touch_one_contour():
    """The ridge weights in the picture have the loss that was asked for."""
    X, y = classical.whole_diabetes()
    X = X[:, [2, 3]]
    w, b = classical.lasso(X, y, 27.0)
    loss = classical.squared_error(X, y, w, b)
    smooth = classical.ridge_of_loss(X, y, loss)
    assert classical.squared_error(X, y, smooth, y.mean()) == pytest.approx(loss, rel=1e-9)
    assert w[1] == 0
    assert (smooth > 1).all()


def test_penalties_are_shown_with_tables_and_pictures(tmp_path, capsys):
    classical.show_penalties(tmp_path, n_alphas=11)
    assert "ridge: 10 10" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"classical_paths.csv", "classical_paths.png", "classical_balls.png"}
