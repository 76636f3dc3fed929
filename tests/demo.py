"""The four stacks from beginning to end on this machine: deployed in order, looked at, updated, deleted.

Nothing of it reaches AWS. The API is a local one, the functions are the real binaries, and what only AWS has (the
build of an AMI, a cluster, a notebook instance) is simulated and takes some seconds.
"""

import argparse
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from datetime import datetime, timezone

from rich.console import Console
from rich.table import Table

from local_aws import LocalAws
from stacks import NAMES, Failed, Stacks

NETWORK = {"VpcId": "vpc-00000001", "SubnetId": "subnet-00000001"}
BUILD_SECONDS = 8
NOTEBOOK = "common-notebooks/hail-plotting-example.ipynb"

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=not sys.stdout.isatty(), highlight=False)


class Demo:
    def __init__(self, aws, stacks):
        self.aws = aws
        self.stacks = stacks
        self.client = stacks.client
        self.outputs = {}

    def run(self):
        started = time.monotonic()
        self.aws.control("builds", seconds=BUILD_SECONDS)
        self.deploy("hail-s3")
        self.deploy("hail-jupyter", NotebookInstanceName="aperry", **NETWORK)
        self.deploy("hail-ami", **NETWORK)
        group = self.outputs["hail-jupyter"]["SecurityGroup"]
        self.deploy("hail-emr", NotebookSecurityGroupId=group, **NETWORK)
        self.show_what_exists()
        self.update()
        for name in reversed(NAMES):
            self.delete(name)
        self.remove_what_is_kept()
        self.show_that_nothing_is_left()
        console.print(f"\n[bold green]Done in {time.monotonic() - started:.0f} s.[/]")

    def deploy(self, name, **parameters):
        shown = " ".join(f"{key}={value}" for key, value in parameters.items())
        console.rule(f"[bold]{name}", align="left")
        console.print(f"$ aws cloudformation deploy --stack-name {name} {shown}".rstrip(), style="cyan")
        with console.status("packaging its functions"):
            packaged = self.stacks.package(name)
        with self.watching(name):
            self.outputs[name] = self.stacks.deploy(name, packaged=packaged, **parameters)

    def delete(self, name):
        console.rule(f"[bold]{name}: delete", align="left")
        stack = self.client("cloudformation").describe_stacks(StackName=name)["Stacks"][0]["StackId"]
        with self.watching(stack):
            self.stacks.delete(stack)

    @contextmanager
    def watching(self, stack):
        """Prints what becomes of the stack's resources while the block runs, and what is being waited for."""
        seen = {event["EventId"] for event in self.events_or_none(stack)}
        begun = {}

        def show():
            for event in self.events_or_none(stack):
                if event["EventId"] in seen:
                    continue
                seen.add(event["EventId"])
                resource, status = event["LogicalResourceId"], event["ResourceStatus"]
                if status.endswith("IN_PROGRESS"):
                    begun.setdefault(resource, event["Timestamp"])
                    continue
                took = (event["Timestamp"] - begun.pop(resource, event["Timestamp"])).total_seconds()
                colour = "red" if "FAILED" in status else "green"
                console.print(
                    f"  {took:5.1f} s  [{colour}]{status:<16}[/] {resource:<30} [dim]{event['ResourceType']}[/]"
                )
                if reason := event.get("ResourceStatusReason"):
                    console.print(f"           {reason}", style="dim", markup=False)

        def waiting_for():
            now = datetime.now(timezone.utc)
            waits = (f"{name} {(now - since).total_seconds():.0f} s" for name, since in begun.items())
            return f"waiting for {', '.join(waits)}" if begun else "waiting for CloudFormation"

        done = threading.Event()

        def watch():
            with console.status("") as line:
                while not done.wait(0.3):
                    show()
                    line.update(waiting_for())

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            show()

    def events_or_none(self, stack):
        try:
            return self.stacks.events(stack)
        except self.client("cloudformation").exceptions.ClientError:  # it does not exist yet
            return []

    def show_what_exists(self):
        console.rule("[bold]What now exists", align="left")
        table = Table("stack", "status", "what it says", title="Stacks", title_justify="left")
        for name in NAMES:
            stack = self.client("cloudformation").describe_stacks(StackName=name)["Stacks"][0]
            outputs = "\n".join(f"{key}: {value}" for key, value in self.outputs[name].items() if "://" not in value)
            table.add_row(name, stack["StackStatus"], outputs)
        console.print(table)
        self.show_buckets()
        self.show_ami()
        self.show_steps()

    def show_buckets(self):
        table = Table("object", "bytes", title="Buckets", title_justify="left")
        s3 = self.client("s3")
        for bucket in ("HailBucket", "LogBucket", "NotebookBucket"):
            name = self.outputs["hail-s3"][bucket]
            objects = s3.list_objects_v2(Bucket=name).get("Contents", [])
            for one in objects:
                table.add_row(f"s3://{name}/{one['Key']}", f"{one['Size']:,}")
            if not objects:
                table.add_row(f"s3://{name}/", "empty")
        console.print(table)

    def show_ami(self):
        ssm, ec2, emr = self.client("ssm"), self.client("ec2"), self.client("emr")
        cluster = emr.describe_cluster(ClusterId=self.outputs["hail-emr"]["ClusterId"])["Cluster"]
        latest = ssm.get_parameter(Name="/hail/ami/latest")["Parameter"]["Value"]
        image = ec2.describe_images(ImageIds=[latest])["Images"][0]
        table = Table("what", "value", title="AMI", title_justify="left")
        table.add_row("/hail/ami/latest in the Parameter Store", latest)
        table.add_row("the cluster was made from", cluster["CustomAmiId"])
        table.add_row("name", image["Name"])
        for tag in image["Tags"]:
            table.add_row(f"tag {tag['Key']}", tag["Value"])
        console.print(table)
        if cluster["CustomAmiId"] != latest:
            raise Failed("the cluster was not made from the AMI that /hail/ami/latest names")

    def show_steps(self):
        cluster = self.outputs["hail-emr"]["ClusterId"]
        table = Table("step", "state", title=f"Steps of cluster {cluster}", title_justify="left")
        for step in self.client("emr").list_steps(ClusterId=cluster)["Steps"][::-1]:
            table.add_row(step["Name"], step["Status"]["State"])
        console.print(table)

    def update(self):
        """A changed notebook reaches the bucket by an update of hail-s3, and the person by one of hail-jupyter."""
        console.rule("[bold]A shared notebook changes", align="left")
        notebook = self.stacks.folder / "jupyter" / NOTEBOOK
        notebook.write_text(notebook.read_text() + "\n")
        self.stacks.ship()
        self.deploy("hail-s3")
        console.print(f"Seeding: {self.outputs['hail-s3']['Seeding']}")
        self.deploy("hail-jupyter", NotebookInstanceName="aperry", **NETWORK)
        console.print(f"Notebook instance: {self.outputs['hail-jupyter']['Refresh']}")

    def remove_what_is_kept(self):
        """What the stacks keep on purpose goes as it would go by hand."""
        console.rule("[bold]What the stacks keep on purpose: data and AMIs", align="left")
        for bucket in ("HailBucket", "LogBucket", "NotebookBucket"):
            name = self.outputs["hail-s3"][bucket]
            objects = self.client("s3").list_objects_v2(Bucket=name).get("KeyCount", 0)
            console.print(f"  bucket {name}, {objects} objects: emptied and removed by hand")
            self.empty(name)
        ec2 = self.client("ec2")
        ami = self.outputs["hail-ami"]["AmiId"]
        console.print(f"  AMI {ami}: deregistered by hand, with its snapshot")
        ec2.deregister_image(ImageId=ami, DeleteAssociatedSnapshots=True)

    def empty(self, bucket):
        s3 = self.client("s3")
        versions = s3.list_object_versions(Bucket=bucket)
        for version in versions.get("Versions", []) + versions.get("DeleteMarkers", []):
            s3.delete_object(Bucket=bucket, Key=version["Key"], VersionId=version["VersionId"])
        s3.delete_bucket(Bucket=bucket)

    def show_that_nothing_is_left(self):
        console.rule("[bold]What is left", align="left")
        left = {
            "stacks": [
                stack["StackName"]
                for stack in self.client("cloudformation").list_stacks()["StackSummaries"]
                if stack["StackStatus"] != "DELETE_COMPLETE"
            ],
            "functions": [one["FunctionName"] for one in self.client("lambda").list_functions()["Functions"]],
            "roles": [
                role["RoleName"]
                for role in self.client("iam").list_roles()["Roles"]
                if role["RoleName"].startswith("hail-")
            ],
            "log groups": [one["logGroupName"] for one in self.client("logs").describe_log_groups()["logGroups"]],
            "rules": [rule["Name"] for rule in self.client("events").list_rules()["Rules"]],
            "schedules": [one["Name"] for one in self.client("scheduler").list_schedules()["Schedules"]],
            "parameters": [
                one["Name"]
                for one in self.client("ssm").describe_parameters()["Parameters"]
                if one["Name"].startswith("/hail/")
            ],
            "buckets": [
                one["Name"] for one in self.client("s3").list_buckets()["Buckets"] if one["Name"].startswith("hail-")
            ],
            "clusters": [
                one["Id"]
                for one in self.client("emr").list_clusters(
                    ClusterStates=["STARTING", "BOOTSTRAPPING", "RUNNING", "WAITING", "TERMINATING"]
                )["Clusters"]
            ],
            "notebook instances": [
                one["NotebookInstanceName"]
                for one in self.client("sagemaker").list_notebook_instances()["NotebookInstances"]
            ],
            "AMIs": [image["Name"] for image in self.client("ec2").describe_images(Owners=["self"])["Images"]],
            "snapshots": [
                one["SnapshotId"] for one in self.client("ec2").describe_snapshots(OwnerIds=["self"])["Snapshots"]
            ],
            "topics": [one["TopicArn"] for one in self.client("sns").list_topics()["Topics"]],
        }
        table = Table("kind", "left")
        for kind, names in left.items():
            table.add_row(kind, ", ".join(names) or "none")
        console.print(table)
        if any(left.values()):
            raise Failed("the stacks left something behind")


def main():
    parser = argparse.ArgumentParser(description="Deploys, updates and deletes the four stacks on this machine.")
    parser.add_argument("--built", required=True, help="folder of the functions that were built for this machine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="hail-emr-demo-") as folder, LocalAws(f"{folder}/aws") as aws:
        console.print(f"A local AWS runs at {aws.endpoint}. Nothing of what follows reaches the real one.")
        try:
            Demo(aws, Stacks(aws, f"{folder}/stacks", arguments.built)).run()
        except Failed as failure:
            sys.exit(f"The demo failed: {failure}")


if __name__ == "__main__":
    main()
