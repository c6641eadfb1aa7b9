"""The package's rooms: which there are, and which way imports point."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "bkd_fast"
# A room imports from its own rank's rooms only where that is itself, and from those of lower ranks.
RANKS = (
    ("cli",),
    ("ablation", "benchmark", "integrations"),
    ("evaluation", "export"),
    ("inference", "training"),
    ("normals",),
    ("artifact",),
    ("model", "data"),
    ("ops", "config", "decisions"),
    ("extension", "files"),
    ("errors", "version"),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}


def imports(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, types alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("bkd_fast"):
            modules |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            modules |= {name.name for name in node.names if name.name.startswith("bkd_fast")}
    return modules


def edges() -> set[tuple[str, str, str]]:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imports(path):
            parts = module.split(".")
            if own in RANK and len(parts) > 1 and parts[1] in RANK:
                found.add((own, parts[1], str(path.relative_to(PACKAGE))))
    return found


def test_every_module_is_in_a_room():
    names = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert names - {"__init__", "__main__", "__pycache__"} == set(RANK)


def test_the_root_has_at_most_eight_modules():
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_arrows_point_one_way():
    wrong = sorted((own, other, path) for own, other, path in edges() if own != other and RANK[own] >= RANK[other])
    assert not wrong


@pytest.mark.parametrize("room", [path for path in sorted(PACKAGE.iterdir()) if (path / "__init__.py").exists()])
def test_every_room_says_what_belongs_there(room):
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))
