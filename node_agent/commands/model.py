"""Models: fetch them, cut them, deploy them on the mesh, look at them.

mesh model pull smollm2-135m            from the catalogue, digest checked
mesh model pull mine --from FILE.gguf   from a file, a URL, or hf:owner/repo/file.gguf
mesh model shard smollm2-135m --cuts 10,20
mesh model shard smollm2-135m --layers 0-12
mesh model deploy smollm2-135m --replicas 2 --max-tpot 30ms --availability 0.999
mesh model deploy smollm2-135m --nomad --replicas 2      as a Nomad job ('mesh job render' writes it to a file)
mesh model undeploy smollm2-135m
mesh model list
mesh model verify smollm2-135m          every file against its SHA-256, every shard against its test vector
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

SUMMARY = "pull, shard, deploy, list and verify models"
SECTION = "Models"

if TYPE_CHECKING:
    from node_agent.adapters.model_store import ModelStore
    from scheduler.policy import ModelPolicy


def configure(parser: argparse.ArgumentParser) -> None:
    """Subcommands of ``mesh model``."""
    parser.add_argument("--home", help="where models are kept [MESH_HOME]")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    pull = actions.add_parser("pull", help="fetch a model")
    pull.add_argument("name")
    pull.add_argument("--from", dest="source", metavar="SOURCE", help="path, URL or hf:owner/repo/file.gguf")
    pull.add_argument("--sha256", help="refuse any other file")
    shard = actions.add_parser("shard", help="cut a model into shards")
    shard.add_argument("name")
    shard.add_argument(
        "--runtime", default="", help="onnx, litert or onnxstd [what is measured to be fastest here, once]"
    )
    shard.add_argument(
        "--quantization", default="", help="int8 (default of onnx), fp32, or int4 (default of litert)"
    )
    shard.add_argument(
        "--context", type=int, default=0, help="positions of a session that LiteRT shards are for [2048]"
    )
    cut = shard.add_mutually_exclusive_group()
    cut.add_argument("--cuts", metavar="A,B,...", help="cut before these layers, e.g. 10,20")
    cut.add_argument("--layers", metavar="START-END", help="one shard only")
    cut.add_argument("--parts", type=int, help="so many equal parts (default 3)")
    actions.add_parser("list", help="models and shards on this machine").add_argument(
        "--json", action="store_true"
    )
    _configure_deploy(actions)
    verify = actions.add_parser("verify", help="check every file and every shard's test vector")
    verify.add_argument("name")


_DEPLOY_FLAGS = {
    "replicas": int,
    "max-tpot": str,
    "availability": float,
    "runtime": str,
    "quantization": str,
    "sessions": int,
    "context": int,
    "spread": str,
    "battery-floor": int,
    "percentile": str,
}
_DEPLOY_LISTS = ("allow", "deny", "ingress", "devices")


def policy_flags(parser: argparse.ArgumentParser) -> None:
    """The keys of a policy file as flags, with the same defaults and meanings."""
    from dataclasses import fields

    from scheduler.policy import ModelPolicy

    about = {f.name: f.metadata["about"].replace("%", "%%") for f in fields(ModelPolicy)}
    for flag, kind in _DEPLOY_FLAGS.items():
        parser.add_argument(f"--{flag}", type=kind, help=about[flag.replace("-", "_")])
    for flag in _DEPLOY_LISTS:
        parser.add_argument(f"--{flag}", action="append", metavar="LABEL", help=about[flag])


def policy_with_flags(args: argparse.Namespace, before: ModelPolicy) -> ModelPolicy:
    """What ``before`` becomes by the flags that were given; raises ``ConfigError``."""
    from dataclasses import asdict, replace

    from scheduler.policy import model_policy

    names = [f.replace("-", "_") for f in _DEPLOY_FLAGS] + list(_DEPLOY_LISTS)
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    wanted = asdict(model_policy(given, f"mesh {args.command}"))
    return replace(before, **{n: wanted[n] for n in given})


def _configure_deploy(actions: Any) -> None:
    from node_agent.commands.apply import common_flags
    from node_agent.commands.job import job_flags

    deploy = actions.add_parser("deploy", help="place a model on the mesh, and wait until it serves")
    deploy.add_argument("name")
    policy_flags(deploy)
    common_flags(deploy)
    deploy.add_argument(
        "--nomad", action="store_true", help="as a Nomad job; NOMAD_ADDR and NOMAD_TOKEN say where"
    )
    job_flags(deploy)
    undeploy = actions.add_parser("undeploy", help="take a model off the mesh")
    undeploy.add_argument("name")
    common_flags(undeploy)
    undeploy.add_argument("--nomad", action="store_true", help="stop its Nomad job")
    undeploy.add_argument("--job", default="", help="name of the job [the model's]")


def run(args: argparse.Namespace) -> int:
    """Dispatch to the action."""
    if args.action in ("deploy", "undeploy"):
        return _deploy(args)
    from node_agent.adapters.model_store import ModelStore
    from node_agent.paths import default_home

    store = ModelStore(Path(args.home) if args.home else default_home())
    return {"pull": _pull, "shard": _shard, "list": _list, "verify": _verify}[args.action](store, args)


def _deploy(args: argparse.Namespace) -> int:
    """Change one model in the cluster's policy and leave the rest as it is; or do so in Nomad."""
    from dataclasses import replace

    from mesh.errors import InputError
    from node_agent.adapters.api_client import ApiClient, api_base
    from node_agent.commands.apply import change_policy
    from node_agent.commands.job import deploy_job, undeploy_job
    from scheduler.policy import ModelPolicy, Policy, parse_policy, policy_text

    client = ApiClient(api_base(args.api), timeout_s=120)
    if args.nomad:
        return deploy_job(client, args) if args.action == "deploy" else undeploy_job(args)
    text = client.get("/mesh/v1/plan")["policy"]
    policy = parse_policy(text, "the cluster's policy") if text.strip() else Policy()
    models = dict(policy.models)
    if args.action == "undeploy":
        if models.pop(args.name, None) is None:
            known = ", ".join(sorted(models)) or "none"
            raise InputError(f"{args.name} is not deployed (deployed: {known})")
    else:
        models[args.name] = policy_with_flags(args, models.get(args.name, ModelPolicy()))
    return change_policy(
        client, policy_text(replace(policy, models=models)), "the new policy", args.detach, args.timeout
    )


