"""How long the suite's own hot paths take; run with `tox run -e benchmarks`."""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import LlamaConfig

from suite.board.rows import rows
from suite.board.standings import standings
from suite.board.tables import markdown
from suite.conformance import tiny
from suite.measure.ledger import ledger
from suite.models.anatomy import Anatomy, anatomy_of
from suite.models.load import skeleton
from suite.recipe import Recipe
from suite.records import RecordStore
from suite.specs import Budget
from tests.suite import examples

LLAMA_70B = LlamaConfig(
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    dtype="bfloat16",
)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return anatomy_of(skeleton(LLAMA_70B))


def test_reading_the_anatomy_of_a_70b_model(benchmark: BenchmarkFixture) -> None:
    assert benchmark(lambda: anatomy_of(skeleton(LLAMA_70B))).n_blocks == 80


@pytest.mark.parametrize(
    ("recipe", "budget"),
    [
        ("svd", "params=0.8"),
        ("layerchop", "params=0.5"),
        ("rtn-int4", "bytes=0.3"),
        ("svd+rtn-int8", "bytes=0.3"),
    ],
)
def test_planning_a_70b_model(
    recipe: str, budget: str, anatomy: Anatomy, benchmark: BenchmarkFixture
) -> None:
    plan = benchmark(lambda: Recipe.parse(recipe).plan(anatomy, Budget.parse(budget)))
    assert plan.final.params <= anatomy.params


def test_the_ledger_of_a_model(benchmark: BenchmarkFixture) -> None:
    model = tiny.build("llama")
    assert benchmark(lambda: ledger(model))


def test_storing_a_record(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    store, record = RecordStore(tmp_path), examples.finished()
    assert benchmark(lambda: store.save(record)).is_file()


def test_reading_a_thousand_records(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    store = RecordStore(tmp_path)
    for seed in range(1000):
        store.save(examples.finished(seed=seed))
    assert len(benchmark(store.all)) == 1000


def test_ranking_the_committed_board(benchmark: BenchmarkFixture) -> None:
    store = RecordStore(Path(__file__).resolve().parents[2] / "results")
    records = store.all()
    assert len(benchmark(lambda: standings(records, store))) > 20


def test_a_board_of_a_thousand_records(benchmark: BenchmarkFixture) -> None:
    records = [examples.finished(seed=seed) for seed in range(1000)]
    assert benchmark(lambda: markdown(records))
    assert len(rows(records)) == 1000
