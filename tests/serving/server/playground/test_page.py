"""The page in a real browser, in front of a real engine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import pytest
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from tests.serving.server.observed import PacedClient, listening, make_app, make_paced_client

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Opened:
    """The page, and what it did that it should not.

    Attributes:
        page: As it was loaded.
        url: Of the server.
        asked: Every address that it asked for.
        complaints: Of its console.
    """

    page: Page
    url: str
    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    @property
    def answer(self) -> str:
        return self.page.locator("article[data-role=assistant] .text").last.text_content() or ""

    def settle(self) -> None:
        """The answer that is being written is at its end."""
        expect(self.page.locator("#stop")).to_be_hidden(timeout=30_000)


@contextmanager
def opened(browser: Browser, client: PacedClient, **context) -> Iterator[Opened]:
    with listening(make_app(client)[0]) as url:
        page = browser.new_page(**context)
        one = Opened(page, url)
        page.on("request", lambda request: one.asked.append(request.url))
        page.on("console", lambda message: one.complaints.append(message.text))
        page.on("pageerror", lambda error: one.complaints.append(str(error)))
        page.goto(url)
        expect(page.locator("#model")).to_have_text("tiny")
        yield one
        page.close()


@pytest.fixture
def chat(browser: Browser) -> Iterator[Opened]:
    """In front of a model that takes some milliseconds for a token."""
    with opened(browser, make_paced_client(pace=0.005)) as one:
        yield one


def picture_of(page: Page, canvas: str) -> str:
    return page.locator(canvas).evaluate("canvas => canvas.toDataURL()")


def test_an_answer_streams_and_the_engine_is_seen_at_work(chat: Opened) -> None:
    page = chat.page
    expect(page.locator(".share")).to_have_text(re.compile("^0 / 256"))
    idle = picture_of(page, "canvas.map")
    page.fill("#max_tokens", "150")
    chat.say("the quick brown fox")
    expect(page.locator("article[data-role=assistant] .text")).to_have_text(re.compile(r"\S"))
    first = chat.answer
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator(".running")).to_have_text("1")
    expect(page.locator(".used dd")).not_to_have_text("0")
    assert picture_of(page, "canvas.map") != idle
    chat.settle()
    assert chat.answer.startswith(first) and len(chat.answer) > len(first)
    expect(page.locator(".facts").last).to_have_text(re.compile(r"→ 150 tokens .* cut at max tokens"))
    expect(page.locator(".running")).to_have_text("0")
    expect(page.locator(".cached dd")).not_to_have_text("0")
    expect(page.locator(".map")).to_have_attribute("aria-label", re.compile("^KV cache: of 256 blocks 0 are in use"))
    assert [url for url in chat.asked if not url.startswith((chat.url, "data:"))] == []
    assert chat.complaints == []


def test_the_answer_stops_when_told_to_and_so_does_the_engine(chat: Opened) -> None:
    page = chat.page
    page.fill("#max_tokens", "900")
    chat.say("the lazy dog")
    expect(page.locator("article[data-role=assistant] .text")).to_have_text(re.compile(r"\S"))
    page.click("#stop")
    chat.settle()
    expect(page.locator(".facts").last).to_have_text(re.compile("stopped$"))
    expect(page.locator(".running")).to_have_text("0")
    page.fill("#max_tokens", "2")
    chat.say("and then")
    chat.settle()
    stats = httpx.get(f"{chat.url}/playground/state").json()["workers"][0]
    assert stats["generation_tokens"] < 900
    assert page.locator("article").count() == 4
    page.click("#new")
    assert page.locator("article").count() == 0


def test_settings_are_sent(browser: Browser) -> None:
    with opened(browser, make_paced_client()) as one:
        page = one.page
        sent: list[Request] = []
        page.on("request", lambda request: sent.append(request) if "completions" in request.url else None)
        for name, value in {"temperature": "0", "top_p": "0.9", "top_k": "5", "max_tokens": "3", "seed": "7"}.items():
            page.fill(f"#{name}", value)
        page.fill("#system", "Be brief.")
        page.fill("#stop_texts", "END\nSTOP")
        one.say("the quick brown fox")
        one.settle()
        body = sent[0].post_data_json
        settings = {name: body[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed", "stop")}
        assert settings == {
            "temperature": 0,
            "top_p": 0.9,
            "top_k": 5,
            "max_tokens": 3,
            "seed": 7,
            "stop": ["END", "STOP"],
        }
        assert [message["role"] for message in body["messages"]] == ["system", "user"]
        page.fill("#top_p", "7")
        one.say("refused by the form")
        assert len(sent) == 1 and page.locator("article").count() == 2


def test_what_is_said_is_text_whatever_it_looks_like(chat: Opened) -> None:
    text = "<img src=x onerror=alert(1)>\n<b>**bold**</b>\n\n  é 東京 🙂"
    pieces = [{"delta": {"role": "assistant", "content": ""}}, *({"delta": {"content": char}} for char in text)]
    events = [{"choices": [piece]} for piece in [*pieces, {"delta": {}, "finish_reason": "stop"}]]
    body = ": ping\r\n\r\n" + "".join(f"data: {json.dumps(event)}\r\n\r\n" for event in events) + "data: [DONE]\n\n"
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat.say(text)
    chat.settle()
    assert chat.answer == text
    assert chat.page.locator("article[data-role=user] .text").text_content() == text
    assert chat.page.locator("article img, article b").count() == 0
    assert chat.complaints == []


@pytest.mark.parametrize(
    ("end", "told"),
    [
        ("", "connection ended"),
        ('data: {"error": {"message": "It failed (request r-1)."}}\n\ndata: [DONE]\n\n', "request r-1"),
    ],
)
def test_an_answer_that_breaks_off_says_so(chat: Opened, end: str, told: str) -> None:
    body = 'data: {"choices": [{"delta": {"content": "half a"}}]}\n\n' + end
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat.say("go on")
    chat.settle()
    assert chat.answer == "half a"
    expect(chat.page.locator(".problem[role=alert]")).to_have_text(re.compile(told))


def test_a_model_without_a_template_goes_on_from_a_text(browser: Browser) -> None:
    with opened(browser, make_paced_client(template=None)) as one:
        expect(one.page.locator("#mode")).to_have_value("completion")
        expect(one.page.locator("#system")).to_be_hidden()
        one.page.fill("#max_tokens", "8")
        one.say("the quick brown")
        one.settle()
        assert one.answer
        assert any(url.endswith("/v1/completions") for url in one.asked)
        one.page.select_option("#mode", "chat")  # against better knowledge: it finds its way back
        one.say("the quick brown")
        one.settle()
        expect(one.page.locator("#mode")).to_have_value("completion")
        assert one.answer and one.page.locator(".problem[role=alert]").count() == 0


def test_errors_are_shown_where_they_happen(chat: Opened) -> None:
    page = chat.page
    page.fill("#max_tokens", "1024")
    chat.say("the quick brown fox")
    expect(page.locator(".problem[role=alert]")).to_have_text(re.compile("context is 1024 tokens"))
    expect(page.locator("#prompt")).to_have_value("the quick brown fox")  # to be sent again
    page.route("**/v1/chat/completions", lambda route: route.abort())
    chat.say("the lazy dog")
    expect(page.locator(".problem[role=alert]").last).to_have_text(re.compile("cannot be reached"))
    page.route("**/playground/state", lambda route: route.fulfill(status=401, json={"error": {"message": "no"}}))
    expect(page.locator("#engine-problem")).to_have_text(re.compile("API key is needed"))
    expect(page.locator("#key")).to_be_visible()
    page.fill("#key", "sk-mine")
    page.unroute("**/playground/state")
    with page.expect_request("**/playground/state") as asked:
        pass
    assert asked.value.headers["authorization"] == "Bearer sk-mine"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colours_and_everything_reached_by_keyboard(browser: Browser, scheme: str) -> None:
    with opened(browser, make_paced_client(), color_scheme=scheme) as one:
        page = one.page
        ratio = page.evaluate(
            """() => {
              const style = getComputedStyle(document.documentElement);
              const light = name => {
                const hex = style.getPropertyValue(name).trim();
                const parts = [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16) / 255);
                const [r, g, b] = parts.map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4);
                return .2126 * r + .7152 * g + .0722 * b;
              };
              const ratio = (one, other) => {
                const [dark, bright] = [light(one), light(other)].sort((a, b) => a - b);
                return (bright + .05) / (dark + .05);
              };
              const texts = "ink/ground dim/ground dim/panel dim/field accent/ground on-accent/accent bad/bad-ground";
              const ratios = texts.split(" ").map(pair => ratio(...pair.split("/").map(name => `--${name}`)));
              return { text: Math.min(...ratios), edge: ratio("--edge", "--field") };
            }"""
        )
        assert ratio["text"] >= 4.5 and ratio["edge"] >= 3  # WCAG 2.2 AA
        unlabelled = page.evaluate(
            "() => [...document.querySelectorAll('input, textarea, select')].filter(one => !one.labels.length).length"
        )
        assert unlabelled == 0
        reached = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("() => document.activeElement.id"))
        assert {"new", "theme", "log", "prompt", "mode", "system", "temperature", "stop_texts"} <= reached
        before = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        page.click("#theme")
        assert page.evaluate("() => getComputedStyle(document.body).backgroundColor") != before


def test_a_telephone_shows_one_thing_at_a_time(browser: Browser) -> None:
    with opened(browser, make_paced_client(), viewport={"width": 360, "height": 740}) as one:
        page = one.page
        for shown, part in (("engine", "canvas.map"), ("settings", "#temperature"), ("chat", "#prompt")):
            page.click(f"nav button[data-view={shown}]")
            for other in ("canvas.map", "#temperature", "#prompt"):
                expect(page.locator(other)).to_be_visible(visible=other == part)
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
