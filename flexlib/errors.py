"""The one exception that a user's own mistake raises."""

_LONGEST = 2000  # characters of a message; a damaged file can hold a "name" of megabytes


class InputError(ValueError):
    """Bad input (file, row, field or setting), stated in one line that a user can act on.

    Scripts print the message alone, without a traceback, and exit with a code other than 0. What a message quotes may
    hold anything (a file's name, a damaged file's text): line breaks and what no terminal should be sent are shown as
    Python writes them in a string, and a message that is too long loses its middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def _one_line(message: str) -> str:
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in message)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
