"""What the tests of whole stacks share: one local AWS with the four of them, for the whole run.

A test leaves these as it found them. What fails on purpose is a stack beside them, under another name, or in a
local AWS of its own (`elsewhere`).
"""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from by_hand import CloudFormation, numbers
from local_aws import LocalAws
from stacks import CODE_BUCKET, NAMES, Stacks, architecture

# How long simulated things take in these tests.
SECONDS = {"builds": 0.3, "clusters": 0.1, "notebooks": 0.2, "steps": 0.05}


class Laboratory(Stacks):
    """Stacks whose functions are packaged once, with ways to create and update them that take less time."""

    def __init__(self, aws, folder, built, packages=None):
        self.clients = {}
        self.looked_at = 0
        super().__init__(aws, folder, built)
        subnet = self.client("ec2").describe_subnets()["Subnets"][0]
        self.network = {name: subnet[name] for name in ("VpcId", "SubnetId")}
        self.as_always()
        if packages is None:
            with ThreadPoolExecutor() as several:
                packages = dict(zip(NAMES, several.map(self.package, NAMES), strict=True))
        self.packages = packages

    def client(self, service):
        if service not in self.clients:
            self.clients[service] = super().client(service)
        return self.clients[service]

    def as_always(self):
        """Simulated things behave."""
        self.aws.control("builds", outcome="SUCCEEDED", phase="BUILD", log=[])
        self.aws.control("steps", fail={})
        self.aws.control("events", copies=1)
        for name, seconds in SECONDS.items():
            self.aws.control(name, seconds=seconds)

    def elsewhere(self, aws, folder):
        """The same packages in another local AWS."""
        nothing_built = folder.with_name("nothing-built")
        nothing_built.mkdir()
        other = Laboratory(aws, folder, nothing_built, self.packages)
        here, there = self.client("s3"), other.client("s3")
        for package in here.list_objects_v2(Bucket=CODE_BUCKET)["Contents"]:
            body = here.get_object(Bucket=CODE_BUCKET, Key=package["Key"])["Body"].read()
            there.put_object(Bucket=CODE_BUCKET, Key=package["Key"], Body=body)
        return other

    def needed(self, name):
        """The parameters of a stack that have no default."""
        if name == "hail-s3":
            return {}
        if name == "hail-jupyter":
            return {"NotebookInstanceName": "ada", **self.network}
        if name == "hail-emr":
            return {"NotebookSecurityGroupId": self.outputs("hail-jupyter")["SecurityGroup"], **self.network}
        return self.network

    def deploy_all(self):
        return {name: self.deploy(name, packaged=self.packages[name], **self.needed(name)) for name in NAMES}

    def create(self, name, stack=None, **parameters):
        """Creates a stack through the API and gives the status that it ends in."""
        parameters = {"FunctionArchitecture": architecture(), **self.needed(name), **parameters}
        given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
        return self._launch("create_stack", stack or name, self.packages[name], given)

    def update(self, name, stack=None, packaged=None, **parameters):
        """Updates a stack through the API; parameters that are not given keep their values."""
        described = self.client("cloudformation").describe_stacks(StackName=stack or name)["Stacks"][0]
        kept = {parameter["ParameterKey"] for parameter in described["Parameters"]} - set(parameters)
        given = [{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()]
        given += [{"ParameterKey": key, "UsePreviousValue": True} for key in kept]
        return self._launch("update_stack", stack or name, packaged or self.packages[name], given)

    def _launch(self, operation, stack, packaged, parameters):
        getattr(self.client("cloudformation"), operation)(
            StackName=stack,
            TemplateBody=packaged.read_text(),
            Parameters=parameters,
            Capabilities=["CAPABILITY_IAM"],
        )
        return self.status(stack)

    def status(self, stack):
        return self.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]["StackStatus"]

    def remove(self, stack):
        self.client("cloudformation").delete_stack(StackName=stack)

    def reasons(self, stack):
        """What a person reads in the stack's events about what failed, the first failure first."""
        return [
            f"{event['LogicalResourceId']}: {event['ResourceStatusReason']}"
            for event in self.events(stack)
            if event["ResourceStatus"].endswith("_FAILED")
        ]

    def resource(self, stack, logical_id):
        """The physical id of one of the stack's resources."""
        described = self.client("cloudformation").describe_stack_resource(StackName=stack, LogicalResourceId=logical_id)
        return described["StackResourceDetail"]["PhysicalResourceId"]

    def parameters(self, path="/hail"):
        """The parameters below a path of the Parameter Store."""
        pages = self.client("ssm").get_paginator("get_parameters_by_path").paginate(Path=path, Recursive=True)
        return {found["Name"]: found["Value"] for page in pages for found in page["Parameters"]}

    def objects(self, bucket):
        """The ETags of a bucket's objects."""
        pages = self.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return {found["Key"]: found["ETag"] for page in pages for found in page.get("Contents", [])}

    def content(self, bucket, key):
        return self.client("s3").get_object(Bucket=bucket, Key=key)["Body"].read()

    def there(self):
        """All that stacks make and that costs money, can act, or stands in the way of the next stack."""
        clusters = self.client("emr").list_clusters()["Clusters"]
        all_of = {
            "builds": [build["id"] for build in self.builds() if build["buildStatus"] == "IN_PROGRESS"],
            "clusters": [one["Id"] for one in clusters if not one["Status"]["State"].startswith("TERMINAT")],
        }
        for kind, service, operation, member, name in (
            ("build projects", "codebuild", "list_projects", "projects", None),
            ("buckets", "s3", "list_buckets", "Buckets", "Name"),
            ("functions", "lambda", "list_functions", "Functions", "FunctionName"),
            ("instance profiles", "iam", "list_instance_profiles", "InstanceProfiles", "InstanceProfileName"),
            ("lifecycle configurations", "sagemaker", "list_notebook_instance_lifecycle_configs", *LIFECYCLES),
            ("log groups", "logs", "describe_log_groups", "logGroups", "logGroupName"),
            ("notebook instances", "sagemaker", "list_notebook_instances", *NOTEBOOKS),
            ("parameters", "ssm", "describe_parameters", "Parameters", "Name"),
            ("roles", "iam", "list_roles", "Roles", "RoleName"),
            ("rules", "events", "list_rules", "Rules", "Name"),
            ("schedule groups", "scheduler", "list_schedule_groups", "ScheduleGroups", "Name"),
            ("schedules", "scheduler", "list_schedules", "Schedules", "Name"),
            ("subscriptions", "sns", "list_subscriptions", "Subscriptions", "Endpoint"),
            ("topics", "sns", "list_topics", "Topics", "TopicArn"),
            ("security groups", "ec2", "describe_security_groups", "SecurityGroups", "GroupId"),
        ):
            found = getattr(self.client(service), operation)()[member]
            all_of[kind] = [one[name] if name else one for one in found]
        return {kind: sorted(found) for kind, found in all_of.items()}

    def builds(self, project=None):
        """The builds of a project, or of all, the newest first."""
        codebuild = self.client("codebuild")
        listed = codebuild.list_builds_for_project(projectName=project) if project else codebuild.list_builds()
        batches = [listed["ids"][first : first + 100] for first in range(0, len(listed["ids"]), 100)]
        return [build for ids in batches for build in codebuild.batch_get_builds(ids=ids)["builds"]]

    def log_lines(self):
        """(log group, line) of all that was logged since the last time."""
        logs, since, self.looked_at = self.client("logs"), self.looked_at, int(time.time() * 1000)
        for group in (group["logGroupName"] for group in logs.describe_log_groups()["logGroups"]):
            for page in logs.get_paginator("filter_log_events").paginate(logGroupName=group, startTime=since):
                yield from ((group, event["message"]) for event in page["events"])


