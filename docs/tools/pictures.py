"""Open every tab of TensorBoard on a finished run in Chromium, fail on an empty chart, and take the manual's pictures.

    pip install -e '.[docs]'
    lit-ppo fit --config quickstart --config monitors/cockpit \
        --config monitors/sample_logger
    python docs/tools/pictures.py runs/quickstart/ppo/version_0

It needs a Chromium: on the PATH, such as Debian's package ``chromium``, or what ``playwright install chromium`` brings.
With ``--optional`` it says so where there is none, and ends well.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from urllib.request import urlopen

from playwright.sync_api import Error, Locator, Page, Playwright, sync_playwright
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.program import TensorBoard

PICTURES = Path(__file__).parents[1] / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")  # their names on the PATH
LARGEST = 200_000  # bytes
SHOWN = ("custom_scalars", "text")  # the tabs whose pictures the manual has
# Tab -> what holds one chart, and what is inside once it shows something.
CHARTS = {
    "timeseries": ("card-view", "tb-data-table-content-row, img, histogram-card g path"),
    "scalars": ("tf-scalar-card", "path.line[d]:not([d=''])"),
    "custom_scalars": ("tf-custom-scalar-multi-line-chart-card", "path.line[d]:not([d=''])"),
    "images": ("tf-image-loader", "img[src]"),
    "histograms": ("tf-histogram-loader", "path[d*='L']"),
    "distributions": ("tf-distribution-loader", "path[d*='L']"),
    "text": ("tf-text-loader", "tf-markdown-view td"),
    "hparams": ("tf-hparams-table-view", "vaadin-grid-cell-content"),
}
# Chromium asks for updates, which a machine without a network refuses one after the other.
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)


def chromium(playwright: Playwright) -> str | None:
    """A browser on the PATH, or playwright's own; None if there is neither."""
    found = next(filter(None, map(shutil.which, BROWSERS)), playwright.chromium.executable_path)
    return found if Path(found).exists() else None


def tabs(address: str) -> list[str]:
    """The tabs for which the run has data."""
    with urlopen(f"{address}data/plugins_listing") as answer:
        return [name for name, plugin in json.load(answer).items() if plugin["enabled"]]


def charts(page: Page, address: str, tab: str) -> list[Locator]:
    """Open a tab with all its groups, and find its charts."""
    page.goto("about:blank")  # a new fragment alone would not load the page
    page.goto(f"{address}#{tab}")
    page.locator(CHARTS[tab][0]).first.wait_for(state="attached")
    closed = page.locator("button.heading:not([open-button]), button[aria-label='Expand group']")
    closed.evaluate_all("buttons => buttons.forEach(button => button.click())")
    page.wait_for_timeout(2000)
    return page.locator(CHARTS[tab][0]).all()


def shows(chart: Locator, inside: str) -> bool:
    """Whether a chart shows something in time, once it is in view."""
    chart.page.mouse.wheel(0, -100_000)  # it may have come into view before it was ready
    chart.scroll_into_view_if_needed()
    try:
        chart.locator(inside).first.wait_for(state="attached")
    except Error:
        return False
    return True


def empty(page: Page, address: str, tab: str) -> list[str]:
    """The charts of a tab that show nothing."""
    found = []
    for chart in charts(page, address, tab):
        if not shows(chart, CHARTS[tab][1]) and not shows(chart, CHARTS[tab][1]):  # once more: a busy machine is late
            title = chart.evaluate("card => card.tag || card.innerText.trim()")
            found.append(f"{tab}: {' '.join(title.split())[:80]}")
    page.mouse.move(700, 600)  # over the charts
    page.mouse.wheel(0, -100_000)
    page.mouse.move(20, 900)  # beside them: a chart says something about the point under the mouse
    return found


def show_all(page: Page) -> None:
    """Draw the curves as they are: no smoothing, no points outside."""
    change = "dashboard => { dashboard.set('_smoothingWeight', 0); dashboard.set('_ignoreYOutliers', false) }"
    page.locator("tf-custom-scalar-dashboard").evaluate(change)


def save(picture: bytes, path: Path) -> None:
    """Write a picture of the manual; large ones are refused."""
    if len(picture) > LARGEST:
        raise ValueError(f"{path}: has {len(picture)} bytes, at most {LARGEST} are kept in the repository")
    path.write_bytes(picture)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run, with Cockpit and SampleLogger")
    parser.add_argument("--optional", action="store_true", help="without a browser, do nothing")
    parser.add_argument("--output", type=Path, default=PICTURES, help="folder of the pictures")
    arguments = parser.parse_args()
    with sync_playwright() as playwright:
        browser = chromium(playwright)
        if browser is None and not arguments.optional:
            sys.exit(f"no browser: none of {', '.join(BROWSERS)} on the PATH, nor playwright's own")
        if browser is None:
            print("skipped: there is no Chromium")
        else:
            look(playwright, browser, arguments.run, arguments.output)


def look(playwright: Playwright, executable: str, run: Path, output: Path) -> None:
    """Open all tabs of a run, and take the pictures; empty charts and missing tabs end the program with an error."""
    output.mkdir(parents=True, exist_ok=True)
    board = TensorBoard()
    board.configure(argv=["tensorboard", "--logdir", str(run), "--port", "0", "--load_fast", "false"])
    address = board.launch()
    browser = playwright.chromium.launch(executable_path=executable, args=QUIET)
    page = browser.new_page(viewport={"width": 1480, "height": 840})
    page.set_default_timeout(20_000)
    page.set_default_navigation_timeout(60_000)  # also where other programs want the cores
    shown, problems = tabs(address), []
    for tab in shown:
        problems += empty(page, address, tab) if tab in CHARTS else [f"{tab}: a tab that this script does not know"]
        if tab == "custom_scalars":
            show_all(page)
        page.wait_for_timeout(1000)  # lines grow to their places
        if tab in SHOWN:
            save(page.screenshot(), output / f"tensorboard_{tab}.png")
    browser.close()
    problems = [f"{tab}: is missing" for tab in CHARTS if tab not in shown] + problems
    events = EventAccumulator(str(run), size_guidance={"images": 0}).Reload()
    save(events.Images("figure/score_against_kl")[-1].encoded_image_string, output / "score_against_kl.png")
    print(f"{len(shown)} tabs: {', '.join(shown)}")
    if problems:
        sys.exit("\n".join(problems))


if __name__ == "__main__":
    main()
