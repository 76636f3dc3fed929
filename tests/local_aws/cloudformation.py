"""What MiniStack's CloudFormation lacks.

- A stack operation is answered when the stack has settled (or after SETTLE seconds), so that the waiters of the CLI,
  which ask every 30 seconds, end at once. Other connections are served meanwhile.
- A stack whose creation was rolled back can only be deleted.
- What a resource depends on that could not be deleted is kept with it, until the stack is deleted again.
- Custom resources are asked as AWS asks: the request also has ServiceToken at the top, the function is invoked
  asynchronously (an error is retried twice), and the answer is checked. A Create that failed is followed by a Delete
  of the physical id that it answered. Every request and its answers are written down (POST /_hail/answers).
- The pre-signed URL refuses what S3 would: a Content-Type, and a body in chunks without a length.
- DescribeStacks tells a parameter of the Parameter Store from what stands there.
- Parameters of AWS::EC2 types, also through the Parameter Store, must name something that exists.
- A property that is not applied here is refused (PROPERTIES), and so is a function in Conditions that is not known.
"""

import asyncio
import json
import secrets
import threading
import time
from urllib.parse import parse_qs, quote
from xml.etree import ElementTree

from ministack import app
from ministack.core.responses import get_region, new_uuid, now_iso
from ministack.services import cloudformation, ec2, lambda_svc
from ministack.services.cloudformation import (
    changesets,
    custom_resource,
    engine,
    handlers,
    helpers,
    provisioners,
    stacks,
)

from . import codebuild, emr, sagemaker, sns
from .ec2 import TYPES as SECURITY_GROUP_TYPES
from .ec2 import image_exists
from .seams import replace

SETTLE = 25
OPERATIONS = ("CreateStack", "UpdateStack", "DeleteStack", "ExecuteChangeSet")
UPDATES = ("UpdateStack", "CreateChangeSet")

# The properties that are applied (or, like a Description, do nothing on AWS either), for every type that may be used.
PROPERTIES = {
    "AWS::CodeBuild::Project": codebuild.PROPERTIES,
    "AWS::EC2::SecurityGroup": "GroupDescription GroupName SecurityGroupEgress SecurityGroupIngress Tags VpcId",
    "AWS::EMR::Cluster": emr.PROPERTIES,
    "AWS::Events::Rule": "Description EventPattern Name ScheduleExpression State Targets",
    "AWS::IAM::InstanceProfile": "InstanceProfileName Path Roles",
    "AWS::IAM::ManagedPolicy": "Description ManagedPolicyName Path PolicyDocument Roles",
    "AWS::IAM::Policy": "PolicyDocument PolicyName Roles",
    "AWS::IAM::Role": "AssumeRolePolicyDocument Description ManagedPolicyArns MaxSessionDuration Path Policies "
    "RoleName Tags",
    "AWS::Lambda::EventInvokeConfig": "FunctionName MaximumEventAgeInSeconds MaximumRetryAttempts Qualifier",
    "AWS::Lambda::Function": "Architectures Code Description Environment FunctionName Handler LoggingConfig MemorySize "
    "Role Runtime Tags Timeout",
    "AWS::Lambda::Permission": "Action FunctionName Principal SourceAccount SourceArn",
    "AWS::Logs::LogGroup": "LogGroupName RetentionInDays Tags",
    "AWS::S3::Bucket": "BucketEncryption BucketName LifecycleConfiguration NotificationConfiguration OwnershipControls "
    "PublicAccessBlockConfiguration Tags VersioningConfiguration",
    "AWS::S3::BucketPolicy": "Bucket PolicyDocument",
    "AWS::SSM::Parameter": "AllowedPattern DataType Description Name Tags Type Value",
    "AWS::Scheduler::Schedule": "Description FlexibleTimeWindow GroupName Name ScheduleExpression State Target",
    "AWS::Scheduler::ScheduleGroup": "Name Tags",
    **SECURITY_GROUP_TYPES,
    **sagemaker.TYPES,
    **sns.TYPES,
}
# These wait, or let their function make requests, and so may not run in the server's event loop.
WAITING = {"AWS::EMR::Cluster", sagemaker.NOTEBOOK}

