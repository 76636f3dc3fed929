"""A stand-in for Livy, for the tests: its REST API for interactive sessions (https://livy.apache.org/docs/latest/rest-api.html)
before sessions that are real processes with a real Spark.

Livy's own server is not among the artifacts that can be had here. What is left out is refused with 501: Scala, R and
SQL, batches, impersonation, completion.
"""

import json
import os
import re
import signal
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SESSION = Path(__file__).with_name("livy_session.py")


class Session:
    def __init__(self, number, python, environment, folder):
        self.number = number
        self.state = "starting"
        self.app_id = None
        self.statements = []
        self.changed = threading.Condition()
        self.log_file = folder / f"session-{number}.log"
        reading, writing = os.pipe()
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [python, SESSION, str(writing)],
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[writing],
                env=environment, cwd=folder, start_new_session=True,
            )
        os.close(writing)
        self.answers = os.fdopen(reading)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self):
        """Runs the statements one after the other, until the process ends."""
        ready = self.answers.readline()
        with self.changed:
            if ready and self.state == "starting":
                self.app_id, self.state = json.loads(ready)["ready"], "idle"
        while ready:
            with self.changed:
                self.changed.wait_for(lambda: self._next() or self.process.poll() is not None, timeout=0.5)
                statement = self._next()
                if self.process.poll() is not None:
                    break
                if statement is None:
                    continue
                self.state, statement["state"] = "busy", "running"
            try:
                self.process.stdin.write(json.dumps({"code": statement["code"]}).encode() + b"\n")
                self.process.stdin.flush()
            except OSError:
                break
            line = self.answers.readline()
            if not line:
                break
            with self.changed:
                cancelled = statement["state"] == "cancelling"
                statement["output"] = {"execution_count": statement["id"]} | json.loads(line)
                statement["state"], statement["progress"] = "cancelled" if cancelled else "available", 1.0
                self.state = "idle"
        with self.changed:
            if self.state != "killed":
                self.state = "dead"

    def _next(self):
        return next((one for one in self.statements if one["state"] == "waiting"), None)

    def submit(self, code):
        with self.changed:
            if self.state not in ("starting", "idle", "busy"):
                return None
            statement = {"id": len(self.statements), "code": code, "state": "waiting", "output": None, "progress": 0.0}
            self.statements.append(statement)
            self.changed.notify_all()
            return statement

    def cancel(self, statement):
        with self.changed:
            if statement["state"] == "waiting":
                statement["state"] = "cancelled"
            elif statement["state"] == "running":
                statement["state"] = "cancelling"
                os.kill(self.process.pid, signal.SIGINT)

    def kill(self):
        with self.changed:
            self.state = "killed"
        self.end()

    def end(self):
        """With the Java machine that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def log(self):
        return self.log_file.read_text(errors="replace").splitlines()

    def view(self):
        return {
            "id": self.number, "appId": self.app_id, "owner": None, "proxyUser": None, "kind": "pyspark",
            "state": self.state, "appInfo": {"driverLogUrl": None, "sparkUiUrl": None}, "log": self.log()[-10:],
        }


class Livy:
    """The server, at an address of its own; `with` stops it and its sessions."""

    def __init__(self, address, port, python, environment, folder):
        self.sessions = {}
        self.started = 0
        self.make = lambda number: Session(number, python, environment, folder)
        self.lock = threading.Lock()
        livy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length) or b"{}")
                status, answer = livy.answer(self.command, self.path, body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = handle_one

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer((address, port), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, method, target, body):
        path, _, query = target.partition("?")
        asked = dict(pair.split("=", 1) for pair in query.split("&") if "=" in pair)
        begin = int(asked.get("from", 0))
        parts = path.strip("/").split("/")
        if parts == ["sessions"] and method == "GET":
            there = list(self.sessions.values())
            shown = [one.view() for one in there[begin:begin + int(asked.get("size", 100))]]
            return 200, {"from": begin, "total": len(there), "sessions": shown}
        if parts == ["sessions"] and method == "POST":
            if body.get("kind", "pyspark") != "pyspark" or body.get("proxyUser"):
                return 501, {"msg": "the stand-in for Livy has sessions of kind pyspark only"}
            with self.lock:
                number, self.started = self.started, self.started + 1
                session = self.sessions[number] = self.make(number)
            return 201, session.view()
        if parts[0] != "sessions" or len(parts) < 2 or not re.fullmatch(r"\d+", parts[1]):
            return 501, {"msg": f"the stand-in for Livy has no {path}"}
        session = self.sessions.get(int(parts[1]))
        if session is None:
            return 404, {"msg": f"Session '{parts[1]}' not found."}
        return self.answer_session(session, method, parts[2:], body, begin, asked)

    def answer_session(self, session, method, parts, body, begin, asked):
        match method, parts:
            case "GET", []:
                return 200, session.view()
            case "DELETE", []:
                self.sessions.pop(session.number)
                session.kill()
                return 200, {"msg": "deleted"}
            case "GET", ["state"]:
                return 200, {"id": session.number, "state": session.state}
            case "GET", ["log"]:
                lines = session.log()[begin:begin + int(asked.get("size", 100))]
                return 200, {"id": session.number, "from": begin, "size": len(lines), "log": lines}
            case "GET", ["statements"]:
                return 200, {"total_statements": len(session.statements), "statements": session.statements}
            case "POST", ["statements"]:
                if body.get("kind", "pyspark") != "pyspark":
                    return 501, {"msg": "the stand-in for Livy runs statements of kind pyspark only"}
                statement = session.submit(body["code"])
                if statement is None:
                    return 400, {"msg": f"requirement failed: Session is in state {session.state}"}
                return 201, statement
            case _, ["statements", number, *rest]:
                if not number.isdigit() or int(number) >= len(session.statements):
                    return 404, {"msg": "Statement not found"}
                statement = session.statements[int(number)]
                if (method, rest) == ("GET", []):
                    return 200, statement
                if (method, rest) == ("POST", ["cancel"]):
                    session.cancel(statement)
                    return 200, {"msg": "canceled"}
        return 501, {"msg": f"the stand-in for Livy has no {method} {'/'.join(parts)}"}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        for session in list(self.sessions.values()):
            session.kill()
