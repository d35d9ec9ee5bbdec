"""The page in a real browser: a task becomes an adapter, and three answers stand side by side."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hyper_t5.serving.service import Service

pytestmark = pytest.mark.slow
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    from hyper_t5.serving.api import create_app

    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(create_app(service, log=False), log_level="error")
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # of the main thread alone
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        while not server.started:
            time.sleep(0.05)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += ["--window-size=1400,900", f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
    for flag in flags:
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


def wait_for(condition: Any, seconds: float = 60.0) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("the page did not change")


def text_of(browser: Any, selector: str) -> str:
    return str(browser.find_element("css selector", selector).text)


def screenshot(browser: Any, name: str, tmp_path: Path) -> None:
    """Save a picture where CI keeps them, else in the test's folder."""
    folder = Path(os.environ.get("HYPER_T5_ARTIFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    assert browser.save_screenshot(str(folder / name))


def test_a_task_is_adapted_and_answered(
    service: Service, browser: Any, url: str, tmp_path: Path
) -> None:
    browser.get(url)
    sample = wait_for(lambda: browser.find_element("id", "instruction").get_attribute("value"))
    assert sample == service.sample_tasks()[0]["instruction"]
    assert len(browser.find_elements("css selector", ".example")) == 2
    browser.find_element("id", "input").clear()
    browser.find_element("id", "input").send_keys("a b c", webdriver.Keys.CONTROL, "\n")
    for way in ("base", "adapter"):  # the third is too long for this small server
        wait_for(lambda way=way: "tokens" in text_of(browser, f"#answer-{way} .facts"))
    wait_for(lambda: browser.find_element("id", "run").is_enabled())
    task = {key: service.sample_tasks()[0][key] for key in ("instruction", "examples")}
    adapter = service.predictor.adapt(task)
    [base] = service.predictor.predict(["a b c"], None, max_decode_length=8)
    [adapted] = service.predictor.predict(["a b c"], adapter, max_decode_length=8)
    assert text_of(browser, "#answer-base output") == base.strip()
    assert text_of(browser, "#answer-adapter output") == adapted.strip()
    assert text_of(browser, "#adapters .chosen h3").startswith("task-")
    assert browser.find_elements("css selector", "#adapters svg rect")
    screenshot(browser, "page.png", tmp_path)


def test_errors_stand_where_they_arise(browser: Any, url: str, tmp_path: Path) -> None:
    browser.get(url)
    wait_for(lambda: browser.find_element("id", "instruction").get_attribute("value"))
    browser.find_element("css selector", "summary").click()
    browser.find_element("id", "paste").send_keys("{")
    browser.find_element("id", "load").click()
    assert wait_for(lambda: "JSON" in text_of(browser, "#paste-error"))
    browser.find_element("id", "paste").clear()
    browser.find_element("id", "paste").send_keys('{"Definition": ["Do it."], "Instances": []}')
    browser.find_element("id", "load").click()
    assert browser.find_element("id", "instruction").get_attribute("value") == "Do it."
    browser.find_element("id", "input").send_keys("a " * 200)
    browser.find_element("id", "run").click()
    wait_for(lambda: "longer than 24 tokens" in text_of(browser, "#answer-base .error"))
    screenshot(browser, "errors.png", tmp_path)


def test_a_phone_has_one_column(browser: Any, url: str, tmp_path: Path) -> None:
    browser.set_window_size(500, 900)
    browser.get(url)
    wait_for(lambda: browser.find_element("id", "instruction").get_attribute("value"))
    width = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    assert width <= 0
    lefts = {section.rect["x"] for section in browser.find_elements("tag name", "section")}
    assert len(lefts) == 1
    screenshot(browser, "phone.png", tmp_path)
