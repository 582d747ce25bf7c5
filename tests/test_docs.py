"""What the documents say is true: commands run, links lead somewhere, the pages made from code are up to date."""

import ast
import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from draftcli.cli import app
from draftcli.config import load_config
from tests.command import draftp

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


DRAFTP_LINES = [
    line.partition("#")[0].strip()
    for page in PAGES
    for block in blocks(page, "bash")
    for line in block.splitlines()
    if re.match(r"(\S*/)?draftp ", line)
]


def test_there_are_commands_to_check():
    assert len(DRAFTP_LINES) >= 4


def by_size(line: str):
    """A dry run at full size works out its memory: half a minute of processor time."""
    slow = line.startswith("draftp train") and re.search(r"sdxl|sd15", line) is not None
    return pytest.param(line, marks=pytest.mark.slow) if slow else line


@pytest.mark.parametrize("line", [by_size(line) for line in DRAFTP_LINES])
def test_documented_commands_are_understood(line):
    """`train` as dry runs: every option, preset and setting exists; the others parsed. CI runs `make demo` itself."""
    Path("my_prompts.txt").write_text("a fox\n")
    arguments = [a for a in shlex.split(line)[1:] if a != "--dry-run"]
    if arguments[0] != "train":
        command = typer.main.get_command(app).commands[arguments[0]]
        command.make_context(arguments[0], arguments[1:])
        return
    result = draftp(*arguments, "--dry-run")
    assert result.code == 0, result.err
    assert "UNet evaluations" in result.out


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def anchors(page: Path) -> set[str]:
    """What a heading is called in a link: lower case, spaces as hyphens, no other signs."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[p.name for p in PAGES])
def test_links_to_headings_lead_to_one(page):
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert anchor in anchors(other), f"{other.name} has no heading {anchor}"


POINTERS = sorted(
    {
        (page.name, file, name)
        for page in (ROOT / "docs").glob("*.md")
        if page.name != "log.md"  # it tells what was
        for file, names in re.findall(r"`((?:[\w-]+/)*\w+\.py)(?::\s+([^`]+))?`", page.read_text(encoding="utf-8"))
        for name in re.split(r",\s+", names)
    }
)


def defined(file: Path) -> set[str]:
    """Functions, classes and constants of a module, and what its classes have, as `Class.name` and as `name`."""

    def names(body: list[ast.stmt], owner: str = "") -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                found.add(owner + node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {owner + target.id for target in targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.ClassDef):
                found |= names(node.body, f"{node.name}.") | names(node.body)
        return found

    return names(ast.parse(file.read_text(encoding="utf-8")).body)


def test_there_are_pointers_to_check():
    assert sum(bool(name) for _, _, name in POINTERS) >= 20


@pytest.mark.parametrize(("page", "file", "name"), POINTERS)
def test_pointers_into_the_code_are_right(page, file, name):
    """`core/denoise.py: denoise` in a page: a file of the package, or from the root, and what it defines."""
    path = next((folder / file for folder in (ROOT / "draftcli", ROOT) if (folder / file).is_file()), None)
    assert path is not None, f"{page}: there is no {file}"
    assert not name or name in defined(path), f"{page}: {file} defines no {name}"


def test_cli_page_is_what_the_commands_say():
    made = runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["cli_page"]()
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_settings_page_is_what_the_schema_says():
    made = runpy.run_path(str(ROOT / "docs" / "make_settings.py"))["settings_page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == made, "run `make docs`"


def test_the_python_example_of_the_readme_runs(capsys):
    example = next(block for block in blocks(ROOT / "README.md", "python") if "get_loss_and_metrics" in block)
    names: dict = {}
    exec(example, names)
    assert names["metrics"].keys() >= {"loss", "reward", "kl_penalty"}


def test_the_pipeline_of_the_annealing_page_draws_the_commands_picture():
    """The page's ten lines, after a training of one step, against `draftp anneal`: at most 1 of 255 apart."""
    settings = ("trainer.max_steps=1", "trainer.val_check_interval=0", "held_out_rewards=[]", "optim.lr=0.01",
                "optim.sched.warmup_steps=0", "trainer.micro_batch_size=2", "trainer.global_batch_size=2")  # fmt: skip
    assert draftp("train", "--preset", "toy", *(part for s in settings for part in ("--set", s))).code == 0
    (example,) = blocks(ROOT / "docs" / "annealing.md", "python")
    names: dict = {}
    exec(example, names)
    result = draftp("anneal", "--weight", "base,linear", "--prompt", "a red star", "--output", "out")
    assert result.code == 0, result.err
    base, linear = (
        np.asarray(Image.open(next(Path("out").glob(f"*-{k}.png")))).astype(int) for k in ("base", "linear")
    )
    drawn = np.asarray(names["image"]).astype(int)
    assert np.abs(drawn - linear).max() <= 1
    assert np.abs(drawn - base).max() > 3, "the LoRA does something"


def test_the_example_of_the_python_page_runs(capsys):
    (example,) = blocks(ROOT / "docs" / "python.md", "python")
    names: dict = {}
    exec(example, names)
    assert names["result"].finished
    assert len(names["rewards"]) == 2
    assert len(names["drawn"].files) == 4
    assert list(names["annealed"].evaluations) == ["base", "linear", "power_2", "tuned"]
    assert names["report"].written["report"].is_file()


def test_the_index_names_every_page_with_a_sentence():
    lines = re.findall(r"^- \[([\w-]+\.md)\]\(\1\): \S.{20,}\.$", (ROOT / "docs" / "README.md").read_text(), re.M)
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert sorted(lines) == sorted(pages)


def test_the_pairs_of_the_first_picture_are_chosen_by_their_rule():
    at_quantiles = runpy.run_path(str(ROOT / "docs" / "make_hero.py"))["at_quantiles"]
    change = np.array([0.3, -0.5, 0.1, 0.9, 0.0, 0.2, -0.1, 0.4])
    assert change[at_quantiles(change, 4)].tolist() == [-0.1, 0.1, 0.3, 0.9]
    assert change[at_quantiles(change, 8)].tolist() == sorted(change)
    assert len(at_quantiles(np.zeros(3), 12)) == 12


def test_the_comfyui_workflow_has_the_settings_of_its_preset():
    """A graph in ComfyUI's API form: every link leads to a node, and the sampler's inputs are those of `sdxl-lora`."""
    nodes = json.loads((ROOT / "docs" / "comfyui-workflow.json").read_text(encoding="utf-8"))
    links = [value[0] for node in nodes.values() for value in node["inputs"].values() if isinstance(value, list)]
    assert set(links) == nodes.keys() - {key for key, node in nodes.items() if node["class_type"] == "SaveImage"}
    sampler, latent = (
        next(node["inputs"] for node in nodes.values() if node["class_type"] == kind)
        for kind in ("KSampler", "EmptyLatentImage")
    )
    cfg = load_config("sdxl-lora").sampling
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"]) == (cfg.steps, cfg.scale, cfg.sampler)
    assert (sampler["scheduler"], cfg.schedule) == ("sgm_uniform", "trailing")
    assert (latent["height"], latent["width"]) == (cfg.height, cfg.width)
