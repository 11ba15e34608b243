"""Parts of the pages that are made from the code, whenever they are built, so that they cannot go stale."""

import importlib
import json

import click
from docutils import nodes
from docutils.parsers.rst import directives
from pydantic import TypeAdapter
from sphinx.util.docutils import SphinxDirective

from mpillm.config import Config
from mpillm.errors import ScheduleError
from mpillm.schedules import PipelineSchedule, grid, make_schedule
from mpillm.schedules.check import check
from mpillm.schedules.collective import draw
from mpillm.schedules.generators import ALGORITHMS, make_collective


class ConfigSection(SphinxDirective):
    """A table of the keys of a section of the configuration, or of a table in one.

    Types, defaults and limits come from :mod:`mpillm.config`; the content has a line ``key: meaning`` for each
    key, in the same order.
    """

    required_arguments, has_content = 1, True

    def run(self):
        name = self.arguments[0]
        keys = TypeAdapter(Config).json_schema()["$defs"][name.title().replace("_", "")]
        meanings = dict(line.split(": ", 1) for line in self.content if line)
        if list(meanings) != list(keys["properties"]):
            known, described = ", ".join(keys["properties"]), ", ".join(meanings)
            raise self.error(f"[{name}] has the keys {known}; described are {described}")
        rows = [("Key", "Default", "Allowed", "Meaning")]
        for key, schema in keys["properties"].items():
            default = "required" if key in keys.get("required", ()) else _default(schema.get("default", {}))
            rows.append((f"``{key}``", default, _allowed(schema), meanings[key]))
        return self.parse_text_to_nodes(_list_table(rows, "16 15 24 45", header_rows=1))


class Schedule(SphinxDirective):
    """The grid of a pipeline schedule, or what the checker says of one that cannot run.

    The argument names a schedule that mpillm makes; without one, the content is a schedule as in a file.
    """

    optional_arguments, has_content = 1, True
    option_spec = {name: directives.positive_int for name in ("ranks", "microbatches", "chunks")}

    def run(self):
        if self.arguments:
            sizes = (self.options[name] for name in ("ranks", "microbatches"))
            schedule = make_schedule(self.arguments[0], *sizes, self.options.get("chunks", 1))
        else:
            schedule = PipelineSchedule.from_text("\n".join(self.content))
        try:
            report = check(schedule)
        except ScheduleError as error:
            return [_literal(str(error))]
        held = ", ".join(map(str, report.in_flight_max))
        summary = f"{report.num_steps} steps; microbatches held at most, by rank: {held}"
        return [_literal(f"{grid(schedule)}\n{summary}")]


class Collective(SphinxDirective):
    """The drawing of a collective schedule: operation and algorithm."""

    required_arguments = 2
    option_spec = {"ranks": directives.positive_int, "nodes": directives.unchanged}

    def run(self):
        nodes = [int(node) for node in self.options.get("nodes", "").split()]
        schedule = make_collective(*self.arguments, self.options["ranks"], nodes=nodes)
        return [_literal(f"{' '.join(self.arguments)}\n{draw(schedule)}")]


class CollectiveAlgorithms(SphinxDirective):
    """The table of the generators, by operation."""

    def run(self):
        rows = [("Operation", "Algorithms")]
        rows += [(f"``{op}``", ", ".join(f"``{name}``" for name in names)) for op, names in ALGORITHMS.items()]
        return self.parse_text_to_nodes(_list_table(rows, "20 80", header_rows=1))


class CommandHelp(SphinxDirective):
    """What ``mpillm COMMAND --help`` prints."""

    required_arguments, final_argument_whitespace = 1, True

    def run(self):
        name, *below = self.arguments[0].split()
        command = importlib.import_module(f"mpillm.cli.{name}").command
        for part in below:
            command = command.commands[part]
        context = click.Context(command, info_name=f"mpillm {self.arguments[0]}", terminal_width=88)
        return [_literal(command.get_help(context))]


def setup(app):
    app.add_directive("config-section", ConfigSection)
    app.add_directive("schedule", Schedule)
    app.add_directive("collective", Collective)
    app.add_directive("collective-algorithms", CollectiveAlgorithms)
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}


def _list_table(rows, widths, header_rows=0):
    text = f".. list-table::\n   :header-rows: {header_rows}\n   :widths: {widths}\n\n"
    for row in rows:
        text += "".join(f"   {'*' if i == 0 else ' '} - {cell}\n" for i, cell in enumerate(row))
    return text


def _literal(text):
    return nodes.literal_block(text, text, language="text")


def _default(value):
    return "left out" if value is None else f"``{json.dumps(value)}``"


def _allowed(schema):
    """Say in words what a JSON schema allows."""
    if "$ref" in schema:
        return "table"
    if "anyOf" in schema:
        return ", or ".join(_allowed(part) for part in schema["anyOf"] if part.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"``{json.dumps(value)}``" for value in schema.get("enum", [schema.get("const")]))
    if "prefixItems" in schema:
        return "list: " + ", ".join(map(_allowed, schema["prefixItems"]))
    if schema["type"] == "array":
        return f"list, of {_allowed(schema['items'])}"
    if schema["type"] == "object":
        return f"table, of {_allowed(schema['additionalProperties'])}"
    types = {"boolean": "``true``, ``false``", "integer": "whole number", "number": "number", "string": "text"}
    limits = {"exclusiveMinimum": "above", "minimum": "from", "exclusiveMaximum": "below"}
    found = [f" {word} {schema[key]}" for key, word in limits.items() if key in schema]
    return types[schema["type"]] + "".join(found)
