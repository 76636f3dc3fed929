"""What the simulated services share: settings that the control API changes, and timers."""

import contextvars
import copy
import threading

# What a simulated thing does unless the control API says otherwise. A change applies to what starts after it.
DEFAULTS = {
    # A build of CodeBuild: how long it takes, how it ends (SUCCEEDED, FAILED, FAULT, TIMED_OUT), the phase in which
    # it ends if not well, and lines for its log.
    "builds": {"seconds": 2, "outcome": "SUCCEEDED", "phase": "BUILD", "log": []},
    # A cluster of EMR: how long it takes from STARTING to WAITING.
    "clusters": {"seconds": 1},
    # An event that a simulated service sends: how often it is delivered. EventBridge promises at least once, and two
    # of the services promise best effort only: 2 and 0 are what a function must survive.
    "events": {"copies": 1},
    # A notebook instance of SageMaker: how long each of its states in between takes.
    "notebooks": {"seconds": 1},
    # A step of EMR: how long it takes, and for the steps (by name) that shall fail, why.
    "steps": {"seconds": 0.5, "fail": {}},
}
settings = copy.deepcopy(DEFAULTS)


def change(name, new):
    """Changes some of the settings of one kind and returns them all; refuses what is no setting."""
    if unknown := set(new) - set(DEFAULTS[name]):
        raise ValueError(f"{name} has no setting {', '.join(sorted(unknown))}: there are {', '.join(DEFAULTS[name])}")
    settings[name].update(new)
    return settings[name]


def reset():
    for name, default in copy.deepcopy(DEFAULTS).items():
        settings[name] = default


def later(seconds, function, *arguments):
    """Calls the function after so many seconds, for the account and region of the request that is being served."""
    timer = threading.Timer(seconds, contextvars.copy_context().run, (function, *arguments))
    timer.daemon = True
    timer.start()
