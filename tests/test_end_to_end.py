"""The four stacks with their real functions, as the people who deploy them see them."""

import base64
import io
import json
import re
import zipfile

import assets_digest
import pytest
from botocore.exceptions import ClientError
from by_hand import eventually
from stacks import NAMES, ROOT, Failed

STEPS = [
    "Hail: plot directory",
    "Hail: plot web server",
    "Hail: Livy port range",
    "Hail: VEP ownership",
    "Hail: cluster manifest",
]


def shipped(bucket):
    """The files that are put into a bucket, by key; the files of packer.zip, by name in it."""
    folders = {"NotebookBucket": ROOT / "jupyter", "HailBucket": ROOT / "packer" / "vep", "packer.zip": ROOT / "packer"}
    below = {"NotebookBucket": ROOT / "jupyter", "HailBucket": ROOT / "packer", "packer.zip": ROOT / "packer"}
    return {
        path.relative_to(below[bucket]).as_posix(): path.read_bytes()
        for path in assets_digest.assets(ROOT)
        if path.is_relative_to(folders[bucket])
    }


def unzipped(body):
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_digest(stacks, digest):
    """The packaged hail-s3 with another digest, as if other assets were shipped."""
    packaged = stacks.folder / f"packaged-{digest[0]}.yml"
    packaged.write_text(re.sub("[0-9a-f]{64}", digest, stacks.packages["hail-s3"].read_text()))
    return packaged


def with_statement(stacks, statement):
    """The packaged hail-s3 with one more statement in the policy of seed-buckets."""
    packaged = stacks.folder / "packaged-with-statement.yml"
    text = stacks.packages["hail-s3"].read_text()
    name = re.search(r"( +)- PolicyName: SeedBuckets\n", text)
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    more = f"{name[1]}- PolicyName: More\n{name[1]}  PolicyDocument: {json.dumps(policy)}\n"
    packaged.write_text(text.replace(name[0], more + name[0]))
    return packaged


def deny(action, resource):
    return {"Effect": "Deny", "Action": action, "Resource": resource}


# Create


def test_each_stack_says_in_its_outputs_what_it_made(system, outputs):
    notebook = outputs["hail-jupyter"]
    assert notebook["BackupFolder"] == f"s3://{outputs['hail-s3']['NotebookBucket']}/ada/"
    assert notebook["Refresh"] == "InService, restarted: false"
    assert outputs["hail-s3"]["Seeding"] == "11 uploaded, 0 unchanged, 0 removed, left alone: nothing"
    assert re.fullmatch("ami-[0-9a-f]{17}", outputs["hail-ami"]["AmiId"])
    assert outputs["hail-ami"]["AmiName"].startswith("hail-")
    cluster = outputs["hail-emr"]
    assert cluster["LivyUrl"] == f"http://{cluster['PrimaryAddress']}:8998"
    assert cluster["PlotsUrl"] == f"http://{cluster['PrimaryAddress']}/plots/"
    assert cluster["PlotDirectory"] == "/var/www/html/plots"
    assert cluster["Steps"] == ", ".join(STEPS)
    assert not [output for stack in outputs.values() for output in stack.values() if "${" in output]


def test_the_buckets_hold_what_is_shipped_and_nothing_else(system, outputs):
    notebooks, hail = (outputs["hail-s3"][name] for name in ("NotebookBucket", "HailBucket"))
    assert {key: system.content(notebooks, key) for key in system.objects(notebooks)} == shipped("NotebookBucket")
    found = {key: system.content(hail, key) for key in system.objects(hail)}
    (manifest,) = (key for key in found if key.startswith("seeds/"))
    assert sorted(json.loads(found.pop(manifest))["notebook"]) == sorted(shipped("NotebookBucket"))
    assert unzipped(found.pop("packer/packer.zip")) == shipped("packer.zip")
    assert found == shipped("HailBucket")


