"""The server of a page: reading alone, the run folder alone, this machine alone."""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folders import NUM_STEPS, metrics_row, rollouts, write_lines, write_run

from fastr1 import cli
from fastr1.reporting.run_log import RunLogError
from fastr1.reporting.serve import LivePage, RunServer, ServeError


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunServer]:
    write_run(tmp_path / "run")
    (tmp_path / "secret.txt").write_text("secret")
    with RunServer(tmp_path / "run", 0) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield found
        found.shutdown()


def ask(server: RunServer, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, content, {name.lower(): value for name, value in answer.getheaders()}


def test_the_page_is_there_and_only_on_the_loopback_address(server: RunServer) -> None:
    status, content, headers = ask(server, "/")
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert int(headers["content-length"]) == len(content)
    assert b"live: looks for news" in content
    assert server.socket.getsockname()[0] == "127.0.0.1"


def test_files_of_the_run_are_there(server: RunServer) -> None:
    rows = (server.page.folder / "metrics.jsonl").read_bytes()
    status, content, headers = ask(server, "/metrics.jsonl")
    assert (status, content, headers["content-type"]) == (200, rows, "text/plain; charset=utf-8")
    assert headers["x-content-type-options"] == "nosniff"
    assert ask(server, "/frames/t0.jpg")[2]["content-type"] == "image/jpeg"
    assert ask(server, "/frames")[0] == 404  # a folder is not listed


def test_head_is_get_without_the_content(server: RunServer) -> None:
    for path in ("/", "/metrics.jsonl", "/none"):
        status, content, headers = ask(server, path, "HEAD")
        expected, whole, _ = ask(server, path)
        assert (status, content, int(headers["content-length"])) == (expected, b"", len(whole))
        with socket.create_connection(
            ("127.0.0.1", server.port)
        ) as connection:  # a client drops what it does not expect
            connection.sendall(f"HEAD {path} HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
            with connection.makefile("rb") as answer:
                assert answer.read().partition(b"\r\n\r\n")[2] == b""


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_written(server: RunServer, method: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in server.page.folder.rglob("*")}
    assert ask(server, "/metrics.jsonl", method)[0] == 501
    assert {path: path.stat().st_mtime_ns for path in server.page.folder.rglob("*")} == before


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/frames/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/%2e%2e%2fsecret.txt",
        "/frames/%2e%2e/%2e%2e/secret.txt",
        "/..\\secret.txt",
        "/..%5csecret.txt",
        "/%252e%252e/secret.txt",
        "//{outside}",
        "/{outside}",
        "/%2f{outside}",
        "/frames/link.txt",
        "/linked/secret.txt",
        "/circle",
        "/a%00b",
        "/" + "a" * 5000,
    ],
)
def test_no_path_leads_outside_the_run_folder(server: RunServer, path: str) -> None:
    outside = server.page.folder.parent / "secret.txt"
    (server.page.folder / "frames" / "link.txt").symlink_to(outside)
    (server.page.folder / "linked").symlink_to(outside.parent, target_is_directory=True)
    (server.page.folder / "circle").symlink_to("circle")
    status, content, _ = ask(server, path.format(outside=str(outside).lstrip("/")))
    assert status == 404
    assert b"secret" not in content


def test_a_link_that_stays_inside_is_followed(server: RunServer) -> None:
    (server.page.folder / "same.jsonl").symlink_to("metrics.jsonl")
    assert ask(server, "/same.jsonl")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost.evil:{port}", ""]
)
@pytest.mark.parametrize("path", ["/", "/version", "/metrics.jsonl"])
def test_another_host_name_is_refused(server: RunServer, host: str, path: str) -> None:
    status, content, _ = ask(server, path, Host=host.format(port=server.port))
    assert (status, content) == (403, f"open {server.url}\n".encode())


def test_two_host_names_are_refused_and_localhost_is_not(server: RunServer) -> None:
    assert ask(server, "/", Host=f"localhost:{server.port}")[0] == 200
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET / HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil\r\n\r\n".encode())
        assert b" 403 " in connection.recv(100)


def test_what_is_no_address_is_refused(server: RunServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET http://[ HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert b" 400 " in connection.recv(100)


def test_a_browser_that_goes_away_is_no_error(server: RunServer, capfd: pytest.CaptureFixture[str]) -> None:
    with open(server.page.folder / "large.bin", "wb") as file:
        file.truncate(2**28)
    before = threading.active_count()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"GET /large.bin HTTP/1.0\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        connection.recv(100)
    for _ in range(200):
        if threading.active_count() == before:
            break
        time.sleep(0.02)
    assert threading.active_count() == before
    assert capfd.readouterr().err == ""


def test_a_taken_port_is_an_error_that_names_it(server: RunServer) -> None:
    with pytest.raises(
        ServeError, match=rf"cannot listen on port {server.port} of 127.0.0.1: give another with --port"
    ):
        RunServer(server.page.folder, server.port)


def test_the_page_follows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastr1.reporting.serve.REST", 0)
    live = LivePage(write_run(tmp_path))
    version, page = live.get()
    assert live.get() == (version, page)
    write_lines(tmp_path / "metrics.jsonl", [metrics_row(step) for step in range(1, NUM_STEPS + 8)])
    later, changed = live.get()
    assert later != version
    assert f"{NUM_STEPS + 7} of {NUM_STEPS}".encode() in changed
    (tmp_path / "final").rmdir()
    assert live.get()[0] != later


def test_a_page_that_takes_long_is_not_built_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("fastr1.reporting.serve.time.monotonic", lambda: now[0])

    def build(*args: object, **others: object) -> str:
        now[0] += 10
        return "page"

    monkeypatch.setattr("fastr1.reporting.serve.build_page", build)
    live = LivePage(write_run(tmp_path))
    first = live.get()
    write_lines(tmp_path / "rollouts.jsonl", rollouts(3))
    now[0] = 49.0
    assert live.get() == first  # what it shows, not what is there
    now[0] = 50.0
    assert live.get()[0] != first[0]


def test_a_folder_that_is_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunLogError, match="is this the folder of a run"):
        RunServer(tmp_path, 0)


def test_a_run_that_is_removed_meanwhile_is_told(server: RunServer) -> None:
    for name in ("config.json", "metrics.jsonl", "rollouts.jsonl"):
        (server.page.folder / name).unlink()
    server.page._not_before = 0.0
    status, content, _ = ask(server, "/")
    assert status == 503
    assert b"is this the folder of a run?" in content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "80"], "--port belongs to --serve"),
        (["--serve", "--port", "70000"], "--port is 70000; choose one from 0 to 65535"),
        (["--serve", "--output", "x.html"], "--serve writes no file"),
        (["--output", "x.png"], "--output is x.png; the page is HTML"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert cli.main(["report", str(write_run(tmp_path)), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()
