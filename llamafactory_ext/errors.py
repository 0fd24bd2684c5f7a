"""What the command line shows without a traceback."""


class UserError(ValueError):
    """What the user wrote or named cannot be used; the message is one sentence that says what to write instead."""


NOT_OUR_TRAINER = (
    "stage dpo built a trainer that is not llamafactory_ext's, which would train another loss than pref_loss names: "
    "unset what replaces it (use_kt, another plugin), or set LLAMAFACTORY_EXT=0."
)
