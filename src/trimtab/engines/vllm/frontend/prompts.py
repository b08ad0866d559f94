"""A request's own prompt, as vLLM has rendered it: what steering that says where it acts is placed on.

vLLM renders a prompt before it makes anything else of a request: its chat template, tokenizer, truncation and images
are in the ids then. What a chat's messages said is known to the renderer alone, so a prompt carries that along.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from trimtab.spec.prompt_tokens import PromptTokens, Tags

_CHAT = "trimtab_chat"  # in a rendered prompt

_TAGS = "_trimtab_think_tags"  # on an input processor, once they were asked for

logger = logging.getLogger("vllm.trimtab")

Messages = Sequence[Mapping[str, Any]]


class Chat(NamedTuple):
    """What a prompt was made of: its messages, and the renderer and its parameters that made it."""

    messages: Messages
    renderer: Any
    params: Any

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The text of other messages, made in the same way."""
        from vllm.renderers.hf import HfRenderer, safe_apply_chat_template

        tokenizer = self.renderer.get_tokenizer()
        if isinstance(self.renderer, HfRenderer):  # which has parsed them: to parse them again would load their images
            options = {**self.params.get_apply_chat_template_kwargs(), "tokenize": False}
            return str(safe_apply_chat_template(self.renderer.model_config, tokenizer, messages, **options))
        _, prompt = self.renderer.render_messages(messages, self.params)
        return str(prompt["prompt"] if "prompt" in prompt else tokenizer.decode(prompt["prompt_token_ids"]))


def with_chats(renderer: Any, params: Any, prompts: Sequence[Any], conversations: Sequence[Messages]) -> None:
    """Let each rendered prompt carry the messages that `renderer` made it of."""
    for prompt, messages in zip(prompts, conversations, strict=True):
        if isinstance(prompt, dict):
            prompt[_CHAT] = Chat(messages, renderer, params)


def is_rendered(prompt: Any) -> bool:
    """Whether vLLM has made of a prompt what its engine reads."""
    return isinstance(prompt, Mapping) and "type" in prompt


def prompt_tokens(processor: Any, prompt: Any, ids: Sequence[int] | None, embeddings: Any = None) -> PromptTokens:
    """The `prompt` of a request that `processor`, an `InputProcessor`, takes, with these ids or embeddings."""
    if ids is None or embeddings is not None:
        return PromptTokens(len(embeddings if ids is None else ids))
    size = int(processor.model_config.get_vocab_size())
    if (tokenizer := processor.tokenizer) is None:
        return PromptTokens(len(ids), ids, vocabulary_size=size)
    chat = prompt.get(_CHAT) if isinstance(prompt, Mapping) else None
    messages, render = (None, None) if chat is None else (chat.messages, chat.render)
    return PromptTokens(len(ids), ids, tokenizer, messages, render, think_tags(processor), size)


def think_tags(processor: Any) -> Tags | None:
    """The tags between which the engine's model thinks, as its reasoning parser knows them; None if it knows none."""
    if _TAGS not in processor.__dict__:
        setattr(processor, _TAGS, _tags(processor.vllm_config, processor.tokenizer))
    found: Tags | None = getattr(processor, _TAGS)
    return found


def _tags(vllm_config: Any, tokenizer: Any) -> Tags | None:
    name = getattr(getattr(vllm_config, "structured_outputs_config", None), "reasoning_parser", "")
    if not name:
        return None
    from vllm.reasoning import ReasoningParserManager

    try:
        parser = ReasoningParserManager.get_reasoning_parser(name)(tokenizer)
        start, end = parser.reasoning_start_str, parser.reasoning_end_str
    except Exception as error:  # its tags are not in this vocabulary, or it is another plugin's
        logger.warning("the reasoning parser %s does not say how thinking begins and ends: %s", name, error)
        return None
    return Tags((str(start),), (str(end),)) if start and end else None