def test_the_buckets_are_encrypted_closed_to_the_public_and_keep_old_versions(system, outputs):
    s3 = system.client("s3")
    for name in ("HailBucket", "LogBucket", "NotebookBucket"):
        bucket = outputs["hail-s3"][name]
        (rule,) = s3.get_bucket_encryption(Bucket=bucket)["ServerSideEncryptionConfiguration"]["Rules"]
        assert rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "AES256"
        closed = s3.get_public_access_block(Bucket=bucket)["PublicAccessBlockConfiguration"]
        assert len(closed) == 4 and all(closed.values())
        assert s3.get_bucket_versioning(Bucket=bucket)["Status"] == "Enabled"
        (tls,) = json.loads(s3.get_bucket_policy(Bucket=bucket)["Policy"])["Statement"]
        assert tls["Effect"] == "Deny" and tls["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_later_stacks_find_in_the_parameter_store_what_earlier_ones_made(system, outputs):
    buckets, ami = outputs["hail-s3"], outputs["hail-ami"]
    assert system.parameters() == {
        "/hail/s3/hail": buckets["HailBucket"],
        "/hail/s3/emrlogs": buckets["LogBucket"],
        "/hail/s3/sagemaker": buckets["NotebookBucket"],
        "/hail/s3/roda": "hail-vep-pipeline",
        "/hail/s3/kms-key": "none",
        "/hail/s3/assets": outputs["hail-s3"]["NotebookDigest"],
        "/hail/jupyter/ada/security-group": outputs["hail-jupyter"]["SecurityGroup"],
        f"/hail/ami/{ami['AmiName']}": ami["AmiId"],
        "/hail/ami/latest": ami["AmiId"],
    }
    types = {found["Name"]: found["DataType"] for found in system.client("ssm").describe_parameters()["Parameters"]}
    assert types["/hail/ami/latest"] == types[f"/hail/ami/{ami['AmiName']}"] == "aws:ec2:image"


def test_the_cluster_took_the_ami_that_was_published_as_the_latest(system, outputs):
    cluster = system.client("emr").describe_cluster(ClusterId=outputs["hail-emr"]["ClusterId"])["Cluster"]
    assert cluster["CustomAmiId"] == system.parameters()["/hail/ami/latest"] == outputs["hail-emr"]["AmiId"]
    (image,) = system.client("ec2").describe_images(ImageIds=[cluster["CustomAmiId"]])["Images"]
    tags = {tag["Key"]: tag["Value"] for tag in image["Tags"]}
    assert (tags["hail-version"], tags["vep-version"], tags["emr-release-label"]) == ("0.2.139", "none", "emr-7.13.0")
    assert cluster["ReleaseLabel"] == tags["emr-release-label"]


def test_the_plot_steps_have_completed_in_their_order(system, outputs):
    steps = system.client("emr").list_steps(ClusterId=outputs["hail-emr"]["ClusterId"])["Steps"][::-1]
    ours = [step for step in steps if step["Name"] in STEPS]
    assert [step["Name"] for step in ours] == STEPS
    assert {step["Status"]["State"] for step in ours} == {"COMPLETED"}
    assert {step["ActionOnFailure"] for step in ours} == {"CONTINUE"}
    manifest = ours[-1]["Config"]["Args"]
    assert manifest[:2] == ["bash", "-c"] and manifest[3:] == ["cluster-manifest", outputs["hail-s3"]["HailBucket"]]


def test_the_notebook_instance_runs_with_a_start_script_that_names_the_buckets(system, outputs):
    sagemaker = system.client("sagemaker")
    notebook = sagemaker.describe_notebook_instance(NotebookInstanceName="ada")
    assert notebook["NotebookInstanceStatus"] == "InService"
    lifecycle = notebook["NotebookInstanceLifecycleConfigName"]
    described = sagemaker.describe_notebook_instance_lifecycle_config(NotebookInstanceLifecycleConfigName=lifecycle)
    script = base64.b64decode(described["OnStart"][0]["Content"]).decode()
    buckets = outputs["hail-s3"]
    assert f's3://{buckets["NotebookBucket"]}/scripts/start-notebook' in script
    assert script.splitlines()[-1].endswith(f'"{buckets["NotebookBucket"]}" "ada" "{buckets["HailBucket"]}"')


# Update


NOTEBOOK, REMOVED, PERSONAL = "common-notebooks/hail-plotting-example.ipynb", "scripts/ssm", "scripts/list-clusters"


@pytest.fixture(scope="session")
def changed(laboratory):
    """The packaged hail-s3 with one notebook changed, a script changed, one removed, and a notebook added."""
    jupyter, template = laboratory.folder / "jupyter", laboratory.folder / assets_digest.TEMPLATE
    (jupyter / "common-notebooks" / "new.ipynb").write_text("{}")
    (jupyter / NOTEBOOK).write_text('{"changed": true}')
    (jupyter / PERSONAL).write_text("changed")
    (jupyter / REMOVED).unlink()
    laboratory.ship()
    original, packaged = laboratory.packages["hail-s3"], laboratory.folder / "packaged-changed.yml"
    before = original.read_text()
    packaged.write_text(laboratory.package("hail-s3").read_text())
    original.write_text(before)
    assert assets_digest.digest(laboratory.folder) in template.read_text()
    return packaged


def test_an_update_brings_what_changed_and_leaves_alone_what_a_person_changed(changed, elsewhere):
    assert elsewhere.create("hail-s3") == "CREATE_COMPLETE"
    outputs, s3 = elsewhere.outputs("hail-s3"), elsewhere.client("s3")
    bucket, hail = outputs["NotebookBucket"], outputs["HailBucket"]
    s3.put_object(Bucket=bucket, Key=PERSONAL, Body=b"mine")
    s3.put_object(Bucket=bucket, Key="common-notebooks/own.ipynb", Body=b"mine too")
    before = elsewhere.objects(hail)
    assert elsewhere.update("hail-s3", packaged=changed) == "UPDATE_COMPLETE"

    expected = shipped("NotebookBucket")
    del expected[REMOVED]
    expected |= {"common-notebooks/new.ipynb": b"{}", NOTEBOOK: b'{"changed": true}', PERSONAL: b"mine"}
    expected["common-notebooks/own.ipynb"] = b"mine too"
    assert {key: elsewhere.content(bucket, key) for key in elsewhere.objects(bucket)} == expected
    after = elsewhere.objects(hail)
    assert {key for key in before | after if before.get(key) != after.get(key)} == {k for k in after if "seeds/" in k}
    seeding = f"2 uploaded, 8 unchanged, 1 removed, left alone: s3://{bucket}/{PERSONAL}"
    assert elsewhere.outputs("hail-s3")["Seeding"] == seeding
    assert elsewhere.outputs("hail-s3")["AssetsDigest"] in changed.read_text()
    assert elsewhere.parameters()["/hail/s3/assets"] == elsewhere.outputs("hail-s3")["NotebookDigest"]


@pytest.mark.parametrize("renamed", ["HailBucket", "NotebookBucket"])
def test_a_bucket_that_is_exchanged_is_seeded_and_the_other_one_is_still_known(changed, elsewhere, renamed):
    elsewhere.create("hail-s3")
    before = elsewhere.outputs("hail-s3")
    assert elsewhere.update("hail-s3", **{f"{renamed}Name": "another-bucket-for-hail"}) == "UPDATE_COMPLETE"
    after = elsewhere.outputs("hail-s3")
    assert after[renamed] == "another-bucket-for-hail" and after["Seeding"].endswith("left alone: nothing")
    # What was put into the old one stays there, as the bucket does.
    assert {key for key in elsewhere.objects(before[renamed]) if "seeds/" not in key} == set(shipped(renamed)) | (
        {"packer/packer.zip"} if renamed == "HailBucket" else set()
    )
    assert elsewhere.update("hail-s3", packaged=changed) == "UPDATE_COMPLETE"
    assert elsewhere.content(after["NotebookBucket"], NOTEBOOK) == b'{"changed": true}'
    assert elsewhere.outputs("hail-s3")["Seeding"].endswith("left alone: nothing")


def test_what_is_there_already_is_not_uploaded_again(system, outputs):
    bucket = outputs["hail-s3"]["HailBucket"]

    def versions():
        listed = system.client("s3").list_object_versions(Bucket=bucket)["Versions"]
        return sorted((found["Key"], found["VersionId"]) for found in listed)

    before = versions()
    assert system.update("hail-s3", packaged=with_digest(system, "a" * 64)) == "UPDATE_COMPLETE"
    assert system.outputs("hail-s3")["Seeding"] == "0 uploaded, 11 unchanged, 0 removed, left alone: nothing"
    assert system.update("hail-s3") == "UPDATE_COMPLETE"
    assert versions() == before


def test_a_deployment_without_a_change_asks_no_function(system):
    asked = len(system.aws.control("answers"))
    system.deploy("hail-s3", packaged=system.packages["hail-s3"])
    assert len(system.aws.control("answers")) == asked


def test_what_is_shipped_for_the_ami_alone_is_no_reason_to_restart_a_notebook(system):
    before = system.parameters()["/hail/s3/assets"]
    assert system.update("hail-s3", packaged=with_digest(system, "c" * 64)) == "UPDATE_COMPLETE"
    assert system.parameters()["/hail/s3/assets"] == before
    assert system.update("hail-s3") == "UPDATE_COMPLETE"


def test_new_assets_restart_a_running_notebook_and_leave_a_stopped_one(changed, system):
    sagemaker = system.client("sagemaker")

    def started():
        return sagemaker.describe_notebook_instance(NotebookInstanceName="ada")["LastModifiedTime"]

    before = started()
    system.update("hail-s3", packaged=changed)
    assert system.update("hail-jupyter") == "UPDATE_COMPLETE"
    assert system.outputs("hail-jupyter")["Refresh"] == "InService, restarted: true"
    assert started() > before

    sagemaker.stop_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: status(system) == "Stopped")
    system.update("hail-s3")
    assert system.update("hail-jupyter") == "UPDATE_COMPLETE"
    assert system.outputs("hail-jupyter")["Refresh"] == "Stopped, restarted: false"
    assert status(system) == "Stopped"
    sagemaker.start_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: status(system) == "InService")


