"""The rules of the house that a machine can hold: floors, cycles, imports at the top, one door each."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "sftdist"
FILES = sorted(PACKAGE.rglob("*.py"))
ROOF = "roof"
# What a floor may import, beside itself.
FLOORS: dict[str, set[str]] = {
    "core": set(),
    "data": {"core"},
    "model": {"core"},
    "training": {"core", "data", "model"},
    "evals": {"core", "data", "model"},
    "assets": {"core"},
    "examples": {"core"},  # for users to copy: nobody imports them
    "release": {"core"},  # and evals.report
    ROOF: {"core", "data", "model", "training", "evals", "release", "assets", ROOF},
}
# A library, and the only files that may import it.
DOORS = {
    "hydra": {
        "sftdist.core.advice",
        "sftdist.core.conf_faults",
        "sftdist.core.config",
        "sftdist.core.words",
        "sftdist.core.multirun",
        "sftdist.core.resolve",
    },
    "omegaconf": {"sftdist.core.conf_faults", "sftdist.core.config", "sftdist.core.multirun", "sftdist.core.resolve"},
    "deepspeed": {"sftdist.training.engine"},
    "wandb": {"sftdist.training.wandb_sink"},
    "datasets": {"sftdist.data.sources"},
    "peft": {"sftdist.model.lora"},
    "datasketch": {"sftdist.data.near"},
    "bitsandbytes": {"sftdist.model.backends.quant"},
    "flash_attn": {"sftdist.model.backends.flash_attn"},
    "liger_kernel": {"sftdist.model.backends.liger"},
    "vllm": {"sftdist.evals.backends.vllm"},
    "huggingface_hub": {"sftdist.release.hub", "sftdist.commands.doctor_checks.probe_model"},
    "httpx": {"sftdist.evals.endpoint"},
    "lm_eval": {"sftdist.evals.backends.lm_eval"},
    "mlflow": {"sftdist.examples.mlflow_tracker"},
    "sacrebleu": {"sftdist.evals.probes.task"},
    "rouge_score": {"sftdist.evals.probes.task"},
}


def module_of(path: Path) -> str:
    """`sftdist/core/errors.py` as `sftdist.core.errors`; a package's `__init__` as the package."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def floor_of(module: str) -> str:
    """The floor a module stands on; the modules right under sftdist and the commands are the roof."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 and parts[1] in FLOORS else ROOF


def command_of(module: str) -> str:
    """`sftdist.commands.chat_views.html` as `chat`; "" for what is no command."""
    parts = module.split(".")
    return parts[2].partition("_")[0] if parts[:2] == ["sftdist", "commands"] and len(parts) > 2 else ""


def imports_of(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.stmt]]:
    """Every imported module with its statement; `from a import b` counts as `a.b` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import, required an absolute one"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield (inner if inner in MODULES else str(node.module)), node


MODULES = {module_of(path): path for path in FILES}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in MODULES.items()}


def broken_floors(module: str, imported: str) -> str | None:
    """Why one module may not import another of ours, or None."""
    here, there = floor_of(module), floor_of(imported)
    if here == "release" and imported == "sftdist.evals.report":
        return None
    if here != there and there not in FLOORS[here]:
        return f"{module} ({here}) imports {imported} ({there})"
    if here == there == ROOF and imported != "sftdist":
        by_name = module == "sftdist.cli" or module.startswith("sftdist.commands.")
        # a command in several files, or in a folder of them: chat.py, chat_views.py, chat_views/
        own_part = "_" in imported and command_of(imported) == command_of(module)
        if by_name and imported.startswith("sftdist.commands.") and not own_part:
            return f"{module} imports the command {imported}"
    return None


def test_no_floor_imports_one_that_it_may_not() -> None:
    found = [
        broken_floors(module, imported)
        for module, tree in TREES.items()
        for imported, _ in imports_of(tree, module)
        if imported.split(".")[0] == "sftdist"
    ]
    assert [text for text in found if text] == []


@pytest.mark.parametrize(
    ("module", "imported", "allowed"),
    [
        ("sftdist.core.config", "sftdist.data.schema", False),
        ("sftdist.data.loader", "sftdist.model.loss", False),
        ("sftdist.model.loss", "sftdist.data.loader", False),
        ("sftdist.training.loop", "sftdist.evals.loss", False),
        ("sftdist.evals.loss", "sftdist.training.loop", False),
        ("sftdist.assets.quickstart", "sftdist.data.schema", False),
        ("sftdist.release.gate", "sftdist.evals.suite", False),
        ("sftdist.release.gate", "sftdist.evals.report", True),
        ("sftdist.commands.chat", "sftdist.commands.export", False),
        ("sftdist.commands.chat", "sftdist.commands.chat_views", True),
        ("sftdist.commands.chat_views", "sftdist.commands.chat", False),
        ("sftdist.commands.chat_views.html", "sftdist.commands.chat_views.text", True),
        ("sftdist.commands.chat_views.html", "sftdist.commands.export_views.text", False),
        ("sftdist.cli", "sftdist.commands.chat_views", False),
        ("sftdist.training.loop", "sftdist.train", False),
        ("sftdist.train", "sftdist.training.loop", True),
        ("sftdist.commands.chat", "sftdist.evals.generate", True),
    ],
)
def test_the_floor_rule_itself(module: str, imported: str, allowed: bool) -> None:
    assert (broken_floors(module, imported) is None) == allowed


def test_no_import_cycles() -> None:
    edges = {
        module: {imported for imported, _ in imports_of(tree, module) if imported in MODULES and imported != module}
        for module, tree in TREES.items()
    }
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for imported in sorted(edges[module]):
                walk(imported, (*path, module))
            done.add(module)

    for module in edges:
        walk(module, ())


def test_imports_stand_at_the_top_of_the_file() -> None:
    late = []
    for module, tree in TREES.items():
        top = {id(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        top |= {id(inner) for node in tree.body if _is_type_checking(node) for inner in ast.walk(node)}
        # An optional backend may try its library and fall back, still at the top.
        top |= {id(inner) for node in tree.body if isinstance(node, ast.Try) for inner in node.body}
        late += [f"{module}:{node.lineno}" for _, node in imports_of(tree, module) if id(node) not in top]
    assert late == []


def _is_type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_packages_are_empty() -> None:
    inits = [path for path in FILES if path.name == "__init__.py"]
    assert len(inits) >= 6
    assert [str(path) for path in inits if path.read_text().strip()] == []


@pytest.mark.parametrize("library", sorted(DOORS))
def test_one_door_for_each_library(library: str) -> None:
    users = {
        module
        for module, tree in TREES.items()
        for imported, _ in imports_of(tree, module)
        if imported.split(".")[0] == library
    }
    assert users <= DOORS[library]


def test_no_module_hides_one_of_the_standard_library() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert names & set(sys.stdlib_module_names) == set()


def test_no_catch_all_modules() -> None:
    assert [module for module in MODULES if module.rpartition(".")[2] in ("utils", "util", "helpers", "misc")] == []


def test_our_own_types_are_not_asked_what_they_have() -> None:
    """`getattr` with a default and `hasattr` hide a missing attribute of our own; config objects never need them."""
    asked = [
        f"{module}:{node.lineno}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and node.args
        and isinstance(node.args[0], ast.Name)
        and node.args[0].id in ("cfg", "self")
        and (node.func.id == "hasattr" or len(node.args) == 3)
    ]
    assert asked == []
