"""A candidate is judged on the same items, under the same conditions, and blamed for its own losses only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from suite.errors import InputError
from suite.gate import gate, measured, sequential, sides
from suite.gate.gate import Settings
from suite.gate.measured import Measured
from suite.models import load
from suite.records import Memory, RecordStore
from suite.specs import HealingSpec, Protocol, RunSpec
from tests.suite import examples as cells
from tests.suite.gate import examples
from tests.suite.gate.examples import CONDITIONS, flipped, save_checkpoint, save_record

RIGHT = {"one": [1.0] * 400, "two": [1.0, 0.0] * 200}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEIGHIN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gate"


def judge(baseline: Path, candidate: Path, **settings: Any) -> gate.Report:
    return gate.run(Settings(str(baseline), str(candidate), **{"max_drop": 2.0, **settings}))


def lost(count: int) -> dict[str, list[float]]:
    return {task: flipped(values, count) for task, values in RIGHT.items()}


def test_two_equal_records_pass_without_a_model(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    report = judge(base, save_record(tmp_path / "b", RIGHT, recipe="svd"))
    assert report.verdict == "pass"
    assert report.flips == ()
    assert 0 < report.items_used < report.items_available == 800
    assert report.criteria[0].upper is not None
    assert report.criteria[0].upper < 2


def test_a_loss_fails_and_says_which_tasks_and_items_moved(tmp_path: Path) -> None:
    candidate = RIGHT | {"two": [0.0] * 400}
    report = judge(save_record(tmp_path / "a", RIGHT), save_record(tmp_path / "b", candidate, recipe="svd"))
    assert report.verdict == "fail"
    one, two = report.tasks
    assert (one.lost, one.candidate) == (0, 100)
    assert two.lost == len(report.flips) > 0
    assert all(flip.task == "two" and flip.lost and flip.base != flip.candidate for flip in report.flips)
    assert report.commands[0].startswith("weighin gate --baseline ")
    assert "--recipe svd" in report.commands[1]


def test_too_few_items_are_inconclusive_and_the_reason_is_given(tmp_path: Path) -> None:
    few = {"one": [1.0] * 20, "two": [1.0] * 20}
    report = judge(save_record(tmp_path / "a", few), save_record(tmp_path / "b", few, recipe="svd"))
    assert report.verdict == "inconclusive"
    assert any("40 items cannot show a drop below 2 points" in notice for notice in report.notices)


def test_the_looks_change_the_batches_and_never_the_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    candidate = save_record(tmp_path / "b", lost(9), recipe="svd")
    before = judge(base, candidate)
    monkeypatch.setattr(sequential, "looks", lambda ends: [0, 1, 2, 3, 50, 399, 400])
    assert judge(base, candidate) == before


def test_items_without_a_match_are_counted_in_the_refusal(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    candidate = save_record(tmp_path / "b", {"one": RIGHT["one"][:300], "two": RIGHT["two"]}, recipe="svd")
    with pytest.raises(
        InputError, match=r"\d+ of \d+ items have no match in record .* for example one one-3"
    ):
        judge(base, candidate, max_drop=0.3)


def test_an_item_whose_text_changed_is_not_taken_for_the_same(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    candidate = save_record(tmp_path / "b", RIGHT, recipe="svd")
    rows = [examples.row(task, i, v) | {"hash": "new"} for task in RIGHT for i, v in enumerate(RIGHT[task])]
    RecordStore(tmp_path / "b").save(RecordStore(tmp_path).read(candidate), rows)
    with pytest.raises(InputError, match="have no match"):
        judge(base, candidate)


def test_a_record_from_before_its_protocol_had_a_training_text_is_compared(tmp_path: Path) -> None:
    text = HealingSpec(source="pydoc", count=2, length=16)
    trained = examples.PROTOCOL.model_copy(update={"healing": text})
    assert trained.digest() == examples.PROTOCOL.digest()
    base = save_record(tmp_path / "a", RIGHT)
    candidate = save_record(tmp_path / "b", RIGHT, recipe="svd", protocol=trained)
    assert judge(base, candidate).verdict == "pass"


def test_records_of_unequal_protocols_are_refused(tmp_path: Path) -> None:
    other = examples.PROTOCOL.model_copy(update={"name": "other"})
    base = save_record(tmp_path / "a", RIGHT)
    with pytest.raises(InputError, match="'example' and protocol 'other' differ"):
        judge(base, save_record(tmp_path / "b", RIGHT, recipe="svd", protocol=other))


@pytest.mark.parametrize(
    ("fact", "value", "words"),
    [
        ("threads", 8, "threads 1 → 8"),
        ("device", "another", "device a processor → another"),
        ("git", "cafe", "suite 0123456789ab → cafe"),
        ("versions", CONDITIONS["versions"] | {"torch": "2"}, "torch 1 → 2"),
    ],
)
def test_records_of_unequal_conditions_may_pass_but_never_fail(
    tmp_path: Path, fact: str, value: object, words: str
) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    conditions = CONDITIONS | {fact: value}
    worse = save_record(tmp_path / "b", RIGHT | {"two": [0.0] * 400}, "svd", conditions=conditions)
    report = judge(base, worse)
    assert report.verdict == "inconclusive"
    assert "would be FAIL" in report.criteria[0].reason
    assert words in report.criteria[0].reason
    equal = save_record(tmp_path / "c", RIGHT, "svd", conditions=conditions)
    assert judge(base, equal).verdict == "pass"


def test_every_condition_that_can_move_a_score_counts_as_a_difference() -> None:
    assert sides.differences(CONDITIONS, CONDITIONS) == []
    for name in sides.VERSIONS:
        changed = CONDITIONS | {"versions": CONDITIONS["versions"] | {name: "2"}}
        assert sides.differences(CONDITIONS, changed) == [f"{name} 1 → 2"]
    assert sides.differences(CONDITIONS, CONDITIONS | {"dtype": "bfloat16"}) == ["dtype float32 → bfloat16"]
    assert len(sides.differences({}, CONDITIONS)) == 4 + len(sides.VERSIONS)
    uncommitted = CONDITIONS | {"git": "0123456789ab+changes"}
    assert sides.differences(uncommitted, uncommitted) == [
        "suite 0123456789ab+changes → 0123456789ab+changes"
    ]


@pytest.fixture
def protocol(tmp_path: Path) -> Protocol:
    (tmp_path / "tiny.yaml").write_text(examples.PROTOCOL_FILE)
    return Protocol.load(str(tmp_path / "tiny.yaml"))


def measured_record(folder: Path, model: Path, protocol: Protocol, wrong: int = 0, **changed: Any) -> Path:
    """A record of the tiny model with `wrong` outcomes of each task turned around."""
    source = load.resolve(str(model))
    scorer = Measured(source, protocol)
    rows = []
    for task in protocol.tasks:
        found = scorer.rows(task, scorer.items(task))
        rows += [r | {"correct": 1 - r["correct"]} if i < wrong else r for i, r in enumerate(found)]
    record = cells.finished("dense", "none", 1000)
    fields = record.spec.model_dump() | {
        "model": str(model),
        "model_digest": source.digest,
        "protocol": protocol.model_dump(),
    }
    conditions = measured.current_conditions("cpu") | {"dtype": "float32"} | changed.pop("conditions", {})
    update = {"spec": RunSpec.model_validate(fields), "conditions": conditions, **changed}
    return RecordStore(folder).save(record.model_copy(update=update), rows)


def test_a_record_of_other_conditions_is_measured_again_and_its_own_move_reported_apart(
    tmp_path: Path, protocol: Protocol
) -> None:
    model = save_checkpoint(tmp_path / "model")
    old = {"conditions": {"versions": {"torch": "1.0"}}}
    record = measured_record(tmp_path / "results", model, protocol, wrong=5, **old)
    report = judge(record, save_checkpoint(tmp_path / "copy"), max_drop=20.0)
    assert report.base_move is not None
    assert report.base_move.changed > 0
    # The copy equals the base as it is now, however far that is from its record.
    assert report.criteria[0].estimate == 0
    assert report.flips == ()
    assert any("torch 1.0 →" in notice and "measured again" in notice for notice in report.notices)


def test_a_record_of_these_very_conditions_is_taken_as_it_is(
    tmp_path: Path, protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "git_state", lambda: "0123456789ab")
    model = save_checkpoint(tmp_path / "model")
    record = measured_record(tmp_path / "results", model, protocol, wrong=5)
    report = judge(record, save_checkpoint(tmp_path / "copy"), max_drop=20.0)
    assert report.base_move is None
    assert report.notices[:1] == () or "other conditions" not in report.notices[0]
    assert len(report.flips) > 0


def test_a_record_that_cannot_be_measured_again_says_why_and_what_to_do(
    tmp_path: Path, protocol: Protocol
) -> None:
    model = save_checkpoint(tmp_path / "model")
    record = measured_record(tmp_path / "results", model, protocol, conditions={"threads": 99})
    save_checkpoint(model, seed=5)
    report = judge(record, save_checkpoint(tmp_path / "copy"), max_drop=20.0)
    assert any("has other weights than the recorded one" in notice for notice in report.notices)
    gone = measured_record(
        tmp_path / "gone", model, protocol, conditions={"threads": 99}, checkpoint=str(tmp_path / "away")
    )
    report = judge(gone, save_checkpoint(tmp_path / "copy"), max_drop=20.0)
    assert any("is gone" in notice for notice in report.notices)


def test_the_base_is_loaded_once_and_then_comes_from_the_cache(
    tmp_path: Path, protocol: Protocol, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, candidate = save_checkpoint(tmp_path / "base"), save_checkpoint(tmp_path / "copy", noise=0.05)
    chosen = {"protocol": str(tmp_path / "tiny.yaml"), "max_drop": 30.0, "max_perplexity_ratio": 9.0}
    first = judge(base, candidate, **chosen)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr("suite.gate.measured.checkpoint.reload", _only(candidate))
    assert judge(base, candidate, **chosen) == first


def _only(folder: Path) -> Any:
    from suite.checkpoint import reload

    def load_that(path: Path, device: str = "cpu") -> Any:
        assert path == folder.resolve()
        return reload(path, device)

    return load_that


def test_a_damaged_cache_entry_is_measured_again_with_a_notice(
    tmp_path: Path, protocol: Protocol, cache: Path
) -> None:
    base, candidate = save_checkpoint(tmp_path / "base"), save_checkpoint(tmp_path / "copy", noise=0.05)
    chosen = {"protocol": str(tmp_path / "tiny.yaml"), "max_drop": 30.0}
    first = judge(base, candidate, **chosen)
    entries = sorted(cache.glob("*/*.json"))
    entries[0].write_text(entries[0].read_text().replace('"correct": 1.0', '"correct": 0.0'))
    entries[1].write_text('{"half')
    again = judge(base, candidate, **chosen)
    assert again.tasks == first.tasks
    assert sum("is damaged" in notice for notice in again.notices) == 2
    assert judge(base, candidate, **chosen).notices == first.notices


def test_a_compressed_candidate_is_judged_by_size_memory_and_speed_too(
    tmp_path: Path, protocol: Protocol
) -> None:
    base = save_checkpoint(tmp_path / "base")
    candidate = save_checkpoint(tmp_path / "int8", recipe="rtn-int8(group=16)")
    report = judge(
        base,
        candidate,
        max_drop=None,
        max_size_ratio=0.5,
        min_throughput_ratio=1e-6,
        throughput="prefill",
        protocol=str(tmp_path / "tiny.yaml"),
    )
    size, throughput = report.criteria
    assert size.verdict == "pass"
    assert size.estimate is not None
    assert size.estimate < 0.5
    assert throughput.verdict == "pass"
    assert throughput.alpha == 0.05
    assert report.verdict == "pass"


@pytest.mark.slow
def test_memory_is_measured_in_fresh_processes(tmp_path: Path, protocol: Protocol) -> None:
    base = save_checkpoint(tmp_path / "base")
    report = judge(base, base, max_drop=None, max_memory_ratio=50.0, protocol=str(tmp_path / "tiny.yaml"))
    assert report.verdict == "pass"
    assert "peak memory" in report.criteria[0].text


def test_memory_of_two_records_is_read_from_them(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    report = judge(base, save_record(tmp_path / "b", RIGHT, "svd"), max_drop=None, max_memory_ratio=1.0)
    assert report.criteria[0].estimate == 1.0


@pytest.mark.parametrize("other", [{"device": "another"}, {"threads": 8}, {}])
def test_memory_of_unlike_machines_is_not_compared(tmp_path: Path, other: dict[str, object]) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    less = cells.measurements(1000).model_copy(
        update={"memory": Memory(load=1, inference=2, how="test" if other else "another way")}
    )
    candidate = save_record(tmp_path / "b", RIGHT, "svd", measurements=less, conditions=CONDITIONS | other)
    report = judge(base, candidate, max_drop=None, max_memory_ratio=1.0)
    assert report.verdict == "inconclusive"
    assert "peak memory is not compared" in report.criteria[0].text
    assert "another" in report.criteria[0].reason or "threads 1 → 8" in report.criteria[0].reason


def test_the_share_of_alpha_falls_with_every_criterion_that_can_err(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    perplexity = cells.measurements(1000).perplexity
    windows = perplexity.model_copy(update={"window_nlls": (45.0, 46.0, 44.0), "tokens": 45})
    measurements = cells.measurements(1000).model_copy(update={"perplexity": windows})
    base = save_record(tmp_path / "a", RIGHT, measurements=measurements)
    other = save_record(tmp_path / "b", RIGHT, "svd", measurements=measurements)
    report = judge(base, other, max_perplexity_ratio=1.1, max_size_ratio=1.0)
    assert [criterion.alpha for criterion in report.criteria] == [0.025, 0.025, None]
    assert report.verdict == "pass"


def test_one_failed_criterion_fails_the_gate_whatever_the_others_say(tmp_path: Path) -> None:
    small = cells.measurements(500)
    base = save_record(tmp_path / "a", RIGHT, measurements=small)
    report = judge(base, save_record(tmp_path / "b", RIGHT, "svd"), max_size_ratio=1.0)
    assert [criterion.verdict for criterion in report.criteria] == ["pass", "fail"]
    assert report.verdict == "fail"


def test_throughput_without_both_models_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    with pytest.raises(InputError, match=r"needs both models.*for the baseline.*cannot be found here"):
        judge(base, save_record(tmp_path / "b", RIGHT, "svd"), min_throughput_ratio=0.9)


def test_without_a_criterion_one_point_is_the_margin(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    report = judge(base, save_record(tmp_path / "b", RIGHT, "svd"), max_drop=None)
    assert [(criterion.name, criterion.limit) for criterion in report.criteria] == [("max-drop", 1.0)]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_drop": 0.0}, "must be above 0"),
        ({"max_drop": -1.0}, "must be above 0"),
        ({"max_drop": float("nan")}, "must be above 0"),
        ({"max_size_ratio": 0.0}, "--max-size-ratio 0 must be above 0"),
        ({"alpha": 0.7}, "--alpha 0.7 must lie between"),
        ({"throughput": "train"}, "must be prefill or decode"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    with pytest.raises(InputError, match=words):
        judge(base, base, **settings)


def test_a_folder_must_hold_exactly_one_fitting_record(tmp_path: Path) -> None:
    base = save_record(tmp_path / "a", RIGHT)
    assert judge(tmp_path / "a", base).verdict == "pass"
    assert judge(base.parent, base).verdict == "pass"
    other = save_record(tmp_path / "a", RIGHT, recipe="svd")
    with pytest.raises(InputError, match=f"holds 2 finished records.*{other.stem}.*svd"):
        judge(tmp_path / "a", base)
    assert gate.run(Settings(base.stem, other.stem[:8], results=tmp_path / "a")).verdict == "pass"
    with pytest.raises(InputError, match=r"no record in .* is called '0123456789abcdef'"):
        gate.run(Settings("0123456789abcdef", str(base), results=tmp_path / "a"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a checkpoint"):
        judge(tmp_path / "empty", base)


def test_a_limit_takes_the_items_of_a_record_from_all_parts_of_a_task(tmp_path: Path) -> None:
    base, candidate = save_record(tmp_path / "a", RIGHT), save_record(tmp_path / "b", RIGHT, "svd")
    for folder, path in ((tmp_path / "a", base), (tmp_path / "b", candidate)):
        rows = [
            examples.row(task, i, 0.0 if "b" in folder.name and i >= 300 else 1.0)
            | {"subtask": f"part {i // 100}"}
            for task in RIGHT
            for i in range(400)
        ]
        RecordStore(folder).save(RecordStore(tmp_path).read(path), rows)
    report = judge(base, candidate, limit=40, max_drop=90.0)
    assert report.items_available == 80
    assert {flip.subtask for flip in report.flips} == {"part 3"}


def test_a_protocol_of_perplexity_alone_needs_no_items_and_knows_no_drop(tmp_path: Path) -> None:
    alone = examples.PROTOCOL.model_copy(update={"name": "alone", "tasks": ()})
    perplexity = cells.measurements(1000).perplexity
    windows = perplexity.model_copy(update={"window_nlls": (45.0, 46.0, 44.0), "tokens": 45})
    fields = {
        "protocol": alone,
        "measurements": cells.measurements(1000).model_copy(update={"perplexity": windows, "tasks": ()}),
    }
    base = save_record(tmp_path / "a", {}, **fields)
    candidate = save_record(tmp_path / "b", {}, "svd", **fields)
    assert not list(tmp_path.rglob("*.parquet"))
    report = judge(base, candidate, max_drop=None, max_perplexity_ratio=1.1)
    assert report.verdict == "pass"
    assert report.items_available == 0
    for default in ({}, {"max_drop": None}):
        with pytest.raises(InputError, match=r"'alone' has no tasks.*give --max-perplexity-ratio"):
            judge(base, candidate, **default)


def test_a_failed_record_or_one_without_outcomes_is_refused(tmp_path: Path) -> None:
    broken = RecordStore(tmp_path / "a").save(cells.failed())
    good = save_record(tmp_path / "b", RIGHT)
    with pytest.raises(InputError, match="has no outcomes: the worker was killed"):
        judge(broken, good)
    good.with_suffix(".items.parquet").unlink()
    with pytest.raises(InputError, match=r"item outcomes of record .* cannot be read"):
        judge(good, good)
