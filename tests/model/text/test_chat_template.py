"""Chat templates: one BOS, dates, hostile templates, limits, and a child process that goes on after errors."""

import pytest

from cna_kernels import InputError
from cna_kernels.model.text import chat_template
from cna_kernels.model.text.tokenizer import Tokenizer
from tiny import SPECIAL, TEMPLATE, TEXT_VOCABULARY, set_field

BOS, USER, ASSISTANT, END = (SPECIAL.index(token) for token in ("<s>", "<user>", "<assistant>", "<end>"))


@pytest.mark.parametrize("in_template", ["", "{{ bos_token }}", "{{ bos_token }}{{ bos_token }}"])
def test_chat_has_exactly_one_bos(directory, in_template):
    set_field(directory, chat_template=TEMPLATE.replace("{{ bos_token }}", in_template))
    ids = Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi", "you"])
    for row in ids:
        assert row[:2] == [BOS, USER] and row[-2:] == [END, ASSISTANT] and row.count(BOS) == 1
    assert len(ids[1]) == len(ids[0]) + 1


def test_double_bos_on_request(directory):
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.encode_chat(["hi"], double_bos=True)[0] == [BOS, *tokenizer.encode_chat(["hi"])[0]]


def test_template_file_and_named_templates(directory):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    expected = Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi"])
    set_field(directory, chat_template=named)
    assert Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi"]) == expected
    set_field(directory, chat_template=None)
    assert Tokenizer(directory, TEXT_VOCABULARY).template is None
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    assert Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi"]) == expected


def test_dates_are_fixed_where_the_template_allows(directory):
    asks = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}fixed{% endif %}"
    set_field(directory, chat_template=asks)
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.decode(tokenizer.encode_chat(["hi"])[0]) == "fixed"
    set_field(directory, chat_template="{{ strftime_now('%Y') }}")
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    assert tokenizer.decode(tokenizer.encode_chat(["hi"])[0]).isdecimal()


TEMPLATES = {
    "{% for": "TemplateSyntaxError",
    "{{ raise_exception('no system role') }}": "TemplateError: no system role",
    "{{ messages[0]['nobody'].x }}": "UndefinedError",
    "{{ ''.__class__.__mro__ }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "took longer than",
    "{{ 'x' * 5000000 }}": "output is longer than 4194304 characters",
    "{{ 'x' * 3000000000 }}": "MemoryError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "x" * 70_000: "chat template is larger than 65536 bytes",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=list(TEMPLATES.values()))
def test_hostile_templates(directory, template, monkeypatch):
    monkeypatch.setattr(chat_template, "_SECONDS", 2.0)
    set_field(directory, chat_template=template)
    with pytest.raises(InputError) as caught:
        Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi"])
    text = str(caught.value)
    assert text.startswith(str(directory / "tokenizer_config.json")) and TEMPLATES[template] in text
    assert "\n" not in text


def test_the_child_goes_on_after_a_bad_conversation(directory):
    set_field(directory, chat_template="{% if messages[0]['content'] == 'no' %}{{ raise_exception('x') }}{% endif %}a")
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    with pytest.raises(InputError, match="TemplateError: x"):
        tokenizer.encode_chat(["no"])
    assert tokenizer.decode(tokenizer.encode_chat(["yes"])[0]) == "a"


def test_an_interrupted_answer_is_not_taken_for_the_next(directory, monkeypatch):
    set_field(directory, chat_template="{{ messages[0]['content'] }}")
    template = Tokenizer(directory, TEXT_VOCABULARY).template
    assert template.render([[{"content": "first"}]]) == ["first"]
    join = chat_template.threading.Thread.join

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_template.threading.Thread, "join", interrupt)
    with pytest.raises(KeyboardInterrupt):
        template.render([[{"content": "slow"}]])
    monkeypatch.setattr(chat_template.threading.Thread, "join", join)
    assert template.render([[{"content": "second"}]]) == ["second"]


def test_threads_get_their_own_texts(directory):
    from concurrent.futures import ThreadPoolExecutor

    template = Tokenizer(directory, TEXT_VOCABULARY).template
    with ThreadPoolExecutor(4) as pool:
        texts = [[f"{thread}-{n}" for n in range(20)] for thread in range(4)]
        jobs = [pool.submit(lambda t=t: [template.render([[{"content": x}]])[0] for x in t]) for t in texts]
        for job, own in zip(jobs, texts, strict=True):
            assert all(text in rendered for text, rendered in zip(own, job.result(), strict=True))


def test_no_template(directory):
    set_field(directory, chat_template=None)
    with pytest.raises(InputError, match=r"has no chat template; use plain prompts"):
        Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi"])