stock_handle = None
stock_resolve_parameters = engine._resolve_parameters
stock_evaluate_conditions = engine._evaluate_conditions
stock_validate = engine.validate_template_support
stock_worker_thread = stacks._runs_on_worker_thread
stock_roll_back = stacks._roll_back_operation
stock_delete_resource = stacks._delete_resource
stock_delete_stack = stacks._delete_stack_async


def install():
    global stock_handle
    stock_handle = app.SERVICE_HANDLERS["cloudformation"]
    replace(app.SERVICE_HANDLERS, cloudformation=handle_request)
    replace(custom_resource, invoke_custom_resource=invoke)
    replace(
        stacks,
        _runs_on_worker_thread=lambda resource: resource in WAITING or stock_worker_thread(resource),
        _roll_back_operation=roll_back,
        _delete_resource=delete_resource,
        _evaluate_conditions=evaluate_conditions,
    )
    replace(handlers, _delete_stack_async=delete_stack)
    for module in (changesets, handlers):
        replace(
            module,
            _resolve_parameters=resolve_parameters,
            _evaluate_conditions=evaluate_conditions,
            validate_template_support=validate,
        )


async def handle_request(method, path, headers, body, query):
    """Answers a stack operation when its stack has settled."""
    asked = {**query, **parse_qs(body.decode())}
    action = asked.get("Action", [""])[0]
    stack = stack_of(asked)
    if action in UPDATES and stack and stack["StackStatus"] in ("ROLLBACK_COMPLETE", "ROLLBACK_FAILED"):
        said = f"Stack:{stack['StackId']} is in {stack['StackStatus']} state and can not be updated."
        return helpers._error("ValidationError", said)
    answer = await stock_handle(method, path, headers, body, query)
    if answer[0] == 200 and action == "DescribeStacks":
        answer = (*answer[:2], with_resolved_values(answer[2]))
    if answer[0] == 200 and action in OPERATIONS:
        stack = stack_of(asked)
        until = time.monotonic() + SETTLE
        await asyncio.sleep(0)  # the operation's task marks the stack when it first runs
        while stack and stack["StackStatus"].endswith("_IN_PROGRESS") and time.monotonic() < until:
            await asyncio.sleep(0.02)
    return answer


def with_resolved_values(body):
    """MiniStack shows what stood in the Parameter Store as the value of a parameter; AWS shows the name and that."""
    root = ElementTree.fromstring(body)
    ElementTree.register_namespace("", root.tag[1:].partition("}")[0])
    name = "{%s}" % root.tag[1:].partition("}")[0]
    for stack in root.iter(f"{name}Stacks"):
        for member in stack:
            resolved = cloudformation._stacks[member.find(f"{name}StackName").text].get("_resolved_params", {})
            for parameter in member.iter(f"{name}member"):
                key = parameter.find(f"{name}ParameterKey")
                if key is not None and (named := (resolved.get(key.text) or {}).get("SsmName")):
                    value = parameter.find(f"{name}ParameterValue")
                    ElementTree.SubElement(parameter, f"{name}ResolvedValue").text = value.text
                    value.text = named
    return ElementTree.tostring(root)


def stack_of(asked):
    """The stack that a request names, by name or ARN, itself or through its change set."""
    [name] = asked.get("StackName") or asked.get("ChangeSetName") or [""]
    return cloudformation._stacks.get(name.split("/")[1] if name.startswith("arn:") else name)


# What a template and its parameters may say


def validate(template, conditions, params=None):
    for name, resource in (template.get("Resources") or {}).items():
        kind, condition = resource.get("Type", ""), resource.get("Condition")
        if condition and not conditions.get(condition, True):
            continue
        if kind.startswith("Custom::") or kind.startswith("AWS::CloudFormation::"):
            continue
        if kind not in PROPERTIES and kind in provisioners._RESOURCE_HANDLERS:
            raise ValueError(f"{name}: the local AWS was not checked for {kind}; see PROPERTIES in cloudformation.py")
        unknown = set(resource.get("Properties") or {}) - set(PROPERTIES.get(kind, "").split())
        if unknown and kind in PROPERTIES:
            raise ValueError(f"{name}: the local AWS does not apply {', '.join(sorted(unknown))} of {kind}")
    stock_validate(template, conditions, params)


