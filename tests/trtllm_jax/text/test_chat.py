"""Conversations against transformers' own chat templates: SmolLM2's real one, and one of ours that knows tools."""

import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from checkpoints.checkpoint import open_checkpoint
from trtllm_jax import LLM, RequestOutput, SamplingParams
from trtllm_jax.llmapi.llm_args import LlmArgs
from trtllm_jax.serve.parsers.registry import make_tool_parser
from trtllm_jax.text.chat import Chat, read_template
from trtllm_jax.text.tokenizer import Tokenizer
from trtllm_jax.text.tokenizer_loading import stated_end_ids

from ..tiny_engine import tiny_engine

TOOLS_TEMPLATE = """
{%- if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}
{%- for document in documents or [] %}<doc {{ document.title }}>{{ document.text }}</doc>{% endfor %}
{%- for message in messages %}
    {%- if message.role == 'judge' %}{{ raise_exception('nobody judges here') }}{% endif %}
    {{- bos_token + message.role + ': ' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}<call>{{ call.function.arguments | tojson }}</call>{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}{{ bos_token }}assistant: {% endif %}
{%- if mood is defined %}[{{ mood }}]{% endif %}
"""
EXCITED = "{% for message in messages %}{{ message.role[0] }}: {{ message.content }}!\n{% endfor %}"
USER = {"role": "user", "content": "你好, what is 2 + 3?"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASSISTANT = {"role": "assistant", "content": "The answer is"}
CONVERSATIONS = [[USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "Sure?"}]]
SCHEMA = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}
FREE = SamplingParams(max_tokens=8, ignore_eos=True)