def test_an_ami_that_was_built_again_makes_another_cluster_and_going_back_builds_none(system, published):
    ami = system.outputs("hail-ami")
    assert system.create("hail-emr", "renewed") == "CREATE_COMPLETE"
    first = system.outputs("renewed")
    assert system.update("hail-ami", RebuildToken="again") == "UPDATE_COMPLETE"
    rebuilt, builds = system.outputs("hail-ami"), len(system.builds())
    assert rebuilt["AmiId"] != ami["AmiId"]

    assert system.update("hail-emr", "renewed") == "UPDATE_COMPLETE"
    second = system.outputs("renewed")
    assert second["ClusterId"] != first["ClusterId"] and second["Steps"] == ", ".join(STEPS)
    clusters = [
        system.client("emr").describe_cluster(ClusterId=stack["ClusterId"])["Cluster"] for stack in (first, second)
    ]
    assert [cluster["CustomAmiId"] for cluster in clusters] == [ami["AmiId"], rebuilt["AmiId"]]
    assert clusters[0]["Status"]["State"].startswith("TERMINAT") and clusters[1]["Status"]["State"] == "WAITING"
    system.remove("renewed")

    assert system.update("hail-ami", RebuildToken="") == "UPDATE_COMPLETE"
    assert (system.outputs("hail-ami"), len(system.builds())) == (ami, builds)
    assert system.parameters()["/hail/ami/latest"] == ami["AmiId"]


