"""What MiniStack's AWS::SNS::Topic lacks: its encryption is shown."""

from ministack.services import sns
from ministack.services.cloudformation import provisioners

from .seams import replace

TYPES = {
    "AWS::SNS::Subscription": "Endpoint Protocol TopicArn",
    "AWS::SNS::Topic": "DisplayName KmsMasterKeyId Tags TopicName",
}

stock = dict(provisioners._RESOURCE_HANDLERS["AWS::SNS::Topic"])


def install():
    replace(provisioners._RESOURCE_HANDLERS["AWS::SNS::Topic"], create=create, update=update)


def create(logical_id, props, stack_name):
    return encrypted(stock["create"](logical_id, props, stack_name), props)


def update(arn, old, new, stack_name, logical_id=None):
    return encrypted(stock["update"](arn, old, new, stack_name, logical_id), new)


def encrypted(made, props):
    sns._topics[made[0]]["attributes"]["KmsMasterKeyId"] = props.get("KmsMasterKeyId", "")
    return made
