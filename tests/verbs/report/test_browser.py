"""The page in headless Chromium: what only a browser can tell. Every frame of one window is a test's view of it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

# Runs in each frame once it is loaded, and sends what it saw to the window around it. JOB is the frame's own script.
PROBE = """<script>
addEventListener("load", () => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const gallery = document.querySelector("[data-gallery]");
  const look = () => ({
    photos: [...gallery.querySelectorAll(".row:not([hidden])")].map((row) => row.getAttribute("aria-label")),
    boxes: [...gallery.querySelectorAll(".row:not([hidden]) .shot:not(:nth-of-type(1)) g[data-c]:not(.off)")]
      .map((mark) => [mark.dataset.c, mark.dataset.e]),
    status: gallery.querySelector(".filtered").textContent,
    hash: location.hash,
  });
  const seen = JOB;
  parent.postMessage({ name: "NAME", seen }, "*");
});
</script></body>"""
JOBS = {
    "desktop": """(() => {
      all(".shot svg")[0].dispatchEvent(new Event("click"));
      const box = document.querySelector(".lightbox");
      const first = box.querySelector(".caption").textContent;
      box.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
      return {
        figures: all("svg.figure").filter((chart) => chart.getBBox().width > 50).length,
        enlarged: box.open, moved: box.querySelector(".caption").textContent !== first,
        requests: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length,
        labelled: all(".filters select").map((select) => select.labels.length),
        reachable: all(".filters select, .filters button").every((e) => e.tabIndex === 0),
        ...look(),
      };
    })()""",
    "phone": """(() => {
      all("details").forEach((d) => { d.open = true; });
      const root = document.documentElement;
      return {
        wide: root.scrollWidth - root.clientWidth, width: innerWidth,
        out: all("main *").filter((e) => !e.closest(".scroll, svg, pre"))
          .filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => `${e.tagName} ${e.className}`),
      };
    })()""",
    "linked": "look()",
    "unknown": "look()",
    "chosen": """(() => {
      const form = gallery.querySelector(".filters");
      form.elements.error.value = "FalseNeg";
      form.elements.error.dispatchEvent(new Event("change", { bubbles: true }));
      const shown = look();
      all(".row:not([hidden]) .shot svg")[0].dispatchEvent(new Event("click"));
      const box = document.querySelector(".lightbox");
      const captions = new Set();
      for (let k = 0; k < 100; k += 1) {
        captions.add(box.querySelector(".caption").textContent.split(":")[0]);
        box.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
      }
      return { ...shown, captions: [...captions] };
    })()""",
    "paper": """(() => {
      dispatchEvent(new Event("beforeprint"));
      return { open: all("details").every((d) => d.open) };
    })()""",
}
HASHES = {"linked": "#class=disc&error=Miss", "unknown": "#class=unicorn&error=nonsense"}
WIDTHS = {"phone": 360}


def chromium(folder: Path, *switches: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    always = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    always += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
    done = subprocess.run(
        [CHROMIUM, *always, f"--user-data-dir={folder / 'profile'}", *switches],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    return done


@pytest.fixture(scope="module")
def seen(study_page: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each frame saw, by its name."""
    folder = tmp_path_factory.mktemp("browser")
    source = study_page.read_text(encoding="utf-8")
    frames = []
    for name, job in JOBS.items():
        probe = PROBE.replace("JOB", job).replace("NAME", name)
        (folder / f"{name}.html").write_text(source.replace("</body>", probe), encoding="utf-8")
        place = f"{name}.html{html.escape(HASHES.get(name, ''))}"
        frames.append(f'<iframe src="{place}" width="{WIDTHS.get(name, 1200)}" height="900"></iframe>')
    (folder / "window.html").write_text(
        '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><pre id="seen"></pre><script>'
        'const seen = document.querySelector("#seen");'
        'addEventListener("message", (e) => { seen.textContent += JSON.stringify(e.data) + "\\n"; });'
        f"</script>{''.join(frames)}",
        encoding="utf-8",
    )
    done = chromium(folder, "--virtual-time-budget=10000", "--dump-dom", (folder / "window.html").as_uri())
    text = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert text is not None
    told = [json.loads(line) for line in html.unescape(text[1]).splitlines()]
    return {one["name"]: one["seen"] for one in told}


def test_it_opens_without_errors_or_requests(seen: dict[str, Any], study_page: Path) -> None:
    desktop = seen["desktop"]
    assert set(seen) == set(JOBS)
    assert desktop["figures"] == study_page.read_text(encoding="utf-8").count('<svg class="figure"')
    assert desktop["requests"] == 0
    assert desktop["enlarged"]
    assert desktop["moved"]


def test_all_is_shown_until_something_is_chosen(seen: dict[str, Any]) -> None:
    assert len(seen["desktop"]["photos"]) == 6
    assert (seen["desktop"]["status"], seen["desktop"]["hash"]) == ("", "")
    assert {kind for _, kind in seen["desktop"]["boxes"]} >= {"correct", "Miss", "wrong", "Bkg"}
    assert seen["desktop"]["labelled"] == [1, 1]
    assert seen["desktop"]["reachable"]
    assert seen["unknown"]["photos"] == seen["desktop"]["photos"]


def test_nothing_is_wider_than_a_phone(seen: dict[str, Any]) -> None:
    assert seen["phone"] == {"wide": 0, "width": 360, "out": []}


def test_a_link_chooses(seen: dict[str, Any]) -> None:
    """Class 1 is "disc"; photos in which none of its boxes is of the kind are gone, other boxes are dim."""
    wanted = [box for box in seen["desktop"]["boxes"] if box == ["1", "Miss"]]
    assert seen["linked"]["boxes"] == wanted
    assert wanted
    assert 0 < len(seen["linked"]["photos"]) < 6
    boxes = f"{len(wanted)} box{'' if len(wanted) == 1 else 'es'}"
    assert (
        seen["linked"]["status"] == f"Shown: class disc, Miss; {boxes} in {len(seen['linked']['photos'])} of 6 photos."
    )
    assert seen["linked"]["hash"] == HASHES["linked"]


def test_a_choice_becomes_a_link_and_arrows_keep_to_it(seen: dict[str, Any]) -> None:
    chosen = seen["chosen"]
    wanted = [box for box in seen["desktop"]["boxes"] if box[1] in ("Miss", "wrong")]
    assert chosen["boxes"] == wanted
    assert {kind for _, kind in wanted} == {"Miss", "wrong"}
    assert chosen["hash"] == "#error=FalseNeg"
    assert set(chosen["photos"]) <= set(chosen["captions"])


def test_on_paper_everything_is_unfolded(seen: dict[str, Any], study_page: Path, tmp_path: Path) -> None:
    assert seen["paper"] == {"open": True}
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", "--no-pdf-header-footer", study_page.as_uri())
    pdf = (tmp_path / "page.pdf").read_bytes()
    stored = study_page.read_text(encoding="utf-8").count("<image ")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
    assert len(re.findall(rb"/Subtype\s*/Image", pdf)) >= stored
