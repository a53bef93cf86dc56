"""Titles become names for URLs."""

import re
import unicodedata


def slug(title: str) -> str:
    """Give the letters and digits of a title in lower case, joined by dashes."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", plain.lower()))
