"""What MiniStack's EMR lacks: time, failure, and CloudFormation.

- A cluster is STARTING and then WAITING; it is described with all that it was created with.
- A step is PENDING, RUNNING, COMPLETED or FAILED (with FailureDetails), as many at once as the cluster's step
  concurrency says, and can be cancelled; nothing is executed. Each change sends "EMR Step Status Change".
- ListSteps gives the newest first. A terminated cluster takes no steps.
- Managed scaling and auto-termination policies are put, shown and removed; nothing scales or ends.
- AWS::EMR::Cluster: IN_PLACE and the number of core nodes are updated, anything else replaces the cluster. Ref is
  the id.
- Requests are checked against the API model, and that the image, subnet, groups, roles and key pair exist.
- A cluster adds the rules that EMR needs to its managed security groups, as EMR does, and leaves them there: groups
  that name each other cannot be deleted unless the template declares these rules itself.
"""

import json
import threading
import time

from ministack import app
from ministack.core.responses import error_response_json, json_response
from ministack.services import ec2, emr, iam as ministack_iam
from ministack.services.cloudformation import provisioners

from . import events, iam, model
from .ec2 import image_exists
from .seams import replace
from .simulation import later, settings

TYPE = "AWS::EMR::Cluster"
PROPERTIES = (
    "AdditionalInfo Applications AutoScalingRole AutoTerminationPolicy BootstrapActions Configurations CustomAmiId "
    "EbsRootVolumeIops EbsRootVolumeSize EbsRootVolumeThroughput Instances JobFlowRole LogEncryptionKmsKeyId LogUri "
    "ManagedScalingPolicy Name OSReleaseLabel ReleaseLabel ScaleDownBehavior SecurityConfiguration ServiceRole "
    "StepConcurrencyLevel Steps Tags VisibleToAllUsers"
)
IN_PLACE = {"AutoTerminationPolicy", "ManagedScalingPolicy", "StepConcurrencyLevel", "Tags", "VisibleToAllUsers"}
# What DescribeCluster shows just as it was asked for.
SHOWN = (
    "AutoScalingRole Configurations CustomAmiId EbsRootVolumeIops EbsRootVolumeSize EbsRootVolumeThroughput "
    "LogEncryptionKmsKeyId OSReleaseLabel ScaleDownBehavior SecurityConfiguration"
).split()
one_at_a_time = threading.RLock()
ENDED = ("TERMINATING", "TERMINATED", "TERMINATED_WITH_ERRORS")


def install():
    replace(emr, _now_iso=now)  # the API has numbers, which Rust's SDK insists on
    replace(
        emr._HANDLERS,
        RunJobFlow=run_job_flow,
        AddJobFlowSteps=add_steps,
        ListSteps=list_steps,
        CancelSteps=cancel_steps,
        ModifyCluster=modify_cluster,
        TerminateJobFlows=terminate,
    )
    for name in ("ManagedScalingPolicy", "AutoTerminationPolicy"):
        emr._HANDLERS[f"Put{name}"] = lambda data, name=name: change_policy(name, data, data[name])
        emr._HANDLERS[f"Remove{name}"] = lambda data, name=name: change_policy(name, data, None)
        emr._HANDLERS[f"Get{name}"] = lambda data, name=name: show_policy(name, data)
    stock = app.SERVICE_HANDLERS["elasticmapreduce"]

    async def handle_request(method, path, headers, body, query):
        operation = headers.get("x-amz-target", "").rsplit(".", 1)[-1]
        try:
            model.check("emr", operation, json.loads(body or b"{}"))
        except ValueError as problem:
            return error_response_json("ValidationException", str(problem))
        return await stock(method, path, headers, body, query)

    replace(app.SERVICE_HANDLERS, elasticmapreduce=handle_request)
    provisioners._RESOURCE_HANDLERS[TYPE] = {"create": create, "update": update, "delete": delete}
    replacing = set(PROPERTIES.split()) - IN_PLACE - {"Instances"}
    provisioners._REPLACING_PROPERTIES[TYPE] = tuple(replacing)
    provisioners._STACK_TAG_PROPERTY[TYPE] = ("Tags", "list")


def now():
    return time.time()


def invalid(message):
    return error_response_json("InvalidRequestException", message)


# Clusters


