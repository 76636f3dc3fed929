"""Hail on an EMR cluster, in a notebook with the kernel Sparkmagic (PySpark).

    %hail_clusters            the clusters that are up, and whether their Livy answers
    %hail_connect CLUSTER     a session on that cluster, with Hail initialised; every cell then runs there
    %%hail_plot [NAME]        runs the cell on the cluster and shows the figure that is its last expression
    %hail_show PLOT [CLUSTER] shows a plot that is in the plot directory of the cluster

Livy passes text and data frames, but no pages. So a figure is written to the plot directory of the primary node, from
where its web server gives it to the notebook. Cells without these magics are sparkmagic's alone.
"""

import ast
import html
import inspect
import json
import re
import secrets
import subprocess
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import requests
from IPython.core.magic import Magics, cell_magic, line_magic, magics_class
from IPython.display import HTML, display

LIVY_PORT = 8998
PLOTS_PORT = 80
PLOT_DIRECTORY = "/var/www/html/plots"

# A name becomes part of a path and of an address.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

# What Livy says of a session that takes no more statements.
ENDED = ("shutting_down", "error", "dead", "killed", "success")


class HailError(Exception):
    """One sentence for the person at the notebook, shown without a traceback."""

    def _render_traceback_(self):
        return [str(self)]


# ---- what runs on the cluster: sent as text, so it may use nothing of this module ------------------------------


def _hail_plot(cell, name, directory, mark):
    """Runs the cell in the session's own names and writes the figure that its last expression is."""
    import ast
    import base64
    import html
    import io
    import json
    import os
    import secrets

    def page(figure):
        """The figure as a page that needs nothing else, and its height in pixels; None if it is no figure."""
        kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(figure).__mro__}
        if "hail.GGPlot" in kinds:
            figure = figure.to_plotly()
            kinds = {"plotly.BaseFigure"}
        if "bokeh.LayoutDOM" in kinds:
            from bokeh.embed import file_html
            from bokeh.resources import INLINE

            return file_html(figure, INLINE, name), bokeh_height(figure)
        if "plotly.BaseFigure" in kinds:
            height = figure.layout.height or 500
            return figure.to_html(include_plotlyjs=True, default_height=f"{height}px"), height
        figure = getattr(figure, "figure", figure)  # the axes of matplotlib lead to their figure
        if any(kind.__module__ == "matplotlib.figure" for kind in type(figure).__mro__):
            picture = io.BytesIO()
            figure.savefig(picture, format="png", dpi=2 * figure.dpi)
            titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
            title = html.escape(next((title for title in titles if title), name))
            width, height = (int(inches * figure.dpi) for inches in figure.get_size_inches())
            source = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
            image = f'<img src="{source}" alt="{title}" width="{width}" height="{height}">'
            return f'<!DOCTYPE html><meta charset="utf-8"><title>{title}</title>{image}', height
        return None

    def bokeh_height(model):
        children = [child[0] if isinstance(child, tuple) else child for child in getattr(model, "children", [])]
        heights = [bokeh_height(child) for child in children]
        if heights:
            return sum(heights) if type(model).__name__ == "Column" else max(heights)
        return getattr(model, "height", None) or (600 if hasattr(model, "renderers") else 40)

    tree = ast.parse(cell, "<hail_plot>")
    last = tree.body.pop()
    exec(compile(tree, "<hail_plot>", "exec"), globals())
    figure = eval(compile(ast.Expression(last.value), "<hail_plot>", "eval"), globals())
    made = page(figure)
    if made is None:
        kind = type(figure)
        print(f"\n{mark}" + json.dumps({"not": f"{kind.__module__}.{kind.__qualname__}"}))
        return
    text, height = made
    file = f"{name}-{secrets.token_hex(8)}.html"
    path = os.path.join(directory, file)
    try:
        with open(path, "x", encoding="utf-8") as plot:
            plot.write(text)
        os.chmod(path, 0o644)
    except OSError as cause:
        print(f"\n{mark}" + json.dumps({"unwritten": str(cause)}))
        return
    print(f"\n{mark}" + json.dumps({"file": file, "height": height}))


# The log is not left to the working directory, where a session may not be able to write.
# Hail's warning asks for the settings that the cluster's template makes in another way.
INITIALISE = """
import hail as hl
with __import__("warnings").catch_warnings(action="ignore"):
    log = hl.utils.timestamp_path(__import__("tempfile").gettempdir() + "/hail", ".log")
    hl.init(sc=sc, idempotent=True, quiet=True, log=log)
    del log
print("Hail " + hl.version() + " is initialised as 'hl'.")
"""

# ---- the clusters ----------------------------------------------------------------------------------------------