def resolve_parameters(template, provided, previous=None):
    resolved = stock_resolve_parameters(template, provided, previous)
    stores = {
        "AWS::EC2::VPC::Id": lambda value: value in ec2._vpcs,
        "AWS::EC2::Subnet::Id": lambda value: value in ec2._subnets,
        "AWS::EC2::SecurityGroup::Id": lambda value: value in ec2._security_groups,
        "AWS::EC2::KeyPair::KeyName": lambda value: value in ec2._key_pairs,
        "AWS::EC2::Image::Id": image_exists,
    }
    ec2._ensure_defaults_initialized()
    for name, definition in (template.get("Parameters") or {}).items():
        kind, is_list = engine._rule_inner_type(definition["Type"])
        if kind not in stores:
            continue
        value = resolved[name]["Value"]
        for member in value.split(",") if is_list else [value]:
            if not stores[kind](member.strip()):
                raise ValueError(
                    f"Parameter validation failed: parameter value {member} for parameter name {name} does not exist"
                )
    return resolved


def evaluate_conditions(template, params):
    check_condition(template.get("Conditions") or {}, top=True)
    return stock_evaluate_conditions(template, params)


def check_condition(node, top=False):
    if isinstance(node, list):
        for member in node:
            check_condition(member)
    elif isinstance(node, dict):
        known = {"Fn::And", "Fn::Equals", "Fn::Not", "Fn::Or", "Fn::Select", "Condition", "Ref"}
        if unknown := set() if top else set(node) - known:
            raise ValueError(f"the local AWS does not evaluate {', '.join(sorted(unknown))} in Conditions")
        for member in node.values():
            check_condition(member)


# Custom resources

# Every request that a custom resource was sent, in order.
requests = []


class Request:
    """One request to a custom resource: what was sent, and what was put to its pre-signed URL."""

    def __init__(self, event):
        self.event = event
        self.bodies = []
        self.refused = 0
        self.answered = threading.Event()

    def shown(self):
        names = ("LogicalResourceId", "RequestType", "RequestId", "StackId", "PhysicalResourceId")
        last = json.loads(self.bodies[-1]) if self.bodies else None
        seen = {"Answers": len(self.bodies), "Refused": self.refused, "Last": last}
        return {name: self.event[name] for name in names if name in self.event} | seen


def invoke(kind, logical_id, props, stack_name, stack_id, resource_type, physical_id=None, old_props=None):
    """Asks a custom resource and waits for its answer; returns its physical id and Data, raises what failed."""
    as_strings = custom_resource._normalise_resource_properties
    event = {
        "RequestType": kind,
        "ServiceToken": props["ServiceToken"],
        "ResponseURL": None,
        "StackId": stack_id,
        "RequestId": new_uuid(),
        "LogicalResourceId": logical_id,
        "ResourceType": resource_type,
        "ResourceProperties": as_strings(props),
    }
    if physical_id is not None:
        event["PhysicalResourceId"] = physical_id
    if old_props is not None:
        event["OldResourceProperties"] = as_strings(old_props)
    event["ResponseURL"] = response_url(event)
    function, config, _ = lambda_svc._get_func_record_for_ref(props["ServiceToken"])
    if function is None:
        raise ValueError(f"Lambda function {props['ServiceToken']} does not exist")
    request = Request(event)
    requests.append(request)
    lambda_svc.invoke_async_with_retry(lambda_svc._execution_record_for_config(function, config), event)
    try:
        if not request.answered.wait(int(props.get("ServiceTimeout", 3600))):
            raise TimeoutError(
                "CloudFormation did not receive a response from your Custom Resource. Please check your logs for "
                f"requestId [{event['RequestId']}]."
            )
        return result(event, request.bodies[0])
    except Exception:
        if kind == "Create":
            remember_failed_create(stack_name, request)
        raise


