"""The demo of examples/space: its functions, and the page in a headless browser."""

import importlib.util
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from lasar_hf import LasarProcessor, Recommender, SidCatalog
from tests.tiny import tiny_catalog, tiny_model


pytest.importorskip("gradio", reason="gradio is not installed (pip install -e '.[demo]')")
ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "examples" / "space" / "app.py"


def recommender() -> Recommender:
    model, tokenizer = tiny_model()
    catalog = tiny_catalog()
    titles = [f"Book {number}" for number in range(len(catalog) - 1)] + [None]
    return Recommender(model, LasarProcessor(tokenizer, SidCatalog(catalog.codes, catalog.item_ids, titles=titles)))


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("space_app", APP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_list_has_titles_and_the_depth(app):
    demo = app.Demo(recommender())
    said, rows = demo.recommend(["item-1", "item-2"], True, 0)
    (expected,) = demo.recommender.recommend([["item-1", "item-2"]])
    assert f"The policy chose {expected['latent_steps']} latent steps" in said
    assert [row[1] for row in rows] == [item["title"] or item["item_id"] for item in expected["items"]]
    said, other = demo.recommend(["item-1", "item-2"], False, 0)
    assert "You chose 0 latent steps" in said and other != rows
    assert demo.recommend([], True, 0) == ("Pick at least one item.", [])


def test_a_search_keeps_what_is_chosen(app):
    demo = app.Demo(recommender())
    assert demo.choices("BOOK 12", ["item-3"]) == [("Book 3", "item-3"), ("Book 12", "item-12")]
    assert ("item-19", "item-19") in demo.choices()  # no title


def test_the_figure_needs_a_history(app):
    demo = app.Demo(recommender())
    assert demo.explain([]) is None
    assert len(demo.explain(["item-1"]).axes) == 3


def test_the_page_can_be_built(app):
    assert app.build(recommender(), "shop").title == "LASAR"


def start_app(model: Path, log: Path) -> tuple[subprocess.Popen, str]:
    """The demo on a free port, when it answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, str(APP), "--model", str(model), "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    url, end = f"http://127.0.0.1:{port}", time.time() + 300
    while time.time() < end and process.poll() is None:
        try:
            urllib.request.urlopen(url)
            return process, url
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    process.kill()
    raise AssertionError(log.read_text())


@pytest.mark.slow
def test_the_page_in_a_browser(tmp_path):
    """Needs `apt-get install chromium chromium-driver` and `pip install selenium`."""
    selenium = pytest.importorskip("selenium", reason="selenium is not installed")
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    assert selenium
    recommender().save_pretrained(tmp_path / "shop")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1250"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "SEVERE"})
    process, url = start_app(tmp_path / "shop", tmp_path / "log.txt")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        driver.get(url)
        wait = WebDriverWait(driver, 120)
        box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "#history input"))
        for text in ("Book 17", "Book 18"):
            box.click()
            box.send_keys(text)
            offered = "return [...document.querySelectorAll('ul li')].map(part => part.textContent.trim())"
            wait.until(lambda page, text=text: text in (page.execute_script(offered) or [""])[0])  # noqa: B023
            box.send_keys(Keys.ENTER)
        box.send_keys(Keys.ESCAPE)
        said = lambda: driver.find_element(By.CSS_SELECTOR, "#said").text  # noqa: E731
        listed = lambda: driver.find_element(By.CSS_SELECTOR, "#ranked").text  # noqa: E731
        wait.until(lambda page: "The policy chose" in said())
        wait.until(lambda page: "Book" in listed())
        wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "#figure img"))
        before = listed()
        slider = driver.find_element(By.CSS_SELECTOR, "#steps input[type=range]")
        slider.send_keys(Keys.HOME)  # zero steps
        wait.until(lambda page: "You chose 0 latent steps" in said())
        wait.until(lambda page: listed() != before)
        driver.save_screenshot(str(tmp_path / "page.png"))
        # Fonts come from the network, which a test does not have.
        errors = [entry["message"] for entry in driver.get_log("browser") if "127.0.0.1" in entry["message"]]
        assert not errors, errors
    finally:
        driver.quit()
        process.terminate()
        process.wait()
