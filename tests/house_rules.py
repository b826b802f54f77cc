"""The house rules on code, each a function from the tree to a list of complaints (empty: the rule is kept)."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator

from house_tree import Function, Module, Tree, is_optional_comment

MAX_FILE, MAX_FUNCTION, MAX_ARGUMENTS, MAX_POSITIONAL = 400, 60, 8, 2

# Who may import whom, folder by folder (the design's arrows); a folder may always import itself.
_FLOOR_2 = {"sci_tokenizers", "sci_gpt.errors"}
_FLOOR_3 = _FLOOR_2 | {"sci_gpt.data", "sci_gpt.model", "sci_gpt.parallel"}
_FLOOR_5 = _FLOOR_3 | {"sci_gpt.train", "sci_gpt.config", "sci_gpt.config_file"}
ARROWS: dict[str, set[str]] = {
    "sci_tokenizers": set(),
    "sci_gpt.errors": set(),
    "sci_gpt.plain_tree": {"sci_gpt.errors"},
    "sci_gpt.data": _FLOOR_2,
    "sci_gpt.model": _FLOOR_2,
    "sci_gpt.parallel": _FLOOR_2 | {"sci_gpt.model"},
    "sci_gpt.train": _FLOOR_3,
    "sci_gpt.config_model": {"sci_gpt.errors"},
    "sci_gpt.config": _FLOOR_3 | {"sci_gpt.train", "sci_gpt.config_model"},
    "sci_gpt.config_file": {"sci_gpt.errors", "sci_gpt.config", "sci_gpt.plain_tree"},
    "sci_gpt.recipes": _FLOOR_5,
    "sci_gpt": {"sci_gpt.recipes"},
    "sci_evals": _FLOOR_5 | {"sci_gpt.recipes"},
    "sci_launch": _FLOOR_5 | {"sci_gpt.recipes", "sci_gpt", "sci_evals"},
}
CLI, FACE = "sci_launch.cli", "sci_gpt"
ENGINE_ROOMS = ("sci_gpt.parallel", "sci_gpt.train")
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "manager", "base", "misc"}
# import name -> name in pyproject.toml, where they differ
DISTRIBUTIONS = {
    "yaml": "pyyaml",
    "netCDF4": "netcdf4",
    "skimage": "scikit-image",
    "iris_sample_data": "iris-sample-data",
}


def floor_of(module: str) -> str:
    """The folder (or single file) of the design that a product module belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "sci_gpt" and len(parts) > 1 else parts[0]


def check_floors(tree: Tree) -> list[str]:
    """No folder imports a folder above or beside it, except along the design's arrows."""
    found = []
    for module in tree.modules.values():
        home = floor_of(module.name)
        for item in tree.imports_of(module):
            goal = floor_of(item.target)
            if goal.split(".")[0] in ("sci_gpt", "sci_tokenizers", "sci_evals", "sci_launch"):
                if goal != home and goal not in ARROWS.get(home, set()):
                    found.append(_at(tree, module, item.line, f"{home} must not import {item.target}"))
    return found


def check_circles(tree: Tree) -> list[str]:
    """No module imports itself, however long the way round (imports inside functions count)."""
    graph = {
        name: {item.target for item in tree.imports_of(module) if item.target in tree.modules and name != FACE}
        for name, module in tree.modules.items()
    }
    found, done = [], set[str]()
    for start in graph:
        circle = _circle(graph, start, [], done)
        if circle:
            found.append("import circle: " + " -> ".join(circle))
    return found


def check_import_places(tree: Tree) -> list[str]:
    """Imports stand at the top, none relative; in functions only in cli.py, or of an optional library with comment."""
    found = []
    for module in tree.modules.values():
        for node, nested in module.imports():
            if isinstance(node, ast.ImportFrom) and node.level:
                found.append(_at(tree, module, node.lineno, "relative import"))
            if not nested or module.name in (CLI, FACE):
                continue
            name = _top_name(node)
            if name in ARROWS or not is_optional_comment(module, node.lineno):
                found.append(_at(tree, module, node.lineno, f"import of {name} inside a function"))
    return found


