"""The real functions, asked directly: races, faults, and what comes twice, late or never.

The test stands in for CloudFormation: it sends the requests and holds the URLs for the answers. Everything else is
the local AWS, with the four stacks, their roles, rules and schedules.
"""

import contextlib
import io
import itertools
import json
import threading
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from botocore.exceptions import ClientError
from conftest import eventually
from local_aws import ACCOUNT, REGION

STACK_ID = f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/by-hand/00000000-0000-0000-0000-000000000000"
NOTHING_MADE = "hail-emr:nothing-was-made"
FUNCTIONS = {
    "seed-buckets": ("hail-s3", "SeedBucketsFunction"),
    "remove-buckets": ("hail-s3", "RemoveBucketsFunction"),
    "refresh-notebook": ("hail-jupyter", "RefreshNotebookFunction"),
    "build-ami": ("hail-ami", "BuildAmiFunction"),
    "add-plot-steps": ("hail-emr", "AddPlotStepsFunction"),
}
ROLES = {name: (stack, function.replace("Function", "Role")) for name, (stack, function) in FUNCTIONS.items()}
TYPES = {
    "seed-buckets": "Custom::BucketSeed",
    "remove-buckets": "Custom::BucketRemoval",
    "refresh-notebook": "Custom::NotebookRefresh",
    "build-ami": "Custom::HailAmi",
    "add-plot-steps": "Custom::LivyPlotSteps",
}
numbers = itertools.count(1)


class Asked:
    """A request, and what was put to its URL."""

    def __init__(self, event, statuses):
        self.event = event
        self.statuses = list(statuses)
        self.tries = []  # (the status that was answered, headers, body)

    @property
    def answers(self):
        return [json.loads(body) for status, _, body in self.tries if status == 200]

    def answer(self, seconds=15):
        return eventually(lambda: self.answers, seconds)[0]

    def succeeds(self, seconds=15):
        """The Data of the answer."""
        answer = self.answer(seconds)
        assert answer["Status"] == "SUCCESS", answer["Reason"]
        return answer.get("Data", {})

    def fails(self, seconds=15):
        """The reason in the answer."""
        answer = self.answer(seconds)
        assert answer["Status"] == "FAILED", answer
        assert "Data" not in answer
        return answer["Reason"]


class CloudFormation:
    """Sends requests to functions and takes their answers."""

    def __init__(self, stacks):
        self.stacks = stacks
        self.asked = {}
        requests = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                request = requests[self.path]
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = request.statuses.pop(0) if request.statuses else 200
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                request.tries.append((status, dict(self.headers), body))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, function, kind, properties, *, statuses=(), deliver=1, **more):
        """Sends a request; `more` are members of it, `statuses` what its URL answers before it answers 200."""
        path = f"/{next(numbers)}?X-Amz-Signature={uuid.uuid4().hex}"
        event = {
            "RequestType": kind,
            "ResponseURL": f"http://127.0.0.1:{self.server.server_port}{path}",
            "StackId": STACK_ID,
            "RequestId": str(uuid.uuid4()),
            "LogicalResourceId": f"Thing{next(numbers)}",
            "ResourceType": TYPES[function],
            "ResourceProperties": {"ServiceToken": "-", "ServiceTimeout": "3600", **properties},
            **more,
        }
        asked = self.asked[path] = Asked(event, statuses)
        for _ in range(deliver):
            self.invoke(function, event, InvocationType="Event")
        return asked

    def again(self, asked, function, kind, properties=None, **more):
        """Another request for the same resource."""
        physical_id = asked.answers[0]["PhysicalResourceId"] if asked.answers else "unknown"
        before = asked.event["ResourceProperties"]
        more = {"LogicalResourceId": asked.event["LogicalResourceId"], "PhysicalResourceId": physical_id, **more}
        if kind == "Update":
            more.setdefault("OldResourceProperties", before)
        return self.ask(function, kind, properties or before, **more)

    def invoke(self, function, payload, **options):
        name = self.stacks.resource(*FUNCTIONS[function])
        return self.stacks.client("lambda").invoke(FunctionName=name, Payload=json.dumps(payload), **options)

    def run(self, function, payload):
        """What the function gives back, or None, and its error, or None."""
        done = self.invoke(function, payload)
        result = json.load(done["Payload"])
        return (None, result["errorMessage"]) if "FunctionError" in done else (result, None)

    def check(self, since=0):
        """What holds for every request, or for those after the first so many."""
        for asked in list(self.asked.values())[since:]:
            assert len(asked.answers) == 1, f"{len(asked.answers)} answers to {asked.event}"
            answer = asked.answers[0]
            for name in ("StackId", "RequestId", "LogicalResourceId"):
                assert answer[name] == asked.event[name]
            assert answer["PhysicalResourceId"]
            for _, headers, body in asked.tries:
                assert headers.get("Content-Type", "") == "" and len(body) <= 4096


@pytest.fixture(scope="module")
def cloudformation_of_module(laboratory):
    made = CloudFormation(laboratory)
    yield made
    made.check()
    made.server.shutdown()


@pytest.fixture
def cloudformation(cloudformation_of_module, system, published):
    """Every request that a test sends has exactly one answer, and nothing waits or runs when the test is over."""
    earlier = len(cloudformation_of_module.asked)
    yield cloudformation_of_module
    system.as_always()
    cloudformation_of_module.check(since=earlier)
    assert system.client("scheduler").list_schedules()["Schedules"] == []
    assert [build["id"] for build in system.builds() if build["buildStatus"] == "IN_PROGRESS"] == []


