"""What the templates have to be: clean to cfn-lint, and true in what a linter can't know."""

import base64
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import assets_digest
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
STACKS = ("hail-s3", "hail-jupyter", "hail-ami", "hail-emr")
KEY = "arn:aws:kms:us-east-1:123456789012:key"

# What is allowed on every resource, and why: the same reason stands beside the line in the template.
ON_EVERY_RESOURCE = {
    "ec2:Describe*": "EC2 takes no resource for what only describes",
    "cloudformation:DescribeStacks": "CloudFormation has no resource for a list of stacks",
    "elasticmapreduce:ListClusters": "EMR has no resource for a list of clusters",
    "ssm:UpdateInstanceInformation": "the channels of Session Manager are no resources",
    "ssmmessages:*Channel": "the channels of Session Manager are no resources",
}

# The calls of an SDK whose IAM action has another name.
ACTIONS = {
    "s3:HeadObject": "s3:GetObject",
    "s3:ListObjectsV2": "s3:ListBucket",
    "s3:DeleteObjects": "s3:DeleteObject",
    "s3:ListMultipartUploads": "s3:ListBucketMultipartUploads",
    "s3:ListObjectVersions": "s3:ListBucketVersions",
    "s3:PutBucketLifecycleConfiguration": "s3:PutLifecycleConfiguration",
}
SERVICES = {"codebuild": "codebuild", "ec2": "ec2", "emr": "elasticmapreduce", "logs": "logs", "s3": "s3"}
SERVICES |= {"cloudformation": "cloudformation", "sagemaker": "sagemaker", "scheduler": "scheduler", "sns": "sns"}
SERVICES |= {"ssm": "ssm"}

# What AWS asks of a function besides its own calls; the templates say why.
BESIDES = {
    # A snapshot is deleted with its AMI.
    "build-ami": {"ec2:DeleteSnapshot"},
    "refresh-notebook": {
        "ec2:AttachNetworkInterface",
        "ec2:CreateNetworkInterface",
        "ec2:DescribeAvailabilityZones",
        "ec2:DescribeInternetGateways",
        "ec2:DescribeNetworkInterfaces",
        "ec2:DescribeSecurityGroups",
        "ec2:DescribeSubnets",
        "ec2:DescribeVpcs",
        "ec2:ModifyNetworkInterfaceAttribute",
    },
    # DeleteObjects of versions.
    "remove-buckets": {"s3:DeleteObjectVersion"},
    # What S3 does with the KMS key for whoever puts and gets.
    "seed-buckets": {"kms:Decrypt", "kms:GenerateDataKey"},
}


class Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms, which become the long ones."""


def short_form(loader, suffix, node):
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    if suffix == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


Loader.add_multi_constructor("!", short_form)


def text(stack):
    return (ROOT / f"templates/{stack}.yml").read_text()


def read(path):
    return (ROOT / path).read_text()


TEMPLATES = {stack: yaml.load(text(stack), Loader) for stack in STACKS}  # noqa: S506, a SafeLoader


def resources(stack, *types):
    return {
        name: resource
        for name, resource in TEMPLATES[stack]["Resources"].items()
        if not types or resource["Type"] in types or types == ("Custom",) and resource["Type"].startswith("Custom::")
    }


def everywhere(*types):
    """(stack, logical id, resource) of all templates."""
    return [(stack, name, resource) for stack in STACKS for name, resource in resources(stack, *types).items()]


def walk(value):
    """Every mapping in a value, itself included."""
    if isinstance(value, dict):
        yield value
        value = value.values()
    if not isinstance(value, str) and hasattr(value, "__iter__"):
        for inner in value:
            yield from walk(inner)


def listed(value):
    return value if isinstance(value, list) else [value]


def references(value):
    """The logical ids that a value refers to."""
    for mapping in walk(value):
        if "Ref" in mapping:
            yield mapping["Ref"]
        if "Fn::GetAtt" in mapping:
            yield mapping["Fn::GetAtt"][0]
        if "Fn::Sub" in mapping:
            for name in re.findall(r"\$\{([A-Za-z0-9]+)[.}]", listed(mapping["Fn::Sub"])[0]):
                yield name


def needs(stack, name):
    """All resources that CloudFormation makes before this one, and deletes after it."""
    known = resources(stack)
    todo, found = [name], set()
    while todo:
        resource = known[todo.pop()]
        direct = {*references(resource.get("Properties", {})), *listed(resource.get("DependsOn", []))}
        new = (direct & known.keys()) - found
        found |= new
        todo.extend(new)
    return found


def resolved(value):
    """A name or an ARN as text, with ${...} for what is known only when the stack is made."""
    if isinstance(value, str):
        return value
    if "Fn::Sub" in value:
        return listed(value["Fn::Sub"])[0]
    if "Fn::GetAtt" in value:
        return "${%s}" % ".".join(value["Fn::GetAtt"])
    if "Fn::If" in value:
        return next(resolved(part) for part in value["Fn::If"][1:] if part != {"Ref": "AWS::NoValue"})
    return "${%s}" % value["Ref"]


def statements(resource):
    """The statements of the policies that a role or policy resource carries."""
    for mapping in walk(resource.get("Properties", {})):
        if "Effect" in mapping and "Principal" not in mapping:
            yield mapping


def granted(stack, name):
    """(action, resources as text) that a role may do, also by policies of their own."""
    policies = resources(stack, "AWS::IAM::Policy").values()
    for carrier in [resources(stack)[name], *(p for p in policies if {"Ref": name} in p["Properties"]["Roles"])]:
        for statement in statements(carrier):
            if statement["Effect"] == "Allow":
                for action in listed(statement["Action"]):
                    yield action, [resolved(resource) for resource in listed(statement["Resource"])]


def role_of(function):
    return function["Properties"]["Role"]["Fn::GetAtt"][0]


def binary_of(function):
    return function["Properties"]["Code"].removeprefix("../build/")


def object_patterns(stack, role, action):
    """(bucket, pattern of keys) of the objects on which a role may do this, for buckets by their parameter's name."""
    for granted_action, arns in granted(stack, role):
        for arn in arns if granted_action == action else []:
            if found := re.search(r"\$\{(\w+)Bucket(?:\.Arn|Parameter\.Value)?\}/(.+)$", arn):
                yield found.groups()


