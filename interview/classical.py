"""Classical machine learning by hand, in numpy (手撕经典机器学习).

    python -m interview.classical               tables and pictures into figures/interview/
    python -m interview.classical --out DIR     the same into DIR; about 3 minutes on one core

Read `linear_regression` first: logistic regression and the factorisation machine are the same loop
with another gradient. Axis letters in shape comments: n rows, d features, k clusters or factors.

1. Linear regression by SGD (线性回归、随机梯度下降)
   Asked     "Write linear regression with stochastic gradient descent, without a library.
             Full batch, one row or mini-batches: what is the difference?"
             「不用框架，手写线性回归的随机梯度下降。批量、随机、小批量梯度下降有什么区别？」
   Idea      Over the B rows of a batch the loss is mean (x·w + b − y)². Its slopes are
             dw = 2/B · Xᵀ(Xw + b − y) and db = 2/B · Σ(Xw + b − y); a step goes against them.
             An epoch takes all rows once, in a new random order.
   Cost      O(n d) an epoch for every batch size, O(d) memory beside the data.
             The closed form: O(n d² + d³), O(d²) memory.
   追问      Batch of 1? n noisy steps an epoch; they end in a cloud around the minimum unless the
             learning rate falls. Batch of n? One exact step an epoch.
             Why scale the features? The steepest direction bounds the rate, and at that rate the
             flattest direction sets the time.
   Mistakes  The batch's sum in place of its mean: the right rate then depends on B.
             The same order in every epoch. y of shape (n, 1): the error silently becomes (n, n).

2. Logistic regression (逻辑回归) and binary cross-entropy (二元交叉熵)
   Asked     "Derive the gradient of logistic regression. Why log-loss and not squared error?"
             「推导逻辑回归的梯度。为什么用交叉熵，不用平方误差？」
   Idea      p = σ(x·w + b), loss = −mean [y log p + (1 − y) log(1 − p)]. As σ′ = σ(1 − σ), the
             slope of a row's loss in its logit is p − y, and dw = 1/B · Xᵀ(p − y) + l2 · w.
   Cost      O(n d) an epoch.
   追问      Why not squared error? Its slope has the factor p(1 − p): a row that is wrong and
             certain hardly learns. It is not convex in w either.
             Classes that a plane separates? Without a penalty the weights grow for ever.
             scikit-learn's C? l2 = 1 / (C n).
   Mistakes  log 0. exp(−z) that overflows at z = −1000. A penalty on the bias.

3. Ridge and lasso (岭回归、L2 正则；套索回归、L1 正则)
   Asked     "Why is L1 sparse, and L2 smooth?"
             「为什么 L1 正则产生稀疏解，L2 正则让权重平滑？」
   Idea      The slope of |w| is 1 however small w is: it pushes a weight onto 0 and holds it there
             while the data pull with less than alpha. The slope of w² fades with w, so that the
             weight gets small and never 0. As a picture: the L1 ball has corners on the axes.
             Ridge is solved at once: w = (XᵀX + alpha I)⁻¹ Xᵀy.
             Lasso is solved a weight at a time: sign(rho) · max(|rho| − alpha, 0), the soft
             threshold of the data's pull rho, over the mean square of the column.
   Cost      Ridge O(n d² + d³). Lasso O(n d) a sweep over the weights.
   追问      As priors? L2 is a Gaussian on the weights, L1 a Laplace distribution.
             Two equal columns? L2 gives both the same weight, L1 leaves open which one gets it.
             Gradient descent for L1? |w| has no slope at 0, and steps jump over it.
             L0? It counts the weights that are not 0: sparse, but a search over all subsets.
   Mistakes  A penalty on the intercept. Features left in their units: a metre is then penalised
             otherwise than a millimetre. One problem's alpha in the other: here, as in
             scikit-learn, lasso halves the *mean* of the squares, and ridge takes their *sum*.

4. k-means (K 均值聚类)
   Asked     "Write k-means. How does it start and stop, and what if a cluster is empty?"
             「手写 k-means。怎样初始化？何时停止？出现空簇怎么办？」
   Idea      In turn: each row goes to its nearest centre, each centre to the mean of its rows.
             Neither can raise the inertia (the sum of squared distances), and there are finitely
             many groupings, so that it stops. k-means++ spreads the first centres: each is a row,
             drawn in proportion to its squared distance to the nearest centre so far.
             An empty cluster takes the row that lies farthest from its own centre.
   Cost      O(n k d) a round, O(n k) memory.
   追问      The best grouping? Not for sure: start n_init times, keep the lowest inertia.
             How many clusters? Where the curve of inertia over k bends, or by the silhouette.
             Which shapes? Round ones of like size; for others a mixture of Gaussians or DBSCAN.
   Mistakes  The mean of an empty cluster: nan. Choosing k by the lowest inertia: more clusters
             always have less. |x|² − 2 x·c + |c|² far from the origin: it cancels.

5. Factorisation machine, FM (因子分解机)
   Asked     "What does an FM add to a linear model? How are all pairs computed in O(kn)?"
             「FM 比线性模型多了什么？二阶交叉项怎样化简到 O(kn)？」
   Idea      y = w0 + Σ wᵢxᵢ + Σ_{i<j} ⟨vᵢ, vⱼ⟩ xᵢxⱼ. A pair's weight is the product of two short
             vectors, and so is known for pairs that never occurred together in training.
             From (Σ aᵢ)² = Σ aᵢ² + 2 Σ_{i<j} aᵢaⱼ with aᵢ = vᵢf xᵢ, for each factor f:
             Σ_{i<j} vᵢf vⱼf xᵢxⱼ = ½ [(Σ vᵢf xᵢ)² − Σ vᵢf² xᵢ²]
   Cost      O(k d) a row (the question's n is our d), against O(k d²) for the double sum.
             On sparse rows only the features that are not 0 count.
   追问      Against free weights for all pairs? Those are O(d²), and stay 0 for unseen pairs.
             One-hot user and item? Then it is matrix factorisation with biases.
             FFM? A vector for every field it meets. DeepFM? The same vectors also enter an MLP.
   Mistakes  V starts at 0: then its gradient is 0 for ever. The ½ forgotten. i = j kept.
"""

