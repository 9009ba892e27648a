"""The last product of a classifier, refitted by what counts there: the divergence of the classes, not of the logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize
from scipy.special import log_softmax, softmax

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float64]
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
"""Pulls towards the least-squares solution that are tried, for inputs of variance 1."""
LARGEST = 2e9
"""Rows times inputs times classes above which the least-squares solution stays."""
_STEPS = 150
_FOLDS = 5


def refit_logits(x: Array, target: Array, weight: Matrix, bias: Matrix, seed: int) -> tuple[Matrix, Matrix]:
    """Weight (K, classes) and bias that minimize the Kullback-Leibler divergence from the classes of ``target``.

    Multinomial logistic regression on soft labels, pulled towards what is given, with the strength that does best on
    rows that were left out. Where none does better there, what was given comes back.

    Args:
        x: (rows, K), inputs.
        target: (rows, classes), logits of the original model.
        weight, bias: the start.
        seed: of the split of the rows.
    """
    if float(x.size) * weight.shape[1] > LARGEST or len(x) < 4 * _FOLDS:
        return weight, bias
    mean, spread = x.mean(axis=0, dtype=np.float64), x.std(axis=0, dtype=np.float64)
    used = np.flatnonzero(spread > 1e-6 * max(float(spread.max()), 1e-30))
    scaled = (x[:, used] - mean[used]) / spread[used]
    start = np.vstack([weight[used] * spread[used, None], bias + mean @ weight])
    wanted = softmax(target.astype(np.float64), axis=1)
    fold = np.random.default_rng([seed, 2]).permutation(len(x)) % _FOLDS
    scores = {strength: 0.0 for strength in STRENGTHS}
    before = _loss(scaled, wanted, start)
    for k in range(_FOLDS):
        inside, outside = fold != k, fold == k
        for strength in STRENGTHS:
            fitted = _fit(scaled[inside], wanted[inside], start, strength)
            scores[strength] += _loss(scaled[outside], wanted[outside], fitted) * outside.mean()
    best = min(STRENGTHS, key=lambda strength: scores[strength])
    if not scores[best] < before:
        return weight, bias
    fitted = _fit(scaled, wanted, start, best)
    out = weight.copy()
    out[used] = fitted[:-1] / spread[used, None]
    return out, fitted[-1] - mean @ out


def _fit(x: Matrix, wanted: Matrix, start: Matrix, strength: float) -> Matrix:
    shape = start.shape

    def loss(flat: Matrix) -> tuple[float, Matrix]:
        now = flat.reshape(shape)
        logs = log_softmax(x @ now[:-1] + now[-1], axis=1)
        gap = now - start
        slope = (np.exp(logs) - wanted) / len(x)
        grad = np.vstack([x.T @ slope, slope.sum(axis=0)]) + 2 * strength * gap
        return float(-(wanted * logs).sum() / len(x) + strength * np.square(gap).sum()), grad.ravel()

    found = minimize(loss, start.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": _STEPS})
    return np.asarray(found.x).reshape(shape)


def _loss(x: Matrix, wanted: Matrix, at: Matrix) -> float:
    return float(-(wanted * log_softmax(x @ at[:-1] + at[-1], axis=1)).sum() / len(x))
