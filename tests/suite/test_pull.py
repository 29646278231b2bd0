from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from suite import data
from suite.errors import InputError
from suite.pull import pull

WIKI_ROWS = [{"text": ""}, {"text": " = A title = \n"}, {"text": ""}, {"text": " Some words . \n"}]


def test_pulled_text_reads_back_as_the_hub_rows_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.pull.hub_rows", lambda *_: WIKI_ROWS)
    written = dict(pull(tmp_path, ["wikitext2"], None))
    assert set(written["wikitext2"]) == {"wikitext2/train.txt.gz", "wikitext2/test.txt.gz"}
    assert data.text("wikitext2", tmp_path) == "\n\n".join(row["text"] for row in WIKI_ROWS)


def test_pulled_documents_keep_their_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.pull.hub_rows", lambda *_: [{"text": "one"}, {"text": "two"}])
    assert list(pull(tmp_path, ["alpaca"], None)) == [("alpaca", ["alpaca/train.jsonl.gz"])]
    assert data.text("alpaca", tmp_path) == "one\n\ntwo"


def test_a_pulled_task_takes_the_splits_that_are_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    task = SimpleNamespace(dataset={"validation": [row] * 3}, config=SimpleNamespace(dataset_name=None))

    def tasks(name: str, folder: Path | None) -> dict[str, Any]:
        return {name: task}

    monkeypatch.setattr("suite.pull.load_tasks", tasks)
    list(pull(tmp_path, ["piqa"], 2))
    assert len(data.read_jsonl(tmp_path / "piqa" / "validation.jsonl")) == 2


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("suite.pull.hub_rows", lambda *_: [{"text": "one"}])
    (tmp_path / "alpaca").touch()  # where the folder would be
    with pytest.raises(InputError, match="cannot be written"):
        list(pull(tmp_path, ["alpaca"], None))


@pytest.mark.parametrize("name", ["c4", "alpaca"])
def test_a_pulled_text_has_the_rows_that_the_hub_would_give(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def rows(*arguments: Any, limit: int | None = None) -> list[dict[str, str]]:
        asked.append(limit or arguments[-1])
        return [{"text": "one"}]

    monkeypatch.setattr("suite.pull.hub_rows", rows)
    monkeypatch.setattr("suite.data.hub_rows", rows)
    list(pull(tmp_path, [name], None))
    data.text(name)
    assert asked == [2000, 2000]


def test_what_was_pulled_in_part_makes_partial_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("suite.pull.hub_rows", lambda *_: WIKI_ROWS)
    data.check_whole(["wikitext2-test"], None, tmp_path)
    list(pull(tmp_path, ["wikitext2"], 50))
    data.check_whole(["piqa", "c4"], None, tmp_path)
    data.check_whole(["wikitext2-test"], 50, tmp_path)
    for limit in (None, 51):
        with pytest.raises(InputError, match=r"only the first 50 rows of .* Run with --limit 50"):
            data.check_whole(["wikitext2-test"], limit, tmp_path)
    list(pull(tmp_path, ["wikitext2"], None))
    data.check_whole(["wikitext2-test"], None, tmp_path)


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'wikitext2'"):
        list(pull(tmp_path, ["wikitxt2"], None))


def test_an_unreachable_hub_names_the_data_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--data-dir"):
        list(pull(tmp_path, ["alpaca"], None))
