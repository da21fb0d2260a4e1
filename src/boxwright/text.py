"""Text for messages."""

from __future__ import annotations


def plural(count: int, noun: str, plural_noun: str | None = None) -> str:
    """Count and noun: "1 image", "2 images", "1,000 images".

    Args:
        count: number of things.
        noun: singular noun.
        plural_noun: plural form, if it is not the singular with "s".
    """
    return f"{count:,} {noun if count == 1 else plural_noun or noun + 's'}"
