"""A conversation as the model's template writes it."""

from collections.abc import Mapping, Sequence
from typing import Any

from trtllm_jax.llmapi.base_llm import BaseLLM
from trtllm_jax.serve.protocol.chat import ChatRequest, Message


def chat_prompt(llm: BaseLLM, body: ChatRequest, tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The prompt for `generate_async`. ValueError where the template refuses."""
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", body.reasoning_effort)
    prompt = llm.chat_prompt(
        [_message(message) for message in body.messages],
        tools=tools,
        documents=body.documents,
        chat_template=body.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=variables,
    )
    return {**prompt, "cache_salt": body.cache_salt} if body.cache_salt else prompt


def _message(message: Message) -> dict[str, Any]:
    """As templates know messages, which have no developers."""
    given = message.model_dump(exclude_none=True)
    return {**given, "role": "system"} if message.role == "developer" else given
