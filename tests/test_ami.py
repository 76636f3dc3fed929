"""build-ami: the AMI is waited for, published, built again by itself, and removed when it is old.

As in test_functions.py, the test stands in for CloudFormation, or looks at stacks beside the four. What takes time ends
when the test says so: builds by `finish`, the hour of an operation by `time_is_over`, a minute of waiting by `tick`.
"""

import io
import json
import threading
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from by_hand import NOTHING_MADE, denied, eventually, numbers, ticks, time_is_over, waiting
from local_aws import ACCOUNT, REGION

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
        if ":stack/slow/" in asked["StackId"] and "Status" in asked["Last"]["Data"]
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
    eventually(lambda: system.parameters().get(f"/hail/ami/{exported['AMI_NAME']}") == exported["AMI_ID"])
    assert system.parameters()["/hail/ami/latest"] == exported["AMI_ID"]
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


@pytest.fixture
def unheard(system):
    """A changed packer.zip starts no build of the stack."""
    rule = {"Name": system.resource("hail-ami", "PackerChangedRule")}
    system.client("events").disable_rule(**rule)
    yield
    system.client("events").enable_rule(**rule)


@pytest.mark.usefixtures("unheard")
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




# Races, each many times over. Requests are held up until all that shall meet has come.

TIMES = 12


def held(stacks, operation, count=1):
    """Waits until so many requests for an operation are held."""
    eventually(lambda: stacks.aws.control("hold", operation=operation) >= count)


@pytest.fixture
def let_go(system):
    yield
    system.aws.control("release")


@pytest.mark.parametrize("number", range(TIMES))
def test_a_build_that_ends_between_the_look_and_the_wait_is_answered(cloudformation, system, ami, let_go, number):
    system.aws.control("builds", seconds=600)
    system.aws.control("hold", operation="CreateSchedule")
    asked = cloudformation.ask("build-ami", "Create", ami)
    held(system, "CreateSchedule")
    # Its event finds nobody who waits.
    system.aws.control("finish")
    name = f"/hail/ami/{exported(build_of(system, ami))['AMI_NAME']}"
    eventually(lambda: name in system.parameters())
    assert not asked.answers
    system.aws.control("release")
    assert asked.succeeds()["AmiId"] == system.parameters()[name]


