"""Damage to files, as hypothesis draws it: cut, emptied, one bit flipped, or JSON of another type."""

from hypothesis import strategies

OTHER_TYPES = (b"[]", b"3", b'"text"', b"null", b"{}")


@strategies.composite
def damaged(draw, path):
    """The path, and a content for it that is not its own."""
    content = path.read_bytes()
    kind = draw(strategies.sampled_from(["cut", "emptied", "bit", "other type"]))
    place = draw(strategies.integers(0, max(0, len(content) - 1)))
    bit = draw(strategies.integers(0, 7))
    flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :] if content else b"x"
    other = draw(strategies.sampled_from(OTHER_TYPES))
    return {"cut": content[:place], "emptied": b"", "bit": flipped, "other type": other}[kind]