def add(a: int, b: int = 3) -> int:
    """
    Adds two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


class Calculator:
    def add(self, a: int) -> int:
        """
        Adds to what was there.

        Args:
            a: what is added
        """
        return a


def without_hints(a):  # type: ignore[no-untyped-def]
    """Adds."""


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_gguf: Path) -> Any:
    return open_checkpoint(smollm2_gguf).load_tokenizer()


@pytest.fixture(scope="module")
def byte_tokenizer(tiny_llama: Path) -> Any:
    """The tiny model's, which like Llama's puts a beginning before every text that it encodes by itself."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken("<bos>", special=True, normalized=False)])
    bos = tokenizer.convert_tokens_to_ids("<bos>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.chat_template = TOOLS_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def llm(tiny_llama: Path, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    path = tmp_path_factory.mktemp("template") / "excited.jinja"
    path.write_text(EXCITED)
    templates = {"chat_template": path, "allow_request_chat_template": True}
    with tiny_engine(tiny_llama, tokenizer=byte_tokenizer, **templates) as llm:
        yield llm


class TestPromptsAreTransformers:
    """Equal text and equal ids, for the templates and arguments that transformers takes."""

    @staticmethod
    def check(tokenizer: Any, conversation: Any, ours: dict[str, Any], **how: Any) -> None:
        reference = {"add_generation_prompt": True, **how}
        assert ours["prompt"] == tokenizer.apply_chat_template(conversation, tokenize=False, **reference)
        ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False, **reference)
        assert ours["prompt_token_ids"] == ids

    @pytest.mark.parametrize("conversation", CONVERSATIONS)
    def test_smollm2(self, smollm2_tokenizer: Any, conversation: Any) -> None:
        ours = Chat(Tokenizer(smollm2_tokenizer)).prompts(conversation)
        assert isinstance(ours, dict)
        assert ours["prompt"].endswith("<|im_start|>assistant\n")
        self.check(smollm2_tokenizer, conversation, ours)

    def test_a_list_of_conversations(self, smollm2_tokenizer: Any) -> None:
        for conversation, ours in zip(
            CONVERSATIONS, Chat(Tokenizer(smollm2_tokenizer)).prompts(CONVERSATIONS), strict=True
        ):
            self.check(smollm2_tokenizer, conversation, ours)

    @pytest.mark.parametrize(
        "how",
        [
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
            {"tools": [SCHEMA]},
            {"tools": [add, Calculator().add, SCHEMA]},
            {"documents": [{"title": "Sums", "text": "2 + 3 = 5"}]},
        ],
    )
    def test_every_argument(self, byte_tokenizer: Any, how: dict[str, Any]) -> None:
        conversation = [SYSTEM, USER, ASSISTANT]
        ours = Chat(Tokenizer(byte_tokenizer)).prompts(conversation, **how)
        self.check(byte_tokenizer, conversation, ours, **how)  # type: ignore[arg-type]
        plain = Chat(Tokenizer(byte_tokenizer)).prompts(conversation)
        assert ours != plain

    def test_variables_of_the_template(self, byte_tokenizer: Any) -> None:
        ours = Chat(Tokenizer(byte_tokenizer)).prompts([USER], chat_template_kwargs={"mood": "merry"})
        assert ours["prompt"].endswith("[merry]")  # type: ignore[call-overload]
        self.check(byte_tokenizer, [USER], ours, mood="merry")  # type: ignore[arg-type]

    def test_special_tokens_are_not_given_twice(self, byte_tokenizer: Any) -> None:
        bos = byte_tokenizer.convert_tokens_to_ids("<bos>")
        assert byte_tokenizer.encode("x")[0] == bos  # what a plain prompt gets
        ours: Any = Chat(Tokenizer(byte_tokenizer)).prompts([USER])
        assert ours["prompt_token_ids"].count(bos) == ours["prompt"].count("<bos>") == 2

    def test_text_parts_are_lines(self, smollm2_tokenizer: Any) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        chat = Chat(Tokenizer(smollm2_tokenizer))
        joined = chat.prompts([{"role": "user", "content": "one\ntwo"}])
        assert chat.prompts([{"role": "user", "content": parts}]) == joined

    @pytest.mark.parametrize("arguments", [{"a": 2}, '{"a": 2}'])
    def test_tool_calls_as_objects_and_as_openai_writes_them(self, byte_tokenizer: Any, arguments: Any) -> None:
        def conversation(arguments: Any) -> list[dict[str, Any]]:
            call = {"type": "function", "id": "1", "function": {"name": "add", "arguments": arguments}}
            answer = {"role": "assistant", "content": None, "tool_calls": [call]}
            return [USER, answer, {"role": "tool", "tool_call_id": "1", "content": "5"}]

        given = conversation(arguments)
        before = json.dumps(given)
        ours: Any = Chat(Tokenizer(byte_tokenizer)).prompts(given)
        assert '<call>{"a": 2}</call>' in ours["prompt"]
        self.check(byte_tokenizer, conversation({"a": 2}), ours)
        assert json.dumps(given) == before  # the caller's messages stay as they are

    def test_a_template_in_place_of_the_models(self, smollm2_tokenizer: Any, tmp_path: Path) -> None:
        path = tmp_path / "template.jinja"
        path.write_text(TOOLS_TEMPLATE, encoding="utf-8")
        for given in (path, str(path), TOOLS_TEMPLATE):
            ours = Chat(Tokenizer(smollm2_tokenizer), read_template(given)).prompts([USER], tools=[SCHEMA])
            self.check(smollm2_tokenizer, [USER], ours, tools=[SCHEMA], chat_template=TOOLS_TEMPLATE)  # type: ignore[arg-type]

    def test_a_template_of_one_call(self, smollm2_tokenizer: Any) -> None:
        chat = Chat(Tokenizer(smollm2_tokenizer), "never used {{ messages }}", allow_request_template=True)
        ours = chat.prompts([USER], chat_template=TOOLS_TEMPLATE)
        self.check(smollm2_tokenizer, [USER], ours, chat_template=TOOLS_TEMPLATE)  # type: ignore[arg-type]

    def test_threads(self, byte_tokenizer: Any) -> None:
        chat, start = Chat(Tokenizer(byte_tokenizer)), threading.Barrier(4)
        expected = chat.prompts(CONVERSATIONS, tools=[add])

        def work(_: int) -> bool:
            start.wait(10)
            return all(chat.prompts(CONVERSATIONS, tools=[add]) == expected for _ in range(20))

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))