@contextlib.contextmanager
def denied(stacks, function, *actions):
    """The function's role may no longer do this."""
    iam, role = stacks.client("iam"), stacks.resource(*ROLES[function])
    statement = {"Effect": "Deny", "Action": list(actions), "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_role_policy(RoleName=role, PolicyName="Denied", PolicyDocument=policy)
    try:
        yield
    finally:
        iam.delete_role_policy(RoleName=role, PolicyName="Denied")


def s3_out_of_reach(stacks, out=True):
    """S3 answers remove-buckets no more, or does again."""
    name, function = stacks.resource(*FUNCTIONS["remove-buckets"]), stacks.client("lambda")
    variables = function.get_function_configuration(FunctionName=name)["Environment"]["Variables"]
    nowhere = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    variables = variables | nowhere if out else {key: variables[key] for key in variables.keys() - nowhere.keys()}
    function.update_function_configuration(FunctionName=name, Environment={"Variables": variables})


def waiting(stacks):
    """The logical ids of the resources whose requests wait, by the name of their schedule."""
    scheduler = stacks.client("scheduler")
    found = {}
    for schedule in scheduler.list_schedules()["Schedules"]:
        name = {"Name": schedule["Name"], "GroupName": schedule["GroupName"]}
        with contextlib.suppress(scheduler.exceptions.ResourceNotFoundException):
            waits = json.loads(scheduler.get_schedule(**name)["Target"]["Input"])["Deferred"]
            found[schedule["Name"]] = waits["Callback"]["LogicalResourceId"]
    return found


def time_is_over(stacks):
    """Makes it as late for every request that waits as if it had waited as long as it may; ticks."""
    scheduler = stacks.client("scheduler")
    for schedule in scheduler.list_schedules()["Schedules"]:
        name = {"Name": schedule["Name"], "GroupName": schedule["GroupName"]}
        there = scheduler.get_schedule(**name)
        waits = json.loads(there["Target"]["Input"])
        waits["Deferred"]["GivesUpAt"] = 1
        target = {**there["Target"], "Input": json.dumps(waits)}
        kept = {name: there[name] for name in ("FlexibleTimeWindow", "ScheduleExpression")}
        scheduler.update_schedule(**name, **kept, Target=target)
    stacks.aws.control("tick")


def ticks(stacks, until, seconds=15):
    """Ticks from several sides at once until something is true."""
    over = time.monotonic() + seconds

    def tick():
        while not until() and time.monotonic() < over:
            stacks.aws.control("tick")

    with ThreadPoolExecutor() as several:
        for done in [several.submit(tick) for _ in range(3)]:
            done.result()


# build-ami


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


def build_of(system, ami):
    """The newest build that was asked for with these properties' token: its project builds nothing else meanwhile."""
    return eventually(lambda: system.builds(ami["ProjectName"]))[0]


def test_a_build_that_ends_while_its_request_is_put_down_is_answered(cloudformation, system, ami):
    system.aws.control("builds", seconds=0)
    for number in range(5):
        asked = cloudformation.ask("build-ami", "Create", {**ami, "RebuildToken": f"{ami['RebuildToken']}-{number}"})
        data = asked.succeeds(5)
        assert data["Status"] == "SUCCEEDED" and system.parameters()["/hail/ami/latest"] == data["AmiId"]


def test_events_and_ticks_at_once_give_one_answer(cloudformation, system, ami):
    system.aws.control("events", copies=4)
    for number in range(3):
        asked = cloudformation.ask("build-ami", "Create", {**ami, "RebuildToken": f"{ami['RebuildToken']}-{number}"})
        ticks(system, until=lambda: asked.answers)
        system.aws.control("tick")
        assert asked.succeeds()["Status"] == "SUCCEEDED"


def test_an_event_that_never_comes_delays_the_answer_until_the_next_tick(cloudformation, system, ami):
    system.aws.control("events", copies=0)
    asked = cloudformation.ask("build-ami", "Create", ami)
    ticks(system, until=lambda: asked.answers)
    assert asked.succeeds()["AmiId"] == system.parameters()["/hail/ami/latest"]


def test_a_build_longer_than_an_operation_is_waited_for_by_the_next_resource(cloudformation, system, ami):
    system.aws.control("builds", seconds=4)
    first = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: first.event["LogicalResourceId"] in waiting(system).values())
    time_is_over(system)
    data = first.succeeds()
    assert data.pop("BuildId") == build_of(system, ami)["id"] and data == {"Status": "IN_PROGRESS"}
    assert build_of(system, ami)["buildStatus"] == "IN_PROGRESS"
    wait = {"ProjectName": ami["ProjectName"], "BuildId": first.succeeds()["BuildId"], "LastWait": "true"}
    second = cloudformation.ask("build-ami", "Create", wait, ResourceType="Custom::HailAmiWait")
    data = second.succeeds()
    assert data["Status"] == "SUCCEEDED" and data["AmiId"] == system.parameters()["/hail/ami/latest"]


def test_the_last_wait_fails_when_its_time_is_over_and_the_build_goes_on(cloudformation, system, ami):
    system.aws.control("builds", seconds=60)
    first = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: waiting(system))
    time_is_over(system)
    wait = {"ProjectName": ami["ProjectName"], "BuildId": first.succeeds()["BuildId"], "LastWait": "true"}
    second = cloudformation.ask("build-ami", "Create", wait, ResourceType="Custom::HailAmiWait")
    eventually(lambda: waiting(system))
    time_is_over(system)
    assert "is still running after all the time that the stack waits" in second.fails()
    assert build_of(system, ami)["buildStatus"] == "IN_PROGRESS"
    system.client("codebuild").stop_build(id=build_of(system, ami)["id"])


def test_the_stack_waits_on_when_its_first_resources_have_waited_long_enough(system, published):
    system.aws.control("builds", seconds=5)
    with ThreadPoolExecutor() as beside:
        created = beside.submit(system.create, "hail-ami", "slow")
        for logical_id in ("Ami", "AmiWait1", "AmiWait2"):
            eventually(lambda: logical_id in waiting(system).values(), 20)  # noqa: B023, asked here and now
            if logical_id != "AmiWait2":
                time_is_over(system)
        assert created.result() == "CREATE_COMPLETE"
    statuses = {
        asked["LogicalResourceId"]: asked["Last"]["Data"]["Status"]
        for asked in system.aws.control("answers")
        if ":stack/slow/" in asked["StackId"]
    }
    assert [statuses["Ami"], statuses["AmiWait1"]] == ["IN_PROGRESS"] * 2
    assert [statuses["AmiWait2"], statuses["AmiWait3"]] == ["SUCCEEDED"] * 2
    assert system.outputs("slow")["AmiId"] == system.parameters()["/hail/ami/latest"]
    system.remove("slow")
    assert "/hail/ami/latest" not in system.parameters()


