"""The house keeps its walls: who may import whom."""

from __future__ import annotations

import ast
from pathlib import Path

import fednano
import pytest

HOUSE = Path(fednano.__file__).parent
FORBIDDEN = {
    "wire": {"models", "llm", "coordinator", "client", "lab"},
    "models": {"llm", "coordinator", "client", "lab"},
    "llm": {"coordinator", "client", "lab"},
    "coordinator": {"models", "llm", "client", "lab"},
    "client": {"llm", "coordinator", "lab"},
}


def imports(path: Path) -> set[str]:
    """The rooms of the house that a file imports from."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        found |= {name.split(".")[1] for name in names if name.startswith("fednano.")}
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = list((HOUSE / room).rglob("*.py"))
    assert len(files) > 2
    for path in files:
        assert not imports(path) & FORBIDDEN[room], path


def test_functions_and_files_stay_small() -> None:
    """About 400 lines a file; generated code is not ours."""
    for path in HOUSE.rglob("*.py"):
        if "_pb2" not in path.name:
            assert len(path.read_text().splitlines()) <= 420, path
