"""What an agent costs beyond weights and KV, how soon a mesh answers, and what a token weighs on a hop."""

from __future__ import annotations

import asyncio
import re
import time
import urllib.request
from pathlib import Path

from node_agent.adapters.local_mesh import LocalMesh, temporary_mesh
from tests.benchmarks.common import MODEL, arguments, finish, median, prompt_ids, stream, the_store

NODES = 3
STARTS = 3
CONTEXT = 128
TOKENS = 128
_MB = 1e6


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, shared pages counted in full."""
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) * 1024


def told(mesh: LocalMesh, metric: str) -> float:
    """Sum of a metric over all agents."""
    total = 0.0
    for agent in mesh.agents:
        with urllib.request.urlopen(f"http://{agent.api_address}/metrics", timeout=5) as answer:
            text = answer.read().decode()
        total += sum(float(v) for v in re.findall(rf"^{metric}\{{.*\}} (\S+)$", text, re.MULTILINE))
    return total


def link_bytes(mesh: LocalMesh) -> float:
    """Bytes that all agents have put on links so far."""
    return told(mesh, "mesh_link_sent_bytes")


async def measure() -> dict[str, float]:
    store = the_store()
    prompt = prompt_ids(store, CONTEXT)
    async with temporary_mesh(NODES, store.root.parent) as mesh:
        await mesh.serve(MODEL)  # shards are on disk from here on
    starts, overheads, per_hop = [], [], []
    for _ in range(STARTS):
        begin = time.perf_counter()
        async with temporary_mesh(NODES, store.root.parent) as mesh:
            await mesh.serve(MODEL)
            first = await asyncio.to_thread(stream, mesh.endpoint, prompt[:16], 2)
            starts.append(first.first - begin)
            await asyncio.to_thread(stream, mesh.endpoint, prompt, 2)
            before = link_bytes(mesh)
            await asyncio.to_thread(stream, mesh.endpoint, prompt, 2)
            prefill = link_bytes(mesh) - before
            await asyncio.to_thread(stream, mesh.endpoint, prompt, TOKENS + 2)
            after = link_bytes(mesh)
            # All that goes over links, tokens and acknowledgements too, by hops that carry activations.
            per_hop.append((after - before - 2 * prefill) / TOKENS / (NODES - 1))
            kv = told(mesh, "mesh_kv_reserved_bytes")  # of sessions that are over, too, while there is room
            manifests = {m.info.layers: m for _, m in store.shards(MODEL) if m.quantization == "int8"}
            weights = sum(m.weight_bytes for r, m in manifests.items() if len(r) == 30 // NODES)
            resident = sum(resident_bytes(a.process.pid) for a in mesh.agents)
            overheads.append((resident - weights - kv) / NODES / _MB)
    return {
        "agent_overhead_mb": round(median(overheads), 1),
        "cold_start_s": round(median(starts), 2),
        "wire_bytes_per_token_hop": round(median(per_hop), 1),
    }


def main() -> None:
    args = arguments(__doc__).parse_args()
    keys = asyncio.run(measure())
    wanted = {"agent_overhead_mb": "<= 140", "cold_start_s": "<= 5", "wire_bytes_per_token_hop": "<= 2600"}
    finish(
        [("what", "median", "wanted"), *((k, str(v), wanted[k]) for k, v in keys.items())], keys, args.json
    )


if __name__ == "__main__":
    main()
