"""Postgres with several hosts, and behind a pooler."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from pydantic import SecretStr
from sqlalchemy import make_url, text

from farm.config import Settings
from farm.errors import FarmError, Unavailable
from farm.local.ports import free_port
from farm.services.doctor import _postgres
from farm.store.engine import Store, open_store, require_sessions, server_place

KNOWN = {"user", "database", "application_name", "client_encoding"}
"""Parameters of a startup message that PgBouncer accepts."""


def opened(settings: Settings, url: str) -> Store:
    return open_store(settings.model_copy(update={"database_url": SecretStr(url)}))


def refusal(code: str, message: str) -> bytes:
    """Return an ErrorResponse of Postgres's protocol."""
    fields = b"".join(
        kind + value.encode() + b"\0"
        for kind, value in ((b"S", "FATAL"), (b"V", "FATAL"), (b"C", code), (b"M", message))
    )
    return b"E" + struct.pack(">I", len(fields) + 5) + fields + b"\0"


@contextmanager
def pooler(host: str, port: int) -> Iterator[int]:
    """Run a proxy before Postgres. Like PgBouncer, it refuses unknown startup parameters."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while block := source.recv(65536):
                sink.sendall(block)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def answer(client: socket.socket) -> None:
        with client, suppress(OSError):
            while True:
                [size] = struct.unpack(">I", client.recv(4, socket.MSG_WAITALL))
                message = client.recv(size - 4, socket.MSG_WAITALL)
                if struct.unpack_from(">I", message)[0] >> 16 == 3:
                    break
                client.sendall(b"N")  # no TLS and no GSS
            words = message[4:].rstrip(b"\0").split(b"\0")
            unknown = {name.decode() for name in words[::2]} - KNOWN
            if unknown:
                client.sendall(refusal("08P01", f"unsupported startup parameter: {min(unknown)}"))
                return
            with socket.create_connection((host, port)) as server:
                server.sendall(struct.pack(">I", size) + message)
                back = threading.Thread(target=pump, args=(server, client))
                back.start()
                pump(client, server)
                back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listening.accept()
                threading.Thread(target=answer, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def test_the_first_host_that_answers_is_taken(settings: Settings) -> None:
    url = make_url(settings.database_url.get_secret_value())
    nowhere = free_port()
    several = (
        f"postgresql://{url.username}:{url.password}@127.0.0.1:{nowhere},{url.host}:{url.port}"
        f"/{url.database}?target_session_attrs=read-write"
    )
    words = (
        f"host=127.0.0.1,{url.host} port={nowhere},{url.port} user={url.username} "
        f"password={url.password} dbname={url.database}"
    )
    for address in (several, words, f"postgres{several.removeprefix('postgresql')}"):
        store = opened(settings, address)
        assert server_place(store) == f"{url.host}:{url.port}"
        store.dispose()


@pytest.mark.parametrize("url", ["postgresql://h:port/farm", "nonsense", "mysql://h/farm"])
def test_an_address_that_is_none_is_told_as_a_setting(settings: Settings, url: str) -> None:
    with pytest.raises(FarmError, match="FARM_DATABASE_URL") as caught:
        opened(settings, url)
    assert url not in caught.value.message


def test_what_the_farm_relies_on_is_set_behind_a_pooler_too(settings: Settings) -> None:
    url = make_url(settings.database_url.get_secret_value())
    assert url.host is not None
    assert url.port is not None
    with pooler(url.host, url.port) as port:
        store = opened(settings, url.set(port=port).render_as_string(hide_password=False))
        with store.connect() as connection:
            found = {
                name: connection.execute(text(f"SHOW {name}")).scalar_one()
                for name in ("statement_timeout", "idle_in_transaction_session_timeout", "timezone")
            }
        assert found == {
            "statement_timeout": "30s",
            "idle_in_transaction_session_timeout": "2s",
            "timezone": "UTC",
        }
        assert f":{port}" in _postgres(store)
        store.dispose()


def test_what_a_pooler_refuses_is_told_to_operators(settings: Settings) -> None:
    url = make_url(settings.database_url.get_secret_value())
    assert url.host is not None
    assert url.port is not None
    with pooler(url.host, url.port) as port:
        other = url.set(port=port).update_query_dict({"options": "-c geqo=off"})
        store = opened(settings, other.render_as_string(hide_password=False))
        with pytest.raises(Unavailable, match="unsupported startup parameter: options"):
            _postgres(store)
        store.dispose()


def test_sessions_that_are_shared_are_found(settings: Settings) -> None:
    store = open_store(settings)
    require_sessions(store)
    with store.connect() as connection:  # as with a pooler that shares this session
        name = make_url(settings.database_url.get_secret_value()).database
        connection.execute(text(f"ALTER DATABASE {name} SET farm.probe = 'set'"))
        connection.commit()
    store.dispose()
    with pytest.raises(FarmError, match="pool_mode = session"):
        require_sessions(store)
    store.dispose()
