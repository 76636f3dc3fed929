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
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError
from local_aws import ACCOUNT, REGION, LocalAws, running

# A function that does what the custom resource's properties (or the event) tell it.
BOOTSTRAP = f"#!{sys.executable}\n" + textwrap.dedent(
    '''
    import json, os, urllib.request, urllib.error
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
            failed = wanted.get("Status") == "FAILED" and event["RequestType"] == wanted.get("On", "Create")
            body |= {"Status": "FAILED" if failed else "SUCCESS", "Reason": "asked to fail"}
            body |= {"PhysicalResourceId": wanted.get("Id") or event.get("PhysicalResourceId", "made"), "Data": {
                "Calls": str(calls), "Event": event["RequestType"], "Pad": "x" * (int(wanted.get("Pad", 0)) if event["RequestType"] == "Create" else 0),
                "Environment": ",".join(sorted(os.environ)), "Stream": os.environ["AWS_LAMBDA_LOG_STREAM_NAME"]}}
            headers = {"Content-Type": ""}
            for kind in wanted.get("ContentTypes", [""] * int(wanted.get("Answers", "1"))):
                put = urllib.request.Request(event["ResponseURL"], json.dumps(body).encode(), {"Content-Type": kind}, method="PUT")
                try:
                    urllib.request.urlopen(put)
                except urllib.error.HTTPError as refused:
                    print("refused", refused.code, flush=True)
        urllib.request.urlopen(f"{api}/{request_id}/response", json.dumps({"environment": dict(os.environ)}).encode())
    '''
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
            "Role": role("lambda", statement(["logs:CreateLogStream", "logs:PutLogEvents"], get("Log", "Arn")), *policies),
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


def processes(text):
    """The ids of the processes whose command line contains the text."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text in (directory / "cmdline").read_bytes().decode():
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
    program = "import sys, time; from local_aws import LocalAws; LocalAws(sys.argv[1]).__enter__(); print(1, flush=True); time.sleep(60)"
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


def test_it_writes_below_its_folder_only(tmp_path):
    marker = tmp_path / "marker"
    marker.touch()
    with LocalAws(tmp_path / "aws") as aws:
        invoke_forever(aws)
        eventually(lambda: processes(str(tmp_path / "aws" / "tmp")))
    here = Path(__file__).parent
    searched = [str(path) for path in (Path("/tmp"), Path("/var/tmp"), Path("/dev/shm"), Path.home(), here) if path.exists()]
    found = subprocess.run(
        ["find", *searched, "-xdev", "-newer", marker, "-type", "f", "-path", "*ministack*", "-not", "-path", f"{tmp_path}/*"],
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""


def test_the_environment_leads_nowhere_else(aws, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "real")
    with LocalAws(aws.folder.parent / "other") as other:
        assert "AWS_PROFILE" not in other.environment
        identity = subprocess.run(["aws", "sts", "get-caller-identity"], env=other.environment, capture_output=True)
        assert json.loads(identity.stdout)["Account"] == ACCOUNT


def test_the_control_api_refuses_what_it_does_not_know(aws):
    with pytest.raises(ValueError, match="builds has no setting minutes"):
        aws.control("builds", minutes=3)
    with pytest.raises(ValueError, match="weather: not one of builds"):
        aws.control("weather")


# Functions


def test_a_function_has_what_lambda_gives_and_nothing_of_the_server(stack, function):
    done = stack(function(Environment={"Variables": {"OWN": "1"}}) | {"Thing": custom()}, Outputs=outputs("Environment"))
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
        (b"\x7fELF" + bytes(14) + b"\xb7\0", {"Architectures": ["x86_64"]}, "is built for arm64, but it declares x86_64"),
        (b"\x7fELF" + bytes(14) + b"\x3e\0", {"Architectures": ["arm64"]}, "is built for x86_64, but it declares arm64"),
        (b"\x7fELF" + bytes(14) + b"\xb7\0", {"Architectures": ["arm64"]}, "machine cannot run a bootstrap that is built"),
        (b"print()", {}, "neither an ELF executable nor a script"),
        (b"", {"Runtime": "python3.12"}, "runs provided.\\* functions only"),
    ],
)
def test_a_function_that_cannot_run_is_refused(stack, function, bootstrap, properties, reason):
    if "cannot run" in reason and os.uname().machine == "aarch64":
        pytest.skip("this machine can run it")
    assert stack(function(bootstrap, **properties))["StackStatus"] == "ROLLBACK_COMPLETE"
    assert re.search(reason, stack.reasons())


def test_a_role_that_lambda_may_not_assume_is_refused(stack, function):
    assert stack(function() | {"Role": role("ec2")})["StackStatus"] == "ROLLBACK_COMPLETE"
    assert "cannot be assumed by Lambda" in stack.reasons()


# Custom resources


def test_a_stack_operation_is_answered_when_the_stack_has_settled(stack, function):
    assert stack(function() | {"Thing": custom()})["StackStatus"] == "CREATE_COMPLETE"
    assert stack(function() | {"Thing": custom(Changed=1)})["StackStatus"] == "UPDATE_COMPLETE"


def test_the_cli_deploys_in_seconds_and_progress_is_seen_meanwhile(aws, function, client, tmp_path):
    template = tmp_path / "template.json"
    template.write_text(json.dumps({"Resources": function() | {"Thing": custom(Answers="0", ServiceTimeout=3)}}))
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
        "RequestType ServiceToken ResponseURL StackId RequestId LogicalResourceId ResourceType ResourceProperties".split()
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
        ({"Type": "AWS::Logs::LogGroup", "Properties": {"KmsKeyId": "x"}}, "does not apply KmsKeyId of AWS::Logs::LogGroup"),
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
        "Assert": {"Fn::Equals": [{"Fn::ValueOf": ["SubnetId", "VpcId"]}, ref("VpcId")]},
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
        (sagemaker.LIFECYCLE, sagemaker.TYPES[sagemaker.LIFECYCLE], set(sagemaker.REPLACING[sagemaker.LIFECYCLE].split())),
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
        ("sagemaker", "stop_notebook_instance", {"NotebookInstanceName": "ada"}, "StopNotebookInstance", "notebook-instance/ada"),
        ("codebuild", "batch_get_builds", {"ids": ["ami:1"]}, "BatchGetBuilds", "project/ami"),
        ("codebuild", "stop_build", {"id": "ami:1"}, "StopBuild", "project/ami"),
        ("codebuild", "list_builds_for_project", {"projectName": "ami"}, "ListBuildsForProject", "project/ami"),
        ("emr", "list_steps", {"ClusterId": "j-1"}, "ListSteps", "cluster/j-1"),
        ("emr", "add_job_flow_steps", {"JobFlowId": "j-1", "Steps": []}, "AddJobFlowSteps", "cluster/j-1"),
        ("emr", "cancel_steps", {"ClusterId": "j-1", "StepIds": ["s-1"]}, "CancelSteps", "cluster/j-1"),
        ("scheduler", "get_schedule", {"GroupName": "own", "Name": "one"}, "GetSchedule", "schedule/own/one"),
        ("scheduler", "delete_schedule", {"GroupName": "own", "Name": "one"}, "DeleteSchedule", "schedule/own/one"),
        ("logs", "get_log_events", {"logGroupName": "g", "logStreamName": "s"}, "GetLogEvents", "log-group:g:log-stream:s"),
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
            "Properties": {**SCHEDULE, "ScheduleExpression": "rate(1 day)", "GroupName": ref("Group"), "Target": target},
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


@pytest.fixture
def seen(stack, function, client):
    """The details of the events that match a pattern, as a function saw them."""

    def watch(pattern, more=None):
        done = stack(function() | rule(pattern) | (more or {}), Outputs={"Group": {"Value": ref("Log")}})
        group = done["Outputs"][0]["OutputValue"]
        return lambda: [event["detail"] for event in sorted(logged(client, group), key=lambda event: event["time"])]

    return watch


# Buckets


def test_a_bucket_has_what_its_template_says(stack, client):
    rules = [
        {"Id": "a", "Status": "Enabled", "ExpirationInDays": 9, "Prefix": "logs/"},
        {"Id": "b", "Status": "Enabled", "NoncurrentVersionExpiration": {"NoncurrentDays": 30}, "ExpiredObjectDeleteMarker": True},
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
    assert stack({"Bucket": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": name}}})["StackStatus"] == "ROLLBACK_COMPLETE"
    assert "naming rules" in stack.reasons()


def test_a_bucket_that_holds_something_is_not_deleted(stack, client):
    stack({"Bucket": {"Type": "AWS::S3::Bucket", "Properties": {"BucketName": "not-empty"}}})
    client("s3").put_object(Bucket="not-empty", Key="a", Body=b"")
    client("cloudformation").delete_stack(StackName=stack.named)
    status = client("cloudformation").describe_stacks(StackName=stack.named)["Stacks"][0]["StackStatus"]
    client("s3").delete_object(Bucket="not-empty", Key="a")
    assert status == "DELETE_FAILED"
    assert "not empty" in stack.reasons()


def test_a_policy_that_asks_for_tls_lets_requests_through(client):
    s3 = client("s3")
    s3.create_bucket(Bucket="tls-only")
    refuse = {"Effect": "Deny", "Principal": "*", "Action": "s3:*", "Resource": "arn:aws:s3:::tls-only/*"}
    refuse["Condition"] = {"Bool": {"aws:SecureTransport": "false"}}
    s3.put_bucket_policy(Bucket="tls-only", Policy=json.dumps({"Version": "2012-10-17", "Statement": [refuse]}))
    s3.put_object(Bucket="tls-only", Key="a", Body=b"")
