"""The report as text, as JSON, and as a page in a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from ldm.evaluation.figures import Figure
from ldm.evaluation.report import Curve, Pictures, Report, Table, table, write_json

HOSTILE = '<script>console.error("run")</script> "quoted" & {body}'


def example() -> Report:
    """Every kind of part, with text that a careless page would run."""
    figures = [Figure(name, value, value - 0.1, value + 0.2, 64) for name, value in
               (("small", 0.5), ("large", 12.0), ("middle", 3.0))]  # fmt: skip
    rows = [[f.name, f, i, "yes" if i else ""] for i, f in enumerate(figures)]
    colours = ["red", "green", "blue"] * 4
    pictures = [(Image.new("RGB", (32, 32), c), {"prompt": f"{c} {HOSTILE}", "seed": i, "steps": 2})
                for i, c in enumerate(colours)]  # fmt: skip
    points = [(float(i + 1), f, f"{i}") for i, f in enumerate(figures)]
    parts = [
        Table("A table", ["name", "figure", "count", "Pareto"], [*rows, ["chance", 0.001, 7, HOSTILE]], "A note."),
        Curve("A curve", "passes", "figure", {"ddim": points, "heun": points[::-1]}),
        Pictures("Pictures", pictures),
        Pictures("Side by side", pictures[:4], ["one", HOSTILE]),
    ]
    return Report(f"A report {HOSTILE}", f"ldm evaluate {HOSTILE}", parts, {"figures": figures})


def test_a_table_is_aligned_markdown() -> None:
    assert table(["a", "value"], [["x", 0.12345], ["long", 3]]) == (
        "| a    | value   |\n|------|---------|\n| x    | 0.123   |\n| long | 3       |\n"
    )


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="give one a column"):
        table(["a", "b"], [["x"]])


def test_a_figure_is_written_with_its_interval_in_as_many_places_as_it_needs() -> None:
    assert str(Figure("x", 0.4333, 0.2321, 0.6489, 60)) == "0.433 (0.232 to 0.649)"
    assert str(Figure("x", 0.00012, 0.00011, 0.00013, 60)) == "0.000120 (0.000110 to 0.000130)"
    # Of images that are all alike a bootstrap knows no interval, and none is made up.
    assert str(Figure("x", 0.0, 0.0, 0.0, 39)) == "0.000 (all 39 alike)"
    assert str(Figure("x", 9.0, 8.0, 10.0, 6, "n=6 < 2048: biased")) == "9.000 (8.000 to 10.000) [n=6 < 2048: biased]"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    write_json(path, {"a": [1, Figure("x", 1.0, 0.5, 2.0, 3)], "ü": None})
    with pytest.raises(ValueError, match=r"result\.json: a result is NaN"):
        write_json(path, {"a": math.nan})
    found = json.loads(path.read_text("utf-8"))
    assert found["a"][1]["low"] == 0.5
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_the_page_loads_nothing_and_runs_no_text_that_it_shows() -> None:
    page = example().html()
    assert page.count("<script>") == 1  # its own
    assert html.escape(HOSTILE) in page
    loads = re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]+)\)|@import""", page)
    assert loads
    assert all(link.startswith(("data:", "#")) for pair in loads for link in pair if link)


# ------------------------------------------------------------------------------------------ in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here: apt-get install chromium (.ci/run does), then run again"
)
# Plays a reader: sorts the table up and down by its figures, by its text, opens a picture, closes it.
READER = """<script>
"use strict";
const seen = {};
const column = i => [...document.querySelectorAll("tbody tr")].map(row => row.cells[i].firstChild?.textContent ?? "");
const heads = document.querySelectorAll("th button");
seen.start = column(0);
heads[1].click(); seen.up = column(0); seen.sorted = heads[1].closest("th").getAttribute("aria-sort");
heads[1].click(); seen.down = column(0);
heads[0].click(); seen.text = column(0);
const dialog = document.querySelector("dialog");
seen.before = dialog.open;
document.querySelectorAll(".grid button")[4].click();
seen.opened = dialog.open && dialog.querySelector("img").getBoundingClientRect().width;
seen.top = dialog.scrollTop;
seen.small = document.querySelector(".grid img").getBoundingClientRect().width;
seen.about = [...dialog.querySelectorAll("dt")].map(dt => [dt.textContent, dt.nextSibling.textContent]);
dialog.querySelector("button").click();
seen.closed = !dialog.open;
seen.images = [...document.images].filter(image => image.src && !(image.complete && image.naturalWidth)).length;
seen.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const beside = document.querySelectorAll(".grid")[1];
seen.columns = getComputedStyle(beside).gridTemplateColumns.split(" ").length;
seen.heads = [...beside.querySelectorAll("b")].map(head => head.textContent);
document.body.dataset.seen = JSON.stringify(seen);
</script>"""


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The page's elements after its scripts have run, and what the browser's console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
               f"--user-data-dir={page.parent / 'profile'}", *options, page.as_uri()]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)


@needs_browser
@pytest.mark.parametrize("size", ["1280,900", "500,844"])
def test_in_a_browser_tables_sort_a_picture_opens_and_the_console_is_silent(tmp_path: Path, size: str) -> None:
    page = tmp_path / "report.html"
    page.write_text(example().html().replace("</body>", f"{READER}</body>"), "utf-8")
    dom, console = browse(page, f"--window-size={size}", "--dump-dom")
    assert console == ""
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found, dom[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["start"] == ["small", "large", "middle", "chance"]
    assert seen["up"] == ["chance", "small", "middle", "large"]
    assert seen["sorted"] == "ascending"
    assert seen["down"] == ["large", "middle", "small", "chance"]
    assert seen["text"] == ["chance", "large", "middle", "small"]
    assert not seen["before"]
    assert seen["opened"] > 2 * seen["small"] > 0
    assert seen["about"] == [["prompt", f"green {HOSTILE}"], ["seed", "4"], ["steps", "2"]]
    assert seen["top"] == 0  # the picture is in sight
    assert seen["closed"]
    assert (seen["columns"], seen["heads"]) == (2, ["one", HOSTILE])
    assert seen["images"] == 0  # none is broken
    assert seen["wide"] == 0  # the page itself never scrolls sideways; wide tables do within


@needs_browser
def test_the_test_would_see_an_error_of_the_console(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(example().html().replace("</body>", "<script>undefinedName()</script></body>"), "utf-8")
    assert "undefinedName" in browse(page, "--dump-dom")[1]
