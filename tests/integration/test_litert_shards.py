"""LiteRT shards: context buckets, chunks, sessions beside each other, and files that are not what they should be."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from mesh.errors import ShardError
from mesh.forms import parse_form
from mesh.types import LayerRange
from node_agent.adapters.litert_compiled import CompiledEngine
from node_agent.adapters.model_store import ModelStore, sha256_of
from node_agent.adapters.shard_loader import load_shard
from node_agent.adapters.shard_maker import demand_of, make_shard
from node_agent.adapters.static_maker import buckets_for
from node_agent.adapters.static_runtime import pieces
from node_agent.ports import Runtime, RuntimeOptions
from node_agent.shards.deviation import relative_error
from node_agent.shards.manifest import LITERT_GRAPH_FILE, MANIFEST_FILE, StoredFile, write_document
from tests.agents import until
from tests.conftest import MODEL
from tests.integration.test_tiny_models import pulled

OPTIONS = RuntimeOptions(threads=1)


def graphs_coming() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "graphs"}


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever loads graphs keeps stderr to itself, which is the next test's."""
    monkeypatch.setattr(CompiledEngine, "quiet_s", 0.0)
    yield
    until(lambda: not graphs_coming(), 30)


def load(folder: Path, capacity: int = 1025, quantization: str = "fp32", slots: int = 3) -> Runtime:
    store = pulled(folder, context=1024)
    made = make_shard(store, "tiny", 0, 3, quantization, runtime="litert", context=1024)
    return load_shard(made, store.manifest(made), slots=slots, capacity=capacity, options=OPTIONS)


def text(count: int) -> Any:
    return (np.arange(count, dtype=np.int64) * 7 + 3) % 90


def noted_runs(shard: Any) -> list[str]:
    """Names of the graphs that it runs from now on."""
    runs: list[str] = []
    run = shard.engine.run

    def noted(name: str, *ends: Any) -> None:
        runs.append(name)
        run(name, *ends)

    shard.engine.run = noted
    return runs


def test_buckets_are_close_up_to_1k_and_double_beyond_until_a_context_fits() -> None:
    assert buckets_for(100) == (256,)
    assert buckets_for(256) == (256,)
    assert buckets_for(257) == (256, 384)
    assert buckets_for(8192) == (256, 384, 512, 640, 768, 1024, 2048, 4096, 8192)


