"""Allocation files, and what is refused of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from suite.conformance import tiny
from suite.errors import InputError
from suite.models.anatomy import Anatomy
from suite.shares import Allocation, LinearShare, load_allocation, shares_for


def allocation_for(anatomy: Anatomy, share: float = 0.5) -> Allocation:
    return Allocation(
        model="tiny",
        model_digest="0",
        method="svd",
        profile="0",
        budget="params=0.8",
        predicted_increase=0.1,
        linears={
            line.path: LinearShare(out_features=line.out_features, in_features=line.in_features, share=share)
            for line in anatomy.linears
        },
    )


def written(folder: Path, allocation: Allocation, **changes: Any) -> Path:
    file = folder / "allocation.json"
    file.write_text(json.dumps(allocation.model_dump() | changes))
    return file


def test_every_linear_gets_its_share(family: str, tmp_path: Path) -> None:
    anatomy = tiny.anatomy(family)
    file = written(tmp_path, allocation_for(anatomy, 0.4))
    assert shares_for(file, anatomy) == {line.path: 0.4 for line in anatomy.linears}


def test_an_allocation_for_another_model_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, allocation_for(tiny.anatomy("opt")))
    with pytest.raises(InputError, match=r"was made for the linears of tiny.*weighin profile --allocate"):
        shares_for(file, tiny.anatomy("llama"))


def test_linears_of_another_shape_are_named(tmp_path: Path) -> None:
    anatomy = tiny.anatomy("llama")
    allocation = allocation_for(anatomy)
    path = anatomy.linears[0].path
    changed = allocation.linears[path].model_copy(update={"in_features": 7})
    linears = {**allocation.model_dump()["linears"], path: changed.model_dump()}
    with pytest.raises(InputError, match=r"differ \(model.layers.0.self_attn.q_proj\)"):
        shares_for(written(tmp_path, allocation, linears=linears), anatomy)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"half', "Invalid JSON"), ('{"kind": "other"}', "allocation file"), ("[]", "allocation file")],
)
def test_a_file_of_another_kind_is_refused(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(InputError, match=f"{message}.*"):
        load_allocation(file)


def test_a_share_outside_0_to_1_is_refused(tmp_path: Path) -> None:
    anatomy = tiny.anatomy("llama")
    allocation = allocation_for(anatomy).model_dump()
    allocation["linears"][anatomy.linears[0].path]["share"] = 1.5
    file = tmp_path / "x.json"
    file.write_text(json.dumps(allocation))
    with pytest.raises(InputError, match="less than or equal to 1"):
        load_allocation(file)


def test_a_missing_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read.*--allocate BUDGET writes one"):
        load_allocation(tmp_path / "none.json")