import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from scipy.optimize import linear_sum_assignment
from sklearn import datasets
from sklearn.cluster import KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, train_test_split
from sklearn.preprocessing import PolynomialFeatures

import metrics
from interview import check_whole

FIGURES = Path(__file__).resolve().parent.parent / "figures" / "interview"
TOLERANCE = 1e-12  # lasso stops when a sweep moves no prediction by more than this share of y's std
MAX_SWEEPS = 100_000  # and at the latest after so many sweeps


# ---- Checks of the input --------------------------------------------------------------------


def check_matrix(X) -> np.ndarray:
    """X as float64 (n, d); ValueError unless it is finite and has a row and a column."""
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"X must be (rows, features), one or more of each, not of shape {X.shape}")
    if not np.isfinite(X).all():
        raise ValueError(f"X must be finite, but holds {X[~np.isfinite(X)][0]}")
    return X


def check_rows(X, y) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d) and y (n,) as float64; ValueError unless both are finite and their rows match."""
    X = check_matrix(X)
    y = np.asarray(y, dtype=np.float64)
    if y.shape != (len(X),):
        raise ValueError(
            f"y must have shape ({len(X)},), a number for each row of X, not {y.shape}"
        )
    if not np.isfinite(y).all():
        raise ValueError(f"y must be finite, but holds {y[~np.isfinite(y)][0]}")
    return X, y


def check_not_negative(**values) -> None:
    """ValueError for the first named value that is no finite number of at least 0."""
    for name, value in values.items():
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not real or not 0 <= value < np.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, not {value!r}")


def check_rate(lr) -> None:
    """ValueError unless the learning rate is a finite number above 0."""
    check_not_negative(lr=lr)
    if lr == 0:
        raise ValueError(f"lr must be above 0, not {lr!r}: nothing would be learned")


def check_converging(lr, epoch, *parameters) -> None:
    """ValueError if a parameter is no longer finite."""
    if not all(np.isfinite(parameter).all() for parameter in parameters):
        raise ValueError(f"{lr=} is too large: training overflowed in epoch {epoch}; try a tenth")


# ---- 1. Linear regression by SGD ------------------------------------------------------------


def batches(n: int, batch_size: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The numbers of n rows in a new random order, batch_size at a time; the last may be fewer."""
    order = rng.permutation(n)
    for start in range(0, n, batch_size):
        yield order[start : start + batch_size]


def squared_error(X, y, w, b) -> float:
    """Mean over rows of (x·w + b − y)²; X (n, d), y (n,), w (d,), b a number."""
    return float(np.mean((X @ w + b - y) ** 2))


def squared_error_gradient(X, y, w, b) -> tuple[np.ndarray, float]:
    """Slopes of `squared_error` in w and b: dw (d,), db a number."""
    error = X @ w + b - y  # (n,)
    dw = 2 * X.T @ error / len(X)  # (d,)
    db = 2 * error.mean()
    return dw, db


def linear_regression(X, y, lr, epochs, batch_size=1, seed=0) -> tuple[np.ndarray, float]:
    """Linear regression by stochastic gradient descent (随机梯度下降): w (d,) and b, from 0.

    X is (n, d), y (n,). The loss is the mean over a batch of (x·w + b − y)², with no ½ before it.
    ValueError for shapes that do not match, values that are not finite, and a rate too large.
    """
    X, y = check_rows(X, y)
    check_rate(lr)
    check_whole(epochs=epochs, batch_size=batch_size)
    rng = np.random.default_rng(seed)
    w = np.zeros(X.shape[1])
    b = 0.0
    for epoch in range(epochs):
        for rows in batches(len(X), batch_size, rng):
            dw, db = squared_error_gradient(X[rows], y[rows], w, b)
            w -= lr * dw
            b -= lr * db
        check_converging(lr, epoch, w, b)
    return w, float(b)


# ---- 2. Logistic regression and binary cross-entropy ----------------------------------------


def sigmoid(z) -> np.ndarray:
    """σ(z) = 1 / (1 + e^−z), any shape, as e^−log(1 + e^−z): no overflow for z = −1000."""
    return np.exp(-np.logaddexp(0, -z))


def binary_cross_entropy(p, y) -> float:
    """−mean [y log p + (1 − y) log(1 − p)], 二元交叉熵; p and y of one shape, both in 0 … 1.

    Finite at p = 0 and 1: p is clipped to eps … 1 − eps, eps = 2.2e-16, as scikit-learn's log_loss
    does. A row that is certain and wrong then costs 36.04. ValueError for values outside 0 … 1.
    """
    p = np.asarray(p, dtype=np.float64)
    y = np.asarray(y, dtype=np.float64)
    if p.shape != y.shape or p.size == 0:
        raise ValueError(f"p and y must have one shape and a value, not {p.shape} and {y.shape}")
    for name, values in (("p", p), ("y", y)):
        outside = values[~((values >= 0) & (values <= 1))]  # nan is outside too
        if outside.size:
            raise ValueError(f"{name} must lie in 0 … 1, but holds {outside[0]} (is it a logit?)")
    eps = np.finfo(np.float64).eps
    p = np.clip(p, eps, 1 - eps)
    return float(-np.mean(y * np.log(p) + (1 - y) * np.log(1 - p)))


