"""Recovery training: equal tokens, float32 master weights, and runs that go on where they stopped."""

from __future__ import annotations

import math
import os
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional
from transformers import PreTrainedModel

from suite import healing
from suite.conformance import tiny
from suite.errors import CellFailed
from suite.healing import Schedule, batch_loss, curve, train
from suite.losses import Objective

SCHEDULE = Schedule(learning_rate=1e-3)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path))


def save_after_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(healing, "SAVING_SHARE", float("inf"))


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def run(model: PreTrainedModel, objective: Objective | None = None, **fields: Any) -> dict[str, Any]:
    teacher = tiny.build("llama").requires_grad_(False)
    training = replace(tiny.training_sample(lambda: teacher), **fields)
    return train(model, training, objective or Objective(), [SCHEDULE])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_a_teacher_the_loss_is_the_models_own(family: str) -> None:
    """And so are its gradients, of shared embeddings and heads too."""
    model, ids = tiny.build(family), tiny.token_ids(3, 10)
    found = []
    for loss in (batch_loss(model, None, ids, Objective()), model(ids, labels=ids).loss):
        model.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_model_taught_by_itself_has_no_divergence() -> None:
    model, ids = tiny.build("llama"), tiny.token_ids(3, 10)
    loss = batch_loss(model, tiny.build("llama"), ids, Objective(distill=1.0, hidden=1.0))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_training_lowers_the_loss_on_what_it_saw(family: str) -> None:
    model = tiny.build(family)
    tokens = tiny.token_ids(2, 16).repeat(20, 1)
    before = float(batch_loss(model, None, tokens[:2], Objective()).detach())
    notes = run(model, tokens=tokens)
    assert float(batch_loss(model, None, tokens[:2], Objective()).detach()) < before - 0.1
    assert notes["loss"][0] == pytest.approx(before, abs=1e-3)


def test_the_notes_tell_tokens_steps_and_the_curve() -> None:
    notes = run(tiny.build("llama"))
    assert (notes["tokens"], notes["steps"], notes["tokens_per_step"]) == (128, 4, 32)
    assert len(notes["loss"]) == 4
    assert [step for step, _ in notes["held_out_cross_entropy"]] == [0, 1, 2, 3, 4]


def test_every_sequence_is_seen_once_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    real = healing.batch_loss

    def spy(model: Any, teacher: Any, ids: torch.Tensor, objective: Objective) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(ids)
        return real(model, teacher, ids, objective)

    monkeypatch.setattr(healing, "batch_loss", spy)
    run(tiny.build("llama"))
    assert torch.equal(torch.cat(seen), tiny.training_sample(lambda: None).tokens)  # type: ignore[arg-type, return-value]


def test_the_teacher_is_left_alone() -> None:
    teacher = tiny.build("llama").requires_grad_(False)
    before = weights(teacher)
    training = tiny.training_sample(lambda: teacher)
    train(tiny.build("llama", seed=1), training, Objective(distill=0.5), [SCHEDULE])
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_small_steps_are_not_lost_to_bfloat16() -> None:
    """A step below half a unit in the last place must add up: the weights are kept in float32."""
    moved = {}
    for steps in (1, 24):
        model = tiny.build("llama", dtype=torch.bfloat16)
        before = weights(model)
        teacher = tiny.build("llama")
        training = replace(
            tiny.training_sample(lambda t=teacher: t), tokens=tiny.token_ids(2, 16).repeat(steps, 1)
        )
        train(model, training, Objective(), [Schedule(learning_rate=5e-5, warmup=0.0)])
        moved[steps] = sum(int((before[n] != p).sum()) for n, p in model.named_parameters())
    assert moved[24] > 1.5 * moved[1]


def test_a_run_that_was_cut_off_ends_in_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny.build("llama", dtype=torch.bfloat16)
    notes = run(whole)
    save_after_every_step(monkeypatch)
    real, calls = healing._Run.update, []

    def dies(self: Any, loss: float) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        real(self, loss)

    monkeypatch.setattr(healing._Run, "update", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.build("llama", dtype=torch.bfloat16))
    monkeypatch.setattr(healing._Run, "update", real)
    steps: list[int] = []
    resumed = tiny.build("llama", dtype=torch.bfloat16)
    again = run(resumed, progress=lambda what, done, total: steps.append(done))
    assert again.pop("seconds_before_resuming") > 0  # so that what the first process took is counted
    assert again == notes
    assert steps == [4]
    assert all(torch.equal(weights(whole)[name], p) for name, p in weights(resumed).items())
    assert not list((healing.cache_directory() / "healing").glob("*"))


