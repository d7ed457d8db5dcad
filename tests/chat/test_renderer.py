"""Chat templates in their own process: the text that transformers renders, and no more than their share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from tests.chat import templates
from tests.conftest import eventually, is_gone
from tpworker.chat import renderer as renderer_module
from tpworker.chat.renderer import MAX_RENDERERS, TemplateRenderer
from tpworker.errors import InvalidRequest, RuntimeStopped
from tpworker.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("nothing_left")

ROOT = Path(__file__).parents[2]
HI = [{"role": "user", "content": "Hi"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
Make = Callable[[str], TemplateRenderer]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[TemplateRenderer] = []

    def maker(template: str) -> TemplateRenderer:
        made.append(TemplateRenderer(template, {"bos_token": "<s>"}))
        return made[-1]

    yield maker
    for one in made:
        one.close()


def chatting(template: Any) -> Tokenizer:
    backend = Backend(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **special))


def processes() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.name() == "tpworker-template"]


def eventually_one_works() -> None:
    eventually(lambda: any(process.cpu_times().user > 0.3 for process in processes()))


# ------------------------------------------------------------------------------- the text

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": HI,
    "system": [{"role": "system", "content": " Be <brief> & kind. "}, *HI],
    "several": [
        *HI,
        {"role": "assistant", "content": "Ho\n", "name": None},
        {"role": "user", "content": "€👩‍👧"},
    ],
    "thoughts": [
        *HI,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo"},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "\nWell"},
    ],
    "refused by some": [{"role": "assistant", "content": "Ho"}, *HI],
}


def rendered_by(fast: Any, messages: Any, **options: Any) -> str | Exception:
    """transformers' text, or what it says of these messages."""
    try:
        text: str = fast.apply_chat_template(messages, **options)
    except Exception as error:
        return error
    return text


@pytest.mark.parametrize("name", templates.ALL)
def test_it_is_the_text_that_transformers_renders(name: str) -> None:
    tokenizer = chatting(templates.ALL[name])
    for messages in CONVERSATIONS.values():
        if name == "parts":
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        for prompted in (True, False):
            for variables in ({}, {"enable_thinking": False, "bos_token": "<another>"}):
                options: dict[str, Any] = {"add_generation_prompt": prompted, **variables}
                expected = rendered_by(tokenizer._fast, messages, tokenize=False, **options)
                if isinstance(expected, str):
                    assert tokenizer.apply_chat_template(messages, **options) == expected
                else:
                    with pytest.raises(InvalidRequest, match=re.escape(str(expected))):
                        tokenizer.apply_chat_template(messages, **options)
    tokenizer.close()


def test_a_string_or_parts_as_the_template_wants_them() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    for template, expected in (
        ("{% for m in messages %}{{ m.content + '!' }}{% endfor %}", ("Hi!", "a\nb!")),
        (
            "{% for m in messages %}{% for c in m['content'] | selectattr('type','equalto','text') %}"
            "{{ c['text'] }}.{% endfor %}{% endfor %}",
            ("Hi.", "a.b."),
        ),
        (templates.GLM, ("[gMASK]<sop><|user|>\nHi<|assistant|>", "[gMASK]<sop><|user|>\nab<|assistant|>")),
    ):
        tokenizer = chatting(template)
        assert (tokenizer.apply_chat_template(HI), tokenizer.apply_chat_template(parts)) == expected
        tokenizer.close()


def test_of_several_templates_it_is_the_default() -> None:
    tokenizer = chatting({"default": "{{ messages[0].content }}", "tool_use": "no"})
    assert tokenizer.apply_chat_template(HI) == "Hi"
    tokenizer.close()
    with pytest.raises(InvalidRequest, match=r"\(rag, tool_use\) none is named 'default'"):
        chatting({"tool_use": "a", "rag": "b"}).apply_chat_template(HI)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('Only users, please') }}", "refuses these messages: Only users, please"),
        ("{{ 1 / 0 }}", "fails on these messages: ZeroDivisionError: division by zero"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute 'nothing'"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(_x=1) }}", "'_x'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("a\n{% if %}", r"is broken: line 2: Expected an expression"),
        ("{{ 'a' ", "is broken: line 1: "),
        ("{% for i in range(9) %}", "is broken: line 1: Unexpected end of template"),
        ("{{ 1 }}" + "{% if 1 %}" * 200 + "{% endif %}" * 200, "is broken: "),
    ],
)
def test_what_a_template_says_and_what_is_wrong_with_it(make: Make, template: str, words: str) -> None:
    renderer = make(template)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match=words) as caught:
            renderer.render(HI, {}, {})
        assert caught.value.parameter == "messages"
        assert "Traceback" not in str(caught.value)
    assert len(processes()) == ("broken" not in words)


