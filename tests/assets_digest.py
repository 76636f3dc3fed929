"""The digest of what seed-buckets ships, as templates/hail-s3.yml has to have it.

CloudFormation only updates a resource whose properties changed, so a changed notebook, script or packer file has to
change one. Without arguments: prints the digest, and fails if the template has another. With --write: puts it there.
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


def written(root=ROOT):
    """The digest in the template."""
    found = LITERAL.findall((root / TEMPLATE).read_text())
    if len(found) != 1:
        sys.exit(f"{TEMPLATE} has {len(found)} literals for AssetsDigest and should have one of 64 hexadecimal digits.")
    return found[0]


def main(arguments):
    if arguments not in ([], ["--write"]):
        sys.exit("usage: assets_digest.py [--write]")
    is_now, is_written = digest(), written()
    print(is_now)
    if is_now == is_written:
        return
    if arguments == []:
        sys.exit(f"{TEMPLATE} has {is_written}; write the new digest with: make digest")
    template = ROOT / TEMPLATE
    template.write_text(LITERAL.sub(is_now, template.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
