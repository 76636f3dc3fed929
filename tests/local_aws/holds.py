"""Requests that are held up before they are carried out, so that a test can say in which order things happen."""

import asyncio

SCHEDULES = {"POST": "CreateSchedule", "PUT": "UpdateSchedule", "GET": "GetSchedule", "DELETE": "DeleteSchedule"}

# For each operation that is held: what ends it, and how many requests wait for that.
holding = {}


def hold(operation):
    """Holds every request for this operation from now on; returns how many are held already."""
    ended, waiting = holding.setdefault(operation, (asyncio.Event(), []))
    return len(waiting)


def release():
    """Lets all go on, and holds nothing any more; returns how many were held."""
    released = sum(len(waiting) for _, waiting in holding.values())
    for ended, _ in holding.values():
        ended.set()
    holding.clear()
    return released


async def pass_by(scope):
    """Returns when the request may be carried out."""
    if scope["type"] == "http" and holding:
        headers = dict(scope["headers"])
        operation = headers.get(b"x-amz-target", b"").decode().rpartition(".")[2]
        if scope["path"].startswith("/schedules/"):
            operation = SCHEDULES.get(scope["method"])
        if operation in holding:
            ended, waiting = holding[operation]
            waiting.append(scope["path"])
            await ended.wait()
