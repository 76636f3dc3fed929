"""What MiniStack's CodeBuild lacks: builds that take time, can fail, and are asked for what a real one needs.

A build is simulated: no command of its buildspec runs. It is IN_PROGRESS for as long as the control API says and then
ends as the control API says (simulation.DEFAULTS), or when it is told to (`finish`). One that succeeds registers an
image in EC2, as the Packer build of this project does: named after the variable AMI_NAME and the build, and tagged,
with its snapshot, with the build, its project and what was asked for (HAIL_VERSION becomes the tag hail-version); the
tags that only a real build knows are missing. AMI_ID and AMI_NAME are exported, if the buildspec exports them.

Checked as AWS would: the service role may read the source from S3 and write the log; the zip is there, with the
buildspec in it, which is YAML. What fails there fails the build in the phase in which AWS would find it.

- environmentVariablesOverride and idempotencyToken are honoured; other overrides are refused.
- More builds at once than the project's ConcurrentBuildLimit are refused. A rule of EventBridge can start a build.
- StopBuild stops; builds are found by id and by ARN; the newest is listed first.
- The log goes to the project's log group, in a stream named after the build.
- "CodeBuild Build State Change" is sent at the start and at the end (phase changes are not).
- AWS::CodeBuild::Project keeps every property that the API knows; of these, CODEBUILD source triggers, batch builds
  and more are refused (PROPERTIES).
"""

import io
import json
import threading
import time
import uuid
import zipfile

import yaml
from ministack import app
from ministack.core.responses import (
    error_response_json,
    get_account_id,
    get_region,
    json_response,
    set_request_account_id,
    set_request_region,
)
from ministack.services import cloudwatch_logs, codebuild, s3
from ministack.services.cloudformation import provisioners

from . import events, iam, model
from .ec2 import register_image
from .seams import replace
from .simulation import later, settings

PROPERTIES = (
    "Artifacts Cache ConcurrentBuildLimit Description EncryptionKey Environment LogsConfig Name "
    "QueuedTimeoutInMinutes ServiceRole Source Tags TimeoutInMinutes VpcConfig"
)
# The variables that become tags of the image.
TAGGED = ("HAIL_VERSION", "VEP_VERSION", "EMR_RELEASE_LABEL", "ARCHITECTURE", "R_KERNEL")
PHASES = (
    "SUBMITTED QUEUED PROVISIONING DOWNLOAD_SOURCE INSTALL PRE_BUILD BUILD POST_BUILD UPLOAD_ARTIFACTS FINALIZING"
).split()

stock_create_project = codebuild._create_project
stock_update_project = codebuild._update_project

# What was asked with each idempotency token, and the build that it started.
started = {}
starting = threading.Lock()


def install():
    replace(
        codebuild,
        _start_build=start_build,
        _stop_build=stop_build,
        _batch_get_builds=batch_get_builds,
        _create_project=create_project,
        _update_project=update_project,
        _project_shape=dict,
    )
    stock = app.SERVICE_HANDLERS["codebuild"]

    async def handle_request(method, path, headers, body, query):
        operation = headers.get("x-amz-target", "").rsplit(".", 1)[-1]
        try:
            model.check("codebuild", operation, json.loads(body or b"{}"))
        except ValueError as problem:
            return error_response_json("InvalidInputException", str(problem))
        return await stock(method, path, headers, body, query)

    replace(app.SERVICE_HANDLERS, codebuild=handle_request)
    replace(provisioners._RESOURCE_HANDLERS["AWS::CodeBuild::Project"], create=create, update=update)
    provisioners._REPLACING_PROPERTIES["AWS::CodeBuild::Project"] = ("Name",)
    events.targets["codebuild"] = start_for_rule


# Projects


def create_project(data):
    answer = stock_create_project(data)
    if answer[0] == 200:
        codebuild._projects[data["name"]] |= data
    return answer


def update_project(data):
    answer = stock_update_project(data)
    if answer[0] == 200:
        codebuild._projects[data["name"]] |= data
    return answer


def create(logical_id, props, stack_name):
    name = props.get("Name") or provisioners._physical_name(stack_name, logical_id, max_len=255)
    status, _, answer = create_project(project(name, props))
    if status >= 400:
        raise ValueError(f"creating the project {name}: {answer!r}")
    return name, {"Arn": codebuild._projects[name]["arn"]}


