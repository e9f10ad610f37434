"""A headless Chromium, spoken to through its own debugging protocol."""

import base64
import fcntl
import json
import os
import shutil
import subprocess

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def program():
  """The path of a Chromium; None if there is none."""
  return next(filter(None, map(shutil.which, PROGRAMS)), None)


NEEDED = [
  pytest.mark.slow,
  pytest.mark.skipif(
    program() is None, reason="no Chromium here: apt-get install chromium"
  ),
]


class Browser:
  """One tab. `with Browser(folder) as browser: ...`"""

  def __init__(self, profile):
    self._profile = profile
    self.events = []

  def __enter__(self):
    to_read, self._write = os.pipe()
    self._read, to_write = os.pipe()
    # Chromium reads commands from file 3 and writes answers to file 4.
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read, to_write)]
    self._process = subprocess.Popen(
      [
        "bash",
        "-c",
        f'exec "$0" "$@" 3<&{theirs[0]} 4>&{theirs[1]}',
        program(),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
        f"--user-data-dir={self._profile}",
        "about:blank",
      ],
      pass_fds=theirs,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    for fd in (to_read, to_write, *theirs):
      os.close(fd)
    self._buffer, self._count, self._session = b"", 0, None
    try:
      target = self.call("Target.createTarget", url="about:blank")["targetId"]
      self._session = self.call(
        "Target.attachToTarget", targetId=target, flatten=True
      )["sessionId"]
      for domain in ("Page", "Network", "Runtime", "Log"):
        self.call(f"{domain}.enable")
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *error):
    os.close(self._write)
    os.close(self._read)
    self._process.terminate()
    self._process.wait(30)

  def call(self, method, **params):
    """A command's result; what the page did meanwhile goes to `events`."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    while True:
      answer = self._receive()
      if answer.get("id") == self._count:
        assert "error" not in answer, answer
        return answer["result"]
      self.events.append(answer)

  def _receive(self):
    while b"\0" not in self._buffer:
      part = os.read(self._read, 1 << 20)
      assert part, "the browser has ended"
      self._buffer += part
    message, _, self._buffer = self._buffer.partition(b"\0")
    return json.loads(message)

  def open(self, path, *, width, height, scheme):
    """Loads a file in a window of that size and colour scheme."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=width < 600,
    )
    self.call(
      "Emulation.setEmulatedMedia",
      features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    self.events = []
    self.call("Page.navigate", url=path.absolute().as_uri())
    while not any(
      e.get("method") == "Page.loadEventFired" for e in self.events
    ):
      self.events.append(self._receive())

  def evaluate(self, expression):
    """The value of a JavaScript expression; a promise's, once it has one."""
    found = self.call(
      "Runtime.evaluate",
      expression=expression,
      returnByValue=True,
      awaitPromise=True,
      userGesture=True,
    )
    assert "exceptionDetails" not in found, found
    return found["result"].get("value")

  def press(self, *keys):
    """Presses keys by their names, such as "k" or "ArrowDown"."""
    codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38}
    codes |= {"ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "End": 35}
    for key in keys:
      text = "\r" if key == "Enter" else key if len(key) == 1 else ""
      options = {"key": key, "windowsVirtualKeyCode": codes.get(key, 0)}
      self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **options)
      self.call("Input.dispatchKeyEvent", type="keyUp", **options)

  def complaints(self):
    """What the page logged, or broke on."""
    kinds = (
      "Log.entryAdded",
      "Runtime.exceptionThrown",
      "Runtime.consoleAPICalled",
    )
    return [event for event in self.events if event.get("method") in kinds]

  def screenshot(self, path, *, height=None):
    """Writes a PNG file of the window, or of the page down to that height."""
    options = {}
    if height is not None:
      width = self.evaluate("document.documentElement.clientWidth")
      options = {
        "captureBeyondViewport": True,
        "clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1},
      }
    data = self.call("Page.captureScreenshot", **options)["data"]
    path.write_bytes(base64.b64decode(data))
    return path