def status(stacks):
    return stacks.client("sagemaker").describe_notebook_instance(NotebookInstanceName="ada")["NotebookInstanceStatus"]


# A Create that fails


def test_an_unknown_hail_version_is_refused_before_anything_is_built(system):
    before, builds = system.there(), len(system.builds())
    assert system.create("hail-ami", "refused", HailVersion="0.2.9") == "ROLLBACK_COMPLETE"
    (reason,) = system.reasons("refused")
    assert 'Ami: ' in reason and 'property HailVersion: "0.2.9" is not known to work here' in reason
    assert "the nearest versions that work together are HailVersion 0.2.131, EmrReleaseLabel emr-7.13.0" in reason
    system.remove("refused")
    assert (system.there(), len(system.builds())) == (before, builds)


def test_a_failed_build_is_told_with_its_phase_and_the_end_of_its_log(system):
    before, parameters = system.there(), system.parameters()
    log = [f"line {number}" for number in range(99)] + ["No package httpd available."]
    system.aws.control("builds", outcome="FAILED", phase="BUILD", log=log)
    assert system.create("hail-ami", "fails") == "ROLLBACK_COMPLETE"
    (reason,) = system.reasons("fails")
    assert "ended as FAILED in phase BUILD: Error while executing the commands of phase BUILD" in reason
    assert "No package httpd available." in reason and "line 98" in reason and "line 9\n" not in reason
    assert "console.aws.amazon.com/cloudwatch" in reason
    system.remove("fails")
    assert (system.there(), system.parameters()) == (before, parameters)


