from __future__ import annotations

import json

import pytest

from blyan_node.errors import CheckpointError, RequestError
from blyan_node.inference.generation import Message
from blyan_node.model.template import ChatTemplate

CHAT = [Message("system", "Be brief."), Message("user", "Hé <|im_end|> {{ 7 * 7 }}")]
MESSAGES = [{"role": message.role, "content": message.content} for message in CHAT]


def render(source: str) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES)


def test_a_template_sees_messages_and_special_tokens() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}\n    {% if loop.first %}[{{ m.role|upper }}]{% endif %}\n"
        "{{ m['content'] | trim }}{{ eos_token if loop.last }}{% endfor %}{{ '!' if add_generation_prompt }}"
    )
    assert render(source) == "<s>[SYSTEM]Be brief.Hé <|im_end|> {{ 7 * 7 }}</s>!"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
        (
            (
                "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% elif i > 3 %}{% break %}{% endif %}"
                "{{ i }}{% endfor %}"
            ),
            "013",
        ),
        ("{{ messages[0] | tojson }}", '{"role": "system", "content": "Be brief."}'),
        ("{{ messages[1:] | length }}{{ messages[0]['content'].split(' ')[-1] }}", "1brief."),
        ("{{ 'a' ~ 1 ~ none ~ undefined_thing }}{{ 'b' + 'c' }}{{ 7 % 4 * 2 }}", "a1Nonebc6"),
        ("{% macro say(m) %}<{{ m.content }}>{% endmacro %}{{ say(messages[0]) }}", "<Be brief.>"),
        ("{{ messages | map(attribute='role') | join(',') }}{{ 'x-y'.replace('-', '+') }}", "system,userx+y"),
        ("{% for m in messages | selectattr('role', 'equalto', 'user') %}{{ loop.length }}{% endfor %}", "1"),
        ("{% for a, b in {'k': 'v'}.items() %}{{ a }}{{ b }}{% endfor %}{{ strftime_now('%Y') | length }}", "kv4"),
        ("{{ 'yes' if messages is iterable and messages[0].content is string }}", "yes"),
        ("{% for m in nothing %}x{% else %}none{% endfor %}", "none"),
        ("{% set messages = [{'role': 'x', 'content': 'y'}] + messages %}{{ messages | length }}", "3"),
    ],
)
def test_what_real_templates_use_works(source: str, text: str) -> None:
    assert render(source) == text


def test_a_template_may_refuse_a_chat() -> None:
    with pytest.raises(RequestError, match="must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'x' * 100000 }}{% endfor %}",
        "{{ 'x' * 10000000000 }}",
        "{% set x = 'x' * 10000000000 %}",
        "{{ [0] * 10000000000 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{% set n = namespace(v=10) %}{% for i in range(9999) %}{% set n.v = n.v * n.v %}{% endfor %}",
        "{% set n = namespace(v='x') %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
        "{% set n = namespace(v='x') %}{% for i in range(99) %}{% set n.v = n.v ~ n.v %}{% endfor %}",
        "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = n.v + n.v %}{% endfor %}",
        "{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}{{ n.v }}",
        ("{% set n = namespace(v=[1]) %}{% for i in range(99) %}{% set n.v = [n.v, n.v] %}{% endfor %}"
        "{{ n.v | tojson }}"),
        "{% set n = namespace(v='xx') %}{% for i in range(99) %}{% set n.v = n.v.replace('x', n.v) %}{% endfor %}",
        "{% set n = namespace(v='xx') %}{% for i in range(99) %}{% set n.v = n.v | replace('x', n.v) %}{% endfor %}",
        "{% set n = namespace(v='xx') %}{% for i in range(99) %}{% set n.v = [n.v, n.v] | join %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'x'.center(10000000000) }}",
        "{{ 'x' | center(10000000000) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ '{:>10000000000}'.format(1) }}",
        "{{ lipsum(n=10000000) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'etc' %}",
        "{% import 'os' as os %}",
        "{{ messages[0] }}",
        "{{ messages[99].content }}",
        "{{ 1 / 0 }}",
        "{{ '5' - 1 }}",
        "{% if %}",
        "{{ unknown() }}",
        "{{ 1 | nofilter }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 200 + "{% endif %}" * 200,
        "{% for i in [1] %}" * 200 + "{% endfor %}" * 200,
        "x" * 300_000,
    ],
)  # fmt: skip
@pytest.mark.timeout(20)
def test_a_hostile_or_broken_template_is_stopped(source: str) -> None:
    with pytest.raises(CheckpointError, match="template"):
        render(source)


@pytest.mark.parametrize("expression", ["messages.__class__", "''.__class__", "self._TemplateReference__context"])
def test_pythons_internals_are_not_there(expression: str) -> None:
    assert render("{{ " + expression + " }}") == ""
    with pytest.raises(CheckpointError):
        render("{{ " + expression + ".__mro__ }}")


def test_the_budget_starts_afresh_with_each_render() -> None:
    template = ChatTemplate("{% for i in range(60000) %}{{ i % 10 }}{% endfor %}", {})
    assert [len(template.render(MESSAGES)) for _ in range(12)] == [60000] * 12


def test_json_is_like_transformers() -> None:
    value = {"b": ["ü", 1.5, None, True], "a": "<&>"}
    template = ChatTemplate("{{ messages[0].content | tojson }}{{ messages | tojson(indent=2) }}", {})
    rendered = template.render([{"role": "user", "content": value}])  # type: ignore[dict-item]
    assert rendered.startswith(json.dumps(value, ensure_ascii=False))
    assert rendered.endswith(json.dumps([{"role": "user", "content": value}], ensure_ascii=False, indent=2))
