"""Refuses versions that are not known to work together, with the nearest that are; prints the Spark and the Python.

The table is compatibility.json, which build-ami and the readme read too.
"""

import json
import os
import re
import sys


def numbers(version):
    return [int(number) for number in re.findall(r"\d+", version)]


def nearest(known, asked):
    """The newest that is not newer than what was asked for, or else the oldest."""
    ordered = sorted(known, key=numbers)
    return next((version for version in reversed(ordered) if numbers(version) <= numbers(asked)), ordered[0])


def works(table, label, hail, vep):
    """The versions in the table that are nearest to these: the same ones where they are in it."""
    label = nearest(table["emr_releases"], label)
    known = table["emr_releases"][label]["hail"]
    hail = nearest(known, hail) if re.fullmatch(r"\d+\.\d+\.\d+", hail) else known[-1]
    return label, hail, vep if vep == "none" else nearest(table["vep"], vep)


def main():
    with open("compatibility.json") as file:
        table = json.load(file)
    names = "EMR_RELEASE_LABEL", "HAIL_VERSION", "VEP_VERSION"
    asked = tuple(os.environ[name] for name in names)
    found = works(table, *asked)
    wrong = [f"{name} is '{value}'" for name, value, known in zip(names, asked, found) if value != known]
    release = table["emr_releases"][found[0]]
    if wrong and os.environ.get("ALLOW_UNTESTED_VERSIONS") == "true":
        print(f"hail-ami WARNING: {' and '.join(wrong)}, which is not known to work; it is built at your own risk, with the "
              f"Spark {release['spark']} and the Python {release['python']} of {found[0]}.", file=sys.stderr)
    elif wrong:
        combination = ", ".join(f"{name}={value}" for name, value in zip(names, found))
        sys.exit(f"hail-ami error: {' and '.join(wrong)}, which is not known to work; the nearest that works is {combination}, and "
                 "ALLOW_UNTESTED_VERSIONS=true builds what was asked for all the same, at your own risk.")
    print(release["spark"], release["python"])


main()