@pytest.mark.parametrize(
    ("steps", "wanted"),
    [
        (1, [1]),
        (8, [1] * 8),
        (9, [9]),
        (27, [16, 11]),
        (48, [16, 16, 16]),
        (49, [49]),
        (64, [64]),
        (150, [64, 64, 16, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_little_of_a_run_is_for_nobody(steps: int, wanted: list[int]) -> None:
    assert pieces(steps, (1, 16, 64)) == wanted


def test_a_session_moves_to_the_next_bucket_and_goes_on(tmp_path: Path) -> None:
    shard, tokens = load(tmp_path), text(600)
    whole = shard.prefill(0, 0, tokens).copy()
    # Steps across the first edge, then a chunk across the second.
    shard.prefill(1, 0, tokens[:250])
    for i in range(250, 260):
        shard.decode(1, [i], tokens[i : i + 1], logits=False)
    stepped = shard.prefill(1, 260, tokens[260:])
    assert relative_error(stepped, whole) < 1e-4


def test_a_session_that_goes_back_just_before_an_edge_has_what_it_wrote_then(tmp_path: Path) -> None:
    shard, tokens = load(tmp_path), text(600)

    def steps(slot: int, start: int, end: int, given: Any) -> Any:
        for i in range(start, end):
            result = shard.decode(slot, [i], given[i : i + 1], logits=i == end - 1)
        return result.copy()

    shard.prefill(0, 0, tokens[:240])
    whole = steps(0, 240, 258, tokens)
    shard.prefill(1, 0, tokens[:240])
    steps(1, 240, 256, tokens[::-1])
    assert np.array_equal(steps(1, 240, 258, tokens), whole)
    # One that has only begun to move goes on in chunks, over two edges.
    shard.prefill(2, 0, tokens[:240])
    steps(2, 240, 253, tokens)
    shard.prefill(0, 258, tokens[258:])
    ended = shard.decode(0, [600], np.array([5])).copy()
    shard.prefill(2, 253, tokens[253:])
    assert relative_error(shard.decode(2, [600], np.array([5])), ended) < 1e-4


def test_a_session_that_goes_far_back_steps_in_the_bucket_of_its_length(tmp_path: Path) -> None:
    """One that goes on from a long one that is over, or was replayed."""
    shard, tokens = load(tmp_path), text(600)
    ran = noted_runs(shard)

    def answered(slot: int) -> Any:
        shard.prefill(slot, 20, text(40))
        return shard.decode(slot, [60], np.array([5])).copy()

    shard.prefill(0, 0, tokens[:20])
    fresh = answered(0)
    shard.prefill(1, 0, tokens[:20])
    shard.prefill(1, 20, tokens[20:])
    ran.clear()
    assert np.array_equal(answered(1), fresh)
    assert {name.rpartition("_")[2] for name in ran} <= {"256", "head"}


def test_a_row_that_nobody_reads_leaves_its_session_as_it_is(tmp_path: Path) -> None:
    shard, tokens = load(tmp_path), text(40)
    for slot in (0, 1, 2):
        shard.prefill(slot, 0, tokens)
    wanted = shard.decode(0, [40], np.array([5])).copy()
    # The middle one still has to compute what is before 300.
    shard.decode(0, [41, 300, 41], np.array([5, 6, 7]))
    assert np.array_equal(shard.decode(1, [40], np.array([5])), wanted)


def test_sessions_beside_each_other_do_not_mix(tmp_path: Path) -> None:
    shard, tokens = load(tmp_path), text(40)
    shard.prefill(0, 0, tokens)
    alone = shard.decode(0, [40], np.array([5])).copy()
    shard.prefill(1, 0, tokens[::-1].copy())
    shard.prefill(2, 0, text(300))
    both = shard.decode(0, [40, 40, 300], np.array([5, 6, 7]))
    assert np.array_equal(both[:1], alone)
    assert both.shape == (3, alone.shape[1])


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_a_step_of_several_sessions_is_theirs_alone(tmp_path: Path, count: int) -> None:
    shard = load(tmp_path, slots=8)
    positions = [20 + 9 * i for i in range(count)]
    for slot, position in enumerate(positions):
        shard.prefill(slot, 0, text(position + slot)[slot:])
    tokens = np.arange(5, 5 + count)
    alone = [shard.decode(i, [p], tokens[i : i + 1])[0].copy() for i, p in enumerate(positions)]
    for _ in range(6):  # again, over what the first time wrote, in runs of all sizes
        together = shard.decode(0, positions, tokens)
        for row, wanted in zip(together, alone, strict=True):
            assert relative_error(row, wanted) < 1e-5
    following = [p + 1 for p in positions]
    assert shard.decode(0, following, tokens).shape == (count, together.shape[1])


def test_sessions_of_different_lengths_step_with_those_of_their_bucket(tmp_path: Path) -> None:
    shard: Any = load(tmp_path, slots=6)
    positions = [20, 300, 30, 310, 40, 600]
    for slot, position in enumerate(positions):
        shard.prefill(slot, 0, text(position + slot)[slot:])
    tokens = np.arange(5, 11)
    alone = [shard.decode(i, [p], tokens[i : i + 1])[0].copy() for i, p in enumerate(positions)]
    ran = noted_runs(shard)
    for row, wanted in zip(shard.decode(0, positions, tokens), alone, strict=True):
        assert relative_error(row, wanted) < 1e-5
    assert ran == ["batch_4_256", "batch_4_384", "run_1_640", "head_8"]


def test_what_a_step_leaves_for_later_is_there_for_whoever_comes_next(tmp_path: Path) -> None:
    """Another step, a copy, a chunk, a step beside others, a larger bucket: settled before or not, they give the same bits."""
    shard, tokens = load(tmp_path, slots=4), text(250)

    def story(settled: bool) -> list[Any]:
        given = []

        def step(slot: int, positions: list[int]) -> None:
            given.append(shard.decode(slot, positions, np.full(len(positions), 5)).copy())
            if settled:
                shard.settle()

        shard.prefill(0, 0, tokens)
        for position in range(250, 256):
            step(0, [position])
        shard.copy(0, 1, 256)
        step(1, [256])
        step(0, [256])
        step(0, [257, 257])
        given.append(shard.prefill(1, 258, tokens[:20]).copy())
        step(0, [100])
        shard.release(0)
        shard.release(1)
        return given

    for one, other in zip(story(True), story(False), strict=True):
        assert np.array_equal(one, other)


def test_a_head_of_several_rows_gives_what_it_gives_one(tmp_path: Path) -> None:
    shard, tokens = load(tmp_path), text(40)
    one = [shard.prefill(0, 0, tokens[: i + 1])[0].copy() for i in range(21, 40)]
    several = shard.prefill(1, 0, tokens, 19)
    assert relative_error(several, np.stack(one)) < 1e-4


@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4"])
@pytest.mark.parametrize(("start", "end"), [(0, 2), (10, 12), (28, 30)], ids=["first", "middle", "last"])
def test_r3_steps_replayed_in_chunks_have_the_bits_of_steps(
    store: ModelStore, quantization: str, start: int, end: int
) -> None:
    made = make_shard(store, MODEL, start, end, quantization, runtime="litert")
    shard = load_shard(made, store.manifest(made), slots=2, capacity=300, options=RuntimeOptions(threads=2))
    assert shard.info.layers.start == start
    draw, prompt, count = np.random.default_rng(3), 40, 271
    given: Any = (
        draw.integers(3, 9000, count) if start == 0 else draw.standard_normal((count, 576)).astype(np.float32)
    )
    rows: list[list[Any]] = [[], []]
    for slot in (0, 1):
        shard.prefill(slot, 0, given[:prompt], 0)
    for i in range(prompt, count):
        rows[0].append(shard.decode(0, [i], given[i : i + 1], i == count - 1).copy())
    # Pieces of all lengths, beyond the edge of a bucket; what a chunk has to spare holds the rows of the one before.
    at, size = prompt, 1
    while at < count - 1:
        piece = given[at : min(at + size, count - 1)]
        rows[1].append(shard.replay(1, at, piece).copy())
        at, size = at + len(piece), size % 21 + 1
    rows[1].append(shard.decode(1, [count - 1], given[count - 1 :]).copy())
    singly, together = (np.concatenate(r) for r in rows)
    assert np.array_equal(singly, together)
    shard.close()


def test_chunks_that_round_otherwise_than_steps_are_not_used_for_them(tmp_path: Path) -> None:
    shard: Any = load(tmp_path)
    assert shard.hold_to_steps(text(8))
    place = shard._place

    def off(signature: Any, position: int, inputs: Any) -> None:
        place(signature, position, inputs)
        if len(inputs) > 1:
            signature.hidden[0, 0] += 1e-3

    shard._place = off
    assert not shard.hold_to_steps(text(8))
    shard._place = place
    runs = noted_runs(shard)
    shard.replay(0, 0, text(20))
    assert set(runs) == {"run_1_256"}


@pytest.mark.parametrize("form", ["litert-int8", "litert-int4", "onnxstd-int8"])
def test_peaks_of_an_input_do_not_cost_the_others_their_digits(store: ModelStore, form: str) -> None:
    """The first layer of the real model has such an input; rounded over one range, it loses 0.029."""
    runtime, quantization = parse_form(form)
    made = make_shard(store, MODEL, 0, 1, quantization, runtime=runtime)
    manifest = store.manifest(made)
    shard = load_shard(made, manifest, slots=1, capacity=300, options=OPTIONS)
    with np.load(made / manifest.test_vector.file) as vector:
        assert relative_error(shard.prefill(0, 0, vector["input"]), vector["expected"]) < 0.02


def test_a_shard_of_an_older_revision_is_made_again(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    made = make_shard(store, "tiny", 0, 3, "int8", runtime="litert")
    current = store.manifest(made)
    (made / MANIFEST_FILE).write_bytes(write_document(msgspec.structs.replace(current, revision=1)))
    assert store.manifest(make_shard(store, "tiny", 0, 3, "int8", runtime="litert")) == current


def test_truncating_is_running_at_an_earlier_position(tmp_path: Path) -> None:
    shard, tokens = load(tmp_path), text(30)
    shard.prefill(0, 0, tokens)
    right = shard.decode(0, [30], np.array([5])).copy()
    shard.prefill(0, 20, text(70)[30:])
    shard.prefill(0, 20, tokens[20:])
    assert relative_error(shard.decode(0, [30], np.array([5])), right) < 1e-5


def test_memory_of_sessions_that_are_over_is_given_back(tmp_path: Path) -> None:
    shard = load(tmp_path)

    def sessions(count: int) -> int:
        for _ in range(count):
            shard.prefill(0, 0, text(20))
            shard.prefill(0, 20, text(250))  # into the next bucket
            shard.release(0)
            shard.prefill(0, 0, text(20))
            shard.decode(0, [254], text(1), logits=False)  # on the way there
            shard.release(0)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4

    before = sessions(50)
    # 2 kB a session, over so many that a piece of 4 MB which the allocator took once is no leak.
    assert sessions(2500) - before < 5000, "kB more after 2,500 sessions"


def test_no_head_is_computed_where_nobody_samples(tmp_path: Path) -> None:
    shard = load(tmp_path)
    assert shard.prefill(0, 0, text(70), logits=False).shape[0] == 0
    assert shard.decode(0, [70], np.array([5]), logits=False).shape[0] == 0


def test_a_context_beyond_the_largest_bucket_is_refused_at_load(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"context buckets up to \d+, 4096 positions are asked for"):
        load(tmp_path, capacity=4097)


def test_the_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 3, runtime="litert")
    (tmp_path / "other").mkdir()
    other = pulled(tmp_path / "other", seed=5)
    strange = make_shard(other, "tiny", 0, 3, runtime="litert") / LITERT_GRAPH_FILE
    path = folder / LITERT_GRAPH_FILE
    path.write_bytes(strange.read_bytes())
    manifest = store.manifest(folder)
    with pytest.raises(ShardError, match="does not match the SHA-256"):
        load_shard(folder, manifest, slots=1, capacity=64, options=OPTIONS)
    files = manifest.files | {path.name: StoredFile(sha256_of(path), path.stat().st_size)}
    with pytest.raises(ShardError, match="computes wrong results on XNNPACK"):
        load_shard(
            folder, msgspec.structs.replace(manifest, files=files), slots=1, capacity=64, options=OPTIONS
        )


@pytest.mark.parametrize("quantization", ["fp32", "int8", "int4"])
def test_a_plan_asks_for_what_shards_weigh_or_a_little_more(
    store: ModelStore, tmp_path: Path, quantization: str
) -> None:
    """A node that is asked for more than it has refuses, and the plan would ask again."""
    copied = ModelStore(tmp_path)
    shutil.copytree(store.folder(MODEL), copied.folder(MODEL), ignore=shutil.ignore_patterns("shards"))
    demand = demand_of(copied, MODEL, quantization, "litert")
    for start, end in ((0, 2), (14, 16), (28, 30)):
        made = make_shard(copied, MODEL, start, end, quantization, runtime="litert")
        weighs = copied.manifest(made).weight_bytes
        assert weighs <= demand.weights(LayerRange(start, end)) <= 1.05 * weighs


def test_a_session_goes_on_while_larger_buckets_come(tmp_path: Path) -> None:
    """Another model takes over: what was computed stays, and computes the same bits."""
    shard, tokens = load(tmp_path, quantization="int8"), text(200)
    shard.prefill(0, 0, tokens)
    steps = [shard.decode(0, [200 + i], np.array([5])).copy() for i in range(30)]
    store = pulled(tmp_path, context=1024)
    folder = store.shard_folder("tiny", "litert", "int8", 0, 3)
    alone = load_shard(folder, store.manifest(folder), slots=1, capacity=257, options=OPTIONS)
    alone.prefill(0, 0, tokens)
    for i, wanted in enumerate(steps):
        assert np.array_equal(alone.decode(0, [200 + i], np.array([5])), wanted)


def test_packed_weights_are_kept_for_the_next_start(tmp_path: Path) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 3, "int8", runtime="litert")
    options = RuntimeOptions(threads=1, cache=str(tmp_path / "packed"))

    def answer() -> Any:
        shard = load_shard(folder, store.manifest(folder), slots=1, capacity=64, options=options)
        return shard.prefill(0, 0, text(20)).copy()

    first = answer()
    (packed,) = (tmp_path / "packed").glob("*.xnnpack")
    written = packed.stat().st_mtime_ns
    assert np.array_equal(answer(), first)
    assert packed.stat().st_mtime_ns == written
    packed.write_bytes(b"not what it was")
    assert np.array_equal(answer(), first)


def test_shards_that_load_at_once_leave_stderr_as_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 3, runtime="litert")
    manifest = store.manifest(folder)
    with ThreadPoolExecutor(4) as pool:
        loads = [
            pool.submit(load_shard, folder, manifest, slots=1, capacity=64, options=OPTIONS) for _ in range(8)
        ]
        for each in loads:
            each.result().close()
    os.write(2, b"still here\n")
    told = capfd.readouterr().err
    assert "still here" in told
    assert "accelerator" not in told.partition("still here")[0]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9])
