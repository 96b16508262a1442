"""Parses a command line as the program would, without running it."""

from __future__ import annotations

import shlex

import click

from service.cli.main import commands


def parse_command(line: str) -> click.Context:
    """Return the context of the command in *line*, which follows `python -m service`.

    Raises:
        click.UsageError: The program does not take it.
    """
    words = shlex.split(line)
    command: click.Command = commands
    # click keeps a command's help option from its first context: that has to be the program's.
    context = click.Context(commands, **commands.context_settings)
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
        if isinstance(command, click.Group):
            context = click.Context(command, info_name=command.name, parent=context)
    return command.make_context(command.name, words, parent=context)
