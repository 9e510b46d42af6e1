"""A real browser for tests, driven over WebDriver's HTTP with the standard library alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = None if CHROMIUM and DRIVER else "needs chromium and chromedriver"
_ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser:
    """A headless Chromium of its own, without a profile; a context manager that ends it."""

    def __init__(self, *, width, profile):
        metrics = {"width": width, "height": 844, "pixelRatio": 1.0, "touch": width < 600, "mobile": width < 600}
        self._options = {
            "binary": CHROMIUM,
            "args": [*_ARGUMENTS, f"--user-data-dir={profile}", "about:blank"],
            "mobileEmulation": {"deviceMetrics": metrics},
        }

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._url = f"http://127.0.0.1:{port}"
        self._driver = subprocess.Popen(
            [DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            self._wait_for_driver()
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": self._options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            session = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self._url += f"/session/{session['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise
        return self

    def __exit__(self, *_):
        with contextlib.suppress(OSError):
            self._ask("DELETE", "")
        self._driver.terminate()
        self._driver.wait(10)

    def open(self, url):
        self._ask("POST", "/url", {"url": url})

    def run(self, script):
        """What a function body returns, run from outside of the page's own policy."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": []})

    def devtools(self, command, **parameters):
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self):
        """Lines of the console, so far not read."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def requests(self):
        """{address: why it was blocked, or None} of what pages asked for, so far not read; the browser's own aside."""
        entries = self._ask("POST", "/se/log", {"type": "performance"})
        messages = [json.loads(entry["message"])["message"] for entry in entries]
        asked = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        failed = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
        blocked = {failure["requestId"]: failure.get("blockedReason") for failure in failed}
        urls = [(request["request"]["url"], blocked.get(request["requestId"])) for request in asked]
        return {url: why for url, why in urls if not url.startswith(("chrome:", "chrome-untrusted:"))}

    def _ask(self, method, path, body=None):
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as response:
            return json.load(response)["value"]

    def _wait_for_driver(self):
        for _ in range(200):
            with contextlib.suppress(OSError):
                if self._ask("GET", "/status")["ready"]:
                    return
            time.sleep(0.05)
        raise RuntimeError("chromedriver did not start")
