"""A cluster and a person at a notebook, on this machine, as far as plots need them.

The cluster is a root of its own in which the plot steps were run, the web server with the configuration that they
wrote, and the stand-in for Livy, whose sessions have the Spark and the Hail of the AMI and the Spark configuration of
templates/hail-emr.yml. The person is a root of its own in which start-notebook was run, and kernels with that home.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import nbformat
import yaml
from jupyter_client.manager import KernelManager
from livy_stand_in import Livy

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NOTEBOOKS = REPOSITORY / "jupyter" / "common-notebooks"
STEPS = ("plot-directory", "web-server", "livy-port-range")
LIVY_PORT = 8998
PLOTS_PORT = 8080  # 80 is for root only
SLOW = 600  # seconds, after which what is waited for will not come


class Failed(Exception):
    """What a person needs to know."""


def until(condition, what, process=None):
    end = time.monotonic() + SLOW
    while not (value := condition()):
        if process is not None and process.poll() is not None:
            raise Failed(f"{what}: ended with {process.returncode}")
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {SLOW} s")
        time.sleep(0.05)
    return value


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def shell_tools(folder):
    """What a script may not touch on this machine, done without: no other users, no other owner of a file."""
    me, mine = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(), os.getgid()
    script(folder / "sudo", f"""#!/bin/bash
words=()
for word in "$@"; do
  case $previous,$word in -o,livy) word={me} ;; -g,livy) word={mine} ;; esac
  previous=$word words+=("$word")
done
exec "${{words[@]}}"
""")
    script(folder / "id", f'#!/bin/bash\n[ "$1" = livy ] && exit 0\nexec {shutil.which("id")} "$@"\n')


def spark_settings(root):
    """spark-defaults and the environment of the cluster, from its template, with the root's own /opt/hail."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("!", lambda loader, tag, node: None)
    template = yaml.load((REPOSITORY / "templates/hail-emr.yml").read_text(), Loader)
    defaults, environment = {}, {}
    for one in template["Resources"]["Cluster"]["Properties"]["Configurations"]:
        if one["Classification"] == "spark-defaults":
            defaults = one["ConfigurationProperties"]
        if one["Classification"] == "spark-env":
            environment = one["Configurations"][0]["ConfigurationProperties"]
    here = lambda values: {key: value.replace("/opt/hail", f"{root}/opt/hail") for key, value in values.items()}  # noqa: E731
    return here(defaults), {key: value.replace("$SPARK_DIST_CLASSPATH:", "") for key, value in here(environment).items()}


