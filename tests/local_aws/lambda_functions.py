"""What MiniStack's Lambda lacks, so that a function runs here as it would there.

- Its environment: what Lambda gives, the function's own variables, the role's credentials, AWS_ENDPOINT_URL and
  nothing else. MiniStack hands on its own environment.
- Its package: a bootstrap that was built for another architecture than the function declares, or that this machine
  cannot run, is refused when the function is created. A script as bootstrap may run anywhere.
- Its role: one that Lambda may not assume is refused.
- Its log: in the log group that it is told, in one stream for each process, whose name the process knows; written with
  the role's permissions, so that a role without them leaves no log (but a line in POST /_hail/refused).
- Its invocations: an asynchronous one that fails is tried again twice, as long as the function exists. A function
  that is changed or deleted finishes what it is at before its processes end; MiniStack kills them at once.

Only provided.* runtimes are run. There is no sandbox: a process has the machine's file system and no memory limit.
"""

import contextvars
import io
import os
import platform
import threading
import time
import zipfile

from ministack.core import lambda_runtime
from ministack.core.responses import get_account_id, get_region, new_uuid
from ministack.services import cloudwatch_logs, lambda_svc
from ministack.services.cloudformation import provisioners

from . import iam
from .events import refused
from .seams import replace

# e_machine in the header of an ELF file.
MACHINES = {0x3E: "x86_64", 0xB7: "arm64"}
HERE = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())

# The log stream of the process that the current thread starts or has just used.
current = threading.local()


def install():
    replace(
        lambda_svc,
        _provided_worker_env=environment,
        _emit_lambda_logs=write_log,
        invoke_async_with_retry=invoke_later,
        invalidate_worker=retire_workers,
        release_worker=release_worker,
    )
    replace(lambda_runtime.ProvidedWorker, _spawn=spawn, invoke=invoke)
    replace(provisioners._RESOURCE_HANDLERS["AWS::Lambda::Function"], create=create, update=update, delete=delete)


def create(logical_id, props, stack_name):
    name, attributes = provisioners._lambda_create(logical_id, props, stack_name)
    try:
        check(lambda_svc._functions[name])
    except ValueError:
        delete(name, props)
        raise
    return name, attributes


def update(name, old, new, stack_name, logical_id=None):
    updated = provisioners._lambda_update(name, old, new, stack_name, logical_id)
    check(lambda_svc._functions[updated[0]])
    return updated


def delete(name, props):
    retire_workers(name)
    provisioners._lambda_delete(name, props)


def check(function):
    """Raises ValueError for a function that AWS would not run, or that cannot be run here."""
    config = function["config"]
    name, runtime, (declared,) = config["FunctionName"], config["Runtime"], config["Architectures"]
    if not runtime.startswith("provided"):
        raise ValueError(f"function {name}: the local AWS runs provided.* functions only, not {runtime}")
    if not iam.trusts(config["Role"], "lambda.amazonaws.com"):
        raise ValueError(f"The role defined for the function cannot be assumed by Lambda: {config['Role']}")
    try:
        with zipfile.ZipFile(io.BytesIO(function["code_zip"] or b"")) as package, package.open("bootstrap") as file:
            header = file.read(20)
    except (zipfile.BadZipFile, KeyError):
        raise ValueError(f"function {name}: its package is not a zip with a bootstrap at the root") from None
    if header.startswith(b"\x7fELF"):
        built = MACHINES.get(int.from_bytes(header[18:20], "little"), "another machine")
        if built != declared:
            raise ValueError(f"function {name}: its bootstrap is built for {built}, but it declares {declared}")
        if built != HERE:
            raise ValueError(
                f"function {name}: this {HERE} machine cannot run a bootstrap that is built for {built}; build the "
                f"functions for {HERE} and deploy with FunctionArchitecture={HERE}"
            )
    elif not header.startswith(b"#!"):
        raise ValueError(f"function {name}: its bootstrap is neither an ELF executable nor a script")