LIFECYCLES = ("NotebookInstanceLifecycleConfigs", "NotebookInstanceLifecycleConfigName")
NOTEBOOKS = ("NotebookInstances", "NotebookInstanceName")


@pytest.fixture(scope="session")
def built():
    """The folder with the functions built for this machine."""
    folder = os.environ.get("HAIL_EMR_BUILT")
    if not folder or not Path(folder, "build-ami", "bootstrap").exists():
        pytest.fail("HAIL_EMR_BUILT has to name the folder of the built functions; `make test` builds them and sets it")
    return folder


@pytest.fixture(scope="session")
def laboratory(tmp_path_factory, built):
    """A local AWS to which the functions are uploaded."""
    folder = tmp_path_factory.mktemp("laboratory")
    with LocalAws(folder / "aws") as aws:
        made = Laboratory(aws, folder / "stacks", built)
        yield made
        check_protocol(made)


@pytest.fixture(scope="session")
def outputs(laboratory):
    """The outputs of the four stacks when they were created, by stack."""
    return laboratory.deploy_all()


@pytest.fixture
def system(laboratory, outputs):
    """The local AWS with the four stacks, in which things behave; what happens there keeps to the protocol."""
    laboratory.as_always()
    earlier = len(laboratory.aws.control("answers"))
    yield laboratory
    laboratory.as_always()
    check_protocol(laboratory, since=earlier)