@pytest.mark.parametrize("outcome", ["SUCCEEDED", "FAILED", "STOPPED", "IN_PROGRESS"])
@pytest.mark.parametrize("number", range(TIMES // 3))
def test_events_and_deadline_that_meet_give_one_answer(cloudformation, system, ami, let_go, outcome, number):
    system.aws.control("builds", seconds=600)
    system.aws.control("events", copies=2)
    asked = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: waiting(system))
    system.aws.control("hold", operation="DeleteSchedule")
    time_is_over(system)
    if outcome == "STOPPED":
        system.client("codebuild").stop_build(id=build_of(system, ami)["id"])
    elif outcome != "IN_PROGRESS":
        system.aws.control("builds", outcome=outcome)
        system.aws.control("finish")
    # The deadline's tick and another one, and the event twice: all of them are about to answer.
    threading.Thread(target=system.aws.control, args=["tick"]).start()
    held(system, "DeleteSchedule", 2 if outcome == "IN_PROGRESS" else 3)
    assert not asked.answers
    system.aws.control("release")
    answer = asked.answer()
    eventually(lambda: not waiting(system))
    if outcome == "IN_PROGRESS":
        # One that has seen the deadline but not the end of the build hands it to the next resource.
        assert answer["Data"]["Status"] == "IN_PROGRESS"
        system.client("codebuild").stop_build(id=build_of(system, ami)["id"])
    elif outcome == "SUCCEEDED":
        assert answer["Data"]["Status"] in ("SUCCEEDED", "IN_PROGRESS")
    else:
        assert answer["Status"] == "FAILED" or answer["Data"]["Status"] == "IN_PROGRESS"


@pytest.mark.parametrize("number", range(TIMES))
def test_a_delete_that_meets_the_end_of_the_build_leaves_one_answer_each(cloudformation, system, ami, let_go, number):
    system.aws.control("builds", seconds=600)
    asked = cloudformation.ask("build-ami", "Create", ami)
    eventually(lambda: waiting(system))
    system.aws.control("hold", operation="DeleteSchedule")
    system.aws.control("finish")
    held(system, "DeleteSchedule")
    # CloudFormation knows the resource by a name of its own until it is answered.
    deleted = cloudformation.again(asked, "build-ami", "Delete")
    deleted.succeeds()
    assert not asked.answers
    system.aws.control("release")
    assert asked.succeeds()["Status"] == "SUCCEEDED"


@pytest.mark.parametrize("number", range(TIMES))
def test_deliveries_that_meet_start_one_build(cloudformation, system, ami, let_go, number):
    builds = len(system.builds(ami["ProjectName"]))
    system.aws.control("builds", seconds=600)
    system.aws.control("hold", operation="StartBuild")
    asked = cloudformation.ask("build-ami", "Create", ami, deliver=3)
    held(system, "StartBuild", 3)
    system.aws.control("release")
    eventually(lambda: waiting(system))
    system.aws.control("finish")
    assert asked.succeeds()["Status"] == "SUCCEEDED"
    assert len(system.builds(ami["ProjectName"])) == builds + 1


@pytest.mark.parametrize("number", range(TIMES // 3))
def test_a_rollback_that_meets_the_end_of_the_build_goes_back(cloudformation, system, ami, let_go, number):
    first = cloudformation.ask("build-ami", "Create", ami)
    before = first.succeeds()["AmiId"]
    system.aws.control("builds", seconds=600)
    newer = {**ami, "RebuildToken": ami["RebuildToken"] + "-newer"}
    update = cloudformation.again(first, "build-ami", "Update", newer)
    eventually(lambda: waiting(system))
    system.aws.control("hold", operation="DeleteSchedule")
    system.aws.control("finish")
    held(system, "DeleteSchedule")
    back = cloudformation.again(first, "build-ami", "Update", ami, OldResourceProperties=newer)
    system.aws.control("release")
    assert back.succeeds()["AmiId"] == before
    update.answer()
    eventually(lambda: system.parameters()["/hail/ami/latest"] == before)


def exported(build):
    return {found["name"]: found["value"] for found in build["exportedEnvironmentVariables"]}


# What cannot be built


def test_what_a_script_says_comes_first(cloudformation, system, ami):
    said = "VEP 115 has no cache for GRCh37: put it there, or build with another VEP_VERSION."
    log = [f"==> amazon-ebs.hail: vep-cache.sh: hail-ami error: {said}"]
    log += [f"==> amazon-ebs.hail: cleaning up {number}" for number in range(40)]
    system.aws.control("builds", outcome="FAILED", log=log)
    reason = cloudformation.ask("build-ami", "Create", ami).fails()
    assert reason.startswith(f"{said} build {build_of(system, ami)['id']} ended as FAILED in phase BUILD")
    assert "cleaning up 39" in reason


def test_versions_that_are_not_known_to_work_are_built_at_ones_own_risk_only(cloudformation, system, ami):
    builds = len(system.builds())
    unknown = {**ami, "HailVersion": "main"}
    reason = cloudformation.ask("build-ami", "Create", unknown).fails()
    assert 'property HailVersion: "main" is a source that is built at one\'s own risk' in reason
    assert "the nearest versions that work together are HailVersion 0.2.139, EmrReleaseLabel emr-7.13.0" in reason
    assert len(system.builds()) == builds
    cloudformation.ask("build-ami", "Create", {**unknown, "AllowUntestedVersions": "true"}).succeeds()
    variables = variables_of(build_of(system, ami))
    assert (variables["HAIL_VERSION"], variables["ALLOW_UNTESTED_VERSIONS"]) == ("main", "true")


def variables_of(build):
    return {variable["name"]: variable["value"] for variable in build["environment"]["environmentVariables"]}


def test_a_quota_that_is_used_up_is_told_at_once(cloudformation, system, ami):
    codebuild = system.client("codebuild")
    (project,) = codebuild.batch_get_projects(names=[ami["ProjectName"]])["projects"]
    known = {name: project[name] for name in ("name", "source", "artifacts", "environment", "serviceRole")}
    codebuild.update_project(**known, concurrentBuildLimit=1)
    system.aws.control("builds", seconds=600)
    try:
        running = codebuild.start_build(projectName=ami["ProjectName"])["build"]["id"]
        reason = cloudformation.ask("build-ami", "Create", ami).fails()
        codebuild.stop_build(id=running)
    finally:
        codebuild.update_project(**known, concurrentBuildLimit=100)
    assert "AccountLimitExceededException" in reason and "wait until other builds have ended, or ask" in reason


# A stack beside the four: rebuilds, failures and old AMIs


@pytest.fixture
def beside(system, published, unheard):
    """Creates another hail-ami stack, with its first AMI; it is gone in the end with all that it made."""
    before = system.there()
    del before["parameters"]  # The latest is this stack's own in the end.
    images = system.client("ec2").describe_images(Owners=["self"])["Images"]

    class Beside:
        # A project that is made again under its name would find the builds of the one before.
        stack = f"beside-{next(numbers)}"

        def create(self, **parameters):
            assert system.create("hail-ami", self.stack, **parameters) == "CREATE_COMPLETE", system.reasons(self.stack)
            self.project = system.resource(self.stack, "BuildProject")
            return self

        def builds(self):
            return system.builds(self.project)

        def amis(self):
            """Of this project, by what the tags say."""
            tagged = {"Name": "tag:build-project", "Values": [self.project]}
            return {image["ImageId"] for image in system.client("ec2").describe_images(Filters=[tagged])["Images"]}

        def snapshots(self):
            tagged = {"Name": "tag:build-project", "Values": [self.project]}
            return system.client("ec2").describe_snapshots(Filters=[tagged])["Snapshots"]

        def build(self, **variables):
            """As a person does from the console."""
            given = [{"name": name, "value": value} for name, value in variables.items()]
            started = system.client("codebuild").start_build(
                projectName=self.project, environmentVariablesOverride=given
            )
            return eventually(lambda: self.published(started["build"]["id"]))

        def published(self, build_id):
            (build,) = system.client("codebuild").batch_get_builds(ids=[build_id])["builds"]
            found = exported(build)
            if f"/hail/ami/{found.get('AMI_NAME')}" in system.parameters():
                return found["AMI_ID"]

        def remove(self):
            system.remove(self.stack)
            after = system.there()
            del after["parameters"]
            assert after == before
            self.stack = None

    made = Beside()
    yield made
    system.as_always()
    if made.stack:
        made.remove()
    for image in system.client("ec2").describe_images(Owners=["self"])["Images"]:
        if image["ImageId"] not in {one["ImageId"] for one in images}:
            system.client("ec2").deregister_image(ImageId=image["ImageId"], DeleteAssociatedSnapshots=True)


@pytest.fixture
def packer_zip(system):
    """Puts the same packer.zip again, as a new version."""
    here = {"Bucket": system.parameters()["/hail/s3/hail"], "Key": "packer/packer.zip"}
    before = system.client("s3").get_object(**here)
    body = before["Body"].read()

    def put():
        system.client("s3").put_object(**here, Body=body, Metadata=before["Metadata"])

    return put


def reminders(stacks):
    """The requests that are asked again every minute."""
    return [one["Name"] for one in stacks.client("scheduler").list_schedules()["Schedules"] if "request-" in one["Name"]]


def test_a_changed_packer_zip_is_built_and_published(system, beside, packer_zip):
    first = system.outputs(beside.create().stack)["AmiId"]
    packer_zip()
    eventually(lambda: len(beside.builds()) == 2)
    rebuilt = eventually(lambda: beside.published(beside.builds()[0]["id"]))
    assert rebuilt != first and system.parameters()["/hail/ami/latest"] == rebuilt
    assert beside.amis() == {first, rebuilt}
    # What the stack was asked for is what was built again: an update that goes back to it takes the newer one.
    assert system.update("hail-ami", beside.stack, VepVersion="115") == "UPDATE_COMPLETE"
    assert system.update("hail-ami", beside.stack, VepVersion="none") == "UPDATE_COMPLETE"
    assert system.outputs(beside.stack)["AmiId"] == rebuilt and len(beside.builds()) == 3
    eventually(lambda: reminders(system) == [])


def test_one_rebuild_runs_at_a_time_and_a_second_one_is_noted(system, beside, packer_zip):
    beside.create()
    system.aws.control("builds", seconds=600)
    packer_zip()
    eventually(lambda: len(beside.builds()) == 2)
    time.sleep(1.1)  # The time of an event has no fractions of a second.
    packer_zip()
    eventually(lambda: len(reminders(system)) == 1)
    for _ in range(3):
        system.aws.control("tick")
    assert len(beside.builds()) == 2 and len(reminders(system)) == 1
    system.aws.control("finish")
    system.aws.control("tick")
    eventually(lambda: len(beside.builds()) == 3)
    eventually(lambda: (system.aws.control("tick"), reminders(system) == [])[1])
    system.aws.control("finish")
    assert len(beside.builds()) == 3
    eventually(lambda: beside.published(beside.builds()[0]["id"]))


def test_a_request_that_comes_many_times_at_once_is_one_build(cloudformation, system, beside, let_go):
    function = system.resource(beside.create().stack, "BuildAmiFunction")
    request = {"ProjectName": beside.project, "Reason": "a test", "Time": "2100-01-01T00:00:00Z"}
    system.aws.control("builds", seconds=600)
    for number in range(TIMES // 3):
        builds = len(beside.builds())
        system.aws.control("hold", operation="StartBuild")
        for _ in range(3):
            payload = json.dumps({"Request": {**request, "Time": f"2100-01-01T00:00:0{number}Z"}})
            system.client("lambda").invoke(FunctionName=function, Payload=payload, InvocationType="Event")
        held(system, "StartBuild", 3)
        system.aws.control("release")
        eventually(lambda: len(beside.builds()) > builds)  # noqa: B023, asked here and now
        assert len(beside.builds()) == builds + 1
        system.aws.control("finish")
    eventually(lambda: beside.published(beside.builds()[0]["id"]))


def test_a_person_who_builds_another_version_does_not_take_the_rebuild_away(system, beside, packer_zip):
    beside.create()
    system.aws.control("builds", seconds=600)
    given = [{"name": "HAIL_VERSION", "value": "0.2.131"}]
    system.client("codebuild").start_build(projectName=beside.project, environmentVariablesOverride=given)
    packer_zip()
    eventually(lambda: reminders(system))
    system.aws.control("finish")
    system.aws.control("tick")
    eventually(lambda: len(beside.builds()) == 3)
    assert variables_of(beside.builds()[0])["HAIL_VERSION"] == "0.2.139"
    eventually(lambda: (system.aws.control("tick"), reminders(system) == [])[1])
    system.aws.control("finish")
    eventually(lambda: beside.published(beside.builds()[0]["id"]))


def test_a_schedule_builds_the_ami_again_and_none_is_the_default(system, beside):
    beside.create()
    system.aws.control("tick")
    assert len(beside.builds()) == 1
    assert system.update("hail-ami", beside.stack, RebuildSchedule="rate(30 days)") == "UPDATE_COMPLETE"
    system.aws.control("tick")
    rebuilt = eventually(lambda: len(beside.builds()) == 2 and beside.published(beside.builds()[0]["id"]))
    assert system.parameters()["/hail/ami/latest"] == rebuilt


@pytest.fixture
def told(system, beside):
    """A function that gives what the topic of the stack beside has told since."""
    sqs = system.client("sqs")
    queue = sqs.create_queue(QueueName=f"told-{uuid.uuid4()}")["QueueUrl"]
    arn = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    topic = {}

    def told():
        if not topic:
            topic["TopicArn"] = system.outputs(beside.stack)["FailureTopic"]
            statement = {"Effect": "Allow", "Principal": {"Service": "sns.amazonaws.com"}, "Action": "sqs:SendMessage"}
            policy = {"Version": "2012-10-17", "Statement": [{**statement, "Resource": arn}]}
            sqs.set_queue_attributes(QueueUrl=queue, Attributes={"Policy": json.dumps(policy)})
            system.client("sns").subscribe(**topic, Protocol="sqs", Endpoint=arn)
        received = sqs.receive_message(QueueUrl=queue, MaxNumberOfMessages=10).get("Messages", [])
        for message in received:
            sqs.delete_message(QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])
        return [json.loads(message["Body"]) for message in received]

    yield told
    sqs.delete_queue(QueueUrl=queue)


def test_failed_builds_are_told_whoever_started_them_and_stopped_ones_are_not(system, beside, told):
    beside.create(FailureEmail="ada@example.org")
    assert told() == []
    topic = {"TopicArn": system.outputs(beside.stack)["FailureTopic"]}
    subscribed = system.client("sns").list_subscriptions_by_topic(**topic)["Subscriptions"]
    assert ("email", "ada@example.org") in [(one["Protocol"], one["Endpoint"]) for one in subscribed]
    assert system.client("sns").get_topic_attributes(**topic)["Attributes"]["KmsMasterKeyId"] == "alias/aws/sns"
    for outcome in ("FAILED", "FAULT", "TIMED_OUT"):
        system.aws.control("builds", outcome=outcome, log=["hail-ami error: the key may not be used."])
        build = system.client("codebuild").start_build(projectName=beside.project)["build"]["id"]
        (message,) = eventually(told)
        assert message["Subject"] == "A build of the Hail AMI has failed"
        assert message["Message"].startswith(f"the key may not be used. build {build} ended as {outcome}")
    system.aws.control("builds", seconds=600, outcome="SUCCEEDED")
    build = system.client("codebuild").start_build(projectName=beside.project)["build"]["id"]
    system.client("codebuild").stop_build(id=build)
    system.as_always()
    beside.build()
    assert told() == []


def test_a_rebuild_that_may_not_be_started_is_told(system, beside, packer_zip, told):
    beside.create()
    assert told() == []
    iam, role = system.client("iam"), system.resource(beside.stack, "BuildAmiRole")
    statement = {"Effect": "Deny", "Action": "codebuild:StartBuild", "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_role_policy(RoleName=role, PolicyName="Denied", PolicyDocument=policy)
    try:
        packer_zip()
        (message,) = eventually(told)
    finally:
        iam.delete_role_policy(RoleName=role, PolicyName="Denied")
    assert message["Subject"] == "A rebuild of the Hail AMI could not be started"
    assert f"starting a build of project {beside.project} failed: AccessDenied" in message["Message"]
    assert "packer/packer.zip has changed" in message["Message"]
    assert reminders(system) == [] and len(beside.builds()) == 1


def test_amis_are_kept_unless_a_parameter_says_how_many(system, beside):
    beside.create()
    kept = {beside.build() for _ in range(3)} | {system.outputs(beside.stack)["AmiId"]}
    assert beside.amis() == kept and len(beside.snapshots()) == 4


def test_the_oldest_amis_go_with_their_snapshots_and_parameters(system, beside):
    first = system.outputs(beside.create(AmisToKeep="2").stack)["AmiId"]
    second, third = beside.build(), beside.build()
    eventually(lambda: beside.amis() == {second, third})
    assert len(beside.snapshots()) == 2
    assert first not in system.parameters().values()
    assert system.parameters()["/hail/ami/latest"] == third


@pytest.mark.parametrize("user", ["cluster", "parameter by name", "parameter from the latest"])
def test_an_old_ami_that_is_in_use_is_kept(system, beside, user):
    first = system.outputs(beside.create(AmisToKeep="2").stack)["AmiId"]
    (name,) = [name for name, ami in system.parameters().items() if ami == first and name != "/hail/ami/latest"]
    if user == "cluster":
        cluster = system.client("emr").run_job_flow(
            Name="of a person",
            CustomAmiId=first,
            ReleaseLabel="emr-7.13.0",
            JobFlowRole=system.resource("hail-emr", "NodeProfile"),
            ServiceRole=system.resource("hail-emr", "ServiceRole"),
            Instances={
                "Ec2SubnetId": system.network["SubnetId"],
                "KeepJobFlowAliveWhenNoSteps": True,
                "MasterInstanceType": "m5.xlarge",
                "InstanceCount": 1,
            },
        )["JobFlowId"]
    else:
        named = name if user == "parameter by name" else "/hail/ami/latest"
        assert system.create("hail-emr", "names", HailAmiId=named) == "CREATE_COMPLETE"
        # The cluster of that stack is not what keeps the AMI.
        cluster = system.outputs("names")["ClusterId"]
        system.client("emr").terminate_job_flows(JobFlowIds=[cluster])
    others = [beside.build() for _ in range(3)]
    eventually(lambda: beside.amis() == {first, *others[1:]})
    assert system.parameters()[name] == first
    if user == "cluster":
        system.client("emr").terminate_job_flows(JobFlowIds=[cluster])
    else:
        system.remove("names")
    newest = beside.build()
    eventually(lambda: beside.amis() == {others[2], newest})


def test_an_ami_is_kept_when_it_is_replaced_and_when_its_stack_goes(system, beside):
    first = system.outputs(beside.create().stack)["AmiId"]
    assert system.update("hail-ami", beside.stack, RebuildToken="2") == "UPDATE_COMPLETE"
    second = system.outputs(beside.stack)["AmiId"]
    assert first in system.parameters().values(), "a stack may name it by its parameter"
    beside.remove()
    assert beside.amis() == {first, second} and len(beside.snapshots()) == 2
    assert not {first, second} & set(system.parameters().values())


def test_an_ami_goes_when_it_is_replaced_and_when_its_stack_goes_if_a_parameter_says_so(system, beside):
    first = system.outputs(beside.create(AmiDeletionPolicy="Delete").stack)["AmiId"]
    assert system.update("hail-ami", beside.stack, RebuildToken="2") == "UPDATE_COMPLETE"
    second = system.outputs(beside.stack)["AmiId"]
    assert beside.amis() == {second} and len(beside.snapshots()) == 1
    assert first not in system.parameters().values()
    built = beside.build(HAIL_VERSION="0.2.131")
    assert beside.amis() == {second, built}
    beside.remove()
    assert beside.amis() == set() and beside.snapshots() == []


def test_an_update_that_fails_keeps_the_ami_that_it_goes_back_to(system, beside):
    outputs = system.outputs(beside.create(AmiDeletionPolicy="Delete").stack)
    system.aws.control("builds", outcome="FAILED")
    assert system.update("hail-ami", beside.stack, RebuildToken="2") == "UPDATE_ROLLBACK_COMPLETE"
    system.as_always()
    assert system.outputs(beside.stack) == outputs and beside.amis() == {outputs["AmiId"]}
    assert system.parameters()["/hail/ami/latest"] == outputs["AmiId"]
    assert len(beside.builds()) == 2


def test_the_amis_of_another_project_are_not_touched(system, beside):
    other = system.outputs("hail-ami")["AmiId"]
    beside.create(AmiDeletionPolicy="Delete", AmisToKeep="2")
    for _ in range(2):
        beside.build()
    beside.remove()
    assert other in {image["ImageId"] for image in system.client("ec2").describe_images(Owners=["self"])["Images"]}


# What a build leaves that is stopped before Packer can clean up


def left_by(stacks, build, name="packer hail-1"):
    """What Packer has made when its build is cut off: an instance with its security group, a key pair, an AMI."""
    ec2, network = stacks.client("ec2"), stacks.network
    tags = [
        {"Key": "Name", "Value": name},
        {"Key": "build-project", "Value": build["projectName"]},
        {"Key": "build-id", "Value": build["id"]},
    ]

    def tagged(kind):
        return {"TagSpecifications": [{"ResourceType": kind, "Tags": tags}]}

    key = f"packer_{uuid.uuid4()}"
    ec2.create_key_pair(KeyName=key, **tagged("key-pair"))
    group = ec2.create_security_group(
        GroupName=key, Description="-", VpcId=network["VpcId"], **tagged("security-group")
    )["GroupId"]
    instance = ec2.run_instances(
        ImageId=ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"],
        MinCount=1,
        MaxCount=1,
        SubnetId=network["SubnetId"],
        SecurityGroupIds=[group],
        **tagged("instance"),
    )["Instances"][0]["InstanceId"]
    image = ec2.register_image(Name=f"half-made-{uuid.uuid4()}", RootDeviceName="/dev/xvda", **tagged("image"))
    return {"instance": instance, "group": group, "key": key, "image": image["ImageId"]}


def still_there(stacks, left):
    ec2 = stacks.client("ec2")
    instances = ec2.describe_instances(InstanceIds=[left["instance"]])["Reservations"][0]["Instances"]
    return [
        what
        for what, there in {
            "instance": instances[0]["State"]["Name"] not in ("shutting-down", "terminated"),
            "group": any(one["GroupId"] == left["group"] for one in ec2.describe_security_groups()["SecurityGroups"]),
            "key": any(one["KeyName"] == left["key"] for one in ec2.describe_key_pairs()["KeyPairs"]),
            "image": any(one["ImageId"] == left["image"] for one in ec2.describe_images(Owners=["self"])["Images"]),
        }.items()
        if there
    ]


@pytest.mark.parametrize("outcome", ["STOPPED", "TIMED_OUT"])
def test_what_a_build_leaves_that_is_cut_off_is_removed_and_nothing_else(system, beside, outcome):
    beside.create()
    system.aws.control("builds", seconds=600)
    build = system.client("codebuild").start_build(projectName=beside.project)["build"]
    left = left_by(system, build)
    # Of another build, and of somebody who is not Packer.
    kept = [left_by(system, build | {"id": f"{build['id']}0"}), left_by(system, build, name="mine")]
    if outcome == "STOPPED":
        system.client("codebuild").stop_build(id=build["id"])
    else:
        system.aws.control("builds", outcome=outcome)
        system.aws.control("finish")
    eventually(lambda: still_there(system, left) == [])
    eventually(lambda: (system.aws.control("tick"), reminders(system) == [])[1])
    for others in kept:
        assert still_there(system, others) == ["instance", "group", "key", "image"]
        remove_by_hand(system, others)


def remove_by_hand(stacks, left):
    ec2 = stacks.client("ec2")
    ec2.terminate_instances(InstanceIds=[left["instance"]])
    ec2.delete_security_group(GroupId=left["group"])
    ec2.delete_key_pair(KeyName=left["key"])
    ec2.deregister_image(ImageId=left["image"])


def test_a_stack_that_goes_while_it_builds_leaves_nothing_of_the_build(system, beside):
    beside.create()
    system.aws.control("builds", seconds=600)
    left = left_by(system, system.client("codebuild").start_build(projectName=beside.project)["build"])
    beside.remove()
    assert still_there(system, left) == []
