"""The parameters of guided decoding: a JSON schema, a regular expression or a grammar."""

import json as json_text
import re
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from checkpoints.error_text import one_line

MAX_CHARACTERS = 256 << 10
"""The longest schema, regular expression or grammar that is read."""
MAX_DEPTH = 64
"""The deepest nesting of objects and lists in a schema."""

MAX_RULES = 1000
"""The number of rules that a grammar in EBNF may have."""

# A space, or a line break with usual indentation: without a limit some models write white space for ever.
JSON_OPTIONS: Any = {"whitespace_pattern": r"(\x20?|\x0A\x20{0,20})"}


@dataclass(frozen=True, kw_only=True)
class GuidedDecodingParams:
    """TensorRT-LLM's parameters of guided decoding, exactly one of which is set.

    Attributes:
        json: a JSON schema as a dict or its text, or a pydantic model.
        regex: a regular expression that the whole text matches, in Rust's syntax.
        grammar: EBNF with a `root ::=`, or llguidance's variant of Lark with a `start:`.
        json_object: any JSON object.
        structural_tag: not available here.

    Raises:
        ValueError: none or several are given, or one has a wrong type, or is too large.
    """

    json: Any = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: str | None = None

    def __post_init__(self) -> None:
        if self.structural_tag is not None:
            raise ValueError(
                "GuidedDecodingParams.structural_tag is not available: use grammar, or json for the whole answer"
            )
        given = {
            "json": self.json,
            "regex": self.regex,
            "grammar": self.grammar,
            "json_object": self.json_object or None,
        }
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            raise ValueError(
                f"GuidedDecodingParams got {' and '.join(named) or 'nothing'}: give one of {', '.join(given)}"
            )
        for name in ("regex", "grammar"):
            value = given[name]
            if value is not None and not (isinstance(value, str) and value):
                raise ValueError(f"GuidedDecodingParams.{name} = {value!r} is invalid: give a text that is not empty")
        if not isinstance(self.json_object, bool):
            raise ValueError(f"GuidedDecodingParams.json_object = {self.json_object!r} is invalid: give True or False")
        _schema(self.json)
        for name, value in given.items():
            if isinstance(value, str) and len(value) > MAX_CHARACTERS:
                raise ValueError(
                    f"GuidedDecodingParams.{name} has {len(value)} characters; at most {MAX_CHARACTERS} are read: "
                    "shorten it"
                )
            if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
                raise ValueError(f"GuidedDecodingParams.{name} holds half of a surrogate pair, which no text can have")

    def constraint(self) -> str:
        """The constraint as a grammar in llguidance's text format. ValueError where it cannot be converted."""
        from llguidance import LLMatcher

        if self.regex is not None:
            return LLMatcher.grammar_from_regex(self.regex)
        if self.grammar is not None:
            return LLMatcher.grammar_from_lark(_lark(self.grammar))
        schema = {"type": "object"} if self.json_object else _schema(self.json)
        try:
            return LLMatcher.grammar_from_json_schema(json_text.dumps(schema), overrides=JSON_OPTIONS)
        except ValueError as error:
            raise ValueError(f"GuidedDecodingParams.json is no JSON schema: {one_line(str(error), 300)}") from error

    @property
    def name(self) -> str:
        """The name of the parameter that is set."""
        return next(name for name in ("json", "regex", "grammar", "json_object") if getattr(self, name))


# Every alternative matches wherever it starts, so that the search takes linear time for any text.
_LARK = re.compile(r"^[ \t]*(?:%llguidance\b|start[ \t]*:(?!:=))", re.MULTILINE)
_LITERAL_OR_COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"?|\[(?:\\.|[^\]\\\n])*\]?|#[^\n]*')


def _lark(grammar: str) -> str:
    """The grammar in llguidance's Lark; in EBNF, as in xgrammar, alternatives may be on lines of their own."""
    from llguidance.gbnf_to_lark import gbnf_to_lark

    if _LARK.search(grammar):
        return grammar
    if grammar.count("::=") > MAX_RULES:
        raise ValueError(f"GuidedDecodingParams.grammar has more than {MAX_RULES} rules: simplify it")
    bare = _LITERAL_OR_COMMENT.sub(lambda found: "" if found[0].startswith("#") else found[0], grammar)
    lines: list[str] = []
    for line in bare.splitlines():
        if line.strip().startswith("|") and lines:
            lines[-1] += line
        elif line.strip():
            lines.append(line)
    try:
        return gbnf_to_lark("\n".join(lines))
    except Exception as error:  # it parses letter by letter, and has no error of its own
        raise ValueError(f"GuidedDecodingParams.grammar cannot be read: {one_line(str(error), 300)}") from error


def _schema(given: Any) -> Any:
    """The schema as a dict, or as True or False, which are schemas as well; None where none is given."""
    if given is None:
        return None
    if isinstance(given, type) and issubclass(given, BaseModel):
        return given.model_json_schema()
    try:
        schema = json_text.loads(given) if isinstance(given, str) else given
        text = json_text.dumps(schema, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"GuidedDecodingParams.json is no JSON schema: {one_line(str(error), 300)}") from error
    if not isinstance(schema, dict | bool):
        raise ValueError(
            f"GuidedDecodingParams.json is a {type(schema).__name__}: give a schema as a dict or its text, or a "
            "pydantic model"
        )
    if len(text) > MAX_CHARACTERS or not _is_within_depth(schema, MAX_DEPTH):
        raise ValueError(
            f"GuidedDecodingParams.json has more than {MAX_CHARACTERS} characters, or more than {MAX_DEPTH} objects "
            "and lists within each other: simplify the schema"
        )
    return schema


def _is_within_depth(value: Any, depth: int) -> bool:
    level = [value]
    while level and depth >= 0:
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
            if isinstance(inner, dict | list)
        ]
        depth -= 1
    return not level
