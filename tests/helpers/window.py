"""A window of a headless browser, driven over a protocol of commands and events in JSON."""

import asyncio
import itertools
import json
import subprocess
import time

import pytest


class Window:
    """What both browsers do alike. ``errors`` are what the console complains of or what throws, ``requests`` the
    addresses asked for.

    Args:
        name: What the browser is called.
        command: How it is started; its first part is None where it is not installed.
        address: Gives the address of its socket once it listens, before that nothing.
        output: Where what it prints goes.
    """

    def __init__(self, name, command, address, output=subprocess.DEVNULL):
        if command[0] is None:
            pytest.skip(f"no {name} is installed: the browser is not tried in one")
        self.aiohttp = pytest.importorskip("aiohttp", reason=f"aiohttp speaks with {name}")
        self.errors, self.requests = [], []
        self.process = subprocess.Popen([*command, "about:blank"], stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while not (found := address()):
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                pytest.skip(f"{name} does not start here")
            time.sleep(0.05)
        self.loop, self.ids, self.waiting = asyncio.new_event_loop(), itertools.count(1), {}
        self.loop.run_until_complete(self._connect(found))

    def heard(self, what, of):
        """Take note of an event and its parameters."""
        raise NotImplementedError

    def value(self, code):
        """The value of an expression in the page, now; None where it throws."""
        raise NotImplementedError

    def go(self, address):
        """Go to an address, without waiting."""
        raise NotImplementedError

    async def _connect(self, address):
        self.session = self.aiohttp.ClientSession()
        self.socket = await self.session.ws_connect(address, max_msg_size=0)
        self.reader = self.loop.create_task(self._read())

    async def _read(self):
        async for message in self.socket:
            said = json.loads(message.data)
            if said.get("id") in self.waiting:
                self.waiting.pop(said["id"]).set_result(said)
            self.heard(said.get("method"), said.get("params", {}))

    async def _send(self, method, params):
        number = next(self.ids)
        self.waiting[number] = self.loop.create_future()
        await self.socket.send_json({"id": number, "method": method, "params": params})
        return await asyncio.wait_for(self.waiting[number], 60)

    def send(self, method, **params):
        """The result of one command of the protocol."""
        answer = self.loop.run_until_complete(self._send(method, params))
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, address, until="document.readyState === 'complete'"):
        """Go to an address and wait until something holds; seconds that it took."""
        start = time.perf_counter()
        self.go(address)
        self.wait(until)
        return time.perf_counter() - start

    def wait(self, condition, seconds=30):
        """Wait until an expression is true."""
        deadline = time.monotonic() + seconds
        while self.value(f"!!({condition})") is not True:
            assert time.monotonic() < deadline, f"{condition} did not come true; {self.errors}"
            time.sleep(0.02)

    def forget(self):
        """Leave the page, and forget what it said and asked for, also while it was left."""
        self.open("about:blank", "location.href === 'about:blank'")
        time.sleep(0.1)
        self.value("0")  # events are read while an answer is waited for
        self.errors.clear(), self.requests.clear()

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
