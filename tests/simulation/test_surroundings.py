"""What surrounds simulated agents: traces, radio, sun, Consul, disks and clocks; random scenarios; what is drawn of a run."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mesh.errors import ConfigError
from mesh.types import Address
from node_agent.adapters.memory_store import MemoryTokenLog
from simulations.air import Air, sun
from simulations.command import SCENARIOS
from simulations.page import comparison_page, page, sweep_page
from simulations.plots import Line, Plot, plots_of, svg
from simulations.png import write_plots
from simulations.report import event_log, figures, series, sweep_answer, sweep_plots
from simulations.run import Outcome, simulate
from simulations.scenario import names_of, read_scenario
from simulations.search import breaks, sweep
from simulations.swarm import random_scenario
from simulations.traces import read_trace
from simulations.world import World

S = 1_000_000_000
THREE = 'name = "x"\ntime = "30s"\nquiet = "5s"\n{more}\n[load]\neach = "5s"\n[[nodes]]\nkind = "n"\ncount = 3\n{nodes}\n'


def run(more: str = "", nodes: str = "", faults: str = "", seed: int = 1) -> Outcome:
    return simulate(read_scenario(THREE.format(more=more, nodes=nodes) + faults, "x"), seed)


# -- traces --------------------------------------------------------------------------------------


def test_a_trace_says_when_nodes_are_up() -> None:
    content = b"node,up,down\nn-1,0,12\nn-1,20,30\nn-2,0,30\n"
    intervals = read_trace(content, "t.csv")
    assert intervals == (("n-1", 0.0, 12.0), ("n-1", 20.0, 30.0), ("n-2", 0.0, 30.0))
    scenario = read_scenario(
        THREE.format(more="", nodes='trace = "t.csv"'), "x", fetch=lambda name: read_trace(content, name)
    )
    told = [what for _, what in simulate(scenario, 1).world.events]
    # Nobody says anything of the third, so it is never up once the trace begins.
    assert [w for w in told if w.startswith("n-1 ")][:3] in (
        ["n-1 starts", "n-1 crashes", "n-1 starts"],
        ["n-1 starts", "n-1 loses power", "n-1 starts"],
    )
    assert "n-2 crashes" not in told
    assert "n-2 loses power" not in told


def test_a_trace_in_parquet_says_the_same() -> None:
    arrow = importlib.import_module("pyarrow")
    parquet = importlib.import_module("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(arrow.table({"node": ["n-1"], "up": [0.0], "down": [9.5]}), file)
    assert read_trace(file.getvalue(), "t.parquet") == (("n-1", 0.0, 9.5),)
    parquet.write_table(arrow.table({"name": ["n-1"]}), file := io.BytesIO())
    with pytest.raises(ConfigError, match="it needs node, up and down"):
        read_trace(file.getvalue(), "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet"):
        read_trace(b"PAR1 and then nonsense", "t.parquet")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node,up\nn,0\n", "t.csv:1: the first line must name the columns node,up,down"),
        ("node,up,down\n", "t.csv has no rows"),
        ("node,up,down\nn,now,5\n", "t.csv:2: up is 'now' and down '5'; both are seconds"),
        ("node,up,down\nn,0\n", "t.csv:2: up is '0' and down None; both are seconds"),
        ("node,up,down\nn,-1,5\n", "t.csv:2: n comes up at -1; a trace begins at 0"),
        ("node,up,down\nn,5,5\n", "t.csv:2: n goes down at 5, which is not after 5"),
        ("node,up,down\nn,0,inf\n", "t.csv:2: up is '0' and down 'inf'; both are seconds"),
        (
            "node,up,down\nn,0,9\nn,5,12\n",
            "t.csv:3: n comes up at 5 while it is up until 9 (line 2); join the two",
        ),
        (
            "node,up,down\nn,10,19\nn,5,7\n",
            "t.csv:3: n comes up at 5, before line 2; sort each node's by time",
        ),
    ],
)
def test_a_bad_trace_is_told_with_file_and_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_trace(text.encode(), "t.csv")
    assert str(raised.value).startswith(said)


def test_a_trace_of_nodes_that_are_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match="the trace of n has a node 'm-1'; they are n-1 to n-3"):
        read_scenario(
            THREE.format(more="", nodes='trace = "t.csv"'), "x", fetch=lambda name: (("m-1", 0.0, 1.0),)
        )


# -- air, sun, power -----------------------------------------------------------------------------


def air(now_ns: int, radio: str, nodes: str) -> Air:
    scenario = read_scenario(
        THREE.format(more='day = "24h"', nodes=nodes) + f"[radio]\nmbit = 80\n{radio}\n", "x"
    )
    return Air(scenario, dict(names_of(scenario)), Random(1), lambda: now_ns)


def test_the_sun_rises_at_the_start_and_is_down_for_half_the_day() -> None:
    day = 24 * 3600 * S
    assert sun(0, day) == 0
    assert sun(day // 4, day) == pytest.approx(1)
    assert sun(3 * day // 4, day) == 0


def test_bandwidth_shrinks_at_noon_and_at_the_edge_of_the_range() -> None:
    a, b = Address("n-1:7070"), Address("n-2:7070")
    noon = air(6 * 3600 * S, "busy = 0.5", "")
    assert noon.path(a, b).bytes_per_s == pytest.approx(5e6)
    assert air(0, "busy = 0.5", "").path(a, b).bytes_per_s == pytest.approx(10e6)
    near, far = (air(0, f"range_m = {r}", "orbit_m = 100") for r in (1000, 170))
    assert near.path(a, b).loss == 0
    # On a circle of 100 m they are 0 to 200 m apart: the worst pair is near or beyond the edge.
    worst = max(
        (far.path(Address(f"n-{i}:7070"), Address(f"n-{j}:7070")) for i in (1, 2) for j in (2, 3) if i != j),
        key=lambda p: p.loss,
    )
    assert worst.loss > 0
    assert worst.bytes_per_s < 10e6


def test_who_is_out_of_range_is_cut_off_and_comes_back_at_the_end() -> None:
    outcome = run(nodes="spread_m = 4000", faults="[radio]\nrange_m = 10\n")
    assert outcome.world.violations == []
    assert not outcome.world.network.cuts


def test_a_gateway_sleeps_until_the_sun_has_charged_it() -> None:
    # The run begins at sunrise, with half or more of a small battery.
    power = "battery_wh = 0.02\nidle_w = 6.0\nbusy_w = 1.0\nland_at = 30\nsolar_w = 30.0"
    outcome = run(more='day = "10m"', nodes=power)
    told = [what for _, what in outcome.world.events]
    assert "n-1 sleeps" in told
    assert "n-1 wakes" in told
    assert outcome.world.violations == []


# -- faults --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ('what = "disk"\nevery = "2s"\nfactor = 30', "slow disk"),
        ('what = "clock"\nevery = "2s"\nduration = "1h"', "clock set"),
        ('what = "corrupt"\nevery = "3s"\nduration = "500ms"', "corrupt frames"),
        ('what = "consul"\nat = "5s"\nduration = "10s"', "consul away"),
        ('what = "wipe"\nat = "8s"\nduration = "2s"', "crash"),
        ('what = "restart"\nat = "8s"', "crash"),
        ('what = "update"\nat = "5s"\nwave = "3s"\nduration = "4s"\nfactor = 2', "slow"),
    ],
)
def test_faults_happen_and_nothing_breaks(fault: str, counted: str) -> None:
    outcome = run(more="consul = true", nodes="drift_ppm = 300", faults=f"[[faults]]\n{fault}\n")
    assert outcome.world.faults[counted] >= 1
    found = figures(outcome)
    assert found["violations"] == []
    assert (found["tokens_lost"], found["tokens_repeated"], found["tokens_changed"]) == (0, 0, 0)


TWO_GATEWAYS = """
name = "x"
time = "20s"
quiet = "5s"
[model]
cuts = [10, 20]
[load]
each = "exponential(1500ms)"
prompt = [20, 200]
tokens = [40, 80]
[[nodes]]
kind = "host"
count = 6
[[nodes]]
kind = "gateway"
count = 2
hosts = false
[[faults]]
what = "reset"
every = "exponential(700ms)"
who = "gateway"
duration = "uniform(1ms, 50ms)"
"""


def test_a_stream_to_the_owner_that_breaks_is_missed_at_once_and_moves_nobody() -> None:
    outcome = simulate(read_scenario(TWO_GATEWAYS, "x"), 1)
    found = figures(outcome)
    assert found["violations"] == []
    assert found["availability"] == 1.0
    assert "stream_broken" in found["causes"], "tokens were lost on the way home"
    # Without the last stage's word the owner waits for its step's deadline, or the client goes elsewhere after seconds.
    assert found["stall_ms_p50"] < 100
    assert found["stall_ms_max"] < 1000
    assert "cold" not in found["failovers"]


def test_a_wiped_disk_has_no_tokens_any_more() -> None:
    outcome = run(faults='[[faults]]\nwhat = "wipe"\nat = "8s"\nwho = "n-1"\nduration = "2s"\n')
    assert any("its disk is lost" in what for _, what in outcome.world.events)
    assert isinstance(outcome.world.specs["n-1"].tokens, MemoryTokenLog)


def test_nodes_find_each_other_in_consul_and_its_lock_says_who_leads() -> None:
    policy = 'policy = "[models.smollm2-135m]"'
    outcome = run(more=f"consul = true\n{policy}")
    leaders = {n.control.term.leader for n in outcome.world.nodes.values() if n.control.term}
    assert len(leaders) == 1
    assert figures(outcome)["violations"] == []


NOMAD = 'nomad = true\npolicy = """[models.smollm2-135m]\nreplicas = 2"""'
DRAIN = '[[faults]]\nwhat = "drain"\nat = "8s"\nwho = "n-2"\nduration = "14s"\n'


def hosted_while_drained(monkeypatch: pytest.MonkeyPatch, faults: str) -> tuple[Outcome, list[int]]:
    """A run, and how many replicas the node had when its drain began and when its agent was told to end."""
    hosted: list[int] = []

    def noted(method: Any) -> Any:
        def call(world: World, name: str, *more: Any) -> Any:
            hosted.append(len(world.nodes[name].host.replicas))
            return method(world, name, *more)

        return call

    for name in ("drain", "reboot"):
        monkeypatch.setattr(World, name, noted(getattr(World, name)))
    return run(more=NOMAD, faults=faults), hosted


def test_what_nomad_drains_hosts_nothing_any_more_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome, hosted = hosted_while_drained(monkeypatch, DRAIN)
    assert hosted == [1, 0]
    assert outcome.world.faults["drain"] == 1
    assert "n-2 starts" in [what for at, what in outcome.world.events if at > 20 * S]
    assert figures(outcome)["violations"] == []
    assert figures(outcome)["availability"] == 1.0


def test_with_nomad_away_nothing_that_serves_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    away = '[[faults]]\nwhat = "nomad"\nat = "6s"\nduration = "20s"\n'
    outcome, hosted = hosted_while_drained(monkeypatch, away + DRAIN)
    # Nobody heard of the drain: the agent is ended with what it hosts, and hands its sessions over.
    assert hosted == [1, 1]
    assert outcome.world.faults["nomad away"] == 1
    assert figures(outcome)["violations"] == []
    assert figures(outcome)["availability"] == 1.0


@pytest.mark.parametrize(
    ("more", "faults", "said"),
    [
        ("nomad = true", "", "x:4: nomad = true needs a policy"),
        ("", DRAIN, "drain needs nomad = true"),
    ],
)
def test_nomad_needs_someone_who_follows_it(more: str, faults: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(more=more, faults=faults)


# -- many runs -----------------------------------------------------------------------------------


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(1, 9))
def test_random_scenarios_break_nothing(seed: int) -> None:
    assert breaks(random_scenario(seed, "30s"), seed) is None


def test_a_seed_draws_the_same_scenario_and_another_one_another() -> None:
    assert random_scenario(5, "60s") == random_scenario(5, "60s")
    assert random_scenario(5, "60s") != random_scenario(6, "60s")
    kinds = {f.what for seed in range(60) for f in random_scenario(seed, "60s").faults}
    assert len(kinds) == 16


# -- what is drawn -------------------------------------------------------------------------------


def test_runs_are_compared_in_the_same_plots(tmp_path: Path) -> None:
    runs = []
    for seed in (1, 2):
        outcome = run(seed=seed)
        runs.append((f"seed {seed}", {**figures(outcome), "over_time": series(outcome)}))
    told = json.loads(json.dumps(runs))
    text = comparison_page(told)
    assert text.count("<polyline") == 2 * len(plots_of([(n, f["over_time"]) for n, f in told]))
    assert "seed 1 against seed 2" in text
    paths = write_plots(plots_of([(n, f["over_time"]) for n, f in told]), tmp_path / "png")
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in paths)
    assert len(paths) == len(set(paths)) >= 10


def test_a_sweep_says_what_holds() -> None:
    scenario = read_scenario(THREE.format(more="", nodes=""), "x")
    rows = [
        {**at, "availability": figures(outcomes[0])["availability"], "stall_ms_p95": None}
        for at, outcomes in sweep(
            scenario, {"replicas": ["1", "2"], "time": ["25s", "30s"]}, 1, lambda what: None
        )
    ]
    assert [(r["replicas"], r["time"]) for r in rows] == [
        ("1", "25s"),
        ("1", "30s"),
        ("2", "25s"),
        ("2", "30s"),
    ]
    said = sweep_answer(rows, ["replicas", "time"])
    assert (
        said
        == "99.95 % hold with replicas 1 at time 25s, 30s. 99.95 % hold with replicas 2 at time 25s, 30s."
    )
    plots = sweep_plots(rows, ["replicas", "time"])
    assert [line.name for line in plots[0].lines] == ["replicas 1", "replicas 2"]
    assert list(plots[0].lines[0].at) == [25.0, 30.0]
    assert "99.95 %" in sweep_page("x", rows, plots, said)


def test_gaps_are_left_out_of_a_line() -> None:
    assert svg(Plot("p", (Line("", [1.0, 2.0, 3.0], [1.0, None, 3.0]),))).count(",") == 2


def test_the_page_is_drawn_by_a_browser(tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not on the PATH")
    outcome = run()
    (tmp_path / "run.html").write_text(page(outcome))
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=1000", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "run.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.count("<svg") >= 10
    assert f"{figures(outcome)['requests']}</td>" in done.stdout


def test_the_log_of_a_run_is_told_in_order() -> None:
    lines = event_log(run().world).splitlines()
    instants = [int(line.split()[0]) for line in lines if line[0].isdigit()]
    assert instants == sorted(instants)


def test_shipped_scenarios_can_be_listed() -> None:
    assert {"kiosk", "factory", "drone-swarm", "gateway-field", "internet-scale", "flash-crowd"} <= {
        p.stem for p in SCENARIOS.glob("*.toml")
    }


# -- quiet hours ---------------------------------------------------------------------------------

LONG = """
name = "long"
time = "6m"
[load]
each = "exponential(20s)"
[[nodes]]
kind = "n"
count = 9
regions = 3
up = "exponential(6m)"
down = "uniform(5s, 20s)"
silent = 0.5
"""


def test_quiet_hours_pass_quickly_and_nothing_changes_by_it() -> None:
    """Clients see the same tokens at about the same times, nodes die at the same times, and are found out as fast."""
    scenario = read_scenario(LONG, "long")
    with_, without = (simulate(scenario, 4, quiet=q) for q in (True, False))
    assert with_.world.quiet.saved_ns > 0
    assert without.world.quiet.saved_ns == 0
    assert with_.events < 0.75 * without.events
    a, b = figures(with_), figures(without)
    for same in ("requests", "availability", "tokens", "faults", "violations", "failed", "resumed_elsewhere"):
        assert a[same] == b[same], same
    for near in ("ttft_ms_p50", "tpot_ms_p50", "tpot_ms_p95"):
        assert a[near] == pytest.approx(b[near], rel=0.02), near
    tokens = [[[token for token, _ in r.seen] for r in o.world.requests] for o in (with_, without)]
    assert tokens[0] == tokens[1]