def test_a_stopped_build_is_told(cloudformation, system, ami):
    system.aws.control("builds", seconds=60)
    asked = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: waiting(system))
    system.client("codebuild").stop_build(id=build_of(system, ami)["id"])
    assert f"build {build_of(system, ami)['id']} ended as STOPPED" in asked.fails()


def test_a_delete_stops_the_build_that_runs(cloudformation, system, ami):
    system.aws.control("builds", seconds=60)
    asked = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: waiting(system))
    cloudformation.again(asked, "build-ami", "Delete").succeeds()
    assert build_of(system, ami)["buildStatus"] == "STOPPED"
    assert "STOPPED" in asked.fails()


def test_a_rollback_stops_the_build_that_the_update_had_started(cloudformation, system, ami):
    first = cloudformation.ask("build-ami", "Create", ami)
    published = first.succeeds()["AmiId"]
    system.aws.control("builds", seconds=60)
    newer = {**ami, "RebuildToken": ami["RebuildToken"] + "-newer"}
    update = cloudformation.again(first, "build-ami", "Update", newer)
    eventually(lambda: waiting(system))
    try:
        back = cloudformation.again(first, "build-ami", "Update", ami, OldResourceProperties=newer)
        assert back.succeeds()["AmiId"] == published
        assert build_of(system, ami)["buildStatus"] == "STOPPED"
    finally:
        system.client("codebuild").stop_build(id=build_of(system, ami)["id"])
    update.answer()
    assert system.parameters()["/hail/ami/latest"] == published


def test_going_back_to_an_ami_that_was_deregistered_builds_it_anew(cloudformation, system, ami):
    first = cloudformation.ask("build-ami", "Create", ami)
    gone = first.succeeds()["AmiId"]
    newer = {**ami, "RebuildToken": ami["RebuildToken"] + "-newer"}
    cloudformation.again(first, "build-ami", "Update", newer).succeeds()
    system.client("ec2").deregister_image(ImageId=gone)
    back = cloudformation.again(first, "build-ami", "Update", ami, OldResourceProperties=newer).succeeds()
    assert back["AmiId"] != gone and system.parameters()["/hail/ami/latest"] == back["AmiId"]


def test_a_build_that_a_person_starts_is_published(cloudformation, system, ami):
    version = [{"name": "HAIL_VERSION", "value": "0.2.131"}]
    system.client("codebuild").start_build(projectName=ami["ProjectName"], environmentVariablesOverride=version)
    eventually(lambda: build_of(system, ami)["buildStatus"] == "SUCCEEDED")
    exported = {found["name"]: found["value"] for found in build_of(system, ami)["exportedEnvironmentVariables"]}
    eventually(lambda: system.parameters().get("/hail/ami/latest") == exported["AMI_ID"])
    assert system.parameters()[f"/hail/ami/{exported['AMI_NAME']}"] == exported["AMI_ID"]
    tags = system.client("ec2").describe_images(ImageIds=[exported["AMI_ID"]])["Images"][0]["Tags"]
    assert {"Key": "hail-version", "Value": "0.2.131"} in tags


def test_a_late_event_of_an_older_build_does_not_take_the_latest_back(cloudformation, system, ami):
    cloudformation.ask("build-ami", "Create", ami).succeeds()
    older = build_of(system, ami)
    newer = cloudformation.ask("build-ami", "Create", {**ami, "RebuildToken": "newer" + ami["RebuildToken"]}).succeeds()
    cloudformation.run("build-ami", build_event(older["arn"]))
    assert system.parameters()["/hail/ami/latest"] == newer["AmiId"]


def build_event(arn):
    detail = {"build-status": "SUCCEEDED", "build-id": arn, "project-name": "-"}
    return {
        "version": "0",
        "id": str(uuid.uuid4()),
        "detail-type": "CodeBuild Build State Change",
        "source": "aws.codebuild",
        "account": ACCOUNT,
        "time": "2026-01-01T00:00:00Z",
        "region": REGION,
        "resources": [arn],
        "detail": detail,
    }


def test_an_event_of_a_build_that_nobody_knows_changes_nothing(cloudformation, system):
    before = system.parameters()
    arn = f"arn:aws:codebuild:{REGION}:{ACCOUNT}:build/gone:{uuid.uuid4()}"
    _, error = cloudformation.run("build-ami", build_event(arn))
    assert error
    assert system.parameters() == before


def test_a_request_that_comes_twice_starts_one_build_and_gives_one_physical_id(cloudformation, system, ami):
    builds = len(system.builds(ami["ProjectName"]))
    system.aws.control("builds", seconds=2)
    asked = cloudformation.ask("build-ami", "Create", ami, deliver=2)
    eventually(lambda: waiting(system))
    cloudformation.invoke("build-ami", asked.event)
    asked.succeeds()
    assert len(system.builds(ami["ProjectName"])) == builds + 1
    # Lambda may repeat it even after it was answered.
    late = cloudformation.ask("build-ami", "Create", ami, **{name: asked.event[name] for name in SAME})
    assert late.answer()["PhysicalResourceId"] == asked.answer()["PhysicalResourceId"]
    assert late.answer()["Data"] == asked.answer()["Data"]
    assert len(system.builds(ami["ProjectName"])) == builds + 1


SAME = ("RequestId", "LogicalResourceId")


def test_a_second_resource_that_waits_for_the_same_build_is_refused(cloudformation, system, ami):
    system.aws.control("builds", seconds=60)
    first = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: waiting(system))
    second = cloudformation.ask("build-ami", "Create", ami)
    assert f"resource {first.event['LogicalResourceId']} already waits for" in second.fails()
    assert list(waiting(system).values()) == [first.event["LogicalResourceId"]]
    cloudformation.again(first, "build-ami", "Delete").succeeds()
    first.answer()


