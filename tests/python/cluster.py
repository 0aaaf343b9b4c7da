"""A cluster of real processes on 127.0.0.1: `switchyard server` and its workers."""

import re
import signal

import harness

LISTENING = re.compile(r"^switchyard listening http=[\d.]+:(\d+) grpc=[\d.]+:(\d+) control=[\d.]+:(\d+)")
WORKER_READY = re.compile(r"^switchyard worker ready role=(\w+) id=(\d+)")
TOKEN = "a token for tests"


class Cluster:
    """Owns one server and its workers; ends them all with the `with` block."""

    def __init__(
        self,
        model,
        *server_flags,
        name: str,
        attention: int = 1,
        experts: int = 2,
        worker_flags=(),
        server=None,
        failing=None,
    ):
        """`server`: how its process differs (host, netns). `failing`: workers with fail points, and their environment."""
        self.model, self.name = model, name
        self.server_process = server or {}
        self.host = self.server_process.get("host", "127.0.0.1")
        self.worker_flags = ["--threads", 1, "--kv-cache-memory", "256MiB", *worker_flags]
        self.failing = failing
        self.workers: list[harness.Process] = []
        self._number = 0
        self.server_flags = server_flags
        self.server = self._start_server(control_port=0)
        for _ in range(attention):
            self.start("attention")
        for _ in range(experts):
            self.start("expert")

    def _start_server(self, control_port: int) -> harness.Server:
        server = harness.Server(
            self.model,
            *("--control-host", self.host, "--control-port", control_port, *self.server_flags),
            name=f"{self.name}.server",
            subcommand="server",
            wait_ready=False,
            env={"SWITCHYARD_CLUSTER_TOKEN": TOKEN},
            **self.server_process,
        )
        match = server.wait_line(LISTENING)
        server.port, server.grpc_port, self.control_port = (int(group) for group in match.groups())
        return server

    def start(self, role: str, *flags, token: str = TOKEN, model=None, netns=None, fail: str = "") -> harness.Process:
        """`fail`: what `arm` says, from the start."""
        self._number += 1
        env, program = {"SWITCHYARD_CLUSTER_TOKEN": token}, None
        fail_file = harness.LOGS / f"{self.name}.{role}-{self._number}.fail"
        if self.failing is not None:
            fail_file.unlink(missing_ok=True)
            env |= {"SWITCHYARD_FAIL_FILE": str(fail_file), **self.failing}
            program = "failing_worker"
        if fail:
            fail_file.write_text(fail)
        worker = harness.Process(
            *("worker", "--role", role, "--model", model or self.model),
            *("--scheduler", f"{self.host}:{self.control_port}", "--name", f"{role}-{self._number}"),
            *self.worker_flags,
            *flags,
            name=f"{self.name}.{role}-{self._number}",
            env=env,
            netns=netns,
            program=program,
        )
        worker.role, worker.fail_file = role, fail_file
        self.workers.append(worker)
        return worker

    def arm(self, worker: harness.Process, fail: str):
        """The worker ends itself at "PHASE STEPS LAYER ACTION" (tests/fail_points.h), counted from now."""
        whole = worker.fail_file.with_suffix(".new")
        whole.write_text(fail)
        whole.rename(worker.fail_file)

    def restart_server(self):
        """Kills the server and starts another one that listens where it did for workers."""
        self.server.kill()
        self.server = self._start_server(self.control_port)

    def of(self, role: str) -> list[harness.Process]:
        return [worker for worker in self.workers if worker.role == role and worker.running]

    def kill(self, worker: harness.Process):
        worker.process.send_signal(signal.SIGKILL)
        worker.process.wait(harness.PATIENCE_S)

    def view(self) -> dict:
        response = self.server.get("/admin/cluster")
        assert response.status == 200, response.body
        return response.json()

    def serving(self, role: str) -> int:
        return sum(w["role"] == role and w["state"] == "serving" for w in self.view()["workers"])

    def wait_serving(self, attention: int, experts: int, timeout_s: float = harness.PATIENCE_S):
        """Until the cell runs with exactly so many workers."""

        def formed():
            view = self.view()
            return (
                view["phase"] == "running"
                and self.serving("attention") == attention
                and self.serving("expert") == experts
            )

        harness.wait_for(formed, f"{attention} attention and {experts} expert workers to serve", timeout_s)
        return self

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                assert self.server.running, f"the server died; log:\n{self.server.log_tail()}"
                code = self.server.stop()
                assert code == 0, f"exit code {code} after SIGTERM; log:\n{self.server.log_tail()}"
        finally:
            self.server.kill()
            for worker in self.workers:
                worker.kill()
