"""MiniStack with everything that this package adds, and the names of the control API. Importing it installs it."""

from ministack import app

from . import cloudformation, codebuild, ec2, emr, events, iam, instances, lambda_functions, s3, sagemaker, scheduler
from . import holds, server, simulation, sns, ssm

for service in (iam, s3, ec2, sns, ssm, events, scheduler, lambda_functions, codebuild, emr, sagemaker, cloudformation):
    service.install()
instances.install()


async def ministack(scope, receive, send):
    """The application; it sees every request as one over TLS, which the endpoints of AWS are."""
    await holds.pass_by(scope)
    await app.app({**scope, "scheme": "https"} if scope["type"] == "http" else scope, receive, send)


custom_resource_response = cloudformation.response


def reset():
    simulation.reset()
    holds.release()
    cloudformation.requests.clear()
    events.refused.clear()
    return {}


def stop():
    simulation.later(0.05, server.end)
    return {}


CONTROLS = {
    **{name: lambda name=name, **new: simulation.change(name, new) for name in simulation.DEFAULTS},
    "answers": lambda: [request.shown() for request in cloudformation.requests],
    "refused": lambda: events.refused,
    "reset": reset,
    "stop": stop,
    "finish": codebuild.finish,
    "hold": holds.hold,
    "release": holds.release,
    "tick": lambda: scheduler.tick() + events.tick(),
}