def test_other_weights_do_not_pick_up_a_strangers_state(monkeypatch: pytest.MonkeyPatch) -> None:
    save_after_every_step(monkeypatch)
    monkeypatch.setattr(healing._Run, "forget", lambda self: None)
    run(tiny.build("llama"))
    steps: list[int] = []
    run(tiny.build("llama", seed=1), progress=lambda what, done, total: steps.append(done))
    assert steps == [1, 2, 3, 4]


def test_the_rate_warms_up_and_falls_along_a_cosine() -> None:
    schedule = Schedule(learning_rate=1.0, warmup=0.1)
    rates = [schedule.rate(step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.001


def test_cross_entropy_of_a_batch_is_torchs() -> None:
    model, ids = tiny.build("opt"), tiny.token_ids(2, 9)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        expected = functional.cross_entropy(logits, ids[:, 1:].flatten())
    torch.testing.assert_close(batch_loss(model, None, ids, Objective()).detach(), expected)


def test_a_state_that_takes_long_to_write_is_written_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(healing, "SECONDS_BETWEEN_STATES", 0.0)
    monkeypatch.setattr(healing, "SAVING_SHARE", 1e-6)  # any time at all is a large share
    real, saved = healing._Run.save, []

    def counts(self: Any) -> None:
        saved.append(self.step)
        real(self)

    monkeypatch.setattr(healing._Run, "save", counts)
    run(tiny.build("llama"))
    assert saved == [1]


def test_another_objective_or_text_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    save_after_every_step(monkeypatch)
    monkeypatch.setattr(healing._Run, "forget", lambda self: None)
    run(tiny.build("llama"))
    for fields in ({"objective": Objective(distill=0.5)}, {"digest": "another"}, {"batch": 4}):
        steps: list[int] = []
        run(tiny.build("llama"), progress=lambda what, done, total, steps=steps: steps.append(done), **fields)
        assert steps[0] == 1


@given(st.lists(st.floats(0, 10), max_size=60), st.integers(1, 20))
def test_a_long_curve_is_kept_as_means_of_equal_runs(losses: list[float], points: int) -> None:
    found = curve(losses, points)
    assert len(found) <= points
    if len(losses) <= points:
        assert found == [round(value, 4) for value in losses]
    if losses and len(losses) % len(found) == 0:
        assert sum(found) / len(found) == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_weight_decay_shrinks_matrices_and_leaves_norms_and_biases_alone() -> None:
    moved = {}
    for decay in (0.0, 0.5):
        model = tiny.build("opt")
        training = tiny.training_sample(lambda: tiny.build("opt"))
        train(model, training, Objective(), [SCHEDULE.model_copy(update={"weight_decay": decay})])
        moved[decay] = weights(model)
    vectors = [name for name, weight in moved[0.0].items() if weight.ndim == 1]
    # Through the matrices, decay moves the later gradients a little; its own pull is a hundred times larger.
    drift = max(float((moved[0.5][name] - moved[0.0][name]).abs().max()) for name in vectors)
    assert drift < 5e-4
    matrix = "model.decoder.layers.0.fc1.weight"
    assert float(moved[0.5][matrix].norm()) < float(moved[0.0][matrix].norm())


def test_double_precision_is_kept() -> None:
    model = tiny.build("llama", dtype=torch.float64)
    before = weights(model)
    train(
        model,
        tiny.training_sample(lambda: tiny.build("llama")),
        Objective(),
        [Schedule(learning_rate=1e-300, warmup=0.0)],
    )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_frozen_parameters_stay_bit_for_bit_and_keep_no_gradient() -> None:
    model = tiny.build("llama")
    before = weights(model)
    chosen = [p for name, p in model.named_parameters() if "mlp" in name]
    train(model, tiny.training_sample(lambda: tiny.build("llama")), Objective(), [SCHEDULE], chosen)
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != ("mlp" in name)
        assert parameter.grad is None


def test_a_loss_that_is_not_finite_ends_the_run_with_the_step() -> None:
    model = tiny.build("llama")
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[0] = float("nan")
    with pytest.raises(CellFailed, match="training diverged in step 1 of 4: lower learning_rate"):
        run(model)


def test_a_taught_model_tells_how_far_it_is_from_its_teacher() -> None:
    assert "held_out_divergence" not in run(tiny.build("llama"))
    near, far = (run(tiny.build("llama", seed=seed), Objective(distill=0.5)) for seed in (0, 1))
    assert 0 <= near["held_out_divergence"] < 0.1 < far["held_out_divergence"]


@pytest.mark.parametrize("steps", [1, 7, 9, 16, 63])
def test_what_is_held_out_is_looked_at_a_few_times_only(steps: int) -> None:
    notes = run(tiny.build("llama"), tokens=tiny.token_ids(2 * steps, 8))
    looks = [step for step, _ in notes["held_out_cross_entropy"]]
    assert len(looks) <= healing.EVALUATIONS + 1
    assert (looks[0], looks[-1]) == (0, steps)


def test_what_a_killed_process_left_half_written_is_removed() -> None:
    folder = healing.cache_directory() / "healing"
    folder.mkdir(parents=True)
    dead, alive = (folder / f"0123.{pid}.tmp" for pid in (2**22 + 1, os.getpid()))
    dead.touch()
    alive.touch()
    run(tiny.build("llama"))
    assert not dead.exists()
    assert alive.exists()


def at(*rates: float) -> list[Schedule]:
    return [Schedule(learning_rate=rate) for rate in rates]


def test_the_rehearsed_rate_is_the_best_and_leaves_no_trace() -> None:
    """Training goes on as if the rate had been given: same weights, same curve, no state left behind."""
    training = replace(tiny.training_sample(lambda: tiny.build("llama")), batch=1)
    rehearsed, given = tiny.build("llama", seed=1), tiny.build("llama", seed=1)
    notes = train(rehearsed, training, Objective(), at(1e-9, 3e-3, 1e4))
    found = notes["rehearsal"]["held_out_cross_entropy"]
    assert notes["rehearsal"]["tokens"] == training.tokens[:1].numel()
    assert list(found) == ["1e-09", "0.003", "10000"]
    assert min(found, key=lambda rate: found[rate] or math.inf) == "0.003"
    assert notes["schedule"]["learning_rate"] == 3e-3
    alone = train(given, training, Objective(), at(3e-3))
    assert "rehearsal" not in alone
    assert notes["loss"] == alone["loss"]
    for name, parameter in weights(given).items():
        assert torch.equal(parameter, rehearsed.get_parameter(name))


@pytest.mark.parametrize("share", [1 / 4, 1.0])
def test_a_rate_that_diverges_is_not_chosen(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its last step shows it, by a held-out loss that is not a number, or an earlier one."""
    monkeypatch.setattr(healing, "REHEARSAL_SHARE", share)
    save_after_every_step(monkeypatch)
    real = Schedule.rate
    monkeypatch.setattr(
        Schedule, "rate", lambda self, *at: math.nan if self.learning_rate > 1 else real(self, *at)
    )
    training = tiny.training_sample(lambda: tiny.build("llama"))
    notes = train(tiny.build("llama"), training, Objective(), at(2.0, 1e-4))
    assert notes["rehearsal"]["held_out_cross_entropy"]["2"] is None
    assert notes["schedule"]["learning_rate"] == 1e-4
    with pytest.raises(CellFailed, match=r"diverged at every learning rate: 2, 3\. Give a lower one"):
        train(tiny.build("llama"), training, Objective(), at(2.0, 3.0))
    assert not list((healing.cache_directory() / "healing").iterdir())


def test_only_one_optimizer_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal that outlived its end would double the memory of training."""
    runs: weakref.WeakSet[Any] = weakref.WeakSet()
    alive: list[int] = []
    real = healing._Run.__init__

    def made(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        runs.add(self)
        alive.append(len(runs))

    monkeypatch.setattr(healing._Run, "__init__", made)
    train(
        tiny.build("llama"),
        tiny.training_sample(lambda: tiny.build("llama")),
        Objective(),
        at(1e-4, 1e-3, 1e-2),
    )
    assert alive == [1, 1, 1, 1]
