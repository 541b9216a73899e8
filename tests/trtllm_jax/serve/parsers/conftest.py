"""Each tool format as a chat template of our own writes it; the parsers must read back what Jinja renders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import jinja2
import pytest

JSON = '{"name": {{ call.name | tojson }}, "%s": {{ call.arguments }}}'
BODIES = {
    "deepseek_v3": (
        "{% for call in calls %}{{ '<｜tool▁calls▁begin｜>' if loop.first else '\\n' }}"
        "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ call.name }}\n```json\n"
        "{{ call.arguments }}\n```<｜tool▁call▁end｜>"
        "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' if loop.last }}{% endfor %}"
    ),
    "deepseek_v31": (
        "{% for call in calls %}{{ '<｜tool▁calls▁begin｜>' if loop.first }}<｜tool▁call▁begin｜>{{ call.name }}"
        "<｜tool▁sep｜>{{ call.arguments }}<｜tool▁call▁end｜>{{ '<｜tool▁calls▁end｜>' if loop.last }}{% endfor %}"
    ),
    "gpt-oss": (
        "{% for call in calls %}<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
        "{{ call.arguments }}<|call|>{% endfor %}"
    ),
    "hermes": "{% for call in calls %}\n<tool_call>\n" + JSON % "arguments" + "\n</tool_call>{% endfor %}<|im_end|>",
    "llama3": (
        "{% for call in calls %}{{ '; ' if not loop.first }}" + JSON % "parameters" + "{% endfor %}<|eom_id|>"
    ),
    "mistral": (
        "{% for call in calls %}{{ '[TOOL_CALLS] [' if loop.first else ', ' }}" + JSON % "arguments"
        + "{{ ']' if loop.last }}{% endfor %}</s>"
    ),
    "mistral args": "{% for call in calls %}[TOOL_CALLS]{{ call.name }}[ARGS]{{ call.arguments }}{% endfor %}</s>",
    "qwen3_coder": (
        "{% for call in calls %}\n<tool_call>\n<function={{ call.name }}>\n{% for key, value in call.pairs.items() %}"
        "<parameter={{ key }}>\n{{ value if value is string else value | tojson }}\n</parameter>\n{% endfor %}"
        "</function>\n</tool_call>{% endfor %}<|im_end|>"
    ),
}  # fmt: skip

Render = Callable[[str, str, Sequence[tuple[str, dict[str, Any]]]], str]


def render(form: str, content: str, calls: Sequence[tuple[str, dict[str, Any]]]) -> str:
    environment = jinja2.Environment(keep_trailing_newline=True, autoescape=False)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    variables = [
        {"name": name, "pairs": arguments, "arguments": json.dumps(arguments, ensure_ascii=False)}
        for name, arguments in calls
    ]
    return content + environment.from_string(BODIES[form]).render(calls=variables)


@pytest.fixture(scope="session", params=sorted(BODIES))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def written() -> Render:
    return render
