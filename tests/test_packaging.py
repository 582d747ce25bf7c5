"""What pyproject.toml says of the package, as far as nothing has to be built for it."""

import fnmatch
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_package_says_that_it_is_typed_and_a_wheel_has_the_marker():
    """Hatch takes all of a package's files but those that .gitignore or an `exclude` names."""
    build = PROJECT["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    assert "Typing :: Typed" in PROJECT["project"]["classifiers"]
    assert wheel["packages"] == ["draftcli"]
    assert (ROOT / "draftcli" / "py.typed").is_file()
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    assert not [pattern for pattern in ignored if fnmatch.fnmatch("py.typed", pattern)]
    assert not {"exclude", "only-include", "include"} & {*wheel, *build}


def test_classifiers_are_named_once_and_agree_with_the_versions():
    classifiers = PROJECT["project"]["classifiers"]
    assert len(classifiers) == len({*classifiers})
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    pythons = [name.rpartition(" ")[2] for name in classifiers if "Python :: 3." in name]
    assert pythons[0] == oldest
    assert not [name for name in classifiers if name.startswith("License ::")], "`license` says it (PEP 639)"


def test_the_page_of_a_package_index_has_no_link_that_leads_nowhere_there():
    page = (ROOT / PROJECT["project"]["readme"]).read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    urls = PROJECT["project"]["urls"].values()
    assert {*urls} <= {*targets}
