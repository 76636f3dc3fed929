"""What the tests of the plots share: one cluster, and the plotting example that one person has run on it, in the
middle of which another person connected."""

import os
import tempfile
import threading
from pathlib import Path

import nbformat
import pytest
from browser import Page, chromium, write_page
from local_plots import NOTEBOOKS, Cluster, Person

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
def both(folder, cluster):
    """The notebooks of ada, who has run the plotting example, and of bob, who has connected meanwhile."""
    ada, bob = (Person(folder / name, name, cluster) for name in ("ada", "bob"))
    with ada.open() as hers, bob.open() as his:
        connected = []
        connecting = threading.Thread(target=lambda: connected.append(his.run("%hail_connect hail")))
        connecting.start()
        example = read("hail-plotting-example")
        ran = hers.execute(example)
        connecting.join()
        assert connected[0][0], connected
        yield hers, his, (ran, example), ada


def read(name):
    """A shared notebook, for a cluster whose root is where its sessions are."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("/var/www/html/plots", "var/www/html/plots")
    return notebook


@pytest.fixture(scope="session")
def ada(both):
    return both[0]


@pytest.fixture(scope="session")
def bob(both):
    return both[1]


@pytest.fixture(scope="session")
def example(both):
    """Whether the example ran to its end, and its cells with what they gave."""
    return both[2]


@pytest.fixture(scope="session")
def person(both):
    """Ada herself."""
    return both[3]


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
