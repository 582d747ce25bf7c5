"""The arrows of the design, read from the imports: dependencies point down only."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "draftcli"
# What each part may import of draftcli, beside itself. `errors` may be used everywhere.
ALLOWED = {
    "__init__": {"api", "config", "core", "rewards", "sampling"},
    # The commands as functions: beside them, with the console that prints nothing.
    "api": {"cli", "config", "core", "evaluation", "planning", "quiet", "runs", "sampling", "training"},
    "__main__": {"cli"},
    "errors": set(),
    "disk": {"umask"},
    "changes": set(),
    "quiet": set(),
    "progress": set(),
    "built_in": set(),
    "contents": {"built_in"},
    "lines": set(),
    "config": set(),
    "prompts": {"config", "file_kinds"},
    "file_kinds": set(),
    "pictures": set(),
    "pages": {"__init__"},
    "umask": set(),
    "runs": {"changes", "config", "contents", "disk", "lines", "run_lines"},
    "run_lines": set(),
    "run_states": {"disk", "lines", "runs"},
    "spread": set(),
    "core": {"built_in", "config", "runs", "umask", "file_kinds", "spread"},
    "rewards": {"config", "contents", "file_kinds", "spread"},
    "metrics": {"core"},
    "sampling": {"pages", "pictures", "metrics", "core", "config", "prompts", "runs", "lines", "__init__"},
    # A run hands its LoRA over by the names of other programs too, as merge-lora does.
    "training": {
        *("export", "pictures", "sampling", "metrics", "core", "rewards", "config", "prompts", "runs", "__init__"),
        *("built_in", "contents", "disk", "progress", "pages"),
    },
    "planning": {"training", "core", "rewards", "config"},
    "preferences": {"core", "rewards", "metrics", "config", "pictures", "lines", "file_kinds", "disk", "progress"},
    "evaluation": {
        *("pages", "pictures", "sampling", "metrics", "core", "rewards", "config", "prompts", "runs", "lines"),
        "__init__",
    },
    # What it writes is defined where it is read: what an answer is, and how answers agree with rewards.
    "rating": {
        *("pages", "pictures", "evaluation", "sampling", "metrics", "core", "rewards", "config", "prompts"),
        *("preferences", "disk", "lines", "progress"),
    },
    "export": {"core", "config", "runs", "file_kinds", "__init__"},
    "cli": {
        "training",
        "planning",
        "evaluation",
        "rating",
        "export",
        "preferences",
        "sampling",
        "core",
        "rewards",
        "config",
        "prompts",
        "run_states",
        "progress",
        "quiet",
        "__init__",
    },
    "toy": {"preferences", "rewards", "core", "pictures", "umask", "__init__"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


# The same inside core, from below: what each layer may import of core, beside itself. The values and formulas that all
# share, the method on them, then what it is done with and how it runs. draftp.py alone puts them together.
CORE_LAYERS = {
    "values": {"grid", "schedule", "batch", "phase", "precision"},
    "method": {
        "denoise",
        "guidance",
        "annealing",
        "weighings",
        "networks",
        "penalty",
        "image_weights",
        "backward",
        "prefix",
        "rollout",
        "gradient",
        "one_backward",
    },
    "models": {"models"},
    "lora": {"lora"},
    "engine": {"engine"},
    "facade": {"draftp"},
    "moved": {"sdxl", "original_names"},  # where the first version had what is in models; nothing here imports them
}
CORE_ALLOWED = {
    "values": set(),
    "method": {"values"},
    "models": {"values", "method"},
    "lora": {"values", "models"},
    "engine": {"values", "method", "models", "lora"},
    "facade": {"values", "method", "models", "lora", "engine"},
    "moved": {"models"},
}


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


def core_layer(name: str) -> str:
    return next(layer for layer, names in CORE_LAYERS.items() if name in names)


CORE_FILES = [f for f in FILES if part(f) == "core" and f.parent.name + f.name != "core__init__.py"]


@pytest.mark.parametrize("path", CORE_FILES, ids=[str(f.relative_to(PACKAGE)) for f in CORE_FILES])
def test_layers_inside_core(path):
    own = core_layer(path.relative_to(PACKAGE / "core").parts[0].removesuffix(".py"))
    imported = re.findall(
        r"^\s*from draftcli\.core(?:\.(\w+))?\S* import (\w+)", path.read_text(encoding="utf-8"), re.M
    )
    found = {core_layer(module or name) for module, name in imported}
    assert found <= CORE_ALLOWED[own] | {own}


def test_no_import_dodges_the_layers():
    """An import under TYPE_CHECKING would be refused in the open; it is there only to keep a start without torch."""
    light = {
        PACKAGE / "__init__.py",
        PACKAGE / "api.py",
        PACKAGE / "rewards" / "__init__.py",
        *(PACKAGE / "cli").glob("*.py"),
    }
    hidden = [f for f in FILES if f not in light and "TYPE_CHECKING" in f.read_text(encoding="utf-8")]
    assert not hidden


def test_files_and_classes_stay_readable():
    """At most 400 lines a file and 250 a class."""
    sources = {str(f): f.read_text(encoding="utf-8") for f in FILES}
    long = [(name, lines) for name, text in sources.items() if (lines := len(text.splitlines())) > 400]
    classes = [n for text in sources.values() for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ClassDef)]
    long += [(n.name, n.end_lineno - n.lineno + 1) for n in classes if n.end_lineno - n.lineno >= 250]
    assert not long


def test_there_are_no_drawers():
    assert not {"utils", "common", "helpers"} & {name for f in FILES for name in f.with_suffix("").parts}


def test_torch_is_not_imported_by_help():
    """The command line's own modules import nothing heavy at the top."""
    heavy = {"torch", "diffusers", "transformers", "peft", "numpy", "scipy", "pydantic"}
    light = [*(PACKAGE / "cli").glob("*.py"), PACKAGE / "__init__.py", PACKAGE / "api.py", PACKAGE / "errors.py"]
    for path in light:
        top = [
            n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        names = {a.name.split(".")[0] for n in top if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module).split(".")[0] for n in top if isinstance(n, ast.ImportFrom)}
        assert not names & heavy, path


