"""Models as Nomad jobs: a group for each range of layers, replicas as counts.

mesh job render smollm2-135m --replicas 2 > smollm2-135m.nomad.hcl
mesh model deploy smollm2-135m --nomad --replicas 2         plan, register, wait for the deployment

The placement is the mesh's own ('mesh plan' explains it); an agent of the mesh is asked for it. Afterwards the job is
Nomad's: 'nomad job scale smollm2-135m layers-0-15 3', drains, canaries and reverts work as on any other.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import TYPE_CHECKING, Any

SUMMARY = "write a model's Nomad job to a file"
SECTION = "Models"

if TYPE_CHECKING:
    from node_agent.adapters.api_client import ApiClient
    from node_agent.adapters.nomad_api import NomadApi
    from scheduler.nomad_job import Autoscale, ModelJob

_POLL_S = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Subcommands of ``mesh job``."""
    from node_agent.commands.model import policy_flags

    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    render = actions.add_parser("render", help="a model's job, in HCL")
    render.add_argument("name")
    policy_flags(render)
    job_flags(render)
    render.add_argument("--api", help="base URL of an agent [MESH_API; default http://127.0.0.1:8080]")
    render.add_argument("--json", action="store_true", help="as Nomad's HTTP API takes it")


def job_flags(parser: argparse.ArgumentParser) -> None:
    """How a job is run."""
    about = parser.add_argument_group("Nomad job")
    about.add_argument("--job", default="", help="name of the job [the model's]")
    about.add_argument("--datacenters", default="dc1", metavar="A,B", help="of the clients [dc1]")
    about.add_argument("--driver", default="raw_exec", help="of the task that holds the lease [raw_exec]")
    about.add_argument(
        "--mesh-command", default="mesh", metavar="PATH", help="where clients have mesh [mesh]"
    )
    about.add_argument(
        "--agent",
        default="${attr.unique.network.ip-address}:7070",
        metavar="HOST:PORT",
        help="where a lease finds its client's agent [%(default)s]",
    )
    about.add_argument("--cluster", default="default", help="of the agents [default]")
    about.add_argument(
        "--canaries", type=int, default=1, metavar="N", help="of a new version, beside the old [1]"
    )
    about.add_argument(
        "--no-consul", action="store_true", help="no health check in Consul: a running task is healthy"
    )
    about.add_argument(
        "--autoscale", default="", metavar="MIN:MAX", help="let the Nomad Autoscaler set the counts"
    )
    about.add_argument("--recut", action="store_true", help="cut and place anew, although that interrupts")


def run(args: argparse.Namespace) -> int:
    """Print the job."""
    import json

    from node_agent.adapters.api_client import ApiClient, api_base
    from scheduler.nomad_hcl import job_text
    from scheduler.nomad_job import job_spec

    job = planned_job(
        ApiClient(api_base(args.api), timeout_s=120), args, os.environ.get("NOMAD_NAMESPACE", "")
    )
    print(json.dumps({"Job": job_spec(job)}, indent=2) if args.json else job_text(job), end="")
    return 0


def planned_job(client: ApiClient, args: argparse.Namespace, namespace: str) -> ModelJob:
    """The job of the placement that an agent finds best now; raises ``InputError`` where there is none."""
    from mesh.errors import InputError
    from node_agent.commands.model import policy_with_flags
    from node_agent.commands.plan import report_view
    from scheduler.nomad_job import JobSettings, ModelJob, constraints_of, groups_of
    from scheduler.policy import ModelPolicy, Policy, policy_text

    if not 0 <= args.canaries <= 64:
        raise InputError(f"--canaries is {args.canaries}; it must be from 0 to 64")
    policy = policy_with_flags(args, ModelPolicy())
    body = {"policy": policy_text(Policy({args.name: policy})), "name": "the flags"}
    report = client.send("POST", "/mesh/v1/plan", body)
    plan = report["models"][args.name]
    if not plan["feasible"]:
        raise InputError(report_view(report, explain=False))
    settings = JobSettings(
        args.job,
        tuple(d for d in args.datacenters.split(",") if d),
        namespace or "default",
        args.driver,
        args.mesh_command,
        args.agent,
        args.cluster,
        args.canaries,
        not args.no_consul,
        _autoscale(args.autoscale),
    )
    return ModelJob(
        args.name,
        plan["digest"],
        plan["runtime"],
        plan["quantization"],
        plan["sessions"],
        plan["context"],
        groups_of(plan),
        constraints_of(policy),
        settings,
    )


