"""Minimising a smooth function of a few tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_MEMORY = 10
_BACKTRACKS = 12
_SUFFICIENT = 1e-4


def lbfgs(
    function: Callable[[list[Tensor]], Tensor], start: Sequence[Tensor], steps: int, tolerance: float = 0.0
) -> tuple[list[Tensor], list[float]]:
    """Limited-memory BFGS with backtracking (Liu & Nocedal 1989): no step ever goes uphill.

    Returns the last point, shaped as `start`, and the value at the start and after every step. Stops
    early when a step gains less than `tolerance` of the value or no descent is found.
    """
    shapes, sizes = [t.shape for t in start], [t.numel() for t in start]

    def shaped(flat: Tensor) -> list[Tensor]:
        return [piece.reshape(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]

    def evaluate(flat: Tensor) -> tuple[float, Tensor]:
        flat = flat.detach().requires_grad_(True)
        with torch.enable_grad():
            value = function(shaped(flat))
            (gradient,) = torch.autograd.grad(value, flat)
        return float(value.detach()), gradient

    point = torch.cat([tensor.detach().reshape(-1) for tensor in start])
    value, gradient = evaluate(point)
    values, pairs = [value], list[tuple[Tensor, Tensor]]()
    for _ in range(steps):
        direction = -_two_loops(gradient, pairs)
        if not pairs:
            direction *= 0.1 * float(point.norm()) / max(float(gradient.norm()), 1e-30)
        slope, length = float(gradient @ direction), 1.0
        for _ in range(_BACKTRACKS):
            there = point + length * direction
            new_value, new_gradient = evaluate(there)
            if new_value <= value + _SUFFICIENT * length * slope:
                break
            # The minimum of the parabola through both values and the slope, kept within reason.
            curvature = new_value - value - length * slope
            length *= min(0.5, max(0.1, -0.5 * length * slope / curvature)) if curvature > 0 else 0.1
        else:
            break
        step, change = there - point, new_gradient - gradient
        if float(step @ change) > 1e-10 * float(step.norm() * change.norm()):
            pairs = [*pairs[1 - _MEMORY :], (step, change)]
        gained = value - new_value
        point, value, gradient = there, new_value, new_gradient
        values.append(value)
        if gained <= tolerance * abs(value):
            break
    return shaped(point), values


def _two_loops(gradient: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian estimated from steps and changes of the gradient, times the gradient."""
    result, weights = gradient.clone(), []
    for step, change in reversed(pairs):
        weights.append((step @ result) / (step @ change))
        result -= weights[-1] * change
    if pairs:
        step, change = pairs[-1]
        result *= (step @ change) / (change @ change)
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        result += (weight - (change @ result) / (step @ change)) * step
    return result
