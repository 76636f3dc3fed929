"""The real Packer runs the real build of packer/: the buildspec's commands against the local EC2, the provisioning
scripts and the test of the image on a machine behind the instance (packer_target/readme.md).

Packer is Debian's 1.6.6 with the amazon plugin that it has built in. What that one does not know is taken out of a
copy of the template (`for_packer_1_6`); everything else is as it is in packer/.

Takes root, for the machine's namespaces and mounts, and Debian's debootstrap, openssh-client and packer; skipped, with
the reason, where that is missing, and failed in CI.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import uuid
from pathlib import Path

import boto3
import pytest
import yaml
from cfnlint.decode import cfn_yaml
from local_aws import ACCOUNT, REGION, LocalAws

REPOSITORY = Path(__file__).resolve().parent.parent
PACKER = REPOSITORY / "packer"
TARGET = Path(__file__).resolve().parent / "packer_target"
PORT = 2222
SCRIPTS = sorted(path.stem for path in (PACKER / "scripts").glob("*.sh") if path.stem != "common")

# Debian's Packer cannot be replaced by the pinned one here.
NOT_RUN = "bash codebuild/install-packer.sh"

# What the build's role need not do with the amazon plugin of today: that one creates security groups and instances with
# their tags, and the role's conditions rest on these; 1.6 tags afterwards, and security groups not at all. Of
# RunInstances and the like the local IAM looks at one of the resources only.
OF_PACKER_1_6 = [
    "ec2:AuthorizeSecurityGroupIngress",
    "ec2:CreateTags",
    "ec2:DeleteSecurityGroup",
    "ec2:DeleteSnapshot",
    "ec2:DeregisterImage",
    "ec2:ModifyImageAttribute",
]


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


# What the machine needs of the kernel, in a folder where its copies will be.
TRY = "mkdir lower upper work root && mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work root"

# All that a command started ends when the process that ran it has ended, killed or not.
ENDS_WITH_THE_TESTS = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def cannot_run(why):
    pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The Debian of the machine; made once and kept beside the Python of the tests."""
    if os.getuid() != 0:
        cannot_run("the tests of Packer mount file systems and make namespaces; run them as root")
    for program, package in (("packer", "packer"), ("debootstrap", "debootstrap"), ("ssh-keygen", "openssh-client")):
        if not shutil.which(program):
            cannot_run(f"{program} is missing; apt-get install {package}")
    tried = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "--pid", "--uts", "--fork", "sh", "-c", TRY],
        cwd=tmp_path_factory.mktemp("overlay"),
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        cannot_run(f"the tests of Packer need mount, pid and uts namespaces and overlay mounts: {tried.stderr}")
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
        self.kms = self.client("kms")
        self.key = self.kms.create_key()["KeyMetadata"]["Arn"]
        given = {**self.network, "KmsKeyArn": self.key}
        cloudformation = self.client("cloudformation")
        cloudformation.create_stack(
            StackName="hail-ami",
            TemplateBody=json.dumps(template),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()],
            Capabilities=["CAPABILITY_IAM"],
        )
        stack = cloudformation.describe_stacks(StackName="hail-ami")["Stacks"][0]
        assert stack["StackStatus"] == "CREATE_COMPLETE", stack
        (project,) = self.client("codebuild").list_projects()["projects"]
        self.project = self.client("codebuild").batch_get_projects(names=[project])["projects"][0]
        profile = self.client("iam").get_instance_profile(InstanceProfileName=self.variables["INSTANCE_PROFILE"])
        self.of_instance = self.as_role(profile["InstanceProfile"]["Roles"][0]["RoleName"])
        role = self.project["serviceRole"].rsplit("/", 1)[-1]
        allowed = {"Effect": "Allow", "Action": OF_PACKER_1_6, "Resource": "*"}
        document = {"Version": "2012-10-17", "Statement": [allowed]}
        self.client("iam").put_role_policy(RoleName=role, PolicyName="1.6", PolicyDocument=json.dumps(document))
        self.of_build = self.as_role(role)

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

    def as_role(self, role):
        """The environment of somebody who acts as a role; the role trusts the account's root from then on."""
        iam = self.client("iam")
        trust = iam.get_role(RoleName=role)["Role"]["AssumeRolePolicyDocument"]
        root = {"Effect": "Allow", "Principal": {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}, "Action": "sts:AssumeRole"}
        trust = {**trust, "Statement": [*trust["Statement"], root]}
        iam.update_assume_role_policy(RoleName=role, PolicyDocument=json.dumps(trust))
        arn = f"arn:aws:iam::{ACCOUNT}:role/{role}"
        given = self.client("sts").assume_role(RoleArn=arn, RoleSessionName="build")["Credentials"]
        return {
            "AWS_ACCESS_KEY_ID": given["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": given["SecretAccessKey"],
            "AWS_SESSION_TOKEN": given["SessionToken"],
        }

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
    shutil.rmtree(folder)  # gigabytes, of which pytest would keep those of three runs


class Build:
    """How a build ended: its log, the variables that it exported, and the folder of the machine if it started one."""

    def __init__(self, folder, status):
        self.id, self.source, self.status = folder.name, folder / "source", status
        self.log = (folder / "log").read_text()
        exported = (folder / "exported").read_text() if (folder / "exported").exists() else ""
        self.exported = dict(line.split("=", 1) for line in exported.splitlines())
        machines = [path for path in (folder / "machines").iterdir() if path.name != "settings"]
        self.machine = machines[0] if machines else None

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
    prepare_settings(account, folder / "machines" / "settings")
    if change:
        change(source)

    python = sysconfig.get_paths()["purelib"]
    command = [TARGET / "machine", ":".join(map(str, lowest)), folder / "machines", PORT, python]
    account.aws.control("instances", machine=machine or [str(word) for word in command])

    spec = yaml.safe_load((source / "buildspec.yml").read_text())
    commands = [one for phase in spec["phases"].values() for one in phase["commands"]]
    assert all(isinstance(one, str) for one in commands), f"CodeBuild takes strings as commands, and no {commands}"
    commands.remove(NOT_RUN)
    script = "".join(f"{{ {one}\n}} || exit 1\n" for one in commands)
    for name in spec["env"]["exported-variables"]:
        script += f'printf "%s=%s\\n" {name} "${name}" >>"{folder}/exported"\n'
    environment = (
        account.aws.environment
        | spec["env"]["variables"]
        | account.variables
        | account.of_build
        | overrides
        | {
            "CODEBUILD_BUILD_ID": f"{account.project['name']}:{build}",
            "PATH": f"{stand_ins(folder / 'bin')}:{account.aws.environment['PATH']}",
            "HOME": str(folder),
            "TMPDIR": str(folder),
            "CHECKPOINT_DISABLE": "1",
        }
    )
    (folder / "log").touch()
    with open(folder / "log", "r+") as log:
        done = subprocess.run(
            [*ENDS_WITH_THE_TESTS, "bash", "-c", script],
            cwd=source,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    return Build(folder, done.returncode)


def stand_ins(folder):
    """A `packer` that has nothing to do for `init`, which 1.6 does not know, and a `curl` that answers what is asked of
    PyPI itself by what pip finds where this machine has it look: that may be a mirror, and mirrors have no JSON.
    """
    folder.mkdir()
    (folder / "packer").write_text(f"""#!/bin/bash
[ "$1" = init ] || exec {shutil.which("packer")} "$@"
""")
    (folder / "curl").write_text(f"""#!/bin/bash
url=${{@: -1}} version=${{@: -1}}
version=${{version#https://pypi.org/pypi/hail/}} version=${{version%/json}}
[ "$url" = "https://pypi.org/pypi/hail/$version/json" ] || exec {shutil.which("curl")} "$@"
found=$({sys.executable} -m pip index versions hail 2>/dev/null) || exit 6
if grep -q "^Available" <<<"$found" && tr -d , <<<"$found" | tr ' ' '\\n' | grep -qFx "$version"; then
  printf 200
else
  printf 404
fi
""")
    for stand_in in folder.iterdir():
        stand_in.chmod(0o755)
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
    role = {"AWS_ENDPOINT_URL": account.aws.endpoint, "AWS_DEFAULT_REGION": REGION, **account.of_instance}
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


# ---- a build that succeeds -------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def first(account, base):
    """One whole build, with what the stack asks for."""
    build = run_build(account, [base])
    assert build.status == 0, build.log[-6000:]
    return build


def made_by(account, build):
    """The image of a build, and its one snapshot."""
    (image,) = account.ec2.describe_images(ImageIds=[build.exported["AMI_ID"]])["Images"]
    (volume,) = image["BlockDeviceMappings"]
    (snapshot,) = account.ec2.describe_snapshots(SnapshotIds=[volume["Ebs"]["SnapshotId"]])["Snapshots"]
    return image, snapshot


def tags(resource):
    return {tag["Key"]: tag["Value"] for tag in resource["Tags"]}


def test_the_build_makes_an_image_and_exports_its_id_and_its_name(account, first):
    image, _ = made_by(account, first)
    assert image["State"] == "available"
    assert image["Name"] == first.exported["AMI_NAME"]
    assert re.fullmatch(rf"hail-\d{{8}}-{first.id[:8]}", image["Name"])
    assert image["Description"] == "Hail 0.2.139 for emr-7.13.0"
    assert image["Architecture"] == "x86_64" and image["VirtualizationType"] == "hvm" and not image["Public"]


def test_the_image_has_one_gp3_volume_of_the_size_that_emr_gives(account, first):
    image, snapshot = made_by(account, first)
    (volume,) = image["BlockDeviceMappings"]
    assert volume["DeviceName"] == image["RootDeviceName"] == "/dev/xvda"
    assert (volume["Ebs"]["VolumeType"], volume["Ebs"]["VolumeSize"], snapshot["VolumeSize"]) == ("gp3", 15, 15)
    assert volume["Ebs"]["DeleteOnTermination"]


def test_the_image_is_encrypted_with_the_key_of_the_stack(account, first):
    image, snapshot = made_by(account, first)
    assert image["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    assert (snapshot["Encrypted"], snapshot["KmsKeyId"]) == (True, account.key)


def test_image_and_snapshot_are_tagged_with_every_version_and_with_the_build(account, first):
    image, snapshot = made_by(account, first)
    versions = dict(re.findall(r"(?m)^(\w+)=(.+)$", (first.source / "versions.env").read_text()))
    release = json.loads((PACKER / "compatibility.json").read_text())["emr_releases"]["emr-7.13.0"]
    assert tags(image) == {
        "Name": image["Name"],
        "hail-version": "0.2.139",
        "hail-revision": "",
        "vep-version": "none",
        "emr-release-label": "emr-7.13.0",
        "spark-version": release["spark"],
        "python-version": release["python"],
        "htslib-version": versions["HTSLIB_VERSION"],
        "samtools-version": versions["SAMTOOLS_VERSION"],
        "packer-version": versions["PACKER_VERSION"],
        "r-kernel": "false",
        "architecture": "x86_64",
        "root-volume-size": "15",
        "source-ami": "ami-0c2023a1b2c3d4e5f",
        "source-ami-name": "al2023-ami-2023.6.20241010.0-kernel-6.1-x86_64",
        "build-project": account.project["name"],
        "build-id": f"{account.project['name']}:{first.id}",
    }
    assert tags(snapshot) == tags(image)


def test_every_provisioning_script_runs_once(first):
    assert sorted(re.findall(r"hail-ami: ([a-z-]+)$", first.log, re.M)) == SCRIPTS


def test_the_test_of_the_image_ran_in_it(first):
    for seen in ("Python of /opt/hail: 3.11", "Hail: 0.2.139", "samtools: ", "web server at boot: disabled"):
        assert seen in first.log


def test_the_image_has_what_clusters_use_and_nothing_that_must_differ_between_them(first):
    disk = first.machine / "upper"
    assert (disk / "opt/hail/hail-all-spark.jar").is_symlink()
    assert (disk / "usr/local/bin/samtools").exists() and (disk / "usr/local/bin/bgzip").exists()
    assert not (disk / "etc/httpd/conf.d/welcome.conf").exists()
    assert not list((disk / "etc/ssh").glob("ssh_host_*"))
    assert not (disk / "home/ec2-user/.ssh/authorized_keys").exists()
    assert (disk / "etc/machine-id").read_text() == ""


def test_a_build_leaves_its_image_and_nothing_else(account, first):
    there = account.there()
    assert first.exported["AMI_ID"] in there.pop("images")
    assert len(there.pop("snapshots")) == len(account.ec2.describe_images(Owners=["self"])["Images"])
    assert not any(there.values()), there


# ---- a second one, on the disk of the first, of Hail from its source and without a key --------------------------


# GitHub is not asked. In this repository `make wheel` is no compilation: it makes PyPI's wheel into one of the commit,
# under a version that pip does not take for the one that is there. Hail compares the commits of its wheel and its jar.
MAKEFILE = """wheel:
\tmkdir -p build/deploy/dist
\tpython3 -m pip download -q --no-deps -d build hail==0.2.139
\tpython3 rename.py build/hail-*.whl build/deploy/dist
"""
RENAME = r"""import io, pathlib, re, subprocess, sys, zipfile

commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, check=True).stdout.strip()
source, target = map(pathlib.Path, sys.argv[1:])
old = zipfile.ZipFile(source)
before = re.search(rb'__revision__ = .([0-9a-f]{40})', old.read("hail/version.py"))[1]


def of_commit(data):
    data = data.replace(before, commit).replace(before[:12], commit[:12])
    return data.replace(b"0.2.139", b"0.2.999")


def jar_of_commit(data):
    file, name = io.BytesIO(data), "is/hail/package$.class"
    with zipfile.ZipFile(file, "a") as jar:
        changed = of_commit(jar.read(name))
        jar.filelist.remove(jar.NameToInfo.pop(name))
        jar.writestr(name, changed)
    return file.getvalue()


with zipfile.ZipFile(target / source.name.replace("0.2.139", "0.2.999"), "w") as new:
    for name in old.namelist():
        data = old.read(name)
        if ".dist-info/" in name or name == "hail/version.py":
            data = of_commit(data)
        if name.endswith("/hail-all-spark.jar"):
            data = jar_of_commit(data)
        new.writestr(name.replace("0.2.139", "0.2.999"), data)
"""


@pytest.fixture(scope="session")
def repository(account):
    """A repository of Hail's shape, at the same path here and on the machine."""
    folder = account.folder / "hail.git"
    (folder / "hail").mkdir(parents=True)
    (folder / "hail/Makefile").write_text(MAKEFILE)
    (folder / "hail/rename.py").write_text(RENAME)
    identity = ["-c", "user.name=Hail", "-c", "user.email=hail@example.org"]
    for command in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "Hail"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def hail_from(repository):
    def change(source):
        versions = source / "versions.env"
        text, count = re.subn(r"(?m)^HAIL_REPOSITORY=.*$", f"HAIL_REPOSITORY={repository}", versions.read_text())
        assert count == 1
        versions.write_text(text)
        settings = source.parent / "machines/settings"
        shutil.copytree(repository, settings / str(repository).lstrip("/"))

    return change


@pytest.fixture(scope="session")
def second(account, base, first, repository):
    build = run_build(
        account,
        [first.machine / "upper", base],
        hail_from(repository),
        HAIL_VERSION="main",
        ALLOW_UNTESTED_VERSIONS="true",
        KMS_KEY_ID="",
        ROOT_VOLUME_SIZE="20",
    )
    assert build.status == 0, build.log[-6000:]
    return build


def test_the_scripts_may_run_twice(first, second):
    assert sorted(re.findall(r"hail-ami: ([a-z-]+)$", second.log, re.M)) == SCRIPTS


def test_hail_is_built_from_the_commit_that_a_branch_is_at(account, second, repository):
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True).stdout.strip()
    image, _ = made_by(account, second)
    assert (tags(image)["hail-version"], tags(image)["hail-revision"]) == ("main", commit)
    assert f"Hail's commit: {commit[:12]}" in second.log


def test_without_a_key_and_with_a_size_the_volume_is_as_large_and_as_encrypted_as_was_asked_for(account, second):
    image, snapshot = made_by(account, second)
    assert not image["BlockDeviceMappings"][0]["Ebs"]["Encrypted"]
    assert (snapshot["Encrypted"], snapshot["VolumeSize"]) == (False, 20)


# ---- builds that fail ------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_left(account):
    """The test leaves nothing behind that was not there before."""
    before = account.there()
    yield
    assert account.there() == before


def test_a_vep_cache_that_is_missing_ends_the_build_at_its_start_and_is_named(account, base, nothing_left):
    build = run_build(account, [base], VEP_VERSION="115")
    assert build.status != 0 and not build.exported
    assert "vep/cache/homo_sapiens_vep_115_GRCh37.tar.gz" in build.error
    assert "hail-ami: system" not in build.log


def test_an_image_that_fails_its_test_is_not_made(account, base, first, nothing_left):
    def only_the_test(source):
        template = (source / "hail.pkr.hcl").read_text()
        template, count = re.subn(r"for script in \[.*?\]", 'for script in ["tests"]', template)
        assert count == 1
        (source / "hail.pkr.hcl").write_text(template)

    build = run_build(account, [first.machine / "upper", base], only_the_test, HAIL_VERSION="0.2.138")
    assert build.status != 0 and not build.exported
    assert "Hail is '0.2.139' and should be '0.2.138'." in build.error


def test_an_instance_that_does_not_answer_is_given_up_in_time(account, base, nothing_left):
    build = run_build(account, [base], machine=["sleep", "600"], timeout="3s")
    assert build.status != 0
    assert "Timeout waiting for SSH" in build.error


def test_a_key_that_is_disabled_is_told_before_anything_runs(account, base, nothing_left):
    account.kms.disable_key(KeyId=account.key)
    try:
        build = run_build(account, [base])
    finally:
        account.kms.enable_key(KeyId=account.key)
    assert build.status != 0 and build.machine is None
    assert account.key in build.error and "Disabled" in build.error


def test_a_key_that_the_stack_does_not_know_is_told_before_anything_runs(account, base, nothing_left):
    other = account.kms.create_key()["KeyMetadata"]["Arn"]
    build = run_build(account, [base], KMS_KEY_ID=other)
    assert build.status != 0 and build.machine is None
    assert other in build.error and "which the role of the build may not look at" in build.error


def test_a_key_that_only_the_launch_cannot_use_ends_the_build(account, base, nothing_left):
    def no_questions(source):
        (source / "codebuild/preflight.sh").write_text("")

    missing = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/00000000-0000-0000-0000-000000000000"
    build = run_build(account, [base], no_questions, KMS_KEY_ID=missing)
    assert build.status != 0 and build.machine is None
    assert build.error


def test_a_subnet_without_a_way_out_is_told_before_anything_runs(account, base, nothing_left):
    account.ec2.delete_route(RouteTableId=account.route_table, DestinationCidrBlock="0.0.0.0/0")
    try:
        build = run_build(account, [base])
    finally:
        account.give_way_out()
    assert build.status != 0 and build.machine is None
    assert account.network["SubnetId"] in build.error and "no way out" in build.error


def test_a_hail_that_pypi_has_not_is_told_before_anything_runs(account, base, nothing_left):
    build = run_build(account, [base], HAIL_VERSION="0.2.999", ALLOW_UNTESTED_VERSIONS="true")
    assert build.status != 0 and build.machine is None
    assert "0.2.999" in build.error


def test_a_git_ref_that_does_not_exist_is_told_before_anything_runs(account, base, repository, nothing_left):
    build = run_build(
        account, [base], hail_from(repository), HAIL_VERSION="no-such-branch", ALLOW_UNTESTED_VERSIONS="true"
    )
    assert build.status != 0 and build.machine is None
    assert "no-such-branch" in build.error
