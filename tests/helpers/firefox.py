"""A headless Firefox over WebDriver BiDi, which it speaks by itself: no driver of its own is needed."""

import base64
import json
import re
import shutil
from pathlib import Path

from tests.helpers.window import Window

BINARY = next(filter(None, map(shutil.which, ("firefox", "firefox-esr"))), None)
PREFERENCES = {
    "browser.shell.checkDefaultBrowser": False, "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False, "network.connectivity-service.enabled": False,
    "app.normandy.enabled": False, "toolkit.telemetry.enabled": False,
}  # fmt: skip


class Firefox(Window):
    """One window."""

    def __init__(self, profile, size=(1440, 900), dark=False):
        own = PREFERENCES | {"layout.css.prefers-color-scheme.content-override": 0 if dark else 1}
        lines = "".join(f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in own.items())
        Path(profile, "user.js").write_text(lines)
        log = Path(profile, "log")

        def address():
            found = re.search(r"BiDi listening on (ws://\S+)", log.read_text(errors="replace"))
            return found and f"{found[1]}/session"

        flags = ["--headless", "--remote-debugging-port", "0", "--profile", str(profile), "--no-remote"]
        with log.open("wb") as file:
            super().__init__("firefox", [BINARY, *flags], address, file)
        self.send("session.new", capabilities={})
        self.send("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        self.context = self.send("browsingContext.getTree")["contexts"][0]["context"]
        view = {"width": size[0], "height": size[1]}
        self.send("browsingContext.setViewport", context=self.context, viewport=view)

    def heard(self, what, of):
        if what == "log.entryAdded" and of["level"] == "error":
            self.errors.append(of["text"])
        elif what == "network.beforeRequestSent":
            self.requests.append(of["request"]["url"])

    def run(self, code):
        """The value of an expression in the page; promises are waited for."""
        answer = self._evaluate(f"Promise.resolve({code}).then((v) => JSON.stringify(v) ?? 'null')")
        assert answer["type"] == "success", answer["exceptionDetails"]
        return json.loads(answer["result"]["value"])

    def value(self, code):
        return self._evaluate(code).get("result", {}).get("value")  # it throws on the way from one page to the next

    def _evaluate(self, code):
        return self.send("script.evaluate", expression=code, target={"context": self.context}, awaitPromise=True)

    def go(self, address):
        self.send("browsingContext.navigate", context=self.context, url=address, wait="none")

    def key(self, key):
        """Press a key."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.send("input.performActions", context=self.context, actions=[{"type": "key", "id": "k", "actions": keys}])

    def screenshot(self, path):
        """What the window shows, as PNG."""
        found = self.send("browsingContext.captureScreenshot", context=self.context)
        Path(path).write_bytes(base64.b64decode(found["data"]))
