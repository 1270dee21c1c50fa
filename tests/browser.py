"""Pages of this package in headless Chromium."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# The body of a probe fills `found`. What it found, or its error, stands in the page afterwards.
_PROBE = """
(async () => {
  const found = { title: document.title };
  try {
%s
  } catch (error) { found.error = String(error); }
  const out = document.createElement("pre"); out.id = "probe"; out.textContent = JSON.stringify(found);
  document.body.append(out);
})();
"""


def probed(page: Path, body: str, *, width: int = 1280, height: int = 900) -> tuple[dict[str, Any], str]:
    """Opens a page, runs JavaScript in it, and returns what that found with the browser's messages.

    Args:
        page: The HTML file, whose policy allows a script that is known by its hash.
        body: Statements that fill the object `found`.
        width: The width of the window in CSS pixels.
        height: Its height.
    """
    assert CHROMIUM is not None
    folder, script = page.parent, _PROBE % body
    # The page's policy allows its own script only; the probe is let in beside it.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text, count = re.subn("(script-src 'sha256-[^']+')", rf"\1 'sha256-{digest}'", page.read_text())
    assert count == 1
    copy = folder / f"probe_{width}.html"
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", "--no-first-run", f"--user-data-dir={folder}/profile"]
    command += ["--enable-logging=stderr", f"--window-size={width},{height}", "--virtual-time-budget=30000"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    probe = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert probe is not None
    found: dict[str, Any] = json.loads(html.unescape(probe[1]))
    assert "error" not in found, found["error"]
    return found, done.stderr
