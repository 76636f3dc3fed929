"""The four stacks, deployed as a person deploys them: `aws cloudformation package` and `aws cloudformation deploy`."""

import platform
import shutil
import subprocess
from pathlib import Path

import boto3

import assets_digest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("hail-s3", "hail-jupyter", "hail-ami", "hail-emr")
CODE_BUCKET = "code-for-hail-emr"


class Failed(Exception):
    """A command of the AWS CLI that failed, with what it printed."""


class Stacks:
    """Templates and built functions in a folder of their own, where they can be changed, and a local AWS to deploy to."""

    def __init__(self, aws, folder, built):
        self.aws = aws
        self.folder = Path(folder)
        shutil.copytree(ROOT / "templates", self.folder / "templates")
        shutil.copytree(built, self.folder / "build")
        for name in assets_digest.FOLDERS:
            shutil.copytree(ROOT / name, self.folder / name)
        self.cli("s3", "mb", f"s3://{CODE_BUCKET}")

    def client(self, service):
        own = self.aws.environment
        return boto3.client(
            service,
            endpoint_url=self.aws.endpoint,
            region_name=own["AWS_REGION"],
            aws_access_key_id=own["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=own["AWS_SECRET_ACCESS_KEY"],
        )

    def cli(self, *words):
        """What a command of the AWS CLI prints."""
        done = subprocess.run(["aws", *words], env=self.aws.environment, capture_output=True, text=True)
        if done.returncode:
            raise Failed(f"aws {' '.join(words)}\n{done.stdout}{done.stderr}")
        return done.stdout

    def package(self, name):
        """Uploads a template's functions and gives the file of the template that names them."""
        packaged = self.folder / f"packaged-{name}.yml"
        template = self.folder / "templates" / f"{name}.yml"
        self.cli(
            *("cloudformation", "package", "--template-file", str(template), "--s3-bucket", CODE_BUCKET),
            *("--output-template-file", str(packaged)),
        )
        return packaged

    def deploy(self, name, stack=None, packaged=None, **parameters):
        """Creates or updates a stack and gives its outputs."""
        packaged = packaged or self.package(name)
        parameters = {"FunctionArchitecture": architecture()} | parameters
        overrides = [f"{key}={value}" for key, value in parameters.items()]
        self.cli(
            *("cloudformation", "deploy", "--template-file", str(packaged), "--stack-name", stack or name),
            *("--capabilities", "CAPABILITY_IAM", "--no-fail-on-empty-changeset"),
            *("--parameter-overrides", *overrides),
        )
        return self.outputs(stack or name)

    def outputs(self, stack):
        described = self.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]
        return {output["OutputKey"]: output["OutputValue"] for output in described.get("Outputs", [])}

    def events(self, stack):
        """The stack's events, the oldest first."""
        pages = self.client("cloudformation").get_paginator("describe_stack_events").paginate(StackName=stack)
        return [event for page in pages for event in page["StackEvents"]][::-1]

    def delete(self, stack):
        self.cli("cloudformation", "delete-stack", "--stack-name", stack)
        self.cli("cloudformation", "wait", "stack-delete-complete", "--stack-name", stack)

    def ship(self):
        """Takes over what was changed below jupyter/ and packer/ of the folder, as `make digest build` does."""
        shipped = self.folder / "build" / "seed-buckets" / "assets"
        shutil.rmtree(shipped)
        for source in (*assets_digest.FOLDERS, "packer/vep"):
            shutil.copytree(self.folder / source, shipped / Path(source).name)
        template = self.folder / assets_digest.TEMPLATE
        digest = assets_digest.digest(self.folder)
        template.write_text(assets_digest.LITERAL.sub(digest, template.read_text()))


def architecture():
    """This machine's, as Lambda names it."""
    return "arm64" if platform.machine() in ("arm64", "aarch64") else "x86_64"
