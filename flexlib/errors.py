"""The one exception that a user's own mistake raises."""


class InputError(ValueError):
    """Bad input (file, row, field or setting), stated in one line that a user can act on.

    Scripts print the message alone, without a traceback, and exit with a code other than 0.
    """
