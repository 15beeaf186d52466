"""How long a route takes to find: 1,000 nodes, one replica each, 32 layers cut unequally, two alternatives.

Half of the links at each boundary are measured, the rest known by coordinates. Compiling what
depends on the snapshot alone is timed apart: it happens once a snapshot.
"""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random
from typing import Any

from mesh.coordinates import Coordinate
from mesh.links import LinkEstimate
from mesh.types import Digest, LayerRange, ModelRef, ModelShape, NodeId, ShardInfo
from scheduler.cluster import ClusterSnapshot, Node
from scheduler.route import RouteRequest
from scheduler.routing import Router
from scheduler.speed import StageSpeed
from tests.benchmarks.common import arguments, finish
from tests.builders import cluster, node

NODES = 1000
LAYERS = 32
SHAPE = ModelShape(ModelRef("bench", Digest("0" * 64)), LAYERS, 576, 49_152, 2048)
CUTS = ((0, 5), (5, 9), (9, 20), (20, 25), (25, 32), (0, 9), (9, 25), (20, 32), (0, 20))


def a_node(i: int, rng: Random) -> Node:
    start, end = CUTS[i % len(CUTS)]
    layers = LayerRange(start, end)
    shard = ShardInfo(
        SHAPE, layers, "onnx", "int8", Digest(f"{start:032x}{end:032x}"), len(layers) << 22, 1536
    )
    made = node(f"n{i:04}", shard, sessions=rng.randrange(4))
    speed = StageSpeed(rng.uniform(100, 900) * len(layers), 50.0, 40.0, 9000.0, measured=True)
    replicas = tuple(replace(r, speed=speed) for r in made.replicas)
    place = Coordinate(tuple(rng.uniform(-0.05, 0.05) for _ in range(4)), rng.uniform(0.0001, 0.01), 0.0, 0.2)
    return replace(made, replicas=replicas, coordinate=place)


def a_snapshot(rng: Random, nodes: int = NODES) -> ClusterSnapshot:
    made = [a_node(i, rng) for i in range(nodes)]
    linked = []
    for each in made:
        peers = rng.sample(made, nodes // 20)
        links = {
            p.id: LinkEstimate(
                rtt_p50=rng.randrange(200_000, 80_000_000),
                rtt_p99=100_000_000,
                loss_out=rng.choice((0.0, 0.01)),
                bandwidth_out_p50=rng.randrange(1_000_000, 1_000_000_000),
                samples=9,
            )
            for p in peers
        }
        linked.append(replace(each, links=links))
    return cluster(*linked)


def measure(requests: int) -> dict[str, Any]:
    rng = Random(1)
    snapshot = a_snapshot(rng)
    router = Router()
    begin = time.perf_counter()
    router.plan(snapshot, RouteRequest("bench", NodeId("n0000"), alternatives=2))
    compiled = time.perf_counter() - begin
    times = []
    for i in range(requests):
        request = RouteRequest("bench", NodeId("n0000"), tokens=128, prompt=300, draw=i + 1, alternatives=2)
        begin = time.perf_counter()
        plan = router.plan(snapshot, request)
        times.append(time.perf_counter() - begin)
        assert len(plan.alternatives) == 2
    times.sort()
    return {
        "route_ms_p50": round(times[len(times) // 2] * 1000, 3),
        "route_ms_p99": round(times[int(len(times) * 0.99)] * 1000, 3),
        "compile_ms": round(compiled * 1000, 1),
        "requests": requests,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    keys = measure(args.requests)
    rows = [("what", "value", "wanted")]
    rows += [(k, str(v), {"route_ms_p99": "<= 1"}.get(k, "")) for k, v in keys.items()]
    finish(rows, keys, args.json)


if __name__ == "__main__":
    main()
