"""Headless Chromium over its debugging pipe: no port is opened, and nothing but Debian's package is needed.

The browser may connect to loopback alone: every other name fails to resolve.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system_parts import required

ANSWER_TIMEOUT_S = 30.0
POLL_S = 0.05
ARGUMENTS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Page:
    """One tab."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._write, self._read = to_browser, from_browser
        self._buffer = b""
        self._id = 0
        self._session: str | None = None
        # Everything the tab complained about: exceptions, refused scripts, failed loads.
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """One command and its result."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        while True:
            found = self._message(deadline_s)
            if found.get("id") == self._id:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self._event(found)

    def _message(self, deadline_s: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, "the browser does not answer"
            if select.select([self._read], [], [], left_s)[0]:
                data = os.read(self._read, 1 << 20)
                assert data, "the browser has ended"
                self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _event(self, found: dict[str, Any]) -> None:
        parameters = found.get("params", {})
        if found["method"] == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(parameters["exceptionDetails"]))
        elif found["method"] == "Log.entryAdded" and parameters["entry"]["level"] in {"warning", "error"}:
            self.complaints.append(parameters["entry"]["text"])
        elif found["method"] == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )

    def scheme(self, name: str) -> None:
        """`light` or `dark`."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def open(self, url: str) -> None:
        assert "errorText" not in self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """What a script's expression is."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        deadline_s = time.monotonic() + ANSWER_TIMEOUT_S
        while not self.value(expression):
            assert time.monotonic() < deadline_s, f"never true: {expression}; {self.complaints}"
            time.sleep(POLL_S)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text="\r", windowsVirtualKeyCode=13
            )

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(found["data"]))


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
    """A browser with one tab; `profile` is a directory of its own."""
    program = required("chromium")
    (given, to_write), (from_read, taken) = os.pipe(), os.pipe()
    # The browser's own are its descriptors 3 and 4: out of their way, so that neither overwrites the other.
    to_read, from_write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (given, taken))
    os.close(given)
    os.close(taken)
    # A root user has no sandbox to put around it.
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    command = [program, *ARGUMENTS, *sandbox, f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{to_read} 4>&{from_write}', "bash", *command],
        pass_fds=(to_read, from_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_read)
    os.close(from_write)
    try:
        yield Page(to_write, from_read)
    finally:
        # The end of its pipe ends the browser.
        os.close(to_write)
        os.close(from_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
