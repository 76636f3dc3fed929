"""The server process: MiniStack on one free port of 127.0.0.1, extended, with a control API below /_hail/.

The control API is for tests and for the demo. It takes and gives JSON, by POST (or GET, where nothing
is to be said):
  POST /_hail/builds, clusters, events, instances, notebooks, steps   change how simulated things behave (simulation.DEFAULTS)
  POST /_hail/reset     the default behaviour again, and the lists below emptied; nothing else is touched
  POST /_hail/tick      fires every enabled schedule of EventBridge, and of EventBridge Scheduler, now
  POST /_hail/finish    ends the running builds now
  POST /_hail/hold      holds up requests for an operation before they are carried out; answers how many are held
  POST /_hail/release   carries them out
  POST /_hail/answers   what custom resources were asked and answered, in order (cloudformation.py)
  POST /_hail/refused   what AWS would have dropped without a word: events and logs that a policy does not allow
  POST /_hail/stop      ends the server
"""

import asyncio
import json
import os
import select
import signal
import socket
import subprocess
import threading


def serve(folder, with_pid):
    """Serves until it is stopped or the process `with_pid` has ended."""
    watch = end_functions_with_this_process()  # noqa: F841, its pipe closes when it is no longer held
    if with_pid:
        end_with(with_pid)
    signal.signal(signal.SIGTERM, lambda *_: end())
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    port = listener.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    # MiniStack reads these when it is imported.
    os.environ["GATEWAY_PORT"] = str(port)
    os.environ["AWS_ENDPOINT_URL"] = endpoint
    from hypercorn.asyncio import serve as hypercorn
    from hypercorn.config import Config

    from . import extension

    async def application(scope, receive, send):
        if scope["type"] == "http" and scope["path"].startswith("/_hail/"):
            await answer(extension, scope, receive, send)
        elif scope["type"] == "lifespan":
            await extension.ministack(scope, receive, announce(folder, endpoint, send))
        else:
            await extension.ministack(scope, receive, send)

    config = Config()
    config.bind = [f"fd://{listener.fileno()}"]
    config.keep_alive_timeout = 75
    asyncio.run(hypercorn(application, config))


def announce(folder, endpoint, send):
    """Writes the state file once MiniStack says that it has started."""

    async def announcing(message):
        await send(message)
        if message["type"] == "lifespan.startup.complete":
            new = folder / "server.json.new"
            new.write_text(json.dumps({"pid": os.getpid(), "endpoint": endpoint}))
            new.replace(folder / "server.json")

    return announcing


async def answer(extension, scope, receive, send):
    """One request below /_hail/: the answer of a custom resource, or the control API."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    name = scope["path"].removeprefix("/_hail/")
    headers = {key.decode().lower(): value.decode() for key, value in scope["headers"]}
    if name.startswith("response/"):
        status, text, kind = *extension.custom_resource_response(scope, headers, body), b"application/xml"
    elif name not in extension.CONTROLS:
        status, text, kind = 404, f"{name}: not one of {', '.join(extension.CONTROLS)}", b"text/plain"
    else:
        try:
            status, kind = 200, b"application/json"
            text = json.dumps(extension.CONTROLS[name](**json.loads(body or b"{}")))
        except (TypeError, ValueError) as refusal:
            status, text, kind = 400, f"{name}: {refusal}", b"text/plain"
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": text.encode()})


def end():
    """Ends this process and all that it started: they are one process group."""
    os.killpg(os.getpid(), signal.SIGKILL)


def end_with(pid):
    """Ends this process when another one has ended, however that ended."""
    other = os.pidfd_open(pid)

    def wait():
        select.select([other], [], [])
        end()

    threading.Thread(target=wait, daemon=True).start()


def end_functions_with_this_process():
    """Ends the process group when this process is gone: a child waits at a pipe that nobody else holds."""
    return subprocess.Popen(["/bin/sh", "-c", "read -r nothing; kill -s KILL 0"], stdin=subprocess.PIPE)
