"""Who may import whom."""

import ast

import pytest

from tests.processes import ROOT

FORBIDDEN = {
    "shared": ("services", "cli", "tests"),
    "services/gateway": ("services.inferer", "cli", "llama_cpp", "tests"),
    "services/inferer": ("services.gateway", "cli", "litestar", "tests"),
    "cli": ("services", "tests"),
}


def imported(folder: str) -> dict[str, set[str]]:
    """Every module that each file of ``folder`` imports, wherever in the file."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / folder).rglob("*.py")):
        modules = found.setdefault(str(file.relative_to(ROOT)), set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_go_one_way(folder: str) -> None:
    """Services and the command line import `shared`, it none of them, and they not each other."""
    files = imported(folder)
    assert any("shared." in module for modules in files.values() for module in modules)
    for file, modules in files.items():
        wrong = [
            m for m in modules if f"{m}.".startswith(tuple(f"{f}." for f in FORBIDDEN[folder]))
        ]
        assert not wrong, file
