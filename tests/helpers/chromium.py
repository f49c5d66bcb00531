"""A headless Chromium over the DevTools protocol: what a page says, asks for and looks like."""

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Chromium:
    """One window. ``errors`` are what the console complains of or what throws, ``requests`` the addresses asked for."""

    def __init__(self, profile, size=(1440, 900), dark=False):
        if BINARY is None:
            pytest.skip("no chromium is installed: the browser is not tried in one")
        aiohttp = pytest.importorskip("aiohttp", reason="aiohttp speaks with chromium")
        self.errors, self.requests, self.dark = [], [], dark
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                 f"--window-size={size[0]},{size[1]}", f"--user-data-dir={profile}"]  # fmt: skip
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen([BINARY, *flags, "about:blank"], **quiet)
        file = Path(profile) / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (file.exists() and "\n" in file.read_text()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                pytest.skip("chromium does not start here")
            time.sleep(0.05)
        self.port = int(file.read_text().split()[0])
        self.loop, self.ids, self.waiting, self.loaded = asyncio.new_event_loop(), itertools.count(1), {}, None
        self.aiohttp = aiohttp
        self.loop.run_until_complete(self._connect(size))

    async def _connect(self, size):
        self.session = self.aiohttp.ClientSession()
        async with self.session.get(f"http://127.0.0.1:{self.port}/json") as answer:
            page = next(p for p in await answer.json() if p["type"] == "page")
        self.socket = await self.session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0)
        self.reader = self.loop.create_task(self._read())
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self._send(f"{domain}.enable")
        view = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        await self._send("Emulation.setDeviceMetricsOverride", **view)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}]
        await self._send("Emulation.setEmulatedMedia", features=scheme)

    async def _read(self):
        async for message in self.socket:
            said = json.loads(message.data)
            if said.get("id") in self.waiting:
                self.waiting.pop(said["id"]).set_result(said)
            what, of = said.get("method"), said.get("params", {})
            if what == "Runtime.exceptionThrown":
                self.errors.append(of["exceptionDetails"].get("exception", {}).get("description") or str(of))
            elif what == "Runtime.consoleAPICalled" and of["type"] in ("error", "assert"):
                self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in of["args"]))
            elif what == "Log.entryAdded" and of["entry"]["level"] == "error":
                self.errors.append(of["entry"]["text"] + " " + of["entry"].get("url", ""))
            elif what == "Network.requestWillBeSent":
                self.requests.append(of["request"]["url"])

    async def _send(self, method, **params):
        number = next(self.ids)
        self.waiting[number] = self.loop.create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        answer = await asyncio.wait_for(self.waiting[number], 60)
        assert "error" not in answer, answer
        return answer["result"]

    def send(self, method, **params):
        """One command of the protocol."""
        return self.loop.run_until_complete(self._send(method, **params))

    def run(self, code):
        """The value of an expression in the page; promises are waited for."""
        answer = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, address, until="document.readyState === 'complete'"):
        """Go to an address and wait until something holds; seconds that it took."""
        start = time.perf_counter()
        self.send("Page.navigate", url=address)
        self.wait(until)
        return time.perf_counter() - start

    def wait(self, condition, seconds=30):
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while True:
            answer = self.send("Runtime.evaluate", expression=f"!!({condition})", returnByValue=True)
            if answer["result"].get("value") is True:
                return
            assert time.monotonic() < deadline, f"{condition} did not come true; {self.errors}"
            time.sleep(0.02)

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

    def close(self):
        """End the window and its process."""
        self.loop.run_until_complete(self._close())
        self.process.terminate()
        self.process.wait(20)

    async def _close(self):
        self.reader.cancel()
        await self.socket.close()
        await self.session.close()


def type_(window, selector, text, event="input"):
    """Put a text into a field, as if it was typed."""
    window.run(f"""(i => {{ i.value = {json.dumps(text)}; i.dispatchEvent(new Event({json.dumps(event)})); }})
        (document.querySelector({json.dumps(selector)}))""")


def texts(window, selector):
    return window.run(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")
