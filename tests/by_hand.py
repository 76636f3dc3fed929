"""CloudFormation's part of the protocol, played by a test: it sends requests to the real functions and takes the answers."""

import contextlib
import itertools
import json
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from botocore.exceptions import ClientError
from local_aws import ACCOUNT, REGION

STACK_ID = f"arn:aws:cloudformation:{REGION}:{ACCOUNT}:stack/by-hand/00000000-0000-0000-0000-000000000000"
NOTHING_MADE = "hail-emr:nothing-was-made"
FUNCTIONS = {
    "seed-buckets": ("hail-s3", "SeedBucketsFunction"),
    "remove-buckets": ("hail-s3", "RemoveBucketsFunction"),
    "refresh-notebook": ("hail-jupyter", "RefreshNotebookFunction"),
    "build-ami": ("hail-ami", "BuildAmiFunction"),
    "add-plot-steps": ("hail-emr", "AddPlotStepsFunction"),
}
ROLES = {name: (stack, function.replace("Function", "Role")) for name, (stack, function) in FUNCTIONS.items()}
TYPES = {
    "seed-buckets": "Custom::BucketSeed",
    "remove-buckets": "Custom::BucketRemoval",
    "refresh-notebook": "Custom::NotebookRefresh",
    "build-ami": "Custom::HailAmi",
    "add-plot-steps": "Custom::LivyPlotSteps",
}
numbers = itertools.count(1)


class Asked:
    """A request, and what was put to its URL."""

    def __init__(self, event, statuses):
        self.event = event
        self.statuses = list(statuses)
        self.tries = []  # (the status that was answered, headers, body)

    @property
    def answers(self):
        return [json.loads(body) for status, _, body in self.tries if status == 200]

    def answer(self, seconds=15):
        return eventually(lambda: self.answers, seconds)[0]

    def succeeds(self, seconds=15):
        """The Data of the answer."""
        answer = self.answer(seconds)
        assert answer["Status"] == "SUCCESS", answer["Reason"]
        return answer.get("Data", {})

    def fails(self, seconds=15):
        """The reason in the answer."""
        answer = self.answer(seconds)
        assert answer["Status"] == "FAILED", answer
        assert "Data" not in answer
        return answer["Reason"]


class CloudFormation:
    """Sends requests to functions and takes their answers."""

    def __init__(self, stacks):
        self.stacks = stacks
        self.asked = {}
        requests = self.asked

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self):
                request = requests[self.path]
                body = self.rfile.read(int(self.headers["Content-Length"]))
                status = request.statuses.pop(0) if request.statuses else 200
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                request.tries.append((status, dict(self.headers), body))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def ask(self, function, kind, properties, *, statuses=(), deliver=1, **more):
        """Sends a request; `more` are members of it, `statuses` what its URL answers before it answers 200."""
        path = f"/{next(numbers)}?X-Amz-Signature={uuid.uuid4().hex}"
        event = {
            "RequestType": kind,
            "ResponseURL": f"http://127.0.0.1:{self.server.server_port}{path}",
            "StackId": STACK_ID,
            "RequestId": str(uuid.uuid4()),
            "LogicalResourceId": f"Thing{next(numbers)}",
            "ResourceType": TYPES[function],
            "ResourceProperties": {"ServiceToken": "-", "ServiceTimeout": "3600", **properties},
            **more,
        }
        asked = self.asked[path] = Asked(event, statuses)
        for _ in range(deliver):
            self.invoke(function, event, InvocationType="Event")
        return asked

    def again(self, asked, function, kind, properties=None, **more):
        """Another request for the same resource."""
        physical_id = asked.answers[0]["PhysicalResourceId"] if asked.answers else "unknown"
        before = asked.event["ResourceProperties"]
        more = {"LogicalResourceId": asked.event["LogicalResourceId"], "PhysicalResourceId": physical_id, **more}
        if kind == "Update":
            more.setdefault("OldResourceProperties", before)
        return self.ask(function, kind, properties or before, **more)

    def invoke(self, function, payload, **options):
        name = self.stacks.resource(*FUNCTIONS[function])
        return self.stacks.client("lambda").invoke(FunctionName=name, Payload=json.dumps(payload), **options)

    def run(self, function, payload):
        """What the function gives back, or None, and its error, or None."""
        done = self.invoke(function, payload)
        result = json.load(done["Payload"])
        return (None, result["errorMessage"]) if "FunctionError" in done else (result, None)

    def check(self, since=0):
        """What holds for every request, or for those after the first so many."""
        for asked in list(self.asked.values())[since:]:
            assert len(asked.answers) == 1, f"{len(asked.answers)} answers to {asked.event}"
            answer = asked.answers[0]
            for name in ("StackId", "RequestId", "LogicalResourceId"):
                assert answer[name] == asked.event[name]
            assert answer["PhysicalResourceId"]
            for _, headers, body in asked.tries:
                assert headers.get("Content-Type", "") == "" and len(body) <= 4096


@contextlib.contextmanager
def denied(stacks, function, *actions):
    """The function's role may no longer do this."""
    iam, role = stacks.client("iam"), stacks.resource(*ROLES[function])
    statement = {"Effect": "Deny", "Action": list(actions), "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_role_policy(RoleName=role, PolicyName="Denied", PolicyDocument=policy)
    try:
        yield
    finally:
        iam.delete_role_policy(RoleName=role, PolicyName="Denied")


def waiting(stacks):
    """The logical ids of the resources whose requests wait, by the name of their schedule."""
    scheduler = stacks.client("scheduler")
    found = {}
    for schedule in scheduler.list_schedules()["Schedules"]:
        name = {"Name": schedule["Name"], "GroupName": schedule["GroupName"]}
        with contextlib.suppress(scheduler.exceptions.ResourceNotFoundException):
            waits = json.loads(scheduler.get_schedule(**name)["Target"]["Input"])["Deferred"]
            found[schedule["Name"]] = waits["Callback"]["LogicalResourceId"]
    return found


def time_is_over(stacks):
    """Makes it as late for every request that waits as if it had waited as long as it may; ticks."""
    scheduler = stacks.client("scheduler")
    for schedule in scheduler.list_schedules()["Schedules"]:
        name = {"Name": schedule["Name"], "GroupName": schedule["GroupName"]}
        there = scheduler.get_schedule(**name)
        waits = json.loads(there["Target"]["Input"])
        waits["Deferred"]["GivesUpAt"] = 1
        target = {**there["Target"], "Input": json.dumps(waits)}
        kept = {name: there[name] for name in ("FlexibleTimeWindow", "ScheduleExpression")}
        scheduler.update_schedule(**name, **kept, Target=target)
    stacks.aws.control("tick")


def ticks(stacks, until, seconds=15):
    """Ticks from several sides at once until something is true."""
    over = time.monotonic() + seconds

    def tick():
        while not until() and time.monotonic() < over:
            stacks.aws.control("tick")

    with ThreadPoolExecutor() as several:
        for done in [several.submit(tick) for _ in range(3)]:
            done.result()


def eventually(question, seconds=10):
    """The first true answer; an error of AWS is none."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(ClientError):
            if answer := question():
                return answer
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")
