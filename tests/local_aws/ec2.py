"""What MiniStack's EC2 lacks.

- AWS::EC2::SecurityGroupIngress and AWS::EC2::SecurityGroupEgress. Every property but Description replaces the rule.
- A security group that another one's rules name cannot be deleted.
- DescribeImages says when an image was created, and DescribeKeyPairs looks at the tags that are asked for.
- DeregisterImage deletes the snapshots too, if it is asked to, each that the caller may delete.
"""

import re
from datetime import UTC, datetime
from urllib.parse import parse_qs

from ministack import app
from ministack.core.iam_evaluator import enforce
from ministack.core.responses import get_region, new_uuid
from ministack.core.router import extract_access_key_id
from ministack.services import ec2
from ministack.services.cloudformation import provisioners

from . import instances
from .seams import replace

TYPES = {
    "AWS::EC2::SecurityGroupIngress": "CidrIp CidrIpv6 Description FromPort GroupId IpProtocol SourcePrefixListId "
    "SourceSecurityGroupId SourceSecurityGroupOwnerId ToPort",
    "AWS::EC2::SecurityGroupEgress": "CidrIp CidrIpv6 Description DestinationPrefixListId DestinationSecurityGroupId "
    "FromPort GroupId IpProtocol ToPort",
}


def install():
    for kind, rules in (("Ingress", "IpPermissions"), ("Egress", "IpPermissionsEgress")):
        resource = f"AWS::EC2::SecurityGroup{kind}"
        provisioners._RESOURCE_HANDLERS[resource] = rule_handler(rules)
        provisioners._REPLACING_PROPERTIES[resource] = tuple(set(TYPES[resource].split()) - {"Description"})
    replace(provisioners._RESOURCE_HANDLERS["AWS::EC2::SecurityGroup"], delete=delete_group)
    replace(
        ec2._ACTION_MAP,
        DeleteSecurityGroup=delete_security_group,
        DescribeImages=describe_images,
        DescribeKeyPairs=describe_key_pairs,
    )
    stock = app.SERVICE_HANDLERS["ec2"]

    async def handle_request(method, path, headers, body, query):
        asked = {**query, **parse_qs(body.decode())}
        image_id = asked.get("ImageId", [""])[0]
        if asked.get("Action") != ["DeregisterImage"] or image_id not in ec2._images:
            return await stock(method, path, headers, body, query)
        snapshots = instances.snapshots_of(image_id)
        answer = await stock(method, path, headers, body, query)
        if answer[0] != 200 or asked.get("DeleteAssociatedSnapshots") != ["true"]:
            return answer
        results = ""
        for snapshot in snapshots:
            arn = f"arn:aws:ec2:{get_region()}::snapshot/{snapshot}"
            tags = {f"aws:resourcetag/{tag['Key']}".lower(): tag["Value"] for tag in ec2._tags.get(snapshot, [])}
            key = extract_access_key_id(headers, query)
            denied = enforce(key, "ec2:DeleteSnapshot", "ec2", get_region(), resource_arn=arn, service_context=tags)
            if not denied:
                ec2._delete_snapshot({"SnapshotId": [snapshot]})
            code = "missing-permissions" if denied else "success"
            results += f"<item><snapshotId>{snapshot}</snapshotId><returnCode>{code}</returnCode></item>"
        shown = f"<return>true</return><deleteSnapshotResultSet>{results}</deleteSnapshotResultSet>"
        return ec2._xml(200, "DeregisterImageResponse", shown)

    replace(app.SERVICE_HANDLERS, ec2=handle_request)


def rule_handler(rules):
    """The handler of a type whose resources are single rules in one of the lists of a security group."""

    def create(logical_id, props, stack_name):
        group = ec2._security_groups.get(props["GroupId"])
        if group is None:
            raise ValueError(f"The security group '{props['GroupId']}' does not exist")
        (rule,) = provisioners._ec2_sg_permissions([props])
        if rule in group[rules]:
            raise ValueError(f"InvalidPermission.Duplicate: the security group {group['GroupId']} has the rule {rule}")
        group[rules].append(rule)
        rule_id = f"sgr-{new_uuid().replace('-', '')[:17]}"
        return rule_id, {"Id": rule_id}

    def update(rule_id, old, new, stack_name):
        delete(rule_id, old)
        create(rule_id, new, stack_name)
        return rule_id, {"Id": rule_id}

    def delete(rule_id, props):
        (rule,) = provisioners._ec2_sg_permissions([props])
        group = ec2._security_groups.get(props["GroupId"]) or {rules: []}
        group[rules][:] = [other for other in group[rules] if other != rule]

    return {"create": create, "update": update, "delete": delete}


def named_by(group_id):
    """The other security groups with a rule that names this one."""
    return [
        group["GroupId"]
        for group in ec2._security_groups.values()
        if group["GroupId"] != group_id
        for rule in group["IpPermissions"] + group["IpPermissionsEgress"]
        if any(pair.get("GroupId") == group_id for pair in rule.get("UserIdGroupPairs", []))
    ]


def delete_group(group_id, props):
    if others := named_by(group_id):
        raise ValueError(f"resource {group_id} has a dependent object: a rule of {', '.join(sorted(set(others)))}")
    provisioners._ec2_sg_delete(group_id, props)


def delete_security_group(query):
    group_id = ec2._p(query, "GroupId")
    if named_by(group_id):
        return ec2._error("DependencyViolation", f"resource {group_id} has a dependent object", 400)
    return ec2._delete_security_group(query)


def describe_key_pairs(query):
    filters = ec2._parse_filters(query)
    asked = ec2._parse_member_list(query, "KeyName") or list(ec2._key_pairs)
    found = [
        name
        for name in asked
        if name not in ec2._key_pairs
        or ec2._resource_matches_tag_filters(ec2._key_pairs[name]["KeyPairId"], filters)
    ]
    if not found:
        return ec2._xml(200, "DescribeKeyPairsResponse", "<keySet></keySet>")
    return ec2._describe_key_pairs({f"KeyName.{number}": [name] for number, name in enumerate(found, 1)})


def describe_images(query):
    status, headers, body = ec2._describe_images(query)

    def with_date(found):
        image = ec2._images.get(found[1])
        return found[0] + (f"<creationDate>{image['CreationDate']}</creationDate>" if image else "")

    body = body.decode() if isinstance(body, bytes) else body
    return status, headers, re.sub(r"<imageId>(.*?)</imageId>", with_date, body).encode()


def image_exists(image_id):
    """Whether the account sees such an image: its own, or one of the few public ones that MiniStack knows."""
    return image_id in ec2._images or any(stub[0] == image_id for stub in ec2._STUB_AMIS)


def register_image(name, tags):
    """Registers an image as Packer does, and returns its id."""
    _, _, body = ec2._register_image(
        {
            "Name": [name],
            "Architecture": ["x86_64"],
            "RootDeviceName": ["/dev/xvda"],
            "VirtualizationType": ["hvm"],
        }
    )
    found = re.search(r"<imageId>(.*?)</imageId>", body.decode() if isinstance(body, bytes) else body)
    if not found:
        raise ValueError(f"registering the image {name}: {body!r}")
    ec2._tags[found[1]] = [{"Key": key, "Value": value} for key, value in tags.items()]
    instances.take_snapshot(found[1], 15, ec2._tags[found[1]])
    # Two builds within a second have an order too.
    ec2._images[found[1]]["CreationDate"] = datetime.now(UTC).isoformat(timespec="milliseconds")[:23] + "Z"
    return found[1]