def test_an_answer_that_is_not_taken_is_given_again(cloudformation, system, ami):
    asked = cloudformation.ask("build-ami", "Create", ami, statuses=[500, 503])
    asked.succeeds()
    assert [status for status, _, _ in asked.tries] == [500, 503, 200]
    assert len({body for _, _, body in asked.tries}) == 1


def test_an_answer_that_is_not_taken_is_given_again_by_the_same_invocation(cloudformation):
    more = {"PhysicalResourceId": NOTHING_MADE, "statuses": [500, 429], "deliver": 0}
    asked = cloudformation.ask("build-ami", "Delete", {}, **more)
    assert cloudformation.run("build-ami", asked.event) == (None, None)
    assert [status for status, _, _ in asked.tries] == [500, 429, 200]


def test_a_long_log_is_cut_to_its_end_where_the_cause_stands(cloudformation, system, ami):
    lines = [f'{number} "quoted" \\ ü 日本 \x1b[31m' + "x" * 2000 for number in range(20)]
    system.aws.control("builds", outcome="FAILED", phase="BUILD", log=lines)
    asked = cloudformation.ask("build-ami", "Create", ami)
    reason = asked.fails()
    assert "ended as FAILED in phase BUILD" in reason and "stream " in reason[-80:]
    assert lines[19][:200] in reason and lines[0][:20] not in reason
    assert 2000 < len(asked.tries[0][2]) <= 4096


def test_a_build_that_exports_no_ami_is_told_at_once_what_its_buildspec_lacks(cloudformation, system, ami):
    # Longer than it takes a new schedule to fire for the first time.
    system.aws.control("builds", seconds=2)
    here = {"Bucket": system.parameters()["/hail/s3/hail"], "Key": "packer/packer.zip"}
    before, zipped = system.client("s3").get_object(**here), io.BytesIO()
    kept = {"Body": before["Body"].read(), "Metadata": before["Metadata"]}
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("buildspec.yml", "version: 0.2")
    system.client("s3").put_object(**here, Body=zipped.getvalue())
    try:
        asked = cloudformation.ask("build-ami", "Create", ami)
        eventually(lambda: build_of(system, ami)["buildStatus"] == "SUCCEEDED")
        reason = asked.fails()
    finally:
        system.client("s3").put_object(**here, **kept)
        system.aws.control("tick")
        asked.answer()
    assert "exports no AMI_ID; its buildspec should name it under env: exported-variables" in reason


def test_a_missing_property_is_named_and_its_delete_has_nothing_to_do(cloudformation, system, ami):
    del ami["HailVersion"]
    asked = cloudformation.ask("build-ami", "Create", ami)
    assert "HailVersion" in asked.fails()
    assert asked.answer()["PhysicalResourceId"] == NOTHING_MADE
    with denied(system, "build-ami", "codebuild:*", "ssm:*", "scheduler:*"):
        cloudformation.again(asked, "build-ami", "Delete").succeeds()


def test_a_stack_is_deleted_whose_project_is_gone(system, published):
    before = system.there()
    system.create("hail-ami", "gone")
    system.client("codebuild").delete_project(name=system.resource("gone", "BuildProject"))
    system.remove("gone")
    after = system.there()
    del before["parameters"], after["parameters"]
    assert after == before


# add-plot-steps


@pytest.fixture
def plots(system):
    """Properties of the plot steps, with a step that has not run yet."""
    return {
        "ClusterId": system.outputs("hail-emr")["ClusterId"],
        "HailBucket": system.parameters()["/hail/s3/hail"],
        "EfsFileSystemId": f"fs-{next(numbers):08x}",
    }


def steps(stacks, cluster_id):
    """The names and states of a cluster's steps, the oldest first."""
    pages = stacks.client("emr").get_paginator("list_steps").paginate(ClusterId=cluster_id)
    listed = [step for page in pages for step in page["Steps"]][::-1]
    return [(step["Name"], step["Status"]["State"]) for step in listed]


def test_an_update_runs_only_the_steps_that_changed(system):
    cluster = system.outputs("hail-emr")["ClusterId"]
    before = steps(system, cluster)
    assert system.update("hail-emr", EfsFileSystemId="fs-0123456789abcdef0") == "UPDATE_COMPLETE"
    assert steps(system, cluster) == [*before, ("Hail: EFS mount", "COMPLETED")]
    assert system.outputs("hail-emr")["Steps"].endswith("Hail: cluster manifest, Hail: EFS mount")
    assert system.update("hail-emr", EfsFileSystemId="") == "UPDATE_COMPLETE"
    assert steps(system, cluster) == [*before, ("Hail: EFS mount", "COMPLETED")]
    assert system.outputs("hail-emr")["ClusterId"] == cluster


def test_an_update_after_a_failed_step_runs_that_step_again_and_no_other(cloudformation, system, plots):
    before = steps(system, plots["ClusterId"])
    system.aws.control("steps", fail={"Hail: EFS mount": "no mount target"})
    asked = cloudformation.ask("add-plot-steps", "Create", plots)
    assert "no mount target" in asked.fails()
    system.as_always()
    cloudformation.again(asked, "add-plot-steps", "Update").succeeds()
    mount = "Hail: EFS mount"
    assert steps(system, plots["ClusterId"]) == [*before, (mount, "FAILED"), (mount, "COMPLETED")]


def test_steps_are_answered_once_by_events_and_ticks_at_once(cloudformation, system, plots):
    system.aws.control("events", copies=4)
    system.aws.control("steps", seconds=0.3)
    asked = cloudformation.ask("add-plot-steps", "Create", plots)
    ticks(system, until=lambda: asked.answers)
    assert asked.succeeds()["PlotDirectory"] == "/var/www/html/plots"


def test_steps_that_end_before_their_request_waits_are_answered(cloudformation, system, plots):
    system.aws.control("steps", seconds=0)
    assert cloudformation.ask("add-plot-steps", "Create", plots).succeeds(5)["Steps"].endswith("EFS mount")


def test_steps_whose_events_never_come_are_answered_by_the_tick(cloudformation, system, plots):
    system.aws.control("events", copies=0)
    asked = cloudformation.ask("add-plot-steps", "Create", plots)
    ticks(system, until=lambda: asked.answers)
    asked.succeeds()


