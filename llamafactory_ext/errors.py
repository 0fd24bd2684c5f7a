"""Errors that several modules raise, and how they are worded.

The command line shows a UserError without a traceback.
"""


class UserError(ValueError):
    """Wrong user input; the message is one sentence that says what to write instead."""


LONGEST = 300  # characters quoted of another library's message

NOT_OUR_TRAINER = (
    "the trainer is not llamafactory_ext's, so it would not train the loss that `pref_loss` names: "
    "turn off what replaced it (`use_kt`, another plugin), or set LLAMAFACTORY_EXT=0."
)


def not_possible(key: str, reason: str) -> ValueError:
    """The error to raise where a recipe sets `key: true` and the result would not be exact."""
    return ValueError(f"`{key}: true` is not possible here: {reason}. Remove `{key}: true`.")


def of_system(error: OSError) -> str:
    """The message for an error of the operating system, such as a full disk or a folder without write permission."""
    if error.strerror is None:  # raised by a library, such as transformers for a missing model
        return in_a_line(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}. Fix that, then run the same command to resume."


def in_a_line(error: BaseException) -> str:
    """The first line of the error's root cause, or its class name, to be quoted in a sentence."""
    while error.__cause__ is not None and type(error.__cause__).__name__ != "RemoteTraceback":  # multiprocess's text
        error = error.__cause__
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
