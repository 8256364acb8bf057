"""A JSON Schema for answers: the whole answer is JSON, and is what the schema says.

A schema that would be checked only in part is refused when it is read: an unknown format and a reference that leads
out of the file would pass anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import regex
from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError, ValidationError, best_match
from jsonschema.protocols import Validator
from jsonschema.validators import extend, validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from sftdist.data.answer_rules import Breach, Check, Fault, parse_json, search
from sftdist.data.rowerror import printable, show

ERRORS = 100  # of one answer are looked at, to tell the one that says most
SHOWN = 160  # characters
FORMATS = "pip install 'jsonschema[format-nongpl]' brings more"


def schema_check(schema: Any) -> Check:
    """A check of answers against a schema. Raises `Fault` for one that cannot be checked in full."""
    if not isinstance(schema, dict):
        raise Fault(f"given {show(schema)}, required a JSON Schema or the name of a file with one")
    validator = _validator(schema)

    def check(answer: str) -> Iterator[Breach]:
        value, wrong = parse_json(answer)
        if wrong is not None:
            yield Breach("schema", wrong, "JSON and nothing else")
            return
        try:
            error = best_match(islice(validator.iter_errors(value), ERRORS))
        except RecursionError:
            yield Breach("schema", "JSON nested too deeply", "what can be checked")
            return
        if error is not None:
            yield _breach(error)

    return check


def _breach(error: ValidationError) -> Breach:
    where = "/".join(map(str, ["schema", *error.absolute_schema_path]))
    message = printable(error.message)
    message = message if len(message) <= SHOWN else message[: SHOWN - 3] + "..."
    return Breach(where, f"at {error.json_path}: {message}", f"{error.validator}: {show(error.validator_value)}")


def _validator(schema: dict[str, Any]) -> Validator:
    """The validator of the schema's own draft (the newest where it names none), with formats."""
    named = schema.get("$schema")
    draft = validator_for(schema, default=None) if named is not None else Draft202012Validator
    if draft is None:
        raise Fault(f"given {show(named)}, required a draft of JSON Schema", ".$schema")
    try:
        draft.check_schema(schema, format_checker=draft.FORMAT_CHECKER)
    except (SchemaError, RecursionError) as problem:
        where = problem.json_path.removeprefix("$") if isinstance(problem, SchemaError) else ""
        text = problem.message if isinstance(problem, SchemaError) else "nested too deeply"
        raise Fault(f"not a JSON Schema: {printable(text)[:SHOWN]}", where) from None
    _check_parts(schema, draft)
    # an empty registry: the default one would ask the network for a reference that leads out of the file
    validator = extend(draft, {"pattern": _pattern})(schema, format_checker=draft.FORMAT_CHECKER, registry=Registry())
    try:
        validator.is_valid(None)
    except RecursionError:
        raise Fault("given a $ref that leads to itself, required a schema that ends") from None
    return validator


def _check_parts(schema: dict[str, Any], draft: type[Validator]) -> None:
    """Every schema inside the schema: formats that are known, references that lead somewhere."""
    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    pending = [(root, Registry().resolver_with_root(root))]
    formats = draft.FORMAT_CHECKER.checkers
    while pending:
        part, resolver = pending.pop()
        if isinstance(part.contents, dict):
            asked = part.contents.get("format")
            if isinstance(asked, str) and asked not in formats:
                raise Fault(f"given the format {asked}, required one of {', '.join(sorted(formats))} ({FORMATS})")
            if "patternProperties" in part.contents:
                # The library searches these by itself, in several keywords; nothing stops a search without an end.
                raise Fault("given patternProperties, whose patterns have no time limit; required properties by name")
            for key in ("$ref", "$dynamicRef"):
                if (reference := part.contents.get(key)) is not None:
                    _check_reference(reference, resolver)
        pending += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]


def _check_reference(reference: Any, resolver: Any) -> None:
    try:
        resolver.lookup(reference)
    except Unresolvable:
        raise Fault(f"given the $ref {show(reference)}, which is not in the file; put it under $defs") from None


def _pattern(validator: Any, text: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """The keyword `pattern`, with a limit of time."""
    if validator.is_type(instance, "string") and not search(regex.compile(text), instance, "schema: pattern"):
        yield ValidationError(f"{instance!r} does not match {text!r}")