def user(**changed: Any) -> list[dict[str, Any]]:
    return [SYSTEM, {name: value for name, value in (USER | changed).items() if value != "absent"}]


def calls(arguments: Any) -> list[dict[str, Any]]:
    return user(tool_calls=[{"function": {"name": "add", "arguments": arguments}}])


@pytest.mark.parametrize(
    ("messages", "how", "says"),
    [
        ("hello", {}, r"messages = 'hello' is invalid: give a list of messages"),
        (USER, {}, r"messages = .* is invalid: give a list of messages"),
        ([], {}, r"messages = \[\] is invalid: give a list of messages"),
        ([[USER], []], {}, r"messages\[1\] = \[\] is invalid: give a list with at least one message"),
        ([[USER], USER], {}, r"messages\[1\] = .* is invalid: give a list"),
        ([USER, "hello"], {}, r"messages\[1\] = 'hello' is invalid: give a dict"),
        (user(role="absent"), {}, r'messages\[1\]\.role = None is invalid: give a str such as "user"'),
        (user(role=5), {}, r"messages\[1\]\.role = 5 is invalid"),
        ([[USER], user(role=None)], {}, r"messages\[1\]\[1\]\.role = None is invalid"),
        (user(content="absent"), {}, r"messages\[1\]\.content is missing: give a str, or a list of text parts"),
        (user(content=None), {}, r"messages\[1\]\.content is missing"),
        (user(content=5), {}, r"messages\[1\]\.content = 5 is invalid: give a str"),
        (user(content=["a"]), {}, r"content\[0\] = 'a' is invalid: give .*\"type\": \"text\""),
        (
            user(content=[{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}]),
            {},
            r"messages\[1\]\.content\[1\]\.type = 'image_url' is not available in this release: use parts of type",
        ),
        (user(content=[{"type": "text"}]), {}, r"content\[0\]\.text = None is invalid: give a str"),
        (user(tool_calls="x"), {}, r"messages\[1\]\.tool_calls = 'x' is invalid: give a list"),
        (calls(5), {}, r"tool_calls\[0\]\.function\.arguments = 5 is invalid: give an object, or JSON text"),
        (user(tool_calls=[{"id": "1"}]), {}, r'tool_calls\[0\]\.function = None is invalid: give a dict with "name"'),
        (
            user(function_call={"arguments": "{}"}),
            {},
            r"messages\[1\]\.function_call = .* is invalid: give a dict with",
        ),
        (user(role="judge"), {}, r"messages: the chat template cannot write this conversation: nobody judges here"),
        ([[USER], user(role="judge")], {}, r"messages\[1\]: the chat template cannot .*nobody judges here"),
        ([USER], {"tools": SCHEMA}, r"tools = .* is invalid: give a list of JSON schemas or functions"),
        ([USER], {"tools": [SCHEMA, 5]}, r"tools\[1\] = 5 is invalid: give a JSON schema or a function"),
        ([USER], {"tools": [without_hints]}, r"tools\[0\] = without_hints cannot be described .*type hint"),
        ([USER], {"documents": ["a"]}, r"documents = \['a'\] is invalid: give a list of dicts"),
        ([USER], {"continue_final_message": True}, r"continue_final_message = True and add_generation_prompt = True"),
        ([USER], {"chat_template": "{{ 1 }}"}, r"chat_template = '{{ 1 }}' is refused.*allow_request_chat_template"),
        ([USER], {"chat_template_kwargs": "x"}, r"chat_template_kwargs = 'x' is invalid: give a dict"),
        *(
            ([USER], {"chat_template_kwargs": {name: "x"}}, rf"chat_template_kwargs holds {name}, .*leave it out")
            for name in ("chat_template", "tools", "tokenize", "messages", "conversations", "self")
        ),
    ],
)
def test_what_is_wrong_is_named(byte_tokenizer: Any, messages: Any, how: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Chat(Tokenizer(byte_tokenizer)).prompts(messages, **how)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages.clear() }}", "is not safely callable|unsafe|immutable"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{# #}", "makes no text of this conversation"),
        ("", r"chat_template = '' is invalid: give a Jinja text"),
    ],
)
def test_a_template_that_fails_is_a_value_error(byte_tokenizer: Any, template: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Chat(Tokenizer(byte_tokenizer), allow_request_template=True).prompts([USER], chat_template=template)


def test_nothing_to_write_with(smollm2_gguf: Path) -> None:
    with pytest.raises(ValueError, match="skip_tokenizer_init=True: load it without"):
        Chat(None).prompts([USER])
    bare = open_checkpoint(smollm2_gguf).load_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"chat_template: the model's tokenizer has none; give LLM\("):
        Chat(Tokenizer(bare)).prompts([USER])