def response_url(event):
    """A pre-signed URL like AWS's, in what it is made of and so in what must be escaped and kept secret."""
    key = quote(f"{event['StackId']}|{event['LogicalResourceId']}|{event['RequestId']}", safe="")
    return (
        f"{app.os.environ['AWS_ENDPOINT_URL']}/_hail/response/{key}?X-Amz-Algorithm=AWS4-HMAC-SHA256"
        f"&X-Amz-Date={time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}&X-Amz-SignedHeaders=host&X-Amz-Expires=7200"
        f"&X-Amz-Credential=LOCAL%2F{time.strftime('%Y%m%d', time.gmtime())}%2F{get_region()}%2Fs3%2Faws4_request"
        f"&X-Amz-Signature={secrets.token_hex(32)}"
    )


def response(scope, headers, body):
    """One PUT to a pre-signed URL: the status and the body of S3's answer."""
    url = f"{scope['raw_path'].decode()}?{scope['query_string'].decode()}"
    request = next((request for request in requests if request.event["ResponseURL"].endswith(url)), None)
    refusal = None
    if scope["method"] != "PUT" or request is None:
        refusal = 403, "AccessDenied", "Access Denied"
    elif headers.get("content-type"):
        refusal = 403, "SignatureDoesNotMatch", "The request has a Content-Type, which was not signed"
    elif "content-length" not in headers:
        refusal = 411, "MissingContentLength", "You must provide the Content-Length HTTP header"
    if refusal:
        if request:
            request.refused += 1
        status, code, message = refusal
        return status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    request.bodies.append(body)
    request.answered.set()
    return 200, ""


def result(event, body):
    """The physical id and Data of an answer that CloudFormation would take; raises its own words otherwise."""
    if len(body) > 4096:
        raise ValueError("Response object is too long.")
    try:
        answer = json.loads(body)
        status, physical_id = answer["Status"], answer["PhysicalResourceId"]
        same = all(answer[name] == event[name] for name in ("StackId", "RequestId", "LogicalResourceId"))
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"Invalid response from the custom resource: {problem!r} in {body!r}") from None
    if not same or status not in ("SUCCESS", "FAILED") or not physical_id or not isinstance(physical_id, str):
        raise ValueError(f"Invalid response from the custom resource: {body!r}")
    if status == "FAILED":
        raise RuntimeError(
            "Received response status [FAILED] from custom resource. Message returned: "
            f"{answer.get('Reason', '')} (RequestId: {event['RequestId']})"
        )
    return physical_id, answer.get("Data") or {}


def remember_failed_create(stack_name, request):
    """Keeps the resource in the stack, so that the rollback, or the stack's deletion, sends a Delete for it."""
    event = request.event
    try:
        physical_id = json.loads(request.bodies[0])["PhysicalResourceId"]
    except (IndexError, ValueError, KeyError, TypeError):
        physical_id = f"{stack_name}-{event['LogicalResourceId']}-{new_uuid()[:12].upper()}"
    cloudformation._stacks[stack_name]["_resources"][event["LogicalResourceId"]] = {
        "PhysicalResourceId": physical_id,
        "ResourceType": event["ResourceType"],
        "ResourceStatus": "CREATE_FAILED",
        "LogicalResourceId": event["LogicalResourceId"],
        "Properties": event["ResourceProperties"],
        "Attributes": {},
        "Timestamp": now_iso(),
    }


async def roll_back(stack_name, stack_id, stack, operation, *arguments, **options):
    failed = operation["failed_logical_id"]
    if stack["_resources"].get(failed, {}).get("ResourceStatus") == "CREATE_FAILED":
        operation["created"].append(failed)
    await stock_roll_back(stack_name, stack_id, stack, operation, *arguments, **options)


# Deletion


def delete_resource(kind, physical_id, props, stack_name, logical_id=None):
    try:
        stock_delete_resource(kind, physical_id, props, stack_name, logical_id)
    except Exception:
        stack = cloudformation._stacks[stack_name]
        if stack["StackStatus"] == "DELETE_IN_PROGRESS":
            there, defined = stack["_resources"], stack["_template"]["Resources"]
            needed = stacks._with_dependencies([logical_id], defined, set(there)) - {logical_id}
            stack.setdefault("_kept", {}).update({name: there.pop(name) for name in needed & there.keys()})
        raise


async def delete_stack(stack_name, *arguments, **options):
    await stock_delete_stack(stack_name, *arguments, **options)
    stack = cloudformation._stacks.get(stack_name, {})
    stack.get("_resources", {}).update(stack.pop("_kept", {}))