def test_a_graph_that_crashes_the_library_is_an_error_and_the_process_lives(
    tmp_path: Path, share: float
) -> None:
    store = pulled(tmp_path)
    folder = make_shard(store, "tiny", 0, 3, runtime="litert")
    manifest, path = store.manifest(folder), folder / LITERT_GRAPH_FILE
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    files = manifest.files | {path.name: StoredFile(sha256_of(path), path.stat().st_size)}
    options = RuntimeOptions(threads=1, cache=str(tmp_path / "packed"))
    with pytest.raises(ShardError, match=r"LiteRT (died of|cannot load)"):
        load_shard(
            folder, msgspec.structs.replace(manifest, files=files), slots=1, capacity=64, options=options
        )
    assert list((tmp_path / "packed").iterdir()) == []


def test_others_run_while_litert_loads_and_computes(store: ModelStore) -> None:
    """Whoever keeps the interpreter's lock keeps the event loop: an agent that gives no sign of life is taken for frozen."""
    folder = make_shard(store, MODEL, 12, 18, runtime="litert")
    beats: list[float] = []
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.001):
            beats.append(time.perf_counter())

    def longest_share(what: Callable[[], object]) -> float:
        """Of the time that ``what`` took: the longest in which nothing else ran, in the quietest of a few attempts."""
        shares = []
        for _ in range(5):
            begin = time.perf_counter()
            what()
            end = time.perf_counter()
            inside = [b for b in list(beats) if begin < b < end]
            shares.append(max(np.diff([begin, *inside, end])) / (end - begin))
        return float(min(shares))

    beating = threading.Thread(target=beat)
    beating.start()
    loaded: list[Runtime] = []

    def load_it() -> None:
        loaded.append(load_shard(folder, store.manifest(folder), slots=1, capacity=512, options=OPTIONS))

    hidden = np.zeros((64, 576), dtype=np.float32)
    try:
        assert longest_share(load_it) < 0.5
        assert longest_share(lambda: loaded[0].prefill(0, 0, hidden, 0)) < 0.5
    finally:
        done.set()
        beating.join()
        for shard in loaded:
            shard.close()
