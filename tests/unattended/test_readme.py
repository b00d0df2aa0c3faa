"""The table in the README is the one that these tests make."""

import importlib.util
from pathlib import Path

from cases import table

HERE = Path(__file__).parent
README = Path(__file__).parents[2] / "README.md"


def rows() -> list[tuple[str, ...]]:
    """File and arguments of every mark ``case`` in this folder."""
    found = []
    for file in sorted(set(HERE.glob("test_*.py")) - {Path(__file__)}):
        spec = importlib.util.spec_from_file_location(f"cases_of_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for test in vars(module).values():
            marks = getattr(test, "pytestmark", []) if callable(test) else []
            found += [(file.name, *map(str, mark.args)) for mark in marks if mark.name == "case"]
    return found


def test_the_table_of_the_readme_is_the_one_that_is_printed():
    assert "\n".join(table(rows())) in README.read_text()