# What seed-buckets writes, from its own source: (bucket, prefix), and the one zip in the Hail bucket.
SEEDED = set(re.findall(r'\(Bucket::(\w+), "([^"]+/)"\)', read("functions/seed_buckets.rs")))
PACKER_ZIP = re.search(r'PACKER_ZIP: &str = "([^"]+)"', read("functions/seed_buckets.rs"))[1]
SHARED_FOLDERS = {prefix.rstrip("/") for bucket, prefix in SEEDED if bucket == "Notebook"}
assert len(SEEDED) == 3, f"functions/seed_buckets.rs names its prefixes otherwise than this test reads: {SEEDED}"


# The linter


def test_cfn_lint_has_nothing_to_say():
    lint = Path(sys.executable).with_name("cfn-lint")
    linted = subprocess.run([lint], cwd=ROOT, capture_output=True, text=True)
    assert (linted.returncode, linted.stdout, linted.stderr) == (0, "", "")


def test_cfn_lint_looks_at_everything_but_the_local_code():
    configuration = yaml.safe_load(read(".cfnlintrc"))
    assert configuration["ignore_checks"] == ["W3002"]
    assert {str(path.relative_to(ROOT)) for glob in configuration["templates"] for path in ROOT.glob(glob)} == {
        f"templates/{stack}.yml" for stack in STACKS
    }
    for stack in STACKS:
        assert "cfn-lint" not in text(stack), "a template switches a check off"


# Between the stacks


def written_parameters():
    """Names of SSM parameters that templates and functions write, as patterns."""
    names = [resolved(r["Properties"]["Name"]) for _, _, r in everywhere("AWS::SSM::Parameter")]
    for source in (ROOT / "functions").rglob("*.rs"):
        code = re.sub(r"//.*|#\[cfg\(test\)\][\s\S]*", "", source.read_text())
        if ".put_parameter()" in code:
            names += re.findall(r'"(/hail/[^"]+)"', code)
    assert "/hail/ami/latest" in names, "no function publishes an AMI"
    return [re.sub(r"\\\$\\\{[^}]*\\\}|\\\{[^}]*\\\}", "[^/]+", re.escape(name)) for name in names]


def test_every_parameter_that_is_read_is_written():
    read_names = [
        parameter["Default"]
        for template in TEMPLATES.values()
        for parameter in template["Parameters"].values()
        if parameter["Type"].startswith("AWS::SSM::Parameter::Value")
    ]
    assert len(read_names) >= 8
    writers = written_parameters()
    for name in read_names:
        assert any(re.fullmatch(writer, name) for writer in writers), f"nobody writes {name}"


def test_a_function_may_write_the_parameters_that_it_writes():
    arns = [arn for action, arns in granted("hail-ami", "BuildAmiRole") if action == "ssm:PutParameter" for arn in arns]
    literals = re.findall(r'"(/hail/[^"]+)"', source_of("build-ami"))
    assert len(literals) >= 2
    for literal in literals:
        assert any(arn.endswith(":parameter/hail/ami/*") and literal.startswith("/hail/ami/") for arn in arns), literal


def test_a_tag_that_a_policy_asks_for_is_set():
    notebook = json.dumps(TEMPLATES["hail-jupyter"]["Resources"]["NotebookRole"])
    cluster = resources("hail-emr")["Cluster"]["Properties"]["Tags"]
    asked = re.findall(r'"ssm:resourceTag/([a-z-]+)"', notebook)
    assert asked and set(asked) <= {tag["Key"] for tag in cluster}
    # AmazonEMRServicePolicy_v2 asks for it.
    tagged = [cluster, *(g["Properties"]["Tags"] for g in resources("hail-emr", "AWS::EC2::SecurityGroup").values())]
    assert len(tagged) == 4
    for tags in tagged:
        assert {"Key": "for-use-with-amazon-emr-managed-policies", "Value": "true"} in tags


def test_packer_names_what_it_makes_as_its_policy_asks():
    names = {
        value
        for mapping in walk(resources("hail-ami")["BuildRole"])
        for key, value in mapping.items()
        if key in ("aws:RequestTag/Name", "aws:ResourceTag/Name")
    }
    assert len(names) == 1
    prefix = names.pop().removesuffix("*")
    run_tags = re.search(r"run_tags = \{([^}]*\}?[^}]*)\}", read("packer/hail.pkr.hcl"))[1]
    assert re.search(rf'Name\s*=\s*"{re.escape(prefix)}', run_tags), f"run_tags name nothing {prefix}..."
    assert "skip_ami_run_tags" not in read("packer/hail.pkr.hcl")


