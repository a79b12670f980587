"""training/spot.py: a run stops when the metadata of its machine announce an interruption."""

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import losses, run_stage, small

import pretrain
from training.spot import SpotNotice
from training.weights import LATEST

AWS = '{"action": "terminate", "time": "2026-01-01T00:02:00Z"}'


class Metadata(BaseHTTPRequestHandler):
    """Answers as the metadata servers of both clouds do; `notice` is what they announce."""

    notice, expired, requests = "", 0, 0

    def answer(self, code: int, text: str = "") -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_PUT(self) -> None:
        has_lifetime = "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        is_right = self.path == "/latest/api/token" and has_lifetime
        self.answer(200 if is_right else 400, "secret")

    def do_GET(self) -> None:
        kind = type(self)
        kind.requests += 1
        if self.path == "/computeMetadata/v1/instance/preempted":
            is_right = self.headers.get("Metadata-Flavor") == "Google"
            self.answer(200 if is_right else 403, "TRUE" if self.notice else "FALSE")
        elif self.path != "/latest/meta-data/spot/instance-action":
            self.answer(400)
        elif self.headers.get("X-aws-ec2-metadata-token") != "secret" or self.expired:
            kind.expired = 0
            self.answer(401)
        elif self.notice:
            self.answer(200, self.notice)
        else:
            self.answer(404)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A metadata server, and proxies in the environment that must not be used for it."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    kind = type("Server", (Metadata,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kind.address = f"http://127.0.0.1:{server.server_port}"
        yield kind
        server.shutdown()


@pytest.mark.parametrize(("cloud", "reason"), [("aws", AWS), ("gcp", "the machine is preempted")])
def test_notice_of_either_cloud_requests_a_stop_once(server, cloud, reason):
    reasons = []
    callback = SpotNotice(reasons.append, cloud=cloud, every=0.001, address=server.address)
    assert callback.notice() is None
    server.expired = 1  # a token is valid for six hours
    assert callback.notice() is None and callback.notice() is None
    server.notice = AWS
    callback.poll()
    assert reasons == [reason]


def test_server_that_cannot_be_reached_is_one_line_and_a_later_notice_still_stops(server, capfd):
    reasons, failures = [], 3
    server.notice = AWS
    callback = SpotNotice(reasons.append, cloud="aws", every=0.001, address="http://127.0.0.1:1")
    notice = callback.notice

    def failing() -> str | None:
        nonlocal failures
        failures -= 1
        if failures < 0:
            callback.address = server.address
        return notice()

    callback.notice = failing
    callback.poll()
    printed = capfd.readouterr().out
    assert printed.count("http://127.0.0.1:1 does not answer") == 1
    assert reasons == [AWS]


def test_run_that_gets_a_notice_saves_and_has_the_exit_code_of_a_signal(demo, server, tmp_path):
    spot = f"callbacks={{SpotNotice: {{cloud: aws, every: 0.01, address: {server.address}}}}}"
    arguments = [*small(demo), "data.num_workers=0", "callbacks=null", spot, "run_name=run"]
    server.notice = AWS
    with pytest.raises(SystemExit) as end:
        run_stage(pretrain, [*arguments, "trainer.max_duration=500ep"], tmp_path)
    assert end.value.code == 75
    step = len(losses(tmp_path, "run"))
    assert os.readlink(tmp_path / "runs/run/checkpoints" / LATEST).endswith(f"-ba{step}.pt")


def test_run_without_a_notice_is_not_changed_by_polling(demo, server, tmp_path):
    spot = f"callbacks={{SpotNotice: {{cloud: gcp, every: 0.01, address: {server.address}}}}}"
    arguments = [*small(demo), "data.num_workers=0", "callbacks=null", spot]
    run_stage(pretrain, [*arguments, "trainer.max_duration=2ba"], tmp_path)
    assert server.requests > 0 and len(losses(tmp_path, "demo")) == 2