def run_job_flow(data):
    if problem := missing(data):
        return error_response_json("ValidationException", problem)
    answer = emr._run_job_flow(data)
    if answer[0] >= 400:
        return answer
    cluster = emr._clusters[json.loads(answer[2])["JobFlowId"]]
    cluster |= {name: data[name] for name in SHOWN if name in data}
    instances = data["Instances"]
    cluster["Ec2InstanceAttributes"] |= {
        name: instances[name]
        for name in ("AdditionalMasterSecurityGroups", "AdditionalSlaveSecurityGroups", "ServiceAccessSecurityGroup")
        if name in instances
    }
    for group, asked in zip(cluster["InstanceGroups"], instances.get("InstanceGroups", []), strict=False):
        group["EbsBlockDevices"] = [
            {"VolumeSpecification": device["VolumeSpecification"]}
            for device in (asked.get("EbsConfiguration") or {}).get("EbsBlockDeviceConfigs", [])
            for _ in range(device.get("VolumesPerInstance", 1))
        ]
    cluster["_policies"] = {n: data[n] for n in ("ManagedScalingPolicy", "AutoTerminationPolicy") if n in data}
    cluster["Status"] = {"State": "STARTING", "StateChangeReason": {}, "Timeline": {"CreationDateTime": now()}}
    cluster["MasterPublicDnsName"] = f"ip-10-0-0-{len(emr._clusters) + 9}.ec2.internal"
    for step in emr._steps[cluster["Id"]]:
        step["Status"] = {"State": "PENDING", "StateChangeReason": {}, "Timeline": {"CreationDateTime": now()}}
    open_managed_groups(instances)
    later(settings["clusters"]["seconds"], become_ready, cluster)
    return answer


def missing(data):
    """What the request names that does not exist, as a sentence."""
    instances = data["Instances"]
    subnet = instances.get("Ec2SubnetId") or (instances.get("Ec2SubnetIds") or [""])[0]
    if subnet not in ec2._subnets:
        return f"The subnet '{subnet}' does not exist"
    if "CustomAmiId" in data and not image_exists(data["CustomAmiId"]):
        return f"The image '{data['CustomAmiId']}' does not exist"
    groups = [instances.get(f"EmrManaged{kind}SecurityGroup") for kind in ("Master", "Slave")]
    groups += [instances.get("ServiceAccessSecurityGroup"), *instances.get("AdditionalMasterSecurityGroups", [])]
    groups += instances.get("AdditionalSlaveSecurityGroups", [])
    for group in filter(None, groups):
        if ec2._security_groups.get(group, {}).get("VpcId") != ec2._subnets[subnet]["VpcId"]:
            return f"The security group '{group}' does not exist in the VPC of the subnet {subnet}"
    profile = ministack_iam._instance_profiles.get(data.get("JobFlowRole"))
    if not profile or not profile["Roles"]:
        return f"Invalid InstanceProfile: {data.get('JobFlowRole')}"
    role = data.get("ServiceRole", "").rsplit("/", 1)[-1]
    if role not in ministack_iam._roles or not iam.trusts(
        ministack_iam._roles[role]["Arn"], "elasticmapreduce.amazonaws.com"
    ):
        return f"ServiceRole {data.get('ServiceRole')} does not exist or EMR may not assume it"
    key = instances.get("Ec2KeyName")
    if key and key not in ec2._key_pairs:
        return f"The key pair '{key}' does not exist"


def open_managed_groups(instances):
    """The rules of EMR-managed security groups: every node reaches every other."""
    managed = {instances.get(f"EmrManaged{kind}SecurityGroup") for kind in ("Master", "Slave")} - {None, ""}
    for group in (ec2._security_groups[group] for group in managed):
        for source in managed:
            for protocol, first, last in (("tcp", 0, 65535), ("udp", 0, 65535), ("icmp", -1, -1)):
                if not any(
                    rule["IpProtocol"] in (protocol, "-1")
                    and rule.get("FromPort", first) == first
                    and any(pair.get("GroupId") == source for pair in rule["UserIdGroupPairs"])
                    for rule in group["IpPermissions"]
                ):
                    rule = {"IpProtocol": protocol, "FromPort": first, "ToPort": last, "SourceSecurityGroupId": source}
                    group["IpPermissions"] += provisioners._ec2_sg_permissions([rule])


def become_ready(cluster):
    if cluster["Status"]["State"] == "STARTING":
        cluster["Status"]["State"] = "WAITING"
        cluster["Status"]["Timeline"]["ReadyDateTime"] = now()
        run_next_steps(cluster)


def modify_cluster(data):
    cluster = emr._clusters.get(data["ClusterId"])
    if cluster is None or cluster["Status"]["State"] in ENDED:
        return invalid(f"Cluster id '{data['ClusterId']}' is not valid.")
    answer = emr._modify_cluster(data)
    run_next_steps(cluster)
    return answer


def terminate(data):
    answer = emr._terminate_job_flows(data)
    if answer[0] == 200:
        for cluster_id in data["JobFlowIds"]:
            for step in emr._steps.get(cluster_id, []):
                if step["Status"]["State"] in ("PENDING", "RUNNING"):
                    state = "CANCELLED" if step["Status"]["State"] == "PENDING" else "INTERRUPTED"
                    change_step(emr._clusters[cluster_id], step, state)
    return answer