def test_a_failed_step_is_told_with_its_own_reason_and_log(system):
    before = system.there()
    system.aws.control("steps", fail={STEPS[1]: "httpd is not installed"})
    assert system.create("hail-emr", "fails") == "ROLLBACK_COMPLETE"
    (reason,) = system.reasons("fails")
    told = f'step "{STEPS[1]}" \\(s-[A-Z0-9]+\\) of cluster j-[A-Z0-9]+ is FAILED: httpd is not installed'
    assert re.search(told, reason)
    assert re.search(r"Its log: s3://\S+/stderr\.gz", reason)
    system.remove("fails")
    assert system.there() == before


def test_a_failed_seeding_names_the_object_and_takes_back_what_it_put(elsewhere):
    before = elsewhere.there()
    elsewhere.packages = {"hail-s3": with_statement(elsewhere, deny("s3:PutObject", "arn:aws:s3:::*/scripts/ssm"))}
    names = {"HailBucketName": "hail-of-ada", "LogBucketName": "logs-of-ada", "NotebookBucketName": "notebooks-of-ada"}
    assert elsewhere.create("hail-s3", **names) == "ROLLBACK_COMPLETE"
    (reason,) = elsewhere.reasons("hail-s3")
    assert "uploading s3://notebooks-of-ada/scripts/ssm failed: AccessDenied" in reason
    assert [elsewhere.objects(bucket) for bucket in names.values()] == [{}, {}, {}]
    elsewhere.remove("hail-s3")
    after = elsewhere.there()
    assert set(after.pop("buckets")) == {*before.pop("buckets"), *names.values()}
    assert after == before


# An Update that fails


def test_a_failed_build_of_an_update_leaves_the_published_ami_and_builds_no_other(system):
    before, outputs, parameters, builds = all_of_the_ami(system)
    system.aws.control("builds", outcome="FAILED", phase="PROVISIONING", log=[])
    assert system.update("hail-ami", RebuildToken="failing") == "UPDATE_ROLLBACK_COMPLETE"
    assert "ended as FAILED in phase PROVISIONING" in system.reasons("hail-ami")[-1]
    assert all_of_the_ami(system)[:3] == (before, outputs, parameters)
    (failed,) = [build["buildStatus"] for build in system.builds() if build["id"] not in builds]
    assert failed == "FAILED"


