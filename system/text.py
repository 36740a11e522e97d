"""What others wrote (captions, prompts, names of files, metadata), made harmless where it is shown.

printable(text)   in a terminal, a log or a picture
markdown(text)    in Markdown, in a table's cell as well
code(text)        in Markdown, as it was written
"""

import re

# Control characters move a terminal's cursor and hide lines; marks of direction turn text around;
# lone surrogates, of names of files that are not UTF-8, cannot be written.
HIDDEN = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ud800-\udfff"


def printable(text: str, kept: str = "") -> str:
    """The text with such characters as escapes, "\\x1b" for one, but for those that are kept."""
    return re.sub(
        f"[{HIDDEN}]",
        lambda found: found[0] if found[0] in kept else ascii(found[0])[1:-1],
        text,
    )


def markdown(text: str) -> str:
    """In one line; nothing in it is code, emphasis, a link, a picture, HTML or a table's border."""
    text = re.sub(r"([\\`*|]|~(?=~)|\](?=[\[(]))", r"\\\1", printable(" ".join(text.split())))
    return re.sub(r"<(?=[a-zA-Z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", text))


def code(text: str, language: str | None = None) -> str:
    """As code in a line of text; with a language, "" for none, as a block of lines."""
    text = printable(text, kept="" if language is None else "\n")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    if language is not None:
        fence = "`" * max(3, longest + 1)
        return f"{fence}{language}\n{text}\n{fence}"
    fence, room = "`" * (longest + 1), " " * ("`" in (text[:1], text[-1:]))
    return f"{fence}{room}{text}{room}{fence}"
