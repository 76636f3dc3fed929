"""The real Packer runs the real build of packer/: the buildspec's commands against the local EC2, the provisioning
scripts and the test of the image on a machine behind the instance (packer_target/readme.md).

Packer is Debian's 1.6.6 with the amazon plugin that it has built in. What that one does not know is taken out of a
copy of the template (`for_packer_1_6`); everything else is as it is in packer/.

Takes root, for the machine's namespaces and mounts, and Debian's debootstrap, openssh-client and packer.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import uuid
from pathlib import Path

import boto3
import pytest
import yaml
from cfnlint.decode import cfn_yaml
from local_aws import LocalAws

REPOSITORY = Path(__file__).resolve().parent.parent
PACKER = REPOSITORY / "packer"
TARGET = Path(__file__).resolve().parent / "packer_target"
PORT = 2222
SCRIPTS = sorted(path.stem for path in (PACKER / "scripts").glob("*.sh") if path.stem != "common")

# Of the install phase; Debian's Packer cannot be replaced by the pinned one here, and has no `init`.
NOT_RUN = ("bash codebuild/install-packer.sh", "packer init .")


def for_packer_1_6(template):
    """The template without what Packer 1.6 does not know, and with what leads it to this machine."""
    for newer in (
        r"  metadata_options \{.*?\n  \}\n",
        r"  imds_support .*?\n",
        r"  temporary_security_group_source_public_ip .*?\n",
    ):
        template, count = re.subn(newer, "", template, flags=re.S)
        assert count == 1, f"hail.pkr.hcl has {newer} {count} times"
    template, count = re.subn(r"delay_seconds += \d+", "delay_seconds = 1", template)
    assert count == 1, "hail.pkr.hcl does not say how often Packer asks"
    ours = f"""
  custom_endpoint_ec2         = "ENDPOINT"
  skip_region_validation      = true
  skip_credential_validation  = true
  skip_metadata_api_check     = true
  ssh_port                    = {PORT}
  ssh_timeout                 = "TIMEOUT"
"""
    template = re.sub(r"\n  ssh_timeout .*", "", template)
    start = 'source "amazon-ebs" "hail" {\n'
    assert start in template
    return template.replace(start, start + ours)


@pytest.fixture(scope="session")
def base():
    """The Debian of the machine; made once and kept beside the Python of the tests."""
    if os.getuid() != 0:
        pytest.fail("the tests of Packer mount file systems and make namespaces; run them as root")
    for program, package in (("packer", "packer"), ("debootstrap", "debootstrap"), ("ssh-keygen", "openssh-client")):
        if not shutil.which(program):
            pytest.fail(f"{program} is missing; apt-get install {package}")
    digest = hashlib.sha256(b"".join((TARGET / name).read_bytes() for name in ("make-base", "packages"))).hexdigest()
    folder = Path(sys.prefix).parent / f"packer-target-{digest[:10]}"
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            new = folder.with_suffix(".new")
            done = subprocess.run(["nice", TARGET / "make-base", new], capture_output=True, text=True)
            if done.returncode:
                pytest.fail(f"the machine for Packer cannot be made: {done.stderr}")
            new.rename(folder)
    return folder


class Account:
    """A local AWS with the CodeBuild project of hail-ami, its roles, and the buckets."""

    def __init__(self, aws, folder):
        self.aws, self.folder = aws, folder
        self.ec2, self.ssm, self.s3 = self.client("ec2"), self.client("ssm"), self.client("s3")
        subnet = self.ec2.describe_subnets()["Subnets"][0]
        self.network = {name: subnet[name] for name in ("VpcId", "SubnetId")}
        tables = self.ec2.describe_route_tables(Filters=[{"Name": "vpc-id", "Values": [subnet["VpcId"]]}])
        self.route_table = tables["RouteTables"][0]["RouteTableId"]
        self.give_way_out()
        template = build_project_of(cfn_yaml.load(str(REPOSITORY / "templates" / "hail-ami.yml")))
        for name, parameter in template["Parameters"].items():
            if parameter["Type"] == "AWS::SSM::Parameter::Value<String>":
                bucket = re.sub(r"\W", "-", name.lower())
                self.s3.create_bucket(Bucket=bucket)
                self.ssm.put_parameter(Name=parameter["Default"], Value=bucket, Type="String")
        cloudformation = self.client("cloudformation")
        cloudformation.create_stack(
            StackName="hail-ami",
            TemplateBody=json.dumps(template),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in self.network.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        stack = cloudformation.describe_stacks(StackName="hail-ami")["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE", stack
        (project,) = self.client("codebuild").list_projects()["projects"]
        self.project = self.client("codebuild").batch_get_projects(names=[project])["projects"][0]

    def give_way_out(self):
        """The subnet's default route, to an internet gateway."""
        gateway = self.ec2.describe_internet_gateways()["InternetGateways"][0]["InternetGatewayId"]
        self.ec2.create_route(RouteTableId=self.route_table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)

    def client(self, service):
        environment = self.aws.environment
        return boto3.client(
            service,
            endpoint_url=self.aws.endpoint,
            region_name=environment["AWS_REGION"],
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        )

    @property
    def variables(self):
        """What the project gives its builds."""
        given = self.project["environment"]["environmentVariables"]
        assert all(one.get("type", "PLAINTEXT") == "PLAINTEXT" for one in given)
        return {one["name"]: one["value"] for one in given}

    def there(self):
        """What a build must not leave behind, besides the image of one that succeeds."""
        instances = [one for found in self.ec2.describe_instances()["Reservations"] for one in found["Instances"]]
        groups = self.ec2.describe_security_groups()["SecurityGroups"]
        return {
            "instances": [one["InstanceId"] for one in instances if one["State"]["Name"] != "terminated"],
            "volumes": [one["VolumeId"] for one in self.ec2.describe_volumes()["Volumes"]],
            "key pairs": [one["KeyName"] for one in self.ec2.describe_key_pairs()["KeyPairs"]],
            "security groups": [one["GroupId"] for one in groups if one["GroupName"] != "default"],
            "images": [one["ImageId"] for one in self.ec2.describe_images(Owners=["self"])["Images"]],
            "snapshots": [one["SnapshotId"] for one in self.ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]],
        }


