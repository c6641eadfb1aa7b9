"""The one error type a user of bkd_fast has to know."""


class BKDError(ValueError):
    """Input that cannot be used: the message says what was given, what was expected and what to do."""
