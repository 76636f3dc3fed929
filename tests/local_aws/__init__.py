"""A local AWS: MiniStack, an AWS emulator without Docker, with what it lacks for this project's four stacks.

`LocalAws` starts a server of its own for a folder and stops it again; `python -m local_aws --help` does the same from
a shell. The functions that a stack creates run as processes: the real binaries, over the Lambda Runtime API, with
their own role's credentials and policies enforced.

What holds, and is tested in tests/test_local_aws.py:
- It listens on 127.0.0.1 only, on a free port of its own choice, so that any number can run at once.
- It writes below its folder only. All state is in memory and ends with the server; the folder keeps `server.log`.
- It ends, with every function process, when it is stopped, when the process it was started for ends (killed or not),
  and when it is killed itself.
- What it cannot do faithfully it refuses, with an error that names it.

What is missing: a stack that is deleted, or an update that is cancelled, while a custom resource has not answered yet
sends that resource nothing; AWS sends a Delete, and an Update back.

What no local AWS shows: how the real services behave under quotas, eventual consistency and load, how long they
take, and CloudFormation's parallelism (resources are created one after another here).
"""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ACCOUNT = "123456789012"
REGION = "us-east-1"


class LocalAws:
    """A local AWS of its own in `folder`, from `start` to `stop`; as a context manager it does both.

    `environment` is this process's environment with the variables that make any AWS client use the local AWS, and
    none that would lead it elsewhere. The caller is the account's root user.
    """

    def __init__(self, folder):
        self.folder = Path(folder).resolve()
        self.endpoint = None
        self.environment = None

    def __enter__(self):
        self.start(with_pid=os.getpid())
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self, with_pid=0):
        """Starts the server; it ends with the process `with_pid`, or runs until it is stopped if that is 0."""
        if running(self.folder):
            raise RuntimeError(f"starting a local AWS in {self.folder}: one runs there already; stop it first")
        for name in ("home", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        state_file(self.folder).unlink(missing_ok=True)
        secret = secrets.token_hex(20)
        with open(self.folder / "server.log", "wb") as log:
            server = subprocess.Popen(
                [sys.executable, "-m", "local_aws", "serve", "--folder", self.folder, "--with-pid", str(with_pid)],
                cwd=self.folder,
                env=server_environment(self.folder, secret),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        patience = time.monotonic() + 60
        while not (state := running(self.folder)):
            if server.poll() is not None or time.monotonic() > patience:
                server.kill()
                tail = (self.folder / "server.log").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"starting a local AWS in {self.folder}: the server did not come up:\n{tail}")
            time.sleep(0.02)
        self.endpoint = state["endpoint"]
        self.environment = client_environment(self.folder, self.endpoint, secret)

    def stop(self):
        stop(self.folder)

    def control(self, name, **settings):
        """Changes how simulated things behave, or asks what happened: server.CONTROLS lists the names."""
        return post(f"{self.endpoint}/_hail/{name}", settings)


def stop(folder):
    """Stops the local AWS of `folder` and everything it started; says whether there was one."""
    state = running(folder)
    if not state:
        return False
    try:
        post(f"{state['endpoint']}/_hail/stop", {})
    except OSError:  # it ends without saying goodbye
        pass
    while running(folder):
        time.sleep(0.02)
    state_file(folder).unlink(missing_ok=True)
    return True


def state_file(folder):
    """Written by the server once it answers: its process id and its endpoint."""
    return Path(folder) / "server.json"


def running(folder):
    """The state of the server of `folder`, or None if none runs."""
    try:
        state = json.loads(state_file(folder).read_text())
        command = Path(f"/proc/{state['pid']}/cmdline").read_bytes().decode()
    except (OSError, ValueError):
        return None
    return state if str(Path(folder).resolve()) in command else None


def server_environment(folder, secret):
    """The server's environment: nothing of the caller's but the search path."""
    return {
        "PATH": os.environ["PATH"],
        "LANG": "C.UTF-8",
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "AWS_ACCESS_KEY_ID": ACCOUNT,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": REGION,
        "MINISTACK_REGION": REGION,
        "MINISTACK_ACCOUNT_ID": ACCOUNT,
        "MINISTACK_HOST": "127.0.0.1",
        "AUTH": "true",
        "SERVICES": "cloudformation,codebuild,ec2,elasticfilesystem,elasticmapreduce,events,iam,kms,lambda,logs,s3,"
        "scheduler,sns,sqs,ssm,sts",
        "STATE_DIR": str(folder / "tmp"),
        "S3_DATA_DIR": str(folder / "tmp"),
        # No listener but the one port, and no Docker.
        "SFTP_ENABLED": "0",
        "IOT_MTLS_ENABLED": "0",
        "DOCKER_HOST": f"unix://{folder}/no-docker",
    }


def client_environment(folder, endpoint, secret):
    """This process's environment, pointed at the local AWS and away from every other."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    local = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCOUNT,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_CONFIG_FILE": str(folder / "no-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "no-credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        # The `aws` that was installed beside this Python.
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return own | local


def post(url, body):
    """The JSON answer to a POST of JSON; an error answer becomes a ValueError with the server's own words."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        raise ValueError(refused.read().decode()) from None