def build_project_of(template):
    """The template with what BuildProject needs and nothing else."""
    resources, needed = template["Resources"], set()

    def need(name):
        if name in resources and name not in needed:
            needed.add(name)
            for word in re.findall(r"\w+", json.dumps(resources[name])):
                need(word)

    need("BuildProject")
    kept = {name: template[name] for name in ("Parameters", "Conditions", "Mappings") if name in template}
    return {**kept, "Resources": {name: resources[name] for name in sorted(needed)}}


@pytest.fixture(scope="session")
def account(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packer")
    with LocalAws(folder / "aws") as aws:
        yield Account(aws, folder)


class Build:
    """How a build ended: its log, the variables that it exported, and the folder of the machine that it ran on."""

    def __init__(self, status, log, exported, machine):
        self.status, self.log, self.exported, self.machine = status, log, exported, machine

    @property
    def error(self):
        """The one sentence for the person who reads why the build failed."""
        found = re.findall(r"hail-ami error: (.*)", self.log)
        assert len(found) == 1, f"{len(found)} sentences in the log:\n{self.log[-3000:]}"
        return found[0]


def run_build(account, lowest, change=None, machine=None, timeout="5m", **overrides):
    """Runs the buildspec as CodeBuild does: one shell for all commands, which ends at the first that fails.

    `lowest` are the folders that the machine is a fresh copy of; `change` may change the copy of packer/ before.
    """
    build = str(uuid.uuid4())
    folder = account.folder / build
    source = folder / "source"
    shutil.copytree(PACKER, source)
    for path in source.rglob("*"):  # as CodeBuild unpacks a zip
        path.chmod(0o755 if path.is_dir() else 0o644)
    use_debians_sources(source, lowest)
    template = for_packer_1_6((source / "hail.pkr.hcl").read_text())
    template = template.replace("ENDPOINT", account.aws.endpoint).replace("TIMEOUT", timeout)
    (source / "hail.pkr.hcl").write_text(template)
    (source / "plugins.pkr.hcl").unlink()
    if change:
        change(source)

    prepare_settings(account, folder / "machines" / "settings")
    python = sysconfig.get_paths()["purelib"]
    command = [TARGET / "machine", ":".join(map(str, lowest)), folder / "machines", PORT, python]
    account.aws.control("instances", machine=machine or [str(word) for word in command])

    spec = yaml.safe_load((source / "buildspec.yml").read_text())
    commands = [one for phase in spec["phases"].values() for one in phase["commands"]]
    assert all(isinstance(one, str) for one in commands), f"CodeBuild takes strings as commands, and no {commands}"
    assert set(NOT_RUN) <= set(commands)
    script = "".join(f"{{ {one}\n}} || exit 1\n" for one in commands if one not in NOT_RUN)
    for name in spec["env"]["exported-variables"]:
        script += f'printf "%s=%s\\n" {name} "${name}" >>"{folder}/exported"\n'
    environment = account.aws.environment | spec["env"]["variables"] | account.variables | overrides | {
        "CODEBUILD_BUILD_ID": f"{account.project['name']}:{build}",
        "PATH": f"{stand_in_for_pypi(folder / 'bin')}:{account.aws.environment['PATH']}",
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "CHECKPOINT_DISABLE": "1",
    }
    (folder / "log").touch()
    with open(folder / "log", "r+") as log:
        done = subprocess.run(
            ["bash", "-c", script], cwd=source, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    exported = (folder / "exported").read_text() if (folder / "exported").exists() else ""
    machines = [path for path in (folder / "machines").iterdir() if path.name != "settings"]
    return Build(
        done.returncode,
        (folder / "log").read_text(),
        dict(line.split("=", 1) for line in exported.splitlines()),
        machines[0] if machines else None,
    )


def stand_in_for_pypi(folder):
    """A `curl` that answers what is asked of PyPI itself by what pip finds where this machine has it look.

    What is behind pip may be a mirror, and mirrors have no JSON.
    """
    folder.mkdir()
    (folder / "curl").write_text(f"""#!/bin/bash
if [[ "${{@: -1}}" =~ ^https://pypi.org/pypi/hail/(.*)/json$ ]]; then
  found=$({sys.executable} -m pip index versions hail) || exit 6
  if grep -qE "[ (]${{BASH_REMATCH[1]//./\\.}}(,|\\)|$)" <<<"$found"; then printf 200; else printf 404; fi
  exit
fi
exec {shutil.which("curl")} "$@"
""")
    (folder / "curl").chmod(0o755)
    return folder


def use_debians_sources(source, lowest):
    """Names the versions and checksums of what the machine has instead of the downloads from GitHub."""
    versions = (source / "versions.env").read_text()
    for archive in (Path(lowest[-1]) / "downloads").iterdir():
        name, version = archive.name.removesuffix(".tar.bz2").rsplit("-", 1)
        checksum = hashlib.sha256(archive.read_bytes()).hexdigest()
        for key, value in ((f"{name.upper()}_VERSION", version), (f"{name.upper()}_SHA256", checksum)):
            versions, count = re.subn(rf"(?m)^{key}=.*$", f"{key}={value}", versions)
            assert count == 1, key
    (source / "versions.env").write_text(versions)


def prepare_settings(account, settings):
    """What every machine has besides its base: the stand-ins, the role's credentials, and pip as it is set up here."""
    for name in (TARGET / "stand-ins").iterdir():
        (settings / "usr/sbin").mkdir(parents=True, exist_ok=True)
        shutil.copy(name, settings / "usr/sbin" / name.name)
    share = settings / "usr/share/packer-target"
    share.mkdir(parents=True)
    shutil.copy(TARGET / "packages", share)
    role = {name: value for name, value in account.aws.environment.items() if name.startswith("AWS_")}
    (share / "role").write_text("".join(f"{name}='{value}'\n" for name, value in role.items()))
    (settings / "etc").mkdir()
    (settings / "etc/pip.conf").write_text(pip_configuration())
    shutil.copy("/etc/resolv.conf", settings / "etc")


def pip_configuration():
    """How this machine's pip is set up, by files or by the environment, as one file."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    values = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        scope, _, name = name.rpartition(".")
        if scope in ("global", "install", ":env:") and name != "find-links":
            values[name] = value.strip("'").replace("\\n", "\n  ")
    proxy = os.environ.get("https_proxy") or os.environ.get("HTTPS_PROXY")
    if proxy:
        values.setdefault("proxy", proxy)
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in values.items())


@pytest.fixture(scope="session")
def first(account, base):
    """One whole build, with what the stack asks for."""
    build = run_build(account, [base])
    assert build.status == 0, build.log[-6000:]
    return build


def test_the_build_succeeds(first):
    print(first.log)
