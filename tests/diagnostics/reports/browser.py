"""A page in headless Chromium, without a driver: a script is put into a copy of it, and what it finds is read back."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["run_in_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=8000"
)
_HEIGHT = 800

# Before anything of the page runs: what goes wrong is kept.
_WATCH = """
window.faults = [];
addEventListener("error", (event) => faults.push(event.message));
addEventListener("unhandledrejection", (event) => faults.push(String(event.reason)));
addEventListener("securitypolicyviolation", (event) => faults.push(`${event.violatedDirective} ${event.blockedURI}`));
console.error = (...words) => faults.push(words.join(" "));
"""
# The script gets a few short names, and gives an object; a page in a frame has any width, a window has 500 at least.
_ASK = """
addEventListener("load", async () => {
  const get = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  const wait = () => new Promise((resolve) => setTimeout(resolve, 100));
  const give = parent.document.body;
  let result;
  try {
    await wait();
    result = await (async () => { SCRIPT })();
  } catch (error) {
    faults.push(String(error));
  }
  const requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  const pre = parent.document.createElement("pre");
  pre.id = "result";
  pre.textContent = JSON.stringify({ result, faults, requests });
  give.replaceChildren(pre);
});
"""


def run_in_browser(page: str, script: str, *, width: int = 1200, is_dark: bool = False) -> Any:
    """Run a script in a page, and check that the page makes no error and asks for nothing.

    Args:
        page: HTML.
        script: body of an async function with `get`, `all` (selectors) and `wait()`; it returns something for JSON.
        width: of the page, in pixels.
        is_dark: whether the user prefers dark pages.

    Returns:
        Of the script.
    """
    browser = next(filter(None, map(shutil.which, _NAMES)), None)
    assert browser is not None, (
        "a Chromium is needed for this test: `apt-get install chromium`, or Google Chrome; see CONTRIBUTING.md"
    )

    scripts = [_WATCH, _ASK.replace("SCRIPT", script)]
    hashes = [base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    copy = page.replace("script-src ", f"script-src {allowed} ", 1)
    copy = copy.replace("<title>", f"<script>{scripts[0]}</script><script>{scripts[1]}</script><title>", 1)
    frame = f'<iframe style="border:0" width="{width}" height="{_HEIGHT}" srcdoc="{html.escape(copy)}"></iframe>'

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = Path(folder) / "page.html"
        file.write_text(f"<!doctype html><body>{frame}</body>", encoding="utf-8")
        flags = [*_FLAGS.split(), f"--user-data-dir={folder}/user", f"--window-size={max(width, 500)},{_HEIGHT}"]
        flags += ["--blink-settings=preferredColorScheme=0"] if is_dark else []
        dumped = _run([browser, *flags, "--dump-dom", file.as_uri()])

    match = re.search(r'<pre id="result">(.*?)</pre>', dumped, re.DOTALL)
    assert match is not None, "the page was not loaded, or its script did not end"
    answer = json.loads(html.unescape(match[1]))
    assert not answer["faults"], answer["faults"]
    assert not answer["requests"], answer["requests"]
    return answer["result"]


def _run(command: list[str]) -> str:
    """What a command prints; it and what it started end with it."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen(command, start_new_session=True, encoding="utf-8", **streams)
    try:
        return process.communicate(timeout=60)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