def logistic_loss(X, y, w, b, l2=0.0) -> float:
    """Mean of log(1 + e^z) − y z over rows, z = x·w + b, plus (l2/2)·‖w‖²: finite for every z."""
    z = X @ w + b  # (n,)
    return float(np.mean(np.logaddexp(0, z) - y * z) + l2 / 2 * np.sum(w**2))


def logistic_gradient(X, y, w, b, l2=0.0) -> tuple[np.ndarray, float]:
    """Slopes of `logistic_loss` in w and b: dw (d,), db a number. The bias is not penalised."""
    error = sigmoid(X @ w + b) - y  # (n,), p − y
    dw = X.T @ error / len(X) + l2 * w  # (d,)
    db = error.mean()
    return dw, db


def logistic_regression(X, y, lr, epochs, batch_size=1, l2=0.0, seed=0) -> tuple[np.ndarray, float]:
    """Logistic regression (逻辑回归) by stochastic gradient descent: w (d,) and b, from 0.

    X is (n, d), y (n,) of 0 and 1. The loss is a batch's mean binary cross-entropy + (l2/2)·‖w‖²;
    l2 = 1 / (C n) is scikit-learn's C. ValueError as in `linear_regression`, and for other labels.
    """
    X, y = check_rows(X, y)
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"y must hold labels 0 and 1, but holds {y[~np.isin(y, (0, 1))][0]}")
    check_rate(lr)
    check_whole(epochs=epochs, batch_size=batch_size)
    check_not_negative(l2=l2)
    rng = np.random.default_rng(seed)
    w = np.zeros(X.shape[1])
    b = 0.0
    for epoch in range(epochs):
        for rows in batches(len(X), batch_size, rng):
            dw, db = logistic_gradient(X[rows], y[rows], w, b, l2)
            w -= lr * dw
            b -= lr * db
        check_converging(lr, epoch, w, b)
    return w, float(b)


# ---- 3. Ridge and lasso ---------------------------------------------------------------------


def centred(X, y) -> tuple[np.ndarray, np.ndarray]:
    """X and y less their means.

    The best intercept is then 0, and no penalty meets it; afterwards b = mean y − mean x · w.
    """
    X_centred = X - X.mean(axis=0)
    X_centred[:, np.ptp(X, axis=0) == 0] = 0.0  # a constant column is 0 exactly, without rounding
    return X_centred, y - y.mean()


def ridge(X, y, alpha) -> tuple[np.ndarray, float]:
    """The w (d,) and b with the least ‖y − Xw − b‖² + alpha·‖w‖²: scikit-learn's Ridge.

    X is (n, d), y (n,). ValueError for shapes that do not match, values that are not finite, and
    alpha below 0. With alpha = 0 and columns that depend on each other: the shortest solution.
    """
    X, y = check_rows(X, y)
    check_not_negative(alpha=alpha)
    Xc, yc = centred(X, y)
    if alpha == 0:
        w = np.linalg.lstsq(Xc, yc)[0]
    else:
        w = np.linalg.solve(Xc.T @ Xc + alpha * np.eye(X.shape[1]), Xc.T @ yc)
    b = y.mean() - X.mean(axis=0) @ w
    return w, float(b)


def soft_threshold(rho, alpha) -> float:
    """The w with the least ½(w − rho)² + alpha·|w|: rho, by alpha nearer to 0 and not past it."""
    return np.sign(rho) * max(abs(rho) - alpha, 0.0)


def lasso(X, y, alpha) -> tuple[np.ndarray, float]:
    """The w (d,) and b with the least 1/(2n)·‖y − Xw − b‖² + alpha·‖w‖₁: scikit-learn's Lasso.

    Coordinate descent (坐标下降; Friedman, Hastie and Tibshirani 2010): one weight is solved
    exactly while the others are held, in turn. X is (n, d), y (n,). ValueError as in `ridge`, and
    a warning if MAX_SWEEPS were too few.
    """
    X, y = check_rows(X, y)
    check_not_negative(alpha=alpha)
    Xc, residual = centred(X, y)  # the residual is y − Xw, and w is 0
    mean_square = np.mean(Xc**2, axis=0)  # (d,)
    w = np.zeros(X.shape[1])
    for _ in range(MAX_SWEEPS):
        largest_move = 0.0
        for j in np.flatnonzero(mean_square):  # a constant column keeps the weight 0
            before = w[j]
            rho = Xc[:, j] @ residual / len(X) + mean_square[j] * before  # the data's pull
            w[j] = soft_threshold(rho, alpha) / mean_square[j]
            residual -= Xc[:, j] * (w[j] - before)
            largest_move = max(largest_move, abs(w[j] - before) * np.sqrt(mean_square[j]))
        if largest_move <= TOLERANCE * y.std():
            break
    else:
        warnings.warn(f"lasso still moves after {MAX_SWEEPS} sweeps at {alpha=}", stacklevel=2)
    b = y.mean() - X.mean(axis=0) @ w
    return w, float(b)


# ---- 4. k-means -----------------------------------------------------------------------------


def squared_distances(X, centers) -> np.ndarray:
    """Squared distance of each row of X (n, d) to each of the centers (k, d): (n, k)."""
    return np.stack([np.sum((X - center) ** 2, axis=1) for center in centers], axis=1)


def k_means_plus_plus(X, k, rng) -> np.ndarray:
    """k rows of X as first centres (k, d), far apart (Arthur and Vassilvitskii 2007).

    Each is drawn in proportion to its squared distance to the nearest centre so far; if that is 0
    for all rows, it is any row.
    """
    centers = [X[rng.integers(len(X))]]
    while len(centers) < k:
        distances = squared_distances(X, centers).min(axis=1)  # (n,)
        total = distances.sum()
        chances = distances / total if total > 0 else None
        centers.append(X[rng.choice(len(X), p=chances)])
    return np.array(centers)


