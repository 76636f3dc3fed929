"""What MiniStack's EC2 lacks for Packer: instances behind which there is a machine, and images made of them.

- RunInstances starts a machine where the control API names a command for it (`instances`, below); the instance is
  pending until then, and has a loopback address of its own. Without a command it is a record, as in MiniStack.
- The root volume is as the launch asks for it (size, type, encryption), has the tags of the launch, and goes when the
  instance goes. StopInstances and TerminateInstances end the machine, and take time as on AWS.
- CreateKeyPair makes a key that opens the machine.
- CreateImage and CopyImage: pending, then available, with a snapshot; the same name twice is refused. An image, a
  volume or an instance whose KMS key cannot be used fails after the answer, as on AWS.
- A snapshot of a registered image cannot be deleted.
- Policies see the tags of what a request is about (aws:ResourceTag), and images and snapshots under their ARNs, which
  name no account.

What is in an image is not kept: an instance made from one of these is not started.
"""

import random
import re
import subprocess
import tempfile
import time
from pathlib import Path

from ministack.core import iam_actions
from ministack.core.responses import get_account_id, get_region
from ministack.services import ec2, kms, tagging

from . import simulation
from .seams import replace

# The command of a machine, as a list; it is called with the instance's id, its address, and the public key that
# opens it, and runs until it is killed. And how long every change of state takes.
simulation.DEFAULTS["instances"] = {"machine": [], "seconds": 0.1}
simulation.reset()

RUN_INSTANCES = (
    "Action Version ImageId InstanceType MinCount MaxCount KeyName SubnetId UserData SecurityGroupId ClientToken "
    "IamInstanceProfile NetworkInterface.1 BlockDeviceMapping.1 TagSpecification EbsOptimized Monitoring "
    "DisableApiTermination InstanceInitiatedShutdownBehavior MetadataOptions Placement PrivateIpAddress "
    "CreditSpecification"
).split()
KEY_IS_UNUSABLE = "Client.InternalError: Client error on launch: the KMS key {} does not exist or is not enabled"

stock = dict(ec2._ACTION_MAP)
stock_volume_xml = ec2._volume_inner_xml
stock_snapshot_xml = ec2._snapshot_inner_xml
stock_bdm_xml = ec2._image_bdm_xml
stock_instance_xml = ec2._instance_xml

# The process of each instance's machine, None before it is started; instances without machines are not in it.
machines = {}


def install():
    stock["DescribeImages"] = ec2._ACTION_MAP["DescribeImages"]
    stock["arn"] = iam_actions.extract_resource_arn
    replace(iam_actions, extract_resource_arn=resource_arn)
    tagging._RESOURCE_TAG_COLLECTORS["ec2"] = tagged
    replace(
        ec2._ACTION_MAP,
        CreateKeyPair=create_key_pair,
        DeleteSnapshot=delete_snapshot,
        DescribeImages=describe_images,
        ModifyImageAttribute=modify_image_attribute,
        RunInstances=run_instances,
        StopInstances=stop_instances,
        TerminateInstances=terminate_instances,
    )
    ec2._ACTION_MAP |= {"CopyImage": copy_image, "CreateImage": create_image}
    replace(
        ec2,
        _image_bdm_xml=image_bdm_xml,
        _instance_xml=instance_xml,
        _snapshot_inner_xml=lambda one: with_key(stock_snapshot_xml(one), one),
        _volume_inner_xml=lambda one: with_key(stock_volume_xml(one), one),
    )


# For policies


def arn_of(resource_id):
    kind = ec2._guess_resource_type(resource_id)
    account = "" if kind in ("image", "snapshot") else get_account_id()
    return f"arn:aws:ec2:{get_region()}:{account}:{kind}/{resource_id}"


def resource_arn(service, method, path, headers, body, query, region, account):
    if service == "ec2" and (resource_id := ec2._p(query, "ResourceId.1")):
        return arn_of(resource_id)
    arn = stock["arn"](service, method, path, headers, body, query, region, account)
    return arn_of(arn.rsplit("/", 1)[-1]) if service == "ec2" and re.search(":(image|snapshot)/", arn) else arn


def tagged():
    return ((arn_of(resource_id), tags) for resource_id, tags in ec2._tags.items())


# Images and their snapshots


