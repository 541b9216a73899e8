"""The page at / in a real browser: `make test-page`."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from trtllm_jax import LLM, EngineBusyError
from trtllm_jax.serve.app import create_app
from trtllm_jax.serve.settings import ServeSettings

pytestmark = pytest.mark.browser

SLOW = 0.05
SECONDS = 20


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail("the page's tests need Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A browser's tab on a server's page, and what went wrong in it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.url = url
        self.errors: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda said: self.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(url)

    def until(self, happened: Callable[[], Any]) -> None:
        """The page's own policy forbids the browser's way of waiting, which evaluates text."""
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < deadline
            self.page.wait_for_timeout(20)

    def say(self, text: str) -> None:
        self.page.get_by_label("Message", exact=True).fill(text)
        self.page.keyboard.press("Enter")

    def answer(self) -> Any:
        return self.page.locator(".message.assistant").last

    def whole(self) -> str:
        """The answer, once it is complete."""
        self.until(self.page.locator("#send").is_visible)
        return str(self.answer().inner_text())

    def begun(self) -> str:
        """The answer, once there are some letters of it."""
        self.until(lambda: self.answer().count() and len(self.answer().inner_text()) > 5)
        return str(self.answer().inner_text())

    def connected(self) -> None:
        self.until(lambda: self.page.locator("#model option").count())

    def problem(self) -> str:
        self.until(self.page.locator("#problem").is_visible)
        return str(self.page.locator("#problem").inner_text())


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Tab]]:
    """(address, **context) -> its page; afterwards nothing must have gone wrong but what the test took out."""
    tabs = []
    contexts = []

    def open_(url: str, **options: Any) -> Tab:
        context = chromium.new_context(**options)
        contexts.append(context)
        tabs.append(Tab(context.new_page(), url))
        return tabs[-1]

    yield open_
    for context in contexts:
        context.close()
    for tab in tabs:
        assert not tab.errors
        assert all(address.startswith((tab.url, "data:")) for address in tab.asked)


def at(client: Any) -> str:
    return str(client.base_url).removesuffix("/v1/")


def test_an_answer_streams(saying: Any, opened: Callable[..., Tab]) -> None:
    text = "Rain falls on the roof, 世界 🦙, and nobody minds. " * 3
    with saying(text) as (client, scripted):
        scripted.pause = SLOW
        tab = opened(at(client))
        tab.connected()
        tab.say("tell me")
        begun = tab.begun()
        assert len(begun) < len(text)
        assert tab.page.locator("#stop").is_visible()
        assert tab.whole().strip() == text.strip()
        assert text.startswith(begun.strip())
        assert "first token after" in tab.page.locator("#last").inner_text()
        tab.say("again")
        tab.until(lambda: tab.page.locator(".assistant").count() == 2)
        tab.whole()
        assert scripted.prompts[-1].startswith("user: tell me\nassistant: Rain")
        shot(tab, "chat")


def test_the_real_engine_answers_and_its_figures_show(address: str, opened: Callable[..., Tab]) -> None:
    tab = opened(address)
    tab.say("hello")
    assert tab.whole()
    assert "tokens/s" in tab.page.locator("#last").inner_text()
    tab.until(lambda: tab.page.locator("#figures dd").count() == 8)
    tab.until(lambda: tab.page.locator("#rate polyline").count())
    assert "up to 160 tokens" in tab.page.locator("#served").inner_text()


def test_stop_ends_the_sequence(saying: Any, opened: Callable[..., Tab]) -> None:
    with saying("one two three four five six seven eight " * 20) as (client, scripted):
        scripted.pause = SLOW
        tab = opened(at(client))
        tab.say("count")
        tab.begun()
        tab.page.get_by_role("button", name="Stop").click()
        assert tab.whole().startswith("one")
        assert scripted.aborted.wait(10)
        assert not tab.page.locator("#problem").is_visible()


def test_what_a_model_says_is_text(saying: Any, opened: Callable[..., Tab]) -> None:
    text = '<img src=x onerror="window.bad=1"><script>window.bad=1</script><b>bold</b> &lt; [x](javascript:1)'
    with saying(text) as (client, _):
        tab = opened(at(client))
        tab.say('<img src=y onerror="window.bad=1">')
        assert tab.whole() == text
        assert tab.page.locator("#messages img, #messages script, #messages b, #messages a").count() == 0
        assert tab.page.evaluate("window.bad") is None
        assert tab.page.locator(".message.user").inner_text() == '<img src=y onerror="window.bad=1">'


def test_reasoning_is_folded_and_clear_clears(saying: Any, opened: Callable[..., Tab]) -> None:
    with saying("Hm, hm.</think>Rain.", reasoning_parser="deepseek-r1") as (client, scripted):
        tab = opened(at(client))
        tab.say("weather?")
        assert tab.whole().endswith("Rain.")
        assert not tab.page.get_by_text("Hm, hm.").is_visible()
        tab.page.get_by_text("Reasoning").click()
        assert tab.page.get_by_text("Hm, hm.").is_visible()
        tab.page.get_by_role("button", name="Clear").click()
        assert tab.page.locator(".message").count() == 0
        tab.say("and now?")
        tab.whole()
        assert scripted.prompts[-1] == "user: and now?\nassistant:"


def test_a_key_is_asked_for(tiny_llm: LLM, served: Any, opened: Callable[..., Tab]) -> None:
    app = create_app(tiny_llm, ServeSettings(model_names=("tiny",), api_keys=("right",)))
    with served(app) as url:
        tab = opened(url)
        assert "API key is missing or wrong" in tab.problem()
        field = tab.page.get_by_label("API key")
        field.fill("wrong")
        field.press("Tab")
        assert "API key is missing or wrong" in tab.problem()
        field.fill("right")
        field.press("Tab")
        tab.connected()
        tab.say("hello")
        assert tab.whole()
        refused = [error for error in tab.errors if "401" in error]
        tab.errors[:] = [error for error in tab.errors if error not in refused]
        assert refused


def test_a_full_queue_loses_nothing(saying: Any, opened: Callable[..., Tab]) -> None:
    with saying("x") as (client, scripted):
        tab = opened(at(client))
        tab.connected()

        def refuse(*_: Any, **__: Any) -> None:
            raise EngineBusyError("7 sequences run or wait: try again later")

        scripted.generate_async = refuse
        tab.say("my long question")
        assert "try again later" in tab.problem()
        assert tab.page.get_by_label("Message", exact=True).input_value() == "my long question"
        assert tab.page.locator(".message").count() == 0
        tab.errors[:] = [error for error in tab.errors if "429" not in error]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ('data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n', "broke off"),
        (
            'data: {"choices":[{"index":0,"delta":{"content":"half"}}]}\n\n'
            'data: {"error":{"message":"the engine failed"}}\n\n',
            "the engine failed",
        ),
    ],
)
def test_an_answer_that_breaks_off_says_so(address: str, opened: Callable[..., Tab], body: str, told: str) -> None:
    tab = opened(address)
    tab.connected()
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    tab.say("hello")
    assert told in tab.problem()
    assert tab.whole() == "half"


def test_it_fits_small_and_dark_screens(address: str, opened: Callable[..., Tab]) -> None:
    for scheme, size in (("dark", {"width": 1280, "height": 800}), ("light", {"width": 360, "height": 740})):
        tab = opened(address, color_scheme=scheme, viewport=size)
        tab.say("hello")
        tab.whole()
        wide = tab.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
        assert not wide
        shot(tab, f"{scheme}-{size['width']}")


def shot(tab: Tab, name: str) -> None:
    """A picture to look at, where the environment names a folder for it."""
    if folder := os.environ.get("PAGE_PICTURES"):
        tab.page.wait_for_timeout(2500)
        tab.page.screenshot(path=Path(folder, f"{name}.png"))
