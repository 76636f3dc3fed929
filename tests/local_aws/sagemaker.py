"""SageMaker's notebook instances, which MiniStack has none of.

- CreateNotebookInstance, Describe, List, Update, Start, Stop and Delete, and the same for lifecycle configurations,
  with ListTags and AddTags. The states in between (Pending, Stopping, Updating, Deleting) take as long as the control
  API says. No script runs.
- Requests are checked against the API model, and that what they name exists; a state that does not allow a request
  refuses it.
- "SageMaker Notebook Instance State Change" is sent for every state.
- AWS::SageMaker::NotebookInstance and AWS::SageMaker::NotebookInstanceLifecycleConfig. Ref is the ARN, which SageMaker
  writes in lower case; the name is an attribute. An instance that runs is stopped for an update and started again.
"""

import base64
import binascii
import json
import time

from ministack import app
from ministack.core import router
from ministack.core.responses import (
    AccountRegionScopedDict,
    error_response_json,
    get_account_id,
    get_region,
    json_response,
    new_uuid,
)
from ministack.services import ec2
from ministack.services.cloudformation import provisioners

from . import events, iam, model
from .simulation import later, settings

NOTEBOOK, LIFECYCLE = "AWS::SageMaker::NotebookInstance", "AWS::SageMaker::NotebookInstanceLifecycleConfig"
TYPES = {
    NOTEBOOK: "DirectInternetAccess InstanceMetadataServiceConfiguration InstanceType KmsKeyId LifecycleConfigName "
    "NotebookInstanceName PlatformIdentifier RoleArn RootAccess SecurityGroupIds SubnetId Tags VolumeSizeInGB",
    LIFECYCLE: "NotebookInstanceLifecycleConfigName OnCreate OnStart",
}
REPLACING = {
    NOTEBOOK: "DirectInternetAccess KmsKeyId NotebookInstanceName PlatformIdentifier SecurityGroupIds SubnetId",
    LIFECYCLE: "NotebookInstanceLifecycleConfigName",
}
# The names that DescribeNotebookInstance and UpdateNotebookInstance have for what Create calls otherwise.
DESCRIBED = {"LifecycleConfigName": "NotebookInstanceLifecycleConfigName", "SecurityGroupIds": "SecurityGroups"}

notebooks = AccountRegionScopedDict()
lifecycles = AccountRegionScopedDict()


class Refusal(Exception):
    """What the service answers with an error."""


def install():
    router.SERVICE_PATTERNS["sagemaker"] = {"target_prefixes": ["SageMaker."], "host_patterns": [r"sagemaker\."]}
    app.SERVICE_HANDLERS["sagemaker"] = handle_request
    for resource, create, update, delete in (
        (NOTEBOOK, create_notebook, update_notebook, delete_notebook),
        (LIFECYCLE, create_lifecycle, update_lifecycle, delete_lifecycle),
    ):
        provisioners._RESOURCE_HANDLERS[resource] = {"create": create, "update": update, "delete": delete}
        provisioners._REPLACING_PROPERTIES[resource] = tuple(REPLACING[resource].split())
    provisioners._STACK_TAG_PROPERTY[NOTEBOOK] = ("Tags", "list")


async def handle_request(method, path, headers, body, query):
    operation = headers.get("x-amz-target", "").removeprefix("SageMaker.")
    try:
        return json_response(call(operation, json.loads(body or b"{}")))
    except Refusal as refusal:
        return error_response_json("ValidationException", str(refusal))


def call(operation, request):
    """Carries out one operation of the API; raises Refusal."""
    if operation not in OPERATIONS:
        raise Refusal(f"the local AWS has no {operation}: of SageMaker it has notebook instances only")
    try:
        model.check("sagemaker", operation, request)
    except ValueError as problem:
        raise Refusal(str(problem)) from None
    return OPERATIONS[operation](request)


def arn(kind, name):
    return f"arn:aws:sagemaker:{get_region()}:{get_account_id()}:{kind}/{name.lower()}"


# Notebook instances


def notebook(name, *states):
    """The record of an instance; refuses if there is none or it is in none of the states."""
    found = notebooks.get(name)
    if found is None:
        raise Refusal("RecordNotFound")
    if states and found["NotebookInstanceStatus"] not in states:
        raise Refusal(
            f"Status ({found['NotebookInstanceStatus']}) not in ([{', '.join(states)}]). Unable to transition to the "
            f"new status for Notebook Instance ({found['NotebookInstanceArn']})"
        )
    return found


def check_named(request):
    """Refuses a request that names a role, lifecycle configuration, subnet or group that does not exist."""
    role = request.get("RoleArn")
    if role and not iam.trusts(role, "sagemaker.amazonaws.com"):
        raise Refusal(f"Could not assume role {role}. Please ensure that the role exists and allows SageMaker")
    lifecycle = request.get("LifecycleConfigName")
    if lifecycle and lifecycle not in lifecycles:
        raise Refusal(f"Notebook instance lifecycle config {lifecycle} does not exist")
    subnet = request.get("SubnetId")
    if subnet and subnet not in ec2._subnets:
        raise Refusal(f"The subnet ID '{subnet}' does not exist")
    for group in request.get("SecurityGroupIds", []):
        if ec2._security_groups.get(group, {}).get("VpcId") != ec2._subnets[subnet]["VpcId"]:
            raise Refusal(f"The security group '{group}' does not exist in the VPC of the subnet {subnet}")


