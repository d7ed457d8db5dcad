"""What the command line says of the HTTP server beyond host and port: secrets, names, origins."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tpworker.errors import ConfigError, shown
from tpworker.values import is_server_url

API_KEY_VARIABLE = "TPWORKER_API_KEY"
"""The one environment variable of ours: a key on the command line is shown by `ps` to everyone."""
_MAX_KEY_CHARS = 4096  # well below what a request's headers may have in all

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s?#@*A-Z]+")


def find_api_key(key: str | None, file: str | None, environment: Mapping[str, str]) -> str | None:
    """What clients must send, from --api-key, --api-key-file or the environment; None: nothing.

    Raises:
        ConfigError: there are two, or it is none that clients can send.
    """
    if key is not None and file is not None:
        raise ConfigError("--api-key and --api-key-file are both given: leave out one")
    if key is not None:
        return _checked_key(key, "--api-key")
    if file is not None:
        return _checked_key(_key_in(file), f"--api-key-file {file}")
    variable = environment.get(API_KEY_VARIABLE)
    return None if variable is None else _checked_key(variable, API_KEY_VARIABLE)


def add_key_options(group: Any, what: str) -> None:
    """Adds those of the API key.

    Args:
        group: of the parser.
        what: what the key is, as the begin of a sentence.
    """
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"{what}. `ps` shows it to everyone here: better --api-key-file, or the environment variable "
        f"{API_KEY_VARIABLE}",
    )
    group.add_argument("--api-key-file", metavar="FILE", help="a file with that key, and nothing else")


def _key_in(file: str) -> str:
    try:
        with Path(file).open("rb") as opened:
            data = opened.read(_MAX_KEY_CHARS * 2)  # it may have no end, as /dev/zero
        text = data.decode("utf-8-sig")  # some editors write a mark before it
    except OSError as error:
        raise ConfigError(f"--api-key-file {file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8, or no name that a file can have
        raise ConfigError(f"--api-key-file {file!r} cannot be read as text: {error}") from error
    lines = text.removesuffix("\n").removesuffix("\r").split("\n")
    if len(lines) > 1:
        raise ConfigError(f"--api-key-file {file} has {len(lines)} lines: one is wanted, with the key alone")
    return lines[0]


def _checked_key(key: str, source: str) -> str:
    """The key, if a header can carry it. What is wrong is told without showing it."""
    if not key:
        raise ConfigError(f"{source} must not be empty: leave it out for a server without a key")
    if len(key) > _MAX_KEY_CHARS:
        raise ConfigError(
            f"{source}: the key has {len(key)} characters or more; the limit is {_MAX_KEY_CHARS}"
        )
    if key != key.strip():
        raise ConfigError(f"{source}: the key begins or ends with a space, which headers lose: leave it out")
    for position, char in enumerate(key):
        if ord(char) > 0xFF or not (char.isprintable() or char == "\xad"):
            raise ConfigError(
                f"{source}: character {position + 1} of the key is U+{ord(char):04X}, which no header can "
                "carry: use printable ASCII"
            )
    return key


def checked_name(name: str) -> str:
    """A model's name for clients, if JSON and logs can show it.

    Raises:
        ConfigError: it is empty, or has characters that cannot be seen or are none.
    """
    if not name:
        raise ConfigError("--served-model-name must not be empty: leave it out for the model's own name")
    if name != name.strip():
        raise ConfigError(f"--served-model-name {name!r} begins or ends with a space: leave it out")
    wrong = next((char for char in name if not char.isprintable()), None)
    if wrong is not None:
        raise ConfigError(
            f"--served-model-name {name!a} holds U+{ord(wrong):04X}, which clients cannot name: use "
            "printable characters"
        )
    return name


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Several names, each once. Raises ConfigError as `checked_name`."""
    return tuple(dict.fromkeys(map(checked_name, names)))