def test_an_update_to_an_unknown_hail_version_is_refused_and_nothing_changes(system):
    before = all_of_the_ami(system)
    assert system.update("hail-ami", HailVersion="9.9.9") == "UPDATE_ROLLBACK_COMPLETE"
    assert 'property HailVersion: "9.9.9" is not known to work here' in system.reasons("hail-ami")[-1]
    assert all_of_the_ami(system) == before


def all_of_the_ami(stacks):
    images = {image["ImageId"] for image in stacks.client("ec2").describe_images(Owners=["self"])["Images"]}
    builds = [build["id"] for build in stacks.builds()]
    return images, stacks.outputs("hail-ami"), stacks.parameters(), builds


def test_a_failed_step_of_an_update_leaves_the_cluster_and_its_other_steps(system):
    outputs = system.outputs("hail-emr")
    system.aws.control("steps", fail={"Hail: EFS mount": "mount target refuses"})
    assert system.update("hail-emr", EfsFileSystemId="fs-00000001") == "UPDATE_ROLLBACK_COMPLETE"
    assert 'step "Hail: EFS mount"' in system.reasons("hail-emr")[-1]
    assert "mount target refuses" in system.reasons("hail-emr")[-1]
    assert system.outputs("hail-emr") == outputs
    steps = system.client("emr").list_steps(ClusterId=outputs["ClusterId"])["Steps"]
    assert [step["Name"] for step in steps].count(STEPS[0]) == 1
    cluster = system.client("emr").describe_cluster(ClusterId=outputs["ClusterId"])["Cluster"]
    assert cluster["Status"]["State"] == "WAITING"


def test_a_failed_seeding_of_an_update_brings_back_what_was_there(changed, elsewhere):
    elsewhere.create("hail-s3")
    outputs, s3 = elsewhere.outputs("hail-s3"), elsewhere.client("s3")
    bucket, role = outputs["NotebookBucket"], elsewhere.resource("hail-s3", "SeedBucketsRole")
    s3.put_object(Bucket=bucket, Key=PERSONAL, Body=b"mine")
    before = {key: elsewhere.content(bucket, key) for key in elsewhere.objects(bucket)}
    policy = {"Version": "2012-10-17", "Statement": [deny("s3:PutObject", f"arn:aws:s3:::{bucket}/*/new.ipynb")]}
    elsewhere.client("iam").put_role_policy(RoleName=role, PolicyName="More", PolicyDocument=json.dumps(policy))
    assert elsewhere.update("hail-s3", packaged=changed) == "UPDATE_ROLLBACK_COMPLETE"
    assert f"uploading s3://{bucket}/common-notebooks/new.ipynb failed: AccessDenied" in elsewhere.reasons("hail-s3")[0]
    assert {key: elsewhere.content(bucket, key) for key in elsewhere.objects(bucket)} == before
    assert elsewhere.outputs("hail-s3")["AssetsDigest"] == assets_digest.digest()
    assert elsewhere.parameters()["/hail/s3/assets"] == outputs["NotebookDigest"]


# Delete


def test_deleting_all_four_leaves_the_buckets_with_what_people_put_there_and_nothing_else(elsewhere):
    before, s3 = elsewhere.there(), elsewhere.client("s3")
    assert [elsewhere.create(name) for name in NAMES] == ["CREATE_COMPLETE"] * 4
    outputs = {name: elsewhere.outputs(name) for name in NAMES}
    buckets = [outputs["hail-s3"][name] for name in ("HailBucket", "LogBucket", "NotebookBucket")]
    ami = outputs["hail-ami"]["AmiId"]
    mine = {buckets[0]: ["data.vcf"], buckets[1]: []}
    mine[buckets[2]] = ["ada/own.ipynb", "common-notebooks/own.ipynb", PERSONAL]
    for bucket, keys in mine.items():
        for key in keys:
            s3.put_object(Bucket=bucket, Key=key, Body=b"mine")
    for name in reversed(NAMES):
        elsewhere.remove(name)
        assert name in {stack["StackName"] for stack in deleted(elsewhere)}
    assert {bucket: sorted(elsewhere.objects(bucket)) for bucket in buckets} == mine
    assert elsewhere.content(buckets[2], PERSONAL) == b"mine"
    assert elsewhere.client("ec2").describe_images(ImageIds=[ami])["Images"]
    after = elsewhere.there()
    assert set(after.pop("buckets")) - set(before.pop("buckets")) == set(buckets)
    assert after == before


