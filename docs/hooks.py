"""MkDocs hook: build the reference pages of recipe fields and commands from the source."""

import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import cleandoc, getdoc
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from cafe.cli.main import cli
from cafe.training.recipe import Recipe


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    for path, content in (("reference/recipe.md", recipe_page()), ("reference/commands.md", commands_page())):
        files.append(File.generated(config, path, content=content))
    return files


def recipe_page() -> str:
    """Describe every recipe field: name, type, default and text, one table per section."""
    lines = ["# Recipe fields", "", cleandoc(recipe_page.intro)]
    described: dict[type, str] = {}
    for name, section in sections(Recipe, ""):
        lines += ["", f"## {name or 'Top level'}", ""]
        if section in described:
            lines.append(f"The same fields as `{described[section]}`.")
            continue
        described[section] = name
        lines += [summary(section), ""]
        lines += ["| field | type | default | description |", "|---|---|---|---|"]
        texts, types = attribute_texts(section), get_type_hints(section, include_extras=True)
        for field in fields(section):
            where = f"{name}.{field.name}".lstrip(".")
            lines.append(f"| `{where}` | {type_name(types[field.name])} | {default(field)} | {texts[field.name]} |")
    return "\n".join(lines) + "\n"


recipe_page.intro = """
Every field of a recipe, built from `cafe.training.recipe`. Override any of them on the command line with
`key=value`, for example `optimizer.learning_rate=1e-4`.
"""


def sections(config: type, name: str) -> Iterator[tuple[str, type]]:
    """Walk the tree of config classes, each with the dotted name of its place in a recipe."""
    yield name, config
    for field, hint in get_type_hints(config, include_extras=True).items():
        for part in dataclasses_in(hint):
            repeated = "[]" if get_origin(hint) is tuple else ""
            yield from sections(part, f"{name}.{field}{repeated}".lstrip("."))


def dataclasses_in(hint: Any) -> Iterator[type]:
    """Find the config classes in a type hint."""
    if isinstance(hint, type) and is_dataclass(hint):
        yield hint
    for argument in get_args(hint):
        yield from dataclasses_in(argument)


def summary(config: type) -> str:
    """Return the text of a class's docstring before its attributes."""
    return (getdoc(config) or "").partition("\nAttributes:")[0].strip()


def attribute_texts(config: type) -> dict[str, str]:
    """Return the text of each attribute in a class's docstring; "a, b: text" describes both."""
    section = (getdoc(config) or "").partition("\nAttributes:\n")[2]
    # An attribute begins at one level of indentation, and its text continues at two.
    attributes = re.findall(r"^    ([\w, ]+): (.+(?:\n        .+)*)", section, re.MULTILINE)
    return {name: cell(text) for names, text in attributes for name in names.split(", ")}


def cell(text: str) -> str:
    """Put a text into one line of a table's cell."""
    return " ".join(text.split()).replace("|", "\\|")


def type_name(hint: Any) -> str:
    """Write a type as a reader of YAML sees it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return f"{type_name(arguments[0])}, {', '.join(map(str, arguments[1:]))}"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if arguments:
        return " or ".join("null" if part is NoneType else type_name(part) for part in arguments)
    if isinstance(hint, type) and is_dataclass(hint):
        return "mapping"
    return {str: "text", int: "integer", float: "number", bool: "true or false"}.get(hint, hint.__name__)


def default(field: Field) -> str:
    """Write a field's default as YAML does."""
    value = field.default
    if value is MISSING and field.default_factory is MISSING:
        return "required"
    if value is MISSING:
        return "see its fields"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value!r}`" if isinstance(value, str) else f"`{value}`"


def commands_page() -> str:
    """Describe every command with its arguments and options."""
    lines = ["# Commands", "", "Every command of `cafe`, built from its help texts."]
    for path, command in commands(cli, "cafe"):
        context = click.Context(command, info_name=path)
        usage = " ".join([path, *command.collect_usage_pieces(context)])
        lines += ["", f"## {path}", "", cleandoc(command.help or ""), "", "```text", usage, "```"]
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        if options:
            lines += ["", "| option | description |", "|---|---|"]
        for option in options:
            name, text = option.get_help_record(context) or ("", "")
            lines.append(f"| `{cell(name)}` | {cell(text)} |")
    return "\n".join(lines) + "\n"


def commands(group: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """Walk the commands of a group, each with the words that call it."""
    if not isinstance(group, click.Group):
        yield path, group
        return
    for name, command in group.commands.items():
        yield from commands(command, f"{path} {name}")
