"""The HTML page of a plan in a headless browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_plans import GIB, LARGE

from bridge.dist.formatting import format_seconds
from bridge.dist.plan.forecast.machine import list_machines, load_machine
from bridge.dist.plan.forecast.step_time import estimate_time, make_timeline
from bridge.dist.plan.forecast.variants import vary_memory
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
const set = (id, value) => {
  const input = document.getElementById(id);
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
};
const shown = () => [...document.querySelectorAll("[data-value]")].map(one => one.textContent);
const countCanvases = node => [...node.querySelectorAll("*")].reduce(
  (number, one) => number + (one.tagName === "CANVAS") + (one.shadowRoot ? countCanvases(one.shadowRoot) : 0), 0);
const pen = document.createElement("canvas").getContext("2d");
pen.font = "12px system-ui, sans-serif";
// Pixels that are left beside the labels of bars, at least.
const measureRoom = chart => {
  const { size, label } = chart.renderers[0].data_source.data, { start, end } = chart.x_range;
  return Math.min(...size.map((value, index) =>
    (end - value) / (end - start) * chart.inner_width - 5 - pen.measureText(label[index]).width));
};
const probe = document.createElement("pre");
probe.id = "probe";
document.body.append(probe);
const report = () => {
  if (!("ready" in document.body.dataset)) return setTimeout(report, 20);
  document.querySelector("button[data-copy=table-stages]").click();
  const found = {
    title: document.title,
    page: getComputedStyle(document.body).backgroundColor,
    labels: Bokeh.documents[0].roots()[0].left[0].major_label_text_color,
    charts: [...document.querySelectorAll("[data-chart]")].map(
      one => [one.dataset.chart, one.clientWidth, countCanvases(one)]),
    planned: shown(),
    numbered: models("labels")[0].data.label.length,
    copied: getSelection().toString(),
    hidden: [...document.querySelectorAll("button, form")].some(one => one.hidden),
    overflows: document.documentElement.scrollWidth > document.documentElement.clientWidth,
    resources: performance.getEntriesByType("resource").length,
  };
  set("machine", 1);
  set("count", 2);
  found.other = shown();
  found.memory = [...models("memory")[0].data.end];
  found.limit = models("limit")[0].location;
  document.querySelector("button[data-jump=end]").click();
  found.end = models("window")[0].end;
  document.querySelector("button[type=reset]").click();
  setTimeout(() => {
    found.again = shown();
    const charts = Bokeh.documents.flatMap(one => one.roots()).filter(one => one.x_range?.name === "padded");
    found.room = charts.map(measureRoom);
    probe.textContent = JSON.stringify({ ...found, problems });
  }, 50);
};
report();
</script>"""


def _open_page(text: str, folder: Path, *, dark: bool, width: int) -> dict[str, Any]:
    """Open a page in a browser and return the values that the probe script found."""
    assert _BROWSER is not None
    file = folder / "plan.html"
    file.write_text(text.replace("<head>", f"<head>{_WATCH}").replace("</body>", f"{_PROBE}</body>"), encoding="utf-8")
    command = [_BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1400", "--dump-dom"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=5000", scheme, file.as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    probe = re.search(r'<pre id="probe">(.*?)</pre>', dumped, re.DOTALL)
    assert probe is not None, dumped[-2000:]
    found: dict[str, Any] = json.loads(html.unescape(probe[1]))
    return found


@pytest.mark.skipif(_BROWSER is None, reason=f"no browser of {', '.join(_BROWSERS)} is installed")
def test_a_browser_shows_the_page_wide_and_light_narrow_and_dark(tmp_path: Path) -> None:
    machine = load_machine("h100")
    plan = replace(LARGE, time=estimate_time(LARGE, machine))
    text = render_page(plan, "a <b> model", machine=machine)
    light = _open_page(text, tmp_path, dark=False, width=1200)
    dark = _open_page(text, tmp_path, dark=True, width=500)
    assert light["page"] == "rgb(255, 255, 255)"
    assert sum(map(int, re.findall(r"\d+", dark["page"]))) < 150
    assert (light["labels"], dark["labels"]) == ("#1b1f24", "#e6e9ec")
    for found, narrow, wide in ((light, 900, 1200), (dark, 400, 500)):
        assert found["title"] == "Plan of a <b> model"
        assert found["problems"] == []
        assert found["resources"] == 0
        assert not found["overflows"]
        assert not found["hidden"]
        assert [name for name, _, _ in found["charts"]] == ["memory", "time", "schedule", "traffic"]
        assert all(narrow < width < wide and canvases for _, width, canvases in found["charts"])
        assert len(found["room"]) == 2
        assert min(found["room"]) > 0
        assert found["numbered"] > 50
        _check_choices(plan, found)
        copied = [line.split("\t") for line in found["copied"].strip().splitlines()]
        assert dict(zip(copied[0], copied[1], strict=True))["total"].strip() == str(LARGE.stages[0].total_bytes)
        assert len(copied) == 17


def _check_choices(plan: Plan, found: dict[str, Any]) -> None:
    """Check what the page shows with the second machine and the third number of microbatches: 32, planned are 8."""
    name = next(name for name in list_machines() if name != "h100")
    machine = load_machine(name)
    time = estimate_time(plan, machine, microbatches=32)
    assert format_seconds(time.step_seconds) in found["other"]
    assert f"{machine.memory / GIB:,.3f} GiB" in found["other"]
    assert found["limit"] == pytest.approx(machine.memory / GIB)
    stages = vary_memory(plan, [32])[0]
    assert found["memory"] == pytest.approx([(stage.total_bytes + plan.reserve_bytes) / GIB for stage in stages])
    assert found["end"] == pytest.approx(make_timeline(plan, load_machine("h100")).length)
    assert found["again"] == found["planned"] != found["other"]
