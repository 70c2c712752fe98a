"""The command line: the parser, the commands, and what they show."""

from .parser import main as main