def deleted(stacks):
    listed = stacks.client("cloudformation").list_stacks(StackStatusFilter=["DELETE_COMPLETE"])
    return listed["StackSummaries"]


# Bad input


@pytest.mark.parametrize(
    "name, bad, sentence",
    [
        ("hail-s3", {"HailBucketName": "Not_Good"}, "HailBucketName.* should be empty or the name of a bucket"),
        ("hail-s3", {"LogBucketName": "ab"}, "LogBucketName.* 3 to 63 lower-case letters, digits and hyphens"),
        ("hail-s3", {"NotebookBucketName": "xn--a"}, "NotebookBucketName.* none of S3's reserved prefixes"),
        ("hail-s3", {"HailBucketName": "a-b", "LogBucketName": "a-b"}, "HailBucketName and LogBucketName are the same"),
        ("hail-s3", {"CreateLogBucket": "false"}, "CreateLogBucket is false and LogBucketName is empty"),
        ("hail-s3", {"KmsKeyArn": "alias/hail"}, "KmsKeyArn.* should be empty or the ARN of a key"),
        ("hail-ami", {"VepVersion": "latest"}, "VepVersion.* should be none or a number, such as 115"),
        ("hail-ami", {"HailVersion": "a b"}, "HailVersion.* should be three numbers with dots between them, such as"),
        ("hail-ami", {"AmisToKeep": "1"}, "AmisToKeep is 1; it should be 0 or at least 2"),
        ("hail-ami", {"KmsKeyArn": "alias/hail"}, "KmsKeyArn.* should be empty or the ARN of a KMS key"),
        ("hail-ami", {"SubnetId": "subnet-12345678"}, "subnet-12345678 for parameter name SubnetId does not exist"),
        ("hail-jupyter", {"NotebookInstanceName": "scripts"}, "NotebookInstanceName is the name of a shared folder"),
        ("hail-emr", {"CoreInstanceCount": "0"}, "CoreInstanceCount.* should be 1 to 1000"),
        ("hail-emr", {"EfsFileSystemId": "efs"}, "EfsFileSystemId.* should be empty or the id of a file system"),
    ],
)
def test_a_bad_value_is_refused_with_what_it_should_have_been(system, name, bad, sentence):
    with pytest.raises(ClientError, match=sentence):
        system.create(name, "bad-input", **bad)


@pytest.mark.parametrize("name", ["hail-jupyter", "hail-ami", "hail-emr"])
def test_a_subnet_outside_the_vpc_is_refused(system, name):
    ec2 = system.client("ec2")
    other = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    try:
        with pytest.raises(Failed, match="SubnetId is not in VpcId; it should be one of that VPC's subnets"):
            system.deploy(name, "bad-input", packaged=system.packages[name], **{**system.needed(name), "VpcId": other})
    finally:
        ec2.delete_vpc(VpcId=other)


# Across stacks


def test_packer_zip_is_the_same_to_the_byte_whoever_seeds_it(system, outputs, elsewhere):
    elsewhere.create("hail-s3", "another-name")
    zips = [
        stacks.content(stacks.outputs(stack)["HailBucket"], "packer/packer.zip")
        for stacks, stack in ((system, "hail-s3"), (elsewhere, "another-name"))
    ]
    assert zips[0] == zips[1]
