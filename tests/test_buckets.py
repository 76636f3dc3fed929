"""The buckets of hail-s3 as the people see them whose work is in them: made or taken, encrypted, kept, removed."""

import contextlib
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from by_hand import FUNCTIONS, ROLES, denied, eventually, numbers, ticks, time_is_over, waiting
from local_aws import ACCOUNT

BUCKETS = ("HailBucket", "LogBucket", "NotebookBucket")
CHAIN = ("BucketRemoval4", "BucketRemoval3", "BucketRemoval2", "BucketRemoval")


def fill(s3, bucket, keys, times=1):
    """Puts objects, each so many times: as many versions."""
    with ThreadPoolExecutor(8) as several:
        for _ in range(times):
            list(several.map(lambda key: s3.put_object(Bucket=bucket, Key=key, Body=b"mine"), keys))


def mark_deleted(s3, bucket, thousands):
    """Deletes so many objects that are not there, which leaves a delete marker for each."""
    for start in range(thousands):
        gone = [{"Key": f"data.mt/rows/part-{start}-{number:03}"} for number in range(1000)]
        s3.delete_objects(Bucket=bucket, Delete={"Objects": gone, "Quiet": True})


def versions(s3, bucket):
    """How many versions and delete markers there are, none in a bucket that is gone."""
    try:
        pages = list(s3.get_paginator("list_object_versions").paginate(Bucket=bucket))
    except s3.exceptions.NoSuchBucket:
        return 0
    return sum(len(page.get(kind, [])) for page in pages for kind in ("Versions", "DeleteMarkers"))


def names(stacks):
    return {bucket["Name"] for bucket in stacks.client("s3").list_buckets()["Buckets"]}


def remove(stacks):
    """Deletes the stack, however long that takes."""
    stacks.remove("hail-s3")
    cloudformation = stacks.client("cloudformation")
    going = ["DELETE_IN_PROGRESS"]
    eventually(lambda: not cloudformation.list_stacks(StackStatusFilter=going)["StackSummaries"], 60)


def answers(stacks, kind="Delete"):
    """What the resources of the chain answered, in order."""
    asked = [one for one in stacks.aws.control("answers") if one["RequestType"] == kind]
    told = [(a["LogicalResourceId"], a["Last"]["Status"]) for a in asked if a["Last"]]
    return [answer for answer in told if answer[0] in CHAIN]


def logged(stacks, group):
    """The lines of a log group; those of a group that went with its stack are not to be had."""
    pages = stacks.client("logs").get_paginator("filter_log_events").paginate(logGroupName=group)
    return [event["message"] for page in pages for event in page["events"]]


def s3_out_of_reach(stacks, out=True):
    """S3 answers remove-buckets no more, or does again."""
    name, function = stacks.resource(*FUNCTIONS["remove-buckets"]), stacks.client("lambda")
    variables = function.get_function_configuration(FunctionName=name)["Environment"]["Variables"]
    nowhere = {"AWS_ENDPOINT_URL_S3": "http://127.0.0.1:1", "AWS_MAX_ATTEMPTS": "1"}
    variables = variables | nowhere if out else {key: variables[key] for key in variables.keys() - nowhere.keys()}
    function.update_function_configuration(FunctionName=name, Environment={"Variables": variables})


# Removed


def test_buckets_that_go_with_their_stack_are_emptied_of_every_version_and_removed(elsewhere):
    before, s3 = elsewhere.there(), elsewhere.client("s3")
    assert elsewhere.create("hail-s3", RemoveBuckets="true") == "CREATE_COMPLETE"
    buckets = [elsewhere.outputs("hail-s3")[name] for name in BUCKETS]
    fill(s3, buckets[0], [f"data.mt/rows/part-{number:05}" for number in range(1200)], times=2)
    mark_deleted(s3, buckets[0], thousands=5)
    s3.create_multipart_upload(Bucket=buckets[0], Key="unfinished")
    fill(s3, buckets[1], ["elasticmapreduce/j-1/steps/stderr.gz"])
    fill(s3, buckets[2], ["ada/own.ipynb", "ada/a&b <c> é.ipynb"], times=2)
    assert versions(s3, buckets[0]) > 7400
    remove(elsewhere)
    assert elsewhere.there() == before
    assert answers(elsewhere) == [(name, "SUCCESS") for name in CHAIN]