def test_the_build_gets_the_variables_that_it_asks_for():
    project = resources("hail-ami")["BuildProject"]["Properties"]["Environment"]["EnvironmentVariables"]
    given = {value for mapping in walk(project) for key, value in mapping.items() if key == "Name"}
    buildspec = yaml.safe_load(read("packer/buildspec.yml"))["env"]
    asked = re.search(r"for name in ([A-Z_ ]+); do", read("packer/codebuild/variables.sh"))[1].split()
    assert {"HAIL_VERSION", "VEP_VERSION", "SUBNET_ID"} <= set(asked)
    assert set(asked) <= given | buildspec["variables"].keys()
    assert given <= set(asked) | buildspec["variables"].keys() | {"HAIL_BUCKET", "OPEN_DATA_BUCKET"}
    assert {"AMI_ID", "AMI_NAME"} <= set(buildspec["exported-variables"])
    # What build-ami overrides.
    overridden = set(re.findall(r'\("([A-Z]+_[A-Z_]+)", ', read("functions/build_ami.rs")))
    assert {"HAIL_VERSION", "KMS_KEY_ID", "REBUILD_TOKEN"} <= overridden <= given


def test_the_cluster_finds_hail_where_the_image_has_it():
    configured = set(re.findall(r"/opt/hail[\w/.-]*", text("hail-emr")))
    assert configured == {"/opt/hail/bin/python", "/opt/hail/hail-all-spark.jar"}
    script = read("packer/scripts/hail.sh")
    assert 'prefix="${PREFIX:-/opt/hail}"' in script
    assert '"$prefix/hail-all-spark.jar"' in script and '-m venv "$prefix"' in script


def test_the_image_fits_on_the_nodes():
    sizes = [int(size) for size in re.findall(r"ROOT_VOLUME_SIZE=(\d+)", read("packer/codebuild/variables.sh"))]
    assert sizes and max(sizes) <= TEMPLATES["hail-emr"]["Parameters"]["RootVolumeSizeGiB"]["Default"]


# Functions


def test_every_function_has_a_binary_and_every_binary_a_function():
    code = [function["Properties"]["Code"] for _, _, function in everywhere("AWS::Lambda::Function")]
    in_templates = [folder.removeprefix("../build/") for folder in code]
    assert code == [f"../build/{name}" for name in in_templates]
    binaries = sorted(path.stem for path in (ROOT / "functions/bin").glob("*.rs"))
    in_cargo = sorted(re.findall(r'\[\[bin\]\]\s*name = "([^"]+)"', read("Cargo.toml")))
    assert sorted(in_templates) == binaries == in_cargo
    assert len(binaries) == 5


def calls(binary):
    """The IAM actions of the SDK calls in a function's source."""
    code = source_of(binary)
    function = next(f for _, _, f in everywhere("AWS::Lambda::Function") if binary_of(f) == binary)
    if "Environment" in function["Properties"]:
        code += read("functions/deferred.rs")
    found = set()
    for client, method in re.findall(r"\bself\s*\.(\w+)\s*\.(\w+)\(\)", re.sub(r"//.*", "", code)):
        if client in SERVICES:
            action = f"{SERVICES[client]}:{''.join(word.title() for word in method.split('_'))}"
            found.add(ACTIONS.get(action, action))
    return found


def source_of(binary):
    """A function's own modules."""
    name = binary.replace("-", "_")
    own = [ROOT / f"functions/{name}.rs", *sorted((ROOT / "functions" / name).glob("*.rs"))]
    return "".join(path.read_text() for path in own)


@pytest.mark.parametrize(("stack", "name", "function"), everywhere("AWS::Lambda::Function"))
def test_a_function_may_do_what_its_code_does_and_nothing_else(stack, name, function):
    binary = binary_of(function)
    may = {action for action, _ in granted(stack, role_of(function))}
    always = {"logs:CreateLogStream", "logs:PutLogEvents"}
    passes = {"iam:PassRole"} if "Environment" in function["Properties"] else set()
    assert calls(binary)
    assert may == calls(binary) | always | passes | BESIDES.get(binary, set())


@pytest.mark.parametrize(("stack", "name", "function"), everywhere("AWS::Lambda::Function"))
def test_a_function_logs_to_a_group_of_its_own(stack, name, function):
    group = function["Properties"]["LoggingConfig"]["LogGroup"]["Ref"]
    assert group == f"{name.removesuffix('Function')}LogGroup"
    assert "RetentionInDays" in resources(stack)[group]["Properties"]
    writes = [arns for action, arns in granted(stack, role_of(function)) if action == "logs:PutLogEvents"]
    assert writes == [["${%s.Arn}" % group]]


def test_every_log_group_is_used_and_goes_with_its_stack():
    for stack, name, group in everywhere("AWS::Logs::LogGroup"):
        assert group["DeletionPolicy"] == group["UpdateReplacePolicy"] == "Delete"
        assert "LogGroupName" not in group["Properties"], f"{name} keeps a second stack from being made"
        users = [
            n
            for n, r in resources(stack, "AWS::Lambda::Function", "AWS::CodeBuild::Project").items()
            if name in references(r)
        ]
        assert len(users) == 1, f"{name} has the users {users}"
    assert all(project["Properties"]["LogsConfig"] for _, _, project in everywhere("AWS::CodeBuild::Project"))


