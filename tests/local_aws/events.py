"""What MiniStack's EventBridge lacks.

- An event reaches a function only if the function's policy lets the rule invoke it; what AWS would drop without a
  word is written down (POST /_hail/refused).
- A function that fails is run again, twice, as Lambda does with every asynchronous invocation.
- `send`, by which the simulated services send their events.
"""

import json

from ministack.services import eventbridge, lambda_svc

from . import iam

refused = []
stock = eventbridge._invoke_target


def install():
    eventbridge._invoke_target = invoke_target
    eventbridge._dispatch_to_lambda = dispatch_to_lambda


def send(source, detail_type, detail, resources=()):
    event = {"Source": source, "DetailType": detail_type, "Detail": json.dumps(detail), "Resources": list(resources)}
    eventbridge._put_events({"Entries": [event]}, allow_aws_source=True)


def invoke_target(target, event, rule, view=None):
    """Delivers to one target; `rule` is a rule, or a schedule, which acts with its own role."""
    arn = target["Arn"]
    if ":lambda:" in arn:
        if role := target.get("RoleArn"):
            allowed = iam.trusts(role, "scheduler.amazonaws.com") and iam.allows(role, "lambda:InvokeFunction", arn)
        else:
            allowed = policy_lets(arn, rule["Arn"])
        if not allowed:
            refused.append({"What": "invocation", "Of": arn, "By": rule["Arn"], "Lacks": "lambda:InvokeFunction"})
            return
    stock(target, event, rule, view)


def policy_lets(function_arn, rule_arn):
    """Whether the function's own policy lets EventBridge invoke it for the rule."""
    function, _, _ = lambda_svc._get_func_record_for_ref(function_arn)
    return function is not None and any(
        statement["Effect"] == "Allow"
        and statement["Principal"] in ("*", {"Service": "events.amazonaws.com"})
        and statement["Action"] in ("lambda:InvokeFunction", "lambda:*", "*")
        and iam.iam_evaluator._conditions_met(
            statement.get("Condition", {}),
            iam.context(rule_arn, "lambda:InvokeFunction", function_arn, **{"aws:sourcearn": rule_arn}),
        )
        for statement in function["policy"]["Statement"]
    )


def dispatch_to_lambda(arn, payload):
    function, config, name = lambda_svc._get_func_record_for_ref(arn)
    if function is None:
        refused.append({"What": "invocation", "Of": arn, "Lacks": "the function, which does not exist"})
        return
    lambda_svc.invoke_async_with_retry(lambda_svc._execution_record_for_config(function, config), json.loads(payload))