# ------------------------------------------------------------------------------- its share


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ 'a' * 3000000000 }}", "more than 512 MiB of memory"),
        ("{{ 'a' * n }}", "more than 512 MiB of memory"),
        ("{{ '%3000000000d' % 1 }}", "more than 512 MiB of memory"),
        ("{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
         "more than 512 MiB of memory"),
        ("{{ 'a' * 40000000 }}", "more than 33554432 characters"),
        ("{% for i in range(99999) %}{{ 'a' * 9999 }}{% endfor %}", "more than 33554432 characters"),
    ],
)  # fmt: skip
def test_memory_and_text_are_bounded(make: Make, template: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        make(template).render(HI, {}, {"n": 3 * 10**9})


@pytest.mark.parametrize(
    "template", [ENDLESS, "{{ (9 ** 9999999) ** 9 }}", "{% if n %}" + ENDLESS + "{% endif %}"]
)
def test_time_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(renderer_module, "MAX_SECONDS", 0.3)
    with pytest.raises(InvalidRequest, match=r"more than 0\.3 s of processor time, the limit"):
        make(template).render(HI, {}, {"n": 1})


def test_who_comes_next_finds_a_new_process(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renderer_module, "MAX_SECONDS", 0.3)
    renderer = make("{% if n is defined %}" + ENDLESS + "{% endif %}{{ bos_token }}{{ messages[0].content }}")
    for _ in range(2):
        assert renderer.render(HI, {}, {}) == "<s>Hi"
        (before,) = processes()
        assert renderer.render(HI, {}, {}) == "<s>Hi"
        assert processes() == [before]
        with pytest.raises(InvalidRequest):
            renderer.render(HI, {}, {"n": 1})
        assert not processes()


def test_one_that_was_killed_while_it_did_nothing_is_replaced(make: Make) -> None:
    renderer = make("{{ messages[0].content }}")
    renderer.render(HI, {}, {})
    (process,) = processes()
    process.kill()  # it need not be gone yet
    assert renderer.render(HI, {}, {}) == "Hi"
    assert processes() != [process]


def test_one_that_is_killed_at_work_is_named(make: Make) -> None:
    renderer, errors = make(ENDLESS), []

    def work() -> None:
        try:
            renderer.render(HI, {}, {})
        except InvalidRequest as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    eventually_one_works()
    processes()[0].send_signal(signal.SIGKILL)
    thread.join()
    assert "was ended by SIGKILL" in errors[0]


def test_while_one_takes_its_time_others_are_rendered(make: Make) -> None:
    assert MAX_RENDERERS > 1
    renderer = make("{% if n is defined %}" + ENDLESS + "{% endif %}{{ messages[0].content }}")
    errors = []

    def work() -> None:
        try:
            renderer.render(HI, {}, {"n": 1})
        except RuntimeStopped as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    eventually_one_works()
    assert [renderer.render(HI, {}, {}) for _ in range(3)] == ["Hi"] * 3
    assert thread.is_alive()
    renderer.close()  # does not wait for it
    thread.join()
    assert len(errors) == 1
    with pytest.raises(RuntimeStopped):
        renderer.render(HI, {}, {})


def test_threads_share_it(make: Make) -> None:
    renderer, texts = make("{{ messages[0].content }}"), []

    def work(name: str) -> None:
        texts.extend(renderer.render([{"role": "user", "content": name}], {}, {}) == name for _ in range(50))

    threads = [threading.Thread(target=work, args=(str(i),)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [True] * 300
    assert len(processes()) <= MAX_RENDERERS


def test_it_ends_with_its_tokenizer() -> None:
    tokenizer = chatting("{{ messages[0].content }}")
    tokenizer.apply_chat_template(HI)
    assert len(processes()) == 1
    del tokenizer  # what is left behind is looked for after the test


def test_nothing_is_started_before_the_first_conversation() -> None:
    tokenizer = chatting("{{ messages[0].content }}")
    assert tokenizer.has_chat_template
    assert not processes()
    tokenizer.close()
    with pytest.raises(RuntimeStopped):
        tokenizer.apply_chat_template(HI)


def test_it_ends_with_its_parent_whatever_it_does() -> None:
    program = (
        "import sys, threading\nfrom tpworker.chat.renderer import TemplateRenderer\n"
        f"renderer = TemplateRenderer({ENDLESS!r}, {{}})\n"
        f"threading.Thread(target=renderer.render, args=({HI!r}, {{}}, {{}})).start()\n"
        "while not renderer._pool._busy: pass\n"
        "print(next(iter(renderer._pool._busy))._process.pid, flush=True)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        eventually(lambda: is_gone(pid) or psutil.Process(pid).cpu_times().user > 0.3)
        assert not is_gone(pid)
        parent.kill()
    eventually(lambda: is_gone(pid))


def test_the_process_is_small_and_out_of_reach_of_signals_to_all(make: Make) -> None:
    renderer = make("{{ messages[0].content }}")
    renderer.render(HI, {}, {})
    (process,) = processes()
    assert process.memory_info().rss < 60 << 20
    assert os.getsid(process.pid) != os.getsid(0)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    renderer.render(HI, {}, {})
    assert processes() == [process]


def test_the_process_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, tpworker.chat.process\n"
        "unwanted = {'torch', 'transformers', 'tokenizers', 'numpy', 'zmq', 'asyncio'}\n"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


# ------------------------------------------------------------------------------- variables


@pytest.mark.parametrize(
    "name",
    ["messages", "self", "documents", "tokenize", "chat_template", "conversation", "loop",
     "raise_exception", "namespace", "return_dict", "no identifier", "", "1st", "not", "true"],
)  # fmt: skip
def test_names_that_clients_cannot_give(name: str) -> None:
    tokenizer = chatting("{{ messages[0].content }}")
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.apply_chat_template(HI, **{name: []})
    assert caught.value.parameter == "chat_template_kwargs"
    assert repr(name) in str(caught.value)


def test_tools_are_the_templates_own() -> None:
    tokenizer = chatting("{{ tools[0].function.name if tools is not none else 'none' }}")
    assert tokenizer.apply_chat_template(HI) == "none"
    tool = {"type": "function", "function": {"name": "f"}}
    assert tokenizer.apply_chat_template(HI, tools=(tool,)) == "f"


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("value", [2**64, nested(2000), object(), {"a": {1, 2}}])
def test_values_that_are_no_plain_data(make: Make, value: Any) -> None:
    renderer = make("{{ messages[0].content }}")
    for messages, variables, name in (
        (HI, {"x": value}, "chat_template_kwargs"),
        ([{"role": "user", "content": value}], {}, "messages"),
    ):
        with pytest.raises(InvalidRequest, match="plain data") as caught:
            renderer.render(messages, {}, variables)
        assert caught.value.parameter == name


def test_values_that_are_plain_data(make: Make) -> None:
    value = {"a": [1, 2.5, None, True, "\ud83d"], "b": nested(400), "c": 2**63}
    assert (
        make("{{ x.a }}{{ x.b }}{{ x.c }}").render(HI, {}, {"x": value}) == f"{value['a']}{value['b']}{2**63}"
    )


@pytest.mark.parametrize("messages", [[], ["Hi"], [None], [1, 2]])
def test_messages_that_are_none(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="refuses these messages") as caught:
        chatting("{{ messages[0].content }}").apply_chat_template(messages)
    assert caught.value.parameter == "messages"