def test_functions_are_told_what_they_read():
    variable = re.compile(r'env::var\("([A-Z_]+)"\)')
    read_names = set(variable.findall(read("functions/deferred.rs")))
    assert read_names == {"SCHEDULE_GROUP", "SCHEDULE_ROLE_ARN"}
    for stack, name, function in everywhere("AWS::Lambda::Function"):
        defers = binary_of(function) != "seed-buckets"
        given = function["Properties"].get("Environment", {"Variables": {}})["Variables"]
        own = set(variable.findall(source_of(binary_of(function)))) - {"LAMBDA_TASK_ROOT"}
        assert set(given) == own | (read_names if defers else set()), name
        if defers:
            group, role = given["SCHEDULE_GROUP"]["Ref"], given["SCHEDULE_ROLE_ARN"]["Fn::GetAtt"][0]
            assert resources(stack)[group]["Type"] == "AWS::Scheduler::ScheduleGroup"
            assert [arns for action, arns in granted(stack, role)] == [["${%s.Arn}" % name]]
            may = list(granted(stack, role_of(function)))
            assert ("iam:PassRole", ["${%s.Arn}" % role]) in may
            schedules = [arns for action, arns in may if action.startswith("scheduler:")]
            assert schedules and all(len(a) == 1 and a[0].endswith(":schedule/${%s}/*" % group) for a in schedules)


def test_functions_are_built_for_their_runtime():
    for _, name, function in everywhere("AWS::Lambda::Function"):
        properties = function["Properties"]
        assert (properties["Runtime"], properties["Handler"]) == ("provided.al2023", "bootstrap"), name
        assert properties["Architectures"] == [{"Ref": "FunctionArchitecture"}]
        assert properties["Description"].endswith(".")


@pytest.mark.parametrize(("stack", "name", "resource"), everywhere("Custom"))
def test_a_custom_resource_has_a_limit_and_all_that_its_function_needs(stack, name, resource):
    properties = resource["Properties"]
    function = properties["ServiceToken"]["Fn::GetAtt"][0]
    # Time for the function to answer that it ran out of time.
    assert resources(stack)[function]["Properties"]["Timeout"] < properties["ServiceTimeout"] <= 3600
    users = {
        user
        for user, used_by in resources(stack).items()
        if function in references(used_by) and not used_by["Type"].startswith("Custom::")
    }
    before = needs(stack, name)
    assert users <= before, f"{name} may be made before, or deleted after, {users - before}"
    # AWS: whatever depends on a resource that its condition keeps from being made is not made either.
    conditional = [n for n in listed(resource.get("DependsOn", [])) if "Condition" in resources(stack)[n]]
    assert conditional == []


def test_the_waits_for_the_ami_are_a_chain():
    waits = resources("hail-ami", "Custom::HailAmiWait")
    previous = "Ami"
    for name in waits:
        properties = waits[name]["Properties"]
        assert properties["BuildId"] == {"Fn::GetAtt": [previous, "BuildId"]}
        assert properties["ServiceTimeout"] == 3600
        assert properties.get("LastWait") == ("true" if name == list(waits)[-1] else None)
        previous = name
    timeout = resources("hail-ami")["BuildProject"]["Properties"]["TimeoutInMinutes"]
    assert 55 * (1 + len(waits)) > timeout, "the build may last longer than it is waited for"


def test_the_removal_of_the_buckets_is_a_chain_that_comes_after_what_uses_them():
    chain = resources("hail-s3", "Custom::BucketRemoval")
    earlier = "RemoveBucketsSchedulePolicy"
    for number, (name, removal) in enumerate(chain.items()):
        properties = removal["Properties"]
        assert removal["DependsOn"] == earlier and "Condition" not in removal
        assert properties["ServiceTimeout"] == 3600
        assert properties.get("LastWait") == ("true" if number == 0 else None), "the first made is the last deleted"
        assert properties["Buckets"] == chain["BucketRemoval"]["Properties"]["Buckets"]
        earlier = name
    assert resources("hail-s3")["Seeds"]["DependsOn"] == earlier


def test_buckets_are_removed_only_where_a_person_asked_for_it():
    template, role = TEMPLATES["hail-s3"], resources("hail-s3")["RemoveBucketsRole"]
    assert template["Parameters"]["RemoveBuckets"]["Default"] == "false"
    removed = resources("hail-s3")["BucketRemoval"]["Properties"]["Buckets"]
    for name, bucket in zip(("Hail", "Log", "Notebook"), removed, strict=True):
        both = [{"Condition": "RemovesBuckets"}, {"Condition": f"Creates{name}Bucket"}]
        assert template["Conditions"][f"Removes{name}Bucket"] == {"Fn::And": both}
        assert bucket == {"Fn::If": [f"Removes{name}Bucket", {"Ref": f"{name}Bucket"}, {"Ref": "AWS::NoValue"}]}
    (guarded,) = [policy["Fn::If"] for policy in role["Properties"]["Policies"] if "Fn::If" in policy]
    assert guarded[0] == "RemovesBuckets" and guarded[2] == {"Ref": "AWS::NoValue"}
    always = [policy for policy in role["Properties"]["Policies"] if "Fn::If" not in policy]
    assert not [a for s in walk(always) if "Action" in s for a in listed(s["Action"]) if a.startswith("s3:")]
    for arn in (arn for _, arns in granted("hail-s3", "RemoveBucketsRole") for arn in arns if "Bucket.Arn" in arn):
        assert re.fullmatch(r"\$\{(Hail|Log|Notebook)Bucket\.Arn\}(/\*)?", arn)


def test_an_event_reaches_its_function():
    rules = everywhere("AWS::Events::Rule")
    assert len(rules) == 5
    for stack, name, rule in rules:
        target = rule["Properties"]["Targets"][0]["Arn"]["Fn::GetAtt"]
        permissions = [
            p["Properties"]
            for p in resources(stack, "AWS::Lambda::Permission").values()
            if p["Properties"]["SourceArn"] == {"Fn::GetAtt": [name, "Arn"]}
        ]
        assert [p["FunctionName"] for p in permissions] == [{"Ref": target[0]}]
        assert permissions[0]["Principal"] == "events.amazonaws.com"
        if "ScheduleExpression" in rule["Properties"]:
            continue
        pattern = rule["Properties"]["EventPattern"]
        assert {"source", "detail-type", "detail"} == pattern.keys()
        assert any(True for _ in references(pattern["detail"])), f"{name} hears of other stacks' things too"


