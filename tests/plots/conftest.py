"""What the tests of the plots share: one cluster, on which one person has run the plotting example, and another one the
GWAS tutorial at the same time."""

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from browser import Page, chromium, write_page
from local_plots import Cluster, Notebook, Person, read

FIGURES = []


def pytest_terminal_summary(terminalreporter):
    for line in FIGURES:
        terminalreporter.write_line(f"with a stand-in for Livy: {line}")


@pytest.fixture(scope="session")
def hail():
    """The environment of the AMI."""
    folder = os.environ.get("HAIL_EMR_HAIL")
    if not folder or not Path(folder, "hail-all-spark.jar").exists():
        pytest.fail("HAIL_EMR_HAIL has to name the environment with Hail; `make test-plots` installs it and sets it")
    return folder


@pytest.fixture(scope="session")
def folder():
    # Not pytest's own, into which the web server's user may not look.
    with tempfile.TemporaryDirectory(prefix="hail-emr-plots-") as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture(scope="session")
def cluster(folder, hail):
    with Cluster(folder / "cluster", hail) as made:
        yield made


@pytest.fixture(scope="session")
def people(folder, cluster):
    return tuple(Person(folder / name, name, cluster) for name in ("ada", "bob"))


@pytest.fixture(scope="session")
def both(people):
    """The notebooks of ada and bob, whether what they ran came to its end, and what it gave."""
    with people[0].open() as hers, people[1].open() as his, ThreadPoolExecutor() as at_once:
        books = read("hail-plotting-example"), read("hail-gwas-tutorial")
        ran = list(at_once.map(Notebook.execute, (hers, his), books))
        yield (hers, his), tuple(zip(ran, books, strict=True))


@pytest.fixture(scope="session")
def ada(both):
    return both[0][0]


@pytest.fixture(scope="session")
def bob(both):
    return both[0][1]


@pytest.fixture(scope="session")
def example(both):
    """Whether the example ran to its end, and its cells with what they gave."""
    return both[1][0]


@pytest.fixture(scope="session")
def gwas(both):
    """The same of the GWAS tutorial."""
    return both[1][1]


@pytest.fixture(scope="session")
def person(people):
    """Ada herself."""
    return people[0]


@pytest.fixture(scope="session")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture(scope="session")
def example_page(browser, folder, example):
    """What a person sees of the executed example."""
    page = Page(browser, write_page(example[1], folder / "example.html"))
    yield page
    page.close()


@pytest.fixture
def look(browser, tmp_path):
    """Opens what a cell gave in the browser."""
    pages = []

    def open_page(outputs):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("", outputs=outputs)])
        pages.append(Page(browser, write_page(notebook, tmp_path / f"{len(pages)}.html")))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()