@pytest.fixture
def published(system):
    """The parameters of the AMIs; they are the same again in the end."""
    before, builds = system.parameters("/hail/ami"), len(system.builds())
    yield before
    if len(system.builds()) != builds:
        time.sleep(0.5)  # An event that comes after the answer may be publishing still.
    for name in set(system.parameters("/hail/ami")) - set(before):
        system.client("ssm").delete_parameter(Name=name)
    for name, ami_id in before.items():
        parameter = {"Name": name, "Value": ami_id, "Type": "String", "DataType": "aws:ec2:image"}
        system.client("ssm").put_parameter(**parameter, Overwrite=True)


@pytest.fixture
def elsewhere(laboratory, tmp_path):
    """A local AWS of the test's own, to which the functions are uploaded."""
    with LocalAws(tmp_path / "aws") as aws:
        other = laboratory.elsewhere(aws, tmp_path / "stacks")
        yield other
        check_protocol(other)


@pytest.fixture(scope="session")
def cloudformation_of_session(laboratory):
    made = CloudFormation(laboratory)
    yield made
    made.check()
    made.server.shutdown()


@pytest.fixture
def cloudformation(cloudformation_of_session, system, published):
    """Every request that a test sends has exactly one answer, and nothing waits or runs when the test is over."""
    earlier = len(cloudformation_of_session.asked)
    yield cloudformation_of_session
    system.as_always()
    cloudformation_of_session.check(since=earlier)
    assert system.client("scheduler").list_schedules()["Schedules"] == []
    assert [build["id"] for build in system.builds() if build["buildStatus"] == "IN_PROGRESS"] == []



@pytest.fixture
def ami(system):
    """Properties of an AMI that nobody has built yet."""
    return {
        "ProjectName": system.resource("hail-ami", "BuildProject"),
        "AmiName": "by-hand",
        "HailVersion": "0.2.139",
        "VepVersion": "none",
        "EmrReleaseLabel": "emr-7.13.0",
        "RebuildToken": str(next(numbers)),
    }


def check_protocol(stacks, since=0):
    """What holds for every request of CloudFormation, or for those after the first so many, whatever a test did."""
    for asked in stacks.aws.control("answers")[since:]:
        assert (asked["Answers"], asked["Refused"]) == (1, 0), f"{asked['Answers']} answers to {asked}"
        size = len(json.dumps(asked["Last"], ensure_ascii=False, separators=(",", ":")).encode())
        assert size <= 4096, f"{size} bytes answered to {asked}"
    for group, line in stacks.log_lines():
        assert "X-Amz-Signature" not in line and "/response/" not in line, f"a response URL in {group}: {line}"
    assert stacks.aws.control("refused") == []
