"""Names, plug-ins, and messages for those who misspell them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from suite import registry
from suite.errors import InputError
from suite.layers import module_types
from suite.method import methods
from suite.registry import Registry, load_plugin, origin

PLUGIN = """
from suite.calibration import Calibration
from suite.method import Method, MethodConfig, Plan, register

@register
class Mine(Method[MethodConfig]):
    name = "{name}"
    family = "test"
    source = "{source}"

    def plan(self, anatomy, target, seed):
        return Plan()

    def compress(self, model, plan, calibration):
        pass
"""


@pytest.fixture(autouse=True)
def _forget_what_a_test_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    list(methods)  # the built-in ones stay
    monkeypatch.setattr(methods, "_items", dict(methods._items))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))


def plugin(folder: Path, name: str, source: str = "here") -> Path:
    file = folder / "plugin.py"
    file.write_text(PLUGIN.format(name=name, source=source))
    return file


def test_the_built_in_methods_register_themselves() -> None:
    assert {"dense", "random-layers", "layerchop", "svd", "rtn-int8", "rtn-int4"} <= set(methods)
    assert list(methods) == sorted(methods)


def test_every_method_names_its_family_its_source_and_what_it_acts_on() -> None:
    for name in methods:
        cls = methods.get(name)
        assert cls.name == name
        assert cls.family
        assert cls.source
        assert cls.acts_on <= {"params", "bytes"}
        assert cls.needs <= {"calibration", "training", "cuda"}
        assert cls.__doc__


def test_a_misspelt_method_is_offered_the_nearest() -> None:
    with pytest.raises(InputError, match=r"no method is called 'layerchp'\. Did you mean 'layerchop'\?"):
        methods.get("layerchp")


def test_a_name_like_no_other_is_offered_nothing() -> None:
    with pytest.raises(InputError) as caught:
        methods.get("zzzzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_an_unknown_module_type_lists_those_that_are_known() -> None:
    with pytest.raises(InputError, match=r"Known: .*packed_linear.*import the plug-in"):
        module_types.get("tensor_train")


def test_a_plug_in_registers_its_methods(tmp_path: Path) -> None:
    digest = load_plugin(plugin(tmp_path, "mine"))
    assert methods.get("mine").source == "here"
    assert len(digest) == 64


def test_a_plug_in_loaded_twice_is_the_same_plug_in(tmp_path: Path) -> None:
    file = plugin(tmp_path, "mine")
    digest = load_plugin(file)
    cls = methods.get("mine")
    assert load_plugin(file) == digest
    assert methods.get("mine") is cls


def test_an_edited_plug_in_replaces_its_own_methods(tmp_path: Path) -> None:
    before = load_plugin(plugin(tmp_path, "mine"))
    after = load_plugin(plugin(tmp_path, "mine", source="edited"))
    assert before != after
    assert methods.get("mine").source == "edited"


def test_two_files_cannot_claim_the_same_name(tmp_path: Path) -> None:
    builtin = methods.get("svd")
    file = plugin(tmp_path, "svd")
    with pytest.raises(InputError) as caught:
        load_plugin(file)
    assert "two methods are called 'svd'" in str(caught.value)
    assert str(file) in str(caught.value)
    assert origin(builtin) in str(caught.value)
    assert methods.get("svd") is builtin


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("import suite\n\n1 / 0\n", "ZeroDivisionError: division by zero (line 3)"),
        ("import no_such_package\n", "No module named 'no_such_package' (line 1)"),
        ("x = 1\ndef f(:\n", "line 2"),
    ],
)
def test_a_plug_in_that_does_not_import_is_refused_with_its_line(
    tmp_path: Path, content: str, says: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(content)
    for _ in range(2):  # a failed import leaves nothing behind
        with pytest.raises(InputError) as caught:
            load_plugin(file)
        assert "does not import" in str(caught.value)
        assert says in str(caught.value)


def test_a_plug_in_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        load_plugin(tmp_path / "missing.py")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="is not a Python file"):
        load_plugin(tmp_path / "notes.txt")


def test_a_package_that_fails_to_import_is_named_beside_the_missing_method(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "broken_entry_points", {"their.methods": "ImportError: no torch"})
    with pytest.raises(InputError, match=r"Not importable: their\.methods \(ImportError: no torch\)"):
        methods.get("theirs")


def test_a_registry_counts_what_it_holds() -> None:
    mine: Registry[type] = Registry("toy")
    mine.add("int", int)
    assert len(mine) == 1
    assert list(mine) == ["int"]
    assert mine.get("int") is int
