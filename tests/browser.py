"""A headless Chromium over its debugging pipe: opens a page, answers expressions, keeps complaints, takes pictures."""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SECONDS = 60


def program() -> str | None:
    """Where a Chromium is, if there is one."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One tab. ``complaints`` are what the console and the log said at the level of a warning or above."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, ""
        self._loaded = False
        self.complaints: list[str] = []

    def start(self) -> None:
        """Open the tab."""
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def look(self, page: Path, width: int, height: int = 800, *, dark: bool = False, scale: float = 1) -> None:
        """Open a file in a window of so many CSS pixels."""
        mode = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._ask("Emulation.setEmulatedMedia", features=mode)
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": width < 600}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        self._loaded = False
        self._ask("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._note(self._read())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is, in the page."""
        found = self._ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def picture(self) -> bytes:
        """The window as PNG."""
        return base64.b64decode(self._ask("Page.captureScreenshot", format="png")["data"])

    def _ask(self, method: str, **values: Any) -> dict[str, Any]:
        self._number += 1
        command = {"id": self._number, "method": method, "params": values}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        while True:
            message = self._read()
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]
            self._note(message)

    def _note(self, message: dict[str, Any]) -> None:
        method, values = message.get("method"), message.get("params", {})
        self._loaded |= method == "Page.loadEventFired"
        entry = values.get("entry", {})
        bad = method == "Runtime.exceptionThrown" or entry.get("level") in ("warning", "error")
        bad |= method == "Runtime.consoleAPICalled" and values.get("type") in ("warning", "error", "assert")
        bad |= method == "Network.loadingFailed"
        if bad:
            self.complaints.append(json.dumps(values)[:500])

    def _read(self) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline, "the browser says nothing"
            part = os.read(self._answers, 1 << 20)
            assert part, "the browser has ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group, and wait until none of the group is left."""
    with contextlib.suppress(ProcessLookupError):
        for _ in range(1000):
            os.killpg(process.pid, signal.SIGKILL)
            process.poll()
            time.sleep(0.01)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser with nothing of the user's, for as long as the block lasts."""
    path = program()
    assert path is not None, "look at program() first"
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        options += ["--no-first-run", "--disable-dev-shm-usage", "--disable-background-networking"]
        # It reads commands from descriptor 3 and answers on 4.
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        process = subprocess.Popen(
            ["bash", "-c", script, path, *options, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_browser, from_browser),
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            tab = Browser(commands, answers)
            tab.start()
            yield tab
        finally:
            _end_group(process)  # all of its processes write to the profile, which goes now
            os.close(commands)
            os.close(answers)
