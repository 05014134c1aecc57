"""Debian's Chromium, driven over a pipe with DevTools' protocol: no package, no port."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HIDDEN = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--no-first-run", "--mute-audio"]


class Chromium:
    """One browser with one page; what the page says and asks for is kept in `events`."""

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="limbeck-chromium-")
        theirs_in, self.to = os.pipe()
        self.back, theirs_out = os.pipe()
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]

        def third_and_fourth():
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [PROGRAM, *HIDDEN, *QUIET, "--remote-debugging-pipe", f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=third_and_fourth,
            pass_fds=(3, 4),
        )
        for end in (theirs_in, theirs_out, *ends):
            os.close(end)
        self.events, self.rest, self.count, self.session = [], b"", 0, None
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        os.close(self.to)
        self.process.terminate()
        self.process.wait(30)
        os.close(self.back)
        shutil.rmtree(self.folder, ignore_errors=True)

    def call(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (found := self.read()).get("id") != self.count:
            self.events.append(found)
        assert "error" not in found, found["error"]
        return found["result"]

    def read(self):
        while b"\0" not in self.rest:
            part = os.read(self.back, 1 << 20)
            assert part, "the browser has gone"
            self.rest += part
        message, self.rest = self.rest.split(b"\0", 1)
        return json.loads(message)

    def run(self, script):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def open(self, path, width, scheme):
        """Show a file in a window that wide, in a scheme of colours."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        deadline = time.monotonic() + 60
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            assert time.monotonic() < deadline, "the page did not load"
            self.events.append(self.read())

    def picture(self, path):
        """Keep the whole page as a PNG."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(found["data"]))

    def problems(self):
        """What the page complained of, and what it asked of any host."""
        found = []
        for event in self.events:
            method, facts = event.get("method"), event.get("params", {})
            if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(facts)
            elif method == "Network.requestWillBeSent":
                address = facts["request"]["url"]
                if not address.startswith(("file:", "data:")):
                    found.append(address)
        return found
