"""Stop a run when the cloud announces that it takes a spot machine away.

    callbacks:
      SpotNotice: {cloud: aws}

AWS sends no signal, but writes the notice into the metadata of the instance, two minutes ahead.
Google sets a flag 30 seconds ahead, at the time when it begins to shut the machine down.

Sources: docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html,
cloud.google.com/compute/docs/instances/preemptible#detecting
"""

import threading
from collections.abc import Callable
from http.client import HTTPException
from typing import Literal
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from composer import Callback, Logger, State
from composer.utils import dist
from pydantic import PositiveFloat

ADDRESSES = {"aws": "http://169.254.169.254", "gcp": "http://metadata.google.internal"}
TIMEOUT = 2.0  # seconds for a request


class SpotNotice(Callback):
    """Polls the metadata of a spot machine, and stops the run as SIGTERM would.

    One rank of each machine polls, in a thread of its own. A metadata server that cannot be reached
    is reported once; polling continues.

    Args:
        request_stop: called with the reason when there is a notice.
        cloud: aws (EC2, IMDSv2) or gcp (Compute Engine).
        every: seconds between two requests.
        address: of the metadata server; default the cloud's own.
    """

    def __init__(
        self,
        request_stop: Callable[[str], None],
        *,
        cloud: Literal["aws", "gcp"],
        every: PositiveFloat = 5.0,
        address: str | None = None,
    ):
        self.request_stop = request_stop
        self.notice = {"aws": self.aws_notice, "gcp": self.gcp_notice}[cloud]
        self.every = every
        self.address = address or ADDRESSES[cloud]
        self.open = build_opener(ProxyHandler({})).open  # a proxy would answer for its own machine
        self.token = None
        self.ended = threading.Event()

    def fit_start(self, state: State, logger: Logger) -> None:
        if dist.get_local_rank() == 0:
            threading.Thread(target=self.poll, daemon=True).start()

    def close(self, state: State, logger: Logger) -> None:
        self.ended.set()

    def poll(self) -> None:
        """Poll until there is a notice, or the run has ended."""
        has_warned = False
        while not self.ended.is_set():
            try:
                if notice := self.notice():
                    print(f"SpotNotice: {notice}; stopping", flush=True)
                    self.request_stop(notice)
                    return
            except (OSError, HTTPException) as error:
                if not has_warned:
                    problem = f"SpotNotice: {self.address} does not answer ({error})"
                    print(f"{problem}; the run continues without a notice", flush=True)
                has_warned = True
            self.ended.wait(self.every)

    def aws_notice(self) -> str | None:
        """Return the announced interruption of an EC2 instance; None if there is none."""
        if self.token is None:
            header = {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}
            self.token = self.ask("/latest/api/token", header, "PUT")
        try:
            header = {"X-aws-ec2-metadata-token": self.token}
            return self.ask("/latest/meta-data/spot/instance-action", header)
        except HTTPError as error:
            if error.code == 401:  # the token has expired
                self.token = None
            elif error.code != 404:
                raise
            return None

    def gcp_notice(self) -> str | None:
        """Return that a Compute Engine machine is being preempted; None if it is not."""
        path = "/computeMetadata/v1/instance/preempted"
        is_preempted = self.ask(path, {"Metadata-Flavor": "Google"}) == "TRUE"
        return "the machine is preempted" if is_preempted else None

    def ask(self, path: str, headers: dict[str, str], method: str = "GET") -> str:
        """Return the text at a path of the metadata server."""
        request = Request(self.address + path, headers=headers, method=method)
        with self.open(request, timeout=TIMEOUT) as response:
            return response.read().decode().strip()
