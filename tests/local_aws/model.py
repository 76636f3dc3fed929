"""What AWS's published API models (they come with botocore) say about a request.

Rust's SDK and boto3 check little themselves, and MiniStack almost nothing; the services do. So a request to one of the
simulated services is checked here: required and unknown members, types, lengths, ranges, patterns and enumerations.
"""

import functools
import re

import botocore.loaders
import botocore.model


@functools.cache
def shape(service, operation):
    """The shape of the input of an operation: shape("emr", "RunJobFlow")."""
    model = botocore.loaders.Loader().load_service_model(service, "service-2")
    return botocore.model.ServiceModel(model, service).operation_model(operation).input_shape


def problems(shape, value, path=""):
    """What is wrong with the value, as sentences; nothing if it conforms to the shape."""
    kind, limits = shape.type_name, shape.metadata
    types = {"structure": dict, "map": dict, "list": list, "string": str, "boolean": bool, "integer": int, "long": int}
    if kind in types and (not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "boolean")):
        yield f"{path or 'the request'} must be a {kind}, not {value!r}"
        return
    if kind == "structure":
        for name in set(shape.required_members) - set(value):
            yield f"{path}.{name} is required".lstrip(".")
        for name, member in value.items():
            if name not in shape.members:
                yield f"{path}.{name} is unknown to AWS".lstrip(".")
            elif member is not None:
                yield from problems(shape.members[name], member, f"{path}.{name}".lstrip("."))
    elif kind == "list":
        for index, member in enumerate(value):
            yield from problems(shape.member, member, f"{path}[{index}]")
    elif kind == "map":
        for key, member in value.items():
            yield from problems(shape.value, member, f"{path}[{key!r}]")
    size = value if kind in ("integer", "long") else len(value) if kind in ("string", "list", "map") else None
    if size is not None and not limits.get("min", size) <= size <= limits.get("max", size):
        what = "be" if kind in ("integer", "long") else "have a length"
        yield f"{path} must {what} from {limits.get('min', 0)} to {limits.get('max', 'any')}, not {size}"
    if kind == "string" and "enum" in limits and value not in limits["enum"]:
        yield f"{path} must be one of {', '.join(limits['enum'])}, not {value!r}"
    if kind == "string" and "pattern" in limits and not matches(limits["pattern"], value):
        yield f"{path} must match {limits['pattern']}, which {value!r} does not"


def matches(pattern, value):
    try:
        return re.fullmatch(pattern, value)
    except re.error:  # the models are written for Java
        return True


def check(service, operation, request):
    """Raises ValueError with every problem of the request."""
    if found := list(problems(shape(service, operation), request)):
        raise ValueError(f"{operation}: {'; '.join(found)}")


def typed(shape, value):
    """The value of a template in the types of the API: CloudFormation takes "1" for 1 and "true" for true."""
    kind = shape.type_name if shape else None
    if kind == "structure" and isinstance(value, dict):
        return {name: typed(shape.members.get(name), member) for name, member in value.items()}
    if kind == "list" and isinstance(value, list):
        return [typed(shape.member, member) for member in value]
    if kind == "map" and isinstance(value, dict):
        return {key: typed(shape.value, member) for key, member in value.items()}
    if kind in ("integer", "long") and isinstance(value, str) and re.fullmatch(r"-?\d+", value):
        return int(value)
    if kind == "boolean" and value in ("true", "false"):
        return value == "true"
    if kind == "string" and isinstance(value, int):
        return str(value).lower() if isinstance(value, bool) else str(value)
    return value
