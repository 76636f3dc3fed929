"""What MiniStack's IAM lacks.

- The ARN that a policy must name, where MiniStack takes another or none: schedules (its group is always "default"),
  builds, instance profiles, notebook instances, log streams. Without it, the policies of the functions could not be
  tried.
- `trusts` and `allows`: what a role may be used for by a service that acts for it.
- iam:PassRole, which the services check for the roles that they are handed.
- AWS::IAM::InstanceProfile: Ref is its name, not its ARN; a role that does not exist is an error, not skipped.
"""

import json

from ministack.core import iam_actions, iam_evaluator
from ministack.core.responses import get_account_id, get_region
from ministack.core.router import extract_access_key_id
from ministack.services import iam
from ministack.services.cloudformation import provisioners

from .seams import replace

stock_resource_arn = iam_actions.extract_resource_arn


def install():
    iam_actions.SERVICE_TO_IAM_NAMESPACE["sagemaker"] = "sagemaker"
    replace(iam_actions, extract_resource_arn=resource_arn)
    replace(
        provisioners._RESOURCE_HANDLERS["AWS::IAM::InstanceProfile"],
        create=profile_create,
        update=profile_update,
        delete=lambda name, _: iam._instance_profiles.pop(name, None),
    )


def resource_arn(service, method, path, headers, body, query, region, account):
    """The ARN that the caller's policy must allow for this request."""

    def arn(resource):
        return f"arn:aws:{service}:{region}:{account}:{resource}"

    def member(name):
        try:
            return json.loads(body)[name]
        except (ValueError, KeyError, TypeError):
            return None

    if service == "scheduler" and path.startswith("/schedules/"):
        group = (query.get("groupName") or [None])[0] or member("GroupName") or "default"
        return arn(f"schedule/{group}/{path.split('/')[2]}")
    if service == "codebuild" and (build := member("id") or (member("ids") or [None])[0]):
        return arn(f"project/{build.removeprefix(arn('build/')).split(':')[0]}")
    if service == "codebuild" and (project := (member("names") or [None])[0]):
        return arn(f"project/{project}")
    if service == "sagemaker":
        # SageMaker's ARNs are in lower case, whatever the case of the name.
        if name := member("NotebookInstanceName"):
            return arn(f"notebook-instance/{name.lower()}")
        if name := member("NotebookInstanceLifecycleConfigName"):
            return arn(f"notebook-instance-lifecycle-config/{name.lower()}")
    if service == "logs" and (group := member("logGroupName")):
        stream = member("logStreamName")
        if stream and not headers.get("x-amz-target", "").endswith("CreateLogStream"):
            return arn(f"log-group:{group}:log-stream:{stream}")
        return arn(f"log-group:{group}:*")
    if service == "iam" and (profile := (query.get("InstanceProfileName") or [None])[0]):
        return f"arn:aws:iam::{account}:instance-profile/{profile}"
    return stock_resource_arn(service, method, path, headers, body, query, region, account)


def context(principal, action, resource, **keys):
    return iam_evaluator.EvalContext(
        principal_arn=principal,
        principal_type="AssumedRole",
        principal_account=get_account_id(),
        action=action,
        resource_arn=resource,
        region=get_region(),
        service_context={"aws:sourceaccount": get_account_id(), **keys},
    )


def conditions_met(statement, principal, action, resource, **keys):
    return iam_evaluator._conditions_met(statement.get("Condition", {}), context(principal, action, resource, **keys))


def trusts(role_arn, service):
    """Whether the role exists and a service such as lambda.amazonaws.com may assume it."""
    role = iam._roles.get(role_arn.rsplit("/", 1)[-1])
    return role is not None and any(
        statement["Effect"] == "Allow"
        and service in listed((statement.get("Principal") or {}).get("Service"))
        and "sts:AssumeRole" in listed(statement.get("Action"))
        and conditions_met(statement, role_arn, "sts:AssumeRole", role_arn)
        for statement in listed(json.loads(role["AssumeRolePolicyDocument"])["Statement"])
    )


def allows(role_arn, action, resource):
    """Whether the role exists and its policies allow the action on the resource."""
    policies = iam_evaluator._gather_role_policies(role_arn.rsplit("/", 1)[-1], get_account_id())
    return iam_evaluator.evaluate(context(role_arn, action, resource), policies).decision == "Allow"


def listed(value):
    return value if isinstance(value, list) else [] if value is None else [value]


def pass_role_denied(role_arn, service, headers, query):
    """The answer to a request whose caller may not pass the role to the service, else None."""
    denied = iam_evaluator.enforce(
        extract_access_key_id(headers, query),
        "iam:PassRole",
        "iam",
        get_region(),
        resource_arn=role_arn,
        service_context={"iam:PassedToService": service},
    )
    return denied and iam_actions.access_denied_response(
        "scheduler", "iam:PassRole", denied.principal_arn, "-", headers=headers, resource_arn=role_arn
    )


def profile_create(logical_id, props, stack_name):
    for role in props.get("Roles", []):
        if role not in iam._roles:
            raise ValueError(f"the role {role} does not exist")
    arn, attributes = provisioners._iam_ip_create(logical_id, props, stack_name)
    return arn.rsplit("/", 1)[-1], attributes


def profile_update(name, old, new, stack_name, logical_id=None):
    arn, attributes = provisioners._iam_ip_update(iam._instance_profiles[name]["Arn"], old, new, stack_name, logical_id)
    return arn.rsplit("/", 1)[-1], attributes