def environment(config, code_dir, port):
    """The environment of a new process, as the Lambda developer guide lists it."""
    current.stream = f"{time.strftime('%Y/%m/%d', time.gmtime())}/[$LATEST]{new_uuid().replace('-', '')}"
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/opt/bin",
        "LANG": "en_US.UTF-8",
        "TZ": ":UTC",
        "_HANDLER": config["Handler"],
        "LAMBDA_TASK_ROOT": code_dir,
        "LAMBDA_RUNTIME_DIR": "/var/runtime",
        "AWS_REGION": get_region(),
        "AWS_DEFAULT_REGION": get_region(),
        "AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{port}",
        "AWS_LAMBDA_INITIALIZATION_TYPE": "on-demand",
        "AWS_LAMBDA_FUNCTION_NAME": config["FunctionName"],
        "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": str(config["MemorySize"]),
        "AWS_LAMBDA_FUNCTION_VERSION": config["Version"],
        "AWS_LAMBDA_LOG_GROUP_NAME": log_group(config),
        "AWS_LAMBDA_LOG_STREAM_NAME": current.stream,
        **lambda_runtime.execution_credentials(config),
        **lambda_svc._runtime_env_vars(config),
        "AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"],
    }


def log_group(config):
    return (config.get("LoggingConfig") or {}).get("LogGroup") or f"/aws/lambda/{config['FunctionName']}"


def invoke_later(function, event):
    """Invokes as Lambda does for events: an error is tried again, twice unless the function says otherwise.

    AWS waits for one minute and then two; here it is a moment.
    """
    settings = function.get("event_invoke_config") or function.get("event_invoke_configs", {}).get("$LATEST") or {}

    def run():
        for attempt in range(1 + int(settings.get("MaximumRetryAttempts", 2))):
            time.sleep(attempt * 0.2)
            if function["config"]["FunctionName"] not in lambda_svc._functions:
                return
            if not lambda_svc._execute_function_with_config_scope(function, event).get("error"):
                return

    threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True).start()


def retire_workers(name, qualifier=None, account=None, region=None):
    """Ends the function's idle processes, and marks those that are at work to end after it."""
    function = f"{get_account_id()}:{get_region()}:{name}:"
    with lambda_runtime._lock:
        keys = [key for key in lambda_runtime._workers if key.startswith(function)]
        workers = [worker for key in keys for worker in lambda_runtime._workers.pop(key)]
        for worker in workers:
            worker.retired = worker.in_use
    lambda_runtime.kill_workers([worker for worker in workers if not worker.retired])


def release_worker(worker):
    lambda_runtime.release_worker(worker)
    if getattr(worker, "retired", False):
        lambda_runtime.kill_workers([worker])


stock_spawn = lambda_runtime.ProvidedWorker._spawn
stock_invoke = lambda_runtime.ProvidedWorker.invoke


def spawn(worker, *arguments, **options):
    stock_spawn(worker, *arguments, **options)
    worker.log_stream = current.stream


def invoke(worker, *arguments, **options):
    result = stock_invoke(worker, *arguments, **options)
    current.stream = worker.log_stream
    return result


def write_log(function, request_id, text, error, duration_ms, *, log_source=None):
    """What Lambda writes into the function's log stream for one invocation."""
    config = function.get("config") or function
    name = log_group(config)
    arn = f"arn:aws:logs:{get_region()}:{get_account_id()}:log-group:{name}"
    stream = getattr(current, "stream", "unknown")
    group = cloudwatch_logs._log_groups.get(name)
    for action, resource in (
        ("logs:CreateLogStream", f"{arn}:*"),
        ("logs:PutLogEvents", f"{arn}:log-stream:{stream}"),
    ):
        if group is None or not iam.allows(config["Role"], action, resource):
            if config["FunctionName"] not in lambda_svc._functions:
                return  # the stack of all three was deleted before the function's last words
            lacks = action if group else "the log group, which does not exist"
            refused.append({"What": "log", "Of": config["FunctionName"], "Into": name, "Lacks": lacks})
            return
    now = int(time.time() * 1000)
    lines = [
        f"START RequestId: {request_id} Version: {config['Version']}",
        *text.splitlines(),
        f"END RequestId: {request_id}",
        f"REPORT RequestId: {request_id}\tDuration: {duration_ms} ms\tMemory Size: {config['MemorySize']} MB",
    ]
    cloudwatch_logs._create_log_stream({"logGroupName": name, "logStreamName": stream})
    events = [{"timestamp": now, "message": line, "ingestionTime": now} for line in lines]
    cloudwatch_logs._append_log_events(group["streams"][stream], events)