def update(name, old, new, stack_name):
    request = project(name, new)
    before = codebuild._projects.pop(name)
    create_project(request)
    codebuild._projects[name]["created"] = before["created"]
    return name, {"Arn": before["arn"]}


def project(name, props):
    """The CreateProject request for the properties of AWS::CodeBuild::Project; raises ValueError if it is not valid."""
    request = {**provisioners._codebuild_cfn_to_api(props), "name": name}
    request["source"] = provisioners._codebuild_cfn_to_api(props["Source"])
    request = model.typed(model.shape("codebuild", "CreateProject"), request)
    model.check("codebuild", "CreateProject", request)
    if not iam.trusts(request["serviceRole"], "codebuild.amazonaws.com"):
        raise ValueError(
            f"CodeBuild is not authorized to perform: sts:AssumeRole on service role: {request['serviceRole']}"
        )
    return request


# Builds


def start_build(data):
    with starting:
        return start(data)


def start(data):
    project = codebuild._projects.get(data["projectName"])
    if project is None:
        return error_response_json("ResourceNotFoundException", f"Project cannot be found: {data['projectName']}")
    token = data.pop("idempotencyToken", None)
    if token in started:
        asked, build = started[token]
        if asked != data:
            return error_response_json("InvalidInputException", f"idempotencyToken {token}: used with other parameters")
        return json_response({"build": build})
    if unknown := set(data) - {"projectName", "environmentVariablesOverride"}:
        refusal = f"the local AWS does not override {', '.join(sorted(unknown))}"
        return error_response_json("InvalidInputException", refusal)
    running = sum(
        build["projectName"] == project["name"] and not build["buildComplete"] for build in codebuild._builds.values()
    )
    if running >= (limit := project.get("concurrentBuildLimit", 100)):
        refusal = f"Cannot have more than {limit} builds running at once of the project {project['name']}"
        return error_response_json("AccountLimitExceededException", refusal)

    build = new_build(project, data.get("environmentVariablesOverride", []))
    codebuild._builds[build["id"]] = build
    if token:
        started[token] = data, build
    change_event(build)
    plan = dict(settings["builds"])
    if failure := source_failure(project, build):
        later(0.2, end_build, build, "FAILED", *failure)
    elif plan["outcome"] == "SUCCEEDED":
        later(plan["seconds"], succeed, build)
    else:
        reason = f"COMMAND_EXECUTION_ERROR: Error while executing the commands of phase {plan['phase']}"
        later(plan["seconds"], end_build, build, plan["outcome"], plan["phase"], reason)
    for line in plan["log"]:
        log(build, line)
    return json_response({"build": build})


def start_for_rule(target, rule):
    """What a rule of EventBridge with the project as target does; returns what its role lacks, if anything."""
    role, project = target.get("RoleArn", ""), target["Arn"]
    if not iam.trusts(role, "events.amazonaws.com") or not iam.allows(role, "codebuild:StartBuild", project):
        return "codebuild:StartBuild"
    start_build({"projectName": project.partition(":project/")[2], **json.loads(target.get("Input", "{}"))})


def new_build(project, overrides):
    name, build_id = project["name"], str(uuid.uuid4())
    logs = (project.get("logsConfig") or {}).get("cloudWatchLogs") or {}
    group = logs.get("groupName") or f"/aws/codebuild/{name}"
    stream = f"{logs['streamName']}/{build_id}" if logs.get("streamName") else build_id
    arn = f"arn:aws:codebuild:{get_region()}:{get_account_id()}:build/{name}:{build_id}"
    variables = {v["name"]: v for v in project["environment"].get("environmentVariables", [])}
    variables |= {v["name"]: v for v in overrides}
    return {
        "id": f"{name}:{build_id}",
        "arn": arn,
        "buildNumber": 1 + sum(build["projectName"] == name for build in codebuild._builds.values()),
        "startTime": time.time(),
        "currentPhase": "QUEUED",
        "buildStatus": "IN_PROGRESS",
        "buildComplete": False,
        "projectName": name,
        "phases": [{"phaseType": "SUBMITTED", "phaseStatus": "SUCCEEDED", "startTime": time.time()}],
        "source": project["source"],
        "artifacts": {"location": ""},
        "environment": {**project["environment"], "environmentVariables": list(variables.values())},
        "serviceRole": project["serviceRole"],
        "logs": {
            "groupName": group,
            "streamName": stream,
            "deepLink": f"https://console.aws.amazon.com/cloudwatch/home?region={get_region()}"
            f"#logsV2:log-groups/log-group/{group.replace('/', '$252F')}/log-events/{build_id}",
            "cloudWatchLogs": {"status": "ENABLED", "groupName": group},
        },
        "timeoutInMinutes": project.get("timeoutInMinutes", 60),
        "queuedTimeoutInMinutes": project.get("queuedTimeoutInMinutes", 480),
        "initiator": "local",
        "encryptionKey": project.get("encryptionKey", ""),
        "exportedEnvironmentVariables": [],
    }


