"""Conversations -> text: what transformers makes of them too, and nothing that a template could do to the server."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from lightning_llm.errors import ConfigurationError
from lightning_llm.serving.chat_template import SECONDS, ChatTemplate
from lightning_llm.serving.errors import RequestError

TEMPLATES = {path.stem: path.read_text() for path in (Path(__file__).parent / "templates").glob("*.jinja")}
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it's like: <b>rain</b> & shine, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [{"role": "user", "content": "Is 1 < 2 & \"2\" > '1'?\n  Ünïcödé 🙂 日本語 "}],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Hello. "},
        {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
    ],
    "tools": [
        {"role": "user", "content": "Weather in Zürich?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}],
        },
        {"role": "tool", "content": "17 °C"},
        {"role": "user", "content": "And tomorrow?"},
    ],
}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def make() -> Iterator[Any]:
    """Makes templates, whose processes end with the test."""
    made: list[ChatTemplate] = []

    def build(text: str | dict[str, str], **arguments: Any) -> ChatTemplate:
        made.append(ChatTemplate(text, SPECIAL_TOKENS, **arguments))
        return made[-1]

    yield build
    for template in made:
        template.close()


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(make: Any, name: str) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)
    theirs.chat_template = TEMPLATES[name]
    ours = make(TEMPLATES[name])
    compared = 0
    for title, messages in CONVERSATIONS.items():
        if title == "tools" and name not in ("llama3", "qwen3"):
            continue
        for tools in (None, [WEATHER]):
            for prompt in (True, False):
                expected = theirs.apply_chat_template(
                    messages, tools=tools, add_generation_prompt=prompt, tokenize=False
                )
                assert ours.render(messages, tools=tools, add_generation_prompt=prompt) == expected
                compared += "Hi" in expected or "Zürich" in expected or "Ünïcödé" in expected
    assert compared >= 8
    if name == "qwen3":
        assert ours.variables == {"enable_thinking"}
        expected = theirs.apply_chat_template(USER, add_generation_prompt=True, tokenize=False, enable_thinking=False)
        assert ours.render(USER, enable_thinking=False) == expected != ours.render(USER)


def test_what_a_template_refuses_is_the_clients_mistake(make: Any) -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        make(TEMPLATES["mistral"]).render(USER + USER)
    assert caught.value.param == "messages"


def test_messages_that_it_cannot_cope_with(make: Any) -> None:
    template = make(TEMPLATES["chatml"])
    with pytest.raises(RequestError, match="cannot render these messages .*content"):
        template.render([{"role": "user"}])
    with pytest.raises(RequestError, match="plain JSON"):
        template.render([{"role": "user", "content": object()}])
    assert "Hi" in template.render(USER), "it goes on"


@pytest.mark.parametrize("variables", [{"tokenize": True}, {"chat_template": "{{ 1 }}"}, {"bos_token": "x"}])
def test_only_what_the_template_asks_for_may_be_set(make: Any, variables: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="has no .*; it has enable_thinking") as caught:
        make("{{ bos_token }}{{ enable_thinking }}{{ messages[0].content }}").render(USER, **variables)
    assert caught.value.param == "chat_template_kwargs"


def test_settings_with_a_default_may_be_set(make: Any) -> None:
    text = (
        "{% if not date is defined %}{% set date = 'today' %}{% endif %}{% set verbose = verbose or false %}"
        "{% set own = 1 %}{% for each in messages %}{{ each.content }}{{ own }}{{ loop.index }}{% endfor %}"
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(date) }}{{ verbose }}"
    )
    template = make(text)
    assert template.variables == {"date", "verbose"}
    assert template.render(USER) == "Hi11todayFalse"
    assert template.render(USER, date="2 May", verbose=True) == "Hi112 MayTrue"


def test_with_tools_the_template_for_tools(make: Any) -> None:
    template = make({"default": "plain", "tool_use": "tools: {{ tools|length }}"})
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[]) == "plain"
    assert template.render(USER, tools=[WEATHER]) == "tools: 1"


def test_what_is_not_jinja_is_refused_at_once() -> None:
    with pytest.raises(ConfigurationError, match="model.jinja is not a Jinja template .*line 2"):
        ChatTemplate("a\n{% for %}", origin="model.jinja")


@pytest.mark.parametrize(
    "text",
    [
        "{{ lipsum.__globals__['os'].popen('touch ' ~ messages[0].content).read() }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ messages[0].content) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.jinja2 }}",
        "{{ namespace(__init__=1) }}",
        "{{ dict.__globals__.jinja2 }}",
        "{{ messages.append(1) }}",
        "{{ '{0.__class__.__init__.__globals__}'.format(namespace()) }}",
        "{{ (messages|map(attribute='__class__')|list)[0].mro() }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os.getcwd() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(make: Any, tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError):
        make(text).render([{"role": "user", "content": str(tmp_path / "owned")}])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "takes more than"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", "takes more than"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than"),
        ("{{ (messages|length + 8) ** (9 ** 9) }}", "takes more than"),
        ("{{ ('a' * 30 ~ messages[0].content)|urlize ~ 'x' * 10 ** 10 }}", "too much memory"),
        (
            "{% set n = namespace(x='xxxx') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "takes|memory",
        ),
        (
            "{% for i in range(90000) %}{% for j in range(90000) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
            "characters|takes more than",
        ),
    ],
)
def test_a_template_is_stopped(make: Any, text: str, reason: str) -> None:
    template, good = make(text, seconds=0.2), make("{{ messages[0].content }}")
    before = time.process_time()
    with pytest.raises(RequestError, match=reason):
        template.render(USER)
    assert time.process_time() - before < 0.2, "this process does nothing of it"
    assert good.render(USER) == "Hi"


def test_limits_without_being_asked(make: Any) -> None:
    assert SECONDS < 1
    with pytest.raises(RequestError, match=f"more than {SECONDS} s"):
        make("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}").render(USER)


def test_the_process_is_started_again(make: Any) -> None:
    template = make("{% if messages|length > 1 %}{{ 9 ** ((messages|length + 9) ** 9) }}{% endif %}Hi", seconds=0.1)
    assert template.render(USER) == "Hi"
    with pytest.raises(RequestError, match=r"more than 0.1 s"):
        template.render(USER * 99)
    assert template.render(USER) == "Hi"


def test_secrets_stay_in_this_process(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    template = make("{{ messages[0].content }}")
    template.render(USER)
    process = template._renderer._process
    environment = Path(f"/proc/{process.pid}/environ")
    if environment.exists():
        assert b"HF_TOKEN" not in environment.read_bytes()
        assert "Max open files            0" in Path(f"/proc/{process.pid}/limits").read_text()


def test_threads_share_it(make: Any) -> None:
    template = make("{{ messages[0].content }}")
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        for _ in range(20):
            answers[number] = template.render([{"role": "user", "content": f"{number}" * 1000}])
            assert answers[number] == f"{number}" * 1000

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [0, 1, 2, 3]


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("x")
    template.render(USER)
    pid = template._renderer._process.pid
    del template
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_template_for_tools_alone_refuses_the_other_conversations() -> None:
    template = ChatTemplate({"tool_use": "{{ tools | length }}"})
    assert template.render([{"role": "user", "content": "a"}], tools=[{"type": "function"}]) == "1"
    with pytest.raises(RequestError, match="only tool_use") as caught:
        template.render([{"role": "user", "content": "a"}])
    assert caught.value.param == "messages"
