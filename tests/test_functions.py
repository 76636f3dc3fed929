"""The real functions, asked directly: races, faults, and what comes twice, late or never.

The test stands in for CloudFormation: it sends the requests and holds the URLs for the answers. Everything else is
the local AWS, with the four stacks, their roles, rules and schedules.
"""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from botocore.exceptions import ClientError
from by_hand import FUNCTIONS, NOTHING_MADE, denied, eventually, numbers, ticks, time_is_over, waiting


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
    assert asked.succeeds()["Uploaded"] == "0" and asked.succeeds()["Unchanged"] == "11"
    assert asked.answer()["PhysicalResourceId"] == who["PhysicalResourceId"]


def test_an_object_that_a_person_deleted_comes_back(cloudformation, system, seeds):
    properties, who = seeds
    key = {"Bucket": properties["NotebookBucket"], "Key": "scripts/ssm"}
    before = system.content(*key.values())
    system.client("s3").delete_object(**key)
    data = cloudformation.ask("seed-buckets", "Update", properties, **who).succeeds()
    assert (data["Uploaded"], data["Unchanged"], data["Kept"]) == ("1", "10", "nothing")
    assert system.content(*key.values()) == before


def test_what_another_stack_put_is_neither_overwritten_nor_deleted(cloudformation, system, seeds):
    properties, _ = seeds
    buckets = [properties["HailBucket"], properties["NotebookBucket"]]
    before = [system.objects(bucket) for bucket in buckets]
    asked = cloudformation.ask("seed-buckets", "Create", properties)
    data = asked.succeeds()
    assert (data["Uploaded"], data["Unchanged"]) == ("0", "0")
    assert len(data["Kept"].split(", ")) == 11
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
    assert (data["Unchanged"], data["Removed"]) == ("11", "0")
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
        assert (data["Uploaded"], data["Unchanged"], data["Kept"]) == ("0", "11", "nothing")
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
    assert "neither a CloudFormation request, an EventBridge event, a rule's request nor a schedule's tick" in error


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