def test_steps_that_take_too_long_are_told(cloudformation, system, plots):
    system.aws.control("steps", seconds=60)
    emr, cluster = system.client("emr"), plots["ClusterId"]
    asked = cloudformation.ask("add-plot-steps", "Create", plots)
    eventually(lambda: waiting(system))
    time_is_over(system)
    assert f"the plot steps of cluster {cluster} have not ended in time" in asked.fails()
    emr.cancel_steps(ClusterId=cluster, StepIds=[emr.list_steps(ClusterId=cluster)["Steps"][0]["Id"]])


def test_a_delete_cancels_its_own_steps_that_have_not_begun(cloudformation, system, plots):
    system.aws.control("steps", seconds=60)
    emr, cluster = system.client("emr"), plots["ClusterId"]
    jar = {"Jar": "command-runner.jar", "Args": ["sleep", "60"]}
    own = [{"Name": name, "HadoopJarStep": jar, "ActionOnFailure": "CONTINUE"} for name in ("mine", "mine too")]
    added = emr.add_job_flow_steps(JobFlowId=cluster, Steps=own)["StepIds"]
    asked = cloudformation.ask("add-plot-steps", "Create", plots)
    eventually(lambda: waiting(system))
    cloudformation.again(asked, "add-plot-steps", "Delete").succeeds()
    states = [("mine", "RUNNING"), ("mine too", "PENDING"), ("Hail: EFS mount", "CANCELLED")]
    assert steps(system, cluster)[-3:] == states
    assert "is CANCELLED" in asked.fails()
    emr.cancel_steps(ClusterId=cluster, StepIds=added)


def test_a_cluster_that_ends_meanwhile_is_told(system):
    system.aws.control("steps", seconds=60)
    with ThreadPoolExecutor() as beside:
        created = beside.submit(system.create, "hail-emr", "doomed")
        eventually(lambda: "PlotSteps" in waiting(system).values(), 20)
        cluster = system.resource("doomed", "Cluster")
        system.client("emr").terminate_job_flows(JobFlowIds=[cluster])
        assert created.result() == "ROLLBACK_COMPLETE"
    (reason,) = system.reasons("doomed")
    assert f"of cluster {cluster} is INTERRUPTED: the cluster is TERMINAT" in reason
    system.remove("doomed")


# refresh-notebook


@pytest.fixture
def notebook(system):
    """Properties of the running notebook instance; it runs again in the end."""
    eventually(lambda: status(system) == "InService")
    yield {"NotebookInstanceName": "ada", "Lifecycle": "1", "Assets": "1"}
    system.as_always()
    if eventually(lambda: status(system) if status(system) in ("InService", "Stopped") else None) == "Stopped":
        system.client("sagemaker").start_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: status(system) == "InService")


def status(stacks):
    return stacks.client("sagemaker").describe_notebook_instance(NotebookInstanceName="ada")["NotebookInstanceStatus"]


def refresh(cloudformation, notebook, **changed):
    """An Update from other properties."""
    old = {**notebook, **(changed or {"Assets": "0"})}
    more = {"PhysicalResourceId": "x", "OldResourceProperties": old}
    return cloudformation.ask("refresh-notebook", "Update", notebook, **more)


@pytest.mark.parametrize("changed", [{"Assets": "0"}, {"Lifecycle": "0"}])
def test_a_running_notebook_is_restarted_when_what_a_start_brings_changed(cloudformation, system, notebook, changed):
    data = refresh(cloudformation, notebook, **changed).succeeds()
    assert data == {"Status": "InService", "Restarted": "true"}


def test_a_notebook_is_left_alone_when_nothing_has_changed(cloudformation, system, notebook):
    system.aws.control("notebooks", seconds=60)
    more = {"PhysicalResourceId": "x", "OldResourceProperties": notebook}
    asked = cloudformation.ask("refresh-notebook", "Update", notebook, **more)
    assert asked.succeeds() == {"Status": "InService", "Restarted": "false"}


def test_a_notebook_that_is_starting_is_restarted_once_it_runs(cloudformation, system, notebook):
    sagemaker = system.client("sagemaker")
    sagemaker.stop_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: status(system) == "Stopped")
    system.aws.control("notebooks", seconds=1)
    sagemaker.start_notebook_instance(NotebookInstanceName="ada")
    asked = refresh(cloudformation, notebook)
    eventually(lambda: status(system) == "Stopping")
    assert asked.succeeds() == {"Status": "InService", "Restarted": "true"}


def test_a_notebook_that_is_stopping_stays_stopped(cloudformation, system, notebook):
    system.aws.control("notebooks", seconds=1)
    system.client("sagemaker").stop_notebook_instance(NotebookInstanceName="ada")
    assert refresh(cloudformation, notebook).succeeds() == {"Status": "Stopping", "Restarted": "false"}
    eventually(lambda: status(system) == "Stopped")


def test_a_restart_whose_events_never_come_is_carried_on_by_ticks(cloudformation, system, notebook):
    system.aws.control("events", copies=0)
    asked = refresh(cloudformation, notebook)
    ticks(system, until=lambda: asked.answers)
    assert asked.succeeds()["Restarted"] == "true"


@pytest.mark.parametrize("seconds", [0, 0.2])
def test_a_restart_is_answered_once_by_events_and_ticks_at_once(cloudformation, system, notebook, seconds):
    system.aws.control("notebooks", seconds=seconds)
    system.aws.control("events", copies=3)
    for _ in range(3):
        asked = refresh(cloudformation, notebook)
        ticks(system, until=lambda: asked.answers)
        assert asked.succeeds()["Restarted"] == "true"
        eventually(lambda: status(system) == "InService")


def test_a_notebook_that_does_not_come_back_is_told(cloudformation, system, notebook):
    system.aws.control("notebooks", seconds=2)
    asked = refresh(cloudformation, notebook)
    eventually(lambda: waiting(system))
    time_is_over(system)
    assert "notebook instance ada was to be restarted and is not back in time" in asked.fails()


