"""What is wrong in a YAML file of conf, in the user's words: Hydra and OmegaConf speak of their own insides."""

from __future__ import annotations

import re
from collections.abc import Sequence

import yaml
from hydra.errors import HydraException
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from sftdist.core.snapshot import one_line

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError)
_ROOT = "'sftdist'"  # what the base of all files is called: then the command line or an `override` is at fault
# What Hydra says, and what that means; \1 is the file.
_EXPLAINED = {
    r"In '(.+?)': Could not (?:load|find) '(.+?)'": (
        r"conf/\1.yaml: its defaults name \2, which is no file of conf; a file of another folder is /FOLDER/NAME, "
        "a choice of a group is 'override /GROUP: NAME'"
    ),
    r"In '(.+?)': Could not override '(.+?)'": (
        r"conf/\1.yaml: its defaults override \2, which is no group; the groups are {groups}"
    ),
    r"Invalid defaults list in '(.+?)'": r"conf/\1.yaml: its defaults are no list; required defaults: [NAME, _self_]",
    r"Unsupported item value in defaults : (.+?)\.": (
        r"conf: a preset's defaults choose a group's file by \1, required text in quotes: 'override /zero: \"3\"'"
    ),
    r"In '(.+?)': Config\w+ raised.*Cannot merge (?:Dict|List)Config": (
        r"conf/\1.yaml: gives a list where a section of keys is required, or a section where a list is"
    ),
    r"Cannot merge (?:Dict|List)Config.*full_key: (\S+)": (
        r"conf: \1: given a list where a section is required, or a section where a list is"
    ),
}


def explained(error: Exception, groups: Sequence[str]) -> str:
    """One line: the file, what it says, and what is required."""
    if isinstance(error, RecursionError):
        return "conf: a preset's defaults lead back to the preset itself; name another file there"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{mark.name}:{mark.line + 1}: not readable as YAML ({error.problem})"
    message, deeper = one_line(error), error.__cause__ or error.__context__
    if missing := re.search(
        rf"In {_ROOT}: Could not find '(.+)/(.+?)' Available options in '.+?': (.+?) Config", message
    ):
        group, name, options = missing.groups()
        return f"conf: a preset chooses {group}={name}, not in conf/{group}, which has {', '.join(options.split())}"
    for pattern, meaning in _EXPLAINED.items():
        if found := re.search(pattern, message):
            return found.expand(meaning).replace("{groups}", ", ".join(groups)).strip()
    if not message and isinstance(deeper, Exception):
        return explained(deeper, groups)
    message = re.split(r"Config search path|full_key:", message)[0].strip()
    if isinstance(error, GrammarParseError):
        return f"conf: a ${{...}} cannot be read ({message}); close it, or write \\${{ for the text itself"
    return f"conf: {message}"