def create_notebook_instance(request):
    name = request["NotebookInstanceName"]
    if name.lower() in (other.lower() for other in notebooks):
        raise Refusal(f"Cannot create a duplicate Notebook Instance ({arn('notebook-instance', name)})")
    check_named(request)
    record = {
        "NotebookInstanceArn": arn("notebook-instance", name),
        "Url": f"{name.lower()}.notebook.{get_region()}.sagemaker.aws",
        "NetworkInterfaceId": f"eni-{new_uuid().replace('-', '')[:17]}" if "SubnetId" in request else None,
        "DirectInternetAccess": "Enabled",
        "RootAccess": "Enabled",
        "VolumeSizeInGB": 5,
        "PlatformIdentifier": "notebook-al2-v2",
        "CreationTime": time.time(),
        **{DESCRIBED.get(key, key): value for key, value in request.items()},
    }
    notebooks[name] = {key: value for key, value in record.items() if value is not None}
    become(notebooks[name], "Pending", "InService")
    return {"NotebookInstanceArn": record["NotebookInstanceArn"]}


def become(record, *states):
    """Goes through the states, one after another, and sends an event for each."""
    record["NotebookInstanceStatus"], *following = states
    record["LastModifiedTime"] = time.time()
    detail = {key: int(value * 1000) if key.endswith("Time") else value for key, value in record.items()}
    detail["Tags"] = {tag["Key"]: tag["Value"] for tag in record.get("Tags", [])}
    resource = record["NotebookInstanceArn"]
    events.send("aws.sagemaker", "SageMaker Notebook Instance State Change", detail, [resource])
    if following and notebooks.get(record["NotebookInstanceName"]) is record:
        later(settings["notebooks"]["seconds"], become, record, *following)
    elif states == ("Deleted",):
        notebooks.pop(record["NotebookInstanceName"], None)


def stop_notebook_instance(request):
    become(notebook(request["NotebookInstanceName"], "InService"), "Stopping", "Stopped")
    return {}


def start_notebook_instance(request):
    become(notebook(request["NotebookInstanceName"], "Stopped", "Failed"), "Pending", "InService")
    return {}


def delete_notebook_instance(request):
    become(notebook(request["NotebookInstanceName"], "Stopped", "Failed"), "Deleting", "Deleted")
    return {}


def update_notebook_instance(request):
    record = notebook(request["NotebookInstanceName"], "Stopped", "Failed")
    check_named(request)
    request = dict(request)
    for name in [name for name in request if name.startswith("Disassociate")]:
        if request.pop(name):
            described = name.removeprefix("Disassociate")
            record.pop({"LifecycleConfig": "NotebookInstanceLifecycleConfigName"}.get(described, described), None)
    if request.get("VolumeSizeInGB", 10**6) < record["VolumeSizeInGB"]:
        raise Refusal(f"The volume of {record['NotebookInstanceName']} can only grow, not become smaller")
    record |= {DESCRIBED.get(key, key): value for key, value in request.items()}
    become(record, "Updating", "Stopped")
    return {}


def list_notebook_instances(request):
    return {
        "NotebookInstances": [
            record
            for record in notebooks.values()
            if request.get("NameContains", "") in record["NotebookInstanceName"]
            and record["NotebookInstanceStatus"] == request.get("StatusEquals", record["NotebookInstanceStatus"])
        ]
    }


def tagged(request):
    for record in notebooks.values():
        if record["NotebookInstanceArn"] == request["ResourceArn"]:
            return record
    raise Refusal(f"{request['ResourceArn']} does not exist")


def add_tags(request):
    record = tagged(request)
    tags = {tag["Key"]: tag["Value"] for tag in record.get("Tags", []) + request["Tags"]}
    record["Tags"] = [{"Key": key, "Value": value} for key, value in tags.items()]
    return {"Tags": record["Tags"]}


# Lifecycle configurations


def put_lifecycle(request, exists):
    name = request["NotebookInstanceLifecycleConfigName"]
    if (name in lifecycles) != exists:
        raise Refusal(f"Notebook instance lifecycle config {name} {'does not exist' if exists else 'exists already'}")
    for hook in request.get("OnCreate", []) + request.get("OnStart", []):
        try:
            base64.b64decode(hook["Content"], validate=True)
        except (binascii.Error, KeyError):
            raise Refusal(f"The content of {name} is not in base64") from None
    old = lifecycles.get(name, {"CreationTime": time.time()})
    record = {**old, **request, "LastModifiedTime": time.time()}
    record["NotebookInstanceLifecycleConfigArn"] = arn("notebook-instance-lifecycle-config", name)
    lifecycles[name] = record
    return {"NotebookInstanceLifecycleConfigArn": record["NotebookInstanceLifecycleConfigArn"]} if not exists else {}


