"""The ``mesh`` command: a map of the product. Subcommands are found by entry point and loaded late."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mesh.errors import MeshError

GROUP = "inference_mesh.commands"
_SECTIONS = ("Try it", "Run it", "Look at it", "Models")
_INTERRUPTED = 130
_BROKEN_PIPE = 141


def _load(found: EntryPoint) -> Any:
    """A command's module: ``SUMMARY``, ``SECTION``, ``configure(parser)``, ``run(args) -> int``."""
    return found.load()


def _map_of_commands(commands: dict[str, Any]) -> str:
    lines = ["commands:"]
    for section in _SECTIONS:
        names = [n for n, module in commands.items() if section == module.SECTION]
        if names:
            lines.append(f"\n  {section}")
            lines += [f"    {name:<10}{commands[name].SUMMARY}" for name in names]
    lines.append("\n'mesh COMMAND --help' says more of each.")
    return "\n".join(lines)


def build_parser(argv: list[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """The parser, with only the wanted subcommand configured, and the modules by name."""
    found = {e.name: e for e in sorted(entry_points(group=GROUP), key=lambda e: e.name)}
    wanted = next((a for a in argv if not a.startswith("-")), None)
    names = [wanted] if wanted in found else list(found)
    modules = {name: _load(found[name]) for name in names}
    parser = argparse.ArgumentParser(
        prog="mesh",
        description="A handful of unequal machines as one language-model endpoint.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=_map_of_commands(modules) if wanted not in found else None,
    )
    parser.add_argument("--version", action="version", version=f"mesh {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for name, module in modules.items():
        sub = commands.add_parser(
            name,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(sub)
        sub.set_defaults(run=module.run)
    return parser, modules


def _version() -> str:
    from importlib.metadata import version

    return version("inference-mesh")


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; errors of ours are one line on standard error and status 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser, _ = build_parser(argv)
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return int(args.run(args))
    except MeshError as error:
        print(f"mesh {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mesh {args.command}: stopped", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone, as 'head' does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