def take_snapshot(image_id, size, tags=(), volume_id="vol-ffffffff", key="", source="i-0", volume_type="gp3"):
    """The snapshot of an image's root volume, with the image's block device mapping that names it; its id."""
    snapshot_id = ec2._new_snapshot_id()
    ec2._snapshots[snapshot_id] = {
        "SnapshotId": snapshot_id,
        "VolumeId": volume_id,
        "VolumeSize": int(size),
        "Description": f"Created by CreateImage({source}) for {image_id}",
        "State": "completed",
        "StartTime": ec2._now_ts(),
        "Progress": "100%",
        "OwnerId": get_account_id(),
        "Encrypted": bool(key),
        "KmsKeyId": key,
        "StorageTier": "standard",
    }
    if tags:
        ec2._tags[snapshot_id] = [dict(tag) for tag in tags]
    image = ec2._images[image_id]
    image["BlockDeviceMappings"] = [
        {
            "DeviceName": image["RootDeviceName"],
            "Ebs": {
                "SnapshotId": snapshot_id,
                "VolumeSize": str(size),
                "VolumeType": volume_type,
                "DeleteOnTermination": "true",
                "Encrypted": "true" if key else "false",
            },
        }
    ]
    return snapshot_id


def snapshots_of(image_id):
    """The ids of the snapshots that an image is made of."""
    mappings = ec2._images[image_id]["BlockDeviceMappings"]
    return [one["Ebs"]["SnapshotId"] for one in mappings if one.get("Ebs", {}).get("SnapshotId")]


def delete_snapshot(query):
    wanted = ec2._p(query, "SnapshotId")
    for image_id in ec2._images:
        if wanted in snapshots_of(image_id):
            return ec2._error("InvalidSnapshot.InUse", f"The snapshot {wanted} is currently in use by {image_id}", 400)
    return stock["DeleteSnapshot"](query)


def create_image(query):
    instance = ec2._instances.get(ec2._p(query, "InstanceId"))
    if instance is None:
        return ec2._error(
            "InvalidInstanceID.NotFound", f"The instance ID '{ec2._p(query, 'InstanceId')}' does not exist", 400
        )
    if instance["State"]["Name"] not in ("running", "stopped"):
        message = f"The instance '{instance['InstanceId']}' is not in the 'running' or 'stopped' state"
        return ec2._error("IncorrectState", message, 400)
    volume = ec2._volumes[instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]]
    return new_image(query, instance["Architecture"], volume, volume.get("KmsKeyId", ""), instance["InstanceId"])


def copy_image(query):
    source = ec2._images.get(ec2._p(query, "SourceImageId"))
    if source is None:
        return ec2._error("InvalidAMIID.NotFound", "The image id does not exist", 400)
    (snapshot,) = (ec2._snapshots[one] for one in snapshots_of(source["ImageId"]))
    key = ec2._p(query, "KmsKeyId") or snapshot["KmsKeyId"]
    if ec2._p(query, "Encrypted") == "true" and not key:
        key = "alias/aws/ebs"
    volume = {"VolumeId": "vol-ffffffff", "Size": snapshot["VolumeSize"], "VolumeType": "gp3"}
    return new_image(query, source["Architecture"], volume, key, source["ImageId"])


def new_image(query, architecture, volume, key, source):
    """Registers an image that is pending; its snapshot is there at once, and has the tags that the request gives."""
    request = {
        "Name": [ec2._p(query, "Name")],
        "Description": [ec2._p(query, "Description")],
        "Architecture": [architecture],
        "RootDeviceName": ["/dev/xvda"],
        "VirtualizationType": ["hvm"],
    }
    status, headers, body = ec2._register_image(request)
    if status != 200:
        return status, headers, body
    image_id = re.search(r"<imageId>(.*?)</imageId>", as_text(body))[1]
    image = ec2._images[image_id]
    image["State"] = "pending"
    take_snapshot(image_id, volume["Size"], (), volume["VolumeId"], key, source, volume["VolumeType"])
    ec2._parse_tag_specs(query, "image", image_id)
    ec2._parse_tag_specs(query, "snapshot", snapshots_of(image_id)[0])

    def finish():
        # The key is looked at after the answer: "the action you call may appear to complete even though you provided
        # an invalid identifier. This action will eventually report failure." (API reference of CopyImage)
        image["State"] = "available" if usable(key) else "failed"

    simulation.later(simulation.settings["instances"]["seconds"], finish)
    return ec2._xml(200, f"{ec2._p(query, 'Action')}Response", f"<imageId>{image_id}</imageId>")