def lifecycle(request):
    name = request["NotebookInstanceLifecycleConfigName"]
    if name not in lifecycles:
        raise Refusal(f"Notebook instance lifecycle config {name} does not exist")
    return lifecycles[name]


def delete_lifecycle_config(request):
    lifecycles.pop(lifecycle(request)["NotebookInstanceLifecycleConfigName"])
    return {}


OPERATIONS = {
    "AddTags": add_tags,
    "CreateNotebookInstance": create_notebook_instance,
    "CreateNotebookInstanceLifecycleConfig": lambda request: put_lifecycle(request, exists=False),
    "DeleteNotebookInstance": delete_notebook_instance,
    "DeleteNotebookInstanceLifecycleConfig": delete_lifecycle_config,
    "DescribeNotebookInstance": lambda request: notebook(request["NotebookInstanceName"]),
    "DescribeNotebookInstanceLifecycleConfig": lifecycle,
    "ListNotebookInstanceLifecycleConfigs": lambda _: {"NotebookInstanceLifecycleConfigs": lifecycles.values()},
    "ListNotebookInstances": list_notebook_instances,
    "ListTags": lambda request: {"Tags": tagged(request).get("Tags", [])},
    "StartNotebookInstance": start_notebook_instance,
    "StopNotebookInstance": stop_notebook_instance,
    "UpdateNotebookInstance": update_notebook_instance,
    "UpdateNotebookInstanceLifecycleConfig": lambda request: put_lifecycle(request, exists=True),
}


# CloudFormation


def name_from(resource_arn, store, member):
    """The name of what has the ARN, which has it in lower case."""
    return next((name for name, record in store.items() if record[member] == resource_arn), None)


def create_notebook(logical_id, props, stack_name):
    """Returns once the instance is in service."""
    name = props.get("NotebookInstanceName") or provisioners._physical_name(stack_name, logical_id, max_len=63)
    request = {**props, "NotebookInstanceName": name}
    call("CreateNotebookInstance", model.typed(model.shape("sagemaker", "CreateNotebookInstance"), request))
    wait_until(name, "InService")
    return arn("notebook-instance", name), {"NotebookInstanceName": name}


def update_notebook(resource_arn, old, new, stack_name):
    name = name_from(resource_arn, notebooks, "NotebookInstanceArn")
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} - {"Tags"}
    request = {key: new[key] for key in changed & new.keys()}
    if "LifecycleConfigName" in changed - new.keys():
        request["DisassociateLifecycleConfig"] = True
    running = notebook(name)["NotebookInstanceStatus"] == "InService"
    if request:
        if running:
            call("StopNotebookInstance", {"NotebookInstanceName": name})
            wait_until(name, "Stopped")
        request = {**request, "NotebookInstanceName": name}
        call("UpdateNotebookInstance", model.typed(model.shape("sagemaker", "UpdateNotebookInstance"), request))
        wait_until(name, "Stopped")
        if running:
            call("StartNotebookInstance", {"NotebookInstanceName": name})
            wait_until(name, "InService")
    notebook(name)["Tags"] = new.get("Tags", [])
    return resource_arn, {"NotebookInstanceName": name}


def delete_notebook(resource_arn, props):
    name = name_from(resource_arn, notebooks, "NotebookInstanceArn")
    if name is None:
        return
    if notebook(name)["NotebookInstanceStatus"] == "InService":
        call("StopNotebookInstance", {"NotebookInstanceName": name})
    wait_until(name, "Stopped", "Failed")
    call("DeleteNotebookInstance", {"NotebookInstanceName": name})
    while name in notebooks:
        time.sleep(0.05)


def wait_until(name, *states):
    while notebook(name)["NotebookInstanceStatus"] not in states:
        time.sleep(0.05)


def create_lifecycle(logical_id, props, stack_name):
    name = props.get("NotebookInstanceLifecycleConfigName")
    name = name or provisioners._physical_name(stack_name, logical_id, max_len=63)
    call("CreateNotebookInstanceLifecycleConfig", {**props, "NotebookInstanceLifecycleConfigName": name})
    return lifecycle_result(name)


def update_lifecycle(resource_arn, old, new, stack_name):
    name = name_from(resource_arn, lifecycles, "NotebookInstanceLifecycleConfigArn")
    call("UpdateNotebookInstanceLifecycleConfig", {**new, "NotebookInstanceLifecycleConfigName": name})
    return lifecycle_result(name)


def delete_lifecycle(resource_arn, props):
    if name := name_from(resource_arn, lifecycles, "NotebookInstanceLifecycleConfigArn"):
        call("DeleteNotebookInstanceLifecycleConfig", {"NotebookInstanceLifecycleConfigName": name})


def lifecycle_result(name):
    return arn("notebook-instance-lifecycle-config", name), {"NotebookInstanceLifecycleConfigName": name}
