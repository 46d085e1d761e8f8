"""The documentation as a visitor without a network meets it: links, anchors, formulas, screens and phones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
DESKTOP, PHONE = 1280, 390
pytestmark = pytest.mark.environment


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, built anew; the notebooks as they are, because ``make docs`` executes them.

    ``BILEVEL_SITE`` names a folder that was built already.
    """
    if "BILEVEL_SITE" in os.environ:
        return Path(os.environ["BILEVEL_SITE"])
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-D", "nb_execution_mode=off"]
    result = subprocess.run([*command, str(ROOT / "docs"), str(out)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


class Read(HTMLParser):
    """What a page links to, what it loads, and where it can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") != "canonical":
            self.loaded.append(given.get("href", ""))
        elif "src" in given:
            self.loaded.append(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Read]:
    return {page.resolve(): Read(page) for page in sorted(site.rglob("*.html"))}


def is_elsewhere(link: str) -> bool:
    return re.match(r"[a-z]+:|//", link) is not None


def dead(pages: dict[Path, Read]) -> list[str]:
    """Links into these pages that lead nowhere."""
    found = []
    for page, read in pages.items():
        for link in [*read.links, *read.loaded]:
            if is_elsewhere(link):
                continue
            name, _, anchor = link.partition("#")
            target = (page.parent / unquote(name.partition("?")[0])).resolve() if name else page
            if not target.exists() or (anchor and target in pages and unquote(anchor) not in pages[target].anchors):
                found.append(f"{page.name}: {link}")
    return found


def test_no_link_and_no_anchor_is_dead(pages: dict[Path, Read]) -> None:
    assert len(pages) > 60
    assert dead(pages) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<p id="here"><a href="#here"></a><a href="#there"></a><a href="no.html"></a><img src="no.png">')
    assert dead({page.resolve(): Read(page)}) == ["page.html: #there", "page.html: no.html", "page.html: no.png"]


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Read]) -> None:
    assert [f"{page.name}: {link}" for page, read in pages.items() for link in read.loaded if is_elsewhere(link)] == []


def test_required_arguments_stand_in_the_signature(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api" / "barrier_methods.html").read_text(encoding="utf-8"))
    (signature,) = re.findall(r"class bilevel\.BOME\((.*?)\)\s*\[source\]", text, re.DOTALL)
    names = re.findall(r"^\s*(\w+): ", signature, re.MULTILINE)
    first = ["upper_loss", "lower_loss", "upper", "lower", "upper_optimizer", "lower_optimizer", "inner_steps"]
    assert names[:7] == first
    assert {"on_nonfinite", "verify", "multiplier_max"} <= set(names)
    assert "Unpack" not in text


def test_inherited_members_are_described_once(site: Path) -> None:
    described = [
        anchor for page in (site / "api").glob("*.html") for anchor in Read(page).anchors if anchor.endswith(".step")
    ]
    assert "bilevel.BilevelOptimizer.step" in described
    assert "bilevel.BOME.step" not in described


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium for which no name resolves."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: the extra 'browser'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    os.environ["SE_AVOID_STATS"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.page_load_strategy = "normal"
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    started.set_script_timeout(60)
    yield started
    started.quit()


# What is wrong with a page at a width, as sentences.
LOOK = r"""
const done = arguments[arguments.length - 1];
document.fonts.ready.then(() => requestAnimationFrame(() => requestAnimationFrame(() => {
  const wrong = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    wrong.push(`scrolls to ${document.documentElement.scrollWidth} of ${width}`);
  }
  const scrolls = (element) => {
    for (let above = element; above; above = above.parentElement) {
      const style = getComputedStyle(above);
      if (style.overflowX !== "visible" || style.position === "fixed") return true;
    }
    return false;
  };
  const text = document.querySelector("[role=main]");
  for (const element of text.querySelectorAll("p, pre, table, img, figure, li, dt, h1, h2, h3, .math")) {
    const box = element.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(element)) {
      wrong.push(`cut off: ${element.tagName} ${element.textContent.slice(0, 40)}`);
    }
  }
  for (const element of text.querySelectorAll(".math.notranslate")) {
    if (!element.querySelector(".katex")) wrong.push(`not drawn: ${element.textContent.slice(0, 60)}`);
  }
  for (const element of text.querySelectorAll(".katex-error")) wrong.push(`not read: ${element.textContent}`);
  for (const image of document.images) {
    if (image.complete && !image.naturalWidth) wrong.push(`no picture: ${image.src}`);
  }
  const prose = text.cloneNode(true);
  prose.querySelectorAll("pre, code, .katex, script").forEach((element) => element.remove());
  const raw = prose.textContent.match(/\\[(\[][^]{0,30}|\$\$?[^$\d\s][^$]{0,30}\$|\\(frac|alpha|nabla|begin)/);
  if (raw) wrong.push(`raw: ${raw[0]}`);
  done(wrong);
})));
"""


def looked_at(browser: Any, address: str, width: int) -> list[str]:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    if browser.current_url != address:
        browser.get(address)
    found: list[str] = browser.execute_async_script(LOOK)
    return [f"{address.rpartition('/')[2]}, {width} wide: {sentence}" for sentence in found]


def test_every_page_is_whole_on_a_screen_and_on_a_phone(site: Path, browser: Any) -> None:
    wrong = []
    for page in sorted(site.rglob("*.html")):
        if "_modules" not in page.parts:
            for width in (DESKTOP, PHONE):
                wrong += looked_at(browser, page.as_uri(), width)
            wrong += [f"{page.name}: {entry['message']}" for entry in browser.get_log("browser")]
    assert wrong == []


def test_what_is_wrong_with_a_page_is_found(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        '<meta name="viewport" content="width=device-width"><div role="main"><p style="width: 2000px">wide</p>'
        '<span class="math notranslate">x</span> \\(y\\) <img src="no.png"></div><script>missing()</script>'
    )
    found = " ".join(looked_at(browser, page.as_uri(), PHONE))
    assert [word in found for word in ("scrolls to", "cut off: P", "not drawn: x", "raw: \\(y", "no picture")] == [
        True
    ] * 5
    assert "missing is not defined" in " ".join(entry["message"] for entry in browser.get_log("browser"))


def test_formulas_are_drawn(site: Path, browser: Any) -> None:
    browser.get((site / "methods" / "bome.html").as_uri())
    count = "return document.querySelectorAll('.math .katex-html').length"
    assert browser.execute_script(count) > 20
    assert browser.execute_script("return document.fonts.check('12px KaTeX_Main')")
