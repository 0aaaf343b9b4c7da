"""Fixtures shared by the Python tests, and the rules: no skips, logs with every failure."""

import harness
import openai
import pytest

SERVERS = pytest.StashKey()
FIRST_SERVER = pytest.StashKey()


@pytest.fixture(scope="session")
def start_server(request):
    """start_server(model, *flags, name=…) → a ready Server that is ended with the session."""
    servers = []
    request.config.stash[SERVERS] = servers
    file = request.session.items[0].path.stem

    def start(model, *args, name: str, **kwargs) -> harness.Server:
        # By default a server takes up to half of the memory for its KV cache: too much for a test.
        if "--kv-cache-memory" not in args:
            args += ("--kv-cache-memory", "512MiB")
        server = harness.Server(model, *args, name=f"{file}.{name}", **kwargs)
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def tiny(start_server):
    """A random Qwen3-MoE (context 512, vocabulary 310) served as `tiny`, by one attention and two expert workers."""
    server = start_server(harness.FIXTURES / "qwen3_moe", "--served-model-name", "tiny", name="tiny")
    yield server
    assert server.running, f"the server died; log:\n{server.log_tail()}"
    code = server.stop()
    assert code == 0, f"exit code {code} after SIGTERM; log:\n{server.log_tail()}"


@pytest.fixture
def client(tiny) -> openai.OpenAI:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="unused", max_retries=0, timeout=harness.PATIENCE_S) as c:
        yield c


@pytest.fixture(scope="session")
def long_model(tmp_path_factory):
    """A checkpoint made by `switchyard synth` whose context takes minutes to fill: for cancellation and draining."""
    folder = tmp_path_factory.mktemp("long")
    config = folder / "config.json"
    source = (harness.FIXTURES / "qwen3_moe" / "config.json").read_text()
    config.write_text(
        source.replace('"max_position_embeddings": 512', '"max_position_embeddings": 65536')
        .replace('"vocab_size": 310', '"vocab_size": 512')
        .replace('"num_hidden_layers": 3', '"num_hidden_layers": 12')
    )
    out = folder / "model"
    made = harness.run_cli("synth", "--config", config, "--out", out, "--seed", 7)
    assert made.returncode == 0, made.stderr
    return out


def pytest_runtest_setup(item):
    item.stash[FIRST_SERVER] = len(item.config.stash.get(SERVERS, []))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Adds the logs of the test's own servers and of those that still run."""
    report = yield
    if report.failed:
        for number, server in enumerate(item.config.stash.get(SERVERS, [])):
            if server.running or number >= item.stash[FIRST_SERVER]:
                report.sections.append((f"log of {server.log_path}", server.log_tail()))
    return report


def pytest_sessionfinish(session, exitstatus):
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = [report.nodeid for kind in ("skipped", "xfailed") for report in reporter.stats.get(kind, [])]
    if skipped:
        reporter.write_line(f"FAILED: these tests did not run: {', '.join(skipped)}", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
