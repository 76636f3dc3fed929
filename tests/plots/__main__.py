"""The plotting example on this machine: executed, with what a person sees of it (demo), or open in JupyterLab."""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
from browser import Page, chromium, write_page
from local_plots import NOTEBOOKS, Cluster, Failed, Person, plots_of, read, text_of

EXAMPLE = "hail-plotting-example"


@contextmanager
def laboratory(hail):
    """A cluster, and a person who sees it."""
    with tempfile.TemporaryDirectory(prefix="hail-emr-plots-") as made:
        folder = Path(made)
        folder.chmod(0o755)  # the web server is another user
        with Cluster(folder / "cluster", hail) as cluster:
            yield cluster, Person(folder / "person", "aperry", cluster)


@contextmanager
def waiting(what):
    """Says what is waited for, and for how long already."""
    done, began = threading.Event(), time.monotonic()

    def say():
        while not done.wait(1):
            if sys.stdout.isatty():
                print(f"\r  {time.monotonic() - began:5.0f} s  {what} ...", end="", flush=True)

    saying = threading.Thread(target=say)
    saying.start()
    try:
        yield
    finally:
        done.set()
        saying.join()
        print("\r" if sys.stdout.isatty() else "", end="")


def demo(hail, target):
    target.mkdir(parents=True, exist_ok=True)
    with laboratory(hail) as (cluster, person):
        print(f"A cluster of this machine: http://{cluster.address}:8998 is a stand-in for Livy, with real Spark and Hail behind it;")
        print(f"the web server is real, configured by the plot steps. {EXAMPLE}.ipynb runs in sparkmagic's kernel:")
        example = read(EXAMPLE)
        with person.open() as notebook:
            for number, cell in enumerate(one for one in example.cells if one.cell_type == "code"):
                first = cell.source.splitlines()[0]
                began = time.monotonic()
                with waiting(first):
                    ran, cell.outputs = notebook.run(cell.source)
                cell.execution_count = number + 1
                plot = "  a plot" if plots_of(cell.outputs) else ""
                print(f"  {time.monotonic() - began:5.1f} s  {first[:60]:<60}{plot}", flush=True)
                if not ran:
                    raise Failed(f"this cell failed: {text_of(cell.outputs)}")
    nbformat.write(example, target / f"{EXAMPLE}.ipynb")
    page = write_page(example, target / f"{EXAMPLE}.html")
    with waiting("the picture"), chromium() as browser:
        Page(browser, page).picture(target / f"{EXAMPLE}.png")
    for kind, what in (("png", "what a person sees"), ("html", "the same, live in a browser"), ("ipynb", "the executed notebook")):
        print(f"  {target}/{EXAMPLE}.{kind}: {what}")


def notebook(hail):
    with laboratory(hail) as (_, person):
        # The shared folder is read-only on a notebook instance; this one is gone in the end.
        for one in NOTEBOOKS.glob("*.ipynb"):
            nbformat.write(read(one.stem), person.work / "common-notebooks" / one.name)
        user = ["--allow-root"] if os.getuid() == 0 else []
        print(f"JupyterLab starts; open common-notebooks/{EXAMPLE}.ipynb in it. Control-C ends everything and forgets what was done.")
        # In a group of its own, or Control-C would make it ask whether it should end.
        lab = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", *user, "--ip=127.0.0.1", f"--notebook-dir={person.work}"],
            env=os.environ | person.environment, start_new_session=True,
        )
        try:
            lab.wait()
        except KeyboardInterrupt:
            pass
        finally:
            if lab.poll() is None:
                lab.terminate()
                lab.wait()


def main():
    parser = argparse.ArgumentParser(prog="plots", description=__doc__)
    parser.add_argument("what", choices=["demo", "notebook"])
    parser.add_argument("--hail", required=True, help="environment with Hail, as packer/scripts/hail.sh makes it")
    parser.add_argument("--target", type=Path, help="folder for what the demo leaves")
    arguments = parser.parse_args()
    try:
        if arguments.what == "demo":
            demo(arguments.hail, arguments.target)
        else:
            notebook(arguments.hail)
    except Failed as failure:
        sys.exit(f"The plots failed: {failure}")


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))
    main()