@pytest.mark.parametrize("then", ["InService", "Stopped"])
def test_a_person_who_starts_or_stops_the_notebook_during_its_restart_is_let_be(cloudformation, system, notebook, then):
    sagemaker = system.client("sagemaker")
    system.aws.control("events", copies=0)
    asked = refresh(cloudformation, notebook)
    eventually(lambda: status(system) == "Stopped")
    if then == "InService":
        # The first tick after a schedule was made may have started it already.
        with contextlib.suppress(ClientError):
            sagemaker.start_notebook_instance(NotebookInstanceName="ada")
        eventually(lambda: status(system) == "InService")
    else:
        ticks(system, until=lambda: status(system) == "InService")
        with contextlib.suppress(ClientError):
            sagemaker.stop_notebook_instance(NotebookInstanceName="ada")
    ticks(system, until=lambda: asked.answers)
    assert asked.succeeds()["Restarted"] == "true"


def test_a_notebook_under_another_name_is_not_restarted_at_once(cloudformation, notebook):
    asked = refresh(cloudformation, notebook, NotebookInstanceName="former", Lifecycle="0")
    assert asked.succeeds() == {"Status": "InService", "Restarted": "false"}


# seed-buckets


@pytest.fixture
def seeds(system, outputs):
    """Properties of the stack's own seeds, and who they are."""
    buckets = {name: outputs["hail-s3"][name] for name in ("HailBucket", "LogBucket", "NotebookBucket")}
    properties = {**buckets, "AssetsDigest": "1"}
    stack = system.client("cloudformation").describe_stacks(StackName="hail-s3")["Stacks"][0]["StackId"]
    physical_id = system.resource("hail-s3", "Seeds")
    return properties, {"StackId": stack, "LogicalResourceId": "Seeds", "PhysicalResourceId": physical_id}


def test_a_repeated_seeding_has_the_same_physical_id_and_uploads_nothing(cloudformation, seeds):
    properties, who = seeds
    asked = cloudformation.ask("seed-buckets", "Create", properties, **who)
    assert asked.succeeds()["Uploaded"] == "0" and asked.succeeds()["Unchanged"] == "8"
    assert asked.answer()["PhysicalResourceId"] == who["PhysicalResourceId"]


def test_an_object_that_a_person_deleted_comes_back(cloudformation, system, seeds):
    properties, who = seeds
    key = {"Bucket": properties["NotebookBucket"], "Key": "scripts/ssm"}
    before = system.content(*key.values())
    system.client("s3").delete_object(**key)
    data = cloudformation.ask("seed-buckets", "Update", properties, **who).succeeds()
    assert (data["Uploaded"], data["Unchanged"], data["Kept"]) == ("1", "7", "nothing")
    assert system.content(*key.values()) == before


def test_what_another_stack_put_is_neither_overwritten_nor_deleted(cloudformation, system, seeds):
    properties, _ = seeds
    buckets = [properties["HailBucket"], properties["NotebookBucket"]]
    before = [system.objects(bucket) for bucket in buckets]
    asked = cloudformation.ask("seed-buckets", "Create", properties)
    data = asked.succeeds()
    assert (data["Uploaded"], data["Unchanged"]) == ("0", "0")
    assert len(data["Kept"].split(", ")) == 8
    cloudformation.again(asked, "seed-buckets", "Delete").succeeds()
    assert [system.objects(bucket) for bucket in buckets] == before


def test_two_deliveries_at_once_both_know_what_was_put_and_the_delete_takes_all_of_it(cloudformation, system):
    s3 = system.client("s3")
    for number in range(4):
        names = [f"hail-twice-{number}", f"notebook-twice-{number}"]
        for name in names:
            s3.create_bucket(Bucket=name)
        role = system.resource("hail-s3", "SeedBucketsRole")
        allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::*-twice-*"}
        policy = {"Version": "2012-10-17", "Statement": [allowed]}
        system.client("iam").put_role_policy(RoleName=role, PolicyName="Twice", PolicyDocument=json.dumps(policy))
        properties = {"HailBucket": names[0], "LogBucket": names[0], "NotebookBucket": names[1], "AssetsDigest": "1"}
        asked = cloudformation.ask("seed-buckets", "Create", properties, deliver=0)
        with ThreadPoolExecutor() as two:
            for done in [two.submit(cloudformation.run, "seed-buckets", asked.event) for _ in range(2)]:
                assert done.result() == (None, None)
        said = [json.loads(body) for _, _, body in asked.tries]
        assert [answer["Data"]["Kept"] for answer in said] == ["nothing"] * 2
        assert len({answer["PhysicalResourceId"] for answer in said}) == 1
        cloudformation.asked.pop(next(path for path, one in cloudformation.asked.items() if one is asked))
        cloudformation.again(asked, "seed-buckets", "Delete").succeeds()
        assert [system.objects(name) for name in names] == [{}, {}]
        for name in names:
            for kind in ("Versions", "DeleteMarkers"):
                for version in s3.list_object_versions(Bucket=name).get(kind, []):
                    s3.delete_object(Bucket=name, Key=version["Key"], VersionId=version["VersionId"])
            s3.delete_bucket(Bucket=name)
    system.client("iam").delete_role_policy(RoleName=role, PolicyName="Twice")


def test_a_copy_that_a_person_made_of_a_seed_is_the_persons(cloudformation, system, seeds):
    properties, who = seeds
    bucket = properties["NotebookBucket"]
    source = {"Bucket": bucket, "Key": "scripts/ssm"}
    system.client("s3").copy_object(Bucket=bucket, Key="scripts/my-ssm", CopySource=source)
    data = cloudformation.ask("seed-buckets", "Update", properties, **who).succeeds()
    assert (data["Unchanged"], data["Removed"]) == ("8", "0")
    stranger = cloudformation.ask("seed-buckets", "Delete", properties, PhysicalResourceId="x")
    stranger.succeeds()
    assert "scripts/my-ssm" in system.objects(bucket) and "scripts/ssm" in system.objects(bucket)
    system.client("s3").delete_object(Bucket=bucket, Key="scripts/my-ssm")


