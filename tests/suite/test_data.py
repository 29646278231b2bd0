"""Texts and the data directory."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from suite import data
from suite.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data directory with a few lines of everything."""
    wikitext = " \n = Title = \n \n First line . \n Second\u2028line . \n"
    (tmp_path / "wikitext2").mkdir()
    for split in ("train", "test"):
        (tmp_path / "wikitext2" / f"{split}.txt.gz").write_bytes(gzip.compress(wikitext.encode()))
    for name in ("c4", "alpaca"):
        (tmp_path / name).mkdir()
        rows = "\n".join(json.dumps({"text": text, "n": 1}) for text in ("one", "two\u2028", "three"))
        (tmp_path / name / "train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return tmp_path


def test_the_two_halves_of_the_python_text_share_no_topic() -> None:
    from pydoc_data.topics import topics

    rest, held_out = data.text("pydoc"), data.text("pydoc-held-out")
    bodies = set(topics.values())
    for body in bodies:
        assert (body in rest) or (body in held_out)
    long = [body for body in bodies if len(body) > 500]
    assert len(long) > 50
    assert not [body for body in long if body in rest and body in held_out]
    assert 0.05 < len(held_out) / len(rest) < 0.6


def test_the_python_text_is_the_same_every_time() -> None:
    for name in ("pydoc", "pydoc-held-out"):
        assert data.text(name) == data.text(name)
        assert len(data.text(name)) > 50_000


def test_wikitext_joins_rows_by_blank_lines_as_the_hub_holds_them(folder: Path) -> None:
    expected = "\n\n".join(["", " = Title = \n", "", " First line . \n", " Second\u2028line . \n"])
    assert data.text("wikitext2", folder) == expected
    assert data.text("wikitext2-test", folder) == expected


def test_the_raw_test_text_is_the_file_as_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = gzip.decompress((folder / "wikitext2" / "test.txt.gz").read_bytes()).decode()
    assert data.text("wikitext2-test-raw", folder) == raw
    rows = [{"text": ""}, {"text": " = Title = \n"}, {"text": ""}, {"text": " First line . \n"}]
    monkeypatch.setattr(data, "hub_rows", lambda *_: rows)
    assert data.text("wikitext2-test-raw", None) == " \n = Title = \n \n First line . \n"


@pytest.mark.parametrize("name", ["c4", "alpaca"])
def test_documents_are_joined_by_blank_lines(folder: Path, name: str) -> None:
    assert data.text(name, folder) == "one\n\ntwo\u2028\n\nthree"


@pytest.mark.parametrize(
    ("name", "file"),
    [("wikitext2", "wikitext2/train.txt.gz"), ("wikitext2-test", "test.txt.gz"), ("c4", "c4/train.jsonl.gz")],
)
def test_a_file_the_data_directory_lacks_is_named(tmp_path: Path, name: str, file: str) -> None:
    with pytest.raises(InputError) as caught:
        data.text(name, tmp_path)
    assert file in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_an_unknown_text_is_offered_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no text is called 'wikitxt2'\. Did you mean 'wikitext2'\?"):
        data.text("wikitxt2")


def test_without_a_data_directory_the_hub_is_asked_and_its_absence_explained() -> None:
    for name in ("wikitext2", "c4"):
        with pytest.raises(InputError, match=r"could not be loaded from the hub .* --data-dir DIR"):
            data.text(name)


def test_a_data_directory_that_does_not_exist_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "nowhere"
    with pytest.raises(InputError, match="does not exist"):
        data.data_directory(missing)
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(missing))
    with pytest.raises(InputError, match=data.DATA_DIR_VARIABLE):
        data.data_directory()


def test_the_flag_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    monkeypatch.setenv(data.DATA_DIR_VARIABLE, str(second))
    assert data.data_directory(first) == first.resolve()
    assert data.data_directory() == second.resolve()
    monkeypatch.delenv(data.DATA_DIR_VARIABLE)
    assert data.data_directory() is None


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("wikitext2", gzip.compress(b"A whole text that was cut off")[:-9]),
        ("wikitext2", b"no gzip at all"),
        ("c4", gzip.compress(b'{"text": "one"}\n{"text": "tw')),
    ],
    ids=["cut off", "no gzip", "half a row"],  # gzip's bytes hold the time
)
def test_a_damaged_file_is_named_with_the_way_to_mend_it(folder: Path, name: str, content: bytes) -> None:
    (path,) = (folder / name).glob("train*")
    path.write_bytes(content)
    with pytest.raises(InputError, match="weighin data pull fetches it anew") as error:
        data.text(name, folder)
    assert str(path) in str(error.value)


def test_rows_are_read_from_plain_and_gzipped_files(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": "é\u2028\x85"}]
    content = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    assert data.read_jsonl(tmp_path / "a.jsonl") == data.read_jsonl(tmp_path / "a.jsonl.gz") == rows


@pytest.mark.parametrize("name", sorted(set(data.TEXTS) - {"pydoc", "pydoc-held-out"}))
def test_every_text_is_in_the_data_directory(data_folder: Path, name: str) -> None:
    assert len(data.text(name, data_folder)) > 100_000