def test_buckets_of_a_stack_that_could_not_be_created_go_with_it_too_if_they_are_to(elsewhere):
    before = elsewhere.there()
    # The Parameter Store has the name already, so that something fails after the buckets were seeded.
    elsewhere.client("ssm").put_parameter(Name="/hail/s3/assets", Value="taken", Type="String")
    assert elsewhere.create("hail-s3", RemoveBuckets="true") == "ROLLBACK_COMPLETE"
    elsewhere.client("ssm").delete_parameter(Name="/hail/s3/assets")
    remove(elsewhere)
    assert elsewhere.there() == before


def test_a_removal_goes_on_at_the_next_tick_when_s3_did_not_answer(elsewhere):
    s3 = elsewhere.client("s3")
    elsewhere.create("hail-s3", RemoveBuckets="true")
    buckets = [elsewhere.outputs("hail-s3")[name] for name in BUCKETS]
    group = elsewhere.resource("hail-s3", "RemoveBucketsLogGroup")
    fill(s3, buckets[0], [f"{number}" for number in range(50)])
    s3_out_of_reach(elsewhere)
    with ThreadPoolExecutor() as beside:
        deletion = beside.submit(remove, elsewhere)
        eventually(lambda: "BucketRemoval4" in waiting(elsewhere).values(), 25)
        eventually(lambda: any("the next tick goes on" in line for line in logged(elsewhere, group)))
        assert set(buckets) <= names(elsewhere)
        s3_out_of_reach(elsewhere, out=False)
        elsewhere.aws.control("tick")
        deletion.result()
    eventually(lambda: not names(elsewhere) & set(buckets))
    eventually(lambda: elsewhere.there()["functions"] == [])
    assert answers(elsewhere) == [(name, "SUCCESS") for name in CHAIN]


def test_a_removal_whose_function_is_killed_is_done_all_the_same(elsewhere):
    s3 = elsewhere.client("s3")
    elsewhere.create("hail-s3", RemoveBuckets="true")
    bucket = elsewhere.outputs("hail-s3")["HailBucket"]
    fill(s3, bucket, ["00000 the first of all"])
    mark_deleted(s3, bucket, thousands=12)
    with ThreadPoolExecutor() as beside:
        deletion = beside.submit(remove, elsewhere)
        running = eventually(lambda: list(processes(elsewhere)))
        eventually(lambda: "00000 the first of all" not in elsewhere.objects(bucket), 25)
        for pid in running:
            os.kill(pid, signal.SIGKILL)
        assert answers(elsewhere) == [], "it was killed too late to see anything"
        deletion.result()
    assert bucket not in names(elsewhere)
    assert answers(elsewhere) == [(name, "SUCCESS") for name in CHAIN]


