"""Losses of healing and distillation, against their definitions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from suite.losses import Objective, contrastive, divergence, mean_loss, token_losses


def logits(seed: int, positions: int = 7, vocabulary: int = 11) -> Tensor:
    return 3 * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed))


def test_the_two_directions_on_a_known_example() -> None:
    """Guards the argument order: KL(p‖q) and KL(q‖p) of p = (.9, .1) and q = (.5, .5) in nats."""
    p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    assert float(divergence(p, q, "forward")) == pytest.approx(0.3681, abs=1e-4)
    assert float(divergence(p, q, "reverse")) == pytest.approx(0.5108, abs=1e-4)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@given(st.integers(0, 10**6), st.sampled_from([0.5, 1.0, 2.0]))
def test_a_divergence_is_never_negative(direction: str, seed: int, temperature: float) -> None:
    assert (divergence(logits(seed), logits(seed + 1), direction, temperature) >= -1e-6).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@given(st.integers(0, 10**6), st.integers(1, 10))
def test_keeping_the_likeliest_words_and_a_bucket_for_the_rest_never_raises_the_divergence(
    direction: str, seed: int, kept: int
) -> None:
    """Data-processing inequality: what is told apart less coarsely diverges no less."""
    teacher, student = logits(seed), logits(seed + 1)
    order = teacher.argsort(-1, descending=True)

    def bucketed(values: Tensor) -> Tensor:
        ordered = values.gather(-1, order).log_softmax(-1)
        return torch.cat([ordered[:, :kept], ordered[:, kept:].logsumexp(-1, keepdim=True)], -1)

    coarse = divergence(bucketed(teacher), bucketed(student), direction)
    assert (coarse <= divergence(teacher, student, direction) + 1e-5).all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(direction: str) -> None:
    student = logits(0).requires_grad_(True)
    loss = divergence(logits(0), student, direction).sum()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert student.grad is not None
    assert float(student.grad.norm()) < 1e-5


def test_the_temperature_is_made_up_for() -> None:
    """Hinton et al. (arXiv 1503.02531, section 2): τ² keeps the gradient's size as τ grows."""
    norms = []
    for temperature in (50.0, 100.0):
        student = logits(1).requires_grad_(True)
        divergence(logits(0), student, temperature=temperature).sum().backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def test_half_precision_logits_are_compared_in_single_precision() -> None:
    teacher, student = logits(0, vocabulary=5000).bfloat16(), logits(1, vocabulary=5000).bfloat16()
    exact = divergence(teacher.double(), student.double())
    torch.testing.assert_close(divergence(teacher, student), exact, rtol=1e-5, atol=0, check_dtype=False)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_mixture_is_linear_in_its_weight(weight: float) -> None:
    targets = torch.arange(7) % 11
    ends = [token_losses(Objective(distill=w), logits(0), targets, logits(1)) for w in (0.0, 1.0)]
    mixed = token_losses(Objective(distill=weight), logits(0), targets, logits(1))
    torch.testing.assert_close(mixed, (1 - weight) * ends[0] + weight * ends[1])


class Pair:
    """Hidden states and heads of a student and a teacher."""

    def __init__(self, positions: int = 23, width: int = 6, vocabulary: int = 11):
        torch.manual_seed(0)
        self.head, self.teachers = nn.Linear(width, vocabulary), nn.Linear(width, vocabulary)
        self.hidden = torch.randn(positions, width, requires_grad=True)
        self.taught = torch.randn(positions, width)
        self.targets = torch.randint(vocabulary, (positions,))

    def loss(
        self, objective: Objective, mask: Tensor | None = None, chunk: int = 512, length: int | None = None
    ) -> Tensor:
        teacher = (self.taught, self.teachers)
        return mean_loss(objective, (self.hidden, self.head), self.targets, teacher, mask, chunk, length)


