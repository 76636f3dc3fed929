"""The local AWS keeps its promises, and every private name of MiniStack that it relies on still means what it did.

A test that fails after MiniStack was upgraded names the seam that moved.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from local_aws import ACCOUNT, REGION, LocalAws, running

# A function that does what the custom resource's properties (or the event) tell it.
BOOTSTRAP = f"#!{sys.executable}\n" + textwrap.dedent(
    """
    import json, os, time, urllib.request, urllib.error
    api = f"http://{os.environ['AWS_LAMBDA_RUNTIME_API']}/2018-06-01/runtime/invocation"
    calls = 0
    while True:
        with urllib.request.urlopen(f"{api}/next") as answer:
            request_id, event = answer.headers["Lambda-Runtime-Aws-Request-Id"], json.load(answer)
        calls += 1
        print("event", json.dumps(event), flush=True)
        wanted = event.get("ResourceProperties", event)
        if wanted.get("Fail") and calls <= int(wanted["Fail"]):
            urllib.request.urlopen(f"{api}/{request_id}/error", b'{"errorType": "Asked", "errorMessage": "to fail"}')
            continue
        if "ResponseURL" in event and wanted.get("Answers", "1") != "0":
            body = {key: event[key] for key in ("StackId", "RequestId", "LogicalResourceId")}
            reason = "asked to fail"
            if wanted.get("Reads") and event["RequestType"] == "Create":
                import boto3
                try:
                    boto3.client("s3").get_object(Bucket="functions", Key=wanted["Reads"])
                except Exception as problem:
                    wanted, reason = wanted | {"Status": "FAILED"}, str(problem)
            failed = wanted.get("Status") == "FAILED" and event["RequestType"] == wanted.get("On", "Create")
            body |= {"Status": "FAILED" if failed else "SUCCESS", "Reason": reason}
            pad = int(wanted.get("Pad", 0)) if event["RequestType"] == "Create" else 0
            body |= {"PhysicalResourceId": wanted.get("Id") or event.get("PhysicalResourceId", "made"), "Data": {
                "Calls": str(calls), "Event": event["RequestType"], "Pad": "x" * pad,
                "Environment": ",".join(sorted(os.environ)), "Stream": os.environ["AWS_LAMBDA_LOG_STREAM_NAME"]}}
            for kind in wanted.get("ContentTypes", [""] * int(wanted.get("Answers", "1"))):
                put = urllib.request.Request(event["ResponseURL"], json.dumps(body).encode(), {"Content-Type": kind})
                put.method = "PUT"
                try:
                    urllib.request.urlopen(put)
                except urllib.error.HTTPError as refused:
                    print("refused", refused.code, flush=True)
        time.sleep(float(wanted.get("Linger", 0)))
        urllib.request.urlopen(f"{api}/{request_id}/response", json.dumps({"environment": dict(os.environ)}).encode())
    """
)


@pytest.fixture(scope="module")
def aws(tmp_path_factory):
    with LocalAws(tmp_path_factory.mktemp("aws")) as running_aws:
        yield running_aws


@pytest.fixture(autouse=True)
def as_always(request):
    """Every test meets the default behaviour."""
    if "aws" in request.fixturenames:
        request.getfixturevalue("aws").control("reset")


@pytest.fixture
def client(aws):
    return lambda service, **keys: boto3_client(aws, service, **keys)


def boto3_client(aws, service, **keys):
    names = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
    own = {name: aws.environment[variable] for name, variable in names.items()}
    return boto3.client(service, endpoint_url=aws.endpoint, region_name=REGION, **(own | keys))


@pytest.fixture
def stack(aws, request):
    """Creates or updates a stack named after the test; it is deleted in the end."""
    cloudformation = boto3_client(aws, "cloudformation")
    name = re.sub("[^a-z]", "-", request.node.originalname)[:60]

    def deploy(resources, **sections):
        template = {"Resources": resources, **sections}
        operation = cloudformation.update_stack if deploy.there else cloudformation.create_stack
        operation(StackName=name, TemplateBody=json.dumps(template), Capabilities=["CAPABILITY_IAM"])
        deploy.there = True
        return cloudformation.describe_stacks(StackName=name)["Stacks"][0]

    deploy.there, deploy.named = False, name
    deploy.events = lambda: cloudformation.describe_stack_events(StackName=name)["StackEvents"]
    deploy.reasons = lambda: " ".join(event.get("ResourceStatusReason", "") for event in deploy.events())
    yield deploy
    cloudformation.delete_stack(StackName=name)


@pytest.fixture
def function(aws):
    """The resources of a function that does as it is told."""
    s3 = boto3_client(aws, "s3")
    s3.create_bucket(Bucket="functions")

    def resources(bootstrap=BOOTSTRAP, policies=(), **properties):
        package = io.BytesIO()
        with zipfile.ZipFile(package, "w") as archive:
            archive.writestr("bootstrap", bootstrap)
        s3.put_object(Bucket="functions", Key="function.zip", Body=package.getvalue())
        return {
            "Role": role(
                "lambda", statement(["logs:CreateLogStream", "logs:PutLogEvents"], get("Log", "Arn")), *policies
            ),
            "Log": {"Type": "AWS::Logs::LogGroup"},
            "Function": {
                "Type": "AWS::Lambda::Function",
                "Properties": {
                    "Runtime": "provided.al2023",
                    "Handler": "bootstrap",
                    "Architectures": ["arm64"],
                    "Code": {"S3Bucket": "functions", "S3Key": "function.zip"},
                    "Role": get("Role", "Arn"),
                    "LoggingConfig": {"LogGroup": ref("Log")},
                    "Timeout": 20,
                    **properties,
                },
            },
        }

    return resources


def ref(name):
    return {"Ref": name}


def get(name, attribute):
    return {"Fn::GetAtt": [name, attribute]}


def statement(actions, resource="*"):
    return {"Effect": "Allow", "Action": actions, "Resource": resource}


def role(service, *statements):
    """A role that the service may assume."""
    properties = {
        "AssumeRolePolicyDocument": {
            "Version": "2012-10-17",
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": f"{service}.amazonaws.com"},
                    "Action": "sts:AssumeRole",
                }
            ],
        }
    }
    if statements:
        document = {"Version": "2012-10-17", "Statement": list(statements)}
        properties["Policies"] = [{"PolicyName": "Own", "PolicyDocument": document}]
    return {"Type": "AWS::IAM::Role", "Properties": properties}


def custom(**properties):
    return {
        "Type": "Custom::Thing",
        "DependsOn": ["Function", "Log"],
        "Properties": {"ServiceToken": get("Function", "Arn"), "ServiceTimeout": 10, **properties},
    }


def eventually(question, seconds=10):
    """The first true answer."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if answer := question():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s")


def processes(text, file="cmdline"):
    """The ids of the processes whose command line (or another file below /proc) contains the text."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text in (directory / file).read_bytes().decode():
                found.append(int(directory.name))
        except OSError:  # it has ended
            pass
    return found


# The server


def test_it_listens_on_127_0_0_1_only(aws):
    server = running(aws.folder)["pid"]
    sockets = {os.readlink(file) for file in Path(f"/proc/{server}/fd").iterdir() if file.is_symlink()}
    listening = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in sockets and (table.startswith("udp") or fields[3] == "0A"):
                listening.append(fields[1].split(":")[0])
    assert listening == ["0100007F"]


def test_two_run_at_once_and_know_nothing_of_each_other(aws, tmp_path):
    with LocalAws(tmp_path) as other:
        boto3_client(other, "s3").create_bucket(Bucket="only-in-the-other")
        assert other.endpoint != aws.endpoint
        assert "only-in-the-other" not in str(boto3_client(aws, "s3").list_buckets())


def test_a_folder_has_one_at_a_time(aws):
    with pytest.raises(RuntimeError, match="one runs there already"):
        LocalAws(aws.folder).start()


def test_it_ends_with_the_process_it_was_started_for_and_takes_its_functions_along(tmp_path):
    program = "import os, sys, time; from local_aws import LocalAws; LocalAws(sys.argv[1]).start(os.getpid())"
    program += "; print('started', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=environment, stdout=subprocess.PIPE)
    parent.stdout.readline()
    server = running(tmp_path)["pid"]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    eventually(lambda: not Path(f"/proc/{server}").exists())
    assert running(tmp_path) is None


@pytest.mark.parametrize("ending", ["stop", "kill -9"])
def test_its_functions_end_with_it(tmp_path, ending):
    aws = LocalAws(tmp_path)
    aws.start(os.getpid())
    invoke_forever(aws)
    function = str(tmp_path / "tmp")
    assert eventually(lambda: len(processes(function)) > 0)
    if ending == "stop":
        aws.stop()
    else:
        os.kill(running(tmp_path)["pid"], signal.SIGKILL)
    eventually(lambda: not processes(function))


def invoke_forever(aws):
    """Creates a function in the server and invokes it without waiting for an answer."""
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("bootstrap", BOOTSTRAP)
    trust = role("lambda")["Properties"]["AssumeRolePolicyDocument"]
    made = boto3_client(aws, "iam").create_role(RoleName="forever", AssumeRolePolicyDocument=json.dumps(trust))
    functions = boto3_client(aws, "lambda")
    functions.create_function(
        FunctionName="forever",
        Runtime="provided.al2023",
        Handler="bootstrap",
        Role=made["Role"]["Arn"],
        Code={"ZipFile": package.getvalue()},
    )
    functions.invoke(FunctionName="forever", InvocationType="Event", Payload=b"{}")


def test_it_writes_below_its_folder_only(tmp_path, tmp_path_factory):
    marker = tmp_path / "marker"
    marker.touch()
    with LocalAws(tmp_path / "aws") as aws:
        invoke_forever(aws)
        eventually(lambda: processes(str(tmp_path / "aws" / "tmp")))
    # The names that MiniStack gives its files and folders, where a program would put them, and compiled Python.
    usual = [str(place) for place in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path.home()) if place.exists()]
    own = ["-not", "-path", f"{tmp_path_factory.getbasetemp()}/*", "-newer", marker]
    strays = subprocess.run(["find", *usual, "-maxdepth", "3", *own, "-path", "*ministack*"], capture_output=True)
    assert strays.stdout == b""
    compiled = subprocess.run(
        ["find", Path(__file__).parent / "local_aws", *own, "-name", "*.pyc"], capture_output=True
    )
    assert compiled.stdout == b""


def test_the_environment_leads_nowhere_else(aws, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "real")
    with LocalAws(aws.folder.parent / "other") as other:
        assert "AWS_PROFILE" not in other.environment
        identity = subprocess.run(["aws", "sts", "get-caller-identity"], env=other.environment, capture_output=True)
        assert json.loads(identity.stdout)["Account"] == ACCOUNT


def shell(command, folder):
    """Runs a shell command with `local_aws` at hand and without the AWS variables of the local AWS."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "FOLDER": str(folder),
        "PYTHON": sys.executable,
    }
    return subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)


