"""Run a mesh that does not exist: the production code in virtual time, on modelled machines and radios.

SCENARIO is the name of one that is shipped, or a TOML file. Prints figures; --page writes a page to look at. With --seeds it
searches for a seed that breaks something (without a SCENARIO each seed draws one of its own), with --sweep it answers
what-ifs. simulations/README.md says what a run cannot show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SUMMARY = "a mesh in virtual time: churn, faults, and what becomes of requests"
SECTION = "Try it"
_SWARM_TIME = "60s"
SCENARIOS = Path(__file__).parent / "scenarios"


def configure(parser: argparse.ArgumentParser) -> None:
    """Flags."""
    parser.add_argument("scenario", nargs="?", help="a shipped scenario, or a file")
    parser.add_argument("--seed", type=int, default=1, help="the same seed gives the same run [1]")
    parser.add_argument(
        "--seeds", type=int, help="search: so many seeds from --seed on, until one breaks something"
    )
    parser.add_argument("--shrink", action="store_true", help="make a scenario that breaks something smaller")
    parser.add_argument("--time", help="virtual time in place of the scenario's, for example 60s")
    parser.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B", help="what-ifs, e.g. replicas=1,2,3"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one thing changed, e.g. nodes=40, churn=2",
    )
    parser.add_argument("--page", type=Path, help="write a page (HTML) with plots and the worst minute")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="write the plots as PNG files")
    parser.add_argument("--log", type=Path, help="write everything that happened, a line each")
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="JSON",
        help="earlier runs side by side; with --page in the same plots",
    )
    parser.add_argument("--list", action="store_true", help="list the shipped scenarios")
    parser.add_argument("--json", action="store_true", help="last line: one JSON object")


def run(args: argparse.Namespace) -> int:
    """Simulate, search, sweep or compare."""
    from mesh.errors import ConfigError

    if args.list:
        print(_listed())
        return 0
    if args.compare:
        return _compare(args)
    if not args.scenario and args.seeds is None:
        raise ConfigError(f"name a scenario: {', '.join(_names())}, or a file; or --seeds N for random ones")
    if args.seeds is not None:
        return _search(args)
    scenario = _scenario(args)
    if args.sweep:
        return _sweep(args, scenario)
    return _one(args, scenario)


def _names() -> list[str]:
    return sorted(p.stem for p in SCENARIOS.glob("*.toml"))


def _listed() -> str:
    from simulations.scenario import read_scenario

    found = [(n, read_scenario((SCENARIOS / f"{n}.toml").read_text(), n)) for n in _names()]
    return "\n".join(f"{name:16} {scenario.about}" for name, scenario in found)


def _scenario(args: argparse.Namespace) -> Any:
    import msgspec

    from mesh.errors import ConfigError
    from simulations.scenario import read_scenario, time_ns
    from simulations.search import with_setting

    path = SCENARIOS / f"{args.scenario}.toml"
    if args.scenario not in _names():
        path = Path(args.scenario)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{args.scenario} is neither a shipped scenario ({', '.join(_names())}) nor a file that can be read: {error}"
        ) from None
    scenario = read_scenario(text, str(path), lambda trace: _trace(path.parent / trace))
    if args.time:
        quiet = scenario.quiet
        _check_time(args.time, time_ns(quiet), f"longer than the scenario's quiet end, {quiet}")
        scenario = msgspec.structs.replace(scenario, time=args.time)
    for each in args.set:
        key, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"--set {each}: write KEY=VALUE, for example nodes=40")
        scenario = with_setting(scenario, key, value)
    return scenario


def _check_time(text: str, over_ns: int, what: str) -> None:
    from mesh.errors import ConfigError
    from simulations.scenario import time_ns

    try:
        if time_ns(text) <= over_ns:
            raise ValueError(f"it must be {what}")
    except ValueError as error:
        raise ConfigError(f"--time {text}: {error}") from None


def _trace(path: Path) -> Any:
    from mesh.errors import ConfigError
    from simulations.traces import read_trace

    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error}") from None
    return read_trace(content, str(path))


def _one(args: argparse.Namespace, scenario: Any) -> int:
    from simulations.page import page
    from simulations.plots import plots_of
    from simulations.report import event_log, figures, series, table
    from simulations.run import simulate
    from simulations.scenario import time_ns

    seconds = time_ns(scenario.time) // 1_000_000_000
    with _bar(f"{scenario.name}, virtual seconds", seconds) as told:
        outcome = simulate(scenario, args.seed, lambda share: told(int(share * seconds)))
    found = figures(outcome)
    over_time = series(outcome)
    for path, make in ((args.page, page), (args.log, lambda o: event_log(o.world))):
        if path is not None:
            _write(path, make(outcome))
    _draw(args, plots_of([(scenario.name, over_time)]))
    print(json.dumps({**found, "over_time": over_time}) if args.json else table(found))
    return 1 if found["violations"] else 0


def _write(path: Path, text: str) -> None:
    from mesh.errors import ConfigError

    try:
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from None
    print(f"wrote {path}", file=sys.stderr)


def _draw(args: argparse.Namespace, plots: Any) -> None:
    if args.png is None:
        return
    from simulations.png import write_plots

    for path in write_plots(plots, args.png):
        print(f"wrote {path}", file=sys.stderr)


def _search(args: argparse.Namespace) -> int:
    from simulations.search import search, shrink
    from simulations.swarm import random_scenario

    if args.scenario:
        scenario = _scenario(args)
        name, scenario_of = scenario.name, lambda seed: scenario
    else:
        time = args.time or _SWARM_TIME
        _check_time(time, 20_000_000_000, "over 20s")
        name, scenario_of = "random scenarios", lambda seed: random_scenario(seed, time)
    with _bar(f"{name}, seeds", args.seeds) as told:
        found, tried = search(
            scenario_of, iter(range(args.seed, args.seed + args.seeds)), lambda s: told(s - args.seed)
        )
    result: dict[str, Any] = {"scenario": name, "seeds": tried, "broken": None}
    if found is not None and args.shrink:
        found = shrink(found, lambda what: print(f"still breaks: {what}", file=sys.stderr))
    if found is not None:
        result["broken"] = {"seed": found.seed, "what": found.what}
        _tell_story(args, found)
    print(
        json.dumps(result)
        if args.json
        else f"{tried} seeds, {'one broke something' if found else 'nothing broke'}"
    )
    return 1 if found else 0


def _tell_story(args: argparse.Namespace, found: Any) -> None:
    import msgspec

    from simulations.report import worst_minute
    from simulations.run import simulate

    print("\n".join(worst_minute(simulate(found.scenario, found.seed).world)))
    print(f"seed {found.seed}: {found.what}")
    again = args.scenario
    if args.shrink or not again:
        again = f"{found.scenario.name}-{found.seed}.json"
        Path(again).write_bytes(msgspec.json.format(msgspec.json.encode(found.scenario)))
    time = f" --time {args.time}" if args.time and again == args.scenario else ""
    print(f"again: mesh simulate {again} --seed {found.seed}{time}")


def _sweep(args: argparse.Namespace, scenario: Any) -> int:
    from mesh.errors import ConfigError
    from simulations.page import sweep_page
    from simulations.report import figures, sweep_answer, sweep_plots
    from simulations.search import sweep

    axes = {}
    for each in args.sweep:
        key, equals, values = each.partition("=")
        if not equals or not values:
            raise ConfigError(f"--sweep {each}: write KEY=A,B, for example replicas=1,2,3")
        axes[key] = values.split(",")
    rows = []
    for at, outcomes in sweep(scenario, axes, 1, lambda what: print(what, file=sys.stderr)):
        found = figures(outcomes[0])
        keys = ("availability", "requests", "stall_ms_p50", "stall_ms_p95", "ttft_ms_p95")
        rows.append({**at, **{k: found[k] for k in keys}})
    plots, said = sweep_plots(rows, list(axes)), sweep_answer(rows, list(axes))
    if args.page is not None:
        _write(args.page, sweep_page(f"{scenario.name}: {' and '.join(axes)}", rows, plots, said))
    _draw(args, plots)
    if args.json:
        print(json.dumps(rows))
    else:
        print("".join(f"{k:>16}" for k in rows[0]))
        print("\n".join("".join(f"{v if v is not None else '-':>16}" for v in row.values()) for row in rows))
        print(said)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from mesh.errors import ConfigError
    from simulations.page import comparison_page
    from simulations.plots import plots_of
    from simulations.report import comparison

    runs: list[tuple[str, dict[str, Any]]] = []
    for path in args.compare:
        try:
            found = json.loads(path.read_text().strip().splitlines()[-1])
            if not isinstance(found, dict) or "over_time" not in found:
                raise ValueError("it lacks over_time")
            runs.append((path.stem, found))
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{path} is no output of 'mesh simulate --json': {error}") from None
    if args.page is not None:
        _write(args.page, comparison_page(runs))
    _draw(args, plots_of([(n, f["over_time"]) for n, f in runs]))
    print(comparison(runs))
    return 0


class _bar:  # noqa: N801 (used as a function)
    """Progress on a terminal; nothing elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total = what, total

    def __enter__(self) -> Callable[[int], None]:
        if not sys.stderr.isatty():
            return lambda done: None
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True))
        task = self._progress.add_task(self._what, total=self._total)
        self._progress.start()
        return lambda done: self._progress.update(task, completed=done)

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_progress"):
            self._progress.stop()
