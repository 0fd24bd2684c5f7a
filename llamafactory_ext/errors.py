"""Errors that several modules raise. The command line shows a UserError without a traceback."""


class UserError(ValueError):
    """What the user wrote or named cannot be used; the message is one sentence that says what to write instead."""


LONGEST = 300  # characters of a library's message in a sentence of ours

NOT_OUR_TRAINER = (
    "stage dpo built a trainer that is not llamafactory_ext's, which would train another loss than pref_loss names: "
    "unset what replaces it (use_kt, another plugin), or set LLAMAFACTORY_EXT=0."
)


def not_possible(key: str, reason: str) -> ValueError:
    """What to raise where a recipe says `key: true`, and it would not be exact."""
    return ValueError(f"`{key}: true` is not possible here: {reason}. Remove it.")


def of_system(error: OSError) -> str:
    """A sentence about what the operating system has refused: a full disk, a folder that may not be written."""
    if error.strerror is None:  # a library's own, such as transformers' for a model that is not there
        return in_a_line(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}. Mend that and run the same command again, which goes on with what is there."


def in_a_line(error: BaseException) -> str:
    """What a library says is wrong, as part of a sentence: the first line of the error that began it, or its name."""
    while error.__cause__ is not None and type(error.__cause__).__name__ != "RemoteTraceback":  # multiprocess's text
        error = error.__cause__
    if isinstance(error, KeyError):
        return f"there is no {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]) or type(error).__name__
    return said if len(said) <= LONGEST else f"{said[:LONGEST]}…"
