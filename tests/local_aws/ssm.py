"""What MiniStack's Parameter Store lacks: the check of the data type aws:ec2:image.

Stricter than AWS, which answers first and checks afterwards: here a value that is no image of the account is refused.
AWS looks the image up with the caller's permission, ec2:DescribeImages; here too.
"""

import re

from ministack import app
from ministack.core.iam_evaluator import enforce
from ministack.core.responses import error_response_json, get_region
from ministack.core.router import extract_access_key_id
from ministack.services import ssm

from . import ec2
from .seams import replace

stock = ssm._put_parameter


def install():
    replace(ssm, _put_parameter=put_parameter)
    handle = app.SERVICE_HANDLERS["ssm"]

    async def handle_request(method, path, headers, body, query):
        if headers.get("x-amz-target", "").endswith(".PutParameter") and b"aws:ec2:image" in body:
            key = extract_access_key_id(headers, query)
            if enforce(key, "ec2:DescribeImages", "ec2", get_region()):
                return error_response_json(
                    "AccessDeniedException",
                    "PutParameter with the data type aws:ec2:image: the caller may not ec2:DescribeImages",
                )
        return await handle(method, path, headers, body, query)

    replace(app.SERVICE_HANDLERS, ssm=handle_request)


def put_parameter(data):
    value = data.get("Value", "")
    if data.get("DataType") == "aws:ec2:image":
        if not re.fullmatch(r"ami-[0-9a-f]{8,17}", value):
            return error_response_json("ValidationException", f"{value!r} is not the id of an image, ami-...")
        if not ec2.image_exists(value):
            return error_response_json("ValidationException", f"the image {value} does not exist")
    return stock(data)