def without_encoding(call: ast.Call) -> bool:
    """Whether a call opens a text file in the encoding of the machine, which may lack letters."""
    is_method = isinstance(call.func, ast.Attribute)  # PATH.open(MODE), else open(PATH, MODE)
    name = call.func.attr if is_method else getattr(call.func, "id", "")
    given = {word.arg: word.value for word in call.keywords}
    if name not in ("open", "read_text", "write_text") or given.keys() & {"encoding", "fileobj"}:
        return False
    if name != "open":
        return True
    mode = given.get("mode") or next(iter(call.args[0 if is_method else 1 :]), ast.Constant("r"))
    return isinstance(mode, ast.Constant) and "b" not in str(mode.value)


@pytest.mark.parametrize(
    ("code", "is_one"),
    [
        ("open(path)", True), ("path.open('a')", True), ("path.open(mode='r')", True), ("(a / b).read_text()", True),
        ("path.write_text(text)", True), ("path.open('w', encoding='utf-8')", False), ("run.open(cfg)", False),
        ("open(path, mode='wb')", False), ("tarfile.open(fileobj=file, mode='r:')", False),
    ],
)  # fmt: skip
def test_a_text_file_without_encoding_is_seen(code, is_one):
    assert without_encoding(ast.parse(code, mode="eval").body) is is_one


def test_text_files_name_their_encoding():
    folders = [PACKAGE, *(PACKAGE.parent / name for name in ("benchmarks", "examples"))]
    files = [f for folder in folders for f in folder.rglob("*.py")]
    calls = [(f, n) for f in files for n in ast.walk(ast.parse(f.read_text(encoding="utf-8"))) if type(n) is ast.Call]
    assert not [f"{file}:{call.lineno}" for file, call in calls if without_encoding(call)]


def test_consoles_are_made_in_one_place():
    """Others read names as markup. A Console is made by `literal_console`, and lines go through one."""
    folders = [PACKAGE, PACKAGE.parent / "benchmarks"]
    texts = {f: f.read_text(encoding="utf-8") for folder in folders for f in folder.rglob("*.py")}
    odd = r"(?<!\w)Console\(|typer\.echo|click\.echo|from_markup"
    assert [f.name for f, text in texts.items() if re.search(odd, text)] == ["console.py"]