def test_it_is_started_used_and_stopped_from_a_shell(tmp_path):
    used = shell(
        "$PYTHON -m local_aws start --folder $FOLDER && . $FOLDER/env && aws s3 mb s3://from-a-shell", tmp_path
    )
    assert "make_bucket: from-a-shell" in used.stdout, used.stderr
    assert shell("$PYTHON -m local_aws stop --folder $FOLDER", tmp_path).returncode == 0
    assert running(tmp_path) is None
    assert "no local AWS runs" in shell("$PYTHON -m local_aws stop --folder $FOLDER", tmp_path).stderr


def test_a_command_runs_with_one_of_its_own_and_its_exit_code_is_kept(tmp_path):
    done = shell('$PYTHON -m local_aws run --folder $FOLDER -- bash -c "aws sts get-caller-identity; exit 7"', tmp_path)
    assert (done.returncode, json.loads(done.stdout)["Account"]) == (7, ACCOUNT)
    assert running(tmp_path) is None


def test_the_control_api_refuses_what_it_does_not_know(aws):
    with pytest.raises(ValueError, match="builds has no setting minutes"):
        aws.control("builds", minutes=3)
    with pytest.raises(ValueError, match="weather: not one of builds"):
        aws.control("weather")


# Functions


def test_a_function_has_what_lambda_gives_and_nothing_of_the_server(stack, function):
    done = stack(
        function(Environment={"Variables": {"OWN": "1"}}) | {"Thing": custom()}, Outputs=outputs("Environment")
    )
    names = set(done["Outputs"][0]["OutputValue"].split(",")) - {"LC_CTYPE"}  # Python sets that one itself
    assert names == set(
        "PATH LANG TZ OWN _HANDLER LAMBDA_TASK_ROOT LAMBDA_RUNTIME_DIR AWS_REGION AWS_DEFAULT_REGION "
        "AWS_LAMBDA_RUNTIME_API AWS_LAMBDA_INITIALIZATION_TYPE AWS_LAMBDA_FUNCTION_NAME "
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE AWS_LAMBDA_FUNCTION_VERSION AWS_LAMBDA_LOG_GROUP_NAME "
        "AWS_LAMBDA_LOG_STREAM_NAME AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_ENDPOINT_URL".split()
    )


def outputs(*attributes):
    return {attribute: {"Value": get("Thing", attribute)} for attribute in attributes}


def test_a_functions_log_is_in_the_stream_that_it_knows(stack, function, client, aws):
    done = stack(function() | {"Thing": custom()}, Outputs=outputs("Stream") | {"Group": {"Value": ref("Log")}})
    values = {output["OutputKey"]: output["OutputValue"] for output in done["Outputs"]}
    logs = client("logs").get_log_events(logGroupName=values["Group"], logStreamName=values["Stream"])["events"]
    assert any("RequestType" in line["message"] for line in logs)
    assert aws.control("refused") == []


def test_a_role_without_log_permissions_leaves_no_log(stack, function, aws):
    resources = function()
    del resources["Role"]["Properties"]["Policies"]
    stack(resources | {"Thing": custom()})
    assert eventually(lambda: aws.control("refused"))[0]["Lacks"] == "logs:CreateLogStream"


@pytest.mark.parametrize(
    ("bootstrap", "properties", "reason"),
    [
        (
            b"\x7fELF" + bytes(14) + b"\xb7\0",
            {"Architectures": ["x86_64"]},
            "is built for arm64, but it declares x86_64",
        ),
        (
            b"\x7fELF" + bytes(14) + b"\x3e\0",
            {"Architectures": ["arm64"]},
            "is built for x86_64, but it declares arm64",
        ),
        (
            b"\x7fELF" + bytes(14) + b"\xb7\0",
            {"Architectures": ["arm64"]},
            "machine cannot run a bootstrap that is built",
        ),
        (b"print()", {}, "neither an ELF executable nor a script"),
        (b"", {"Runtime": "python3.12"}, "runs provided.\\* functions only"),
    ],
)
def test_a_function_that_cannot_run_is_refused(stack, function, bootstrap, properties, reason):
    if "cannot run" in reason and os.uname().machine == "aarch64":
        pytest.skip("this machine can run it")
    assert stack(function(bootstrap, **properties))["StackStatus"] == "ROLLBACK_COMPLETE"
    assert re.search(reason, stack.reasons())


def test_a_function_may_not_do_what_its_role_may_not(stack, function):
    assert stack(function() | {"Thing": custom(Reads="function.zip")})["StackStatus"] == "ROLLBACK_COMPLETE"
    assert re.search(r"AccessDenied.*assumed-role/.* is not authorized to perform: s3:GetObject", stack.reasons())


def test_a_function_may_do_what_its_role_may(stack, function):
    allowed = statement("s3:GetObject", "arn:aws:s3:::functions/*")
    done = stack(function(policies=[allowed]) | {"Thing": custom(Reads="function.zip")})
    assert done["StackStatus"] == "CREATE_COMPLETE", stack.reasons()


def test_a_role_that_lambda_may_not_assume_is_refused(stack, function):
    assert stack(function() | {"Role": role("ec2")})["StackStatus"] == "ROLLBACK_COMPLETE"
    assert "cannot be assumed by Lambda" in stack.reasons()


def test_a_function_that_is_deleted_finishes_and_is_not_run_again(stack, function, client, aws):
    done = stack(function() | {"Thing": custom(Linger="1")}, Outputs={"Name": {"Value": ref("Function")}})
    own = f"AWS_LAMBDA_FUNCTION_NAME={done['Outputs'][0]['OutputValue']}\0"
    client("cloudformation").delete_stack(StackName=stack.named)
    assert processes(own, "environ") != []
    eventually(lambda: processes(own, "environ") == [])
    assert [asked["Answers"] for asked in aws.control("answers")] == [1, 1]


# Custom resources


def test_a_stack_operation_is_answered_when_the_stack_has_settled(stack, function):
    assert stack(function() | {"Thing": custom()})["StackStatus"] == "CREATE_COMPLETE"
    assert stack(function() | {"Thing": custom(Changed=1)})["StackStatus"] == "UPDATE_COMPLETE"


def test_the_cli_deploys_in_seconds_and_progress_is_seen_meanwhile(aws, function, client, tmp_path):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"Resources": function() | {"Thing": custom(Answers="0", ServiceTimeout=2)}}))
    command = ["aws", "cloudformation", "deploy", "--stack-name", "Cli", "--capabilities", "CAPABILITY_IAM"]
    began = time.monotonic()
    deploy = subprocess.Popen([*command, "--template-file", template], env=aws.environment, stderr=subprocess.PIPE)
    cloudformation = client("cloudformation")

    def waiting():
        try:
            seen = cloudformation.describe_stack_events(StackName="Cli")["StackEvents"]
        except ClientError:
            return False
        return [e for e in seen if (e["LogicalResourceId"], e["ResourceStatus"]) == ("Thing", "CREATE_IN_PROGRESS")]

    assert eventually(waiting)
    assert deploy.wait() != 0
    deploy.stderr.close()
    assert time.monotonic() - began < 20
    cloudformation.delete_stack(StackName="Cli")


def test_a_request_has_what_aws_sends(stack, function, aws, client):
    done = stack(function() | {"Thing": custom(Number=3, Yes=True)}, Outputs={"Group": {"Value": ref("Log")}})
    sent = logged(client, done["Outputs"][0]["OutputValue"])[0]
    assert set(sent) == set(
        "RequestType ServiceToken ResponseURL StackId RequestId LogicalResourceId ResourceType "
        "ResourceProperties".split()
    )
    assert sent["ResourceProperties"] | {"ServiceToken": ""} == {
        "ServiceToken": "", "ServiceTimeout": "10", "Number": "3", "Yes": "true",
    }  # fmt: skip
    assert "X-Amz-Signature=" in sent["ResponseURL"]


def logged(client, group):
    """The events that the function wrote into its log."""
    logs = client("logs")
    lines = logs.filter_log_events(logGroupName=group)["events"]
    return [json.loads(line["message"][6:]) for line in lines if line["message"].startswith("event ")]


def test_an_answer_with_a_content_type_is_refused(stack, function, aws):
    thing = custom(ContentTypes=["application/json", ""])
    assert stack(function() | {"Thing": thing})["StackStatus"] == "CREATE_COMPLETE"
    asked = aws.control("answers")[-1]
    assert (asked["Refused"], asked["Answers"]) == (1, 1)


