"""Where snapshots come from: the status board of a process on this machine, or a server's /top."""

from __future__ import annotations

import contextlib
import http.client
import json
import ssl
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterable

from tpworker.errors import ConfigError, printable
from tpworker.ipc.board import About
from tpworker.observe.attach import Attached, NoBoard, attach
from tpworker.observe.looking import known_gpus, look, model_name, read_gpus, with_usage
from tpworker.observe.nvml import Gpu, Nvml, NvmlUnavailable
from tpworker.observe.processes import started
from tpworker.observe.snapshot import Snapshot, from_json
from tpworker.top.text import duration
from tpworker.values import server_url

ANSWER_SECONDS = 5.0
"""How long a server may take to answer."""
_MAX_BYTES = 8 << 20


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Who is sent elsewhere would show the key there."""

    def redirect_request(self, *unused: object) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


class Absent(Exception):
    """There is nothing to look at just now; there may be again."""


class Ended(Exception):
    """There will be nothing any more."""


class Source(ABC):
    """Gives snapshots, one after the other; from one thread."""

    name: str
    """What it is, for people."""

    @abstractmethod
    def read(self) -> Snapshot:
        """What is so now.

        Raises:
            Absent, Ended: it cannot be told.
            ConfigError: it never could, for a reason that the user can mend.
        """

    def close(self) -> None:  # noqa: B027  # most have nothing to close
        """It is not needed any more."""


class BoardSource(Source):
    """A process on this machine. Follows it from one generation to the next.

    Raises:
        NoBoard: see `attach`.
    """

    def __init__(self, pid: int) -> None:
        self._attached: Attached | None = attach(pid)
        self.pid = self._attached.pid
        """Of the runtime's process."""
        self.name = f"process {self.pid}"
        if self._attached.num_others:
            self.name += f" (the newest of {1 + self._attached.num_others} runtimes in it)"
        self._started = started(self.pid)
        self._nvml: Nvml | None = None
        self._gpus: dict[int, Gpu] = {}
        if uuids := self._attached.board.about.gpus:
            with contextlib.suppress(NvmlUnavailable):
                self._nvml = Nvml.connect()
                self._gpus = known_gpus(self._nvml, uuids)

    def read(self) -> Snapshot:
        if self._started is None or started(self.pid) != self._started:
            raise Ended(f"process {self.pid} has ended")
        if self._attached is not None and self._attached.board.is_over:
            self._attached.close()
            self._attached = None
        if self._attached is None:
            try:
                self._attached = attach(self.pid)
            except NoBoard:
                raise Absent("it has no processes at this moment: it recovers, sleeps or ends") from None
        gpus = {} if self._nvml is None else read_gpus(self._nvml, self._gpus)
        return with_usage(look(self._attached.board), gpus, self.pid)

    def close(self) -> None:
        if self._attached is not None:
            self._attached.close()
        if self._nvml is not None:
            self._nvml.close()


class UrlSource(Source):
    """A server, here or elsewhere.

    Args:
        url: of the server, with or without a path such as /v1.
        api_key: what it wants; None: nothing.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.name = url
        self._url = top_url(url)
        self._headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}

    def read(self) -> Snapshot:
        request = urllib.request.Request(self._url, headers=self._headers)
        try:
            with _opener.open(request, timeout=ANSWER_SECONDS) as answer:
                data = answer.read(_MAX_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code) from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ConfigError(
                    f"{self._url}: its certificate is not trusted ({reason.verify_message}): name the file "
                    "of its authority in SSL_CERT_FILE"
                ) from None
            told = getattr(reason, "strerror", None) or reason or type(error).__name__
            raise Absent(f"{self.name} does not answer: {told}") from None
        try:
            return from_json(json.loads(data))
        except ValueError:
            raise ConfigError(f"{self._url} answers as no tpworker does: is it another server?") from None

    def _refused(self, status: int) -> Exception:
        if status in (401, 403):
            return ConfigError(
                f"{self._url} wants its API key (status {status}): --api-key-file, or TPWORKER_API_KEY"
            )
        if status in (404, 405) or 300 <= status < 400:
            return ConfigError(
                f"{self._url} is not there (status {status}): the server is no tpworker, or an older one, or "
                "has another path before it"
            )
        return Absent(f"{self.name} answers with status {status}")


def top_url(url: str) -> str:
    """Where a server's /top is, from any of the ways in which people name a server."""
    found = server_url(url)
    return f"{found.scheme}://{found.authority}{found.path.removesuffix('/top')}/top"


def told(choices: Iterable[tuple[int, About]], now_ns: int) -> list[str]:
    """A line for each runtime that one might look at, to choose from."""
    lines = []
    for number, (pid, about) in enumerate(choices, 1):
        device = f"{len(about.gpus)} GPUs" if len(about.gpus) > 1 else about.device
        age = duration((now_ns - about.created_ns) / 1e9)
        lines.append(f"{number:3}  pid {pid:<8} {printable(model_name(about.model))}, {device}, since {age}")
    return lines
