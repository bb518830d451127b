"""A page in headless Chromium, at several widths at once: what a script in it finds there."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FRAMED = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<script>
const found = {{}};
addEventListener("message", event => {{
  found[event.data.width] = event.data;
  if (Object.keys(found).length === {count}) {{
    const all = document.createElement("pre");
    all.id = "found";
    all.textContent = JSON.stringify(found);
    document.body.replaceChildren(all);
  }}
}});
</script>
{frames}"""
_FIRST = "<script>const errors = []; addEventListener('error', event => errors.push(String(event.message)));</script>"
_LAST = """<script>
addEventListener("load", async () => {
  await document.fonts.ready;
  const width = innerWidth;
  parent.postMessage({width, errors, ...(%s)()}, "*");
});
</script>"""


def look(page: Path, widths: Sequence[int], script: str) -> dict[int, dict[str, Any]]:
    """What ``script``, a JavaScript function, returns in ``page`` at each of the widths; ``errors`` are the page's own.

    There is no network for the page, whatever it asks for.
    """
    assert CHROMIUM is not None
    text = page.read_text(encoding="utf-8")
    watched = page.with_name("watched.html")
    watched.write_text(text.replace("<head>", f"<head>{_FIRST}", 1) + _LAST % script, encoding="utf-8")
    frames = "".join(
        f'<iframe src="watched.html" width="{width}" height="900" frameborder="0"></iframe>' for width in widths
    )
    framed = page.with_name("framed.html")
    framed.write_text(_FRAMED.format(count=len(widths), frames=frames), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={page.parent / 'profile'}",
    ]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--window-size=1600,1000"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", framed.as_uri()], capture_output=True, text=True, timeout=120
    )
    (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL) or [done.stderr[-2000:]]
    return {int(width): told for width, told in json.loads(html.unescape(found)).items()}
