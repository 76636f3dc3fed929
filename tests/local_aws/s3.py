"""What MiniStack's AWS::S3::Bucket lacks.

- BucketEncryption, OwnershipControls, LifecycleConfiguration and Tags are applied; what these have no place for is
  refused. Lifecycle rules are kept and shown, but nothing expires.
- Whoever puts an object into a bucket that a KMS key encrypts, or gets it, has to be allowed to use the key. (By IAM:
  the key's policy is taken to leave it to that.)
- A name that S3 would refuse is refused, and so is the deletion of a bucket that holds anything.
"""

import re
from urllib.parse import unquote
from xml.sax.saxutils import escape

from ministack.core import iam_actions
from ministack.services import s3
from ministack.services.cloudformation import provisioners

from .seams import replace

# The bucket naming rules of the S3 user guide.
NAME = re.compile(r"(?!xn--|sthree-|amzn-s3-demo-|\d+\.\d+\.\d+\.\d+$)(?!.*\.\.)[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
RESERVED_ENDS = ("-s3alias", "--ol-s3", ".mrap", "--x-s3", "--table-s3")


# "Permissions" in "Using server-side encryption with AWS KMS keys" of the S3 user guide.
KMS_ACTIONS = {
    ("PUT", "PutObject"): "kms:GenerateDataKey",
    ("POST", "PutObject"): "kms:GenerateDataKey",
    ("GET", "GetObject"): "kms:Decrypt",
    ("GET", "GetObjectVersion"): "kms:Decrypt",
}

stock_additional_checks = iam_actions.s3_additional_checks


def install():
    replace(iam_actions, s3_additional_checks=additional_checks)
    replace(provisioners._RESOURCE_HANDLERS["AWS::S3::Bucket"], create=create, update=update, delete=delete)


def additional_checks(method, path, headers, body, query):
    """(action, ARN) that a request needs besides the one that it is named after."""
    checks = stock_additional_checks(method, path, headers, body, query)
    action = KMS_ACTIONS.get((method, iam_actions._s3_action(method, path, query)))
    _, bucket, name = f"{path}/".split("/", 2)
    key = s3._bucket_default_sse_headers(bucket).get("x-amz-server-side-encryption-aws-kms-key-id")
    # What is not there needs no key to be refused.
    if method == "GET" and unquote(name.removesuffix("/")) not in s3._buckets.get(bucket, {}).get("objects", {}):
        return checks
    return [*checks, (action, key)] if action and key else checks


def create(logical_id, props, stack_name):
    if "BucketName" in props:
        check_name(props["BucketName"])
    created = provisioners._s3_create(logical_id, props, stack_name)
    configure(created[0], props)
    return created


def update(name, old, new, stack_name):
    if "BucketName" in new:
        check_name(new["BucketName"])
    updated = provisioners._s3_update(name, old, new, stack_name)
    configure(updated[0], new)
    return updated


def delete(name, _):
    status, _, answer = s3._delete_bucket(name)
    if status >= 400 and status != 404:
        raise ValueError(f"deleting the bucket {name}: {answer!r}")


def check_name(name):
    if not NAME.fullmatch(name) or name.endswith(RESERVED_ENDS):
        raise ValueError(
            f"Bucket name {name!r} breaks S3's naming rules: 3 to 63 lower-case letters, digits, '-' or '.'"
        )


def configure(name, props):
    """Puts each configuration through the S3 API; one that the template no longer has goes."""
    for prop, to_xml, put, remove in (
        ("BucketEncryption", encryption, s3._put_bucket_encryption, s3._delete_bucket_encryption),
        ("OwnershipControls", ownership, s3._put_bucket_ownership_controls, s3._delete_bucket_ownership_controls),
        ("LifecycleConfiguration", lifecycle, s3._put_bucket_lifecycle, s3._delete_bucket_lifecycle),
        ("Tags", tagging, s3._put_bucket_tagging, s3._delete_bucket_tagging),
    ):
        status, _, answer = put(name, to_xml(props[prop]).encode()) if prop in props else remove(name)
        if status >= 400 and prop in props:
            raise ValueError(f"AWS::S3::Bucket {prop}: {answer!r}")


def xml(tag, *children):
    return f"<{tag}>{''.join(children)}</{tag.split()[0]}>"


def document(tag, *children):
    return xml(f'{tag} xmlns="{s3.S3_NS}"', *children)


def text(tag, value):
    return xml(tag, escape(str(value).lower() if isinstance(value, bool) else str(value)))


def only(what, given, *known):
    if unknown := set(given) - set(known):
        raise ValueError(f"AWS::S3::Bucket {what}: the local AWS does not apply {', '.join(sorted(unknown))}")


def encryption(config):
    rules = []
    for rule in config["ServerSideEncryptionConfiguration"]:
        only("BucketEncryption", rule, "ServerSideEncryptionByDefault", "BucketKeyEnabled")
        default = rule["ServerSideEncryptionByDefault"]
        only("BucketEncryption", default, "SSEAlgorithm", "KMSMasterKeyID")
        rules.append(
            xml(
                "Rule",
                xml("ApplyServerSideEncryptionByDefault", *(text(key, value) for key, value in default.items())),
                text("BucketKeyEnabled", rule.get("BucketKeyEnabled", False)),
            )
        )
    return document("ServerSideEncryptionConfiguration", *rules)


def ownership(config):
    return document(
        "OwnershipControls", *(xml("Rule", text("ObjectOwnership", r["ObjectOwnership"])) for r in config["Rules"])
    )


def tagging(tags):
    return document(
        "Tagging", xml("TagSet", *(xml("Tag", text("Key", t["Key"]), text("Value", t["Value"])) for t in tags))
    )


def lifecycle(config):
    rules = []
    for rule in config["Rules"]:
        only(
            "LifecycleConfiguration", rule, "Id", "Status", "Prefix", "ExpirationInDays", "ExpiredObjectDeleteMarker",
            "NoncurrentVersionExpiration", "AbortIncompleteMultipartUpload",
        )  # fmt: skip
        parts = [text("ID", rule["Id"])] if "Id" in rule else []
        parts += [xml("Filter", text("Prefix", rule.get("Prefix", ""))), text("Status", rule["Status"])]
        if "ExpirationInDays" in rule:
            parts.append(xml("Expiration", text("Days", rule["ExpirationInDays"])))
        if "ExpiredObjectDeleteMarker" in rule:
            parts.append(xml("Expiration", text("ExpiredObjectDeleteMarker", rule["ExpiredObjectDeleteMarker"])))
        for name in ("NoncurrentVersionExpiration", "AbortIncompleteMultipartUpload"):
            if name in rule:
                parts.append(xml(name, *(text(key, value) for key, value in rule[name].items())))
        rules.append(xml("Rule", *parts))
    return document("LifecycleConfiguration", *rules)