def check_libraries(tree: Tree) -> list[str]:
    """Tokenizers know numpy only; DeepSpeed and process groups stay in the engine rooms; imports are declared."""
    with (tree.root / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in wanted}
    found = []
    for module in tree.modules.values():
        for item in tree.imports_of(module):
            top = item.target.split(".")[0]
            if top in ARROWS or top in sys.stdlib_module_names:
                continue
            if module.name.startswith("sci_tokenizers") and top != "numpy":
                found.append(_at(tree, module, item.line, f"tokenizers know numpy only, not {top}"))
            engine = top == "deepspeed" or item.target.startswith("torch.distributed")
            if engine and floor_of(module.name) not in ENGINE_ROOMS:
                found.append(_at(tree, module, item.line, f"{item.target} belongs in {' or '.join(ENGINE_ROOMS)}"))
            if DISTRIBUTIONS.get(top, top).lower().replace("_", "-") not in declared:
                found.append(_at(tree, module, item.line, f"{top} is not declared in pyproject.toml"))
    return found


def check_packages(tree: Tree) -> list[str]:
    """`__init__.py` holds a docstring and nothing else (the public face may also hold its lazy `__getattr__`)."""
    found = []
    for module in tree.modules.values():
        if module.is_package and module.name != FACE and len(module.tree.body) != 1:
            found.append(_at(tree, module, 1, "an __init__.py holds nothing but a docstring"))
        if module.name == FACE:
            found += [
                _at(tree, module, node.lineno, "the public face is lazy: no import at its top")
                for node, nested in module.imports()
                if not nested and _top_name(node) not in sys.stdlib_module_names
            ]
    return found


def check_sizes(tree: Tree) -> list[str]:
    """Files, functions and argument lists stay small; arguments after the second are keyword-only."""
    found = []
    for module in tree.files:
        if len(module.lines) > MAX_FILE:
            found.append(_at(tree, module, len(module.lines), f"{len(module.lines)} lines, at most {MAX_FILE}"))
        for function, is_method, _ in module.functions():
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > MAX_FUNCTION:
                found.append(
                    _at(tree, module, function.lineno, f"{function.name} has {length} lines, at most {MAX_FUNCTION}")
                )
            positional, count = _count_arguments(function, is_method)
            if _has_foreign_signature(module, function):
                continue
            if count > MAX_ARGUMENTS:
                found.append(_at(tree, module, function.lineno, f"{function.name} has {count} arguments"))
            if positional > MAX_POSITIONAL and module.name:
                what = f"{function.name}: arguments after the second are keyword-only"
                found.append(_at(tree, module, function.lineno, what))
    return found


def check_annotations(tree: Tree) -> list[str]:
    """Every argument and every result has a type."""
    found = []
    for module in tree.files:
        for function, is_method, _ in module.functions():
            named = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            named += [extra for extra in (function.args.vararg, function.args.kwarg) if extra]
            skip = 1 if is_method and not _is_static(function) else 0
            bare = [argument.arg for argument in named[skip:] if argument.annotation is None]
            bare += ["return"] if function.returns is None else []
            if bare and not _is_said_to_be_foreign(module, function):
                found.append(_at(tree, module, function.lineno, f"{function.name}: no type for {', '.join(bare)}"))
    return found


def check_docstrings(tree: Tree) -> list[str]:
    """A file's first line says in a sentence what it is for; the product's public classes and functions say so too."""
    found = []
    for module in tree.files:
        first = (ast.get_docstring(module.tree) or "").split("\n")[0]
        start = 1 if module.lines and module.lines[0].startswith("#!") else 0
        if not first.endswith(".") or not module.lines[start].startswith('"""'):
            found.append(_at(tree, module, 1, "the first line is a docstring sentence, with its full stop"))
        if not module.name:
            continue
        for function, _, public in module.functions():
            if public and not ast.get_docstring(function):
                found.append(_at(tree, module, function.lineno, f"{function.name} has no docstring"))
        for node in module.tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                found.append(_at(tree, module, node.lineno, f"{node.name} has no docstring"))
    return found


def check_names(tree: Tree) -> list[str]:
    """A file is named for its concept: no utils, common, helpers, manager, base."""
    return [
        f"{tree.relative(module.path)}: name the concept"
        for module in tree.files
        if VAGUE_NAMES & {module.path.stem, *module.path.stem.split("_")[-1:], module.path.parent.name}
    ]