def source_failure(project, build):
    """The phase and the reason, if a real build could not get as far as running its buildspec."""
    role, group = project["serviceRole"], build["logs"]["groupName"]
    arn = f"arn:aws:logs:{get_region()}:{get_account_id()}:log-group:{group}"
    needed = [
        ("logs:CreateLogStream", f"{arn}:*"),
        ("logs:PutLogEvents", f"{arn}:log-stream:{build['logs']['streamName']}"),
    ]
    if group not in cloudwatch_logs._log_groups:
        needed.insert(0, ("logs:CreateLogGroup", f"{arn}:*"))
    for action, resource in needed:
        if not iam.allows(role, action, resource):
            return "SUBMITTED", f"ACCESS_DENIED: Service role {role} does not allow {action} on {resource}"
    source = project["source"]
    if source["type"] != "S3":
        return "DOWNLOAD_SOURCE", f"the local AWS builds from S3 only, not from {source['type']}"
    bucket, _, key = source["location"].removeprefix("arn:aws:s3:::").partition("/")
    if not iam.allows(role, "s3:GetObject", f"arn:aws:s3:::{bucket}/{key}"):
        return "DOWNLOAD_SOURCE", f"CLIENT_ERROR: AccessDenied: {role} may not s3:GetObject {bucket}/{key}"
    status, _, body = s3._get_object(bucket, key, {})
    if status >= 400:
        return "DOWNLOAD_SOURCE", f"CLIENT_ERROR: NoSuchKey: The specified key does not exist: s3://{bucket}/{key}"
    spec = source.get("buildspec") or "buildspec.yml"
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            spec = yaml.safe_load(spec if "\n" in spec else archive.read(spec))
        build["_exports"] = (spec.get("env") or {}).get("exported-variables", [])
    except (zipfile.BadZipFile, KeyError, yaml.YAMLError, AttributeError) as problem:
        return "DOWNLOAD_SOURCE", f"YAML_FILE_ERROR: s3://{bucket}/{key}: {problem}"
    build["currentPhase"] = "BUILD"


def finish():
    """Ends all running builds now, as they would end later; returns their ids."""
    running = [(key, build) for key, build in codebuild._builds._data.items() if not build["buildComplete"]]
    for (account, region, _), build in running:
        set_request_account_id(account)
        set_request_region(region)
        plan = settings["builds"]
        if plan["outcome"] == "SUCCEEDED":
            succeed(build)
        else:
            end_build(build, plan["outcome"], plan["phase"], "COMMAND_EXECUTION_ERROR: Error while executing a command")
    return [build["id"] for _, build in running]


def succeed(build):
    if build["buildStatus"] != "IN_PROGRESS":
        return
    variables = {v["name"]: v["value"] for v in build["environment"]["environmentVariables"]}
    name = f"{variables.get('AMI_NAME', build['projectName'])}-{build['id'][-8:]}"
    tags = {name.lower().replace("_", "-"): variables[name] for name in TAGGED if name in variables}
    tags |= {"build-id": build["id"], "build-project": build["projectName"]}
    log(build, f"==> Builds finished. The artifacts of successful builds are: {name}")
    try:
        image = register_image(name, {"Name": name, **tags})
    except ValueError as problem:
        end_build(build, "FAILED", "BUILD", f"COMMAND_EXECUTION_ERROR: {problem}")
        return
    values = {"AMI_ID": image, "AMI_NAME": name}
    build["exportedEnvironmentVariables"] = [
        {"name": name, "value": values.get(name, "")} for name in build["_exports"]
    ]
    end_build(build, "SUCCEEDED")


def stop_build(data):
    build = find(data["id"])
    if build is None:
        return error_response_json("ResourceNotFoundException", f"Build cannot be found: {data['id']}")
    end_build(build, "STOPPED", "BUILD", "")
    return json_response({"build": build})


