"""Show text that somebody else wrote in a message: on one line, short, and without codes that a terminal obeys."""

WIDEST, DEEPEST = 30, 3  # entries and levels of a list or dict that are looked at


def quoted(value: object, limit: int = 60) -> str:
    """Return `repr(value)` in at most `limit` characters.

    `repr` escapes every character that is not printable, such as those that begin a terminal's escape codes. Of a large or
    deep value only the beginning is looked at, so that a message takes no time.
    """
    try:
        text = repr(_beginning(value, limit, DEEPEST))
    except ValueError:  # a whole number of more than 4,300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def escaped(text: object, limit: int = 300) -> str:
    """Return a text in at most `limit` characters, with every character escaped that is not printable."""
    start = str(text)[: limit + 1]
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in start)
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."


def _beginning(value: object, limit: int, levels: int) -> object:
    if isinstance(value, (str, bytes)):
        return value[: limit + 1]
    if isinstance(value, (list, dict)) and (len(value) > WIDEST or levels == 0):
        value = type(value)() if levels == 0 else _first(value)
    if isinstance(value, list):
        return [_beginning(entry, limit, levels - 1) for entry in value]
    if isinstance(value, dict):
        return {_beginning(key, limit, 0): _beginning(entry, limit, levels - 1) for key, entry in value.items()}
    return value


def _first(value: list | dict) -> list | dict:
    return value[:WIDEST] if isinstance(value, list) else dict(list(value.items())[:WIDEST])
