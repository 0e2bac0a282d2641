"""The page, and what it does in a real browser."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from made_records import launched, record, write

from domainbed_hp.scripts import run
from domainbed_hp.scripts.collect_results import main


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """The page of three rows, one of them without its last trial, and of a sweep with a failed job."""
    for name, acc in (("ERM", 0.5), ("LoRA", 0.7), ("ZeroShotCLIP", 0.6), ("<b>Mine</b>", 0.1)):
        for env in range(4):
            for trial in range(2):
                one = record(env, acc + 0.01 * env + 0.05 * trial, trial, algorithm=name) | {"loss": 1.0}
                one |= {"trainable_params": int(1000 * acc), "versions": {"torch": "2.9.1", "hardware": "a <GPU>"}}
                if (name, env, trial) != ("LoRA", 3, 1):
                    write(tmp_path / "runs" / f"{name.strip('</b>')}{env}{trial}", one, one | {"step": 10})
    jobs = launched(
        tmp_path / "runs" / "sweep", [{"algorithm": "HeadPurification", "dataset": "PACS", "test_envs": [0]}]
    )
    (jobs[0].folder / "done").unlink()
    (jobs[0].folder / "err.txt").write_text("Traceback\nRuntimeError: <script>alert(1)</script>\n")
    more = [
        "--columns",
        "params",
        "--with_published",
        "--compare",
        "LoRA",
        "ERM",
        "--html",
        str(tmp_path / "page.html"),
    ]
    assert run(main, ["--input_dir", str(tmp_path / "runs"), *more]) == 0
    return tmp_path / "page.html"


def test_the_page_is_one_file_and_says_everything(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text) and "@import" not in text and "url(" not in text
    assert "<script>alert" not in text and "<b>Mine" not in text and "&lt;b&gt;Mine&lt;/b&gt;" in text
    for words in (
        "LoRA, PACS, test_envs 3, trial 1, hparams_seed 0",
        "RuntimeError: &lt;script&gt;",
        "a &lt;GPU&gt;",
        "LoRA (a) minus ERM (b), PACS",
        "Published averages",
        "data:image/png;base64,",
        "1 jobs are not done",
    ):
        assert words in text, words


@pytest.fixture
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = ("background-networking", "sync", "component-update", "quic", "gpu")
    for flag in ("--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)):
        options.add_argument(flag)
    options.add_argument("--window-size=1300,1800")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


ROWS = "return [...document.querySelectorAll('.method:not([hidden]) table')[0].tBodies[0].rows]"
NAMES = f"{ROWS}.filter(row => row.checkVisibility()).map(row => row.cells[0].textContent)"


@pytest.mark.browser
def test_the_page_in_chromium(page: Path, browser: Any) -> None:
    browser.get(page.as_uri())
    as_printed = ["ZeroShotCLIP", "ERM", "LoRA", "HeadPurification", "<b>Mine</b>"]
    assert browser.execute_script(NAMES) == as_printed

    header = browser.find_elements("css selector", ".method:not([hidden]) thead button")
    assert [button.text for button in header[:6]] == ["Algorithm", "A", "C", "P", "S", "Avg"]
    best_first = ["LoRA", "ZeroShotCLIP", "ERM", "<b>Mine</b>", "HeadPurification"]  # X, which is no number, last
    header[3].click()
    assert browser.execute_script(NAMES) == best_first
    header[3].click()
    assert browser.execute_script(NAMES) == [*best_first[3::-1], best_first[4]]
    header[0].click()
    assert browser.execute_script(NAMES) == sorted(as_printed, key=str.lower)
    header[6].click()  # trained parameters: 700, 600, 500, 100, and one that does not say
    assert browser.execute_script(NAMES) == best_first

    browser.find_element("id", "filter").send_keys("o")
    assert browser.execute_script(NAMES) == ["LoRA", "ZeroShotCLIP", "HeadPurification"]
    browser.find_element("id", "filter").send_keys("ra")
    assert browser.execute_script(NAMES) == ["LoRA"]

    shown = "return document.querySelector('.method:not([hidden]) h2').textContent"
    assert "training-domain" in browser.execute_script(shown)
    browser.find_element("css selector", "#method option:nth-child(3)").click()
    assert "oracle" in browser.execute_script(shown)

    images = "return [...document.images].map(image => image.naturalWidth)"
    assert browser.execute_script(images) and all(browser.execute_script(images))
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = {e["params"]["request"]["url"][:5] for e in events if e["method"] == "Network.requestWillBeSent"}
    assert asked <= {"file:", "data:"}
    if folder := os.environ.get("SCREENSHOTS"):
        browser.find_element("id", "filter").clear()
        browser.save_screenshot(f"{folder}/page.png")
