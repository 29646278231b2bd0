"""Where rows stand against each other: rank intervals and differences to dense, from what they share.

That is the items of the tasks, or the windows of perplexity's text where a protocol has no tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suite import stats
from suite.paired import Paired, item_keys, pair_items, pair_windows
from suite.records import Record, RecordStore
from suite.specs import digest_of


@dataclass(frozen=True)
class Standing:
    """One row within its table; intervals hold for all rows of the table together."""

    rank: tuple[int, int] | None = None
    difference: float | None = None
    """Macro accuracy minus that of dense."""
    half_width: float | None = None
    note: str | None = None
    """Why there is no rank, where the reader would expect one."""


def contest(record: Record) -> str:
    """Within equal conditions, the rows that are ranked together: equal budget, equal healing."""
    spec = record.spec
    label = "unbudgeted" if spec.budget.metric == "none" else str(spec.budget)
    if spec.healing is None:
        return label
    return f"{label} · trained on {spec.healing.tokens:,} tokens ({spec.healing})"


Standings = Mapping[str, Standing]
"""Standings by record id."""


def conditions(record: Record) -> str:
    """Digest of what must be equal for two rows to share a table. Seeds may differ."""
    return digest_of([record.spec.model, record.spec.model_digest, *_setting(record)])[:12]


def setting(record: Record) -> str:
    """Digest of what must be equal for rows of two models to be compared."""
    return digest_of(_setting(record))[:12]


def _setting(record: Record) -> list[Any]:
    spec = record.spec
    return [spec.protocol_digest, str(spec.calibration), spec.limit, spec.device]


def current(records: Sequence[Record]) -> list[Record]:
    """The records without those of an older version of their methods, where there is one of a newer."""
    newest: dict[str, tuple[int, ...]] = {}
    versions = [_versions(record) for record in records]
    # What only healed rows are trained on stands beside the protocol, as in a cell's own digest.
    unlike: dict[str, Any] = {"method_versions": True, "protocol": {"healing": True}}
    cells = [digest_of(r.spec.model_dump(mode="json", exclude=unlike)) for r in records]
    for cell, version in zip(cells, versions, strict=True):
        newest[cell] = max(newest.get(cell, ()), version)
    return [
        record
        for record, cell, version in zip(records, cells, versions, strict=True)
        if version == newest[cell]
    ]


def _versions(record: Record) -> tuple[int, ...]:
    """The numbers of `name@number`; plug-ins have digests beside them, which have no order."""
    return tuple(int(v.partition("@")[2]) for v in record.spec.method_versions if "@" in v)


def standings(records: Sequence[Record], store: RecordStore) -> dict[str, Standing]:
    """Standings of all compressed rows, table by table.

    Dense is no competitor and has no rank; unbudgeted rows are compared with dense but not ranked.

    Raises:
        InputError: items cannot be read.
    """
    # Of several dense rows the one with the lowest seed is on the table.
    references = [record for record in records if record.spec.recipe == "dense" and record.measurements]
    references.sort(key=lambda record: -record.spec.seed)
    dense = {conditions(record): record for record in references}
    members: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.measurements and record.spec.recipe != "dense":
            members.setdefault((conditions(record), contest(record)), []).append(record)
    result: dict[str, Standing] = {}
    for (condition, _), group in members.items():
        reference = dense.get(condition)
        ranked = group[0].spec.budget.metric != "none"
        result |= _of_table(([reference] if reference else []) + group, store, ranked)
    return result


def _of_table(records: list[Record], store: RecordStore, ranked: bool) -> dict[str, Standing]:
    frames = [(record, store.items(record)) for record in records]
    scored = [(record, frame, item_keys(frame)) for record, frame in frames if frame is not None]
    if not scored:
        return _by_perplexity(records) if ranked else {}
    # A record made before an item was corrected has other items; the rows most alike are compared.
    digests = [digest_of(keys) for _, _, keys in scored]
    common = max(digests, key=digests.count)
    kept = [(record, frame) for (record, frame, _), d in zip(scored, digests, strict=True) if d == common]
    result = {
        record.id: Standing(note="not compared: scored on other items than the other rows")
        for (record, _, _), digest in zip(scored, digests, strict=True)
        if digest != common
    }
    paired = pair_items({record.id: frame for record, frame in kept})
    if min(paired.sizes) < 2:
        return result
    competitors = [i for i, (record, _) in enumerate(kept) if record.spec.recipe != "dense"]
    ranks = _ranks(paired, competitors) if ranked else {}
    gaps = _gaps(paired, competitors) if len(competitors) < len(kept) else {}
    for i in competitors:
        difference, half_width = gaps.get(i, (None, None))
        result[kept[i][0].id] = Standing(ranks.get(i), difference, half_width)
    return result


def _by_perplexity(records: list[Record]) -> dict[str, Standing]:
    """Ranks by the mean log-likelihood per token, from paired windows."""
    texts = {
        record.id: record.measurements.perplexity
        for record in records
        if record.measurements and record.spec.recipe != "dense"
    }
    kept = pair_windows(texts)
    result = {
        name: Standing(note="not compared: no finite perplexity on the text of the other rows")
        for name in texts.keys() - kept.keys()
    }
    pairs = stats.all_pairs(len(kept))
    windows = len(next(iter(kept.values()), ()))
    if windows < 2 or not pairs:
        return result | {name: Standing((1, 1)) for name in kept if len(kept) == 1}
    intervals = stats.macro_differences(list(kept.values()), np.zeros(windows), pairs, pseudo_pairs=0)
    ranks = stats.rank_intervals(intervals, pairs, len(kept))
    return result | {name: Standing(rank) for name, rank in zip(kept, ranks, strict=True)}


def _ranks(paired: Paired, rows: list[int]) -> dict[int, tuple[int, int]]:
    pairs = stats.all_pairs(len(rows))
    if not pairs:
        return dict.fromkeys(rows, (1, 1))
    intervals = stats.macro_differences(paired.correct[rows], paired.tasks, pairs)
    return dict(zip(rows, stats.rank_intervals(intervals, pairs, len(rows)), strict=True))


def _gaps(paired: Paired, rows: list[int]) -> dict[int, tuple[float, float]]:
    if not rows:
        return {}
    reference = next(i for i in range(len(paired.correct)) if i not in rows)
    found = stats.macro_differences(paired.correct, paired.tasks, [(reference, row) for row in rows])
    return {
        row: (float(estimate), float(half))
        for row, estimate, half in zip(rows, found.estimate, found.half_width, strict=True)
    }