def change_policy(name, data, policy):
    cluster = emr._clusters.get(data["ClusterId"])
    if cluster is None:
        return invalid(f"Cluster id '{data['ClusterId']}' is not valid.")
    cluster["_policies"].pop(name, None)
    if policy:
        cluster["_policies"][name] = policy
    return json_response({})


def show_policy(name, data):
    cluster = emr._clusters.get(data["ClusterId"])
    if cluster is None:
        return invalid(f"Cluster id '{data['ClusterId']}' is not valid.")
    return json_response({name: cluster["_policies"][name]} if name in cluster["_policies"] else {})


# Steps


def add_steps(data):
    cluster = emr._clusters.get(data["JobFlowId"])
    if cluster is None:
        return invalid(f"Cluster id '{data['JobFlowId']}' is not valid.")
    if cluster["Status"]["State"] in ENDED:
        return error_response_json(
            "ValidationException",
            f"A job flow that is shutting down, terminated, or finished may not be modified: {cluster['Id']}",
        )
    added = []
    for asked in data["Steps"]:
        step = emr._make_step(asked)
        step["ActionOnFailure"] = asked.get("ActionOnFailure", "CONTINUE")
        emr._steps.setdefault(cluster["Id"], []).append(step)
        step["Status"]["Timeline"] = {"CreationDateTime": now()}
        change_step(cluster, step, "PENDING")
        added.append(step["Id"])
    run_next_steps(cluster)
    return json_response({"StepIds": added})


def run_next_steps(cluster):
    """Starts pending steps, the oldest first, as many as may run at once."""
    if cluster["Status"]["State"] not in ("WAITING", "RUNNING"):
        return
    with one_at_a_time:
        steps = emr._steps.get(cluster["Id"], [])
        running = sum(step["Status"]["State"] == "RUNNING" for step in steps)
        pending = [step for step in steps if step["Status"]["State"] == "PENDING"]
        for step in pending[: max(0, cluster["StepConcurrencyLevel"] - running)]:
            step["Status"]["Timeline"]["StartDateTime"] = now()
            change_step(cluster, step, "RUNNING")
            later(settings["steps"]["seconds"], end_step, cluster, step)
        steps_run = any(step["Status"]["State"] == "RUNNING" for step in steps)
        cluster["Status"]["State"] = "RUNNING" if steps_run else "WAITING"


def end_step(cluster, step):
    if step["Status"]["State"] != "RUNNING":
        return
    step["Status"]["Timeline"]["EndDateTime"] = now()
    reason = settings["steps"]["fail"].get(step["Name"])
    if reason is None:
        change_step(cluster, step, "COMPLETED")
    else:
        log = f"{cluster.get('LogUri') or 's3://'}{cluster['Id']}/steps/{step['Id']}/stderr.gz"
        step["Status"]["FailureDetails"] = {"Reason": reason, "Message": f"Exception: {reason}", "LogFile": log}
        change_step(cluster, step, "FAILED")
        if step["ActionOnFailure"] == "CANCEL_AND_WAIT":
            for other in emr._steps[cluster["Id"]]:
                if other["Status"]["State"] == "PENDING":
                    change_step(cluster, other, "CANCELLED")
        elif step["ActionOnFailure"] in ("TERMINATE_CLUSTER", "TERMINATE_JOB_FLOW"):
            terminate({"JobFlowIds": [cluster["Id"]]})
    run_next_steps(cluster)


def change_step(cluster, step, state):
    """Moves a step to its next state and says so."""
    step["Status"]["State"] = state
    step["Status"]["StateChangeReason"] = {}
    what = {
        "PENDING": "was added to",
        "RUNNING": "started running on",
        "COMPLETED": "completed on",
        "FAILED": "failed on",
        "CANCELLED": "was cancelled on",
        "INTERRUPTED": "was interrupted on",
    }[state]
    events.send(
        "aws.emr",
        "EMR Step Status Change",
        {
            "severity": "ERROR" if state == "FAILED" else "INFO",
            "actionOnFailure": step["ActionOnFailure"],
            "stepId": step["Id"],
            "name": step["Name"],
            "clusterId": cluster["Id"],
            "state": state,
            "message": f"Step {step['Id']} ({step['Name']}) {what} Amazon EMR cluster {cluster['Id']} "
            f"({cluster['Name']}) at {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC.",
        },
    )


