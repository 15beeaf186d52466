"""A real Nomad and Consul on loopback: agents and a model as jobs, and what happens to answers meanwhile.

In the order in which an operator would do it; each test goes on where the last one left the fleet.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.nomad.conftest import DEPLOY, HOSTS, MODEL, ROOT, Fleet, timed

TOKENS = 120
pytestmark = pytest.mark.timeout(600)


def answer(fleet: Fleet, interrupt: Callable[[], object] | None = None) -> str:
    """A streamed answer, whole: every token came, once. ``interrupt`` is called once, in its midst."""
    texts = []
    with (
        openai.OpenAI(base_url=f"{fleet.api}/v1", api_key="none", max_retries=0, timeout=120) as client,
        ThreadPoolExecutor(1) as aside,
    ):
        stream = client.completions.create(
            model=MODEL,
            prompt="The history of the sea begins with",
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            logit_bias={"2": -100, "0": -100},
        )
        usage: Any = None
        for chunk in stream:
            usage = chunk.usage or usage
            texts += [choice.text for choice in chunk.choices]
            if len(texts) == 30 and interrupt is not None:
                aside.submit(interrupt)
                interrupt = None
    assert usage.completion_tokens == TOKENS
    return "".join(texts)


def running(fleet: Fleet) -> int:
    return sum(a["ClientStatus"] == "running" for a in fleet.nomad.allocations(MODEL))


def test_an_agent_on_every_client(fleet: Fleet) -> None:
    fleet.run("nomad", "job", "run", "-detach", "jobs/node-agent.nomad.hcl")

    def all_there() -> bool:
        try:
            return [n["state"] for n in fleet.report()["nodes"]].count("alive") == len(HOSTS)
        except Exception:
            return False  # the first agent does not answer yet

    timed("four agents know each other", fleet.until(all_there, 90, "four agents"))


def test_the_readme_is_walked_through(fleet: Fleet) -> None:
    chapter = (ROOT / "README.md").read_text().split("## With Nomad")[1]
    block = chapter.split("```console\n")[1].split("```")[0]
    commands = [line[2:].partition("    #")[0] for line in block.splitlines() if line.startswith("$ ")]
    assert len(commands) >= 5
    for command in commands:
        target = re.search(r"> (\S+)", command)
        words = shlex.split(command.partition(">")[0])
        if words[:3] == ["nomad", "job", "run"]:
            words.insert(3, "-detach")
        if words[0] == "mesh" and words[2] in ("deploy", "render"):
            words += DEPLOY
        said = fleet.run(*words)
        if target:
            (fleet.folder / target[1]).write_text(said)
    fleet.until(lambda: running(fleet) == 0, 60, "nothing is leased any more")


def test_a_model_is_deployed_and_asked(fleet: Fleet) -> None:
    said = fleet.deploy("--replicas", "1")
    assert "Deployment completed successfully" in said
    timed("the model serves", fleet.until(lambda: fleet.serving() >= 1, 60, "a replica"))
    answer(fleet)


@pytest.mark.parametrize("count", [3, 2])
def test_it_is_scaled(fleet: Fleet, count: int) -> None:
    job = fleet.nomad.job(MODEL)
    assert job is not None
    groups = [g["Name"] for g in job["TaskGroups"]]
    calm = answer(fleet)

    def scale() -> None:
        for group in groups:
            fleet.run("nomad", "job", "scale", "-detach", MODEL, group, str(count))

    assert answer(fleet, scale) == calm
    wanted = count * len(groups)
    timed(f"{count} replicas", fleet.until(lambda: fleet.serving() == wanted, 90, f"{wanted} replicas"))


def test_a_drain_in_mid_answer_costs_no_token(fleet: Fleet) -> None:
    calm = answer(fleet)
    host = next(a["NodeID"] for a in fleet.nomad.allocations(MODEL) if a["ClientStatus"] == "running")
    drain = (
        "nomad",
        "node",
        "drain",
        "-enable",
        "-deadline",
        "60s",
        "-ignore-system",
        "-yes",
        "-detach",
        host,
    )
    assert answer(fleet, lambda: fleet.run(*drain)) == calm
    fleet.until(
        lambda: all(
            a["NodeID"] != host for a in fleet.nomad.allocations(MODEL) if a["ClientStatus"] == "running"
        ),
        120,
        "the client is empty",
    )
    fleet.run("nomad", "node", "drain", "-disable", "-yes", host)


def test_a_client_killed_in_mid_answer_costs_no_token(fleet: Fleet) -> None:
    calm = answer(fleet)

    def kill() -> None:
        found = subprocess.run(
            ["pgrep", "-g", str(fleet.process.pid), "-f", "gateway-2.hcl"],
            capture_output=True,
            text=True,
            check=True,
        )
        # Stopped, not killed: a fleet with a part missing ends. Nomad cannot tell the difference; its tasks go on.
        victims.append(int(found.stdout.split()[0]))
        subprocess.run(["kill", "-STOP", str(victims[0])], check=True)

    victims: list[int] = []
    try:
        assert answer(fleet, kill) == calm
        down = lambda: any(n["Status"] == "down" for n in fleet.nomad.nodes()[0])  # noqa: E731
        timed("Nomad calls the client down", fleet.until(down, 60, "down"))
        answer(fleet)
    finally:
        for victim in victims:
            subprocess.run(["kill", f"-{signal.SIGCONT.value}", str(victim)], check=True)
    fleet.until(lambda: all(n["Status"] == "ready" for n in fleet.nomad.nodes()[0]), 60, "all clients again")


def test_another_version_is_a_canary_until_it_is_promoted(fleet: Fleet) -> None:
    calm = answer(fleet)
    said = fleet.deploy("--quantization", "fp32")
    assert "look at the canaries" in said
    deployment = fleet.nomad.deployment(MODEL)
    assert deployment is not None
    # A generation in flight stays on its version.
    assert (
        answer(fleet, lambda: fleet.run("nomad", "deployment", "promote", "-detach", deployment["ID"]))
        == calm
    )
    timed("the old version is gone", fleet.until(lambda: fleet.serving("int8") == 0, 180, "fp32 only"))
    answer(fleet)


def test_a_version_that_never_serves_is_reverted(fleet: Fleet) -> None:
    job = fleet.nomad.job(MODEL)
    assert job is not None
    stable = job["Version"]
    broken = json.loads(json.dumps(job))
    for group in broken["TaskGroups"]:
        words = group["Tasks"][0]["Config"]["args"]
        words[words.index("--quantization") + 1] = "int8"
        words[1] = words[1].replace(f"{MODEL}@", f"{MODEL}@0")  # a digest that no file has
    fleet.nomad.register(broken, job["JobModifyIndex"], keep_counts=True)

    def reverted() -> bool:
        now = fleet.nomad.job(MODEL)
        return now is not None and int(now["Version"]) > int(stable) + 1

    timed("the broken version is reverted", fleet.until(reverted, 400, "reverted"))
    answer(fleet)
