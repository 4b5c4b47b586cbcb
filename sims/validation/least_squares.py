"""A small damped least-squares solver (Levenberg-Marquardt with numeric derivatives), so that a fit needs numpy alone."""

from collections.abc import Callable

import numpy as np

from pagedkv.arrays import Float64Array

Residuals = Callable[[Float64Array], Float64Array]
_STEP = 1e-4
_LONGEST_STEP = 1.0
_TRIES = 8
_TOLERANCE = 1e-9


def least_squares(residuals: Residuals, start: Float64Array, *, iterations: int = 100) -> Float64Array:
    """Return where the sum of squared `residuals` is least, near `start`. Parameters should be of order 1, such as logarithms."""
    x, r, damping = start.astype(np.float64), residuals(start), 1e-2
    for _ in range(iterations):
        jacobian = np.stack([(residuals(x + step) - r) / _STEP for step in np.eye(x.size) * _STEP], axis=1)
        hessian, gradient = jacobian.T @ jacobian, jacobian.T @ r
        gained = 0.0
        for _ in range(_TRIES):
            damped = hessian + damping * np.diag(np.diag(hessian) + _TOLERANCE)
            tried = x - np.clip(np.linalg.solve(damped, gradient), -_LONGEST_STEP, _LONGEST_STEP)
            new = residuals(tried)
            if new @ new < r @ r:
                gained, x, r = float(r @ r - new @ new), tried, new
                damping = max(damping / 3, _TOLERANCE)
                break
            damping *= 4
        if gained <= _TOLERANCE * float(r @ r):
            break
    return x


def covariance(residuals: Residuals, x: Float64Array) -> Float64Array:
    """Return the covariance of the parameters at the minimum `x`, residuals, priors among them, being in units of their scatter."""
    r = residuals(x)
    jacobian = np.stack([(residuals(x + step) - r) / _STEP for step in np.eye(x.size) * _STEP], axis=1)
    return np.asarray(np.linalg.inv(jacobian.T @ jacobian), np.float64)


def softened(residuals: Float64Array, threshold: float) -> Float64Array:
    """Return residuals whose squares are Huber's loss: beyond `threshold` they count linearly, so that no single row decides."""
    size = np.abs(residuals)
    beyond = np.sqrt(np.maximum(2 * threshold * size - threshold**2, 0.0))
    softened_residuals: Float64Array = np.sign(residuals) * np.where(size <= threshold, size, beyond)
    return softened_residuals