def describe_images(query):
    """MiniStack shows every image as available."""

    def with_state(found):
        state = (ec2._images.get(found[2]) or {}).get("State", "available")
        return f"{found[1]}<imageState>{state}</imageState>"

    status, headers, body = stock["DescribeImages"](query)
    pattern = r"(<imageId>([^<]*)</imageId>(?:(?!<imageId>).)*?)<imageState>available</imageState>"
    return status, headers, re.sub(pattern, with_state, as_text(body), flags=re.S).encode()


def modify_image_attribute(query):
    """MiniStack knows launch permissions only; this, the description too."""
    image = ec2._images.get(ec2._p(query, "ImageId"))
    description = ec2._p(query, "Description.Value")
    if image is None or not description:
        return stock["ModifyImageAttribute"](query)
    image["Description"] = description
    return ec2._xml(200, "ModifyImageAttributeResponse", "<return>true</return>")


def image_bdm_xml(view):
    """MiniStack leaves out whether a volume is encrypted."""
    encrypted = [(one.get("Ebs") or {}).get("Encrypted", "false") for one in view["BlockDeviceMappings"]]
    values = iter(encrypted or ["false"])
    return re.sub(r"</ebs>", lambda _: f"<encrypted>{next(values)}</encrypted></ebs>", stock_bdm_xml(view))


def with_key(xml, volume_or_snapshot):
    key = volume_or_snapshot.get("KmsKeyId")
    return f"{xml}<kmsKeyId>{key}</kmsKeyId>" if key else xml


def usable(key):
    """Whether EBS could use the KMS key; the account's own for EBS is always there."""
    if key in ("", "alias/aws/ebs"):
        return True
    found = kms._resolve_key(key)
    return found is not None and found["KeyState"] == "Enabled"


# Instances