def fill_empty(labels, distances, k) -> np.ndarray:
    """Labels (n,), where each empty cluster was given the row farthest from its own centre.

    `distances` (n,) are the rows' squared distances to their own centres. A cluster's only row is
    left to it.
    """
    labels = labels.copy()
    for empty in np.setdiff1d(np.arange(k), labels):
        sizes = np.bincount(labels, minlength=k)
        farthest = np.where(sizes[labels] > 1, distances, -1.0).argmax()
        labels[farthest] = empty
    return labels


def lloyd(X, centers, max_iter) -> tuple[np.ndarray, np.ndarray, float]:
    """Rows to the nearest centre, centres to the mean of their rows, until no row moves.

    X (n, d) and first centers (k, d) -> centers (k, d), labels (n,), inertia (Lloyd 1982).
    """
    k = len(centers)
    labels = None
    for _ in range(max_iter):
        distances = squared_distances(X, centers)  # (n, k)
        nearest = fill_empty(distances.argmin(axis=1), distances.min(axis=1), k)
        if labels is not None and np.array_equal(nearest, labels):
            break
        labels = nearest
        centers = np.stack([X[labels == j].mean(axis=0) for j in range(k)])
    distances = squared_distances(X, centers)
    return centers, distances.argmin(axis=1), float(distances.min(axis=1).sum())


def k_means(X, k, n_init=10, max_iter=300, seed=0) -> tuple[np.ndarray, np.ndarray, float]:
    """k-means (K 均值), best of n_init k-means++ starts: centers (k, d), labels (n,), inertia.

    Inertia is the sum over rows of the squared distance to the nearest centre. X is (n, d).
    ValueError for values that are not finite, and for k below 1 or above n.
    """
    X = check_matrix(X)
    check_whole(k=k, n_init=n_init, max_iter=max_iter)
    if k > len(X):
        raise ValueError(f"{k=} clusters need as many rows, and X has {len(X)}")
    rng = np.random.default_rng(seed)
    best = None
    for _ in range(n_init):
        result = lloyd(X, k_means_plus_plus(X, k, rng), max_iter)
        if best is None or result[2] < best[2]:
            best = result
    return best


def purity(labels, target) -> float:
    """纯度, the share of rows whose class is the commonest of their cluster; both (n,), int."""
    commonest = [np.bincount(target[labels == j]).max() for j in np.unique(labels)]
    return float(np.sum(commonest) / len(target))


# ---- 5. Factorisation machine ---------------------------------------------------------------


def factorization(X, w0, w, V) -> np.ndarray:
    """w0 + Σ wᵢxᵢ + Σ_{i<j} ⟨vᵢ, vⱼ⟩ xᵢxⱼ a row, in O(k d); X (n, d), w (d,), V (d, k) -> (n,)."""
    square_of_sum = (X @ V) ** 2  # (n, k)
    sum_of_squares = X**2 @ V**2  # (n, k)
    pairs = 0.5 * np.sum(square_of_sum - sum_of_squares, axis=1)  # (n,)
    return w0 + X @ w + pairs


class FactorizationMachine:
    """Factorisation machine (因子分解机; Rendle 2010) for regression, by squared error.

    Parameters: w0, a number; w (n_features,); V (n_features, k). w0 and w start from 0, V from
    N(0, 0.1²). ValueError for n_features or k below 1.
    """

    def __init__(self, n_features: int, k: int, seed: int = 0):
        check_whole(n_features=n_features, k=k)
        self.rng = np.random.default_rng(seed)
        self.w0 = 0.0
        self.w = np.zeros(n_features)
        self.V = self.rng.normal(0, 0.1, size=(n_features, k))

    def predict(self, X) -> np.ndarray:
        """X (n, n_features) -> (n,). ValueError for another width and for values not finite."""
        X = check_matrix(X)
        if X.shape[1] != len(self.w):
            raise ValueError(f"X must have {len(self.w)} features, not {X.shape[1]}")
        return factorization(X, self.w0, self.w, self.V)

    def gradients(self, x, y) -> tuple[float, np.ndarray, np.ndarray]:
        """Slopes of (ŷ − y)² in w0, w and V, each of its shape, for one row x (n_features,)."""
        error = factorization(x[None], self.w0, self.w, self.V)[0] - y
        sums = x @ self.V  # (k,), Σⱼ vⱼ xⱼ
        slopes = np.outer(x, sums) - (x**2)[:, None] * self.V  # (n_features, k), of ŷ in V
        return 2 * error, 2 * error * x, 2 * error * slopes

    def fit(self, X, y, lr, epochs) -> "FactorizationMachine":
        """SGD, a row a step, in a new random order each epoch, from where the model stands.

        X (n, n_features), y (n,). ValueError as in `linear_regression`, and for another width.
        """
        X, y = check_rows(X, y)
        check_rate(lr)
        check_whole(epochs=epochs)
        if X.shape[1] != len(self.w):
            raise ValueError(f"X must have {len(self.w)} features, not {X.shape[1]}")
        for epoch in range(epochs):
            for row in self.rng.permutation(len(X)):
                dw0, dw, dV = self.gradients(X[row], y[row])
                self.w0 -= lr * dw0
                self.w -= lr * dw
                self.V -= lr * dV
            check_converging(lr, epoch, self.w0, self.w, self.V)
        return self


# ---- Shown on real data: SGD beside the exact solution --------------------------------------


def standardised_split(data, seed: int) -> tuple[np.ndarray, ...]:
    """X_train, X_test, y_train, y_test: a quarter held out, features in training mean and std."""
    X_train, X_test, y_train, y_test = train_test_split(
        data.data, data.target, test_size=0.25, random_state=seed
    )
    mean = X_train.mean(axis=0)
    std = X_train.std(axis=0)
    return (X_train - mean) / std, (X_test - mean) / std, y_train, y_test


