"""What every test stands on: no network, one thread, a working directory of its own, and the tiny SDXL."""

import os
import tempfile

# Before anything imports torch or huggingface_hub, which read them once. Processes that tests start inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=tempfile.mkdtemp(),
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import shutil
from pathlib import Path
from typing import Any

import pytest

# Warnings are errors here (pyproject.toml), except these, which others cause and we cannot mend.
NOT_OURS = [
    # diffusers' schedulers hand torch tensors to numpy.array; numpy 2 wants torch to take a `copy` argument.
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning:diffusers.schedulers",
]


def pytest_configure(config: pytest.Config) -> None:
    """Lay the exceptions over pyproject's `error`."""
    for warning in NOT_OURS:
        config.addinivalue_line("filterwarnings", warning)


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private one, so that a test that writes `runs/` writes it where no other test looks."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The diffusers folder of tests/tiny.py: read it, don't write into it."""
    from tests.tiny import make_sdxl

    return make_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl")


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Stable Diffusion 1.x of tests/tiny.py: read it, don't write into it."""
    from tests.tiny import tiny_sd1

    return tiny_sd1(tmp_path_factory.mktemp("tiny") / "sd1")


@pytest.fixture(scope="session")
def lora_run(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the tiny SDXL: read it, don't write into it."""
    from tests.command import trained_run

    return trained_run(tmp_path_factory.mktemp("lora"), tiny_sdxl)


@pytest.fixture(scope="session")
def full_run(tiny_sdxl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the whole UNet trained."""
    from tests.command import trained_run

    return trained_run(tmp_path_factory.mktemp("full"), tiny_sdxl, peft={"peft_scheme": "none"}, optim={"lr": 5e-3})


@pytest.fixture(scope="session")
def chromium():
    """Debian's Chromium, headless, driven by Playwright: for the tests marked `browser`."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium")
    assert path, "these tests need Debian's chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # CI is root in a container
        yield browser
        browser.close()


@pytest.fixture
def open_file(chromium):
    """A function that opens a page; the page must request nothing else and write nothing to the console."""
    contexts, trouble = [], []

    def opened(path: Path, width: int = 1200, **context: Any):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, **context))
        page = contexts[-1].new_page()
        address = path.resolve().as_uri()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: trouble.append(request.url) if is_outside(request.url, address) else None)
        page.goto(address)
        return page

    def is_outside(url: str, address: str) -> bool:
        return url.partition("#")[0] != address and not url.startswith(("data:", "blob:"))

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []
