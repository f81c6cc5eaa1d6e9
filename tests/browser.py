"""Headless Chromium over its debugging pipe: what a page shows, says on its console, and looks like."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60

# Texts on the page with the contrast to what is behind them: an ancestor's ground, or a bar or cell drawn before them.
CONTRASTS = """(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const over = ([r, g, b, a], ground) => [r, g, b].map((part, i) => (part * a + ground[i] * (255 - a)) / 255);
  const ground = (element) => {
    if (!element) return [255, 255, 255];
    const colour = rgba(getComputedStyle(element).backgroundColor);
    return colour[3] === 255 ? colour.slice(0, 3) : over(colour, ground(element.parentElement));
  };
  const light = (colour) => {
    const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
  };
  const found = new Map();
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.textContent.trim(), element = texts.currentNode.parentElement;
    const box = element.getBoundingClientRect(), style = getComputedStyle(element);
    if (!text || Math.min(box.width, box.height) < 2 || element.closest("title, option, script, style")) continue;
    const inside = element instanceof SVGElement, before = element.previousElementSibling;
    const grounds = [ground(element)];
    if (inside && before?.matches("rect[class^=q]")) grounds[0] = rgba(getComputedStyle(before).fill).slice(0, 3);
    const bar = !inside && before?.tagName === "I" && element.closest(".bar");
    if (bar) grounds.splice(0, bar.matches(".over") ? 1 : 0, ground(before));
    for (const behind of grounds) {
      const own = light(over(rgba(inside ? style.fill : style.color), behind)), other = light(behind);
      const ratio = Math.max(own, other) / Math.min(own, other);
      const key = `${style.color} ${style.fill} ${behind}`;
      if (!found.has(key)) found.set(key, [Math.round(100 * ratio) / 100, text.slice(0, 60)]);
    }
  }
  return [...found.values()];
})()"""
# Whether the element that has the focus shows it: by an outline of its own or of what stands for it, or a stroke.
RING = """(() => {
  const element = document.activeElement;
  const outlined = (style) => style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  const next = element.nextElementSibling;
  const styles = [getComputedStyle(element), next && getComputedStyle(next), next && getComputedStyle(next, "::after")];
  const rect = element instanceof SVGElement && element.querySelector("rect");
  const stroked = rect && parseFloat(getComputedStyle(rect).strokeWidth) >= 2;
  return Boolean(stroked || styles.some((style) => style && outlined(style)));
})()"""


class Browser:
    """One page. `errors` are what its console complained of, and exceptions nobody caught."""

    def __init__(self) -> None:
        assert CHROMIUM is not None
        self._folder = tempfile.TemporaryDirectory(prefix="fluxkiln-chromium-", ignore_cleanup_errors=True)
        read_end, self._to = os.pipe()
        self._from, write_end = os.pipe()

        # Chromium reads from 3 and writes to 4. A shell moves them there: code of ours between fork and exec would have
        # Python fork, which JAX warns of. From numbers above 20, as 3 or 4 may be one of the two already.
        ends = tuple(fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_end, write_end))
        move = f'exec 3<&{ends[0]} 4>&{ends[1]} && exec "$@"'
        self._process = subprocess.Popen(
            [
                "/bin/bash", "-c", move, "chromium",
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
                f"--user-data-dir={self._folder.name}", "--no-first-run", "--disable-extensions",
                "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                "--disable-dev-shm-usage", "about:blank",
            ],
            pass_fds=ends, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        for end in (read_end, write_end, *ends):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self.errors: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"}, None)["targetId"]
        attached = self._call("Target.attachToTarget", {"targetId": target, "flatten": True}, None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str) -> None:
        self._call("Page.navigate", {"url": url})
        self.wait("document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        answer = self._call("Runtime.evaluate", {"expression": expression, "returnByValue": True, "awaitPromise": True})
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self.evaluate(f"Boolean({condition})"):
                return
            time.sleep(0.05)
        raise AssertionError(f"not so within {PATIENCE} s: {condition}")

    def press(self, key: str, code: int, text: str = "", modifiers: int = 0) -> None:
        """A key going down and up; modifiers: 1 Alt, 2 Ctrl, 8 Shift."""
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self._call("Input.dispatchKeyEvent", {"type": "keyDown" if text else "rawKeyDown", "text": text, **common})
        self._call("Input.dispatchKeyEvent", {"type": "keyUp", **common})

    def illegible(self, least: float) -> list[tuple[float, str]]:
        """Texts whose contrast with their ground is less: the ratio and the text, one for each pair of colours."""
        found: list[tuple[float, str]] = [tuple(one) for one in self.evaluate(CONTRASTS)]
        assert found, "the page has no text"
        return [one for one in found if one[0] < least]

    def walk(self, stops: int) -> list[tuple[str, bool]]:
        """Press Tab so many times: what has the focus then, and whether it shows that."""
        found = []
        for _ in range(stops):
            self.press("Tab", 9)
            name = (
                "(e => `${e.tagName.toLowerCase()}#${e.id}.${e.getAttribute('class') ?? ''}`)(document.activeElement)"
            )
            found.append((self.evaluate(name), self.evaluate(RING)))
        return found

    def type(self, text: str) -> None:
        self._call("Input.insertText", {"text": text})

    def look_like(self, width: int, height: int, *, dark: bool = False, phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self._call("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._call("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, path: Path) -> None:
        answer = self._call("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, method: str, parameters: dict[str, Any] | None = None, session: str | None = "") -> Any:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._from, 1 << 16)
            assert data, "Chromium ended"
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\0", 1)
        found: dict[str, Any] = json.loads(line)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(parameters["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(parameters["args"])[:500])
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.errors.append(parameters["entry"]["text"] + " " + parameters["entry"].get("url", ""))
