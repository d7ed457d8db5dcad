"""`tpworker serve` from its start to its end, as a process, around a runtime that is told what to say."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tpworker.cli import serve
from tpworker.config import RuntimeConfig
from tpworker.doctor import doctor
from tpworker.doctor.check import ok
from tpworker.errors import ConfigError
from tpworker.ipc.limits import usable_cores
from tpworker.server import bind

ROOT = Path(__file__).parents[2]
WAIT_S = 60
#: A program that becomes another one, whose soft and hard limits of descriptors are given before it.
LIMITED = (
    "import os, resource, sys; "
    "resource.setrlimit(resource.RLIMIT_NOFILE, tuple(map(int, sys.argv[1:3]))); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


class Process:
    """A `tpworker` process; what it writes to stderr is kept."""

    def __init__(
        self,
        *arguments: str,
        limits: tuple[int, int] | None = None,
        environment: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        limited = [] if limits is None else [sys.executable, "-c", LIMITED, *map(str, limits)]
        self.popen = subprocess.Popen(
            [*limited, sys.executable, "-m", "tests.server.fake_cli", *arguments],
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            **options,
        )
        self.errors = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            with self._changed:
                self.errors += line
                self._changed.notify_all()

    def wait_for(self, words: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: words in self.errors, WAIT_S), self.errors

    def url(self) -> str:
        self.wait_for("Ctrl-C")
        found = re.search(r"http://127\.0\.0\.1:\d+", self.errors)
        assert found is not None
        return found[0]

    def end(self) -> tuple[int, str]:
        """Its status and what it wrote to stdout."""
        out, _ = self._communicate()
        return self.popen.returncode, out

    def _communicate(self) -> tuple[str, None]:
        assert self.popen.stdout is not None
        out = self.popen.stdout.read()
        self.popen.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return out, None


Run = Callable[..., Process]


@pytest.fixture
def run() -> Iterator[Run]:
    processes: list[Process] = []

    def runner(*arguments: str, **options: Any) -> Process:
        processes.append(Process("serve", *arguments, **options))
        return processes[-1]

    yield runner
    for process in processes:
        process.popen.kill()
        process.end()


def stream_of(url: str) -> Any:
    return httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "a", "stream": True}, timeout=WAIT_S)


# ------------------------------------------------------------------------------- the start


def test_it_says_how_to_try_it_and_that_works(run: Run) -> None:
    process = run("--port", "0", "--api-key", "the key")
    process.wait_for("Ctrl-C")
    assert "tpworker: loading the fake" in process.errors
    assert "tpworker is ready: fake-model on 2 TP ranks" in process.errors
    assert "the key" not in process.errors
    command = re.search(r"  (curl .*\\\n.*)\n", process.errors)
    assert command is not None
    if shutil.which("curl") is None:
        pytest.skip("there is no curl here to try it with")
    done = subprocess.run(
        ["bash", "-c", f"{command[1]} -s"],
        env={"API_KEY": "the key", "PATH": "/usr/bin:/bin"},
        capture_output=True,
    )
    assert "capital of France" in json.loads(done.stdout)["choices"][0]["message"]["content"]


def test_a_model_that_cannot_chat_is_tried_with_a_completion(run: Run) -> None:
    process = run("--port", "0", "--model", "plain")
    process.url()
    assert "/v1/completions" in process.errors


def test_a_port_in_use_is_found_before_anything_is_loaded(run: Run) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        process = run("--port", str(port))
        assert process.end()[0] == 2
    assert f"--port {port} is in use" in process.errors
    assert "choose another" in process.errors
    assert "loading" not in process.errors


@pytest.mark.parametrize(
    ("host", "words"), [("203.0.113.1", "no address of this"), ("no.such.host.invalid", "no addr")]
)
def test_hosts_that_are_not_here(host: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        bind(host, 0)


def test_two_servers_cannot_have_one_port() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize(
    ("model", "status", "words"),
    [
        ("bad-config", 2, "tpworker: error: tensor_parallel_size=64"),
        ("bad-model", 2, "tpworker: error: config.json names"),
        ("bad-start", 1, "tpworker: tpworker-rank1 raised OSError\nTraceback: its lines"),
    ],
)
def test_a_start_that_fails(run: Run, model: str, status: int, words: str) -> None:
    process = run("--port", "0", "--model", model)
    assert process.end()[0] == status
    assert words in process.errors
    assert "most recent call last" not in process.errors
    assert "the runtime was stopped" in process.errors


def test_it_answers_while_it_starts_and_can_be_ended_then(run: Run) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    process = run("--port", str(port), "--model", "slow-start")
    process.wait_for("loading the fake")
    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/health", timeout=WAIT_S).json() == {"status": "starting"}
    assert httpx.get(f"{url}/ready", timeout=WAIT_S).status_code == 503
    assert httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=WAIT_S).status_code == 503
    process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == 0
    assert "the runtime was stopped" in process.errors


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['fastapi'] = None\nfrom tpworker.cli import main; sys.exit(main(['serve']))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "pip install 'tpworker[server]'" in done.stderr
    assert done.stderr.count("\n") == 1


def _cores_here() -> str:
    return f"tpworker: warning: cores: {usable_cores()} for 64 ranks"


@pytest.mark.skipif(usable_cores() >= 64, reason="so many ranks would be right here")
def test_it_says_what_the_doctor_warns_of(run: Run) -> None:
    process = run("--port", "0", "-tp", "64", "--device", "cpu")
    process.wait_for(_cores_here())
    process.url()
    process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == 0
    said = [line for line in process.errors.splitlines() if "warning" in line]
    assert len([line for line in said if line.startswith(_cores_here())]) == 1, "once"
    assert all(line.startswith("tpworker: warning: ") for line in said)


def test_it_says_nothing_of_what_is_as_it_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    config = RuntimeConfig(device="cpu", model="no/such/model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "examine", lambda *unused, **options: {"checks": [ok("cores", "2 for 1 rank")]})
        serve._warn(config)
        assert capsys.readouterr().err == ""
        patch.setattr(doctor, "examine", lambda *unused, **options: {}["checks"])
        serve._warn(config)  # the doctor is ill: the start goes on
        assert capsys.readouterr().err == ""
    subjects = {check.subject for check in doctor.examine(config, is_starting=True)["checks"]}
    assert "cores" in subjects
    assert not subjects & {"model", "weights", "tokenizer", "memory"}, "the start looks at these itself"


# ------------------------------------------------------------------- clients of all kinds


def test_more_idle_connections_than_descriptors(run: Run) -> None:
    process = run("--port", "0", limits=(320, 320))
    url = process.url()
    address = "127.0.0.1", int(url.rpartition(":")[2])
    with ExitStack() as opened, httpx.Client(base_url=url, timeout=WAIT_S) as client:
        for _ in range(500):
            opened.enter_context(socket.create_connection(address))
        for _ in range(3):
            assert client.get("/health").json() == {"status": "ready"}
            assert httpx.get(f"{url}/health", timeout=WAIT_S).json() == {"status": "ready"}
            assert client.post("/v1/completions", json={"prompt": "a"}).status_code == 200
        assert "Too many open files" not in process.errors
        assert "Traceback" not in process.errors


def test_the_limit_of_descriptors_is_raised(run: Run) -> None:
    process = run("--port", "0", "--max-queue", "100", limits=(300, 2000))
    process.url()
    limits = Path(f"/proc/{process.popen.pid}/limits").read_text()
    assert re.search(r"Max open files\s+2000\s+2000", limits)
    process = run("--port", "0", "--max-queue", "100", "--max-num-seqs", "4", limits=(300, 20_000))
    process.url()
    limits = Path(f"/proc/{process.popen.pid}/limits").read_text()
    assert re.search(rf"Max open files\s+{4096 + 100 + 4 + 256 + 8}\s+20000", limits)


def test_too_few_descriptors_are_refused_at_once(run: Run) -> None:
    process = run("--port", "0", limits=(64, 99))
    assert process.end()[0] == 2
    assert (
        "99 files may be open (the hard limit of `ulimit -n`), and a server needs at least" in process.errors
    )
    process = run("--port", "0", limits=(64, 120))
    assert httpx.get(f"{process.url()}/health", timeout=WAIT_S).json() == {"status": "ready"}


def test_what_is_no_http_does_not_fill_the_log(run: Run) -> None:
    process = run("--port", "0")
    address = "127.0.0.1", int(process.url().rpartition(":")[2])
    for _ in range(30):
        with socket.create_connection(address) as client:
            client.sendall(b"no HTTP\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400 ")
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0
    assert process.errors.count("Invalid HTTP request") == 1


@pytest.mark.parametrize("way", ["variable", "file", "both"])
def test_the_key_from_where_ps_does_not_show_it(run: Run, tmp_path: Path, way: str) -> None:
    file = tmp_path / "key"
    file.write_text("the key\n")
    options = [] if way == "variable" else ["--api-key-file", str(file)]
    variable = {"file": {}, "variable": {"TPWORKER_API_KEY": "the key"}, "both": {"TPWORKER_API_KEY": "no"}}
    url = run("--port", "0", *options, environment=variable[way]).url()
    for key, status in (("the key", 200), ("no", 401)):
        headers = {"Authorization": f"Bearer {key}"}
        assert httpx.get(f"{url}/v1/models", headers=headers, timeout=WAIT_S).status_code == status


# --------------------------------------------------------------------------------- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_who_started_it_has_blocked_end_it(run: Run, number: signal.Signals) -> None:
    blocked = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    process = run("--port", "0", preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, blocked))
    process.url()
    process.popen.send_signal(number)
    assert process.end()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_with_status_0_and_the_log_says_which(run: Run, number: signal.Signals) -> None:
    process = run("--port", "0")
    process.url()
    process.popen.send_signal(number)
    assert process.end()[0] == 0
    assert f"WARNING {number.name}: no more requests are taken\n" in process.errors
    assert "the runtime was stopped" in process.errors
    assert "Traceback" not in process.errors


def test_open_requests_are_ended_and_no_new_ones_taken(run: Run) -> None:
    process = run("--port", "0", "--model", "lazy")
    url = process.url()
    with stream_of(url) as response:
        parts = response.iter_text()
        text = next(parts)
        process.popen.send_signal(signal.SIGTERM)
        text += "".join(parts)
    assert text.endswith("data: [DONE]\n\n")
    assert '"finish_reason": "stop"' in text
    assert process.end()[0] == 0
    assert (
        "SIGTERM: no more requests are taken; 1 request is open, which may take 20 s more" in process.errors
    )
    assert " cut " not in process.errors
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_while_it_drains_all_are_told_to_go_elsewhere(run: Run) -> None:
    """Those with a connection and those with a new one; what is open goes on."""
    process = run("--port", "0", "--model", "held")
    url = process.url()
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=WAIT_S))

    with httpx.Client(base_url=url, timeout=WAIT_S) as connected:
        assert connected.get("/ready").headers.get("connection") is None
        asking = threading.Thread(target=ask)
        asking.start()
        process.wait_for("it holds on")
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("1 request is open")
        refusals = [connected.post("/v1/completions", json={"prompt": "a"})]
        for _ in range(2):
            refusals.append(httpx.post(f"{url}/v1/completions", json={"prompt": "a"}, timeout=WAIT_S))
            refusals.append(httpx.get(f"{url}/ready", timeout=WAIT_S))
            time.sleep(1.1)  # uvicorn makes its headers anew every second
        health = connected.get("/health")
        process.popen.send_signal(signal.SIGUSR1)
        asking.join(WAIT_S)
    for refusal in refusals:
        assert (refusal.status_code, refusal.headers["retry-after"]) == (503, "5")
        assert "draining" in refusal.text
    assert (health.status_code, health.json()) == (200, {"status": "draining"})
    (answer,) = answers
    assert answer.json()["choices"][0]["text"] == "You said 'a'."
    for told in (answer, health, *refusals):
        assert told.headers["connection"] == "close"
    assert process.end()[0] == 0


def test_a_stream_that_ends_in_the_drain_is_its_connections_last(run: Run) -> None:
    process = run("--port", "0", "--model", "held")
    address = "127.0.0.1", int(process.url().rpartition(":")[2])
    body = b'{"prompt": "a", "stream": true}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: "
    with socket.create_connection(address, timeout=WAIT_S) as client, stream_of(process.url()) as other:
        client.sendall(head + str(len(body)).encode() + b"\r\n\r\n" + body)
        begun = client.recv(1 << 16)
        process.wait_for("it holds on\nit holds on")  # the other one goes on behind this one's end
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("2 requests are open")
        process.popen.send_signal(signal.SIGUSR1)
        rest = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert (begun + rest).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        other.close()
        assert process.popen.wait(WAIT_S) == 0


@pytest.mark.parametrize("stuck", [False, True], ids=["", "processes-too"])
def test_the_second_signal_ends_them_at_once(run: Run, stuck: bool) -> None:
    process = run("--port", "0", "--model", "endless-clinging" if stuck else "endless")
    url = process.url()
    with stream_of(url) as response:
        parts = response.iter_text()
        text = next(parts)
        process.popen.send_signal(signal.SIGTERM)
        process.wait_for("1 request is open")
        process.popen.send_signal(signal.SIGTERM)
        text += "".join(parts)
    error = json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]
    assert (error["code"], "shutting down" in error["message"]) == ("unavailable", True)
    assert process.end()[0] == 0
    assert "1 request is cut at once, at one more signal (SIGTERM)" in process.errors
    assert ("did not end at once, and have been killed" in process.errors) == stuck


def test_one_more_signal_is_quick_also_when_nothing_is_open(run: Run) -> None:
    process = run("--port", "0", "--model", "clinging")
    process.url()
    process.popen.send_signal(signal.SIGTERM)
    process.wait_for("SIGTERM: no more requests are taken\n")
    process.popen.send_signal(signal.SIGINT)
    assert process.end()[0] == 0
    assert "did not end at once, and have been killed" in process.errors


def test_what_is_cut_at_the_deadline_is_told_to_clients_and_in_the_log(run: Run) -> None:
    process = run("--port", "0", "--model", "hasty", "--shutdown-timeout", "0.5")
    url = process.url()
    with stream_of(url) as first, stream_of(url) as second:
        texts = [response.iter_text() for response in (first, second)]
        begun = [next(text) for text in texts]
        process.popen.send_signal(signal.SIGTERM)
        for start, text in zip(begun, texts, strict=True):
            last = (start + "".join(text)).split("\n\n")[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert process.end()[0] == 0
    assert "2 requests are open, which may take 0.5 s more" in process.errors
    assert "2 requests are cut at the deadline, 0.5 s after SIGTERM" in process.errors


def test_a_terminal_that_is_closed_lets_open_requests_end(run: Run) -> None:
    """It sends SIGHUP, more than once; that is no hurry."""
    process = run("--port", "0", "--model", "lazy")
    with stream_of(process.url()) as response:
        parts = response.iter_text()
        text = next(parts)
        for _ in range(3):
            process.popen.send_signal(signal.SIGHUP)
            process.wait_for("SIGHUP: no more requests are taken; 1 request is open")
        text += "".join(parts)
    assert '"finish_reason": "stop"' in text
    assert process.end()[0] == 0
    assert " cut " not in process.errors


def test_nohup_is_respected(run: Run) -> None:
    process = run("--port", "0", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    url = process.url()
    process.popen.send_signal(signal.SIGHUP)
    for _ in range(3):
        assert httpx.get(f"{url}/health", timeout=WAIT_S).json() == {"status": "ready"}
    process.popen.send_signal(signal.SIGTERM)
    assert process.end()[0] == 0
    assert "SIGHUP" not in process.errors


# ------------------------------------------------------------------------- what its log goes to


@pytest.mark.parametrize("kind", ["closed", "all closed", "full", "reader gone", "reader stalled"])
def test_it_serves_whatever_becomes_of_its_stderr(kind: str) -> None:
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    receiver, sender = os.pipe()
    closed = {"closed": (2,), "all closed": (0, 1, 2)}.get(kind, ())
    if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), sender)
    elif kind == "reader gone":
        os.close(receiver)
        receiver = os.open(os.devnull, os.O_RDONLY)
    elif kind == "reader stalled":
        os.write(sender, bytes(fcntl.fcntl(sender, fcntl.F_SETPIPE_SZ, 4096)))
    popen = subprocess.Popen(
        [sys.executable, "-m", "tests.server.fake_cli", "serve", "--port", str(port)],
        stderr=sender, cwd=ROOT, preexec_fn=lambda: [os.close(fd) for fd in closed],
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + WAIT_S
        while True:
            with suppress(httpx.TransportError):
                if httpx.get(f"{url}/ready", timeout=WAIT_S).status_code == 200:
                    break
            assert popen.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with stream_of(url) as response:
            assert response.read().decode().endswith("data: [DONE]\n\n")
        popen.send_signal(signal.SIGTERM)
        assert popen.wait(WAIT_S) == 0
    finally:
        popen.kill()
        popen.wait()
        os.close(sender)
        os.close(receiver)


def test_a_failure_is_told_to_clients_and_to_the_shell(run: Run) -> None:
    process = run("--port", "0", "--model", "mortal")
    with stream_of(process.url()) as response:
        text = response.read().decode()
    error = json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]
    assert error["message"] == "tpworker-rank1 was killed by SIGKILL"
    assert process.end()[0] == 1
    *before, last, _ = process.errors.splitlines()  # behind it, the test's own
    assert last == "tpworker: tpworker-rank1 was killed by SIGKILL", "why, at the end of the log"
    assert "the runtime was stopped" in before


# ----------------------------------------------------------------------------------- --ask


def test_ask_answers_on_stdout_without_a_server(run: Run) -> None:
    process = run("--ask", "Who?")
    status, out = process.end()
    assert (status, out) == (0, "You said '[user]Who?[assistant]'.\n")
    assert "server packages: []" in process.errors
    assert "the runtime was stopped" in process.errors


def test_ask_continues_where_there_is_no_chat_template(run: Run) -> None:
    assert run("--ask", "Who?", "--model", "plain").end() == (0, "You said 'Who?'.\n")


def test_ask_fails_as_serving_does(run: Run) -> None:
    process = run("--ask", "Who?", "--model", "mortal")
    assert process.end()[0] == 1
    assert "tpworker-rank1 was killed" in process.errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_ask_can_be_interrupted(run: Run, number: signal.Signals) -> None:
    process = run("--ask", "Who?", "--model", "endless")
    assert process.popen.stdout is not None
    assert process.popen.stdout.read(3) == "You"
    process.popen.send_signal(number)
    assert process.end()[0] == 128 + number, "there is no answer"
    assert "Traceback" not in process.errors
    assert "the runtime was stopped" in process.errors