def processes(stacks):
    """Those of remove-buckets in this local AWS."""
    name = stacks.resource("hail-s3", "RemoveBucketsFunction")
    wanted = {f"AWS_LAMBDA_FUNCTION_NAME={name}".encode(), f"AWS_ENDPOINT_URL={stacks.aws.endpoint}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((process / "environ").read_bytes().split(b"\0")):
                yield int(process.name)


def test_each_of_the_chain_has_its_hour_and_the_last_says_what_to_do(elsewhere):
    s3 = elsewhere.client("s3")
    elsewhere.create("hail-s3", RemoveBuckets="true")
    buckets = [elsewhere.outputs("hail-s3")[name] for name in BUCKETS]
    fill(s3, buckets[0], ["data.vcf"])
    s3_out_of_reach(elsewhere)
    with ThreadPoolExecutor() as beside:
        deletion = beside.submit(remove, elsewhere)
        for name in CHAIN:
            eventually(lambda: name in waiting(elsewhere).values(), 40)  # noqa: B023, asked here and now
            time_is_over(elsewhere)
        deletion.result()
        eventually(lambda: elsewhere.status("hail-s3") == "DELETE_FAILED", 40)
    (reason,) = elsewhere.reasons("hail-s3")[:1]
    assert "BucketRemoval: " in reason and f"bucket {buckets[0]} and bucket {buckets[1]}" in reason
    assert "Delete the stack again" in reason
    assert answers(elsewhere) == [*[(name, "SUCCESS") for name in CHAIN[:3]], (CHAIN[3], "FAILED")]
    assert set(buckets) <= names(elsewhere)
    s3_out_of_reach(elsewhere, out=False)
    remove(elsewhere)
    assert not names(elsewhere) & set(buckets) and elsewhere.there()["functions"] == []


def test_a_bucket_that_is_not_removed_in_time_expires_by_itself(elsewhere):
    elsewhere.create("hail-s3", RemoveBuckets="true")
    bucket, s3 = elsewhere.outputs("hail-s3")["HailBucket"], elsewhere.client("s3")
    role = elsewhere.resource("hail-s3", "RemoveBucketsRole")
    deny = {"Effect": "Deny", "Action": "s3:DeleteObjectVersion", "Resource": f"arn:aws:s3:::{bucket}/*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [deny]})
    elsewhere.client("iam").put_role_policy(RoleName=role, PolicyName="Denied", PolicyDocument=policy)
    remove(elsewhere)
    assert elsewhere.status("hail-s3") == "DELETE_FAILED"
    (reason,) = elsewhere.reasons("hail-s3")[:1]
    assert f"object versions of bucket {bucket} failed: AccessDenied" in reason
    rules = s3.get_bucket_lifecycle_configuration(Bucket=bucket)["Rules"]
    assert [rule["Expiration"] for rule in rules] == [{"Days": 1}, {"ExpiredObjectDeleteMarker": True}]
    assert rules[0]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 1}
    elsewhere.client("iam").delete_role_policy(RoleName=role, PolicyName="Denied")
    remove(elsewhere)
    assert bucket not in names(elsewhere) and elsewhere.there()["functions"] == []


# Kept


def test_what_is_decided_last_holds_when_the_stack_is_deleted(elsewhere):
    s3 = elsewhere.client("s3")
    elsewhere.create("hail-s3", RemoveBuckets="true")
    first = {elsewhere.outputs("hail-s3")[name] for name in BUCKETS}
    fill(s3, elsewhere.outputs("hail-s3")["HailBucket"], ["data.vcf"])
    assert elsewhere.update("hail-s3", RemoveBuckets="false") == "UPDATE_COMPLETE"
    assert elsewhere.content(elsewhere.outputs("hail-s3")["HailBucket"], "data.vcf") == b"mine"
    hail = elsewhere.outputs("hail-s3")["HailBucket"]
    remove(elsewhere)
    assert first <= names(elsewhere) and elsewhere.content(hail, "data.vcf") == b"mine"

    elsewhere.create("hail-s3")
    second = {elsewhere.outputs("hail-s3")[name] for name in BUCKETS}
    assert elsewhere.update("hail-s3", RemoveBuckets="true") == "UPDATE_COMPLETE"
    remove(elsewhere)
    assert not names(elsewhere) & (second - first) and elsewhere.content(hail, "data.vcf") == b"mine"


def test_a_bucket_that_is_exchanged_stays_though_the_others_go_with_the_stack(elsewhere):
    elsewhere.create("hail-s3", RemoveBuckets="true", HailBucketName="first-bucket-for-hail")
    fill(elsewhere.client("s3"), "first-bucket-for-hail", ["data.vcf"])
    assert elsewhere.update("hail-s3", HailBucketName="second-bucket-for-hail") == "UPDATE_COMPLETE"
    assert elsewhere.content("first-bucket-for-hail", "data.vcf") == b"mine"
    remove(elsewhere)
    assert "second-bucket-for-hail" not in names(elsewhere)
    assert elsewhere.content("first-bucket-for-hail", "data.vcf") == b"mine"


def test_a_bucket_that_a_person_takes_over_from_the_stack_stays(elsewhere):
    elsewhere.create("hail-s3", RemoveBuckets="true")
    outputs = elsewhere.outputs("hail-s3")
    hail = outputs["HailBucket"]
    fill(elsewhere.client("s3"), hail, ["data.vcf"])
    taken = {"CreateHailBucket": "false", "HailBucketName": hail}
    assert elsewhere.update("hail-s3", **taken) == "UPDATE_COMPLETE"
    assert elsewhere.outputs("hail-s3") == outputs | {"Seeding": elsewhere.outputs("hail-s3")["Seeding"]}
    remove(elsewhere)
    assert names(elsewhere) & set(outputs.values()) == {hail}
    assert elsewhere.objects(hail).keys() == {"data.vcf"}


# Taken


def all_about(s3, bucket):
    """Everything that a stack could change about a bucket."""
    found = {}
    for ask in (
        *("get_bucket_encryption", "get_bucket_lifecycle_configuration", "get_bucket_ownership_controls"),
        *("get_bucket_policy", "get_bucket_tagging", "get_bucket_versioning", "get_public_access_block"),
        "get_bucket_notification_configuration",
    ):
        try:
            found[ask] = getattr(s3, ask)(Bucket=bucket)
            found[ask].pop("ResponseMetadata")
        except ClientError as none:
            found[ask] = none.response["Error"]["Code"]
    return found


def test_buckets_that_were_there_before_are_seeded_and_otherwise_left_as_they_are(elsewhere):
    s3 = elsewhere.client("s3")
    theirs = {"Hail": "lab-data", "Log": "lab-logs", "Notebook": "lab-notebooks"}
    for bucket in theirs.values():
        s3.create_bucket(Bucket=bucket)
        fill(s3, bucket, ["own/data", "vep/own.json", "scripts/ssm"])
        s3.put_bucket_tagging(Bucket=bucket, Tagging={"TagSet": [{"Key": "owner", "Value": "lab"}]})
    expire = {"ID": "theirs", "Status": "Enabled", "Filter": {"Prefix": "tmp/"}, "Expiration": {"Days": 3}}
    s3.put_bucket_lifecycle_configuration(Bucket="lab-data", LifecycleConfiguration={"Rules": [expire]})
    principal = {"AWS": f"arn:aws:iam::{ACCOUNT}:root"}
    allow = {"Effect": "Allow", "Principal": principal, "Action": "s3:GetObject", "Resource": "arn:aws:s3:::lab-logs/x"}
    s3.put_bucket_policy(Bucket="lab-logs", Policy=json.dumps({"Version": "2012-10-17", "Statement": [allow]}))
    before = {bucket: all_about(s3, bucket) for bucket in theirs.values()}
    held = {bucket: elsewhere.objects(bucket) for bucket in theirs.values()}

    parameters = {f"Create{which}Bucket": "false" for which in theirs}
    parameters |= {f"{which}BucketName": bucket for which, bucket in theirs.items()}
    assert elsewhere.create("hail-s3", **parameters) == "CREATE_COMPLETE"
    outputs = elsewhere.outputs("hail-s3")
    assert [outputs[f"{which}Bucket"] for which in theirs] == list(theirs.values())
    assert outputs["Seeding"].startswith("10 uploaded, ")
    assert outputs["Seeding"].endswith("left alone: s3://lab-notebooks/scripts/ssm")
    stored = elsewhere.parameters("/hail/s3")
    assert [stored[f"/hail/s3/{name}"] for name in ("hail", "emrlogs", "sagemaker")] == list(theirs.values())
    assert "packer/packer.zip" in elsewhere.objects("lab-data")
    assert elsewhere.objects("lab-logs") == held["lab-logs"]
    assert {bucket: all_about(s3, bucket) for bucket in theirs.values()} == before

    remove(elsewhere)
    assert {bucket: elsewhere.objects(bucket) for bucket in theirs.values()} == held
    assert {bucket: all_about(s3, bucket) for bucket in theirs.values()} == before


def test_only_what_the_stack_made_goes_with_it(elsewhere):
    elsewhere.client("s3").create_bucket(Bucket="lab-data")
    fill(elsewhere.client("s3"), "lab-data", ["own"])
    taken = {"CreateHailBucket": "false", "HailBucketName": "lab-data", "RemoveBuckets": "true"}
    assert elsewhere.create("hail-s3", **taken) == "CREATE_COMPLETE"
    made = {elsewhere.outputs("hail-s3")[name] for name in ("LogBucket", "NotebookBucket")}
    role = elsewhere.resource("hail-s3", "RemoveBucketsRole")
    policy = elsewhere.client("iam").get_role_policy(RoleName=role, PolicyName="RemoveBuckets")
    assert "lab-data" not in json.dumps(policy["PolicyDocument"])
    remove(elsewhere)
    assert not names(elsewhere) & made and elsewhere.objects("lab-data").keys() == {"own"}


@pytest.mark.parametrize("which", ["Hail", "Log", "Notebook"])
def test_a_bucket_that_is_not_there_is_told_by_its_name(elsewhere, which):
    missing = {f"Create{which}Bucket": "false", f"{which}BucketName": "nobody-made-this"}
    assert elsewhere.create("hail-s3", **missing) == "ROLLBACK_COMPLETE"
    (reason,) = elsewhere.reasons("hail-s3")
    assert "Seeds: " in reason and "looking for bucket nobody-made-this failed: NoSuchBucket" in reason
    assert "uses a bucket of this account and region, or creates it itself" in reason


# Encrypted


def test_a_kms_key_encrypts_the_buckets_and_what_is_seeded_and_is_told_to_the_other_stacks(elsewhere):
    s3 = elsewhere.client("s3")
    key = elsewhere.client("kms").create_key()["KeyMetadata"]["Arn"]
    assert elsewhere.create("hail-s3", KmsKeyArn=key) == "CREATE_COMPLETE"
    outputs = elsewhere.outputs("hail-s3")
    for name in BUCKETS:
        (rule,) = s3.get_bucket_encryption(Bucket=outputs[name])["ServerSideEncryptionConfiguration"]["Rules"]
        assert rule["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}
        assert rule["BucketKeyEnabled"] is True
    seeded = s3.head_object(Bucket=outputs["HailBucket"], Key="packer/packer.zip")
    assert (seeded["ServerSideEncryption"], seeded["SSEKMSKeyId"]) == ("aws:kms", key)
    assert elsewhere.parameters("/hail/s3")["/hail/s3/kms-key"] == key
    # And back: what is put from then on is encrypted by S3.
    assert elsewhere.update("hail-s3", KmsKeyArn="") == "UPDATE_COMPLETE"
    (rule,) = s3.get_bucket_encryption(Bucket=outputs["HailBucket"])["ServerSideEncryptionConfiguration"]["Rules"]
    assert rule["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "AES256"}
    assert elsewhere.parameters("/hail/s3")["/hail/s3/kms-key"] == "none"


def test_a_bucket_that_is_encrypted_by_a_key_is_seeded_when_the_stack_knows_the_key(elsewhere):
    s3 = elsewhere.client("s3")
    key = elsewhere.client("kms").create_key()["KeyMetadata"]["Arn"]
    kms = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}}
    s3.create_bucket(Bucket="lab-data")
    s3.put_bucket_encryption(Bucket="lab-data", ServerSideEncryptionConfiguration={"Rules": [kms]})
    taken = {"CreateHailBucket": "false", "HailBucketName": "lab-data"}
    assert elsewhere.create("hail-s3", **taken) == "ROLLBACK_COMPLETE"
    assert "kms:GenerateDataKey" in elsewhere.reasons("hail-s3")[0]
    remove(elsewhere)
    assert elsewhere.create("hail-s3", **taken, KmsKeyArn=key) == "CREATE_COMPLETE"


def test_old_versions_and_logs_expire_after_the_days_that_were_asked_for(elsewhere):
    elsewhere.create("hail-s3", OldVersionDays="7", EmrLogDays="14")
    outputs, s3 = elsewhere.outputs("hail-s3"), elsewhere.client("s3")
    rules = {}
    for name in BUCKETS:
        found = s3.get_bucket_lifecycle_configuration(Bucket=outputs[name])["Rules"]
        rules[name] = {rule["ID"]: rule for rule in found}
        assert rules[name]["AbortUnfinishedUploads"]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    for name in ("HailBucket", "NotebookBucket"):
        assert rules[name]["DeleteOldVersions"]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 7}
        assert "DeleteLogs" not in rules[name]
    assert rules["LogBucket"]["DeleteLogs"]["Expiration"] == {"Days": 14}


# Asked directly


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