def _aws(what, *arguments):
    try:
        done = subprocess.run(["aws", *arguments, "--output", "json"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as cause:
        raise HailError(f"{what}: the AWS CLI gives no answer ({cause}).") from None
    if done.returncode != 0:
        raise HailError(f"{what}: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    return json.loads(done.stdout)


def clusters():
    """(name, id, state, address of the primary node or None) of every cluster that is up."""
    listed = _aws("The EMR clusters cannot be listed", "emr", "list-clusters", "--active")["Clusters"]
    found = []
    for one in listed:
        what = f"The EMR cluster {one['Name']} ({one['Id']}) cannot be described"
        described = _aws(what, "emr", "describe-cluster", "--cluster-id", one["Id"])["Cluster"]
        found.append((one["Name"], one["Id"], one["Status"]["State"], described.get("MasterPublicDnsName")))
    return found


def primary_of(name):
    """The address of the one cluster of this name or id."""
    there = clusters()
    fitting = [one for one in there if name in one[:2]]
    if not fitting:
        others = ", ".join(one[0] for one in there) or "none"
        raise HailError(f"No cluster named {name} is up; those that are: {others}.")
    if len(fitting) > 1:
        raise HailError(
            f"{len(fitting)} clusters are named {name}; take one of the ids {', '.join(one[1] for one in fitting)}."
        )
    name, cluster_id, state, primary = fitting[0]
    if not primary:
        raise HailError(
            f"Cluster {name} ({cluster_id}) is {state} and has no primary node yet; try again in some minutes."
        )
    return primary


def answers(primary, seconds=3):
    """Whether Livy answers there."""
    try:
        return requests.get(f"http://{primary}:{LIVY_PORT}/sessions", params={"size": 1}, timeout=seconds).ok
    except requests.RequestException:
        return False


# ---- the session -----------------------------------------------------------------------------------------------


class Session:
    """A session of Livy that sparkmagic has started."""

    def __init__(self, url, number):
        self.url = f"{url}/sessions/{number}"
        self.number = number
        self.primary = url.partition("://")[2].rpartition(":")[0]
        self.http = requests.Session()

    def _ask(self, method, path="", **more):
        try:
            answer = self.http.request(method, self.url + path, timeout=(5, 60), **more)
        except requests.RequestException:
            raise HailError(
                f"Livy on {self.primary} does not answer any more; see with %hail_clusters whether the cluster is "
                "up, and connect anew with %hail_connect."
            ) from None
        if answer.status_code == 404:
            raise HailError(
                f"Session {self.number} on {self.primary} is gone; connect anew with %hail_connect, which begins "
                "with no variables."
            )
        return answer

    def state(self):
        return self._ask("GET", "/state").json()["state"]

    def check(self):
        state = self.state()
        if state in ENDED:
            raise HailError(
                f"Session {self.number} on {self.primary} is {state}, out of memory most often (%%logs tells); "
                "connect anew with %hail_connect, which begins with no variables."
            )

    def run(self, code):
        """What the code prints. A statement of its own, and not sparkmagic's: that one waits without an end for a
        node that is gone, and looks every two seconds only."""
        self.check()
        answer = self._ask("POST", "/statements", json={"code": code, "kind": "pyspark"})
        if not answer.ok:
            self.check()
            raise HailError(f"Livy on {self.primary} does not take the cell: {answer.text.strip()}")
        path = f"/statements/{answer.json()['id']}"
        pause = 0.05
        try:
            while True:
                statement = self._ask("GET", path).json()
                if statement["state"] in ("available", "error", "cancelled"):
                    break
                self.check()
                time.sleep(pause)
                pause = min(pause * 1.5, 0.5)
        except KeyboardInterrupt:
            with suppress(HailError):
                self._ask("POST", f"{path}/cancel")
            raise
        output = statement.get("output") or {"status": statement["state"]}
        if output["status"] == "ok":
            return str(output["data"].get("text/plain", ""))
        said = output.get("evalue", f"The cell was {statement['state']}.")
        raise HailError("\n".join([said, "".join(output.get("traceback", []))]).rstrip())


# ---- the magics ------------------------------------------------------------------------------------------------


def fetch(primary, file):
    """A page from the plot directory."""
    url = f"http://{primary}:{PLOTS_PORT}/plots/{file}"
    try:
        answer = requests.get(url, timeout=(5, 60))
    except requests.RequestException:
        raise HailError(
            f"The web server of {primary} does not answer on port {PLOTS_PORT}; its step 'Hail: plot web server' and "
            "'journalctl -u httpd' on the node tell why."
        ) from None
    if answer.status_code != 200:
        raise HailError(
            f"{url} answers {answer.status_code}; %hail_show takes the name of a file that is in {PLOT_DIRECTORY} of "
            "the primary node."
        )
    answer.encoding = "utf-8"
    return answer.text


def show(page, height, caption):
    # A page of its own inside of this one: its scripts see nothing of the notebook.
    size = f'width="100%" height="{height + 40}" style="border: 0"'
    frame = f'<iframe srcdoc="{html.escape(page)}" sandbox="allow-scripts" {size}></iframe>'
    display(HTML(f'<div class="hail-plot">{frame}<br><small>{html.escape(caption)}</small></div>'))


@magics_class
class HailMagics(Magics):
    @line_magic
    def hail_clusters(self, line):
        """%hail_clusters: the clusters that are up, and whether their Livy answers."""
        there = clusters()
        if not there:
            print("No EMR cluster is up.")
            return
        with ThreadPoolExecutor() as several:
            answering = list(several.map(lambda one: bool(one[3]) and answers(one[3]), there))
        rows = [("NAME", "ID", "STATE", "LIVY", "ANSWERS")]
        for (name, cluster_id, state, primary), answer in zip(there, answering, strict=True):
            livy = f"http://{primary}:{LIVY_PORT}" if primary else "-"
            rows.append((name, cluster_id, state, livy, "yes" if answer else "no"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    @line_magic
    def hail_connect(self, line):
        """%hail_connect CLUSTER: a session on that cluster, with Hail initialised. Once is enough for a notebook."""
        name = line.strip()
        if not name:
            raise HailError("%hail_connect takes the name of a cluster; %hail_clusters shows those that are up.")
        kernel = self._kernel()
        primary = primary_of(name)
        if not answers(primary, seconds=10):
            raise HailError(
                f"Livy on {primary} of cluster {name} does not answer on port {LIVY_PORT}; is this notebook's "
                "security group the one that hail-emr was given?"
            )
        url = f"http://{primary}:{LIVY_PORT}"
        if kernel.session_started:
            old = self._session(kernel)
            with suppress(HailError):
                if kernel.endpoint.url == url and old.state() not in ENDED:
                    print(f"Connected to {name} already, by session {old.number}.")
                    return
                old._ask("DELETE")
            self._forget(kernel)
        kernel.fatal_error = False
        kernel._do_not_call_change_endpoint(f"-s {url} -t None")
        if not kernel._do_not_call_start_session(""):
            kernel.fatal_error = False  # or sparkmagic would not try again
            raise HailError(
                f"Cluster {name} gave no session, for the reason above; with too little memory left, end a session "
                "of yours or take another cluster."
            )
        print(self._session(kernel).run(INITIALISE))

    @cell_magic
    def hail_plot(self, line, cell):
        """%%hail_plot [NAME]: runs the cell on the cluster and shows the figure that is its last expression."""
        name = line.strip() or "plot"
        if not NAME.fullmatch(name):
            raise HailError(
                f"{name!r} is no name for a plot; it should be up to 100 letters, digits, dots, underscores and "
                "hyphens, a letter or digit first."
            )
        with suppress(SyntaxError):  # the session tells of it, and knows its Python
            statements = ast.parse(cell).body
            if not statements or not isinstance(statements[-1], ast.Expr):
                raise HailError(
                    "The last line of a %%hail_plot cell should be the figure alone, such as its variable."
                )
        session = self._session(self._kernel())
        mark = f"hail-plot-{secrets.token_hex(8)}:"
        source = textwrap.dedent(inspect.getsource(_hail_plot))
        printed = session.run(f"{source}\n_hail_plot({cell!r}, {name!r}, {PLOT_DIRECTORY!r}, {mark!r})\n")
        said, _, made = printed.partition(mark)
        if said.strip():
            print(said.strip())
        made = json.loads(made.partition("\n")[0])
        if "not" in made:
            raise HailError(
                f"The last line of the cell is a {made['not']} and no figure; %%hail_plot shows figures of bokeh "
                "(hl.plot), plotly (hl.ggplot) and matplotlib."
            )
        if "unwritten" in made:
            raise HailError(
                f"The plot cannot be written on {session.primary} ({made['unwritten']}); the cluster's step 'Hail: "
                "plot directory' makes the place for it."
            )
        show(fetch(session.primary, made["file"]), made["height"], made["file"])

    @line_magic
    def hail_show(self, line):
        """%hail_show PLOT [CLUSTER]: shows a plot that is in the plot directory of the cluster."""
        plot, *cluster = line.split(None, 1)[:2] or [""]
        if not NAME.fullmatch(plot):
            raise HailError(
                f"{plot!r} is no name of a plot; it should be that of a file in {PLOT_DIRECTORY} of the primary node."
            )
        primary = primary_of(cluster[0].strip()) if cluster else self._session(self._kernel()).primary
        page = fetch(primary, plot)
        show(page, 640, plot)

    def _kernel(self):
        """The magics of sparkmagic's own kernel, which hold its session."""
        kernel = self.shell.magics_manager.registry.get("KernelMagics")  # ipykernel has others of this name
        if getattr(kernel, "language", None) != "python":
            raise HailError(
                "This notebook has another kernel; choose Sparkmagic (PySpark) under Kernel > Change Kernel."
            )
        return kernel

    def _session(self, kernel):
        if not kernel.session_started:
            raise HailError(
                "This notebook is not connected to a cluster; %hail_connect CLUSTER does that, and %hail_clusters "
                "shows those that are up."
            )
        return Session(kernel.endpoint.url, kernel.spark_controller.get_session_id_for_client(kernel.session_name))

    def _forget(self, kernel):
        """sparkmagic's own way waits for its heartbeat for half a minute, and keeps a session that it cannot delete."""
        session = kernel.spark_controller.get_managed_clients().pop(kernel.session_name, None)
        heartbeat = getattr(session, "_heartbeat_thread", None)
        if heartbeat is not None:
            heartbeat.livy_session = None
        kernel.session_started = False


def load_ipython_extension(shell):
    shell.register_magics(HailMagics)