def checked_root_path(path: str) -> str:
    """--root-path as routes have it: '' or '/a/b'.

    Raises:
        ConfigError: it is no path, or none that a request's can begin with.
    """
    path = path.rstrip("/")
    if path and not re.fullmatch(r"(/[A-Za-z0-9._~!$&'()*+,;=:@-]+)+", path):
        raise ConfigError(
            f"--root-path {path!r}: it must begin with / and have no empty parts, spaces, escapes or query, "
            "as /llm or /models/small"
        )
    return path


def tls_files(certfile: str | None, keyfile: str | None) -> tuple[str, str | None] | None:
    """--ssl-certfile and --ssl-keyfile, which have been seen to fit; None: no TLS.

    Raises:
        ConfigError: one cannot be read, is of another kind, or they do not belong together.
    """
    if certfile is None:
        if keyfile is not None:
            raise ConfigError("--ssl-keyfile has no effect without --ssl-certfile: give both, or none")
        return None
    import ssl

    def refuse_password() -> str:
        raise ConfigError(
            f"the key in {keyfile or certfile} is encrypted: take off its password, and let the file be read "
            "by this user alone (`openssl pkey -in KEY -out NEW; chmod 600 NEW`)"
        )

    files = [("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)]
    for flag, file in files:
        try:
            if file is not None:
                with Path(file).open("rb") as opened:
                    opened.read(1)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"{flag} {shown(file)} cannot be read: {why}") from error
    given = " and ".join(f"{flag} {file}" for flag, file in files if file is not None)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, refuse_password)
    except ssl.SSLError as error:
        why = (error.reason or str(error)).replace("_", " ").lower()
        raise ConfigError(
            f"{given}: they are no certificate and the key that belongs to it, as PEM ({why}); "
            "`openssl x509 -in CERT -noout -pubkey` and `openssl pkey -in KEY -pubout` must say the same"
        ) from error
    return certfile, keyfile


def parse_origins(words: Sequence[str]) -> tuple[str, ...]:
    """--allowed-origins: a JSON list, or words, as browsers write origins.

    Raises:
        ConfigError: one that no browser sends.
    """
    text = " ".join(words).strip()
    origins: object = text.split()
    if text.startswith(("[", '"')):
        try:
            origins = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"--allowed-origins {text}: it is no JSON list of strings: {error}") from None
        if isinstance(origins, str):
            origins = [origins]
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise ConfigError(f"--allowed-origins {text}: it is no JSON list of strings")
    if not origins:
        raise ConfigError("--allowed-origins has no origin: leave it out, or give one as https://host:port")
    for origin in origins:
        if origin not in ("*", "null") and not _is_origin(origin):
            raise ConfigError(
                f"--allowed-origins {origin!r}: browsers send scheme://host or scheme://host:port, in small "
                "letters and without a path; * alone is any"
            )
    return tuple(origins)


def _is_origin(text: str) -> bool:
    is_web = text.startswith(("http://", "https://"))
    return _ORIGIN.fullmatch(text) is not None and (not is_web or is_server_url(text))


def add_web_options(group: Any) -> None:
    """Adds those of what stands between the server and its clients: browsers, a proxy, TLS.

    Args:
        group: of the parser.
    """
    group.add_argument(
        "--allowed-origins",
        nargs="+",
        metavar="ORIGIN",
        help="web pages that browsers may let use the API, as https://host:port, several, or a JSON list; "
        "*: all (default: none)",
    )
    group.add_argument(
        "--root-path",
        metavar="PATH",
        help="the path under which a proxy shows the server, as /llm, which it may strip or leave on "
        "(default: none)",
    )
    group.add_argument(
        "--ssl-certfile",
        metavar="FILE",
        help="a certificate (PEM), with its chain: the server speaks https (default: http)",
    )
    group.add_argument(
        "--ssl-keyfile",
        metavar="FILE",
        help="the certificate's key (PEM; default: in the certificate's file)",
    )
