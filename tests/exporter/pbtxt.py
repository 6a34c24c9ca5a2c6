"""Protobuf's text format, read by its published grammar as far as a configuration goes.

From the text format specification: fields ``name: scalar``,
``name: [scalar, ...]`` and ``name { ... }``, strings with C escapes.
"""

from __future__ import annotations

import re

TOKEN = re.compile(r'\s*(?:([A-Za-z_]\w*)|(-?\d+)|"((?:[^"\\\n]|\\.)*)"|([{}\[\]:,]))')
ESCAPE = re.compile(r"\\([0-7]{1,3}|.)")


def parse(text):
    """A message as {name: [values]}; enums stay texts in a tuple, as in ``("TYPE_FP32",)``."""
    tokens = _tokens(text)
    message, rest = _message(tokens, 0, end=None)
    assert rest == len(tokens)
    return message


def _tokens(text):
    found, place, text = [], 0, text.rstrip()
    while place < len(text):
        match = TOKEN.match(text, place)
        assert match, f"no token at {text[place : place + 20]!r}"
        word, number, string, mark = match.groups()
        if string is not None:
            found.append(("string", _unescape(string)))
        elif number is not None:
            found.append(("number", int(number)))
        else:
            found.append(("word", word) if word else ("mark", mark))
        place = match.end()
    return found


def _unescape(string):
    def byte(match):
        code = match.group(1)
        return chr(int(code, 8)) if code[0].isdigit() else code

    return ESCAPE.sub(byte, string).encode("latin-1").decode()


def _message(tokens, at, end):
    fields = {}
    while at < len(tokens) and tokens[at] != end:
        kind, name = tokens[at]
        assert kind == "word", tokens[at]
        if tokens[at + 1] == ("mark", "{"):
            value, at = _message(tokens, at + 2, ("mark", "}"))
            values, at = [value], at + 1
        else:
            assert tokens[at + 1] == ("mark", ":"), tokens[at + 1]
            values, at = _scalars(tokens, at + 2)
        fields.setdefault(name, []).extend(values)
    assert end is None or tokens[at] == end, "a brace is not closed"
    return fields, at


def _scalars(tokens, at):
    if tokens[at] != ("mark", "["):
        return [_scalar(tokens[at])], at + 1
    values = [_scalar(tokens[at + 1])]
    at += 2
    while tokens[at] == ("mark", ","):
        values.append(_scalar(tokens[at + 1]))
        at += 2
    assert tokens[at] == ("mark", "]")
    return values, at + 1


def _scalar(token):
    kind, value = token
    assert kind != "mark", token
    if kind != "word":
        return value
    return {"true": True, "false": False}.get(value, (value,))
