"""The page in a real browser: search, play, upload, and what it says when something is wrong."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving import ROOT_KEY, Server, Tenant, broken_clip, clip

pytestmark = pytest.mark.browser
ARGUMENTS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--window-size=1200,900",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        if "browser" in os.environ.get("POLYCLIP_REQUIRE", ""):
            pytest.fail("chromium and chromedriver are not installed")
        pytest.skip("needs Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    profile = tmp_path_factory.mktemp("profile")
    for argument in (*ARGUMENTS, f"--user-data-dir={profile}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def until(browser: Any, look: Any, seconds: float = 60) -> Any:
    try:
        return WebDriverWait(browser, seconds).until(look)
    except TimeoutException as error:
        raise AssertionError(f"after {seconds} s the page says {status(browser)!r}") from error


def status(browser: Any) -> str:
    return str(browser.find_element(By.ID, "status").text)


def open_page(browser: Any, server: Server, key: str) -> None:
    browser.get("about:blank")
    browser.get(f"{server.client.base_url}/#key={key}")
    until(browser, lambda b: b.find_element(By.ID, "search").is_displayed())
    assert not browser.find_element(By.ID, "login").is_displayed()


def test_a_query_shows_hits_and_a_click_plays_the_video(browser: Any, server: Server, tenant: Tenant) -> None:
    collection, _ = tenant.filled([1, 2, 3])
    open_page(browser, server, tenant.keys["search"])
    assert tenant.keys["search"] not in browser.current_url, "the key leaves the address bar"
    until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#collection option"))
    assert browser.find_element(By.CSS_SELECTOR, "#collection option").text == f"{collection} (3)"
    browser.find_element(By.ID, "text").send_keys("a red ball", Keys.ENTER)
    hits = until(browser, lambda b: (found := b.find_elements(By.CSS_SELECTOR, "#hits button")) and len(found) == 3 and found)
    shown = "return [...document.querySelectorAll('#hits img')].every(i => i.complete && i.naturalWidth > 0)"
    until(browser, lambda b: b.execute_script(shown))
    assert "ms" in status(browser)
    hits[0].click()
    playing = "const v = document.querySelector('video'); return v.readyState >= 2 && v.videoWidth"
    assert until(browser, lambda b: b.execute_script(playing)) == 96
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    until(browser, lambda b: not b.execute_script("return document.getElementById('player').open"))
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]
    assert not errors


def test_an_upload_from_the_page_is_found(browser: Any, server: Server, tenant: Tenant, tmp_path: Path) -> None:
    tenant.collection("empty")
    open_page(browser, server, tenant.keys["write"])
    browser.find_element(By.ID, "text").send_keys("anything", Keys.ENTER)
    until(browser, lambda b: "no ready videos" in status(b))
    (tmp_path / "mine.mp4").write_bytes(clip(7))
    browser.find_element(By.ID, "files").send_keys(str(tmp_path / "mine.mp4"))
    until(browser, lambda b: "1 video ready" in status(b), 60)
    browser.find_element(By.ID, "text").send_keys(Keys.ENTER)
    until(browser, lambda b: "mine.mp4" in b.find_element(By.ID, "hits").text)


def test_mistakes_are_told_in_words(browser: Any, server: Server, tenant: Tenant, tmp_path: Path) -> None:
    tenant.collection("empty")
    open_page(browser, server, tenant.keys["write"])
    (tmp_path / "notes.mp4").write_text("these are no pictures " * 100)
    browser.find_element(By.ID, "files").send_keys(str(tmp_path / "notes.mp4"))
    until(browser, lambda b: "no video" in status(b))
    browser.get("about:blank")
    browser.get(f"{server.client.base_url}/#key=pc_wrong_key")
    until(browser, lambda b: b.find_element(By.ID, "login").is_displayed() and "not known" in status(b))
    assert not browser.find_element(By.ID, "search").is_displayed(), "nothing to search without a key"
    browser.find_element(By.ID, "key").send_keys(tenant.keys["search"], Keys.ENTER)
    until(browser, lambda b: b.find_element(By.ID, "search").is_displayed())


def test_one_bad_file_does_not_end_an_upload_of_many(browser: Any, server: Server, tenant: Tenant, tmp_path: Path) -> None:
    tenant.collection("empty")
    open_page(browser, server, tenant.keys["write"])
    contents = {"a.mp4": clip(8), "notes.mp4": b"these are no pictures " * 100, "noise.mp4": broken_clip(), "z.mp4": clip(10)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    browser.find_element(By.ID, "files").send_keys("\n".join(str(tmp_path / name) for name in contents))
    until(browser, lambda b: "2 videos ready" in status(b), 60)
    assert "notes.mp4: " in status(browser) and "noise.mp4: " in status(browser)
    until(browser, lambda b: b.find_element(By.CSS_SELECTOR, "#collection option").text == "empty (2)")


def test_names_from_outside_are_text_and_never_markup(browser: Any, server: Server, tenant: Tenant) -> None:
    collection = tenant.collection()
    evil = "<img src=x onerror=document.title='owned'>.mp4"
    video = tenant.upload(collection, clip(9), evil).json()["video_id"]
    tenant.all_ready(collection, [video])
    open_page(browser, server, tenant.keys["search"])
    browser.find_element(By.ID, "text").send_keys("anything", Keys.ENTER)
    until(browser, lambda b: "onerror" in b.find_element(By.ID, "hits").text)
    assert browser.title == "polyclip"


def test_the_operators_key_leads_to_a_tenant(browser: Any, server: Server, tenant: Tenant) -> None:
    browser.get("about:blank")
    browser.get(f"{server.client.base_url}/#key={ROOT_KEY}")
    until(browser, lambda b: b.find_element(By.ID, "operator").is_displayed())
    names = "return [...document.querySelectorAll('#tenants option')].map(o => o.value)"
    assert tenant.name in browser.execute_script(names)
    browser.find_element(By.ID, "tenant").send_keys(f"{tenant.name}-new", Keys.ENTER)
    until(browser, lambda b: b.find_element(By.ID, "search").is_displayed() and "admin now" in status(b))
    key = browser.execute_script("return sessionStorage.getItem('polyclip-key')")
    assert key != ROOT_KEY and key in status(browser)
    browser.find_element(By.ID, "make").click()
    browser.switch_to.alert.send_keys("films")
    browser.switch_to.alert.accept()
    until(browser, lambda b: b.find_element(By.CSS_SELECTOR, "#collection option").text == "films (0)")


def test_captions_are_offered_as_queries_and_the_backbone_is_warned_of(browser: Any, server: Server, tenant: Tenant) -> None:
    tenant.filled([1, 2], captions=True)
    open_page(browser, server, tenant.keys["search"])
    until(browser, lambda b: "knows only the drawn world" in b.find_element(By.ID, "warning").text)
    [first, *_] = until(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "#examples button"))
    text = first.text
    first.click()
    until(browser, lambda b: len(b.find_elements(By.CSS_SELECTOR, "#hits button")) == 2)
    assert browser.find_element(By.ID, "text").get_attribute("value") == text
