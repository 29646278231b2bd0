"""Losses of recovery training and distillation, in float32 and in chunks of tokens.

p is the teacher, q the student; all divergences are in nats, summed over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from suite.specs import Frozen

CHUNK = 512
Head = Callable[[Tensor], Tensor]


class Objective(Frozen):
    """(1 − `distill`)·CE + `distill`·τ²·KL, plus `hidden` times the hidden-state term.

    `direction`: "forward" is KL(p‖q), "reverse" KL(q‖p). The hidden-state term is one minus the cosine
    of the last hidden states, as in DistilBERT (arXiv 1910.01108, section 3).
    """

    distill: float = Field(default=0.0, ge=0, le=1)
    direction: Literal["forward", "reverse"] = "forward"
    temperature: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=0.0, ge=0)

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model's outputs are part of the loss."""
        return self.distill > 0 or self.hidden > 0


def divergence(
    teacher: Tensor, student: Tensor, direction: str = "forward", temperature: float = 1.0
) -> Tensor:
    """τ²·KL per position (…) between two sets of logits (… × vocabulary)."""
    p = (teacher.float() / temperature).log_softmax(-1)
    q = (student.float() / temperature).log_softmax(-1)
    first, second = (p, q) if direction == "forward" else (q, p)
    return temperature**2 * (first.exp() * (first - second)).sum(-1)


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
    student: tuple[Tensor, Head],
    targets: Tensor,
    teacher: tuple[Tensor, Head] | None = None,
    mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Mean loss over positions whose `mask` (positions, bool) is true; all without a mask.

    `student` and `teacher` are final hidden states (positions × width) and the head that makes logits
    of them. Logits exist for `chunk` positions at a time, and are made again for the backward pass.
    """
    hidden, head = student
    keep = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    total = torch.zeros((), device=hidden.device)

    def part(states: Tensor, wanted: Tensor, taught: Tensor | None) -> Tensor:
        teacher_logits = None if taught is None or teacher is None else teacher[1](taught)
        return token_losses(objective, head(states), wanted, teacher_logits).sum()

    index = keep.nonzero().flatten()
    for positions in index.split(chunk):
        taught = teacher[0][positions] if teacher is not None and objective.distill > 0 else None
        total = total + checkpoint(part, hidden[positions], targets[positions], taught, use_reentrant=False)
    loss = total / max(len(index), 1)
    if objective.hidden > 0 and teacher is not None:
        cosine = functional.cosine_similarity(hidden[index].float(), teacher[0][index].float(), dim=-1)
        loss = loss + objective.hidden * (1 - cosine).mean()
    return loss