def test_a_wrong_template_is_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LLM.chat_template = 'nowhere.jinja' is neither a Jinja text nor a file"):
        LLM(tmp_path, chat_template="nowhere.jinja")
    with pytest.raises(ValueError, match=r"LLM.chat_template = '{% if %}' is no Jinja template"):
        LLM(tmp_path, chat_template="{% if %}")
    (tmp_path / "latin").write_bytes(b"\xe4{{ messages }}")
    with pytest.raises(ValueError, match=r"nor a file that can be read"):
        LLM(tmp_path, chat_template=tmp_path / "latin")


class TestChat:
    def test_the_answer_is_that_of_the_templates_ids(
        self, llm: LLM, byte_tokenizer: Any, greedy_by_transformers: Any
    ) -> None:
        ids = byte_tokenizer.apply_chat_template([USER], chat_template=EXCITED, return_dict=False)
        output = llm.chat([USER], FREE)
        assert output.prompt_token_ids == ids
        assert output.prompt == f"u: {USER['content']}!\n"
        assert output.outputs[0].token_ids == llm.generate(ids, FREE).outputs[0].token_ids
        assert output.outputs[0].token_ids == greedy_by_transformers(ids, 8)

    def test_a_template_of_one_call(self, llm: LLM) -> None:
        assert llm.chat([USER], FREE, chat_template="{{ messages[0].content }}?").prompt == f"{USER['content']}?"
        assert llm.chat([USER], FREE).prompt.endswith("!\n")
        assert not LlmArgs(model="any").allow_request_chat_template

    def test_one_gives_one_and_a_list_gives_a_list(self, llm: LLM) -> None:
        each = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (2, 3, 4)]
        outputs = llm.chat(CONVERSATIONS, each, use_tqdm=False)
        assert [output.outputs[0].length for output in outputs] == [2, 3, 4]
        alone = [llm.chat(conversation, FREE) for conversation in CONVERSATIONS]
        assert all(isinstance(one, RequestOutput) for one in alone)
        assert [one.prompt for one in alone] == [one.prompt for one in outputs]

    def test_streaming(self, llm: LLM) -> None:
        seen = [output.outputs[0].length for output in llm.chat([USER], FREE, streaming=True)]
        assert seen[-1] == 8

    def test_one_bad_conversation_starts_none(self, llm: LLM) -> None:
        llm.get_stats()
        with pytest.raises(ValueError, match=r"messages\[1\]\[0\]\.role"):
            llm.chat([[USER], [{"content": "x"}]])
        with pytest.raises(ValueError, match="lora_request is not available"):
            llm.chat([USER], lora_request=object())  # type: ignore[arg-type]
        assert llm.get_stats() == []


