"""What MiniStack's EventBridge Scheduler lacks.

- The checks of a request: its model, iam:PassRole for the target's role, and that Scheduler may assume that role.
- A rate() without a start date fires at once and then at its rate ("Schedule types" in the Scheduler user guide).
- `tick` fires every enabled schedule, so that a test need not wait for a minute to pass.
"""

import json
import re

from ministack import app
from ministack.core.responses import get_account_id, get_region, set_request_account_id, set_request_region
from ministack.services import eventbridge, scheduler

from . import iam, model
from .seams import replace

OPERATIONS = {"POST": "CreateSchedule", "PUT": "UpdateSchedule"}


def install():
    replace(scheduler, _SCHEDULE_TICK_INTERVAL=1)
    stock = app.SERVICE_HANDLERS["scheduler"]

    async def handle_request(method, path, headers, body, query):
        found = re.fullmatch(r"/schedules/([^/]+)", path)
        if found and method in OPERATIONS:
            request = json.loads(body)
            role = request.get("Target", {}).get("RoleArn", "")
            try:
                model.check("scheduler", OPERATIONS[method], {"Name": found[1], **request})
                if not iam.trusts(role, "scheduler.amazonaws.com"):
                    raise ValueError(f"{role} must allow EventBridge Scheduler to assume the role")
            except ValueError as problem:
                return scheduler._error(400, "ValidationException", str(problem))
            if denied := iam.pass_role_denied(role, "scheduler.amazonaws.com", headers, query):
                return denied
        answer = await stock(method, path, headers, body, query)
        if found and method in ("POST", "DELETE") and answer[0] == 200:
            group = request.get("GroupName") if method == "POST" else (query.get("groupName") or [None])[0]
            key = f"{group or 'default'}/{found[1]}"
            last = get_account_id(), get_region(), key
            scheduler._schedule_last_fired.pop(last, None)
            if method == "POST" and scheduler._schedules[key]["ScheduleExpression"].startswith("rate("):
                scheduler._schedule_last_fired[last] = 0
        return answer

    replace(app.SERVICE_HANDLERS, scheduler=handle_request)


def tick():
    """Fires every enabled schedule of every account and region; returns their names."""
    enabled = [item for item in scheduler._schedules._data.items() if item[1]["State"] == "ENABLED"]
    for (account, region, _), schedule in enabled:
        set_request_account_id(account)
        set_request_region(region)
        event = {"Source": "aws.scheduler", "DetailType": "Scheduled Event", "Detail": "{}", "Time": 0}
        eventbridge._invoke_target(schedule["Target"], event, schedule)
    return [key for (_, _, key), _ in enabled]