def test_an_answer_of_more_than_4096_bytes_fails(stack, function):
    assert stack(function() | {"Thing": custom(Pad=5000)})["StackStatus"] == "ROLLBACK_COMPLETE"
    assert "Response object is too long." in stack.reasons()


def test_a_second_answer_is_seen(stack, function, aws):
    stack(function() | {"Thing": custom(Answers="2")})
    (asked,) = aws.control("answers")
    assert (asked["LogicalResourceId"], asked["RequestType"]) == ("Thing", "Create")
    assert (asked["Answers"], asked["Last"]["Status"]) == (2, "SUCCESS")


def test_an_unknown_pre_signed_url_is_refused(aws):
    put = urllib.request.Request(f"{aws.endpoint}/_hail/response/unknown?X-Amz-Signature=0", b"{}", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(put)


def test_a_function_that_fails_is_invoked_again_with_the_same_request(stack, function, aws):
    done = stack(function() | {"Thing": custom(Fail="2")}, Outputs=outputs("Calls"))
    assert done["Outputs"][0]["OutputValue"] == "3"
    assert len(aws.control("answers")) == 1


def test_a_stack_whose_creation_was_rolled_back_is_not_updated(stack, function):
    failing = {**function(), "Thing": custom(Status="FAILED")}
    assert stack(failing)["StackStatus"] == "ROLLBACK_COMPLETE"
    with pytest.raises(ClientError, match="is in ROLLBACK_COMPLETE state and can not be updated"):
        stack(failing)


def test_a_failed_create_is_followed_by_a_delete_of_what_it_answered(stack, function, aws):
    assert stack(function() | {"Thing": custom(Status="FAILED", Id="half-made")})["StackStatus"] == "ROLLBACK_COMPLETE"
    assert "Message returned: asked to fail" in stack.reasons()
    create, delete = aws.control("answers")
    assert (delete["RequestType"], delete["PhysicalResourceId"]) == ("Delete", "half-made")


def test_a_create_without_an_answer_fails_in_time_and_is_followed_by_a_delete(stack, function, aws):
    silent = function() | {"Thing": custom(Answers="0", ServiceTimeout=1)}
    assert stack(silent)["StackStatus"] == "ROLLBACK_FAILED"
    assert "did not receive a response" in stack.reasons()
    assert [asked["RequestType"] for asked in aws.control("answers")] == ["Create", "Delete"]


def test_a_resource_that_an_update_adds_and_that_fails_is_deleted_and_the_rest_kept(stack, function, aws):
    stack(function() | {"Thing": custom()})
    added = function() | {"Thing": custom(), "Other": custom(Status="FAILED", Id="other")}
    assert stack(added)["StackStatus"] == "UPDATE_ROLLBACK_COMPLETE"
    asked = [(one["LogicalResourceId"], one["RequestType"]) for one in aws.control("answers")]
    assert asked == [("Thing", "Create"), ("Other", "Create"), ("Other", "Delete")]


def test_a_new_physical_id_is_followed_by_a_delete_of_the_old_one(stack, function, aws):
    stack(function() | {"Thing": custom(Id="one")})
    stack(function() | {"Thing": custom(Id="two")})
    last = aws.control("answers")[-1]
    assert (last["RequestType"], last["PhysicalResourceId"]) == ("Delete", "one")


def test_missing_data_of_a_custom_resource_fails_what_asks_for_it(stack, function):
    parameter = {"Type": "AWS::SSM::Parameter", "Properties": {"Type": "String", "Value": get("Thing", "Nothing")}}
    assert stack(function() | {"Thing": custom(), "Parameter": parameter})["StackStatus"] == "ROLLBACK_COMPLETE"


# What a template may say

QUEUE = {"Type": "AWS::Logs::LogGroup"}


@pytest.mark.parametrize(
    ("resource", "reason"),
    [
        (
            {"Type": "AWS::Logs::LogGroup", "Properties": {"KmsKeyId": "x"}},
            "does not apply KmsKeyId of AWS::Logs::LogGroup",
        ),
        ({"Type": "AWS::SQS::Queue"}, "was not checked for AWS::SQS::Queue"),
        ({"Type": "AWS::No::Type"}, "Unrecognized resource types: .AWS::No::Type"),
        ({"Type": "AWS::EMR::Cluster", "Properties": {"Steps": [], "Kerberos": 1}}, "does not apply Kerberos of"),
    ],
)
def test_a_property_or_type_that_is_not_applied_is_refused(stack, resource, reason):
    with pytest.raises(ClientError, match=reason):
        stack({"Thing": resource})


@pytest.mark.parametrize(
    ("definition", "value", "reason"),
    [
        ({"Type": "String", "AllowedValues": ["a", "b"]}, "c", "AllowedValues"),
        ({"Type": "Number", "MinValue": 1}, "0", "not less than 1"),
        ({"Type": "Number", "MaxValue": 9}, "10", "not greater than 9"),
        ({"Type": "String", "AllowedPattern": "[a-z]+"}, "A", "must match pattern"),
        ({"Type": "AWS::EC2::Subnet::Id"}, "subnet-0", "subnet-0 for parameter name Given does not exist"),
        ({"Type": "AWS::EC2::VPC::Id"}, "vpc-0", "vpc-0 for parameter name Given does not exist"),
        ({"Type": "AWS::SSM::Parameter::Value<String>"}, "/none", "'/none' does not exist"),
    ],
)
def test_a_parameter_that_is_not_allowed_is_refused(client, definition, value, reason):
    template = {"Parameters": {"Given": definition}, "Resources": {"Thing": QUEUE}}
    given = [{"ParameterKey": "Given", "ParameterValue": value}]
    with pytest.raises(ClientError, match=reason):
        client("cloudformation").create_stack(StackName="No", TemplateBody=json.dumps(template), Parameters=given)


def network(client):
    """The default VPC, one of its subnets, and a subnet of another VPC."""
    ec2 = client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    subnet = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"][0]["SubnetId"]
    other = ec2.create_vpc(CidrBlock="10.9.0.0/16")["Vpc"]["VpcId"]
    return vpc, subnet, ec2.create_subnet(VpcId=other, CidrBlock="10.9.1.0/24")["Subnet"]["SubnetId"]


def test_a_rule_sees_that_a_subnet_is_outside_the_vpc(client):
    vpc, inside, outside = network(client)
    assertion = {
        "Assert": {"Fn::Contains": [[ref("VpcId")], {"Fn::ValueOf": ["SubnetId", "VpcId"]}]},
        "AssertDescription": "SubnetId is not in VpcId",
    }
    template = json.dumps(
        {
            "Parameters": {"VpcId": {"Type": "AWS::EC2::VPC::Id"}, "SubnetId": {"Type": "AWS::EC2::Subnet::Id"}},
            "Rules": {"SubnetInVpc": {"Assertions": [assertion]}},
            "Resources": {"Thing": QUEUE},
        }
    )

    def create(subnet):
        given = {"VpcId": vpc, "SubnetId": subnet}
        parameters = [{"ParameterKey": key, "ParameterValue": value} for key, value in given.items()]
        client("cloudformation").create_stack(StackName="Rules", TemplateBody=template, Parameters=parameters)

    with pytest.raises(ClientError, match="SubnetId is not in VpcId"):
        create(outside)
    create(inside)


def test_a_function_in_conditions_that_is_not_evaluated_is_refused(stack):
    with pytest.raises(ClientError, match="does not evaluate Fn::Join in Conditions"):
        stack({"Thing": QUEUE}, Conditions={"Is": {"Fn::Equals": [{"Fn::Join": ["", ["a"]]}, "a"]}})


def test_the_create_only_properties_are_those_of_the_published_schemas():
    from cfnlint.schema.manager import PROVIDER_SCHEMA_MANAGER

    # The extension patches MiniStack in its own process; here only its constants are of interest.
    sys.path.insert(0, str(Path(__file__).parent))
    from local_aws import ec2, emr, sagemaker

    def published(kind):
        schema = PROVIDER_SCHEMA_MANAGER.get_resource_schema(REGION, kind).schema
        names = {name.removeprefix("/properties/") for name in schema["createOnlyProperties"]}
        return names, set(schema["properties"])

    for kind, ours, replacing in (
        (emr.TYPE, emr.PROPERTIES, set(emr.PROPERTIES.split()) - emr.IN_PLACE - {"Instances"}),
        (sagemaker.NOTEBOOK, sagemaker.TYPES[sagemaker.NOTEBOOK], set(sagemaker.REPLACING[sagemaker.NOTEBOOK].split())),
        (
            sagemaker.LIFECYCLE,
            sagemaker.TYPES[sagemaker.LIFECYCLE],
            set(sagemaker.REPLACING[sagemaker.LIFECYCLE].split()),
        ),
        *((kind, names, set(names.split()) - {"Description"}) for kind, names in ec2.TYPES.items()),
    ):
        create_only, known = published(kind)
        assert set(ours.split()) <= known, kind
        assert replacing == create_only & set(ours.split()), kind


# Permissions

PASS = {
    "Effect": "Allow",
    "Action": "iam:PassRole",
    "Resource": "*",
    "Condition": {"StringEquals": {"iam:PassedToService": "scheduler.amazonaws.com"}},
}


@pytest.fixture
def as_role(client):
    """A client with the credentials of a role that has these statements."""
    iam, sts = client("iam"), client("sts")

    def assume(service, *statements, name="caller"):
        trust = {"Effect": "Allow", "Principal": {"AWS": ACCOUNT}, "Action": "sts:AssumeRole"}
        document = json.dumps({"Version": "2012-10-17", "Statement": [trust]})
        try:
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=document)
        except iam.exceptions.EntityAlreadyExistsException:
            pass
        policy = {"Version": "2012-10-17", "Statement": list(statements)}
        iam.put_role_policy(RoleName=name, PolicyName="own", PolicyDocument=json.dumps(policy))
        keys = sts.assume_role(RoleArn=f"arn:aws:iam::{ACCOUNT}:role/{name}", RoleSessionName="test")["Credentials"]
        names = {"AccessKeyId": "aws_access_key_id", "SecretAccessKey": "aws_secret_access_key"}
        names["SessionToken"] = "aws_session_token"
        return client(service, **{names[key]: keys[key] for key in names})

    return assume