@dataclass
class Problem:
    """Something SGD is to solve, and its solution by another route."""

    name: str
    train: Callable  # (lr, epochs, batch_size, seed) -> w, b
    loss: Callable  # (w, b) -> what is minimised
    score: Callable  # (w, b) -> how good it is on the held-out rows
    solution: tuple[np.ndarray, float]
    n_train: int
    rates: tuple[float, float, float]  # for a batch of 1, of 16, of all rows


def diabetes_problem() -> Problem:
    """Linear regression on diabetes, scored by R²; the solution is the closed form."""
    X, X_test, y, y_test = standardised_split(datasets.load_diabetes(scaled=False), seed=0)

    def train(lr, epochs, batch_size, seed):
        return linear_regression(X, y, lr, epochs, batch_size, seed)

    def loss(w, b):
        return squared_error(X, y, w, b)

    def score(w, b):
        return r2_score(y_test, X_test @ w + b)

    name = "linear regression: diabetes"
    return Problem(name, train, loss, score, ridge(X, y, 0), len(X), (0.003, 0.03, 0.2))


def cancer_problem() -> Problem:
    """Logistic regression on breast cancer, scored by accuracy; solved by scikit-learn at C = 1."""
    X, X_test, y, y_test = standardised_split(datasets.load_breast_cancer(), seed=0)
    l2 = 1 / len(X)
    theirs = LogisticRegression(C=1.0, tol=1e-12, max_iter=100_000).fit(X, y)

    def train(lr, epochs, batch_size, seed):
        return logistic_regression(X, y, lr, epochs, batch_size, l2, seed)

    def loss(w, b):
        return logistic_loss(X, y, w, b, l2)

    def score(w, b):
        return np.mean((X_test @ w + b > 0) == y_test)

    name = "logistic regression: breast cancer"
    solution = (theirs.coef_[0], theirs.intercept_[0])
    return Problem(name, train, loss, score, solution, len(X), (0.03, 0.3, 0.5))


LOSS = "loss_above_least_percent"


def sgd_rows(problem: Problem, n_seeds: int) -> list[dict]:
    """A row for each batch size, number of epochs and seed."""
    rows = []
    least = problem.loss(*problem.solution)
    batch_sizes = (1, 16, problem.n_train)
    longest = (256, 1024, 16384)  # epochs: the larger the batch, the fewer steps they have
    for batch_size, lr, most_epochs in zip(batch_sizes, problem.rates, longest, strict=True):
        for epochs in 2 ** np.arange(np.log2(most_epochs) + 1, dtype=int):
            for seed in range(n_seeds):
                w, b = problem.train(lr, epochs, batch_size, seed)
                row = {
                    "problem": problem.name,
                    "batch_size": batch_size,
                    "lr": lr,
                    "epochs": epochs,
                    "seed": seed,
                    "loss": problem.loss(w, b),
                    LOSS: 100 * (problem.loss(w, b) / least - 1),
                    "largest_weight_error": np.abs(w - problem.solution[0]).max(),
                    "held_out_score": problem.score(w, b),
                    "held_out_score_of_solution": problem.score(*problem.solution),
                }
                rows.append(row)
    return rows


def draw_sgd(table: pd.DataFrame, path: Path) -> None:
    """How far the loss is above its least value after so many epochs, by batch size."""
    title = "How near do batches of 1, of 16 and of all rows come to the least loss?"
    spread = metrics.bands_of(table)
    size = {"n_columns": 2, "height": 5.6, "sharex": True, "sharey": True}
    names = ("batch of 1 row", "batch of 16", "batch of all")
    with metrics.picture(path, f"{title}\n{spread}", **size) as panels:
        for axes, (problem, rows) in zip(panels, table.groupby("problem", sort=False), strict=True):
            by_size = rows.groupby("batch_size")
            for color, name, (_, run) in zip(metrics.COLORS, names, by_size, strict=False):
                label = f"{name}, learning rate {run['lr'].iloc[0]:g}"
                style = {"errorbar": ("pi", 100), "marker": "o", "markersize": 4}
                metrics.draw_line(axes, run, "epochs", LOSS, color=color, label=label, **style)
            axes.set(title=problem, xscale="log", yscale="log", ylim=(1e-6, 1e3), xlabel="epochs")
            axes.set_xticks([1, 10, 100, 1000, 10_000], ["1", "10", "100", "1,000", "10,000"])
            axes.set_yticks([1e-6, 1e-4, 0.01, 1, 100], ["0.000001", "0.0001", "0.01", "1", "100"])
            axes.minorticks_off()
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
        panels[0].set_ylabel("loss above its least value (%)")


def show_sgd(out: Path) -> None:
    """Batch, stochastic and mini-batch descent against the exact solutions."""
    table = pd.DataFrame(sgd_rows(diabetes_problem(), 3) + sgd_rows(cancer_problem(), 3))
    table.to_csv(out / "classical_sgd.csv", index=False, float_format="%.6g")
    draw_sgd(table, out / "classical_sgd.png")
    print(
        "SGD after its last epoch, means of 3 seeds. Loss: % above the least one, lower is better;"
    )
    print("score on held-out rows: R² and accuracy, higher is better; exact: the solution's score")
    rows_of = ["problem", "batch_size", "lr"]
    last = table[table["epochs"] == table.groupby(rows_of)["epochs"].transform("max")]
    measured = {
        LOSS: "loss",
        "held_out_score": "score",
        "held_out_score_of_solution": "exact",
    }
    means = last.groupby([*rows_of, "epochs"])[list(measured)].mean().round(4) + 0.0  # no −0
    print(means.rename(columns=measured).reset_index().to_string(index=False))