# Seeds and buckets


def test_seed_buckets_may_touch_what_it_seeds_and_nothing_else():
    wanted = {(bucket, f"{prefix}*") for bucket, prefix in SEEDED} | {("Hail", PACKER_ZIP), ("Hail", "seeds/*")}
    for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
        assert set(object_patterns("hail-s3", "SeedBucketsRole", action)) == wanted


def test_a_person_controls_their_own_folder_and_reads_the_shared_ones():
    role, own = "NotebookRole", "${NotebookInstanceName}/*"
    shared = {("Notebook", f"{folder}/*") for folder in SHARED_FOLDERS}
    assert set(object_patterns("hail-jupyter", role, "s3:GetObject")) == shared | {("Notebook", own)}
    for action in ("s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
        assert set(object_patterns("hail-jupyter", role, action)) == {("Notebook", own)}
    lists = [s for s in statements(resources("hail-jupyter")[role]) if "s3:ListBucket" in listed(s["Action"])]
    assert len(lists) == 1
    prefixes = {resolved(prefix) for prefix in lists[0]["Condition"]["StringLike"]["s3:prefix"]}
    folders = SHARED_FOLDERS | {"${NotebookInstanceName}"}
    assert prefixes == folders | {f"{folder}/*" for folder in folders}
    assert not {action for action, _ in granted("hail-jupyter", role) if action.startswith("s3:") and "*" in action}


@pytest.mark.parametrize("stack", STACKS)
def test_whoever_reaches_what_is_in_a_bucket_may_use_the_key_that_encrypts_it(stack):
    roles = {
        name: {action for action in ("s3:GetObject", "s3:PutObject") if set(object_patterns(stack, name, action))}
        for name in resources(stack, "AWS::IAM::Role")
    }
    assert any(roles.values())
    needed = {"s3:GetObject": "kms:Decrypt", "s3:PutObject": "kms:GenerateDataKey"}
    has_key = "HasKmsKey" if stack == "hail-s3" else "HasBucketKmsKey"
    for name, actions in roles.items():
        conditional = [mapping["Fn::If"] for mapping in walk(resources(stack)[name]) if "Fn::If" in mapping]
        keys = [then for condition, then, _ in conditional if condition == has_key and "Action" in then]
        may = {action for statement in keys for action in listed(statement["Action"])}
        assert may == {needed[action] for action in actions}, name


def test_nobody_has_the_name_of_a_shared_folder():
    for folder in SHARED_FOLDERS:
        assert refused("hail-jupyter", NotebookInstanceName=folder) == ["NameIsNotAFolder"]
    assert refused("hail-jupyter", NotebookInstanceName="aperry") == []


def test_the_cluster_cannot_change_what_the_ami_is_built_from():
    role = resources("hail-emr")["NodeRole"]
    denied = [s for s in statements(role) if s["Effect"] == "Deny"]
    assert len(denied) == 1 and set(denied[0]["Action"]) == {"s3:DeleteObject", "s3:PutObject"}
    keys = {resolved(arn).split("/", 1)[1] for arn in denied[0]["Resource"]}
    packer = f"{PACKER_ZIP.rpartition('/')[0]}/*"
    assert keys == {f"{prefix}*" for bucket, prefix in SEEDED if bucket == "Hail"} | {packer, "seeds/*"}


def test_the_build_takes_its_source_from_where_it_is_seeded():
    source = resources("hail-ami")["BuildProject"]["Properties"]["Source"]
    assert resolved(source["Location"]) == "${HailBucket}/" + PACKER_ZIP
    assert set(object_patterns("hail-ami", "BuildRole", "s3:GetObject")) == {("Hail", PACKER_ZIP)}
    assert (ROOT / "packer" / source["BuildSpec"]).is_file()
    assert ("Hail", "vep/*") in set(object_patterns("hail-ami", "BuilderRole", "s3:GetObject"))


def test_the_digest_of_the_assets_is_that_of_the_assets():
    assert assets_digest.written() == assets_digest.digest(), "write it with: make digest"
    literal = resources("hail-s3")["Seeds"]["Properties"]["AssetsDigest"]
    assert literal == assets_digest.written()


def test_the_digest_changes_with_names_contents_and_modes(tmp_path):
    for folder in assets_digest.FOLDERS:
        assert (ROOT / folder).is_dir()
        (tmp_path / folder).mkdir(parents=True)
    script = tmp_path / "packer/a.sh"
    script.write_text("one")
    digests = [assets_digest.digest(tmp_path)]
    script.write_text("two")
    digests.append(assets_digest.digest(tmp_path))
    script.chmod(0o755)
    digests.append(assets_digest.digest(tmp_path))
    script = script.rename(tmp_path / "packer/b.sh")
    digests.append(assets_digest.digest(tmp_path))
    script.rename(tmp_path / "jupyter/scripts/b.sh")
    digests.append(assets_digest.digest(tmp_path))
    assert len(set(digests)) == len(digests)
    litter = tmp_path / "jupyter/scripts/__pycache__"
    litter.mkdir()
    (litter / "b.pyc").write_text("")
    assert assets_digest.digest(tmp_path) == digests[-1]


def test_a_cluster_has_a_release_that_an_ami_can_be_built_for():
    releases = json.loads((ROOT / "packer" / "compatibility.json").read_text())["emr_releases"]
    label = TEMPLATES["hail-emr"]["Parameters"]["EmrReleaseLabel"]
    assert [release for release in releases if not accepted(label, release)] == []
    assert label["Default"] == TEMPLATES["hail-ami"]["Parameters"]["EmrReleaseLabel"]["Default"]


def test_the_digest_of_the_start_script_is_that_of_the_script():
    is_written = assets_digest.written(ROOT, assets_digest.START_TEMPLATE, assets_digest.START_LITERAL)
    assert is_written == assets_digest.start_digest(), "write it with: make digest"


def test_the_start_script_runs_and_fits():
    content = resources("hail-jupyter")["NotebookLifecycle"]["Properties"]["OnStart"][0]["Content"]
    script = content["Fn::Base64"]["Fn::Sub"]
    assert set(re.findall(r"\$\{(\w+)\}", script)) == {"NotebookBucket", "NotebookInstanceName", "HailBucket"}
    longest = re.sub(r"\$\{\w+\}", "x" * 63, script)
    assert len(base64.b64encode(longest.encode())) <= 16384
    checked = subprocess.run(["bash", "-n"], input=longest, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    seed = re.search(r"s3://\$\{NotebookBucket\}/(\S+)\"", script)[1]
    assert (ROOT / "jupyter" / seed).is_file(), f"nothing seeds {seed}"


def test_buckets_keep_what_they_hold_to_themselves():
    buckets = everywhere("AWS::S3::Bucket")
    assert len(buckets) == 3
    for stack, name, bucket in buckets:
        properties = bucket["Properties"]
        assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
        assert len(properties["PublicAccessBlockConfiguration"]) == 4
        assert set(properties["PublicAccessBlockConfiguration"].values()) == {True}
        assert properties["OwnershipControls"]["Rules"] == [{"ObjectOwnership": "BucketOwnerEnforced"}]
        assert properties["VersioningConfiguration"] == {"Status": "Enabled"}
        condition, with_key, without = properties["BucketEncryption"]["ServerSideEncryptionConfiguration"][0]["Fn::If"]
        assert condition == "HasKmsKey" and with_key["BucketKeyEnabled"] is True
        kms = {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": {"Ref": "KmsKeyArn"}}
        assert with_key["ServerSideEncryptionByDefault"] == kms
        assert without == {"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
        rules = properties["LifecycleConfiguration"]["Rules"]
        assert {rule["Status"] for rule in rules} == {"Enabled"}
        keys = set().union(*rules)
        assert {"NoncurrentVersionExpiration", "AbortIncompleteMultipartUpload"} <= keys
        assert ("ExpirationInDays" in keys) == (name == "LogBucket"), "only logs may be deleted for their age"
        policy = resources(stack)[f"{name}Policy"]
        assert policy["Condition"] == bucket["Condition"] == f"Creates{name}"
        assert policy["DeletionPolicy"] == policy["UpdateReplacePolicy"] == "Retain"
        assert policy["Properties"]["Bucket"] == {"Ref": name}
        statement = policy["Properties"]["PolicyDocument"]["Statement"][0]
        assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
        assert [resolved(r) for r in statement["Resource"]] == ["${%s.Arn}" % name, "${%s.Arn}/*" % name]
        assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}


def test_nothing_but_buckets_is_kept_when_a_stack_goes():
    for _, name, resource in everywhere():
        if "Retain" in str(resource.get("DeletionPolicy")):
            assert resource["Type"] in ("AWS::S3::Bucket", "AWS::S3::BucketPolicy"), name


# Policies


def matches(pattern, action):
    return re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), action)


def on_every_resource():
    for stack, name, resource in everywhere():
        for statement in statements(resource):
            if statement["Effect"] == "Allow" and "*" in [resolved(r) for r in listed(statement["Resource"])]:
                for action in listed(statement["Action"]):
                    yield stack, name, action


def test_every_star_has_a_reason():
    found = list(on_every_resource())
    for stack, name, action in found:
        assert any(matches(pattern, action) for pattern in ON_EVERY_RESOURCE), f"{name} of {stack}: {action}"
    for pattern in ON_EVERY_RESOURCE:
        assert any(matches(pattern, action) for _, _, action in found), f"{pattern} needs no exception any more"
    for stack in STACKS:
        for line in re.findall(r'^\s*(?:Resource:|-) "\*".*$', text(stack), re.MULTILINE):
            reason = line.partition("# ")[2].rstrip(".").lower()
            assert reason in {why.lower() for why in ON_EVERY_RESOURCE.values()}, f"no reason in: {line}"


def test_no_policy_allows_actions_by_a_pattern():
    for _, name, resource in everywhere():
        for statement in statements(resource):
            assert "NotAction" not in statement and "NotResource" not in statement
            if statement["Effect"] == "Allow":
                assert not [action for action in listed(statement["Action"]) if "*" in action], name


def test_a_role_is_passed_to_one_service_only():
    found = 0
    for _, name, resource in everywhere():
        for statement in statements(resource):
            if "iam:PassRole" in listed(statement["Action"]):
                found += 1
                assert listed(statement["Action"]) == ["iam:PassRole"], name
                assert statement["Condition"]["StringEquals"]["iam:PassedToService"].endswith(".amazonaws.com")
                assert "*" not in resolved(statement["Resource"])
    assert found == 7


def test_names_are_left_to_cloudformation():
    """A fixed name keeps a second stack from being made."""
    for _, name, resource in everywhere():
        assert re.fullmatch(r"[A-Z][A-Za-z0-9]*", name)
        fixed = {"FunctionName", "RoleName", "InstanceProfileName", "GroupName", "ManagedPolicyName"}
        if resource["Type"] != "AWS::Lambda::Permission":
            assert not fixed & resource.get("Properties", {}).keys(), name


def test_the_notebooks_alone_reach_the_cluster():
    allowed = []
    for _, resource in resources("hail-emr", "AWS::EC2::SecurityGroup").items():
        allowed += resource["Properties"].get("SecurityGroupIngress", [])
    allowed += [r["Properties"] for r in resources("hail-emr", "AWS::EC2::SecurityGroupIngress").values()]
    assert not [rule for rule in allowed if "CidrIp" in rule or "CidrIpv6" in rule]
    from_notebooks = [r for r in allowed if r["SourceSecurityGroupId"] == {"Ref": "NotebookSecurityGroupId"}]
    assert {(rule["FromPort"], rule["ToPort"], rule["IpProtocol"]) for rule in from_notebooks} == {
        (8998, 8998, "tcp"),
        (80, 80, "tcp"),
    }
    assert {next(references(r["SourceSecurityGroupId"])) for r in allowed} == {
        "NotebookSecurityGroupId",
        "NodeSecurityGroup",
        "ServiceSecurityGroup",
    }


# What people see


def parameters():
    return [(stack, name, p) for stack in STACKS for name, p in TEMPLATES[stack]["Parameters"].items()]


@pytest.mark.parametrize("stack", STACKS)
def test_every_parameter_is_in_one_group_of_the_console(stack):
    groups = TEMPLATES[stack]["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    grouped = [name for group in groups for name in group["Parameters"]]
    assert sorted(grouped) == sorted(TEMPLATES[stack]["Parameters"])
    assert all(group["Label"]["default"] for group in groups)


@pytest.mark.parametrize(("stack", "name", "parameter"), parameters())
def test_a_parameter_is_described_and_explains_a_refusal(stack, name, parameter):
    description = parameter["Description"]
    assert description.endswith(".")
    assert description.startswith("Optional. ") == (parameter.get("Default") == "")
    assert len(re.findall(r"\.(?: |$)", description.removeprefix("Optional. "))) <= 2
    limits = {"AllowedPattern", "MinValue", "MaxValue", "MinLength", "MaxLength"} & parameter.keys()
    assert ("ConstraintDescription" in parameter) == bool(limits)
    if limits:
        assert parameter["ConstraintDescription"].startswith("should be ")
    if "Default" in parameter and not parameter["Type"].startswith("AWS::SSM"):
        assert accepted(parameter, parameter["Default"]), "the default is refused"
    assert any(
        name in set(references(part))
        for key, part in TEMPLATES[stack].items()
        if key != "Metadata" and key != "Parameters"
    )


@pytest.mark.parametrize("stack", STACKS)
def test_every_output_is_described(stack):
    assert TEMPLATES[stack]["Outputs"]
    for name, output in TEMPLATES[stack]["Outputs"].items():
        assert output["Description"].endswith("."), name
        assert "Export" not in output, "the stacks meet through SSM parameters"


def accepted(parameter, value):
    """Whether CloudFormation would take a value for a parameter."""
    if "AllowedValues" in parameter:
        return str(value) in map(str, parameter["AllowedValues"])
    if parameter["Type"] == "Number":
        return parameter.get("MinValue", value) <= value <= parameter.get("MaxValue", value)
    return bool(re.fullmatch(parameter.get("AllowedPattern", ".*"), value)) and len(value) <= parameter.get(
        "MaxLength", 4096
    )


@pytest.mark.parametrize(
    ("stack", "name", "good", "bad"),
    [
        (
            "hail-s3",
            bucket,
            ["", "abc", "my-hail-bucket-1", "a" * 63],
            ["ab", "a" * 64, "Hail", "my_bucket", "my.bucket", "-abc", "abc-", "xn--abc", "sthree-abc", "abc-s3alias"]
            + ["amzn-s3-demo-x", "abc--ol-s3", "abc--x-s3", "abc--table-s3", "192.168.5.4", "a b c"],
        )
        for bucket in ("HailBucketName", "LogBucketName", "NotebookBucketName")
    ]
    + [
        (
            "hail-jupyter",
            "NotebookInstanceName",
            ["aperry", "a", "a-1"],
            ["", "A", "-a", "a-", "a_b", "a/b", "a*", "a" * 64],
        ),
        (
            "hail-s3",
            "KmsKeyArn",
            ["", f"{KEY}/1234abcd-12ab-34cd-56ef-1234567890ab", f"{KEY}/mrk-0123", KEY.replace("aws", "aws-cn") + "/1"],
            ["1234abcd", "alias/hail", KEY.replace("key", "alias") + "/hail", KEY],
        ),
        ("hail-s3", "OldVersionDays", [1, 3650], [0, 3651]),
        ("hail-s3", "EmrLogDays", [1, 3650], [0, 3651]),
        ("hail-jupyter", "InstanceType", ["ml.t3.medium"], ["t3.medium", "ml.t3"]),
        ("hail-jupyter", "VolumeSizeGiB", [5, 16384], [4, 16385]),
        ("hail-jupyter", "SecurityGroupId", ["", "sg-0123456789abcdef0"], ["sg", "default"]),
        ("hail-ami", "HailVersion", ["0.2.139", "main", "feature/x_y-1.2", "a" * 40], ["", "-x", "a b", "x;y", "a" * 101]),
        ("hail-ami", "VepVersion", ["none", "99", "115"], ["", "v115", "latest", "None", "1.5", "0"]),
        ("hail-ami", "EmrReleaseLabel", ["emr-7.13.0"], ["7.13.0", "emr-7.13", ""]),
        ("hail-ami", "AmisToKeep", [0, 2, 1000], [-1, 1001]),
        ("hail-ami", "FailureEmail", ["", "ada@example.org"], ["ada", "a b@c", "@"]),
        ("hail-ami", "RebuildSchedule", ["", "rate(30 days)", "cron(0 3 1 * ? *)"], ["monthly", "rate()", "at(2030)"]),
        ("hail-ami", "KmsKeyArn", ["", "arn:aws:kms:eu-west-1:123456789012:key/1-a"], ["alias/hail", "1234-abcd"]),
        ("hail-emr", "EmrReleaseLabel", ["emr-7.13.0", "emr-7.0.1"], ["emr-6.15.0", "7.13.0", "emr-spark-8.1.0"]),
        ("hail-ami", "AmiName", ["hail", "hail-0.2"], ["", "hail ami", "-hail", "hail/1", "h" * 65]),
        ("hail-emr", "CoreInstanceCount", [1, 1000], [0, 1001]),
        ("hail-emr", "CoreVolumeSizeGiB", [10, 16384], [9, 16385]),
        ("hail-emr", "RootVolumeSizeGiB", [15, 100], [14, 101]),
        ("hail-emr", "CoreInstanceType", ["m5.xlarge", "r6gd.16xlarge", "m5.metal"], ["m5", "t3.medium", "m5.xlarge "]),
        ("hail-emr", "PrimaryInstanceType", ["m5.xlarge", "i3en.large"], ["xlarge", "t3.micro"]),
        ("hail-emr", "IdleMinutes", [0, 60], [1, -1]),
        ("hail-emr", "EfsFileSystemId", ["", "fs-01234567"], ["fs", "efs-01234567"]),
        ("hail-emr", "ClusterName", ["hail", "hail_1.x"], ["", "my cluster", "a/b"]),
    ],
)
def test_a_parameter_takes_what_works_and_refuses_what_does_not(stack, name, good, bad):
    parameter = TEMPLATES[stack]["Parameters"][name]
    assert [value for value in good if not accepted(parameter, value)] == []
    assert [value for value in bad if accepted(parameter, value)] == []


def evaluate(expression, values):
    """The value of a condition in Rules."""
    if not isinstance(expression, dict):
        return expression
    ((function, arguments),) = expression.items()
    if function == "Ref":
        return values[arguments]
    if function == "Fn::ValueOf":
        assert arguments == ["SubnetId", "VpcId"]
        return values["SubnetId"].partition(" of ")[2]
    left, *right = (evaluate(argument, values) for argument in arguments)
    return {
        "Fn::Equals": lambda: left == right[0],
        "Fn::Not": lambda: not left,
        "Fn::Or": lambda: left or any(right),
        "Fn::Contains": lambda: right[0] in [evaluate(member, values) for member in left],
    }[function]()


def refused(stack, **values):
    """The rules of a template that do not let these values pass."""
    template = TEMPLATES[stack]
    values = (
        {n: p.get("Default", "") for n, p in template["Parameters"].items()}
        | {"VpcId": "v", "SubnetId": "s of v"}
        | values
    )
    broken = []
    for name, rule in template["Rules"].items():
        for assertion in rule["Assertions"]:
            assert re.fullmatch(
                r".+ (is|are) .+; it should be .+\.|.+; they should be .+\.", assertion["AssertDescription"]
            )
            if not evaluate(assertion["Assert"], values):
                broken.append(name)
    return broken


@pytest.mark.parametrize(
    "pair", [*itertools.combinations(("HailBucketName", "LogBucketName", "NotebookBucketName"), 2)]
)
def test_two_buckets_cannot_have_one_name(pair):
    assert refused("hail-s3", **dict.fromkeys(pair, "same")) == ["BucketNamesDiffer"]
    assert refused("hail-s3", **dict(zip(pair, ("one", "other"), strict=True))) == []
    assert refused("hail-s3") == []


@pytest.mark.parametrize("bucket", ["Hail", "Log", "Notebook"])
def test_a_bucket_to_use_has_to_be_named(bucket):
    existing = {f"Create{bucket}Bucket": "false"}
    assert refused("hail-s3", **existing) == ["BucketToUseIsNamed"]
    assert refused("hail-s3", **existing, **{f"{bucket}BucketName": "there-before"}) == []


def test_buckets_that_were_there_before_are_not_removed():
    buckets = ("Hail", "Log", "Notebook")
    existing = {f"Create{bucket}Bucket": "false" for bucket in buckets}
    existing |= {f"{bucket}BucketName": bucket.lower() for bucket in buckets}
    assert refused("hail-s3", **existing, RemoveBuckets="true") == ["BucketToRemoveIsTheStacks"]
    assert refused("hail-s3", **existing) == []
    assert refused("hail-s3", **existing | {"CreateLogBucket": "true"}, RemoveBuckets="true") == []


@pytest.mark.parametrize("stack", [stack for stack in STACKS if "SubnetId" in TEMPLATES[stack]["Parameters"]])
def test_a_subnet_has_to_be_in_the_vpc(stack):
    assert refused(stack, VpcId="v", SubnetId="s of w") == ["SubnetInVpc"]
    assert refused(stack, VpcId="v", SubnetId="s of v") == []


def test_an_update_that_fails_has_an_ami_to_go_back_to():
    assert refused("hail-ami", AmisToKeep="1") == ["WayBack"]
    assert refused("hail-ami", AmisToKeep="0") == refused("hail-ami", AmisToKeep="2") == []


def test_three_stacks_are_in_a_network():
    assert sum("SubnetInVpc" in template.get("Rules", {}) for template in TEMPLATES.values()) == 3
