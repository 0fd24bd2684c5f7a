"""The model's own chat template: what it is given, and what is said where it does not take a question."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from ..errors import UserError, in_a_line

Chat = list[dict[str, str]]

# What `apply_chat_template` is called with here or has for itself, and the names under which it hands that on.
RESERVED = {
    *("self", "conversation", "conversations", "messages", "tools", "documents", "chat_template", "tokenize"),
    *("add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask", "tokenizer_kwargs"),
    *("padding", "truncation", "max_length", "return_tensors", "return_dict"),
}
EXAMPLE = """'{"enable_thinking": false}'"""
CORRECT = "correct it in chat_template.jinja or tokenizer_config.json"


def parse_chat_template_kwargs(text: str) -> dict[str, Any]:
    """The arguments of a chat template, written as a JSON object.

    Raises:
        UserError: if it is none, or names what the evaluation sets itself.
    """
    option = f"--chat-template-kwargs {text if len(text) <= 80 else text[:77] + '...'}"
    try:
        arguments = json.loads(text)
        json.dumps(arguments, allow_nan=False, ensure_ascii=False).encode()  # no NaN, and no half characters
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} is not JSON ({error}): write an object, such as {EXAMPLE}.") from error
    if not isinstance(arguments, dict):
        raise UserError(f"{option} is no JSON object: write one, such as {EXAMPLE}.")
    if taken := sorted(RESERVED & arguments.keys()):
        raise UserError(f"{option}: the evaluation sets `{taken[0]}` itself: leave it out.")
    return arguments


def apply_chat_template(tokenizer: Any, chats: list[Chat], arguments: dict[str, Any], **options: Any) -> Any:
    """The prompts of chats as transformers' tokenizers give them: a dict with `input_ids`, one row per chat."""
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True, **arguments, **options)


def prompt_ids(tokenizer: Any, chat: Chat, arguments: dict[str, Any], problem: int = 1) -> list[int]:
    """The token ids of a chat's prompt.

    Args:
        tokenizer: transformers' tokenizer, with a chat template.
        problem: what to call the chat in a message, counted from 1.

    Raises:
        UserError: if the template does not take it; says what the template said, and what to do.
    """
    try:
        ids = list(apply_chat_template(tokenizer, [chat], arguments)["input_ids"][0])
    except Exception as error:  # a template is a program: it may end in any
        raise UserError(_sentence(tokenizer, chat, arguments, problem, error)) from error
    if not ids:
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} prints nothing for problem {problem}: {CORRECT}."
        )
    return ids


def _sentence(tokenizer: Any, chat: Chat, arguments: dict[str, Any], problem: int, error: Exception) -> str:
    """What to change is found by trying: the chat without its system turn, without arguments, without earlier turns."""
    from jinja2 import TemplateError

    # `raise_exception` of a template raises a TemplateError: its message is the template's own.
    said = in_a_line(error) if type(error) is TemplateError else f"{type(error).__name__}: {in_a_line(error)}"
    refusal = f"The chat template of {tokenizer.name_or_path} does not take"
    if chat[0]["role"] == "system" and _takes(tokenizer, chat[1:], arguments):
        return f"{refusal} a system turn ({said}): leave out --system, or `system` in the data."
    if arguments and _takes(tokenizer, chat, {}):
        return f"{refusal} {json.dumps(arguments)} ({said}): correct --chat-template-kwargs, or leave it out."
    if len(chat) > 1 and _takes(tokenizer, chat[-1:], arguments):
        return (
            f"{refusal} the turns before the question of problem {problem} ({said}): leave `history` out of the data."
        )
    return (
        f"The chat template of {tokenizer.name_or_path} fails on problem {problem} ({said}): {CORRECT}, or give "
        "what it needs as --chat-template-kwargs."
    )


def _takes(tokenizer: Any, chat: Chat, arguments: dict[str, Any]) -> bool:
    try:
        apply_chat_template(tokenizer, [chat], arguments)
    except Exception:
        return False
    return True


def print_unused(tokenizer: Any, chat: Chat, arguments: dict[str, Any]) -> None:
    """Say which arguments the template does not read, and whether it leaves the chat's system turn out."""
    name, variables = tokenizer.name_or_path, template_variables(tokenizer.get_chat_template())
    if unused := sorted(arguments.keys() - variables):
        others = ", ".join(sorted(variables - RESERVED)) or "none"
        print(
            f"Note: the chat template of {name} does not read {', '.join(f'`{each}`' for each in unused)} of "
            f"--chat-template-kwargs, which changes nothing; it reads {others}.",
            file=sys.stderr,
        )
    if chat[0]["role"] == "system" and not _reads(tokenizer, chat, 0, arguments):
        print(f"Note: the chat template of {name} leaves the system turn out: it changes nothing.", file=sys.stderr)


def check_question_is_read(tokenizer: Any, chat: Chat, arguments: dict[str, Any]) -> None:
    """
    Raises:
        UserError: if the template leaves the question out, as one for images does that wants turns in parts.
    """
    if not _reads(tokenizer, chat, len(chat) - 1, arguments):
        raise UserError(
            f"The chat template of {tokenizer.name_or_path} leaves the question out of the prompt, as it does not "
            f"print the `content` of a user's turn as text: {CORRECT}."
        )


def _reads(tokenizer: Any, chat: Chat, turn: int, arguments: dict[str, Any]) -> bool:
    """Whether the prompt depends on what a turn says."""
    other = [*chat[:turn], {**chat[turn], "content": chat[turn]["content"] + "?"}, *chat[turn + 1 :]]
    return prompt_ids(tokenizer, chat, arguments) != prompt_ids(tokenizer, other, arguments)


def template_variables(template: str) -> set[str]:
    """The names that a template reads and neither sets itself nor has from Jinja or transformers."""
    from jinja2 import meta
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # transformers' own tag, which plain Jinja does not know.
    plain = re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
    environment = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
    functions = {*environment.globals, "raise_exception", "strftime_now"}
    return meta.find_undeclared_variables(environment.parse(plain)) - functions
