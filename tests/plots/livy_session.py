"""A session of the stand-in for Livy: a process with a SparkContext that runs what it is sent.

It reads one JSON object per line from its input, and answers with one per line on the file descriptor of its only
argument, as Livy's own interpreter for Python would: what was printed, or the exception.
"""

import ast
import contextlib
import io
import json
import signal
import sys
import traceback

from pyspark.sql import SparkSession


def run(code, names):
    body = ast.parse(code, "<stdin>").body
    for node in body[:-1]:
        exec(compile(ast.Module([node], []), "<stdin>", "exec"), names)
    for node in body[-1:]:  # an expression at the end is printed
        exec(compile(ast.Interactive([node]), "<stdin>", "single"), names)


def answer(code, names):
    printed = io.StringIO()
    data = {}
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if code.startswith("%json "):
                data["application/json"] = names[code.split()[1]]
            else:
                run(code, names)
    except BaseException as error:  # an interrupt and sys.exit() too: Livy's sessions outlive both
        lines = traceback.format_exception(type(error), error, error.__traceback__)
        return {"status": "error", "ename": type(error).__name__, "evalue": str(error), "traceback": lines}
    if printed.getvalue() or not data:
        data["text/plain"] = printed.getvalue().rstrip()
    return {"status": "ok", "data": data}


def main():
    answers = open(int(sys.argv[1]), "w", buffering=1)
    spark = SparkSession.builder.getOrCreate()
    names = {"__name__": "__main__", "spark": spark, "sc": spark.sparkContext}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(json.dumps({"ready": spark.sparkContext.applicationId}), file=answers)
    for line in sys.stdin:
        try:
            output = answer(json.loads(line)["code"], names)
        except KeyboardInterrupt:  # it came just after the statement's end
            continue
        print(json.dumps(output, default=str), file=answers)


if __name__ == "__main__":
    main()
