"""Losses of recovery training and distillation, in float32 and in chunks of tokens.

p is the teacher, q the student; all divergences are in nats, summed over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from suite.specs import Frozen

CHUNK = 512


class Objective(Frozen):
    """(1 − `distill`)·CE + `distill`·τ²·KL, plus terms of the last hidden states.

    `direction`: "forward" is KL(p‖q), "reverse" KL(q‖p). The hidden-state term is one minus the cosine
    of the last hidden states, as in DistilBERT (arXiv 1910.01108, section 3). The contrastive term, with
    a temperature of its own, tells a token's state from those of its sequence: see `contrastive`.
    """

    distill: float = Field(default=0.0, ge=0, le=1)
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=0.0, ge=0)
    contrast: float = Field(default=0.0, ge=0)
    contrast_temperature: float = Field(default=0.1, gt=0)

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model's outputs are part of the loss."""
        return self.distill > 0 or self.hidden > 0 or self.contrast > 0


def divergence(
    teacher: Tensor, student: Tensor, direction: str = "forward", temperature: float = 1.0
) -> Tensor:
    """τ²·KL per position (…) between two sets of logits (… × vocabulary)."""
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    first, second = (p, q) if direction == "forward" else (q, p)
    return temperature**2 * (first.exp() * (first - second)).sum(-1)


def contrastive(teacher: Tensor, student: Tensor, temperature: float = 0.1) -> Tensor:
    """Contrastive loss per token (length) of one sequence's hidden states (length × width each).

    Minus the log-probability of finding the teacher's state of the same token among its states of all
    tokens, by cosine over `temperature`: the others of the sequence are the negatives, in full precision
    (Tao et al., arXiv 2203.10705, section 3.1).
    """
    positive = functional.normalize(teacher.float(), dim=-1)
    anchors = functional.normalize(student.float(), dim=-1)
    logits = anchors @ positive.T / temperature
    return functional.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none")


def token_losses(
    objective: Objective, logits: Tensor, targets: Tensor, teacher_logits: Tensor | None
) -> Tensor:
    """Loss per position (positions) for student `logits` (positions × vocabulary) and next tokens."""
    loss = torch.zeros(len(targets), device=logits.device)
    if objective.distill < 1:
        loss = loss + (1 - objective.distill) * functional.cross_entropy(
            logits.float(), targets, reduction="none"
        )
    if objective.distill > 0 and teacher_logits is not None:
        kl = divergence(teacher_logits, logits, objective.direction, objective.temperature)
        loss = loss + objective.distill * kl
    return loss


def mean_loss(
    objective: Objective,
    student: tuple[Tensor, nn.Module],
    targets: Tensor,
    teacher: tuple[Tensor, nn.Module] | None = None,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
    length: int | None = None,
) -> Tensor:
    """Mean loss over positions whose `mask` (positions, bool) is true; all without a mask.

    `student` and `teacher` are final hidden states (positions × width) and the head that makes logits
    of them. Logits exist for `chunk` positions at a time, and once only: see `_InChunks`. `length`:
    positions in one sequence, for the contrastive term; all are one sequence without it.
    """
    hidden, head = student
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    index = keep.nonzero().flatten()
    chunks = index.split(chunk)

    def part(states: Tensor, positions: Tensor) -> Tensor:
        taught = None
        if teacher is not None and objective.distill > 0:
            with torch.no_grad():
                taught = teacher[1](teacher[0][positions])
        losses = token_losses(objective, head(states), targets[positions], taught)
        return losses.sum() / len(index)

    if torch.is_grad_enabled():
        weights = [weight for weight in head.parameters() if weight.requires_grad]
        loss: Tensor = _InChunks.apply(part, chunks, hidden, *weights)  # type: ignore[no-untyped-call]
    else:
        loss = torch.stack([part(hidden[positions], positions) for positions in chunks]).sum()
    if objective.hidden > 0 and teacher is not None:
        cosine = functional.cosine_similarity(hidden[index].float(), teacher[0][index].float(), dim=-1)
        loss = loss + objective.hidden * (1 - cosine).mean()
    if objective.contrast > 0 and teacher is not None:
        rows = index.split((torch.bincount(index // (length or len(targets)))).tolist())
        pairs = [(teacher[0][row], hidden[row]) for row in rows if len(row)]
        terms = [contrastive(p, q, objective.contrast_temperature) for p, q in pairs]
        loss = loss + objective.contrast * torch.cat(terms).mean()
    return loss


class _InChunks(torch.autograd.Function):
    """Sum of `part` over chunks of positions, whose gradients are taken on the way forward.

    Neither are logits of all positions ever held, nor are they made a second time for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        part: Callable[[Tensor, Tensor], Tensor],
        chunks: Sequence[Tensor],
        hidden: Tensor,
        *weights: nn.Parameter,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        ctx.hidden = torch.zeros_like(hidden)
        # A weight's gradient is summed over chunks in at least float32, whatever the weight's dtype.
        ctx.weights = [
            torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in weights
        ]
        ctx.dtypes = [weight.dtype for weight in weights]
        for positions in chunks:
            states = hidden[positions].requires_grad_(True)
            with torch.enable_grad():
                loss = part(states, positions)
            found = torch.autograd.grad(loss, [states, *weights])
            ctx.hidden[positions] = found[0]
            for sum_, gradient in zip(ctx.weights, found[1:], strict=True):
                sum_ += gradient
            total += loss.detach()
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (scale,) = gradients
        weights = ((w * scale).to(dtype) for w, dtype in zip(ctx.weights, ctx.dtypes, strict=True))
        return None, None, ctx.hidden * scale, *weights
