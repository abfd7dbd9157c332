"""Damage to files, as hypothesis draws it."""

from hypothesis import strategies

OTHER_TYPES = ("[]", "3", '"text"', "null", "{}")
KINDS = ("cut", "emptied", "one bit", *OTHER_TYPES)
"""After each of these there is still a file."""

ALL_KINDS = (*KINDS, "zeros", "a folder", "gone")


def damage(path, kind, where):
    """Damage a file. where: the place in it, from 0 to 1."""
    content = path.read_bytes()
    place = min(int(where * len(content)), max(len(content) - 1, 0))
    flipped = bytearray(content or b"x")
    flipped[place] ^= 1 << int(where * 8e6) % 8
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind != "gone":
        damaged = {"cut": content[:place], "emptied": b"", "one bit": flipped, "zeros": bytes(len(content))}
        path.write_bytes(damaged.get(kind, kind.encode()))


def damages(kinds=KINDS):
    """A kind and a place: what `damage` wants to know beside the path."""
    return strategies.tuples(strategies.sampled_from(kinds), strategies.floats(0, 1))