@pytest.fixture
def service_role(client):
    """The ARN of a role that the service may assume."""
    iam = client("iam")

    def make(service, *statements):
        name = f"for-{service}"
        trust = json.dumps(role(service)["Properties"]["AssumeRolePolicyDocument"])
        try:
            iam.create_role(RoleName=name, AssumeRolePolicyDocument=trust)
        except iam.exceptions.EntityAlreadyExistsException:
            pass
        policy = {"Version": "2012-10-17", "Statement": list(statements) or [statement("none:None")]}
        iam.put_role_policy(RoleName=name, PolicyName="own", PolicyDocument=json.dumps(policy))
        return f"arn:aws:iam::{ACCOUNT}:role/{name}"

    return make


def arn(service, resource):
    return f"arn:aws:{service}:{REGION}:{ACCOUNT}:{resource}"


@pytest.mark.parametrize(
    ("service", "operation", "arguments", "action", "resource"),
    [
        (
            "sagemaker",
            "stop_notebook_instance",
            {"NotebookInstanceName": "ada"},
            "StopNotebookInstance",
            "notebook-instance/ada",
        ),
        ("codebuild", "batch_get_builds", {"ids": ["ami:1"]}, "BatchGetBuilds", "project/ami"),
        ("codebuild", "batch_get_projects", {"names": ["ami"]}, "BatchGetProjects", "project/ami"),
        ("codebuild", "stop_build", {"id": "ami:1"}, "StopBuild", "project/ami"),
        ("codebuild", "list_builds_for_project", {"projectName": "ami"}, "ListBuildsForProject", "project/ami"),
        ("emr", "list_steps", {"ClusterId": "j-1"}, "ListSteps", "cluster/j-1"),
        ("emr", "add_job_flow_steps", {"JobFlowId": "j-1", "Steps": []}, "AddJobFlowSteps", "cluster/j-1"),
        ("emr", "cancel_steps", {"ClusterId": "j-1", "StepIds": ["s-1"]}, "CancelSteps", "cluster/j-1"),
        ("scheduler", "get_schedule", {"GroupName": "own", "Name": "one"}, "GetSchedule", "schedule/own/one"),
        ("scheduler", "delete_schedule", {"GroupName": "own", "Name": "one"}, "DeleteSchedule", "schedule/own/one"),
        (
            "logs",
            "get_log_events",
            {"logGroupName": "g", "logStreamName": "s"},
            "GetLogEvents",
            "log-group:g:log-stream:s",
        ),
        ("logs", "create_log_stream", {"logGroupName": "g", "logStreamName": "s"}, "CreateLogStream", "log-group:g:*"),
        ("ssm", "put_parameter", {"Name": "/a/b", "Type": "String", "Value": "1"}, "PutParameter", "parameter/a/b"),
    ],
)
def test_a_policy_must_name_the_resource(as_role, service, operation, arguments, action, resource):
    namespace = {"emr": "elasticmapreduce"}.get(service, service)
    other = "log-group:other:*" if service == "logs" else f"{resource.rpartition('/')[0]}/other"

    def refused(named):
        try:
            getattr(as_role(service, statement(f"{namespace}:{action}", arn(namespace, named))), operation)(**arguments)
        except ClientError as error:
            return "not authorized" in str(error)

    assert refused(other)
    assert not refused(resource)


SCHEDULE = {"ScheduleExpression": "rate(1 minute)", "FlexibleTimeWindow": {"Mode": "OFF"}}


def test_a_schedule_needs_its_group_in_the_policy_and_the_role_to_be_passed(as_role, client, service_role):
    client("scheduler").create_schedule_group(Name="own")
    target = {"Arn": arn("lambda", "function:none"), "RoleArn": service_role("scheduler")}
    asked = {"Name": "one", "GroupName": "own", "Target": target, **SCHEDULE}
    allowed = statement("scheduler:*", arn("scheduler", "schedule/own/*"))
    with pytest.raises(ClientError, match="iam:PassRole"):
        as_role("scheduler", allowed).create_schedule(**asked)
    with pytest.raises(ClientError, match="scheduler:CreateSchedule"):
        as_role("scheduler", PASS).create_schedule(**asked)
    as_role("scheduler", allowed, PASS).create_schedule(**asked)
    with pytest.raises(ClientError, match="scheduler:UpdateSchedule"):
        as_role("scheduler", allowed, PASS).update_schedule(**asked | {"GroupName": "default"})


def test_a_schedule_needs_a_role_that_scheduler_may_assume(client, service_role):
    target = {"Arn": arn("lambda", "function:none"), "RoleArn": service_role("lambda")}
    with pytest.raises(ClientError, match="must allow EventBridge Scheduler to assume the role"):
        client("scheduler").create_schedule(Name="one", Target=target, **SCHEDULE)


# Schedules


def scheduled(function, *target_permissions):
    """A function that a schedule invokes, and the log of the function as output."""
    target = {"Arn": get("Function", "Arn"), "RoleArn": get("Invoker", "Arn"), "Input": '{"Answers": "0", "Tick": 1}'}
    return function() | {
        "Invoker": role("scheduler", *target_permissions),
        "Group": {"Type": "AWS::Scheduler::ScheduleGroup"},
        "Schedule": {
            "Type": "AWS::Scheduler::Schedule",
            "Properties": {
                **SCHEDULE,
                "ScheduleExpression": "rate(1 day)",
                "GroupName": ref("Group"),
                "Target": target,
            },
        },
    }


def test_a_tick_fires_schedules_with_their_input(stack, function, aws, client):
    allowed = statement("lambda:InvokeFunction", get("Function", "Arn"))
    done = stack(scheduled(function, allowed), Outputs={"Group": {"Value": ref("Log")}})
    aws.control("tick")
    eventually(lambda: logged(client, done["Outputs"][0]["OutputValue"]))
    assert logged(client, done["Outputs"][0]["OutputValue"])[0] == {"Answers": "0", "Tick": 1}


def test_a_schedule_whose_role_may_not_invoke_is_written_down(stack, function, aws):
    stack(scheduled(function, statement("lambda:InvokeFunction", arn("lambda", "function:other"))))
    aws.control("tick")
    assert aws.control("refused")[-1]["Lacks"] == "lambda:InvokeFunction"


def test_a_rate_without_a_start_date_fires_at_once(client, service_role, aws):
    target = {"Arn": arn("lambda", "function:none"), "RoleArn": service_role("scheduler", statement("lambda:*"))}
    client("scheduler").create_schedule(Name="at-once", Target=target, **SCHEDULE)
    eventually(lambda: "does not exist" in str(aws.control("refused")), seconds=4)
    client("scheduler").delete_schedule(Name="at-once")


def test_schedules_conflict_are_replaced_and_are_missed(client, service_role):
    scheduler = client("scheduler")
    target = {"Arn": arn("lambda", "function:none"), "RoleArn": service_role("scheduler"), "Input": "1"}
    scheduler.create_schedule(Name="once", Target=target, **SCHEDULE)
    with pytest.raises(scheduler.exceptions.ConflictException):
        scheduler.create_schedule(Name="once", Target=target, **SCHEDULE)
    scheduler.update_schedule(Name="once", Target=target | {"Input": "2"}, **SCHEDULE)
    assert scheduler.get_schedule(Name="once")["Target"]["Input"] == "2"
    scheduler.delete_schedule(Name="once")
    for missing in (scheduler.delete_schedule, scheduler.get_schedule):
        with pytest.raises(scheduler.exceptions.ResourceNotFoundException):
            missing(Name="once")
    with pytest.raises(scheduler.exceptions.ResourceNotFoundException):
        scheduler.update_schedule(Name="once", Target=target, **SCHEDULE)


# Events


def rule(pattern):
    return {
        "Rule": {
            "Type": "AWS::Events::Rule",
            "Properties": {"EventPattern": pattern, "Targets": [{"Id": "Function", "Arn": get("Function", "Arn")}]},
        },
        "Permission": {
            "Type": "AWS::Lambda::Permission",
            "Properties": {
                "Action": "lambda:InvokeFunction",
                "FunctionName": ref("Function"),
                "Principal": "events.amazonaws.com",
                "SourceArn": get("Rule", "Arn"),
            },
        },
    }


@pytest.mark.parametrize("permission", ["of the rule", "of another rule", "none"])
def test_an_event_reaches_a_function_that_lets_its_rule_in(stack, function, client, aws, permission):
    resources = function() | rule({"source": ["own"]})
    if permission == "none":
        del resources["Permission"]
    elif permission == "of another rule":
        resources["Permission"]["Properties"]["SourceArn"] = arn("events", "rule/other")
    done = stack(resources, Outputs={"Group": {"Value": ref("Log")}})
    client("events").put_events(Entries=[{"Source": "own", "DetailType": "x", "Detail": "{}"}])
    if permission == "of the rule":
        eventually(lambda: logged(client, done["Outputs"][0]["OutputValue"]))
        assert aws.control("refused") == []
    else:
        assert aws.control("refused")[0]["Lacks"] == "lambda:InvokeFunction"


