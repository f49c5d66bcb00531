"""A headless Firefox over WebDriver BiDi, which it speaks by itself: no driver of its own is needed."""

import asyncio
import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

BINARY = next(filter(None, map(shutil.which, ("firefox", "firefox-esr"))), None)
PREFERENCES = {
    "browser.shell.checkDefaultBrowser": False, "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False, "network.connectivity-service.enabled": False,
    "app.normandy.enabled": False, "toolkit.telemetry.enabled": False,
}  # fmt: skip


class Firefox:
    """One window. ``errors`` are what the console complains of or what throws, ``requests`` the addresses asked for."""

    def __init__(self, profile, size=(1440, 900), dark=False):
        if BINARY is None:
            pytest.skip("no firefox is installed: the browser is not tried in one")
        aiohttp = pytest.importorskip("aiohttp", reason="aiohttp speaks with firefox")
        self.errors, self.requests = [], []
        own = PREFERENCES | {"layout.css.prefers-color-scheme.content-override": 0 if dark else 1}
        lines = "".join(f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in own.items())
        Path(profile, "user.js").write_text(lines)
        log = Path(profile, "log")
        flags = ["--headless", "--remote-debugging-port", "0", "--profile", str(profile), "--no-remote", "about:blank"]
        with log.open("wb") as file:
            self.process = subprocess.Popen([BINARY, *flags], stdout=file, stderr=file)
        deadline = time.monotonic() + 60
        while not (found := re.search(r"BiDi listening on (ws://\S+)", log.read_text(errors="replace"))):
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                pytest.skip("firefox does not start here")
            time.sleep(0.1)
        self.loop, self.ids, self.waiting = asyncio.new_event_loop(), itertools.count(1), {}
        self.aiohttp = aiohttp
        self.loop.run_until_complete(self._connect(f"{found[1]}/session", size))

    async def _connect(self, address, size):
        self.session = self.aiohttp.ClientSession()
        self.socket = await self.session.ws_connect(address, max_msg_size=0)
        self.reader = self.loop.create_task(self._read())
        await self._send("session.new", capabilities={})
        await self._send("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        tree = await self._send("browsingContext.getTree")
        self.context = tree["contexts"][0]["context"]
        view = {"width": size[0], "height": size[1]}
        await self._send("browsingContext.setViewport", context=self.context, viewport=view)

    async def _read(self):
        async for message in self.socket:
            said = json.loads(message.data)
            if said.get("id") in self.waiting:
                self.waiting.pop(said["id"]).set_result(said)
            what, of = said.get("method"), said.get("params", {})
            if what == "log.entryAdded" and of["level"] == "error":
                self.errors.append(of["text"])
            elif what == "network.beforeRequestSent":
                self.requests.append(of["request"]["url"])

    async def _send(self, method, **params):
        number = next(self.ids)
        self.waiting[number] = self.loop.create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self.waiting[number], 60)
        assert answer["type"] == "success", answer
        return answer["result"]

    def send(self, method, **params):
        """One command of the protocol."""
        return self.loop.run_until_complete(self._send(method, **params))

    def run(self, code):
        """The value of an expression in the page; promises are waited for."""
        answer = self.send(
            "script.evaluate", expression=f"Promise.resolve({code}).then((v) => JSON.stringify(v) ?? 'null')",
            target={"context": self.context}, awaitPromise=True,
        )  # fmt: skip
        assert answer["type"] == "success", answer["exceptionDetails"]
        return json.loads(answer["result"]["value"])

    def open(self, address, until="document.readyState === 'complete'"):
        """Go to an address and wait until something holds; seconds that it took."""
        start = time.perf_counter()
        self.send("browsingContext.navigate", context=self.context, url=address, wait="none")
        self.wait(until)
        return time.perf_counter() - start

    def wait(self, condition, seconds=30):
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        asked = {"expression": f"!!({condition})", "target": {"context": self.context}, "awaitPromise": False}
        while True:
            answer = self.send("script.evaluate", **asked)  # throws on the way from one page to the next
            if answer.get("result", {}).get("value") is True:
                return
            assert time.monotonic() < deadline, f"{condition} did not come true; {self.errors}"
            time.sleep(0.02)

    def key(self, key):
        """Press a key."""
        keys = [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        self.send("input.performActions", context=self.context, actions=[{"type": "key", "id": "k", "actions": keys}])

    def screenshot(self, path):
        """What the window shows, as PNG."""
        found = self.send("browsingContext.captureScreenshot", context=self.context)
        Path(path).write_bytes(base64.b64decode(found["data"]))

    def close(self):
        """End the window and its process."""
        self.loop.run_until_complete(self._close())
        self.process.terminate()
        self.process.wait(20)

    async def _close(self):
        self.reader.cancel()
        await self.socket.close()
        await self.session.close()