def test_a_lost_manifest_is_made_again_from_what_the_objects_say(cloudformation, system, seeds):
    properties, who = seeds
    key = {"Bucket": properties["HailBucket"], "Key": f"seeds/{who['PhysicalResourceId']}.json"}
    before = system.content(*key.values())
    system.client("s3").delete_object(**key)
    try:
        data = cloudformation.ask("seed-buckets", "Update", properties, **who).succeeds()
        assert (data["Uploaded"], data["Unchanged"], data["Kept"]) == ("0", "8", "nothing")
        assert system.content(*key.values()) == before
    finally:
        system.client("s3").put_object(**key, Body=before)


def test_a_damaged_manifest_stops_the_seeding_before_anything_is_touched(cloudformation, system, seeds):
    properties, who = seeds
    bucket, key = properties["HailBucket"], f"seeds/{who['PhysicalResourceId']}.json"
    before = system.content(bucket, key)
    system.client("s3").put_object(Bucket=bucket, Key=key, Body=b"not json")
    asked = cloudformation.ask("seed-buckets", "Update", properties, **who)
    assert f"reading the manifest s3://{bucket}/{key} failed" in asked.fails()
    assert asked.answer()["PhysicalResourceId"] == who["PhysicalResourceId"]
    system.client("s3").put_object(Bucket=bucket, Key=key, Body=before)


@pytest.mark.parametrize("gone", ["HailBucket", "NotebookBucket"])
def test_a_stack_is_deleted_whose_bucket_is_gone(elsewhere, gone):
    elsewhere.create("hail-s3")
    outputs = elsewhere.outputs("hail-s3")
    s3 = elsewhere.client("s3")
    versions = s3.list_object_versions(Bucket=outputs[gone])["Versions"]
    for version in versions:
        s3.delete_object(Bucket=outputs[gone], Key=version["Key"], VersionId=version["VersionId"])
    s3.delete_bucket(Bucket=outputs[gone])
    elsewhere.remove("hail-s3")
    assert elsewhere.there()["functions"] == []
    (other,) = {"HailBucket", "NotebookBucket"} - {gone}
    assert elsewhere.objects(outputs[other]) == {}


# remove-buckets


@pytest.fixture
def removable(system):
    """Makes buckets that remove-buckets may remove; the stack's own it may not."""
    role, s3 = system.resource(*ROLES["remove-buckets"]), system.client("s3")
    allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": "arn:aws:s3:::removable-*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    system.client("iam").put_role_policy(RoleName=role, PolicyName="Removable", PolicyDocument=policy)

    def make(*keys, **options):
        name = f"removable-{next(numbers)}"
        s3.create_bucket(Bucket=name, **options)
        for key in keys:
            s3.put_object(Bucket=name, Key=key, Body=b"")
        return name

    yield make
    s3_out_of_reach(system, out=False)
    system.client("iam").delete_role_policy(RoleName=role, PolicyName="Removable")


def is_there(system, bucket):
    return bucket in {found["Name"] for found in system.client("s3").list_buckets()["Buckets"]}


def test_creating_and_updating_a_removal_removes_nothing(cloudformation, system, removable):
    bucket = removable("a")
    asked = cloudformation.ask("remove-buckets", "Create", {"Buckets": [bucket]})
    asked.succeeds()
    update = cloudformation.again(asked, "remove-buckets", "Update", {"Buckets": []})
    update.succeeds()
    assert update.answer()["PhysicalResourceId"] == asked.answer()["PhysicalResourceId"]
    assert system.objects(bucket).keys() == {"a"}


def test_a_removal_that_names_no_bucket_asks_nothing_of_aws(cloudformation, system):
    with denied(system, "remove-buckets", "s3:*", "scheduler:*"):
        for properties in ({"Buckets": []}, {}):
            cloudformation.ask("remove-buckets", "Delete", properties, PhysicalResourceId="x").succeeds()


def test_two_deliveries_at_once_both_say_that_the_buckets_are_gone(cloudformation, system, removable):
    for _ in range(4):
        buckets = [removable("a", "b/c"), removable(), "removable-but-gone"]
        more = {"PhysicalResourceId": "x"}
        asked = cloudformation.ask("remove-buckets", "Delete", {"Buckets": buckets}, deliver=0, **more)
        with ThreadPoolExecutor() as two:
            for done in [two.submit(cloudformation.run, "remove-buckets", asked.event) for _ in range(2)]:
                assert done.result() == (None, None)
        eventually(lambda: asked.answers)  # noqa: B023, asked here and now
        assert {answer["Status"] for answer in asked.answers} == {"SUCCESS"}
        assert not any(is_there(system, bucket) for bucket in buckets)
        cloudformation.asked.pop(next(path for path, one in cloudformation.asked.items() if one is asked))
        system.aws.control("tick")
        eventually(lambda: not waiting(system))


def test_ticks_at_once_carry_a_removal_on_and_give_one_answer(cloudformation, system, removable):
    bucket = removable(*(f"part-{number}" for number in range(300)))
    s3_out_of_reach(system)
    properties = {"Buckets": [bucket]}
    asked = cloudformation.ask("remove-buckets", "Delete", properties, deliver=2, PhysicalResourceId="x")
    eventually(lambda: waiting(system))
    s3_out_of_reach(system, out=False)
    ticks(system, until=lambda: asked.answers)
    asked.succeeds()
    assert not is_there(system, bucket)


def test_a_removal_whose_hour_is_over_leaves_the_rest_to_the_next_and_the_last_says_what_to_do(
    cloudformation, system, removable
):
    bucket = removable("a")
    s3_out_of_reach(system)
    for last in (False, True):
        properties = {"Buckets": [bucket], **({"LastWait": "true"} if last else {})}
        asked = cloudformation.ask("remove-buckets", "Delete", properties, PhysicalResourceId="x")
        eventually(lambda: waiting(system))
        time_is_over(system)
        if last:
            assert f"bucket {bucket} is not empty after all the time that the stack waits" in asked.fails()
        else:
            asked.succeeds()
        assert is_there(system, bucket)


