"""`python -m local_aws run|start|stop`: the local AWS from a shell."""

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from . import LocalAws, stop


def main():
    parser = argparse.ArgumentParser(prog="python -m local_aws", description="A local AWS for this project's stacks.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="start it, run a command with the AWS_... variables set, stop it")
    start = commands.add_parser("start", help="start it in the background; FOLDER/env has the variables to source")
    end = commands.add_parser("stop", help="stop the one of the folder")
    serve = commands.add_parser("serve")  # for the package itself: the server process
    for command in (run, start, end, serve):
        command.add_argument("--folder", required=True, type=Path, help="where everything it writes goes")
    for command in (start, serve):
        command.add_argument("--with-pid", type=int, default=0, help="end when this process ends")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what to run")
    arguments = parser.parse_args()

    if arguments.command == "serve":
        from .server import serve

        serve(arguments.folder, arguments.with_pid)
    elif arguments.command == "run":
        words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
        if not words:
            run.error("nothing to run: give a command after --")
        with LocalAws(arguments.folder) as aws:
            sys.exit(subprocess.run(words, env=aws.environment).returncode)
    elif arguments.command == "start":
        aws = LocalAws(arguments.folder)
        aws.start(arguments.with_pid)
        (aws.folder / "env").write_text(exports(aws.environment))
        print(f"a local AWS runs at {aws.endpoint}; use it with: . {aws.folder / 'env'}")
    elif not stop(arguments.folder):
        print(f"no local AWS runs in {arguments.folder}", file=sys.stderr)


def exports(environment):
    """Shell lines that turn the shell's environment into `environment`."""
    unset = [f"unset {name}\n" for name in os.environ if name not in environment]
    changed = [f"export {k}={shlex.quote(v)}\n" for k, v in environment.items() if os.environ.get(k) != v]
    return "".join(unset + changed)


if __name__ == "__main__":
    main()
