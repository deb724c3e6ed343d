"""The layout of the source: imports run downwards only, and one room alone knows the model families."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cafe.lvlm.families import FAMILIES

SRC = Path(__file__).parents[1] / "src" / "cafe"

# From the bottom up. A room may import those on floors below it and itself, but no other room of its own floor.
FLOORS = [
    {"attention", "losses", "search", "errors"},
    {"utils", "content"},
    {"images"},
    {"packing"},
    {"lvlm"},
    {"checkpoint", "export", "data"},
    {"model"},
    {"training", "mining"},
    {"index", "evaluation", "planning", "scenes"},
    {"serving"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
WHOLE_HOUSE = {"__init__", "__main__"}  # the face of the package, and its entry point

# "llava" alone is the name of a data format, in the rooms that read, write or offer it.
FAMILY_NAME = re.compile(
    r"llava_?-?(next|onevision)|vip_?llava|qwen|gemma|idefics|smolvlm|internvl|intern_?vit|glm4|aya_?vision|ovis|siglip"
    r"|pixtral|mistral",
    re.IGNORECASE,
)
FORMAT_NAME = re.compile(r"llava", re.IGNORECASE)
FORMAT_ROOMS = ("data", "scenes", "cli")
# The tiny base model is made in the classes of a family.
BUILDS_A_MODEL = {SRC / "scenes" / "tiny_llava.py"}

FILES = sorted(SRC.rglob("*.py"))


def room_of(file: Path) -> str:
    return file.relative_to(SRC).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.Module) -> set[str]:
    """The rooms of a module's imports, wherever in it they stand."""
    modules: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            modules += [node.module] if node.module != "cafe" else [f"cafe.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    names = [module.split(".") for module in modules]
    return {name[1] for name in names if name[0] == "cafe" and len(name) > 1 and name[1] in FLOOR}


def docstrings(tree: ast.Module) -> set[ast.Constant]:
    """The strings that are statements: docstrings, and those behind a constant."""
    statements = [node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)]
    return {value for value in statements if isinstance(value, ast.Constant)}


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    prose = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node


def named_rooms(tree: ast.Module) -> set[str]:
    """The rooms that a module names by path or as a module: "scenes/base", "cafe.scenes.base", folder / "scenes"."""
    rooms = {room for node in strings(tree) if (room := room_in(node.value))}
    for path in path_expressions(tree):
        rooms |= {part for part in path if part in FLOOR and (SRC / part).exists()}
    return rooms


def room_in(text: str) -> str | None:
    """The room that a string names, if a file of the house is there; a dotted name counts as a module of cafe alone."""
    module = re.fullmatch(r"cafe\.(\w+)(?:[.:][\w.:]*)?", text)
    if module:
        return module[1] if module[1] in FLOOR else None
    room, *rest = text.removeprefix("cafe/").split("/")
    if not rest or room not in FLOOR:
        return None
    file = SRC / room / rest[0]
    return room if file.exists() or file.with_suffix(".py").is_file() else None


def path_expressions(tree: ast.Module) -> Iterator[list[str]]:
    """The string parts of paths that begin at the package's own files, or at a constant that does."""
    own = {"__file__", "files"}  # `importlib.resources.files`
    for node in tree.body:
        if isinstance(node, ast.Assign) and own & names_in(node.value):
            own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.BinOp, ast.Call)) and own & names_in(node):
            yield [child.value for child in ast.walk(node) if isinstance(child, ast.Constant)]


def names_in(node: ast.AST) -> set[str]:
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def test_every_room_stands_on_a_floor():
    assert {room_of(file) for file in FILES} - WHOLE_HOUSE <= set(FLOOR)


@pytest.mark.parametrize("read_rooms", [imported_rooms, named_rooms], ids=["imports", "paths"])
def test_imports_and_paths_run_downwards_only(read_rooms):
    wrong = []
    for file in FILES:
        room = room_of(file)
        if room in WHOLE_HOUSE:
            continue
        for other in read_rooms(ast.parse(file.read_text())):
            if other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{file.relative_to(SRC)} knows {other}")
    assert not wrong


def test_the_readers_of_imports_and_paths_find_them():
    source = """
from cafe.scenes.base import corpus
def late():
    import cafe.training.loop
    from cafe import model
HOUSE = Path(__file__).parents[1]
base = HOUSE / "scenes" / "base"
other = "evaluation/suites"
also = "cafe.cli.main"
field = "training.loop"
"""
    tree = ast.parse(source)
    assert imported_rooms(tree) == {"scenes", "training", "model"}
    assert named_rooms(tree) == {"scenes", "evaluation", "cli"}


def code_names(tree: ast.Module) -> Iterator[str]:
    """Every identifier, imported module and string of a module, its docstrings left out."""
    yield from (node.value for node in strings(tree))
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.alias(name=name, asname=asname):
                yield from (name, asname or "")
            case ast.ImportFrom(module=str(name)):
                yield name


def test_only_lvlm_names_a_model_family():
    """Prose may give one as an example; code may not."""
    wrong = []
    for file in FILES:
        room = room_of(file)
        if room == "lvlm" or file in BUILDS_A_MODEL:
            continue
        for name in code_names(ast.parse(file.read_text())):
            if FAMILY_NAME.search(name) or (FORMAT_NAME.search(name) and room not in FORMAT_ROOMS):
                wrong.append(f"{file.relative_to(SRC)} names {name[:60]!r}")
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_the_search_for_family_names_knows_every_family(family):
    assert FAMILY_NAME.search(family) or FORMAT_NAME.search(family)


# What runs code that a file holds, unless it is called with the arguments behind it.
UNSAFE_CALLS = {
    "torch.load": {"weights_only": True},
    "pickle.load": None,
    "pickle.loads": None,
    "pickle.Unpickler": None,
    "marshal.loads": None,
    "joblib.load": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "eval": None,
    "exec": None,
}


# What this package's own worker processes send is no file: it is pickled as multiprocessing does.
OWN_PROCESSES = {"utils/processes.py": "pickle.loads"}


def unsafe_calls(tree: ast.Module) -> Iterator[str]:
    """The calls of a module that could run what is in a file."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {
            keyword.arg: keyword.value.value for keyword in node.keywords if isinstance(keyword.value, ast.Constant)
        }
        if given.get("allow_pickle"):
            yield called
        wanted = UNSAFE_CALLS.get(called, {})
        if wanted is None or any(given.get(name) is not value for name, value in wanted.items()):
            yield called


def test_no_file_that_is_read_can_run_code():
    wrong = [
        f"{file.relative_to(SRC)} calls {called}"
        for file in FILES
        for called in unsafe_calls(ast.parse(file.read_text()))
        if OWN_PROCESSES.get(str(file.relative_to(SRC))) != called
    ]
    assert not wrong


def test_the_search_for_unsafe_calls_finds_them():
    source = (
        "torch.load(a)\ntorch.load(a, weights_only=False)\nnp.load(a, allow_pickle=True)\npickle.loads(a)\neval('1')"
    )
    assert len(list(unsafe_calls(ast.parse(source)))) == 5
    assert not list(unsafe_calls(ast.parse("torch.load(a, weights_only=True)\nnp.load(a)\nmodel.eval()")))
