"""Size, loading time and frames per second of the page of `sedd-graph view`, measured in headless Chromium.

    python benchmarks/view.py [--chromium PATH] [--seconds 6]

Each case is a trajectory of 256 steps and 1,024 tokens with confidences: `masked` (tokens appear once), `uniform` (two of a hundred tokens
change in a step) and `strings` (tokens are inserted and deleted, and slide). `load_ms`: from the start of the navigation until the first frame of the film is laid
out and painted. `refreshes` and `frames`: refreshes of the screen and frames of the film per second while the film plays twice as fast as it
does by default (64 frames are due in a second). `longest_ms`: the longest time between two refreshes. A machine that is busy with other work makes these
numbers worse; the processor's time does not depend on it: `load_cpu_ms` of the page's main thread until the first frame is painted, and
`frame_cpu_ms` of it, and `frame_process_ms` of all threads that draw the page, for one frame of the film, over all 256. Appends a record to benchmarks/results/view.jsonl.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from common import append_record
from playwright.sync_api import sync_playwright
from sedd_graph_registry.data.tokenizers import Bytes

from sedd_graph.engine.hardware import describe_hardware, pick_device
from sedd_graph.report.view import write_view
from sedd_graph.store.arrays import write_samples
from sedd_graph.store.files import write_text

STEPS, LENGTH, MASK, START = 256, 1024, 257, 258
Ids = npt.NDArray[np.int64]

PAINTED = "new Promise(r => requestAnimationFrame(() => setTimeout(() => r(performance.now()))))"
PLAYED = """async (seconds) => {
  const slider = document.querySelector('.transport input'), times = [];
  const wait = () => new Promise((r) => requestAnimationFrame(r));
  let shown = 0, last = null;
  const end = performance.now() + 1000 * seconds;
  while (performance.now() < end) {
    times.push(await wait());
    if (slider.value !== last) { shown++; last = slider.value; }
    if (slider.value === slider.max) document.querySelector('.main').click();
  }
  const gaps = times.slice(1).map((t, i) => t - times[i]);
  const took = (times[times.length - 1] - times[0]) / 1000;
  return {refreshes: gaps.length / took, frames: shown / took, longest_ms: Math.max(...gaps)};
}"""


STEPPED = """async () => {
  for (let i = 0; i < 256; i++) {
    document.documentElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));
    await new Promise((r) => requestAnimationFrame(r));
  }
  return document.querySelector('.transport input').value;
}"""


def text(random: np.random.Generator) -> Ids:
    words = Path(__file__).resolve().parent.parent.joinpath("README.md").read_bytes()
    start = int(random.integers(0, len(words) - LENGTH))
    return np.frombuffer(words[start : start + LENGTH], np.uint8).astype(np.int64)


def masked(random: np.random.Generator) -> tuple[Ids, Ids]:
    when = random.integers(1, STEPS + 1, LENGTH)
    return fixed(np.where(np.arange(STEPS + 1)[:, None] >= when, text(random), MASK), random)


def uniform(random: np.random.Generator) -> tuple[Ids, Ids]:
    rows = random.integers(32, 127, (STEPS + 1, LENGTH))
    for step in range(1, STEPS + 1):
        rows[step] = np.where(random.random(LENGTH) < 0.02, rows[step], rows[step - 1])
    rows[-1] = text(random)
    return fixed(rows, random)


def strings(random: np.random.Generator) -> tuple[Ids, Ids]:
    """Each token of the text is inserted at a time of its own; a quarter as many others come and go."""
    born, extra = random.integers(1, STEPS, LENGTH), LENGTH // 4
    place = np.concatenate([np.arange(LENGTH), random.random(extra) * LENGTH])
    token = np.concatenate([text(random), random.integers(97, 123, extra)])
    since = np.concatenate([born, random.integers(0, STEPS // 2, extra)])
    until = np.concatenate([np.full(LENGTH, 2 * STEPS), random.integers(STEPS // 2, STEPS, extra)])
    order, sure = np.argsort(place), random.integers(0, 255, len(place))
    there = [order[(since[order] <= step) & (step < until[order])] for step in range(STEPS + 1)]
    width = max(map(len, there))

    def padded(values: Ids, filler: int) -> Ids:
        return np.stack([np.pad(values[at], (0, width - len(at)), constant_values=filler) for at in there])

    return padded(token, START), padded(sure, 255)


def fixed(rows: Ids, random: np.random.Generator) -> tuple[Ids, Ids]:
    """Give each token of rows of one length a confidence, for as long as it stays."""
    sure = random.integers(0, 255, rows.shape)
    for step in range(1, len(rows)):
        sure[step] = np.where(rows[step] == rows[step - 1], sure[step - 1], sure[step])
    return rows, np.where(rows == MASK, 255, sure)


def page_of(name: str, rows: Ids, sure: Ids, folder: Path) -> Path:
    """Write a store and its page."""
    attributes = {"sampler": name, "mask": MASK} | ({"start": START} if START in rows else {})
    way = rows[:, None].astype(np.int32)
    store = write_samples(
        folder / f"{name}.zarr",
        {"tokens": way[-1]},
        trajectory=way,
        confidence=sure[:, None].astype(np.uint8),
        attributes=attributes,
    )
    write_view([store], folder / f"{name}.html")
    return folder / f"{name}.html"


def measured(browser: Any, page: Path, seconds: float) -> dict[str, float]:
    tab = browser.new_page(viewport={"width": 1600, "height": 900})
    session = tab.context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def spent() -> tuple[float, float]:
        found = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
        return found["ThreadTime"], found["ProcessTime"]

    start = spent()
    tab.goto(page.as_uri(), wait_until="load")
    load = tab.evaluate(PAINTED)
    loaded = spent()
    tab.keyboard.press("Home")
    before = spent()
    if tab.evaluate(STEPPED) != "256":
        raise SystemExit("the film does not have 256 steps")
    after = spent()
    tab.get_by_label("speed").select_option("2")
    tab.keyboard.press("Home")
    tab.locator(".main").click()
    found = tab.evaluate(PLAYED, seconds)
    tab.close()
    found |= {
        "load_ms": load,
        "load_cpu_ms": 1000 * (loaded[0] - start[0]),
        "frame_cpu_ms": 1000 * (after[0] - before[0]) / STEPS,
        "frame_process_ms": 1000 * (after[1] - before[1]) / STEPS,
    }
    return {"bytes": page.stat().st_size} | {k: round(v, 2) for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=os.environ.get("CHROMIUM") or shutil.which("chromium"))
    parser.add_argument("--seconds", type=float, default=6.0)
    arguments = parser.parse_args()
    random, cases = np.random.default_rng(0), {"masked": masked, "uniform": uniform, "strings": strings}
    record: dict[str, object] = {"hardware": describe_hardware(pick_device("cpu")), "load": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        folder = Path(name)
        write_text(folder / "tokenizer.json", Bytes().to_json())
        pages = {case: page_of(case, *make(random), folder) for case, make in cases.items()}
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        for case, page in pages.items():
            record[case] = found = measured(browser, page, arguments.seconds)
            print(f"{case:8} " + ", ".join(f"{key} {value:,}" for key, value in found.items()), flush=True)
        browser.close()
    append_record("view", record)


if __name__ == "__main__":
    main()
