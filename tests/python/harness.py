"""Starts the real binary and talks to it. Standard library only.

A Server owns one process: started with port 0, known by its ready line on stdout, ended by its id.
Its logs stay in build/test-logs/. Nothing here sleeps for a condition: it waits for it with a
deadline.
"""

import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FIXTURES = REPO / "tests" / "fixtures"
DEMO = REPO / "models" / "demo"
LOGS = REPO / "build" / "test-logs"
# Sanitizer builds are slower; ctest has its own limit beyond these.
PATIENCE_S = 120.0
READY = re.compile(r"^switchyard ready http=[\d.]+:(\d+) grpc=[\d.]+:(\d+)(?: |$)")


def binary() -> str:
    return os.environ["SWITCHYARD_BIN"]


def wait_for(condition, what: str, timeout_s: float = PATIENCE_S):
    """Returns condition()'s first true value; fails after timeout_s with what was waited for."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout_s:g} s in vain: {what}"
        time.sleep(0.01)


def run_cli(*args, timeout_s: float = 120.0, **kwargs) -> subprocess.CompletedProcess:
    """One subcommand to its end, with captured text output."""
    return subprocess.run(
        [binary(), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )


@dataclass
class Response:
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes

    def json(self):
        return json.loads(self.body)

    def error(self) -> dict:
        """The error object, after checking its shape (API: every error has these four fields)."""
        assert self.headers["content-type"].split(";")[0] == "application/json", self.headers
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert isinstance(error["message"], str) and error["message"], error
        assert isinstance(error["type"], str), error
        for field in ("param", "code"):
            assert error[field] is None or isinstance(error[field], (str, int)), error
        return error


class Process:
    """One switchyard process: known by lines on its stdout, ended by its id; its log is kept."""

    def __init__(self, *args, name: str, env: dict | None = None, netns: str | None = None, program: str | None = None):
        """`program`: another one beside the binary."""
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log_path = LOGS / f"{name}.log"
        self.command = ["ip", "netns", "exec", netns] if netns else []
        self.command += [str(Path(binary()).with_name(program)) if program else binary(), *map(str, args)]
        self._stdout: queue.Queue = queue.Queue()
        with open(self.log_path, "wb") as log:
            log.write((" ".join(self.command) + "\n").encode())
            log.flush()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **(env or {})},
            )
        self._reader = threading.Thread(target=self._read_stdout, daemon=True)
        self._reader.start()

    def _read_stdout(self):
        for line in self.process.stdout:
            self._stdout.put(line.rstrip("\n"))
        self._stdout.put(None)

    def wait_line(self, pattern: re.Pattern, timeout_s: float = PATIENCE_S) -> re.Match:
        """The match of the next line of stdout that begins as `pattern` says."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                line = self._stdout.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise AssertionError(
                    f"no line like {pattern.pattern} in {timeout_s:g} s; log:\n{self.log_tail()}"
                ) from None
            if line is None:
                code = self.process.wait(PATIENCE_S)
                raise AssertionError(
                    f"exit code {code} before a line like {pattern.pattern}; log:\n{self.log_tail()}"
                )
            if match := pattern.match(line):
                return match

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(self.log().splitlines()[-lines:])

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    def signal(self, number: int = signal.SIGTERM):
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = PATIENCE_S) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout_s:g} s; log:\n{self.log_tail()}") from None

    def kill(self):
        if self.running:
            self.process.kill()
        self.process.wait(PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM, then the exit code."""
        if self.running:
            self.signal(signal.SIGTERM)
        return self.wait_exit()

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is not None:
            self.kill()
            return
        code = self.stop()
        assert code == 0, f"exit code {code} after SIGTERM; log:\n{self.log_tail()}"


class Server(Process):
    """`switchyard serve` (or another subcommand with its front end) on free ports of 127.0.0.1."""

    def __init__(
        self,
        model,
        *args,
        name: str = "server",
        wait_ready: bool = True,
        subcommand: str = "serve",
        host: str = "127.0.0.1",
        **process,
    ):
        self.port = self.grpc_port = None
        self.host = host
        super().__init__(
            *(subcommand, "--model", model, "--host", host, "--port", 0, "--grpc-port", 0),
            *args,
            name=name,
            **process,
        )
        if wait_ready:
            self.wait_ready()

    def wait_ready(self, timeout_s: float = PATIENCE_S):
        match = self.wait_line(READY, timeout_s)
        self.port, self.grpc_port = int(match[1]), int(match[2])

    # HTTP

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def connect(self, timeout_s: float = PATIENCE_S) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)

    def request(self, method: str, path: str, body=None, headers: dict | None = None) -> Response:
        """`body`: bytes as they are, anything else as JSON."""
        headers = dict(headers or {})
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        if body is not None and not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"
        connection = self.connect()
        try:
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            lower = {name.lower(): value for name, value in answer.getheaders()}
            return Response(answer.status, lower, answer.read())
        finally:
            connection.close()

    def get(self, path: str, **kwargs) -> Response:
        return self.request("GET", path, **kwargs)

    def post(self, path: str, body, **kwargs) -> Response:
        return self.request("POST", path, body=body, **kwargs)

    def open_stream(self, path: str, body: dict, headers: dict | None = None) -> "EventStream":
        connection = self.connect()
        connection.request(
            "POST", path, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        )
        return EventStream(connection, connection.getresponse())

    def raw(self, data: bytes, timeout_s: float = PATIENCE_S) -> bytes:
        """Sends bytes and returns everything that comes back until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as peer:
            received = b""
            try:
                peer.sendall(data)
                while piece := peer.recv(65536):
                    received += piece
            except (ConnectionResetError, BrokenPipeError):
                pass  # a refused request may be reset; what came before counts
            return received

    def metrics(self) -> "Metrics":
        response = self.get("/metrics")
        assert response.status == 200
        return Metrics(response.body.decode())

    def wait_idle(self):
        def idle():
            metrics = self.metrics()
            return metrics.value("switchyard_requests_running") == 0 == metrics.value("switchyard_requests_waiting")

        wait_for(idle, "requests_running and requests_waiting to be 0")


class EventStream:
    """Server-sent events of one response; iterating gives the data fields as text."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse):
        self.connection, self.response = connection, response
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.comments = 0

    def __iter__(self):
        while line := self.response.readline():
            line = line.decode("utf-8")  # an event never splits a character
            if line.startswith(":"):
                self.comments += 1
            elif line.startswith("data: "):
                assert self.response.readline() in (b"\n", b"\r\n"), "an event ends with an empty line"
                yield line[len("data: ") :].rstrip("\r\n")
            else:
                assert line.strip() == "", f"unexpected line in an event stream: {line!r}"

    def chunks(self):
        """Decoded events up to [DONE], which must be the last one."""
        done = False
        for data in self:
            assert not done, f"an event after [DONE]: {data}"
            if data == "[DONE]":
                done = True
            else:
                yield json.loads(data)
        assert done, "the stream ended without [DONE]"

    def close(self):
        """Breaks the connection, as a client that goes away does."""
        self.response.close()
        self.connection.close()


SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One scrape in Prometheus' text format."""

    def __init__(self, text: str):
        self.types: dict[str, str] = {}  # family → counter, gauge, histogram
        self.helps: dict[str, str] = {}
        self.samples: dict[tuple[str, frozenset], float] = {}
        for line in text.splitlines():
            if line.startswith("# TYPE "):
                _, _, family, kind = line.split(" ", 3)
                assert family not in self.types, f"family {family} twice"
                self.types[family] = kind
            elif line.startswith("# HELP "):
                _, _, family, *text_of = line.split(" ", 3)
                self.helps[family] = text_of[0] if text_of else ""
            elif line and not line.startswith("#"):
                match = SAMPLE.match(line)
                assert match, f"not a sample: {line!r}"
                labels = frozenset(LABEL.findall(match[2] or ""))
                assert (match[1], labels) not in self.samples, f"sample twice: {line}"
                self.samples[match[1], labels] = float(match[3])

    def value(self, name: str, **labels) -> float:
        """Sum over the samples of that name with at least these labels; 0 if there is none yet."""
        wanted = set(labels.items())
        return sum(value for (sample, has), value in self.samples.items() if sample == name and wanted <= has)

    def labels(self, name: str) -> list[dict]:
        return [dict(has) for (sample, has) in self.samples if sample == name]

    def family_total(self, family: str) -> float:
        """How far a family has moved: a histogram's count, else the sum of absolute samples."""
        if self.types[family] == "histogram":
            return self.value(family + "_count")
        return sum(abs(value) for (sample, _), value in self.samples.items() if sample == family)


def golden(name: str) -> dict:
    """tests/fixtures/<name>/golden.json."""
    return json.loads((FIXTURES / name / "golden.json").read_text())
