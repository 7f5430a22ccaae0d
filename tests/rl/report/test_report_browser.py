"""The report in a real browser: nothing is complained about, the slider moves the canvas, the filters filter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.report_runs import HOSTILE, make_evaluation, write_run

from coupled.rl.report import write_report

pytest.importorskip("pyarrow")
webdriver = pytest.importorskip(
    "selenium.webdriver", reason="the tests of the page need selenium: pip install selenium"
)
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None or DRIVER is None,
        reason="no browser is installed: apt-get install chromium chromium-driver",
    ),
    # selenium leaves a socket for the garbage collector to close.
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]
MASK = "\u25a2"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    options.binary_location = str(BROWSER)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Any]:
    """Open the report of a run, or of two, at a width, and return the browser."""

    def open_(num_runs: int = 1, *, width: int = 1280) -> Any:
        ends = [make_evaluation(0, [0.0, 0.5, 0.0, 1.0]), make_evaluation(3, [0.5, 1.0, 0.0, 1.0])]
        runs = [write_run(tmp_path / f"run-{i}", tokenizer=tiny_tokenizer, evaluations=ends) for i in range(num_runs)]
        page = write_report(*runs, out=tmp_path / "report.html")
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        emulate(browser, "light")
        browser.get_log("browser")
        browser.get_log("performance")
        browser.get(page.as_uri())
        return browser

    return open_


def emulate(browser: Any, scheme: str, media: str = "") -> None:
    """A colour scheme and a medium, without animated scrolling."""
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    listed = [{"name": name, "value": value} for name, value in features.items()]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": listed})


def find(browser: Any, selector: str) -> Any:
    return browser.find_element("css selector", selector)


def texts(browser: Any, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements("css selector", selector)]


def choose(browser: Any, name: str, value: str) -> None:
    from selenium.webdriver.support.select import Select

    Select(find(browser, f"[name={name}]")).select_by_visible_text(value)


@pytest.mark.parametrize("num_runs", [1, 2])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_opens_without_a_complaint_and_fits_the_screen(
    opened: Callable[..., Any], num_runs: int, width: int
) -> None:
    page = opened(num_runs, width=width)
    assert page.get_log("browser") == []
    assert page.execute_script("return document.documentElement.scrollWidth") == width
    assert len(page.find_elements("css selector", "figure svg")) > 8
    assert page.execute_script("return window.hacked") is None, "a completion ran as a script"


def test_it_loads_no_file_but_itself(opened: Callable[..., Any]) -> None:
    page = opened()
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in sent if not url.startswith("data:")] == [page.current_url]


def test_the_slider_replays_the_denoising_token_by_token(opened: Callable[..., Any]) -> None:
    """The tokens a b c d <end> are committed at steps 2, 0, 1, 3, 4; the one after the end at step 5."""
    from selenium.webdriver.common.keys import Keys

    page = opened()
    slider, canvas = find(page, "#slider"), find(page, "#canvas")
    assert canvas.text == "abcd<end>·"
    slider.send_keys(Keys.HOME)
    assert canvas.text == MASK * 6
    assert slider.get_attribute("aria-valuetext") == "all masked, 0 of 6 tokens"
    shown = []
    for _ in range(6):
        slider.send_keys(Keys.ARROW_RIGHT)
        shown.append(canvas.text)
    assert shown == [
        f"{MASK}b{MASK * 4}",
        f"{MASK}bc{MASK * 3}",
        f"abc{MASK * 3}",
        f"abcd{MASK * 2}",
        f"abcd<end>{MASK}",
        "abcd<end>·",
    ]
    assert find(page, "#position").text == "step 6 of 6, 6 of 6 tokens"
    slider.send_keys(Keys.ARROW_LEFT)
    assert texts(page, "#canvas .new") == ["<end>"]


def test_play_runs_to_the_end(opened: Callable[..., Any]) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    page = opened()
    find(page, "#play").click()
    assert find(page, "#play").text == "Pause"
    WebDriverWait(page, 20).until(lambda p: find(p, "#play").text == "Play")
    assert find(page, "#canvas").text == "abcd<end>·"


def test_tokens_say_when_and_how_surely_they_were_committed(opened: Callable[..., Any]) -> None:
    page = opened()
    find(page, "#canvas span").click()
    assert find(page, "#token").text == 'Position 1, "a": step 3, probability 0.5, entropy 0 nats'
    for shade in ("order", "confidence", "entropy"):
        find(page, f"#shade option[value={shade}]").click()
        assert len(page.find_elements("css selector", "#canvas .shaded")) == 5


def test_filters_narrow_the_list_and_say_when_nothing_is_left(opened: Callable[..., Any]) -> None:
    page = opened()
    assert len(texts(page, "#results li")) == 9
    choose(page, "state", "passed")
    assert texts(page, "#results li span") == ["passed 2/2"] * 3
    assert find(page, "#count").text == "3 of 9 shown rollouts match; 3 of them passed all tests."
    choose(page, "step", "2")
    assert texts(page, "#results li small") == ["step 2 · task-2"]
    choose(page, "state", "all")
    choose(page, "finish", "length")
    assert texts(page, "#results li span") == ["failed 1/2"]
    choose(page, "finish", "all")
    find(page, "[name=text]").send_keys("NEEDLE")
    assert texts(page, "#results li span") == ["not judged"]
    find(page, "[name=text]").send_keys(" in no completion")
    assert texts(page, "#results li") == []
    assert find(page, "#count").text == "No rollout matches. Widen a filter."
    assert not find(page, "#detail").is_displayed()
    find(page, "[name=text]").clear()
    choose(page, "step", "all")
    assert len(texts(page, "#results li")) == 9


def test_two_runs_have_a_filter_of_their_own(opened: Callable[..., Any]) -> None:
    page = opened(2)
    choose(page, "run", "run-1")
    assert len(texts(page, "#results li")) == 9
    assert "run-1" in find(page, "#detail-badges").text


def test_a_rollout_shows_its_prompt_program_and_each_verdict(opened: Callable[..., Any]) -> None:
    page = opened()
    choose(page, "state", "failed")
    assert texts(page, "#detail-tests li") == ["passed\nassert f(1) == 1", "failed\nassert f(2) < 3"]
    assert HOSTILE.split("\u2028")[0].strip() in find(page, "#detail-prompt").text
    assert find(page, "#detail-program").text.startswith("No Python block in the completion")
    choose(page, "state", "passed")
    assert find(page, "#detail-program").text == "def f(x): return x"


def test_pointing_at_a_plot_shows_the_values_of_a_step(opened: Callable[..., Any]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    page = opened()
    plot, output = find(page, "[id^=plot-pass-rate] .plot"), find(page, "[id^=plot-pass-rate] output")
    assert output.text == "0.3"
    page.execute_script("arguments[0].scrollIntoView({behavior: 'instant', block: 'center'})", plot)
    # The middle of the axis, whose left margin is wider than its right one.
    ActionChains(page).move_to_element_with_offset(plot, 14, 0).perform()
    assert output.text == "0.2 at step 2"


def test_the_dark_theme_is_dark_and_print_is_plain(opened: Callable[..., Any]) -> None:
    background = "return getComputedStyle(document.body).backgroundColor"
    page = opened()
    light = page.execute_script(background)
    emulate(page, "dark")
    dark = page.execute_script(background)
    emulate(page, "dark", "print")
    assert sum(map(int, light[4:-1].split(","))) > 600
    assert sum(map(int, dark[4:-1].split(","))) < 150
    assert page.execute_script(background) == "rgb(255, 255, 255)"
    assert not find(page, ".filters").is_displayed()
    assert find(page, "#canvas").is_displayed()


def test_every_control_has_a_name_and_can_be_reached_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened(2)
    for element in page.find_elements("css selector", "input, select, button, [role=img], [tabindex]"):
        if element.is_displayed():
            assert element.accessible_name, element.get_attribute("outerHTML")[:200]
    unreachable = "return [...document.querySelectorAll('input, select, button, summary')].filter(e => e.tabIndex < 0)"
    assert page.execute_script(unreachable) == []
