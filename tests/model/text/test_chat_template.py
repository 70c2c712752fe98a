"""Chat templates: BOS, dates, variables, hostile templates, limits, and a child process that goes on after errors."""

import datetime

import pytest

from cna_kernels import InputError
from cna_kernels.model.prompts.files import PromptSet
from cna_kernels.model.text import chat_template
from cna_kernels.model.text.prompt_encoder import PromptEncoder
from cna_kernels.model.text.tokenizer import Tokenizer
from tiny import SPECIAL, TEMPLATE, TEXT_VOCABULARY, set_field

BOS, USER, ASSISTANT, END = (SPECIAL.index(token) for token in ("<s>", "<user>", "<assistant>", "<end>"))


@pytest.mark.parametrize(("in_template", "n_bos"), [("", 0), ("{{ bos_token }}", 1), ("{{ bos_token }}" * 2, 2)])
def test_a_bos_is_the_templates_matter(directory, in_template, n_bos):
    set_field(directory, chat_template=TEMPLATE.replace("{{ bos_token }}", in_template))
    ids = Tokenizer(directory, TEXT_VOCABULARY).encode_chat(["hi", "you"])
    for row in ids:
        assert row[: n_bos + 1] == [BOS] * n_bos + [USER] and row[-2:] == [END, ASSISTANT] and row.count(BOS) == n_bos
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


def test_a_template_sees_one_day(directory):
    set_field(directory, chat_template="{% if strftime_now is defined %}{{ strftime_now('%Y-%m-%d') }}{% endif %}")
    template = Tokenizer(directory, TEXT_VOCABULARY).template
    assert template.is_dated and template.render([[{"content": "hi"}]]) == [f"{template.moment:%Y-%m-%d}"]
    template = Tokenizer(directory, TEXT_VOCABULARY).template
    template.moment = datetime.datetime(2024, 7, 26)
    assert template.render([[{"content": "hi"}]]) == ["2024-07-26"]


def test_variables(directory):
    set_field(directory, chat_template="{{ enable_thinking }} {{ messages|length }} {{ bos_token }}")
    tokenizer = Tokenizer(directory, TEXT_VOCABULARY)
    chat = [[{"role": "user", "content": "x"}]]
    assert tokenizer.template.render(chat, {"enable_thinking": False, "bos_token": "B"}) == ["False 1 B"]
    assert tokenizer.template.render(chat) == [" 1 <s>"]  # the variables of one call are not the next one's
    with pytest.raises(InputError, match="template_args: 'messages' is not a variable to give"):
        tokenizer.encode_chat(["x"], template_args={"messages": []})


def test_templates_without_a_default(directory):
    set_field(directory, chat_template=[{"name": "rag", "template": "x"}])
    with pytest.raises(InputError, match=r"tokenizer_config\.json: has no chat template named 'default', but rag"):
        Tokenizer(directory, TEXT_VOCABULARY)
    set_field(directory, chat_template=3)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template: expected text, or texts with names"):
        Tokenizer(directory, TEXT_VOCABULARY)


def test_a_text_that_is_too_long_stops_the_rest(directory):
    """The texts come one by one; those that nobody waits for any more are not taken for the next call's."""
    set_field(directory, chat_template="{{ messages[0]['content'] }}")
    template = Tokenizer(directory, TEXT_VOCABULARY).template
    texts = template.each([[{"content": f"{n}" * 100_000}] for n in range(50)])
    assert next(texts)[:2] == "00"
    texts.close()
    assert template.render([[{"content": "after"}]]) == ["after"]


def test_a_child_is_started_once(directory):
    """A caller that takes one text per conversation leaves its iterator before the end: the child goes on."""
    set_field(directory, chat_template="{{ messages[0]['content'] }}")
    encoder, children = PromptEncoder(Tokenizer(directory, TEXT_VOCABULARY), context_length=64), set()
    for _ in range(3):
        encoder.encode(PromptSet.of(["one", "two"], "asked"))
        children.add(encoder.tokenizer.template._child.pid)
    assert len(children) == 1


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


@pytest.mark.parametrize("template", ["{% nonsense %}", "{{ raise_exception('no') }}", "{{ messages[9].x.y }}"])
def test_the_second_error_equals_the_first(directory, template):
    set_field(directory, chat_template=template)
    tokenizer, seen = Tokenizer(directory, TEXT_VOCABULARY), set()
    for _ in range(3):
        with pytest.raises(InputError) as caught:
            tokenizer.encode_chat(["x"])
        seen.add(str(caught.value))
    assert len(seen) == 1


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