def list_steps(data):
    """The newest step first, 50 at a time; a marker is the number of steps already given."""
    if data["ClusterId"] not in emr._clusters:
        return invalid(f"Cluster id '{data['ClusterId']}' is not valid.")
    steps = [
        step
        for step in reversed(emr._steps.get(data["ClusterId"], []))
        if step["Status"]["State"] in data.get("StepStates", [step["Status"]["State"]])
        and step["Id"] in data.get("StepIds", [step["Id"]])
    ]
    first = int(data.get("Marker") or 0)
    more = {"Marker": str(first + 50)} if len(steps) > first + 50 else {}
    return json_response({"Steps": steps[first : first + 50], **more})


def cancel_steps(data):
    cluster = emr._clusters.get(data["ClusterId"])
    if cluster is None:
        return invalid(f"Cluster id '{data['ClusterId']}' is not valid.")
    answers = []
    for step in emr._steps.get(cluster["Id"], []):
        if step["Id"] not in data["StepIds"]:
            continue
        # A running step is left alone unless the caller asks otherwise (CancelSteps in the EMR API reference).
        if step["Status"]["State"] in ("PENDING", "RUNNING"):
            change_step(cluster, step, "CANCELLED")
            answers.append({"StepId": step["Id"], "Status": "SUBMITTED"})
        else:
            reason = f"Step is in {step['Status']['State']} state."
            answers.append({"StepId": step["Id"], "Status": "FAILED", "Reason": reason})
    run_next_steps(cluster)
    return json_response({"CancelStepsInfoList": answers})


# CloudFormation


def create(logical_id, props, stack_name):
    """Returns once the cluster is WAITING."""
    request = job_flow(props)
    status, _, answer = run_job_flow(request)
    if status >= 400:
        raise ValueError(json.loads(answer)["message"])
    cluster = emr._clusters[json.loads(answer)["JobFlowId"]]
    while cluster["Status"]["State"] == "STARTING":
        time.sleep(0.05)
    if cluster["Status"]["State"] in ENDED:
        raise ValueError(f"the cluster {cluster['Id']} did not start: {cluster['Status']['StateChangeReason']}")
    return cluster["Id"], attributes(cluster)


def attributes(cluster):
    return {"Id": cluster["Id"], "MasterPublicDNS": cluster["MasterPublicDnsName"]}


def job_flow(props):
    """The RunJobFlow request for the properties of AWS::EMR::Cluster; raises ValueError if it is not valid."""
    request = renamed(props)
    instances = request["Instances"]
    groups = []
    for name, role in (("MasterInstanceGroup", "MASTER"), ("CoreInstanceGroup", "CORE")):
        if name in instances:
            groups.append({"InstanceRole": role, "Market": "ON_DEMAND", **instances.pop(name)})
    for group in instances.pop("TaskInstanceGroups", []):
        groups.append({"InstanceRole": "TASK", "Market": "ON_DEMAND", **group})
    instances["InstanceGroups"] = groups
    # Without steps a cluster of CloudFormation stays until the stack is deleted.
    instances.setdefault("KeepJobFlowAliveWhenNoSteps", True)
    request = model.typed(model.shape("emr", "RunJobFlow"), request)
    model.check("emr", "RunJobFlow", request)
    return request


def renamed(value):
    """Names that CloudFormation has for what the API calls Properties."""
    if isinstance(value, list):
        return [renamed(member) for member in value]
    if isinstance(value, dict):
        names = {"ConfigurationProperties": "Properties", "StepProperties": "Properties"}
        return {names.get(name, name): renamed(member) for name, member in value.items()}
    return value


def update(cluster_id, old, new, stack_name):
    if without_core_count(old) != without_core_count(new):
        return provisioners._replace_resource(TYPE, cluster_id, old, new, stack_name, None)
    cluster, request = emr._clusters[cluster_id], job_flow(new)
    for group, asked in zip(cluster["InstanceGroups"], request["Instances"]["InstanceGroups"], strict=True):
        group["RequestedInstanceCount"] = group["RunningInstanceCount"] = asked["InstanceCount"]
    cluster["StepConcurrencyLevel"] = request.get("StepConcurrencyLevel", 1)
    cluster["VisibleToAllUsers"] = request.get("VisibleToAllUsers", True)
    cluster["Tags"] = request.get("Tags", [])
    for name in ("ManagedScalingPolicy", "AutoTerminationPolicy"):
        change_policy(name, {"ClusterId": cluster_id}, request.get(name))
    return cluster_id, attributes(cluster)


def without_core_count(props):
    """The instances less what may change on a live cluster: how many core nodes there are."""
    core = {k: v for k, v in props["Instances"].get("CoreInstanceGroup", {}).items() if k != "InstanceCount"}
    return {**props["Instances"], "CoreInstanceGroup": core}


def delete(cluster_id, props):
    status, _, answer = terminate({"JobFlowIds": [cluster_id]})
    if status >= 400:
        raise ValueError(json.loads(answer)["message"])
