"""Whole cells in processes of their own, on a tiny model."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM

from suite.board.page import page
from suite.board.standings import standings
from suite.board.tables import markdown
from suite.errors import InputError
from suite.records import RecordStore
from suite.run.runner import STAGES, Cell, Grid, Options
from suite.specs import Track, digest_of
from tests.suite import examples

pytestmark = pytest.mark.slow


@pytest.fixture
def protocol(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(examples.TINY_PROTOCOL)
    return str(path)


@pytest.fixture
def track(folder_of: Callable[[str], Path], protocol: str) -> Track:
    return Track(
        models=(str(folder_of("llama")),),
        recipes=("svd", "rtn-int4"),
        budgets=("bytes=0.6",),
        protocol=protocol,
    )


def run(track: Track, tmp_path: Path, **options: object) -> Grid:
    grid = Grid(track, Options(results=tmp_path / "results", **options))  # type: ignore[arg-type]
    grid.run()
    return grid


def test_a_grid_runs_and_a_second_run_computes_nothing(track: Track, tmp_path: Path) -> None:
    grid = run(track, tmp_path)
    assert [cell.state for cell in grid.cells] == ["ok", "ok", "ok"]
    for cell in grid.cells:
        measured, planned = cell.record.measurements, cell.record.planned
        assert measured is not None
        assert planned is not None
        assert measured.sizes.params == planned.params
        assert measured.sizes.bytes_disk == planned.bytes_disk
        dense = cell.spec.recipe == "dense"
        assert set(cell.record.seconds) == {stage for stage in STAGES if dense or stage != "noise"}
        assert len(cell.record.noise or ()) == (2 if dense else 0)  # other batches, other threads
        assert cell.record.conditions["versions"]["torch"]
        assert cell.record.conditions["speed_dtype"] == "float32"
        items = pd.read_parquet(grid.store.path(cell.spec).with_suffix(".items.parquet"))
        means = items.groupby("task")["correct"].mean()
        assert {task.task: task.value for task in measured.tasks} == pytest.approx(means.to_dict())
    again = Grid(track, Options(results=tmp_path / "results"))
    assert {cell.state for cell in again.cells} == {"cached"}


def test_a_protocol_of_perplexity_alone_fills_a_board(track: Track, tmp_path: Path) -> None:
    protocol = tmp_path / "alone.yaml"
    lines = examples.TINY_PROTOCOL.splitlines()
    without = [line for line in lines if line != "tasks:" and not line.startswith("  - ")]
    protocol.write_text("\n".join([*without, "tasks: []"]))
    track = track.model_copy(update={"recipes": ("svd",), "protocol": str(protocol)})
    records = [cell.record for cell in run(track, tmp_path).cells]
    assert {record.status for record in records} == {"ok"}
    assert records[0].noise is not None
    assert {noise.items for noise in records[0].noise} == {0}
    store = RecordStore(tmp_path / "results")
    for text in (markdown(records, standings(records, store)), page(records, standings(records, store))):
        assert "noise floor, dense with" in text
        assert "items flip" not in text


def test_kept_checkpoints_load_with_plain_transformers(track: Track, tmp_path: Path) -> None:
    grid = run(track, tmp_path, keep_checkpoints=tmp_path / "kept")
    for cell in grid.cells:
        assert cell.record.checkpoint is not None
        model = AutoModelForCausalLM.from_pretrained(cell.record.checkpoint)
        assert model.config.model_type == "llama"
    assert {cell.state for cell in run(track, tmp_path).cells} == {"cached"}
    shutil.rmtree(tmp_path / "kept")
    again = Grid(track, Options(results=tmp_path / "results", keep_checkpoints=tmp_path / "kept"))
    assert {cell.state for cell in again.cells} == {"waiting"}


def test_a_checkpoint_that_two_budgets_lead_to_is_measured_once(track: Track, tmp_path: Path) -> None:
    budgets = ("bytes=0.7", "bytes=0.69", "bytes=0.5")
    track = track.model_copy(update={"recipes": ("rtn-int8", "svd"), "budgets": budgets})
    grid = run(track, tmp_path, jobs=2)
    found = {(cell.spec.recipe, str(cell.spec.budget)): cell.record for cell in grid.cells}
    first, second = found["rtn-int8", "bytes=0.7"], found["rtn-int8", "bytes=0.69"]
    assert second == first.model_copy(update={"spec": second.spec, "measured_at": "bytes=0.7"})
    assert first.measured_at is None
    assert {found["svd", budget].measured_at for budget in budgets} == {None}
    items = [grid.store.items(record) for record in (first, second)]
    assert items[0] is not None
    assert items[0].equals(items[1])
    assert grid.store.path(second.spec).with_suffix(".ledger.csv").is_file()
    records = [cell.record for cell in grid.cells]
    text = markdown(records, standings(records, grid.store))
    assert "rtn-int8: the same checkpoint as under bytes=0.7, and measured there" in text
    assert {cell.state for cell in Grid(track, grid.options).cells} <= {"cached", "failed"}


def test_a_worker_killed_in_any_stage_costs_only_its_own_cell(track: Track, tmp_path: Path) -> None:
    budgets = [f"params={round(0.95 - 0.03 * number, 2)}" for number in range(len(STAGES))]
    stages = [stage for stage in STAGES if stage != "noise"]  # which is measured with the dense model alone
    doomed = {"none": "noise", **dict(zip(budgets, stages, strict=False))}
    *_, spared = budgets
    track = track.model_copy(update={"recipes": ("svd",), "budgets": tuple(budgets)})
    killed: set[str] = set()

    def kill(cell: Cell) -> None:
        budget = str(cell.spec.budget)
        if budget not in killed and cell.stage == doomed.get(budget) and cell.pid:
            killed.add(budget)
            os.kill(cell.pid, signal.SIGKILL)

    grid = Grid(track, Options(results=tmp_path / "results", jobs=2))
    grid.run(kill)
    cells = {str(cell.spec.budget): cell for cell in grid.cells}
    assert cells.pop(spared).state == "ok"
    assert cells.keys() == doomed.keys()
    for budget, cell in cells.items():
        assert cell.state == "failed"
        failure = cell.record.failure
        assert failure is not None
        assert "SIGKILL" in failure.reason
        assert STAGES.index(failure.stage) >= STAGES.index(doomed[budget])
    again = {str(cell.spec.budget): cell.state for cell in run(track, tmp_path, jobs=2).cells}
    assert again == {**dict.fromkeys(doomed, "ok"), spared: "cached"}


MISBEHAVIOUR = {
    "raise ValueError('broken on purpose')": "ValueError: broken on purpose",
    "os._exit(7)": "exit code 7",
    "pass": "over budget",
    "drop_blocks(model, plan.drop); model.model.norm.weight.data.fill_(float('nan'))": "NaN",
    "drop_blocks(model, plan.drop); model.model.layers[0].mlp.up_proj.register_forward_hook("
    "lambda module, inputs, output: output * 2)": "the reloaded checkpoint's logits differ",
}


def test_a_method_that_misbehaves_becomes_a_failed_cell_with_its_reason(track: Track, tmp_path: Path) -> None:
    names = {f"misbehaving-{digest_of(body)[:6]}": body for body in MISBEHAVIOUR}
    plugins = tuple(examples.write_plugin(tmp_path, name, body) for name, body in names.items())
    track = track.model_copy(update={"recipes": tuple(names), "budgets": ("params=0.9",)})
    dense, *misbehaving = run(track, tmp_path, plugins=plugins).cells
    assert dense.state == "ok"
    assert [cell.spec.recipe for cell in misbehaving] == list(names)
    for cell in misbehaving:
        failure = cell.record.failure
        assert failure is not None
        assert MISBEHAVIOUR[names[cell.spec.recipe]] in failure.reason


def test_a_cell_that_takes_too_long_is_given_up(track: Track, tmp_path: Path) -> None:
    plugin = examples.write_plugin(tmp_path, "endless", "time.sleep(600)")
    track = track.model_copy(update={"recipes": ("endless",), "budgets": ("params=0.9",)})
    run(track.model_copy(update={"recipes": ()}), tmp_path)
    grid = run(track, tmp_path, plugins=(plugin,), timeout=3.0)
    failure = grid.cells[1].record.failure
    assert failure is not None
    assert failure.reason == "timed out after 3 s"
    assert failure.stage == "compress"


def test_a_plug_in_from_outside_runs_and_lands_on_the_board(track: Track, tmp_path: Path) -> None:
    plugin = examples.write_plugin(tmp_path, "from-elsewhere")
    track = track.model_copy(update={"recipes": ("from-elsewhere+rtn-int8",), "budgets": ("bytes=0.8",)})
    grid = run(track, tmp_path, plugins=(plugin,))
    assert [cell.state for cell in grid.cells] == ["ok", "ok"]
    assert "from-elsewhere+rtn-int8" in markdown(grid.store.all())


def test_editing_a_plug_in_makes_its_old_cells_stale(track: Track, tmp_path: Path) -> None:
    plugin = examples.write_plugin(tmp_path, "outside")
    track = track.model_copy(update={"recipes": ("outside",), "budgets": ("params=0.9",)})
    first = Grid(track, Options(results=tmp_path / "results", plugins=(plugin,)))
    Path(plugin).write_text(Path(plugin).read_text() + "\n# edited\n")
    second = Grid(track, Options(results=tmp_path / "results", plugins=(plugin,)))
    assert first.cells[1].spec.digest() != second.cells[1].spec.digest()


def test_a_later_failure_does_not_take_the_place_of_what_was_measured(track: Track, tmp_path: Path) -> None:
    track = track.model_copy(update={"recipes": ("rtn-int8",)})
    searched = {("rtn-int8", "bytes=0.6"): "0123"}
    first = Grid(track, Options(results=tmp_path / "results"), searched)
    first.run()
    path = first.store.path(first.cells[1].spec)
    before = path.read_bytes()
    hurried = run(track, tmp_path, keep_checkpoints=tmp_path / "kept", timeout=1e-9)
    assert [cell.state for cell in hurried.cells] == ["failed", "failed"]
    assert path.read_bytes() == before
    again = run(track, tmp_path, keep_checkpoints=tmp_path / "kept")
    assert [cell.state for cell in again.cells] == ["ok", "ok"]
    assert [cell.record.searched for cell in again.cells] == [None, "0123"]


def test_checkpoints_that_cannot_be_kept_are_refused_before_anything_runs(
    track: Track, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    options = Options(results=tmp_path / "results", keep_checkpoints=tmp_path / "file" / "kept")
    with pytest.raises(InputError, match="--keep-checkpoints"):
        Grid(track, options)


def test_one_cell_written_in_two_ways_is_one_cell(track: Track, tmp_path: Path) -> None:
    update = {"recipes": ("svd", "svd()"), "budgets": ("bytes=0.6", "bytes=0.60"), "seeds": (0, 0)}
    grid = Grid(track.model_copy(update=update), Options(results=tmp_path / "results"))
    assert [(cell.spec.recipe, str(cell.spec.budget)) for cell in grid.cells] == [
        ("dense", "none"),
        ("svd", "bytes=0.6"),
    ]


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("divides", "ZeroDivisionError: integer division"),
        ("numbers", "knobs or notes of numbers cannot be kept in a record: Object of type int64"),
    ],
)
def test_a_plan_that_goes_wrong_in_any_way_is_a_row_and_the_others_go_on(
    recipe: str, said: str, track: Track, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = examples.write_plugin(tmp_path, recipe)
    text = Path(plugin).read_text()
    assert text.count("knobs={") == 1
    wrong = "knobs={'half': 1 // 0, " if recipe == "divides" else "knobs={'half': np.int64(1), "
    Path(plugin).write_text("import numpy as np\n" + text.replace("knobs={", wrong))
    track = track.model_copy(update={"recipes": (recipe, "svd"), "budgets": ("params=0.9",)})
    grid = Grid(track, Options(results=tmp_path / "results", plugins=(plugin,)))
    assert [cell.state for cell in grid.cells] == ["waiting", "failed", "waiting"]
    failure = grid.cells[1].record.failure
    assert failure is not None
    assert said in failure.reason


@pytest.mark.parametrize("text", ["pydoc-held-out:4x16", "wikitext2-test:4x16"])
def test_what_models_are_scored_on_calibrates_none(text: str, track: Track, tmp_path: Path) -> None:
    track = track.model_copy(update={"calibration": text})
    with pytest.raises(InputError, match="is what models are scored on"):
        Grid(track, Options(results=tmp_path / "results"))


def test_a_healed_cell_keeps_what_it_was_trained_on_and_its_loss_curve(track: Track, tmp_path: Path) -> None:
    recipes = ("layerchop", "layerchop+heal(distill=0.5)")
    track = track.model_copy(
        update={"recipes": recipes, "budgets": ("params=0.8",), "healing": "pydoc:4x16/2"}
    )
    grid = run(track, tmp_path)
    assert [cell.state for cell in grid.cells] == ["ok", "ok", "ok"]
    _, plain, healed = (cell.record for cell in grid.cells)
    assert plain.spec.healing is None
    assert plain.healing_digest is None
    assert healed.healing_digest
    notes = healed.notes["heal"]
    assert (notes["tokens"], notes["steps"], len(notes["loss"])) == (64, 2, 2)
    assert healed.measurements is not None
    assert plain.measurements is not None
    assert healed.measurements.sizes == plain.measurements.sizes
    assert "trained on 64 tokens (pydoc:4x16/2)" in markdown(grid.store.all())
    longer = Grid(track.model_copy(update={"healing": "pydoc:6x16"}), Options(results=tmp_path / "results"))
    assert [cell.state for cell in longer.cells] == ["cached", "cached", "waiting"]


@pytest.mark.parametrize(
    ("healing", "reason"),
    [
        (None, "names no text to train on. Give one with --healing"),
        ("pydoc-held-out:4x16", "'pydoc-held-out' is what models are scored on"),
        ("wikitext2-test:4x16", "'wikitext2-test' is what models are scored on"),
        ("pydocs:4x16", "no text is called 'pydocs'. Did you mean 'pydoc'?"),
    ],
)
def test_what_nobody_may_train_on_is_refused_before_anything_runs(
    healing: str | None, reason: str, track: Track, tmp_path: Path
) -> None:
    track = track.model_copy(update={"recipes": ("heal",), "budgets": ("none",), "healing": healing})
    with pytest.raises(InputError) as caught:
        Grid(track, Options(results=tmp_path / "results"))
    assert reason in str(caught.value)
    Grid(track.model_copy(update={"recipes": ("svd",)}), Options(results=tmp_path / "results"))


def test_an_impossible_grid_is_refused_before_anything_runs(track: Track, tmp_path: Path) -> None:
    track = track.model_copy(update={"budgets": ("bytes=0.02",)})
    with pytest.raises(InputError, match="the smallest it can reach is bytes="):
        Grid(track, Options(results=tmp_path / "results"))


def test_cells_that_do_not_apply_or_cannot_be_reached_are_rows_too(track: Track, tmp_path: Path) -> None:
    track = track.model_copy(update={"recipes": ("rtn-int8", "svd"), "budgets": ("params=0.9", "bytes=0.2")})
    states = {
        (cell.spec.recipe, str(cell.spec.budget)): cell.state
        for cell in Grid(track, Options(results=tmp_path / "results")).cells
    }
    assert states["rtn-int8", "params=0.9"] == "not_applicable"
    assert states["rtn-int8", "bytes=0.2"] == "failed"


def test_interrupting_keeps_what_is_finished(track: Track, tmp_path: Path) -> None:
    def interrupt(cell: Cell) -> None:
        if cell.spec.recipe == "svd" and cell.stage == "load":
            raise KeyboardInterrupt

    grid = Grid(track, Options(results=tmp_path / "results"))
    with pytest.raises(KeyboardInterrupt):
        grid.run(interrupt)
    again = Grid(track, Options(results=tmp_path / "results"))
    assert [cell.state for cell in again.cells] == ["cached", "waiting", "waiting"]
