"""A headless Chromium over the DevTools protocol: what a page says, asks for and looks like."""

import base64
import json
import shutil
from pathlib import Path
from urllib.request import urlopen

from tests.helpers.window import Window

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Chromium(Window):
    """One window."""

    def __init__(self, profile, size=(1440, 900), dark=False):
        file = Path(profile) / "DevToolsActivePort"

        def address():
            if not (file.exists() and "\n" in file.read_text()):
                return None
            with urlopen(f"http://127.0.0.1:{int(file.read_text().split()[0])}/json") as answer:
                return next((p["webSocketDebuggerUrl"] for p in json.load(answer) if p["type"] == "page"), None)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]  # fmt: skip
        super().__init__("chromium", [BINARY, *flags], address)
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        view = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **view)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)

    def heard(self, what, of):
        if what == "Runtime.exceptionThrown":
            self.errors.append(of["exceptionDetails"].get("exception", {}).get("description") or str(of))
        elif what == "Runtime.consoleAPICalled" and of["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in of["args"]))
        elif what == "Log.entryAdded" and of["entry"]["level"] == "error":
            self.errors.append(of["entry"]["text"] + " " + of["entry"].get("url", ""))
        elif what == "Network.requestWillBeSent":
            self.requests.append(of["request"]["url"])

    def run(self, code):
        """The value of an expression in the page; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def value(self, code):
        return self.send("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def go(self, address):
        self.send("Page.navigate", url=address)

    def key(self, key):
        """Press a key."""
        text = {"text": key} if len(key) == 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

    def mouse(self, kind, x, y):
        """``mousePressed``, ``mouseMoved`` or ``mouseReleased`` at a place of the window."""
        self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self, path):
        """What the window shows, as PNG."""
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))
