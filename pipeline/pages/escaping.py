"""Show texts of somebody else on a page."""

import unicodedata
from html import escape


def words(value: object) -> str:
    """Return a text of somebody else for HTML: escaped, and its control characters made visible."""
    odd = ("Cc", "Cs")
    return escape(
        "".join(f"\\x{ord(c):02x}" if unicodedata.category(c) in odd and c not in "\n\t" else c for c in str(value))
    )
