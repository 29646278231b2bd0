"""A first method file and its tests, written from templates."""

from __future__ import annotations

import keyword
from pathlib import Path

import jinja2

from suite.errors import InputError
from suite.method import methods
from suite.registry import origin

_TEMPLATES = Path(__file__).parent / "templates"


def write(name: str, folder: Path) -> tuple[Path, Path]:
    """Write `NAME.py`, a small working method, and `test_NAME.py`; returns both paths.

    Raises:
        InputError: the name is no name or taken, a file is there already, or the folder cannot be written.
    """
    module = name.replace("-", "_")
    if not module.isidentifier() or keyword.iskeyword(module) or module != module.lower():
        suggestion = "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")
        if not suggestion or not suggestion[0].isalpha() or keyword.iskeyword(suggestion):
            suggestion = f"my-{suggestion}".rstrip("-")
        raise InputError(
            f"'{name}' cannot name a method: use lower-case letters, digits and hyphens, a letter first."
            f" For example '{suggestion}'."
        )
    if name in methods:
        raise InputError(
            f"a method called '{name}' is there already ({origin(methods.get(name))})."
            f" Choose another name, such as 'my-{name}'."
        )
    files = {"method": folder / f"{module}.py", "test_method": folder / f"test_{module}.py"}
    for path in files.values():
        if path.exists():
            raise InputError(f"'{path}' is there already and is left alone. Choose another name or --folder.")
    cls = "".join(part.capitalize() for part in module.split("_"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for template, path in files.items():
            source = (_TEMPLATES / f"{template}.py.jinja2").read_text()
            text = jinja2.Template(source, keep_trailing_newline=True, autoescape=False).render(
                name=name, module=module, cls=cls
            )
            path.write_text(text)
    except OSError as error:
        raise InputError(f"'{folder}' cannot be written: {error.strerror}.") from None
    return files["method"], files["test_method"]
