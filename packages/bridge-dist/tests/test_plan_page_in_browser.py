"""The HTML page of a plan in a headless browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from example_plans import GIB, LARGE, sizes

from bridge.dist.plan.results import Plan
from bridge.dist.plan.show.page import render_page

_BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chromium-browser", "chrome")
_BROWSER = next((path for path in map(shutil.which, _BROWSERS) if path), None)

_WATCH = """<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("securitypolicyviolation", event => problems.push(event.violatedDirective));
</script>"""
_PROBE = """<script>
const box = element => { const { left, right, width, height } = element.getBoundingClientRect();
  return { left, right, width, height }; };
document.querySelector("button[data-table=table-stages]").click();
const found = {
  title: document.title,
  page: getComputedStyle(document.body).backgroundColor,
  text: getComputedStyle(document.querySelector("svg text")).fill,
  stages: [...document.querySelectorAll("#memory g.stage")].map(g => [...g.querySelectorAll("rect")].map(box)),
  limit: box(document.querySelector("#memory line.limit")),
  passes: [...document.querySelectorAll("#schedule g.pass rect")].map(box),
  bubble: getComputedStyle(document.querySelector("#schedule rect.bubble")).fill,
  copied: getSelection().toString(),
  buttons: [...document.querySelectorAll("button")].map(button => button.hidden),
  overflows: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  resources: performance.getEntriesByType("resource").length,
};
const probe = document.createElement("pre");
probe.id = "probe";
document.body.append(probe);
// Before the browser writes the page out, which it does once it is loaded; a frame may never be drawn.
addEventListener("load", () => { probe.textContent = JSON.stringify({ ...found, problems }); });
</script>"""


def _open_page(plan: Plan, folder: Path, *, dark: bool) -> dict[str, Any]:
    """Open the page of a plan in a browser and return the values that the probe script found."""
    assert _BROWSER is not None
    file = folder / "plan.html"
    text = render_page(plan, "a <b> model")
    file.write_text(text.replace("<head>", f"<head>{_WATCH}").replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1400", "--dump-dom"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=1000", scheme, file.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
    assert probe is not None, dumped[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(probe[1]))
    return found


@pytest.mark.skipif(_BROWSER is None, reason=f"no browser of {', '.join(_BROWSERS)} is installed")
def test_a_browser_shows_the_pictures_in_light_and_dark_mode(tmp_path: Path) -> None:
    light, dark = (_open_page(LARGE, tmp_path, dark=scheme) for scheme in (False, True))
    assert light["page"] == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", dark["page"]))) < 150
    assert sum(map(int, re.findall(r"\d+", dark["text"]))) > 600

    assert light["title"] == "Plan of a <b> model"
    assert light["problems"] == []
    assert light["resources"] == 0
    assert not light["overflows"]
    assert not any(light["buttons"])

    start = light["stages"][0][0]["left"]
    per_gib = (light["limit"]["left"] + light["limit"]["width"] / 2 - start) / 80
    assert len(light["stages"]) == 16
    for drawn, stage in zip(light["stages"], LARGE.stages, strict=True):
        assert [one["width"] / per_gib for one in drawn] == pytest.approx(
            [size / GIB for size in sizes(stage)], abs=0.2
        )
        assert drawn[-1]["right"] == pytest.approx(start + stage.total_bytes / GIB * per_gib, abs=1)
    assert len(light["passes"]) == 16 * 8 * 2
    assert min(one["width"] for one in light["passes"]) > 10
    assert "#hatch" in light["bubble"]

    copied = [line.split("\t") for line in light["copied"].strip().splitlines()]
    worst = LARGE.stages[0]
    first = dict(zip(copied[0], copied[1], strict=True))
    assert first["total"].strip() == str(worst.total_bytes)
    assert len(copied) == 17