class TestNamedTemplates:
    """transformers' rules for which of several templates writes a conversation."""

    NAMED = {  # noqa: RUF012
        "default": "plain {{ messages[0].content }}",
        "tool_use": "tools {{ messages[0].content }} {{ tools[0].function.name }}",
        "rag": "documents {{ messages[0].content }}",
    }

    @pytest.fixture
    def tokenizer(self, byte_tokenizer: Any) -> Iterator[Any]:
        own, byte_tokenizer.chat_template = byte_tokenizer.chat_template, dict(self.NAMED)
        yield byte_tokenizer
        byte_tokenizer.chat_template = own

    @pytest.mark.parametrize("how", [{}, {"tools": [SCHEMA]}, {"chat_template": "rag"}, {"tools": []}, {"tools": None}])
    def test_they_are_chosen_as_transformers_chooses(self, tokenizer: Any, how: dict[str, Any]) -> None:
        ours: Any = Chat(Tokenizer(tokenizer)).prompts([USER], **how)
        TestPromptsAreTransformers.check(tokenizer, [USER], ours, **{**how, "tools": how.get("tools") or None})

    def test_a_name_needs_no_permission_and_a_text_does(self, tokenizer: Any) -> None:
        chat = Chat(Tokenizer(tokenizer))
        named: Any = chat.prompts([USER], chat_template="tool_use", tools=[SCHEMA])
        assert named["prompt"].startswith("tools ")
        for text in ("{{ 1 }}", "other"):
            with pytest.raises(
                ValueError, match=r"is refused.* the name of one of the model's: default, rag, tool_use"
            ):
                chat.prompts([USER], chat_template=text)
        allowed: Any = Chat(Tokenizer(tokenizer), allow_request_template=True).prompts([USER], chat_template="{{ 1 }}")
        assert allowed["prompt"] == "1"

    def test_without_a_default_one_must_be_named(self, tokenizer: Any) -> None:
        del tokenizer.chat_template["default"]
        chat = Chat(Tokenizer(tokenizer))
        with pytest.raises(ValueError, match=r"chat_template is missing.*\(rag, tool_use\).*give one of these names"):
            chat.prompts([USER])
        assert chat.prompts([USER], tools=[SCHEMA]) == chat.prompts([USER], chat_template="tool_use", tools=[SCHEMA])
        tokenizer.chat_template = {}
        with pytest.raises(ValueError, match=r"chat_template: the model's tokenizer has none"):
            chat.prompts([USER])

    def test_the_template_of_the_model_takes_the_place_of_all(self, tokenizer: Any) -> None:
        chat = Chat(Tokenizer(tokenizer), EXCITED)
        assert chat.template_for_tools == EXCITED
        assert chat.prompts([USER], tools=[SCHEMA]) == chat.prompts([USER])
        with pytest.raises(ValueError, match="is refused"):
            chat.prompts([USER], chat_template="rag")

    def test_auto_reads_the_one_for_tools(self, tokenizer: Any) -> None:
        chat = Chat(Tokenizer(tokenizer))
        assert chat.template_for_tools == self.NAMED["tool_use"]
        del tokenizer.chat_template["tool_use"]
        assert chat.template_for_tools == self.NAMED["default"]
        del tokenizer.chat_template["default"]
        assert chat.template_for_tools is None

    @pytest.mark.parametrize("kind", ["list", "folder"])
    def test_folders_have_them(self, kind: str, tiny_llama: Path, tmp_path: Path) -> None:
        shutil.copytree(tiny_llama, tmp_path / "model")
        folder = tmp_path / "model"
        calling = "{{ messages[0].content }}{% for t in tools %}<tool_call>{% endfor %}"
        if kind == "list":
            path = folder / "tokenizer_config.json"
            templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": calling}]
            path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": templates}))
        else:
            (folder / "chat_template.jinja").write_text("plain")
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text(calling)
        chat = Chat(Tokenizer(open_checkpoint(folder).load_tokenizer()))
        assert chat.template_for_tools == calling
        assert make_tool_parser("auto", model_type="llama", chat_template=chat.template_for_tools).name == "hermes"  # type: ignore[union-attr]
        plain, with_tools = chat.prompts([USER]), chat.prompts([USER], tools=[SCHEMA])
        assert (plain["prompt"], with_tools["prompt"]) == ("plain", f"{USER['content']}<tool_call>")  # type: ignore[call-overload]