def batch_get_builds(data):
    found = [build for build in map(find, data["ids"]) if build]
    known = {name for build in found for name in (build["id"], build["arn"])}
    return json_response({"builds": found, "buildsNotFound": [name for name in data["ids"] if name not in known]})


def find(name):
    """The build with this id or ARN, or None."""
    return codebuild._builds.get(name.partition(":build/")[2] or name)


def end_build(build, status, failed_phase=None, reason=None):
    """Ends a build that is in progress: every phase up to the failed one succeeded, or all of them."""
    if build["buildStatus"] != "IN_PROGRESS":
        return
    now = time.time()
    phases = PHASES[: PHASES.index(failed_phase) + 1] if failed_phase else PHASES
    build["phases"] = [
        {
            "phaseType": phase,
            "phaseStatus": status if phase == failed_phase else "SUCCEEDED",
            "startTime": build["startTime"],
            "endTime": now,
            "durationInSeconds": int(now - build["startTime"]) if phase == phases[-1] else 0,
            "contexts": [{"statusCode": (reason or "").partition(":")[0], "message": (reason or "").partition(": ")[2]}]
            if phase == failed_phase
            else [],
        }
        for phase in phases
    ]
    build["phases"].append({"phaseType": "COMPLETED", "startTime": now})
    build |= {"buildStatus": status, "buildComplete": True, "currentPhase": "COMPLETED", "endTime": now}
    if reason:
        log(build, f"[Container] Phase complete: {failed_phase} State: {status}")
        log(build, f"[Container] Phase context status code: {reason}")
    change_event(build)


def log(build, line):
    """One line in the build's log stream, which is made if it is not there."""
    group = cloudwatch_logs._log_groups.get(build["logs"]["groupName"])
    if group is None:
        cloudwatch_logs._create_log_group({"logGroupName": build["logs"]["groupName"]})
        group = cloudwatch_logs._log_groups[build["logs"]["groupName"]]
    names = {"logGroupName": build["logs"]["groupName"], "logStreamName": build["logs"]["streamName"]}
    cloudwatch_logs._create_log_stream(names)
    now = int(time.time() * 1000)
    event = {"timestamp": now, "message": f"{line}\n", "ingestionTime": now}
    cloudwatch_logs._append_log_events(group["streams"][names["logStreamName"]], [event])


def change_event(build):
    """The event as the CodeBuild user guide shows it."""
    ended = build["buildStatus"] != "IN_PROGRESS"
    environment = build["environment"]
    phases = [
        {
            "phase-type": phase["phaseType"],
            "start-time": clock(phase["startTime"]),
            **({"phase-status": phase["phaseStatus"]} if "phaseStatus" in phase else {}),
            **({"end-time": clock(phase["endTime"])} if "endTime" in phase else {}),
            **({"duration-in-seconds": phase["durationInSeconds"]} if "durationInSeconds" in phase else {}),
            "phase-context": [f"{c['statusCode']}: {c['message']}" for c in phase.get("contexts", [])],
        }
        for phase in build["phases"]
    ]
    exported = build["exportedEnvironmentVariables"]
    events.send(
        "aws.codebuild",
        "CodeBuild Build State Change",
        {
            "build-status": build["buildStatus"],
            "project-name": build["projectName"],
            "build-id": build["arn"],
            "additional-information": {
                "build-number": build["buildNumber"],
                "build-complete": ended,
                "build-start-time": clock(build["startTime"]),
                "initiator": build["initiator"],
                "timeout-in-minutes": build["timeoutInMinutes"],
                "queued-timeout-in-minutes": build["queuedTimeoutInMinutes"],
                "source": {"type": build["source"]["type"], "location": build["source"].get("location", "")},
                "artifact": build["artifacts"],
                "environment": {
                    "image": environment["image"],
                    "type": environment["type"],
                    "compute-type": environment["computeType"],
                    "privileged-mode": environment.get("privilegedMode", False),
                    "environment-variables": environment["environmentVariables"],
                },
                "logs": {
                    "group-name": build["logs"]["groupName"],
                    "stream-name": build["logs"]["streamName"],
                    "deep-link": build["logs"]["deepLink"],
                },
                **({"phases": phases} if ended else {}),
                **({"exported-environment-variables": exported} if exported else {}),
            },
            "current-phase": build["currentPhase"],
            "current-phase-context": "[]",
            "version": "1",
        },
        [build["arn"]],
    )


def clock(seconds):
    return time.strftime("%b %d, %Y %I:%M:%S %p", time.gmtime(seconds))
