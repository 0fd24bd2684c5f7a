"""Errors that several modules raise. The command line shows a UserError without a traceback."""


class UserError(ValueError):
    """What the user wrote or named cannot be used; the message is one sentence that says what to write instead."""


NOT_OUR_TRAINER = (
    "stage dpo built a trainer that is not llamafactory_ext's, which would train another loss than pref_loss names: "
    "unset what replaces it (use_kt, another plugin), or set LLAMAFACTORY_EXT=0."
)


def not_possible(key: str, reason: str) -> ValueError:
    """What to raise where a recipe says `key: true`, and it would not be exact."""
    return ValueError(f"`{key}: true` is not possible here: {reason}. Remove it.")
