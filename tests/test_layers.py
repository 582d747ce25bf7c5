"""The arrows of the design, read from the imports: dependencies point down only."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "draftcli"
# What each part may import of draftcli, beside itself. `errors` may be used everywhere.
ALLOWED = {
    "__init__": {"config", "core", "rewards", "sampling"},
    "__main__": {"cli"},
    "errors": set(),
    "config": set(),
    "prompts": {"config"},
    "runs": {"config"},
    "core": {"config", "runs"},
    "rewards": {"config"},
    "metrics": {"core"},
    "sampling": {"metrics", "core", "config", "prompts", "runs", "__init__"},
    "training": {"sampling", "metrics", "core", "rewards", "config", "prompts", "runs", "__init__"},
    "planning": {"training", "core", "rewards", "config"},
    "evaluation": {"sampling", "metrics", "core", "rewards", "config", "prompts", "runs", "__init__"},
    "export": {"core", "config", "runs", "__init__"},
    "cli": {
        "training",
        "planning",
        "evaluation",
        "export",
        "sampling",
        "core",
        "rewards",
        "config",
        "prompts",
        "__init__",
    },
    "toy": {"rewards", "core", "__init__"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    """The parts of draftcli that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where a thing comes from"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "draftcli":
                first = rest.partition(".")[0]
                known = (PACKAGE / first).is_dir() or (PACKAGE / f"{first}.py").is_file()
                found.add(first if first and known else "__init__")
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(f.relative_to(PACKAGE)) for f in FILES])
def test_imports_point_down(path):
    own = part(path)
    assert imported_parts(path) <= ALLOWED[own] | {own, "errors"}


def test_there_are_no_drawers():
    assert not {"utils", "common", "helpers"} & {name for f in FILES for name in f.with_suffix("").parts}


def test_torch_is_not_imported_by_help():
    """The command line's own modules import nothing heavy at the top."""
    heavy = {"torch", "diffusers", "transformers", "peft", "numpy", "scipy", "pydantic"}
    light = [*(PACKAGE / "cli").glob("*.py"), PACKAGE / "__init__.py", PACKAGE / "errors.py"]
    for path in light:
        top = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module).split(".")[0] for n in top if isinstance(n, ast.ImportFrom)}
        assert not names & heavy, path
