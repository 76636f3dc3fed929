"""Prints the table of packer/readme.md that tells which versions work together; with --write, puts it there.

It is made from packer/compatibility.json, which the functions and the build read too.
"""

import json
import re
import sys
from pathlib import Path

PACKER = Path(__file__).resolve().parent.parent / "packer"
MARKED = re.compile(r"(?<=<!-- compatibility -->\n).*?(?=<!-- /compatibility -->)", re.S)


def span(versions):
    """0.2.131 to 0.2.139, where none is left out in between."""
    last = [int(version.split(".")[-1]) for version in versions]
    if len(versions) > 2 and last == list(range(last[0], last[0] + len(last))):
        return f"{versions[0]} to {versions[-1]}"
    return ", ".join(versions)


def table():
    known = json.loads((PACKER / "compatibility.json").read_text())
    rows = ["| `EMR_RELEASE_LABEL` | Spark | Python | `HAIL_VERSION` | `VEP_VERSION` |", "| --- | --- | --- | --- | --- |"]
    for label, release in known["emr_releases"].items():
        rows.append(f"| {label} | {release['spark']} | {release['python']} | {span(release['hail'])} | none, or {span(list(known['vep']))} |")
    return "\n".join(rows) + "\n"


def written(readme):
    """The readme with the table between its markers."""
    text, places = MARKED.subn(lambda _: table(), readme)
    if places != 1:
        sys.exit(f"packer/readme.md has {places} places for the table of versions and should have one.")
    return text


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        path = PACKER / "readme.md"
        path.write_text(written(path.read_text()))
    else:
        print(table(), end="")
