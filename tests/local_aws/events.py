"""What MiniStack's EventBridge lacks.

- An event reaches a function only if the function's policy lets the rule invoke it, and a schedule's target only with
  the role of the schedule; what AWS would drop without a word is written down (POST /_hail/refused).
- An event is an asynchronous invocation: a function that fails is tried again.
- A target that is neither a function nor a build is refused, and so is a setting of a target that is not applied.
- `send`, by which the simulated services send their events.
- `tick` fires every enabled rule that has a schedule, so that a test need not wait for it.
"""

import json
import time

from ministack.core.responses import set_request_account_id, set_request_region
from ministack.services import eventbridge, lambda_svc
from ministack.services.cloudformation import provisioners

from . import iam
from .seams import replace
from .simulation import settings

# What was not delivered or not logged, and what was lacking.
refused = []
# For each service that may be a target: delivers, or returns what permission is lacking.
targets = {}

stock_invoke_target = eventbridge._invoke_target
stock_rule = dict(provisioners._RESOURCE_HANDLERS["AWS::Events::Rule"])


def install():
    replace(eventbridge, _invoke_target=invoke_target, _dispatch_to_lambda=dispatch_to_lambda)
    replace(provisioners._RESOURCE_HANDLERS["AWS::Events::Rule"], create=create_rule, update=update_rule)


def send(source, detail_type, detail, resources=()):
    event = {"Source": source, "DetailType": detail_type, "Detail": json.dumps(detail), "Resources": list(resources)}
    for _ in range(settings["events"]["copies"]):
        eventbridge._put_events({"Entries": [event]}, allow_aws_source=True)


def tick():
    """Fires every enabled rule with a schedule, of every account and region; returns their names."""
    fired = []
    for (account, region, key), rule in list(eventbridge._rules._data.items()):
        if rule.get("ScheduleExpression") and rule["State"] == "ENABLED":
            set_request_account_id(account)
            set_request_region(region)
            event = {"Source": "aws.events", "DetailType": "Scheduled Event", "Detail": "{}", "Time": time.time()}
            for target in eventbridge._targets._data.get((account, region, key), []):
                eventbridge._invoke_target(target, event, rule)
            fired.append(key)
    return fired


def invoke_target(target, event, rule, view=None):
    """Delivers to one target of a rule, or of a schedule."""
    service = target["Arn"].split(":")[2]
    if service == "lambda":
        if ":schedule/" in rule["Arn"]:
            role = target["RoleArn"]
            allowed = iam.trusts(role, "scheduler.amazonaws.com")
            allowed = allowed and iam.allows(role, "lambda:InvokeFunction", target["Arn"])
        else:
            allowed = policy_lets(target["Arn"], rule["Arn"])
        lacks = None if allowed else "lambda:InvokeFunction"
        if allowed:
            stock_invoke_target(target, event, rule, view)
    elif service in targets:
        lacks = targets[service](target, rule)
    else:
        lacks = f"the local AWS, which cannot deliver to {service}"
    if lacks:
        refused.append({"What": "invocation", "Of": target["Arn"], "By": rule["Arn"], "Lacks": lacks})


def policy_lets(function_arn, rule_arn):
    """Whether the function's own policy lets EventBridge invoke it for the rule."""
    function, _, _ = lambda_svc._get_func_record_for_ref(function_arn)
    keys = {"aws:sourcearn": rule_arn}
    return function is not None and any(
        statement["Effect"] == "Allow"
        and statement["Principal"] in ("*", {"Service": "events.amazonaws.com"})
        and statement["Action"] in ("lambda:InvokeFunction", "lambda:*", "*")
        and iam.conditions_met(statement, rule_arn, "lambda:InvokeFunction", function_arn, **keys)
        for statement in function["policy"]["Statement"]
    )


def dispatch_to_lambda(arn, payload):
    function, config, _ = lambda_svc._get_func_record_for_ref(arn)
    if function is None:
        refused.append({"What": "invocation", "Of": arn, "Lacks": "the function, which does not exist"})
        return
    lambda_svc.invoke_async_with_retry(lambda_svc._execution_record_for_config(function, config), json.loads(payload))


def create_rule(logical_id, props, stack_name):
    check_targets(props)
    return stock_rule["create"](logical_id, props, stack_name)


def update_rule(name, old, new, stack_name, logical_id=None):
    check_targets(new)
    return stock_rule["update"](name, old, new, stack_name, logical_id)


def check_targets(props):
    for target in props.get("Targets", []):
        service = target["Arn"].split(":")[2]
        if service != "lambda" and service not in targets:
            raise ValueError(f"the local AWS cannot deliver events to {target['Arn']}")
        if unknown := set(target) - {"Arn", "Id", "Input", "InputPath", "InputTransformer", "RoleArn"}:
            raise ValueError(f"the local AWS does not apply {', '.join(sorted(unknown))} of a rule's target")