# ---- Shown on real data: why L1 is sparse and L2 smooth -------------------------------------

DIABETES_FEATURES = (
    "age",
    "sex",
    "body mass index",
    "blood pressure",
    "total cholesterol",
    "LDL cholesterol",
    "HDL cholesterol",
    "cholesterol / HDL",
    "log triglycerides",
    "blood sugar",
)


def whole_diabetes() -> tuple[np.ndarray, np.ndarray]:
    """All 442 patients: features (442, 10) of mean 0 and std 1, score of the disease (442,)."""
    data = datasets.load_diabetes(scaled=False)
    X = (data.data - data.data.mean(axis=0)) / data.data.std(axis=0)
    return X, data.target


def path_rows(n_alphas: int) -> list[dict]:
    """A row for each method, alpha and feature: its weight."""
    X, y = whole_diabetes()
    methods = {
        "lasso": (lasso, np.geomspace(0.05, 50, n_alphas)),
        "ridge": (ridge, np.geomspace(0.5, 500_000, n_alphas)),
    }
    rows = []
    for method, (solve, alphas) in methods.items():
        for alpha in alphas:
            w, _ = solve(X, y, alpha)
            for feature, weight in zip(DIABETES_FEATURES, w, strict=True):
                row = {"method": method, "alpha": alpha, "feature": feature, "weight": weight}
                rows.append(row)
    return rows


def draw_paths(table: pd.DataFrame, path: Path) -> None:
    """Weights over alpha, lasso beside ridge; below them how many weights are not 0."""
    titles = {"lasso": "lasso (L1)", "ridge": "ridge (L2)"}
    colors = metrics.colors_of(DIABETES_FEATURES[:5], ordered=False)
    title = "What does a penalty do to the weights? Diabetes, ten features, 442 patients"
    size = {"n_rows": 2, "n_columns": 2, "height": 7.5, "sharex": "col", "sharey": "row"}
    with metrics.picture(path, title, height_ratios=(3, 1), **size) as panels:
        for column, (method, rows) in enumerate(table.groupby("method", sort=False)):
            top, bottom = panels[:, column]
            for number, feature in enumerate(DIABETES_FEATURES):
                one = rows[rows["feature"] == feature]
                color = colors[DIABETES_FEATURES[number % 5]]
                style = "-" if number < 5 else "--"
                top.plot(one["alpha"], one["weight"], style, color=color, label=feature)
            top.set(title=titles[method])
            n_used = rows.groupby("alpha")["weight"].agg(np.count_nonzero)
            bottom.step(n_used.index, n_used, where="mid", color="black")
            metrics.log_scale(bottom.xaxis, rows["alpha"])
            bottom.xaxis.set_major_formatter("{x:,g}")
            bottom.set(xlabel="alpha (stronger penalty →)", ylim=(-0.5, 11), yticks=(0, 5, 10))
        panels[0, 0].set_ylabel("weight (disease score per std)")
        panels[1, 0].set_ylabel("weights ≠ 0")
        lines, names = top.get_legend_handles_labels()
        top.figure.legend(lines, names, loc="outside lower center", ncols=4)


def ridge_of_loss(X, y, loss: float) -> np.ndarray:
    """The ridge weights (d,) whose squared error is `loss`: alpha is halved in on."""
    low, high = 1e-3, 1e9
    for _ in range(100):
        alpha = np.sqrt(low * high)
        w, b = ridge(X, y, alpha)
        if squared_error(X, y, w, b) < loss:
            low = alpha
        else:
            high = alpha
    return w