class TestTurnEnds:
    """The token that a template writes after an assistant's text ends a turn, stated elsewhere or not."""

    @pytest.fixture
    def tokenizer(self, tiny_llama: Path) -> Any:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot|>", "<|eot|>2"]})
        tokenizer.add_tokens(["<turn/>", "</call>"])
        return tokenizer

    @pytest.mark.parametrize(
        ("after", "token"),
        [
            ("<|eot|>", "<|eot|>"),
            ("\n<|eot|>\n", "<|eot|>"),
            ("<|eot|>2", "<|eot|>2"),
            ("<turn/>", "<turn/>"),
            ("{{ eos_token }}", "<eos>"),
            ("{% if loop.last %}{{ eos_token }}{% else %}<|eot|>{% endif %}", "<eos>"),
            ("", None),
            ("\n", None),
            (" bye<|eot|>", None),
        ],
    )
    def test_by_the_template(self, tokenizer: Any, after: str, token: str | None) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}"
            "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}</call>{% endfor %}" + after + "{% endfor %}"
        )
        expected = set() if token is None else {tokenizer.convert_tokens_to_ids(token)}
        assert Chat(Tokenizer(tokenizer)).turn_ends(()) == expected

    def test_a_template_that_ends_turns_as_is_stated_adds_nothing(self, tokenizer: Any) -> None:
        # As Command R7B: what ends an answer is not yet the end of the turn.
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<turn/><|eot|>{% endfor %}"
        turn, eot = tokenizer.convert_tokens_to_ids(["<turn/>", "<|eot|>"])
        chat = Chat(Tokenizer(tokenizer))
        assert (chat.turn_ends({eot}), chat.turn_ends({turn}), chat.turn_ends({0})) == (set(), set(), {turn})
        # As Phi-4-mini: the end of the text is written where no other turn follows.
        end = "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|eot|>{% endfor %}" + end
        assert chat.turn_ends({tokenizer.eos_token_id}) == {eot}

    def test_by_every_template(self, tokenizer: Any) -> None:
        def template(end: str) -> str:
            return "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"

        tokenizer.chat_template = {"default": template("<|eot|>"), "tool_use": template("<turn/>"), "odd": "{% for %}"}
        expected = set(tokenizer.convert_tokens_to_ids(["<|eot|>", "<turn/>"]))
        assert Chat(Tokenizer(tokenizer)).turn_ends(()) == expected
        given = Chat(Tokenizer(tokenizer), template("<eos>"))
        assert given.turn_ends(()) == {tokenizer.eos_token_id}
        assert Chat(None).turn_ends(()) == frozenset()

    def test_a_gguf_files_are_known_by_name_too(self, smollm2_gguf: Path) -> None:
        checkpoint = open_checkpoint(smollm2_gguf)
        names = checkpoint.load_tokenizer().convert_ids_to_tokens(sorted(stated_end_ids(checkpoint)))
        assert names == ["<|endoftext|>", "<|im_end|>"]
        assert checkpoint.generation_config["eos_token_id"] == [2]  # all that its metadata states

    def test_they_end_chats_and_completions(self, tiny_llama: Path, tokenizer: Any) -> None:
        free = Tokenizer(tokenizer).encode("a")[0]
        bias = np.zeros(258, np.float32)
        bias[free] = 1000
        # The model knows no more tokens than its letters: one of these ends turns.
        tokenizer.backend_tokenizer.add_special_tokens([AddedToken("a", special=True, normalized=False)])
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}a{% endfor %}"
        sizes = {"max_batch_size": 1, "max_num_tokens": 16, "max_seq_len": 64, "kv_cache_config": {"max_tokens": 256}}
        with LLM(tiny_llama, tokenizer=tokenizer, dtype="float32", **sizes) as llm:
            params = SamplingParams(max_tokens=4, embedding_bias=bias)
            for output in (llm.chat([USER], params), llm.generate("hello", params)):
                assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("stop", [])
            params.ignore_eos = True
            assert llm.generate("hello", params).outputs[0].token_ids == [free] * 4