def _pull(store: ModelStore, args: argparse.Namespace) -> int:
    from node_agent.adapters.model_pull import pull_model
    from node_agent.commands.show import progress_bars

    with progress_bars() as progress:
        folder = pull_model(store, args.name, args.source, args.sha256, progress)
    card = store.card(args.name)
    spec = card.architecture
    print(
        f"{card.shape.ref}  {spec.layers} layers, {spec.width} wide, {spec.vocabulary} tokens, "
        f"{card.source_quantization}  in {folder}"
    )
    return 0


def _ranges(args: argparse.Namespace, layers: int) -> list[tuple[int, int]]:
    from mesh.errors import InputError

    def number(text: str) -> int:
        if not text.strip().isdigit():
            raise InputError(f"{text!r} is no layer number (0 to {layers})")
        return int(text)

    if args.layers:
        start, dash, end = args.layers.partition("-")
        if not dash:
            raise InputError(f"--layers is {args.layers!r}; write START-END, for example 0-10")
        return [(number(start), number(end))]
    if args.cuts:
        edges = [0, *map(number, args.cuts.split(",")), layers]
    else:
        parts = 3 if args.parts is None else args.parts
        if not 1 <= parts <= layers:
            raise InputError(f"--parts is {parts}; it must be from 1 to {layers}")
        edges = [layers * i // parts for i in range(parts + 1)]
    if sorted(set(edges)) != edges:
        raise InputError(f"--cuts is {args.cuts!r}; give rising layer numbers between 0 and {layers}")
    return list(itertools.pairwise(edges))


def _shard(store: ModelStore, args: argparse.Namespace) -> int:
    from node_agent.adapters.form_times import chosen_form
    from node_agent.adapters.shard_maker import make_shard
    from node_agent.commands.show import progress_bars

    ranges = _ranges(args, store.card(args.name).architecture.layers)
    with progress_bars() as progress:
        runtime, quantization = chosen_form(store, args.name, args.runtime, args.quantization, progress)
        folders = [
            make_shard(store, args.name, s, e, quantization, progress, runtime, args.context)
            for s, e in ranges
        ]
    for folder in folders:
        info = store.manifest(folder).info
        print(f"{info}  {info.weight_bytes / 2**20:.0f} MiB  {info.digest[:12]}")
    return 0


def _list(store: ModelStore, args: argparse.Namespace) -> int:
    import json

    from node_agent.commands.show import table

    models = []
    for name in store.names():
        card = store.card(name)
        shards = [manifest.info for _, manifest in store.shards(name)]
        models.append((card, shards))
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "name": card.name,
                        "digest": card.digest,
                        "layers": card.architecture.layers,
                        "context_max": card.architecture.context_max,
                        "source": card.source,
                        "shards": [
                            {
                                "layers": [s.layers.start, s.layers.end],
                                "runtime": s.runtime,
                                "quantization": s.quantization,
                                "weight_bytes": s.weight_bytes,
                                "digest": s.digest,
                            }
                            for s in shards
                        ],
                    }
                    for card, shards in models
                ]
            )
        )
        return 0
    rows = [
        [
            str(card.shape.ref),
            str(card.architecture.layers),
            card.source_quantization,
            ", ".join(f"{s.layers} ({s.runtime}-{s.quantization})" for s in shards) or "none",
        ]
        for card, shards in models
    ]
    print(
        table(
            ["model", "layers", "file", "shards"],
            rows,
            empty=f"no models in {store.root}; 'mesh model pull smollm2-135m'",
        )
    )
    return 0


def _verify(store: ModelStore, args: argparse.Namespace) -> int:
    from mesh.errors import ShardError
    from node_agent.adapters.model_store import sha256_of
    from node_agent.adapters.shard_loader import load_shard
    from node_agent.ports import RuntimeOptions

    card = store.card(args.name)
    file = store.folder(args.name) / "model.gguf"
    if file.exists() and sha256_of(file) != card.digest:
        raise ShardError(f"{file} does not match its card; pull the model again")
    store.tokenizer_json(args.name)
    print(f"{card.shape.ref}  file and tokenizer as they should be")
    wrong = 0
    for folder, manifest in store.shards(args.name):
        try:
            if manifest.model_digest != card.digest:
                raise ShardError(f"{folder} is of another file ({manifest.model_digest[:12]}); make it again")
            load_shard(folder, manifest, slots=1, capacity=64, options=RuntimeOptions()).close()
            print(f"{manifest.info}  good")
        except ShardError as error:
            wrong += 1
            print(f"{manifest.info}  WRONG: {error}")
    return 1 if wrong else 0
