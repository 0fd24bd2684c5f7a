"""What the command line shows without a traceback."""


class UserError(ValueError):
    """What the user wrote or named cannot be used; the message is one sentence that says what to write instead."""