def check_dataclasses(tree: Tree) -> list[str]:
    """The product's dataclasses are frozen and keyword-only."""
    found = []
    for module in tree.modules.values():
        for node in ast.walk(module.tree):
            for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else ():
                call = decorator if isinstance(decorator, ast.Call) else None
                name = call.func if call else decorator
                if ast.unparse(name).split(".")[-1] != "dataclass":
                    continue
                set_true = {item.arg for item in (call.keywords if call else ()) if ast.unparse(item.value) == "True"}
                if not {"frozen", "kw_only"} <= set_true:
                    found.append(_at(tree, module, decorator.lineno, "a dataclass is frozen=True, kw_only=True"))
    return found


def check_safety(tree: Tree) -> list[str]:
    """Nothing read is executed or unpickled, no error is swallowed, nothing is left undone."""
    found = []
    for module in tree.modules.values():
        for line, complaint in _unsafe(module):
            found.append(_at(tree, module, line, complaint))
        for item in tree.imports_of(module):
            if item.target.split(".")[0] in PICKLES:
                found.append(_at(tree, module, item.line, f"import of {item.target}"))
    return found


RULES: dict[str, Callable[[Tree], list[str]]] = {
    "floors": check_floors,
    "circles": check_circles,
    "import_places": check_import_places,
    "libraries": check_libraries,
    "packages": check_packages,
    "sizes": check_sizes,
    "annotations": check_annotations,
    "docstrings": check_docstrings,
    "names": check_names,
    "dataclasses": check_dataclasses,
    "safety": check_safety,
}


def _at(tree: Tree, module: Module, line: int, complaint: str) -> str:
    return f"{tree.relative(module.path)}:{line}: {complaint}"


def _top_name(node: ast.Import | ast.ImportFrom) -> str:
    return (node.names[0].name if isinstance(node, ast.Import) else node.module or "").split(".")[0]


def _circle(graph: dict[str, set[str]], name: str, path: list[str], done: set[str]) -> list[str]:
    if name in path:
        return [*path[path.index(name) :], name]
    if name in done:
        return []
    for target in sorted(graph[name]):
        circle = _circle(graph, target, [*path, name], done)
        if circle:
            return circle
    done.add(name)
    return []


def _is_static(function: Function) -> bool:
    return any(ast.unparse(decorator) == "staticmethod" for decorator in function.decorator_list)


def _count_arguments(function: Function, is_method: bool) -> tuple[int, int]:
    own = 1 if is_method and not _is_static(function) else 0
    positional = len(function.args.posonlyargs) + len(function.args.args) - own
    return positional, positional + len(function.args.kwonlyargs)


def _has_foreign_signature(module: Module, function: Function) -> bool:
    """Whether Python fixes the arguments (a dunder), or a comment on the signature says who else does."""
    return _is_dunder(function) or _is_said_to_be_foreign(module, function)


def _is_dunder(function: Function) -> bool:
    return function.name.startswith("__") and function.name not in ("__init__", "__call__")


def _is_said_to_be_foreign(module: Module, function: Function) -> bool:
    """Another library's or the design's own signature carries a comment that names it."""
    signature = module.lines[function.lineno - 1 : function.body[0].lineno]
    return any("# signature of " in line for line in signature)


def _unsafe(module: Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield node.lineno, "a bare except"
            quiet = (isinstance(part, ast.Pass) or ast.unparse(part) == "..." for part in node.body)
            if all(quiet):
                yield node.lineno, "a silent except: say in the code what happens instead"
        if isinstance(node, ast.Raise) and node.exc and ast.unparse(node.exc).startswith("NotImplementedError"):
            yield node.lineno, "NotImplementedError: raise an error that says what to do"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {item.arg: ast.unparse(item.value) for item in node.keywords}
            if name in ("eval", "exec"):
                yield node.lineno, f"{name}() runs what it reads"
            if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
                yield node.lineno, f"{name}: use yaml.safe_load"
            if name == "torch.load" and keywords.get("weights_only") != "True":
                yield node.lineno, "torch.load without weights_only=True"
            if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
                yield node.lineno, "np.load with allow_pickle"
            if keywords.get("shell") == "True":
                yield node.lineno, "a shell=True call"