def test_a_version_that_may_not_be_removed_is_named_and_the_bucket_stays(cloudformation, system, removable):
    bucket, s3 = removable("free", ObjectLockEnabledForBucket=True), system.client("s3")
    s3.put_object(Bucket=bucket, Key="held", Body=b"", ObjectLockLegalHoldStatus="ON")
    asked = cloudformation.ask("remove-buckets", "Delete", {"Buckets": [bucket]}, PhysicalResourceId="x")
    reason = asked.fails()
    assert f"removing s3://{bucket}/held failed: AccessDenied: " in reason
    assert "Take away what forbids it and delete the stack again" in reason
    assert system.objects(bucket).keys() == {"held"}
    s3.put_object_legal_hold(Bucket=bucket, Key="held", LegalHold={"Status": "OFF"})
    cloudformation.again(asked, "remove-buckets", "Delete").succeeds()
    assert not is_there(system, bucket)


# All of them


@pytest.fixture
def request_for(ami, plots, notebook, seeds):
    """Properties of a resource of each function."""
    hail_s3 = {"seed-buckets": seeds[0], "remove-buckets": {"Buckets": [], "LastWait": "true"}}
    return {"build-ami": ami, "add-plot-steps": plots, "refresh-notebook": notebook, **hail_s3}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("payload", [{}, {"Records": []}, "text", None, {"Deferred": {}}])
def test_a_payload_that_is_none_of_ours_is_an_error(cloudformation, function, payload):
    _, error = cloudformation.run(function, payload)
    assert "neither a CloudFormation request, an EventBridge event nor a schedule's tick" in error


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_request_that_cannot_be_answered_is_an_error(cloudformation, function):
    _, error = cloudformation.run(function, {"ResponseURL": "http://127.0.0.1:1/", "RequestType": "Create"})
    assert "the request cannot be answered" in error


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_request_of_a_kind_that_there_is_not_fails(cloudformation, request_for, function):
    reason = cloudformation.ask(function, "Read", request_for[function]).fails()
    assert 'the request type should be Create, Update or Delete and is "Read"' in reason


@pytest.mark.parametrize("function", ["build-ami", "add-plot-steps", "refresh-notebook", "remove-buckets"])
def test_a_tick_for_which_nobody_waits_does_nothing(cloudformation, function):
    assert cloudformation.run(function, {"Deferred": {"Key": "nobody"}}) == (None, None)


@pytest.mark.parametrize(
    "function, action, doing",
    [
        ("seed-buckets", "s3:ListBucket", "looking for bucket hail-s3-hailbucket"),
        ("seed-buckets", "s3:GetObject", "reading the manifest s3://"),
        ("build-ami", "codebuild:StartBuild", "starting a build of project hail-ami-BuildProject"),
        ("build-ami", "codebuild:ListBuildsForProject", "looking at the builds of project hail-ami-BuildProject"),
        ("build-ami", "ssm:PutParameter", "publishing AMI ami-"),
        ("add-plot-steps", "elasticmapreduce:ListSteps", "listing the steps of cluster j-"),
        ("add-plot-steps", "elasticmapreduce:AddJobFlowSteps", "adding the plot steps to cluster j-"),
        ("refresh-notebook", "sagemaker:DescribeNotebookInstance", "looking at notebook instance ada"),
    ],
)
def test_what_aws_denies_is_told_with_what_was_done(cloudformation, system, request_for, function, action, doing):
    with denied(system, function, action):
        reason = cloudformation.ask(function, "Create", request_for[function]).fails()
    assert f"{doing}" in reason and "failed: AccessDenied" in reason and action in reason


@pytest.mark.parametrize("action, doing", [("Stop", "stopping"), ("Start", "starting")])
def test_a_restart_that_aws_denies_is_told(cloudformation, system, notebook, action, doing):
    with denied(system, "refresh-notebook", f"sagemaker:{action}NotebookInstance"):
        reason = refresh(cloudformation, notebook).fails()
    assert f"{doing} notebook instance ada failed: AccessDenied" in reason


@pytest.mark.parametrize("function", ["build-ami", "add-plot-steps", "refresh-notebook"])
def test_a_request_that_may_not_wait_fails_at_once(cloudformation, system, request_for, function):
    for name in ("builds", "notebooks", "steps"):
        system.aws.control(name, seconds=1.5)
    with denied(system, function, "scheduler:CreateSchedule"):
        if function == "refresh-notebook":
            asked = refresh(cloudformation, request_for[function])
        else:
            asked = cloudformation.ask(function, "Create", request_for[function])
        assert "letting the request wait for " in asked.fails()
    cloudformation.again(asked, function, "Delete").succeeds()
    assert system.there()["builds"] == []


def test_the_reason_of_a_failed_build_comes_also_without_its_log(cloudformation, system, ami):
    system.aws.control("builds", outcome="FAILED", phase="INSTALL")
    with denied(system, "build-ami", "logs:GetLogEvents"):
        reason = cloudformation.ask("build-ami", "Create", ami).fails()
    assert "in phase INSTALL" in reason and "reading log stream" in reason and "failed: AccessDenied" in reason


@pytest.mark.parametrize(
    "function, gone",
    [
        ("add-plot-steps", {"ClusterId": "j-GONE"}),
        ("refresh-notebook", {"NotebookInstanceName": "gone"}),
    ],
)
def test_a_delete_succeeds_when_the_thing_is_already_gone(cloudformation, request_for, function, gone):
    more = {"PhysicalResourceId": "what-was-there"}
    asked = cloudformation.ask(function, "Delete", {**request_for[function], **gone}, **more)
    asked.succeeds()
    assert asked.answer()["PhysicalResourceId"] == "what-was-there"


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_delete_of_what_was_never_made_asks_nothing_of_aws(cloudformation, system, function):
    with denied(system, function, "s3:*", "codebuild:*", "elasticmapreduce:*", "sagemaker:*", "scheduler:*", "ssm:*"):
        cloudformation.ask(function, "Delete", {}, PhysicalResourceId=NOTHING_MADE).succeeds()
