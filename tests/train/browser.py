"""A real browser for tests: a headless Chromium, driven by Selenium."""

from __future__ import annotations

import json
import shutil

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

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
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class Browser(webdriver.Chrome):
    """A Chromium with a window of ``width`` pixels; below 600 it is a phone."""

    def __init__(self, width):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in _ARGUMENTS:
            options.add_argument(argument)
        metrics = {"width": width, "height": 844, "pixelRatio": 1.0, "touch": width < 600, "mobile": width < 600}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        super().__init__(options=options, service=Service(DRIVER))

    def run(self, script):
        """Return what a function body returns; the page's content security policy does not apply to it."""
        return self.execute_script(script)

    def console(self):
        """Return the new lines of the console."""
        return [entry["message"] for entry in self.get_log("browser")]

    def requests(self):
        """Return {address: why it was blocked, or None} of the page's new requests."""
        messages = [json.loads(entry["message"])["message"] for entry in self.get_log("performance")]
        sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        failed = [m["params"] for m in messages if m["method"] == "Network.loadingFailed"]
        blocked = {failure["requestId"]: failure.get("blockedReason") for failure in failed}
        urls = [(request["request"]["url"], blocked.get(request["requestId"])) for request in sent]
        return {url: why for url, why in urls if not url.startswith(("chrome:", "chrome-untrusted:", "about:"))}