def test_a_tick_fires_the_rules_that_have_a_schedule_and_are_enabled(stack, function, aws, client):
    resources = function() | rule({"source": ["own"]})
    properties = resources["Rule"]["Properties"]
    del properties["EventPattern"]
    properties |= {"ScheduleExpression": "rate(30 days)", "State": "DISABLED"}
    done = stack(resources, Outputs={"Group": {"Value": ref("Log")}})
    off = aws.control("tick")
    properties["State"] = "ENABLED"
    stack(resources, Outputs={"Group": {"Value": ref("Log")}})
    assert len(aws.control("tick")) == len(off) + 1
    eventually(lambda: logged(client, done["Outputs"][0]["OutputValue"]))


def test_a_stack_tells_the_parameter_of_the_store_from_its_value(stack, client):
    client("ssm").put_parameter(Name="/own/name", Type="String", Value="what stands there")
    parameter = {"Type": "AWS::SSM::Parameter::Value<String>", "Default": "/own/name"}
    properties = {"Type": "String", "Value": ref("P")}
    resources = {"Copy": {"Type": "AWS::SSM::Parameter", "Properties": properties}}
    (told,) = stack(resources, Parameters={"P": parameter})["Parameters"]
    assert told == {"ParameterKey": "P", "ParameterValue": "/own/name", "ResolvedValue": "what stands there"}
    client("ssm").delete_parameter(Name="/own/name")


def test_a_topic_is_encrypted_as_its_template_says(stack, client):
    topic = {"Type": "AWS::SNS::Topic", "Properties": {"KmsMasterKeyId": "alias/aws/sns"}}
    made = stack({"Topic": topic}, Outputs={"Topic": {"Value": ref("Topic")}})["Outputs"][0]["OutputValue"]
    assert client("sns").get_topic_attributes(TopicArn=made)["Attributes"]["KmsMasterKeyId"] == "alias/aws/sns"


@pytest.fixture
def seen(stack, function, client):
    """The details of the events that match a pattern, as a function saw them."""

    def watch(pattern, more=None):
        done = stack(function() | rule(pattern) | (more or {}), Outputs={"Group": {"Value": ref("Log")}})
        group = done["Outputs"][0]["OutputValue"]
        return lambda: [event["detail"] for event in sorted(logged(client, group), key=lambda event: event["time"])]

    return watch


def test_an_event_may_come_twice_or_never(seen, project, client, aws):
    details = seen({"source": ["aws.codebuild"]})
    aws.control("builds", seconds=0)
    aws.control("events", copies=0)
    ended(client, client("codebuild").start_build(projectName="ami")["build"])
    aws.control("events", copies=2)
    ended(client, client("codebuild").start_build(projectName="ami")["build"])
    statuses = eventually(lambda: len(found := details()) == 4 and found)
    assert sorted(detail["build-status"] for detail in statuses) == ["IN_PROGRESS"] * 2 + ["SUCCEEDED"] * 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Arn": arn("sqs", "queue")}, "cannot deliver events to arn:aws:sqs"),
        ({"DeadLetterConfig": {}}, "does not apply DeadLetterConfig of a rule's target"),
    ],
)
def test_a_target_that_is_not_served_is_refused(stack, function, change, reason):
    resources = function() | rule({"source": ["own"]})
    resources["Rule"]["Properties"]["Targets"][0] |= change
    assert stack(resources)["StackStatus"] == "ROLLBACK_COMPLETE"
    assert reason in stack.reasons()


# Buckets


def test_a_bucket_has_what_its_template_says(stack, client):
    rules = [
        {"Id": "a", "Status": "Enabled", "ExpirationInDays": 9, "Prefix": "logs/"},
        {
            "Id": "b",
            "Status": "Enabled",
            "NoncurrentVersionExpiration": {"NoncurrentDays": 30},
            "ExpiredObjectDeleteMarker": True,
        },
        {"Id": "c", "Status": "Enabled", "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}},
    ]
    encryption = {"ServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms"}, "BucketKeyEnabled": True}
    block = dict.fromkeys(("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets"), True)
    properties = {
        "BucketName": "as-the-template-says",
        "BucketEncryption": {"ServerSideEncryptionConfiguration": [encryption]},
        "OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
        "PublicAccessBlockConfiguration": block,
        "VersioningConfiguration": {"Status": "Enabled"},
        "LifecycleConfiguration": {"Rules": rules},
        "Tags": [{"Key": "a", "Value": "<b>"}],
    }
    stack({"Bucket": {"Type": "AWS::S3::Bucket", "Properties": properties}})
    s3, name = client("s3"), {"Bucket": "as-the-template-says"}
    applied = s3.get_bucket_encryption(**name)["ServerSideEncryptionConfiguration"]["Rules"][0]
    assert applied["ApplyServerSideEncryptionByDefault"] == {"SSEAlgorithm": "aws:kms"}
    assert s3.get_bucket_versioning(**name)["Status"] == "Enabled"
    assert s3.get_public_access_block(**name)["PublicAccessBlockConfiguration"] == block
    assert s3.get_bucket_tagging(**name)["TagSet"] == [{"Key": "a", "Value": "<b>"}]
    ownership = s3.get_bucket_ownership_controls(**name)["OwnershipControls"]["Rules"]
    assert ownership == [{"ObjectOwnership": "BucketOwnerEnforced"}]
    kept = s3.get_bucket_lifecycle_configuration(**name)["Rules"]
    assert kept[0]["Expiration"] == {"Days": 9}
    assert kept[1]["NoncurrentVersionExpiration"] == {"NoncurrentDays": 30}
    assert kept[1]["Expiration"] == {"ExpiredObjectDeleteMarker": True}
    assert kept[2]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 7}
    del properties["LifecycleConfiguration"]
    stack({"Bucket": {"Type": "AWS::S3::Bucket", "Properties": properties}})
    with pytest.raises(ClientError, match="NoSuchLifecycleConfiguration"):
        s3.get_bucket_lifecycle_configuration(**name)


@pytest.mark.parametrize("name", ["Upper", "ab", "under_score", "xn--a", "a..b", "1.2.3.4", "ends-", "my-s3alias"])
def test_a_bucket_name_that_s3_would_refuse_is_refused(stack, name):
    assert (
        stack({"Bucket": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": name}}})["StackStatus"]
        == "ROLLBACK_COMPLETE"
    )
    assert "naming rules" in stack.reasons()


def test_a_bucket_that_holds_something_is_not_deleted(stack, client):
    stack({"Bucket": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "not-empty"}}})
    client("s3").put_object(Bucket="not-empty", Key="a", Body=b"")
    client("cloudformation").delete_stack(StackName=stack.named)
    status = client("cloudformation").describe_stacks(StackName=stack.named)["Stacks"][0]["StackStatus"]
    client("s3").delete_object(Bucket="not-empty", Key="a")
    assert status == "DELETE_FAILED"
    assert "not empty" in stack.reasons()


def test_what_a_resource_needs_that_cannot_be_deleted_stays_with_it(stack, client):
    key = {"Type": "AWS::SSM::Parameter", "Properties": {"Name": "/needed", "Type": "String", "Value": "kept-bucket"}}
    bucket = {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": get("Name", "Value")}}
    stack({"Name": key, "Bucket": bucket, "Other": {"Type": "AWS::Logs::LogGroup"}})
    client("s3").put_object(Bucket="kept-bucket", Key="a", Body=b"")
    cloudformation = client("cloudformation")
    cloudformation.delete_stack(StackName=stack.named)
    left = cloudformation.describe_stack_resources(StackName=stack.named)["StackResources"]
    assert {one["LogicalResourceId"] for one in left} == {"Name", "Bucket"}
    assert client("ssm").get_parameter(Name="/needed")["Parameter"]["Value"] == "kept-bucket"
    client("s3").delete_object(Bucket="kept-bucket", Key="a")
    cloudformation.delete_stack(StackName=stack.named)
    with pytest.raises(ClientError, match="ParameterNotFound"):
        client("ssm").get_parameter(Name="/needed")


def test_a_function_needs_permission_for_the_key_of_a_bucket(stack, client, function):
    key = client("kms").create_key()["KeyMetadata"]["Arn"]
    client("s3").create_bucket(Bucket="with-key")
    kms = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}}
    may_read = statement("s3:GetObject", "arn:aws:s3:::functions/*")
    for policies, outcome in (((may_read,), "CREATE_FAILED"), ((may_read, statement("kms:Decrypt", key)), None)):
        resources = function(policies=policies)
        client("s3").put_bucket_encryption(Bucket="functions", ServerSideEncryptionConfiguration={"Rules": [kms]})
        custom = {"ServiceToken": get("Function", "Arn"), "Reads": "function.zip"}
        resources["Custom"] = {"Type": "Custom::Thing", "Properties": custom}
        stack(resources)
        seen = [event["ResourceStatus"] for event in stack.events() if event["LogicalResourceId"] == "Custom"]
        if outcome:
            assert outcome in seen and "kms:Decrypt" in stack.reasons()
            client("cloudformation").delete_stack(StackName=stack.named)
            stack.there = False
        else:
            assert seen[0] == "CREATE_COMPLETE"
    client("s3").delete_bucket_encryption(Bucket="functions")