def create_key_pair(query):
    """A key pair that works; RSA unless ed25519 is asked for."""
    kind = ec2._p(query, "KeyType") or "rsa"
    status, headers, body = stock["CreateKeyPair"](query)
    if status != 200:
        return status, headers, body
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "key")
        command = ["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path), "-C", ec2._p(query, "KeyName")]
        subprocess.run(command + (["-b", "2048", "-m", "PEM"] if kind == "rsa" else []), check=True)
        private, public = path.read_text(), path.with_suffix(".pub").read_text().strip()
    ec2._key_pairs[ec2._p(query, "KeyName")]["PublicKey"] = public
    return status, headers, re.sub(r"(?s)-----BEGIN.*KEY-----", private, as_text(body)).encode()


def run_instances(query):
    command = simulation.settings["instances"]["machine"]
    if not command:
        return stock["RunInstances"](query)
    if unknown := [name for name in query if not any(name == k or name.startswith(f"{k}.") for k in RUN_INSTANCES)]:
        return ec2._error("UnsupportedOperation", f"the local AWS runs no instances with {', '.join(unknown)}", 400)
    if (ec2._p(query, "MinCount"), ec2._p(query, "MaxCount")) != ("1", "1"):
        return ec2._error("UnsupportedOperation", "the local AWS starts one machine at a time", 400)
    key_pair = ec2._key_pairs.get(ec2._p(query, "KeyName"))
    if key_pair is None:
        message = f"The key pair '{ec2._p(query, 'KeyName')}' does not exist"
        return ec2._error("InvalidKeyPair.NotFound", message, 400)
    # The network interface, where the request has one, has the subnet and the security groups.
    interface = "NetworkInterface.1."
    query = query | {name.removeprefix(interface): value for name, value in query.items() if name.startswith(interface)}
    public = ec2._p(query, "AssociatePublicIpAddress")
    if ec2._p(query, "SubnetId") not in ec2._subnets:
        message = f"The subnet ID '{ec2._p(query, 'SubnetId')}' does not exist"
        return ec2._error("InvalidSubnetID.NotFound", message, 400)
    before = set(ec2._instances)
    status, headers, body = stock["RunInstances"](query)
    if status != 200:
        return status, headers, body
    (instance_id,) = set(ec2._instances) - before
    instance = ec2._instances[instance_id]
    address = f"127.{random.randint(1, 254)}.{random.randint(0, 254)}.{random.randint(1, 254)}"
    if public == "true" or (not public and ec2._subnets[instance["SubnetId"]].get("MapPublicIpOnLaunch")):
        instance |= {"PublicIpAddress": address, "PublicDnsName": ""}
    else:
        instance |= {"PublicIpAddress": "", "PublicDnsName": "", "PrivateIpAddress": address}
    volume = ec2._volumes[instance["BlockDeviceMappings"][0]["Ebs"]["VolumeId"]]
    volume |= root_volume(query)
    # A device that the launch names is asked for by Packer, which has it removed with the instance.
    keep = ec2._p(query, "BlockDeviceMapping.1.Ebs.DeleteOnTermination") == "false"
    volume["Attachments"][0]["DeleteOnTermination"] = not keep
    ec2._parse_tag_specs(query, "volume", volume["VolumeId"])
    set_state(instance, 0, "pending")
    machines[instance_id] = None

    def start():
        if instance["State"]["Name"] != "pending":
            return
        if not usable(volume["KmsKeyId"]):
            instance["StateReason"] = KEY_IS_UNUSABLE.format(volume["KmsKeyId"])
            gone(instance)
            return
        # In the server's process group, so that it ends with the server however that ends.
        words = [*command, instance_id, address, key_pair["PublicKey"]]
        machines[instance_id] = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        set_state(instance, 16, "running")

    simulation.later(simulation.settings["instances"]["seconds"], start)
    shown = ec2._instance_xml(instance)
    body = re.sub(r"(?s)(?<=<instancesSet>).*(?=</instancesSet>)", lambda _: shown, as_text(body))
    return status, headers, body.encode()


def root_volume(query):
    """What a launch asks of its root volume."""
    asked = {
        name: ec2._p(query, f"BlockDeviceMapping.1.Ebs.{name}")
        for name in ("VolumeSize", "VolumeType", "Iops", "Throughput", "Encrypted", "KmsKeyId")
    }
    key = asked["KmsKeyId"] or ("alias/aws/ebs" if asked["Encrypted"] == "true" else "")
    return {
        "Size": int(asked["VolumeSize"] or 8),
        "VolumeType": asked["VolumeType"] or "gp3",
        "Iops": int(asked["Iops"] or 3000),
        "Throughput": int(asked["Throughput"] or 125),
        "Encrypted": bool(key),
        "KmsKeyId": key,
    }


def stop_instances(query):
    return end(query, "StopInstances", 64, "stopping", lambda instance: set_state(instance, 80, "stopped"))


def terminate_instances(query):
    return end(query, "TerminateInstances", 32, "shutting-down", gone)


def end(query, action, code, state, then):
    """Ends the machines of instances, which are in the state in between until that is done."""
    ids = ec2._parse_member_list(query, "InstanceId")
    mine = [ec2._instances[one] for one in ids if one in machines]
    if not mine:
        return stock[action](query)
    items = ""
    for instance in mine:
        before = dict(instance["State"])
        if before["Name"] not in ("terminated", state):
            set_state(instance, code, state)
            simulation.later(simulation.settings["instances"]["seconds"], end_machine, instance, then)
        items += (
            f"<item><instanceId>{instance['InstanceId']}</instanceId>"
            f"<previousState><code>{before['Code']}</code><name>{before['Name']}</name></previousState>"
            f"<currentState><code>{instance['State']['Code']}</code><name>{instance['State']['Name']}</name>"
            "</currentState></item>"
        )
    return ec2._xml(200, f"{action}Response", f"<instancesSet>{items}</instancesSet>")


def end_machine(instance, then):
    if process := machines[instance["InstanceId"]]:
        process.kill()
        process.wait()
    then(instance)


def gone(instance):
    """Terminated, with the volumes that go with it."""
    set_state(instance, 48, "terminated")
    instance["_terminated_at"] = time.time()
    for mapping in instance["BlockDeviceMappings"]:
        volume = ec2._volumes.get(mapping["Ebs"]["VolumeId"])
        if volume and volume["Attachments"][0]["DeleteOnTermination"]:
            del ec2._volumes[volume["VolumeId"]]
        elif volume:
            volume |= {"State": "available", "Attachments": []}


def set_state(instance, code, name):
    instance["State"] = {"Code": code, "Name": name}


def instance_xml(instance):
    """MiniStack knows no reason for a state."""
    reason = instance.get("StateReason")
    if not reason:
        return stock_instance_xml(instance)
    code, _, message = reason.partition(": ")
    shown = f"<stateReason><code>{code}</code><message>{message}</message></stateReason></item>"
    return stock_instance_xml(instance).rstrip().removesuffix("</item>") + shown


def as_text(body):
    return body.decode() if isinstance(body, bytes) else body