@pytest.mark.parametrize("objective", [Objective(), Objective(distill=0.5), Objective(distill=1, hidden=2.0)])
def test_chunks_change_neither_loss_nor_gradient(objective: Objective) -> None:
    found = []
    for chunk in (512, 5):
        pair = Pair()
        loss = pair.loss(objective, chunk=chunk)
        loss.backward()
        found.append((loss.detach(), pair.hidden.grad, pair.head.weight.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("objective", [Objective(), Objective(distill=0.5), Objective(distill=1, hidden=2.0)])
@pytest.mark.parametrize("head_trains", [True, False])
def test_gradients_taken_on_the_way_forward_are_autograds(objective: Objective, head_trains: bool) -> None:
    found = []
    for way in ("chunks", "autograd"):
        pair = Pair()
        pair.head.requires_grad_(head_trains)
        if way == "chunks":
            loss = pair.loss(objective, chunk=5)
        else:
            every = token_losses(
                objective, pair.head(pair.hidden), pair.targets, pair.teachers(pair.taught).detach()
            )
            cosine = functional.cosine_similarity(pair.hidden, pair.taught, dim=-1)
            loss = every.mean() + objective.hidden * (1 - cosine).mean()
        (3 * loss).backward()
        found.append([loss.detach(), pair.hidden.grad, pair.head.weight.grad, pair.head.bias.grad])
        assert pair.teachers.weight.grad is None
    for one, other in zip(*found, strict=True):
        if one is None or other is None:
            assert one is other
            assert not head_trains
        else:
            torch.testing.assert_close(one, other)


def test_a_half_precision_heads_gradient_is_summed_in_single_precision() -> None:
    """Adding up 1,024 chunks in bfloat16 would lose all but the first few."""
    torch.manual_seed(0)
    head = nn.Linear(8, 16, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(1, 8).bfloat16().repeat(1024, 1)
    targets = torch.zeros(1024, dtype=torch.int64)
    gradients = []
    for chunk in (1, 1024):
        head.weight.grad = None
        mean_loss(Objective(), (hidden, head), targets, chunk=chunk).backward()
        gradients.append(head.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.02, atol=1e-4)


def test_masked_positions_have_no_say() -> None:
    pair, mask = Pair(), torch.arange(23) % 3 > 0
    objective = Objective(distill=0.5, hidden=1.0)
    before = pair.loss(objective, mask)
    with torch.no_grad():
        pair.hidden[~mask] += 7
        pair.taught[~mask] -= 7
    pair.targets[~mask] = 0
    torch.testing.assert_close(pair.loss(objective, mask), before)


def test_equal_hidden_states_cost_nothing() -> None:
    pair = Pair()
    pair.taught = pair.hidden.detach() * 3
    plain, with_hidden = pair.loss(Objective()), pair.loss(Objective(hidden=5.0))
    torch.testing.assert_close(plain, with_hidden)


def test_the_contrastive_loss_is_that_of_its_definition() -> None:
    teacher, student = logits(0, 5, 4), logits(1, 5, 4)
    expected = []
    for token in range(5):
        scores = [float(torch.cosine_similarity(student[token], other, dim=0)) / 0.5 for other in teacher]
        expected.append(-scores[token] + float(torch.tensor(scores).logsumexp(0)))
    assert contrastive(teacher, student, 0.5).tolist() == pytest.approx(expected, abs=1e-5)


def test_a_token_alone_has_nothing_to_be_told_from() -> None:
    assert float(contrastive(logits(0, 1), logits(1, 1))) == 0


@given(st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_only_directions_are_contrasted(seed: int, scale: float) -> None:
    teacher, student = logits(seed), logits(seed + 1)
    found = contrastive(scale * teacher, student / scale)
    torch.testing.assert_close(found, contrastive(teacher, student), rtol=1e-3, atol=1e-4)


def test_states_in_the_place_of_another_token_cost_more() -> None:
    teacher = logits(0)
    assert (contrastive(teacher, teacher) < contrastive(teacher, teacher.roll(1, 0))).all()


def test_states_that_have_all_become_alike_cost_the_logarithm_of_their_number() -> None:
    alike = logits(0, 1).expand(7, -1)
    torch.testing.assert_close(contrastive(logits(1), alike).exp().reciprocal().sum(), torch.tensor(1.0))
    assert contrastive(alike, logits(1)).tolist() == pytest.approx([float(torch.tensor(7.0).log())] * 7)


def test_negatives_come_from_the_tokens_own_sequence() -> None:
    pair, mask = Pair(positions=12), torch.arange(12) % 5 > 0
    objective = Objective(contrast=2.0, contrast_temperature=0.3)
    for keep in (None, mask):
        expected = pair.loss(Objective(), keep)
        losses = []
        for start in (0, 6):
            rows = torch.arange(start, start + 6)
            rows = rows if keep is None else rows[keep[rows]]
            losses.append(contrastive(pair.taught[rows], pair.hidden[rows], 0.3))
        torch.testing.assert_close(
            pair.loss(objective, keep, length=6), expected + 2 * torch.cat(losses).mean()
        )


def test_a_sequence_without_a_position_that_counts_is_left_out() -> None:
    pair, mask = Pair(positions=12), torch.arange(12) >= 6
    found = pair.loss(Objective(contrast=1.0), mask, length=6)
    expected = contrastive(pair.taught[6:], pair.hidden[6:]).mean()
    torch.testing.assert_close(found, pair.loss(Objective(), mask) + expected)
    before = pair.loss(Objective(contrast=1.0), mask, length=6)
    with torch.no_grad():
        pair.hidden[:6] += 3
        pair.taught[:6] -= 3
    torch.testing.assert_close(pair.loss(Objective(contrast=1.0), mask, length=6), before)


def test_the_contrast_teaches_the_student_alone() -> None:
    pair = Pair()
    pair.loss(Objective(contrast=1.0)).backward()
    assert pair.hidden.grad is not None
    assert pair.taught.grad is None
    assert Objective(contrast=1.0).needs_teacher