class Cluster:
    """A primary node at an address of its own."""

    def __init__(self, folder, hail, name="hail"):
        self.folder = Path(folder)
        self.name = name
        self.hail = Path(hail)
        self.root = self.folder / "root"
        self.plots = self.root / "var/www/html/plots"
        self.address = "127." + ".".join(str(random.randint(1, 254)) for _ in range(3))
        self.state = "WAITING"
        self.stack = ExitStack()

    def described(self):
        return {"Id": f"j-{self.name.upper()}", "Name": self.name, "Status": {"State": self.state}, "MasterPublicDnsName": self.address}

    def __enter__(self):
        apache = shutil.which("httpd") or shutil.which("apache2", path=os.environ["PATH"] + ":/usr/sbin")
        if not apache:
            raise Failed("the web server is missing (Debian: apt-get install apache2-bin)")
        if not shutil.which("java"):
            raise Failed("Java is missing (Debian: apt-get install openjdk-17-jre-headless)")
        tools = self.folder / "bin"
        shell_tools(tools)
        for name in ("etc/httpd/conf.d", "etc/livy/conf", "usr/sbin", "var/www/html", "tmp"):
            (self.root / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # the web server is another user
        (self.root / "opt").mkdir()
        (self.root / "opt/hail").symlink_to(self.hail)
        (self.root / "usr/sbin/httpd").symlink_to(apache)
        conf = self.write_main_configuration(apache)
        # Whatever the step tells systemd about httpd ends in a web server that has read the step's configuration.
        script(tools / "systemctl", f"""#!/bin/bash
[ "$*" = "reload-or-restart httpd" ] || exit 0
sed -i 's#"/var/www#"{self.root}/var/www#' {self.root}/etc/httpd/conf.d/*.conf
exec {apache} -f {conf} -k restart
""")
        script(tools / "curl", f"""#!/bin/bash
words=("${{@//127.0.0.1:{LIVY_PORT}/{self.address}:{LIVY_PORT}}}")
exec {shutil.which("curl")} "${{words[@]//127.0.0.1\\/plots/{self.address}:{PLOTS_PORT}/plots}}"
""")
        try:
            self.stack.callback(self.stop_web_server)
            self.livy = self.stack.enter_context(Livy(self.address, LIVY_PORT, *self.session()))
            for step in STEPS:
                self.step(step, tools)
        except BaseException:
            self.stack.close()
            raise
        return self

    def __exit__(self, *_):
        self.stack.close()

    def stop_web_server(self):
        if (self.folder / "httpd.pid").exists():
            subprocess.run([self.root / "usr/sbin/httpd", "-f", self.folder / "httpd.conf", "-k", "stop"], check=False)

    def step(self, name, tools):
        """As command-runner.jar runs it: the text as an argument, the step's name as $0."""
        text = (REPOSITORY / "functions/plot_steps" / f"{name}.sh").read_text()
        environment = {"PATH": f"{tools}:{os.environ['PATH']}", "ROOT": str(self.root), "HOME": str(self.folder)}
        done = subprocess.run(["bash", "-c", text, name], env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"the step {name} failed: {done.stderr.strip()}")

    def write_main_configuration(self, apache):
        """What the main configuration of Amazon Linux grants, so that the step's own file has something to take away."""
        folders = ("/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/etc/httpd/modules")
        modules = next(path for path in map(Path, folders) if path.is_dir())
        wanted = ("mpm_event", "authz_core", "autoindex", "dir", "mime", "unixd")
        loaded = [f"LoadModule {name}_module {modules}/mod_{name}.so" for name in wanted if (modules / f"mod_{name}.so").exists()]
        if "apache2" in apache and os.getuid() == 0:
            loaded.append("User www-data")
        conf = self.folder / "httpd.conf"
        conf.write_text("\n".join(loaded) + f"""
ServerName {self.address}
Listen {self.address}:{PLOTS_PORT}
PidFile {self.folder}/httpd.pid
ErrorLog {self.folder}/httpd.log
TypesConfig /etc/mime.types
DocumentRoot {self.root}/var/www/html
<Directory "/">
    Require all denied
</Directory>
<Directory "{self.root}/var/www">
    Options Indexes FollowSymLinks
    Require all granted
</Directory>
IncludeOptional {self.root}/etc/httpd/conf.d/*.conf
""")
        return conf

    def session(self):
        """The interpreter, the environment and the working directory of Livy's sessions."""
        defaults, exported = spark_settings(self.root)
        # One machine instead of YARN, and a little memory.
        defaults |= {
            "spark.master": "local[2]", "spark.ui.enabled": "false", "spark.driver.memory": "2g",
            "spark.driver.host": "127.0.0.1", "spark.local.dir": f"{self.root}/tmp",
        }
        conf = self.root / "etc/spark/conf"
        conf.mkdir(parents=True)
        (conf / "spark-defaults.conf").write_text("".join(f"{key} {value}\n" for key, value in defaults.items()))
        environment = {name: os.environ[name] for name in ("PATH", "JAVA_HOME", "LANG") if name in os.environ} | exported
        environment |= {
            "HOME": str(self.folder), "TMPDIR": f"{self.root}/tmp", "SPARK_CONF_DIR": str(conf),
            "SPARK_LOCAL_IP": "127.0.0.1", "PYTHONUNBUFFERED": "1",
        }
        return exported["PYSPARK_PYTHON"], environment, self.root


AWS = """#!{python}
import json, pathlib, shutil, sys

arguments = sys.argv[1:]
if arguments[:2] == ["s3", "sync"]:
    _, bucket, prefix = arguments[2].removeprefix("s3:/").rstrip("/").split("/", 2)
    source = pathlib.Path("{repository}/jupyter", prefix)
    if source.is_dir():
        shutil.copytree(source, arguments[3], dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    sys.exit()
clusters = json.loads(pathlib.Path("{folder}/clusters.json").read_text())
if arguments[:2] == ["emr", "list-clusters"]:
    print(json.dumps({{"Clusters": clusters}}))
elif arguments[:2] == ["emr", "describe-cluster"]:
    [one, *_] = [one for one in clusters if one["Id"] == arguments[arguments.index("--cluster-id") + 1]]
    print(json.dumps({{"Cluster": one}}))
else:
    sys.exit("this stand-in for the AWS CLI knows no " + " ".join(arguments))
"""


class Person:
    """A notebook instance after its start."""

    def __init__(self, folder, name, *clusters):
        self.folder = Path(folder)
        root = self.folder / "root"
        self.home = root / "home/ec2-user"
        self.work = self.home / "SageMaker"
        tools = self.folder / "bin"
        shell_tools(tools)
        for command in ("dnf", "systemctl", "crond"):
            script(tools / command, "#!/bin/bash\n")
        script(tools / "aws", AWS.format(python=sys.executable, repository=REPOSITORY, folder=self.folder))
        self.sees(*clusters)
        python = Path(sys.executable).parent
        self.environment = {
            "PATH": f"{tools}:{root}/usr/local/bin:{python}:{os.environ['PATH']}", "HOME": str(self.home),
            "NO_PROXY": "127.0.0.0/8", "LANG": os.environ.get("LANG", "C.UTF-8"),
        }
        user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
        started = subprocess.run(
            ["bash", REPOSITORY / "jupyter/scripts/start-notebook", "notebooks", name, "hail-bucket"],
            env=self.environment | {"ROOT": str(root), "NOTEBOOK_USER": user, "HOME": str(self.folder)},
            capture_output=True, text=True,
        )
        if started.returncode != 0 or (self.work / "start-problems.txt").exists():
            raise Failed(f"start-notebook failed: {started.stdout}{started.stderr}")
        # Sessions work in their cluster's root. This is all that the module is not told by start-notebook.
        (self.home / ".ipython/profile_default/startup/60-local.py").write_text(
            "import hail_notebook\n"
            f"hail_notebook.PLOTS_PORT = {PLOTS_PORT}\n"
            'hail_notebook.PLOT_DIRECTORY = hail_notebook.PLOT_DIRECTORY.lstrip("/")\n'
        )

    def sees(self, *clusters):
        """The clusters that AWS tells of."""
        (self.folder / "clusters.json").write_text(json.dumps([cluster.described() for cluster in clusters]))

    def open(self):
        return Notebook(self)


class Notebook:
    """A notebook with sparkmagic's kernel for PySpark."""

    def __init__(self, person, kernel="pysparkkernel"):
        self.manager = KernelManager(kernel_name=kernel)
        self.manager.start_kernel(env=person.environment, cwd=str(person.work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=SLOW)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        # At once: sparkmagic waits half a minute for its heartbeat. The session goes with its cluster.
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code, heard=None):
        """(whether it ran to its end, the outputs) of a cell. `heard` is told of every output as it comes."""
        outputs = []

        def hear(message):
            if message["msg_type"] in ("stream", "display_data", "execute_result", "error"):
                if "application/vnd.jupyter.widget-view+json" in message["content"].get("data", {}):
                    return  # sparkmagic's progress bar, which goes when the cell has ended
                output = nbformat.v4.output_from_msg(message)
                outputs.append(output)
                if heard:
                    heard(output)

        reply = self.client.execute_interactive(code, output_hook=hear, timeout=SLOW, allow_stdin=False)
        return reply["content"]["status"] == "ok", outputs

    def execute(self, notebook, progress=lambda cell, seconds: None):
        """Runs the cells of a notebook in place; what they give stays in them. Whether all of them ran."""
        for number, cell in enumerate(one for one in notebook.cells if one.cell_type == "code"):
            began = time.monotonic()
            ran, cell.outputs = self.run(cell.source)
            cell.execution_count = number + 1
            progress(cell, time.monotonic() - began)
            if not ran:
                return False
        return True


def read(name):
    """A shared notebook. Its sessions are in their cluster's root, and so are the paths in it."""
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("/var/www/html/plots", "var/www/html/plots")
    return notebook


def text_of(outputs):
    """What a person reads below a cell."""
    lines = []
    for output in outputs:
        if output.output_type == "stream":
            lines.append(output.text)
        elif output.output_type == "error":
            lines.append("\n".join(output.traceback))
        elif "text/plain" in output.data:
            lines.append(output.data["text/plain"])
    return "\n".join(lines)


def plots_of(outputs):
    """The pieces of HTML in which %%hail_plot shows figures."""
    return [one.data["text/html"] for one in outputs if "hail-plot" in one.get("data", {}).get("text/html", "")]
