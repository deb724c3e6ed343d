"""Texts for messages."""


def shorten(text: str, length: int = 300) -> str:
    """Shorten a long text to its beginning and its end, as for a path or an image's base64 in an error."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}...{text[-20:]}"