def draw_ball(ax, X, y, w, corners: np.ndarray, title: str) -> None:
    """Contours of the squared error in two weights; a ball (n, 2), and w, where it touches."""
    best, b = ridge(X, y, 0)
    first, second = np.meshgrid(np.linspace(-25, 65, 181), np.linspace(-35, 55, 181))
    grid = np.stack([first.ravel(), second.ravel()])  # (2, n)
    loss = np.mean((X @ grid + b - y[:, None]) ** 2, axis=0).reshape(first.shape)
    least = squared_error(X, y, best, b)
    touching = squared_error(X, y, w, b)
    levels = least + (touching - least) * np.array([0.25, 0.55, 1.0, 1.6, 2.4])
    ax.contour(first, second, loss, levels, colors="grey", linewidths=(1, 1, 2, 1, 1))
    ax.fill(*corners.T, color=metrics.COLORS[0], alpha=0.3)
    ax.plot(*best, "k+", markersize=10)
    ax.annotate("least\nloss", best, (0, 6), textcoords="offset points", ha="center")
    ax.plot(*w, "o", color=metrics.COLORS[1])
    label = ax.annotate(f"({w[0]:.0f}, {w[1]:.0f})", w, (7, -14), textcoords="offset points")
    label.set(color=metrics.COLORS[1], bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    ax.axhline(0, color="black", linewidth=0.8)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.grid(False)
    ax.set(title=title, aspect="equal", xticks=range(-20, 61, 20), yticks=range(-20, 41, 20))
    ax.set_xlabel("weight of body mass index\n(disease score per std)")
    ax.set_ylabel("weight of blood pressure\n(disease score per std)")


def draw_balls(path: Path, alpha: float = 27.0) -> None:
    """The L1 and the L2 ball where they touch the same contour; one weight under each penalty."""
    X, y = whole_diabetes()
    X = X[:, [2, 3]]  # body mass index, blood pressure
    sparse, b = lasso(X, y, alpha)
    smooth = ridge_of_loss(X, y, squared_error(X, y, sparse, b))
    diamond = np.abs(sparse).sum() * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
    angles = np.linspace(0, 2 * np.pi, 200)
    circle = np.linalg.norm(smooth) * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    title = "Why is L1 sparse and L2 smooth? Diabetes, two features"
    explained = "thick: the contour of the loss that both balls touch"
    size = {"n_columns": 3, "width": 12, "height": 5.2}
    with metrics.picture(path, f"{title}\n({explained})", **size) as (left, middle, right):
        draw_ball(left, X, y, sparse, diamond, "L1: the ball's corner")
        draw_ball(middle, X, y, smooth, circle, "L2: a ball without corners")
        rho = np.linspace(-3, 3, 301)
        right.plot(rho, rho, ":", color="grey", label="no penalty")
        lasso_weight = [soft_threshold(r, 1.0) for r in rho]
        right.plot(rho, lasso_weight, color=metrics.COLORS[0], label="L1: less by 1, else 0")
        right.plot(rho, rho / 2, color=metrics.COLORS[1], label="L2: half")
        right.set(title="one weight, alpha = 1", xlabel="weight without penalty")
        right.set(ylabel="weight with penalty", aspect="equal")
        lines, names = right.get_legend_handles_labels()
        right.figure.legend(lines, names, loc="outside lower right", ncols=3)


def show_penalties(out: Path, n_alphas: int = 61) -> None:
    """Paths of ridge and lasso on diabetes, and the picture of the balls."""
    table = pd.DataFrame(path_rows(n_alphas))
    table.to_csv(out / "classical_paths.csv", index=False, float_format="%.6g")
    draw_paths(table, out / "classical_paths.png")
    draw_balls(out / "classical_balls.png")
    print("\nWeights of 10 that are not 0, from the weakest to the strongest penalty")
    for method, rows in table.groupby("method"):
        n_used = rows.groupby("alpha")["weight"].agg(np.count_nonzero)
        print(f"  {method}: {' '.join(str(n) for n in n_used.iloc[::10])}")


# ---- Shown on real data: k-means on digits --------------------------------------------------


def draw_centers(ours, theirs, digits, path: Path) -> None:
    """Ten centres of ours as pictures, by the digit they hold most of; below, the ones like them.

    `ours` and `theirs` are centers (10, 64) and labels (n,).
    """
    distances = squared_distances(ours[0], theirs[0])  # (10, 10)
    _, alike = linear_sum_assignment(distances)  # of each of ours, the one of theirs
    ours_in_order = np.argsort(
        [np.bincount(digits.target[ours[1] == j]).argmax() for j in range(10)]
    )
    rows = {
        "ours": (ours, ours_in_order),
        "scikit-learn": (theirs, alike[ours_in_order]),
    }
    title = "Cluster centres that k-means finds in 1,797 digits, without their labels"
    explained = "above: the cluster's commonest digit and its share of the cluster; seed 0"
    size = {"n_rows": 2, "n_columns": 10, "width": 12, "height": 4.2}
    with metrics.picture(path, f"{title}\n({explained})", **size) as panels:
        for row, (name, ((centers, labels), order)) in zip(panels, rows.items(), strict=True):
            for axes, j in zip(row, order, strict=True):
                counts = np.bincount(digits.target[labels == j])
                axes.imshow(centers[j].reshape(8, 8), cmap="gray_r", vmin=0, vmax=16)
                axes.set(xticks=[], yticks=[])
                axes.grid(False)
                axes.set_title(f"{counts.argmax()}: {counts.max() / counts.sum():.0%}")
            row[0].set_ylabel(name)


def show_k_means(out: Path, n_seeds: int = 5) -> None:
    """k-means on the 1,797 digits, 10 clusters: inertia and purity beside scikit-learn's."""
    digits = datasets.load_digits()
    rows = []
    for seed in reversed(range(n_seeds)):  # the picture shows the last one, seed 0
        centers, labels, inertia = k_means(digits.data, 10, seed=seed)
        theirs = KMeans(10, n_init=10, random_state=seed).fit(digits.data)
        results = {"ours": (labels, inertia), "scikit-learn": (theirs.labels_, theirs.inertia_)}
        for by, (found, lowest) in results.items():
            score = purity(found, digits.target)
            rows.append({"by": by, "seed": seed, "inertia": lowest, "purity": score})
    table = pd.DataFrame(rows).sort_values(["by", "seed"])
    table.to_csv(out / "classical_k_means.csv", index=False, float_format="%.7g")
    path = out / "classical_k_means.png"
    draw_centers((centers, labels), (theirs.cluster_centers_, theirs.labels_), digits, path)
    print(f"\nk-means on digits, {n_seeds} seeds (inertia: lower is better, purity: higher)")
    print(table.groupby("by")[["inertia", "purity"]].agg(["mean", "std"]).round(4))


# ---- Shown on real data: factorisation machines ---------------------------------------------


def scored(data: str, model: str, seed: int, n_parameters: int, fits, y, y_test) -> dict:
    """A row: R² of the predictions `fits`, a pair for the training and the held-out rows."""
    return {
        "data": data,
        "model": model,
        "seed": seed,
        "parameters": n_parameters,
        "train_r2": r2_score(y, fits[0]),
        "held_out_r2": r2_score(y_test, fits[1]),
    }


def best_alpha(method, X, y, alphas) -> float:
    """The alpha whose error is least on the rows that are left out, in turn, in five folds."""
    errors = dict.fromkeys(alphas, 0.0)
    for fitted, left_out in KFold(5, shuffle=True, random_state=0).split(X):
        for alpha in alphas:
            w, b = method(X[fitted], y[fitted], alpha)
            errors[alpha] += squared_error(X[left_out], y[left_out], w, b)
    return min(errors, key=errors.get)


def diabetes_rows(seed: int) -> list[dict]:
    """Linear regression, all 45 pairs with free and with penalised weights, and FMs."""
    X, X_test, y, y_test = standardised_split(datasets.load_diabetes(scaled=False), seed)
    y_test = (y_test - y.mean()) / y.std()
    y = (y - y.mean()) / y.std()
    rows = []
    pairs = PolynomialFeatures(2, interaction_only=True, include_bias=False).fit(X)
    linear = {
        "linear": (X, X_test),
        "linear, all pairs": (pairs.transform(X), pairs.transform(X_test)),
    }
    for model, (train, test) in linear.items():
        w, b = ridge(train, y, 0)
        fits = (train @ w + b, test @ w + b)
        rows.append(scored("diabetes", model, seed, len(w) + 1, fits, y, y_test))
    train, test = linear["linear, all pairs"]
    for method, alphas in ((ridge, np.logspace(0, 4, 9)), (lasso, np.logspace(-2.5, -0.5, 5))):
        w, b = method(train, y, best_alpha(method, train, y, alphas))
        model = f"linear, all pairs, {method.__name__}"
        fits = (train @ w + b, test @ w + b)
        rows.append(scored("diabetes", model, seed, len(w) + 1, fits, y, y_test))
    for k in (2, 4):
        machine = FactorizationMachine(X.shape[1], k, seed).fit(X, y, lr=0.001, epochs=50)
        fits = (machine.predict(X), machine.predict(X_test))
        n_parameters = 1 + X.shape[1] * (1 + k)
        rows.append(scored("diabetes", f"FM, k = {k}", seed, n_parameters, fits, y, y_test))
    return rows


def photograph() -> np.ndarray:
    """scikit-learn's picture of a temple in grey, 7 × 7 pixels averaged into one: (61, 91)."""
    grey = datasets.load_sample_image("china.jpg").mean(axis=2)[:427, :637]
    grey = grey.reshape(61, 7, 91, 7).mean(axis=(1, 3))
    return (grey - grey.mean()) / grey.std()


def photograph_rows(seed: int) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The picture from half of its pixels: a pixel is its row and its column, both one-hot.

    So are a user and an item in a recommender. No pair (row, column) of the held-out half occurred
    in training. Also gives the pictures to look at.
    """
    image = photograph()
    height, width = image.shape
    row, column = np.divmod(np.arange(image.size), width)
    X = np.zeros((image.size, height + width))
    X[np.arange(image.size), row] = 1
    X[np.arange(image.size), height + column] = 1
    y = image.ravel()
    order = np.random.default_rng(seed).permutation(image.size)
    seen, hidden = np.split(order, [image.size // 2])
    w, b = ridge(X[seen], y[seen], alpha=1.0)
    machine = FactorizationMachine(height + width, 4, seed).fit(X[seen], y[seen], 0.01, epochs=40)
    fits = {"linear": X @ w + b, "FM, k = 4": machine.predict(X)}
    n_parameters = {"linear": 1 + len(w), "FM, k = 4": 1 + 5 * len(w)}
    rows = []
    for model, fit in fits.items():
        both = (fit[seen], fit[hidden])
        rows.append(
            scored("photograph", model, seed, n_parameters[model], both, y[seen], y[hidden])
        )
    half = np.full(image.size, np.nan)
    half[seen] = y[seen]
    pictures = {"the half that is seen": half, **fits, "the photograph": y}
    return rows, {name: pixels.reshape(height, width) for name, pixels in pictures.items()}


def draw_photograph(pictures: dict[str, np.ndarray], rows: list[dict], path: Path) -> None:
    """What is seen, what both models make of it, and the truth."""
    score = {row["model"]: f": R² {row['held_out_r2']:.2f} on the hidden half" for row in rows}
    title = "A photograph from half of its pixels: each is a one-hot row and a one-hot column"
    explained = "linear: a value for each; FM: also the products of 4 factors; red: hidden"
    size = {"n_rows": 2, "n_columns": 2, "width": 10, "height": 8}
    with metrics.picture(path, f"{title}\n({explained})", **size) as panels:
        for axes, (name, pixels) in zip(panels.flat, pictures.items(), strict=True):
            axes.imshow(pixels, cmap="gray", vmin=-2.5, vmax=1.5)
            axes.set_facecolor("tab:red")
            axes.set(title=name + score.get(name, ""), xticks=[], yticks=[])
            axes.grid(False)


def show_factorization(out: Path) -> None:
    """FM beside linear regression on diabetes (5 splits) and on a half-hidden photograph (3)."""
    rows = []
    for seed in range(5):
        rows += diabetes_rows(seed)
    for seed in range(3):
        photo_rows, pictures = photograph_rows(seed)
        rows += photo_rows
    table = pd.DataFrame(rows)
    table.to_csv(out / "classical_factorization.csv", index=False, float_format="%.6g")
    draw_photograph(pictures, photo_rows, out / "classical_factorization.png")
    print("\nFactorisation machines, R² (higher is better), mean ± std over splits")
    groups = table.groupby(["data", "model", "parameters"], sort=False)
    print(groups[["train_r2", "held_out_r2"]].agg(["mean", "std"]).round(3).to_string())


def main(out: Path = FIGURES) -> None:
    """Show the classical algorithms on real data: tables and pictures.

    Args:
        out: the folder that the tables and pictures go to.
    """
    print("Classical algorithms (经典机器学习): SGD beside exact solutions, L1 and L2 penalties,")
    print("k-means and factorisation machines on sets of scikit-learn's; about 3 minutes\n")
    out.mkdir(parents=True, exist_ok=True)
    with pd.option_context("display.width", 100, "display.max_columns", None):
        show_sgd(out)
        show_penalties(out)
        show_k_means(out)
        show_factorization(out)
    print(f"\ntables and pictures: {out}/classical_*")


if __name__ == "__main__":
    tyro.cli(main)
