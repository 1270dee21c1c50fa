"""Headless Chromium that a test drives: it opens pages, runs scripts, chooses files, and takes screenshots.

Commands go through a pipe in Chromium's own protocol (--remote-debugging-pipe), so that no library is needed.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from tests.browser import CHROMIUM


class Browser:
    """A browser with one page.

    Attributes:
        requests: The URLs that the page asked for.
        messages: What the page wrote to its console, warnings and errors alone.
    """

    def __init__(self, profile: Path, width: int = 1280, height: int = 900):
        assert CHROMIUM is not None
        (read_here, write_there), (read_there, write_here) = os.pipe(), os.pipe()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        command += ["--disable-component-update", "--disable-sync", "--no-first-run", "--remote-debugging-pipe"]
        command += ["--disable-dev-shm-usage", "--hide-scrollbars", f"--user-data-dir={profile}"]
        # Chromium reads commands from descriptor 3 and writes to descriptor 4; the copies are none of these.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_there, write_there)]
        actions = [(os.POSIX_SPAWN_OPEN, one, os.devnull, os.O_RDWR, 0) for one in (1, 2)]
        actions += [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)]
        self._process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions)
        for end in (read_there, write_there, *ends):
            os.close(end)
        self._reader, self._writer = os.fdopen(read_here, "rb"), os.fdopen(write_here, "wb", buffering=0)
        self._number, self._session = 0, None
        self._buffer = b""
        self.requests: list[str] = []
        self.messages: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._process, signal.SIGTERM)
        os.waitpid(self._process, 0)
        self._reader.close()
        self._writer.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            self._note(answer)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """Prefers light or dark pages."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def run(self, script: str) -> Any:
        """Returns the value of an expression on the page, after its promise."""
        found = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 240, until: Callable[[Any], bool] = bool) -> Any:
        """Runs an expression again and again until its value is as wanted, and returns the value."""
        end = time.monotonic() + seconds
        while not until(found := self.run(script)):
            assert time.monotonic() < end, f"after {seconds} s still {found!r}: {script}"
            time.sleep(0.1)
        return found

    def choose_files(self, selector: str, files: list[Path]) -> None:
        """Chooses files in an input element."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def move(self, x: float, y: float) -> None:
        """Moves the pointer."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, x: float, y: float) -> None:
        """Presses and releases the left button."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str) -> None:
        """Presses and releases a key."""
        text = {"text": "\r"} if name == "Enter" else {}
        code = {"Enter": 13, "Escape": 27, "ArrowRight": 39}[name]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=name, code=name, windowsVirtualKeyCode=code, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=name, code=name, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        """Writes into the element that has the focus."""
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """Saves what the page looks like as a PNG file."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _note(self, event: dict[str, Any]) -> None:
        method, found = event.get("method"), event.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning"):
            self.messages.append(" ".join(str(one.get("value", one.get("description"))) for one in found["args"]))
        elif method == "Runtime.exceptionThrown":
            self.messages.append(str(found["exceptionDetails"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._reader.read1(1 << 16)
            assert part, "Chromium has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)