def _autoscale(text: str) -> Autoscale | None:
    from mesh.errors import InputError
    from scheduler.nomad_job import Autoscale

    if not text:
        return None
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most) <= 64):
        raise InputError(f"--autoscale is {text!r}; write MIN:MAX, from 1 to 64")
    return Autoscale(int(least), int(most))


# -- with a Nomad ------------------------------------------------------------------------------------


def deploy_job(client: ApiClient, args: argparse.Namespace) -> int:
    """Place, plan, register, wait. Nothing is changed where the plan would harm, or the job is somebody else's."""
    from mesh.errors import InputError
    from node_agent.adapters.nomad_api import NomadApi, nomad_access
    from scheduler.nomad_change import change, dry_run
    from scheduler.policy import parse_policy

    access = nomad_access(os.environ)
    policy = client.get("/mesh/v1/plan")["policy"]
    if policy.strip() and args.name in parse_policy(policy, "the cluster's policy").models:
        raise InputError(
            f"{args.name} is placed by the mesh's own scheduler; 'mesh model undeploy {args.name}' first: a model has "
            "one who places it"
        )
    api = NomadApi(access)
    try:
        version = api.check_version()
        job = planned_job(client, args, access.namespace)
        what = change(api.job(job.id), job, args.replicas, args.recut)
        answer = api.plan(what.spec)
        print(f"{job.id} on Nomad {version} at {access.url}:")
        for line in [*dry_run(answer, what), *what.notes]:
            print(f"  {line}", flush=True)
        api.register(what.spec, what.index, what.keeps_counts)
        return 0 if args.detach else wait_for_deployment(api, job.id, args.timeout)
    finally:
        api.close()


def undeploy_job(args: argparse.Namespace) -> int:
    """Stop a model's job, unless it is not ours."""
    from mesh.errors import InputError
    from node_agent.adapters.nomad_api import NomadApi, nomad_access
    from scheduler.nomad_job import MODEL

    name = args.job or args.name
    api = NomadApi(nomad_access(os.environ))
    try:
        job = api.job(name)
        if job is None or job.get("Stop"):
            raise InputError(f"there is no running job {name}")
        if (job.get("Meta") or {}).get(MODEL) != args.name:
            raise InputError(f"the job {name} does not hold {args.name}; it was left alone")
        api.stop(name)
        print(f"{name} stops; its shards unload once their sessions have moved or ended")
        return 0
    finally:
        api.close()


def wait_for_deployment(api: NomadApi, name: str, timeout_s: float) -> int:
    """Until Nomad's deployment has ended or waits for people; 1 if it failed or takes too long."""
    from mesh.errors import Unavailable

    until, told = time.monotonic() + timeout_s, ""
    while time.monotonic() < until:
        try:
            found = api.deployment(name)
        except Unavailable as error:
            found, line = None, str(error)
        else:
            line = deployment_line(found) if found else "no deployment yet"
        if line != told:
            told = line
            print(f"  {line}", flush=True)
        if found and found["Status"] not in ("running", "pending", "blocked", "initializing"):
            return 0 if found["Status"] == "successful" else 1
        if found and waits_for_people(found):
            print(f"look at the canaries, then 'nomad deployment promote {found['ID'][:8]}', or 'fail'")
            return 0
        time.sleep(_POLL_S)
    print(f"not within {timeout_s:g} s; 'nomad job status {name}' goes on telling", file=sys.stderr)
    return 1


def deployment_line(deployment: dict[str, Any]) -> str:
    """Healthy of desired, by group, and what Nomad says."""
    groups = [
        f"{name} {g['HealthyAllocs']}/{_wanted(g)}"
        for name, g in sorted((deployment["TaskGroups"] or {}).items())
    ]
    return f"{', '.join(groups)}: {deployment['StatusDescription'] or deployment['Status']}"


def waits_for_people(deployment: dict[str, Any]) -> bool:
    """Whether all canaries are healthy and nobody has promoted them."""
    groups = (deployment["TaskGroups"] or {}).values()
    unpromoted = [g for g in groups if g["DesiredCanaries"] and not g["Promoted"] and not g["AutoPromote"]]
    return bool(unpromoted) and all(g["HealthyAllocs"] >= g["DesiredCanaries"] for g in unpromoted)


def _wanted(group: dict[str, Any]) -> int:
    waiting = group["DesiredCanaries"] and not group["Promoted"]
    return int(group["DesiredCanaries"] if waiting else group["DesiredTotal"])
