"""The digests that templates have to have, since CloudFormation only updates a resource whose properties changed.

- of what seed-buckets ships, in hail-s3.yml: a changed notebook, script or packer file;
- of the start script, in hail-jupyter.yml: it only arrives at a notebook instance's next start.

Without arguments: prints them, and fails if a template has another. With --write: puts them there.
"""

import hashlib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("jupyter/common-notebooks", "jupyter/scripts", "packer")
LITTER = {"__pycache__", ".ipynb_checkpoints"}
TEMPLATE = "templates/hail-s3.yml"
LITERAL = re.compile(r'(?<=AssetsDigest: ")[0-9a-f]{64}(?=")')
START_TEMPLATE = "templates/hail-jupyter.yml"
START_LITERAL = re.compile(r'(?<=Lifecycle: !Sub ")[0-9a-f]{64}(?= )')
START_SCRIPT = re.compile(r"^( +)Fn::Base64: !Sub \|\n((?:\1 +.*\n|\n)+)", re.MULTILINE)


def assets(root):
    """The files that are shipped, in an order that does not depend on the machine."""
    files = (path for folder in FOLDERS for path in (root / folder).rglob("*") if path.is_file())
    return sorted(path for path in files if not LITTER & set(path.relative_to(root).parts))


def digest(root=ROOT):
    """Of names, contents, and whether a file can be run: what a zip or a bucket would show of a change."""
    whole = hashlib.sha256()
    for path in assets(root):
        kind = "x" if path.stat().st_mode & 0o100 else "-"
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        whole.update(f"{kind} {content} {path.relative_to(root).as_posix()}\n".encode())
    return whole.hexdigest()


def start_digest(root=ROOT):
    """Of the start script as the template has it."""
    [(_, script)] = START_SCRIPT.findall((root / START_TEMPLATE).read_text())
    return hashlib.sha256(script.encode()).hexdigest()


def written(root=ROOT, template=TEMPLATE, literal=LITERAL):
    """The digest in a template."""
    found = literal.findall((root / template).read_text())
    if len(found) != 1:
        sys.exit(f"{template} has {len(found)} literals {literal.pattern} and should have one.")
    return found[0]


def main(arguments):
    if arguments not in ([], ["--write"]):
        sys.exit("usage: assets_digest.py [--write]")
    for template, literal, is_now in (
        (TEMPLATE, LITERAL, digest()),
        (START_TEMPLATE, START_LITERAL, start_digest()),
    ):
        is_written = written(ROOT, template, literal)
        print(is_now)
        if is_now == is_written:
            continue
        if arguments == []:
            sys.exit(f"{template} has {is_written}; write the new digest with: make digest")
        (ROOT / template).write_text(literal.sub(is_now, (ROOT / template).read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