def test_a_policy_that_asks_for_tls_lets_requests_through(client):
    s3 = client("s3")
    s3.create_bucket(Bucket="tls-only")
    refuse = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::tls-only/*"}
    refuse["Condition"] = {"Bool": {"aws:SecureTransport": "false"}}
    s3.put_bucket_policy(Bucket="tls-only", Policy=json.dumps({"Version": "2012-10-17", "Statement": [refuse]}))
    s3.put_object(Bucket="tls-only", Key="a", Body=b"")


# Builds


@pytest.fixture
def project(client, service_role):
    """A project whose builds can succeed: its source is in S3, its role may read it and write the log."""
    s3, codebuild = client("s3"), client("codebuild")
    s3.create_bucket(Bucket="sources")
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w") as archive:
        archive.writestr("buildspec.yml", "env: {exported-variables: [AMI_ID, AMI_NAME]}\n")
    s3.put_object(Bucket="sources", Key="packer.zip", Body=package.getvalue())
    allowed = statement(["s3:GetObject", "logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"])
    yield codebuild.create_project(
        name="ami",
        source={"type": "S3", "location": "sources/packer.zip"},
        artifacts={"type": "NO_ARTIFACTS"},
        environment={
            "type": "LINUX_CONTAINER",
            "image": "aws/codebuild/amazonlinux2-x86_64-standard:5.0",
            "computeType": "BUILD_GENERAL1_SMALL",
            "environmentVariables": [{"name": "AMI_NAME", "value": "default"}, {"name": "OTHER", "value": "kept"}],
        },
        serviceRole=service_role("codebuild", allowed),
    )["project"]
    for build in codebuild.list_builds_for_project(projectName="ami")["ids"]:
        codebuild.stop_build(id=build)
    codebuild.delete_project(name="ami")


def ended(client, build):
    def look():
        found = client("codebuild").batch_get_builds(ids=[build["id"]])["builds"][0]
        return found if found["buildComplete"] else None

    return eventually(look)


def overrides(**values):
    return [{"name": name, "value": value} for name, value in values.items()]


def test_a_build_takes_time_and_ends_in_a_tagged_image(project, client, aws, seen):
    details = seen({"source": ["aws.codebuild"], "detail-type": ["CodeBuild Build State Change"]})
    aws.control("builds", seconds=0.5, log=["==> installing Hail"])
    asked = overrides(AMI_NAME="hail", HAIL_VERSION="0.2.139")
    build = client("codebuild").start_build(projectName="ami", environmentVariablesOverride=asked)["build"]
    assert (build["buildStatus"], build["buildComplete"]) == ("IN_PROGRESS", False)
    done = ended(client, build)
    assert done["buildStatus"] == "SUCCEEDED"
    variables = {v["name"]: v["value"] for v in done["environment"]["environmentVariables"]}
    assert variables == {"AMI_NAME": "hail", "OTHER": "kept", "HAIL_VERSION": "0.2.139"}
    exported = {v["name"]: v["value"] for v in done["exportedEnvironmentVariables"]}
    (image,) = client("ec2").describe_images(ImageIds=[exported["AMI_ID"]])["Images"]
    assert image["Name"] == exported["AMI_NAME"].strip() and image["Name"].startswith("hail-")
    assert {"Key": "hail-version", "Value": "0.2.139"} in image["Tags"]
    assert image["CreationDate"]
    log = client("logs").get_log_events(
        logGroupName=done["logs"]["groupName"], logStreamName=done["logs"]["streamName"]
    )
    assert log["events"][0]["message"] == "==> installing Hail\n"
    assert done["id"].endswith(done["logs"]["streamName"])
    started, finished = eventually(lambda: len(found := details()) == 2 and found)
    assert [started["build-status"], finished["build-status"]] == ["IN_PROGRESS", "SUCCEEDED"]
    assert (finished["project-name"], finished["build-id"]) == ("ami", build["arn"])
    more = finished["additional-information"]
    assert more["logs"]["stream-name"] == done["logs"]["streamName"]
    assert more["exported-environment-variables"] == done["exportedEnvironmentVariables"]


@pytest.mark.parametrize("outcome", ["SUCCEEDED", "FAILED"])
def test_builds_end_when_they_are_told_to(project, client, aws, outcome):
    aws.control("builds", seconds=600, outcome=outcome)
    build = client("codebuild").start_build(projectName="ami")["build"]
    assert aws.control("finish") == [build["id"]]
    assert ended(client, build)["buildStatus"] == outcome
    assert aws.control("finish") == []


def test_a_request_is_held_until_it_is_let_go(project, client, aws):
    assert aws.control("hold", operation="StartBuild") == 0
    with ThreadPoolExecutor() as beside:
        started = beside.submit(client("codebuild").start_build, projectName="ami")
        eventually(lambda: aws.control("hold", operation="StartBuild") == 1)
        builds = client("codebuild").list_builds_for_project(projectName="ami")["ids"]
        assert aws.control("release") == 1
        build = started.result()["build"]
    assert build["id"] not in builds
    client("codebuild").stop_build(id=build["id"])


@pytest.fixture
def image(project, client):
    """The id of an image that a build has made."""
    done = ended(client, client("codebuild").start_build(projectName="ami")["build"])
    return next(one["value"] for one in done["exportedEnvironmentVariables"] if one["name"] == "AMI_ID")


def snapshots(client):
    tagged = {"Name": "tag:build-project", "Values": ["ami"]}
    return {one["SnapshotId"] for one in client("ec2").describe_snapshots(Filters=[tagged])["Snapshots"]}


def test_an_image_is_deregistered_by_who_may_by_its_tags_and_takes_its_snapshots_along(image, client, as_role):
    before = snapshots(client)

    def tagged(project):
        where = {"StringEquals": {"aws:ResourceTag/build-project": project}}
        return [
            statement("ec2:DeregisterImage", f"arn:aws:ec2:{REGION}::image/*") | {"Condition": where},
            statement("ec2:DeleteSnapshot", f"arn:aws:ec2:{REGION}::snapshot/*") | {"Condition": where},
        ]

    asked = {"ImageId": image, "DeleteAssociatedSnapshots": True}
    with pytest.raises(ClientError, match="not authorized to perform: ec2:DeregisterImage"):
        as_role("ec2", *tagged("another")).deregister_image(**asked)
    (result,) = as_role("ec2", *tagged("ami")).deregister_image(**asked)["DeleteSnapshotResults"]
    assert (result["ReturnCode"], before - snapshots(client)) == ("success", {result["SnapshotId"]})


def test_a_snapshot_that_may_not_be_deleted_stays_and_is_named(image, client, as_role):
    before = snapshots(client)
    caller = as_role("ec2", statement("ec2:DeregisterImage", f"arn:aws:ec2:{REGION}::image/*"))
    (result,) = caller.deregister_image(ImageId=image, DeleteAssociatedSnapshots=True)["DeleteSnapshotResults"]
    assert result["ReturnCode"] == "missing-permissions" and snapshots(client) == before


def test_a_build_fails_where_it_is_told_to(project, client, aws):
    aws.control("builds", seconds=0.1, outcome="FAILED", phase="PRE_BUILD", log=["E: no such package"])
    done = ended(client, client("codebuild").start_build(projectName="ami")["build"])
    failed = [phase for phase in done["phases"] if phase.get("phaseStatus") == "FAILED"]
    assert [phase["phaseType"] for phase in failed] == ["PRE_BUILD"]
    assert failed[0]["contexts"][0]["statusCode"] == "COMMAND_EXECUTION_ERROR"
    assert done["exportedEnvironmentVariables"] == []


@pytest.mark.parametrize(
    ("change", "phase", "reason"),
    [
        ({"source": {"type": "S3", "location": "sources/none.zip"}}, "DOWNLOAD_SOURCE", "key does not exist"),
        (
            {"source": {"type": "S3", "location": "sources/packer.zip", "buildspec": "b.yml"}},
            "DOWNLOAD_SOURCE",
            "b.yml",
        ),
        ({"serviceRole": []}, "SUBMITTED", "does not allow logs:"),
        ({"serviceRole": ["logs:*"]}, "DOWNLOAD_SOURCE", "may not s3:GetObject"),
    ],
)
def test_a_build_fails_like_a_real_one_without_its_source_or_permissions(
    project, client, service_role, change, phase, reason
):
    if "serviceRole" in change:
        change = {"serviceRole": service_role("codebuild", statement(["none:None", *change["serviceRole"]]))}
    client("codebuild").update_project(name="ami", **change)
    done = ended(client, client("codebuild").start_build(projectName="ami")["build"])
    failed = [found for found in done["phases"] if found.get("phaseStatus") == "FAILED"]
    assert [found["phaseType"] for found in failed] == [phase]
    assert reason in failed[0]["contexts"][0]["message"]


def test_a_build_is_stopped_and_stays_stopped(project, client, aws):
    aws.control("builds", seconds=0.5)
    codebuild = client("codebuild")
    build = codebuild.start_build(projectName="ami", environmentVariablesOverride=overrides(AMI_NAME="stopped"))[
        "build"
    ]
    assert codebuild.stop_build(id=build["arn"])["build"]["buildStatus"] == "STOPPED"
    time.sleep(0.7)
    found = codebuild.batch_get_builds(ids=[build["arn"], "ami:none"])
    assert found["builds"][0]["buildStatus"] == "STOPPED"
    assert found["buildsNotFound"] == ["ami:none"]
    assert client("ec2").describe_images(Filters=[{"Name": "name", "Values": ["stopped-*"]}])["Images"] == []


def test_an_idempotency_token_starts_one_build(project, client):
    codebuild = client("codebuild")
    first, again = (codebuild.start_build(projectName="ami", idempotencyToken="t")["build"]["id"] for _ in range(2))
    assert first == again
    with pytest.raises(ClientError, match="used with other parameters"):
        codebuild.start_build(projectName="ami", idempotencyToken="t", environmentVariablesOverride=overrides(A="1"))
    newest = codebuild.start_build(projectName="ami")["build"]["id"]
    assert codebuild.list_builds_for_project(projectName="ami")["ids"][:2] == [newest, first]


def test_a_project_runs_no_more_builds_at_once_than_it_may(project, client):
    codebuild = client("codebuild")
    codebuild.update_project(name="ami", concurrentBuildLimit=1)
    build = codebuild.start_build(projectName="ami")["build"]
    with pytest.raises(codebuild.exceptions.AccountLimitExceededException):
        codebuild.start_build(projectName="ami")
    codebuild.stop_build(id=build["id"])
    codebuild.stop_build(id=codebuild.start_build(projectName="ami")["build"]["id"])


def test_a_rule_starts_a_build(project, stack, client):
    target = {"Id": "Build", "Arn": project["arn"], "RoleArn": get("Role", "Arn")}
    properties = {"EventPattern": {"source": ["own"]}, "Targets": [target]}
    resources = {"Role": role("events", statement("codebuild:StartBuild", project["arn"]))}
    stack(resources | {"Rule": {"Type": "AWS::Events::Rule", "Properties": properties}})
    before = client("codebuild").list_builds_for_project(projectName="ami")["ids"]
    client("events").put_events(Entries=[{"Source": "own", "DetailType": "x", "Detail": "{}"}])
    (build,) = set(client("codebuild").list_builds_for_project(projectName="ami")["ids"]) - set(before)
    client("codebuild").stop_build(id=build)


def test_a_build_override_that_is_not_simulated_is_refused(project, client):
    with pytest.raises(ClientError, match="does not override imageOverride"):
        client("codebuild").start_build(projectName="ami", imageOverride="other")


def test_a_project_of_a_template_keeps_what_it_was_given(stack, client):
    properties = {
        "Source": {"Type": "S3", "Location": "sources/packer.zip"},
        "Artifacts": {"Type": "NO_ARTIFACTS"},
        "Environment": {
            "Type": "LINUX_CONTAINER",
            "Image": "aws/codebuild/amazonlinux2-x86_64-standard:5.0",
            "ComputeType": "BUILD_GENERAL1_SMALL",
            "EnvironmentVariables": [{"Name": "A", "Value": "1"}],
        },
        "ServiceRole": get("Role", "Arn"),
        "TimeoutInMinutes": "180",
        "ConcurrentBuildLimit": 1,
        "LogsConfig": {"CloudWatchLogs": {"Status": "ENABLED", "GroupName": "builds"}},
    }
    resource = {"Type": "AWS::CodeBuild::Project", "Properties": properties}
    done = stack({"Role": role("codebuild"), "Project": resource}, Outputs={"Name": {"Value": ref("Project")}})
    (made,) = client("codebuild").batch_get_projects(names=[done["Outputs"][0]["OutputValue"]])["projects"]
    assert (made["timeoutInMinutes"], made["concurrentBuildLimit"]) == (180, 1)
    assert made["logsConfig"]["cloudWatchLogs"]["groupName"] == "builds"
    assert made["environment"]["environmentVariables"] == [{"name": "A", "value": "1"}]
    properties["Source"]["Unknown"] = "x"
    stack({"Role": role("codebuild"), "Project": resource})
    assert "source.unknown is unknown to AWS" in stack.reasons()


# Images and their parameters


def test_a_parameter_of_type_image_must_name_one(client, as_role):
    image = client("ec2").register_image(Name="an image", RootDeviceName="/dev/xvda")["ImageId"]
    ssm = client("ssm")
    put = {"Type": "String", "DataType": "aws:ec2:image", "Overwrite": True}
    ssm.put_parameter(Name="/image", Value=image, **put)
    with pytest.raises(ClientError, match="is not the id of an image"):
        ssm.put_parameter(Name="/image", Value="latest", **put)
    limited = as_role("ssm", statement("ssm:PutParameter"))
    with pytest.raises(ClientError, match="ec2:DescribeImages"):
        limited.put_parameter(Name="/image", Value=image, **put)
    client("ec2").deregister_image(ImageId=image)
    with pytest.raises(ClientError, match="does not exist"):
        ssm.put_parameter(Name="/image", Value=image, **put)


# Clusters


@pytest.fixture
def cluster(client, aws):
    """The resources of a cluster."""
    aws.control("clusters", seconds=0.1)
    aws.control("steps", seconds=0.1)
    vpc, subnet, _ = network(client)
    image = client("ec2").describe_images(Filters=[{"Name": "name", "Values": ["amzn2-ami-*"]}])["Images"][0]["ImageId"]

    def resources(groups=True, **properties):
        instances = {
            "Ec2SubnetId": subnet,
            "MasterInstanceGroup": {"InstanceCount": 1, "InstanceType": "m5.xlarge", "Name": "Primary"},
            "CoreInstanceGroup": {"InstanceCount": "2", "InstanceType": "m5.xlarge"},
        }
        instances["CoreInstanceGroup"]["EbsConfiguration"] = {
            "EbsBlockDeviceConfigs": [{"VolumeSpecification": {"SizeInGB": "100", "VolumeType": "gp3"}}]
        }
        added = {}
        if groups:
            group = {"Type": "AWS::EC2::SecurityGroup", "Properties": {"GroupDescription": "x", "VpcId": vpc}}
            added = {"Primary": group, "Core": group}
            instances["EmrManagedMasterSecurityGroup"] = ref("Primary")
            instances["EmrManagedSlaveSecurityGroup"] = ref("Core")
        return {
            **added,
            "Service": role("elasticmapreduce"),
            "Node": role("ec2"),
            "Profile": {"Type": "AWS::IAM::InstanceProfile", "Properties": {"Roles": [ref("Node")]}},
            "Cluster": {
                "Type": "AWS::EMR::Cluster",
                "Properties": {
                    "Name": "hail",
                    "ReleaseLabel": "emr-7.13.0",
                    "CustomAmiId": image,
                    "Instances": instances,
                    "JobFlowRole": ref("Profile"),
                    "ServiceRole": ref("Service"),
                    "Configurations": [{"Classification": "spark", "ConfigurationProperties": {"a": "b"}}],
                    **properties,
                },
            },
        }

    return resources


def cluster_of(done):
    return next(output["OutputValue"] for output in done["Outputs"] if output["OutputKey"] == "Id")


ID = {"Id": {"Value": ref("Cluster")}, "Dns": {"Value": get("Cluster", "MasterPublicDNS")}}


def test_a_cluster_of_a_template_is_waiting_and_described(stack, cluster, client):
    done = stack(cluster(groups=False), Outputs=ID)
    assert done["StackStatus"] == "CREATE_COMPLETE", stack.reasons()
    emr = client("emr")
    made = emr.describe_cluster(ClusterId=cluster_of(done))["Cluster"]
    assert made["Status"]["State"] == "WAITING"
    assert made["CustomAmiId"].startswith("ami-")
    assert made["Configurations"] == [{"Classification": "spark", "Properties": {"a": "b"}}]
    assert {tag["Key"] for tag in made["Tags"]} >= {"aws:cloudformation:stack-name"}
    core = emr.list_instance_groups(ClusterId=made["Id"])["InstanceGroups"][1]
    assert (core["RequestedInstanceCount"], core["EbsBlockDevices"][0]["VolumeSpecification"]["SizeInGB"]) == (2, 100)


def test_policies_and_tags_are_updated_in_place_and_the_rest_replaces_the_cluster(stack, cluster, client):
    first = cluster_of(stack(cluster(groups=False), Outputs=ID))
    policy = {"AutoTerminationPolicy": {"IdleTimeout": "3600"}, "StepConcurrencyLevel": 2}
    resources = cluster(groups=False, **policy)
    resources["Cluster"]["Properties"]["Instances"]["CoreInstanceGroup"]["InstanceCount"] = 5
    assert cluster_of(stack(resources, Outputs=ID)) == first
    emr = client("emr")
    assert emr.list_instance_groups(ClusterId=first)["InstanceGroups"][1]["RequestedInstanceCount"] == 5
    assert emr.get_auto_termination_policy(ClusterId=first)["AutoTerminationPolicy"] == {"IdleTimeout": 3600}
    emr.remove_auto_termination_policy(ClusterId=first)
    assert "AutoTerminationPolicy" not in emr.get_auto_termination_policy(ClusterId=first)
    limits = {"UnitType": "Instances", "MinimumCapacityUnits": 1, "MaximumCapacityUnits": 4}
    emr.put_managed_scaling_policy(ClusterId=first, ManagedScalingPolicy={"ComputeLimits": limits})
    assert emr.get_managed_scaling_policy(ClusterId=first)["ManagedScalingPolicy"]["ComputeLimits"] == limits
    resources["Cluster"]["Properties"]["ReleaseLabel"] = "emr-7.12.0"
    second = cluster_of(stack(resources, Outputs=ID))
    assert second != first
    assert emr.describe_cluster(ClusterId=first)["Cluster"]["Status"]["State"] == "TERMINATED"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"CustomAmiId": "ami-0000000000000000a"}, "image 'ami-0000000000000000a' does not exist"),
        ({"JobFlowRole": "none"}, "Invalid InstanceProfile: none"),
        ({"ServiceRole": ref("Node")}, "EMR may not assume it"),
        ({"ManagedScalingPolicy": {"ComputeLimits": {"Units": 1}}}, "ComputeLimits.Units is unknown to AWS"),
    ],
)
def test_a_cluster_of_what_does_not_exist_is_refused(stack, cluster, change, reason):
    assert stack(cluster(groups=False, **change))["StackStatus"] == "ROLLBACK_COMPLETE"
    assert reason in stack.reasons()


def test_the_rules_that_emr_adds_keep_groups_from_being_deleted(stack, cluster, client):
    stack(cluster(), Outputs=ID)
    client("cloudformation").delete_stack(StackName=stack.named)
    assert "has a dependent object" in stack.reasons()
    for group in client("ec2").describe_security_groups()["SecurityGroups"]:
        if group["GroupName"].startswith(stack.named):
            client("ec2").revoke_security_group_ingress(GroupId=group["GroupId"], IpPermissions=group["IpPermissions"])


def test_rules_of_a_template_between_two_groups_are_deleted_with_it(stack, cluster, client):
    def between(group, source, protocol, first, last):
        properties = {"GroupId": ref(group), "SourceSecurityGroupId": ref(source), "IpProtocol": protocol}
        properties |= {"FromPort": first, "ToPort": last}
        return {"Type": "AWS::EC2::SecurityGroupIngress", "Properties": properties}

    rules = {
        f"{group}From{source}{protocol.title()}": between(group, source, protocol, first, last)
        for group in ("Primary", "Core")
        for source in ("Primary", "Core")
        for protocol, first, last in (("tcp", 0, 65535), ("udp", 0, 65535), ("icmp", -1, -1))
    }
    resources = cluster() | rules
    resources["Cluster"]["DependsOn"] = list(rules)
    assert stack(resources, Outputs=ID)["StackStatus"] == "CREATE_COMPLETE"
    client("cloudformation").delete_stack(StackName=stack.named)
    with pytest.raises(ClientError, match="does not exist"):
        client("cloudformation").describe_stacks(StackName=stack.named)


# Steps


def step(name, on_failure="CONTINUE"):
    jar = {"Jar": "command-runner.jar", "Args": ["bash", "-c", "true", name]}
    return {"Name": name, "ActionOnFailure": on_failure, "HadoopJarStep": jar}


@pytest.fixture
def live_cluster(stack, cluster, function, client):
    """The id of a cluster, and the step events that a function saw."""
    pattern = {"source": ["aws.emr"], "detail-type": ["EMR Step Status Change"]}
    watched = cluster(groups=False) | function() | rule(pattern)
    done = stack(watched, Outputs=ID | {"Log": {"Value": ref("Log")}})
    group = next(output["OutputValue"] for output in done["Outputs"] if output["OutputKey"] == "Log")
    return cluster_of(done), lambda: [event["detail"] for event in logged(client, group)]


def test_steps_run_one_after_another_and_fail_as_told(live_cluster, client, aws):
    cluster_id, details = live_cluster
    aws.control("steps", seconds=0.3, fail={"second": "no space left"})
    emr = client("emr")
    ids = emr.add_job_flow_steps(JobFlowId=cluster_id, Steps=[step("first"), step("second"), step("third")])["StepIds"]
    states = [found["Status"]["State"] for found in emr.list_steps(ClusterId=cluster_id)["Steps"]]
    assert states == ["PENDING", "PENDING", "RUNNING"]
    cancelled = emr.cancel_steps(ClusterId=cluster_id, StepIds=[ids[2]])["CancelStepsInfoList"]
    assert cancelled == [{"StepId": ids[2], "Status": "SUBMITTED"}]
    last = {"COMPLETED", "FAILED", "CANCELLED"}
    seen = eventually(lambda: len(found := [d for d in details() if d["state"] in last]) == 3 and found)
    assert {detail["name"]: detail["state"] for detail in seen} == {
        "first": "COMPLETED", "second": "FAILED", "third": "CANCELLED",
    }  # fmt: skip
    assert {detail["clusterId"] for detail in seen} == {cluster_id}
    newest, failed, oldest = emr.list_steps(ClusterId=cluster_id)["Steps"]
    assert [newest["Name"], failed["Name"], oldest["Name"]] == ["third", "second", "first"]
    assert failed["Status"]["FailureDetails"]["Reason"] == "no space left"
    assert oldest["Config"]["Args"] == ["bash", "-c", "true", "first"]
    assert emr.describe_cluster(ClusterId=cluster_id)["Cluster"]["Status"]["State"] == "WAITING"
    (only,) = emr.list_steps(ClusterId=cluster_id, StepIds=[ids[0]])["Steps"]
    assert only["Id"] == ids[0]


def test_a_failed_step_cancels_the_rest_if_it_says_so(live_cluster, client, aws):
    aws.control("steps", fail={"first": "no"})
    emr = client("emr")
    steps = [step("first", "CANCEL_AND_WAIT"), step("second")]
    ids = emr.add_job_flow_steps(JobFlowId=live_cluster[0], Steps=steps)["StepIds"]

    def state():
        return emr.describe_step(ClusterId=live_cluster[0], StepId=ids[1])["Step"]["Status"]["State"]

    eventually(lambda: state() == "CANCELLED")


def test_steps_of_a_terminated_cluster_or_too_long_are_refused(live_cluster, client):
    emr = client("emr")
    long = step("long")
    long["HadoopJarStep"]["Args"] = ["x" * 10281]
    with pytest.raises(ClientError, match="must have a length from 0 to 10280"):
        emr.add_job_flow_steps(JobFlowId=live_cluster[0], Steps=[long])
    emr.terminate_job_flows(JobFlowIds=[live_cluster[0]])
    with pytest.raises(ClientError, match="may not be modified"):
        emr.add_job_flow_steps(JobFlowId=live_cluster[0], Steps=[step("late")])


# Notebooks


@pytest.fixture
def notebook(client, aws, service_role):
    """A notebook instance that is in service."""
    aws.control("notebooks", seconds=0.2)
    sagemaker = client("sagemaker")
    sagemaker.create_notebook_instance(
        NotebookInstanceName="ada", InstanceType="ml.t3.medium", RoleArn=service_role("sagemaker")
    )
    eventually(lambda: status(sagemaker) == "InService")
    yield sagemaker
    if status(sagemaker) == "InService":
        sagemaker.stop_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: status(sagemaker) == "Stopped")
    sagemaker.delete_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: sagemaker.list_notebook_instances()["NotebookInstances"] == [])


def status(sagemaker):
    return sagemaker.describe_notebook_instance(NotebookInstanceName="ada")["NotebookInstanceStatus"]


def test_a_notebook_stops_and_starts_with_events(seen, notebook):
    details = seen({"source": ["aws.sagemaker"], "detail": {"NotebookInstanceName": ["ada"]}})
    notebook.stop_notebook_instance(NotebookInstanceName="ada")
    assert status(notebook) == "Stopping"
    with pytest.raises(ClientError, match="Unable to transition"):
        notebook.start_notebook_instance(NotebookInstanceName="ada")
    eventually(lambda: status(notebook) == "Stopped")
    notebook.start_notebook_instance(NotebookInstanceName="ada")
    wanted = {"Stopping", "Stopped", "Pending", "InService"}
    eventually(lambda: {detail["NotebookInstanceStatus"] for detail in details()} == wanted)


def test_a_notebook_of_a_template_is_in_service_updated_and_deleted(stack, client, aws):
    aws.control("notebooks", seconds=0.1)
    lifecycle = {"Type": "AWS::SageMaker::NotebookInstanceLifecycleConfig", "Properties": {}}
    lifecycle["Properties"]["OnStart"] = [{"Content": {"Fn::Base64": "#!/bin/bash\n"}}]
    properties = {
        "InstanceType": "ml.t3.medium",
        "RoleArn": get("Role", "Arn"),
        "VolumeSizeInGB": "10",
        "LifecycleConfigName": get("Lifecycle", "NotebookInstanceLifecycleConfigName"),
        "PlatformIdentifier": "notebook-al2023-v1",
    }
    resources = {
        "Role": role("sagemaker"),
        "Lifecycle": lifecycle,
        "Notebook": {"Type": "AWS::SageMaker::NotebookInstance", "Properties": properties},
    }
    attributes = {"Arn": {"Value": ref("Notebook")}, "Name": {"Value": get("Notebook", "NotebookInstanceName")}}
    done = stack(resources, Outputs=attributes)
    assert done["StackStatus"] == "CREATE_COMPLETE", stack.reasons()
    values = {output["OutputKey"]: output["OutputValue"] for output in done["Outputs"]}
    sagemaker = client("sagemaker")
    made = sagemaker.describe_notebook_instance(NotebookInstanceName=values["Name"])
    assert (made["NotebookInstanceStatus"], made["VolumeSizeInGB"]) == ("InService", 10)
    assert made["NotebookInstanceArn"] == values["Arn"]
    properties["InstanceType"] = "ml.t3.large"
    assert stack(resources, Outputs=attributes)["StackStatus"] == "UPDATE_COMPLETE"
    made = sagemaker.describe_notebook_instance(NotebookInstanceName=values["Name"])
    assert (made["NotebookInstanceStatus"], made["InstanceType"]) == ("InService", "ml.t3.large")
    client("cloudformation").delete_stack(StackName=stack.named)
    assert sagemaker.list_notebook_instances()["NotebookInstances"] == []
    assert sagemaker.list_notebook_instance_lifecycle_configs()["NotebookInstanceLifecycleConfigs"] == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"RoleArn": get("Other", "Arn")}, "Could not assume role"),
        ({"LifecycleConfigName": "none"}, "lifecycle config none does not exist"),
        ({"PlatformIdentifier": "notebook-al3"}, "PlatformIdentifier must match"),
        ({"InstanceType": "t3.medium"}, "InstanceType must be one of"),
        ({"NotebookInstanceName": "under_score"}, "NotebookInstanceName must match"),
    ],
)
def test_a_notebook_that_sagemaker_would_refuse_is_refused(stack, change, reason):
    properties = {"InstanceType": "ml.t3.medium", "RoleArn": get("Role", "Arn"), **change}
    resources = {"Role": role("sagemaker"), "Other": role("ec2")}
    resources["Notebook"] = {"Type": "AWS::SageMaker::NotebookInstance", "Properties": properties}
    assert stack(resources)["StackStatus"] == "ROLLBACK_COMPLETE"
    assert reason in stack.reasons()


def test_a_part_of_sagemaker_that_is_not_there_is_refused(client):
    with pytest.raises(ClientError, match="it has notebook instances only"):
        client("sagemaker").list_models()
