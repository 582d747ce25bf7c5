"""A public name is defined once in the whole package, so that it means one thing wherever it is read."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "draftcli"
# Names that may be defined twice, and why.
EXCEPTIONS = {
    "app": "Typer's word for a group of commands: `draftp` and `draftp rewards`",
    "anneal": "the command, and the function of the same name in Python",
    "evaluate": "the command, named as typed, and what it runs",
    "main": "the usual name of a script's entry point",
    "sample": "the command, and the function of the same name in Python",
    "train": "the command, named as typed, and what it runs",
}


def public_names(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and constants that a module defines at its top level, without a leading underscore."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]
        yield from (name for name in names if not name.startswith("_"))


def test_a_public_name_is_defined_once():
    places = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_names(ast.parse(path.read_text(encoding="utf-8"))):
            places[name].add(str(path.relative_to(PACKAGE)))
    twice = {name: sorted(files) for name, files in places.items() if len(files) > 1}
    assert {name: files for name, files in twice.items() if name not in EXCEPTIONS} == {}
    assert twice.keys() >= EXCEPTIONS.keys(), "an exception that nothing needs any more"


def test_every_kind_of_public_name_is_seen():
    source = "A = 1\nB: int = 2\nC, D = 3, 4\n_E = 5\ndef f(): g = 1\nasync def h(): ...\nclass K: L = 1\n"
    assert list(public_names(ast.parse(source))) == ["A", "B", "C", "D", "f", "h", "K"]
