"""Messages for a chat template: the last one may be continued, and developers may speak as the system."""

import json
import shutil

import pytest

from rootcellar import demo
from rootcellar.errors import RequestError
from rootcellar.text import Tokenizer

TURN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content{FILTER} }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
KEEPS, TRIMS = TURN.replace("{FILTER}", ""), TURN.replace("{FILTER}", " | trim")
FORGETS = "{{ messages[0].content }}"
USER = {"role": "user", "content": "Sure?"}


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer with a given chat template."""

    def make(template):
        folder = tmp_path / "model"
        shutil.copytree(demo.path(), folder, dirs_exist_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        return Tokenizer(folder)

    return make


@pytest.mark.parametrize(
    ("template", "text", "shown"),
    [  # as transformers gives them
        (KEEPS, "Sure", "Sure"), (KEEPS, "Sure, ", "Sure, "), (KEEPS, "  a", "  a"), (KEEPS, "", ""),
        (TRIMS, "Sure", "Sure"), (TRIMS, "Sure, ", "Sure,"), (TRIMS, "  a", "a"), (TRIMS, " \n", ""),
    ],
)  # fmt: skip
def test_the_last_message_stays_open(tokenizer, template, text, shown):
    messages = [USER, {"role": "assistant", "content": text}]
    rendered = tokenizer(template).apply_chat_template(messages, continue_final_message=True)
    assert rendered == f"[user]Sure?[end][assistant]{shown}"
    assert messages[1]["content"] == text


@pytest.mark.parametrize(
    ("template", "messages", "more", "said"),
    [
        (KEEPS, [], {}, "needs a last message"),
        (KEEPS, [{"role": "user", "content": ["a"]}], {}, "content is a text"),
        (KEEPS, [USER], {"add_generation_prompt": True}, "exclude each other"),
        (FORGETS, [USER, USER], {}, "leaves the last message out"),
    ],
)
def test_what_cannot_stay_open(tokenizer, template, messages, more, said):
    with pytest.raises(RequestError, match=said):
        tokenizer(template).apply_chat_template(messages, continue_final_message=True, **more)


def test_developers(tokenizer):
    messages = [{"role": "developer", "content": "x"}]
    assert tokenizer(KEEPS).apply_chat_template(messages, add_generation_prompt=False) == "[system]x[end]"
    knows = KEEPS + "{# developer #}"
    assert tokenizer(knows).apply_chat_template(messages, add_generation_prompt=False) == "[developer]x[end]"
