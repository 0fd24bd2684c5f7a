"""The model's chat template: applies it, and explains what to change if it rejects a question."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from ..errors import UserError, in_a_line

Chat = list[dict[str, str]]

# Arguments of `apply_chat_template` that are set here or reserved, and the variables that it passes on for them.
RESERVED = {
    *("self", "conversation", "conversations", "messages", "tools", "documents", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
}
EXAMPLE = """'{"enable_thinking": false}'"""
CORRECT = "correct it in chat_template.jinja or tokenizer_config.json"


def parse_chat_template_kwargs(text: str) -> dict[str, Any]:
    """The arguments of a chat template, from a JSON object.

    Raises:
        UserError: if it is not a JSON object, or names an argument that the evaluation sets itself.
    """
    option = f"--chat-template-kwargs {text if len(text) <= 80 else text[:77] + '...'}"
    try:
        arguments = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()  # rejects NaN and lone surrogates
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} is not valid JSON ({error}): write an object, such as {EXAMPLE}.") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{option} is not a JSON object: write one, such as {EXAMPLE}.")
    if taken := sorted(RESERVED & arguments.keys()):
        raise UserError(f"{option} has `{taken[0]}`, which the evaluation sets itself: remove it.")
    return arguments


def apply_chat_template(tokenizer: Any, chats: list[Chat], arguments: dict[str, Any], **options: Any) -> Any:
    """The tokenized prompts of chats: a dict with `input_ids`, one row per chat."""
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, **arguments, **options)


def prompt_ids(tokenizer: Any, chat: Chat, arguments: dict[str, Any], problem: int = 1) -> list[int]:
    """The token ids of a chat's prompt.

    Args:
        tokenizer: transformers' tokenizer, with a chat template.
        chat: a list of turns with `role` and `content`.
        arguments: further arguments of the template.
        problem: the number of the chat for messages, counted from 1.

    Raises:
        UserError: if the template rejects the chat; with the template's message and what to change.
    """
    try:
        ids = list(apply_chat_template(tokenizer, [chat], arguments)["input_ids"][0])
    except Exception as error:  # a template is a program and may raise anything
        raise UserError(_sentence(tokenizer, chat, arguments, problem, error)) from error
    if not ids:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} renders nothing for problem {problem}: {CORRECT}."
        )
    return ids


def _sentence(tokenizer: Any, chat: Chat, arguments: dict[str, Any], problem: int, error: Exception) -> str:
    """The error message; what to change is found by trying without system turn, arguments or earlier turns."""
    from jinja2 import TemplateError

    # `raise_exception` of a template raises a TemplateError: its message is the template's own.
    said = in_a_line(error) if type(error) is TemplateError else f"{type(error).__name__}: {in_a_line(error)}"
    refusal = f"The chat template of {tokenizer.name_or_path} does not accept"
    if chat[0]["role"] == "system" and _takes(tokenizer, chat[1:], arguments):
        return f"{refusal} a system turn ({said}): remove --system, or `system` from the data."
    if arguments and _takes(tokenizer, chat, {}):
        return f"{refusal} {json.dumps(arguments)} ({said}): correct or remove --chat-template-kwargs."
    if len(chat) > 1 and _takes(tokenizer, chat[-1:], arguments):
        return (
            f"{refusal} the turns before the last question of problem {problem} ({said}): remove `history` or the "
            "later `turns` from the data."
        )
    return (
        f"The chat template of {tokenizer.name_or_path} fails on problem {problem} ({said}): {CORRECT}, or pass "
        "what it needs with --chat-template-kwargs."
    )


def _takes(tokenizer: Any, chat: Chat, arguments: dict[str, Any]) -> bool:
    try:
        apply_chat_template(tokenizer, [chat], arguments)
    except Exception:
        return False
    return True


def print_unused(tokenizer: Any, chat: Chat, arguments: dict[str, Any]) -> None:
    """Note on stderr which arguments the template does not read, and whether it ignores the chat's system turn."""
    name, variables = tokenizer.name_or_path, template_variables(tokenizer.get_chat_template())
    if unused := sorted(arguments.keys() - variables):
        others = ", ".join(sorted(variables - RESERVED)) or "none"
        print(
            f"Note: {', '.join(f'`{each}`' for each in unused)} in --chat-template-kwargs has no effect: the chat "
            f"template of {name} reads {others}.",
            file=sys.stderr,
        )
    if chat[0]["role"] == "system" and not _reads(tokenizer, chat, 0, arguments):
        print(f"Note: the system turn has no effect: the chat template of {name} ignores it.", file=sys.stderr)


def check_question_is_read(tokenizer: Any, chat: Chat, arguments: dict[str, Any]) -> None:
    """Refuse a template that leaves the question out, as one for images does that needs turns in parts.

    Raises:
        UserError: if the prompt does not depend on the question.
    """
    if not _reads(tokenizer, chat, len(chat) - 1, arguments):
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} leaves the question out of the prompt, because it does "
            f"not print the `content` of a user turn as text: {CORRECT}."
        )


def _reads(tokenizer: Any, chat: Chat, turn: int, arguments: dict[str, Any]) -> bool:
    """Whether the prompt depends on the content of a turn."""
    other = [*chat[:turn], {**chat[turn], "content": chat[turn]["content"] + "?"}, *chat[turn + 1 :]]
    return prompt_ids(tokenizer, chat, arguments) != prompt_ids(tokenizer, other, arguments)


def template_variables(template: str) -> set[str]:
    """The variables that a template reads from its caller: not set by itself, Jinja or transformers."""
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # transformers' own tag, which plain Jinja does not know.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    functions = {*environment.globals, "raise_exception", "strftime_now"}
    return meta.find_undeclared_variables(environment.parse(plain)) - functions
