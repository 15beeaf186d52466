"""The real model over three agent processes, through the official client."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from node_agent.adapters.api_client import ApiClient
from node_agent.adapters.model_store import ModelStore
from node_agent.paths import default_home
from tests.conftest import MODEL, RunningMesh, Starter

QUESTION: Any = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
]


@pytest.fixture
def client(mesh: RunningMesh) -> Any:
    with openai.OpenAI(base_url=f"{mesh.base}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def ask(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        **({"model": MODEL, "messages": QUESTION, "temperature": 0, "max_tokens": 24} | options)
    )


def test_the_question_is_answered(client: Any) -> None:
    answer = ask(client)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens == 27


def test_a_stream_is_the_same_text_with_usage_at_its_end(client: Any) -> None:
    whole = ask(client).choices[0].message.content
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


def test_models_are_listed(client: Any) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_the_same_seed_gives_the_same_text_and_another_another(client: Any) -> None:
    def text(seed: int) -> str:
        return str(ask(client, temperature=1.0, seed=seed, max_tokens=32).choices[0].message.content)

    assert text(1) == text(1)
    assert len({text(seed) for seed in (1, 2, 3)}) > 1


def test_choices_are_as_many_as_asked_for_and_differ(client: Any) -> None:
    answer = ask(client, n=3, temperature=1.2, seed=5)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert len({c.message.content for c in answer.choices}) > 1
    streamed: dict[int, str] = {0: "", 1: "", 2: ""}
    ended: list[int] = []
    for chunk in ask(client, n=3, temperature=1.2, seed=5, stream=True):
        for choice in chunk.choices:
            assert choice.index not in ended, "nothing comes after a finish reason"
            streamed[choice.index] += choice.delta.content or ""
            ended += [choice.index] if choice.finish_reason else []
    assert sorted(ended) == [0, 1, 2]
    assert streamed == {c.index: c.message.content for c in answer.choices}


def test_stop_strings_are_not_shown(client: Any) -> None:
    whole = ask(client).choices[0].message.content
    answer = ask(client, stop=[" of", "Paris"])
    assert answer.choices[0].message.content == whole.split(" of")[0]
    assert answer.choices[0].finish_reason == "stop"


def test_length_ends_an_answer(client: Any) -> None:
    answer = ask(client, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    assert ask(client, max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2


def test_logprobs_of_both_endpoints(client: Any) -> None:
    content = ask(client, logprobs=True, top_logprobs=3, max_tokens=4).choices[0].logprobs.content
    assert len(content) == 4
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob, "greedy takes the likeliest"
        assert bytes(entry.bytes).decode() == entry.token
    done = client.completions.create(
        model=MODEL, prompt="One two three", max_tokens=3, logprobs=2, temperature=0
    )
    logprobs = done.choices[0].logprobs
    assert "".join(logprobs.tokens) == done.choices[0].text
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_completions_take_texts_and_tokens(client: Any) -> None:
    both = client.completions.create(
        model=MODEL, prompt=["The sky is", "Water is"], max_tokens=4, temperature=0
    )
    assert len(both.choices) == 2
    ids = client.completions.create(
        model=MODEL, prompt=[504, 6376, 314], max_tokens=4, temperature=0, echo=True
    )
    assert len(ids.choices[0].text) > len(both.choices[0].text)
    assert ids.usage.prompt_tokens == 3


def test_penalties_and_bias_change_the_text(client: Any) -> None:
    plain = ask(client, max_tokens=16, messages=[{"role": "user", "content": "Say no no no no no no"}])
    other = ask(
        client,
        max_tokens=16,
        messages=[{"role": "user", "content": "Say no no no no no no"}],
        frequency_penalty=2,
        presence_penalty=2,
    )
    assert plain.choices[0].message.content != other.choices[0].message.content
    first = ask(client, max_tokens=1, logprobs=True, top_logprobs=1).choices[0]
    ids = ApiClient(str(client.base_url).removesuffix("/v1/"))
    assert ids.get("/health")["status"] == "ok"
    assert first.message.content


@pytest.mark.parametrize(
    ("options", "status", "param", "code"),
    [
        ({"model": "gpt-99"}, 404, "model", "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "word " * 3000}]},
            400,
            "messages",
            "context_length_exceeded",
        ),
        ({"temperature": -1}, 400, "temperature", None),
        ({"max_tokens": -1}, 400, "max_tokens", None),
        ({"n": 99}, 400, "n", None),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", None),
        ({"extra_body": {"messages": 5}}, 400, "messages", None),
        ({"extra_body": {"speculation": "yes"}}, 400, "speculation", None),
    ],
)
def test_wrong_requests_get_openais_errors(
    client: Any, options: dict[str, Any], status: int, param: str, code: str | None
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(client, **options)
    assert (caught.value.status_code, caught.value.param, caught.value.code) == (status, param, code)


def raw(base: str, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(base + path, data=body)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe\x00", b'{"model": "\xc3\x28"}', b"[]"])
def test_malformed_bodies(mesh: RunningMesh, body: bytes) -> None:
    status, answer = raw(mesh.base, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_ten_megabytes_of_prompt(mesh: RunningMesh) -> None:
    status, answer = raw(mesh.base, json.dumps({"model": MODEL, "prompt": "a" * 10_000_000}).encode())
    assert status == 413
    assert "4194304 bytes" in answer["error"]["message"]
    long = json.dumps({"model": MODEL, "prompt": "a b " * 500_000}).encode()
    status, answer = raw(mesh.base, long, "/v1/completions")
    assert answer["error"]["code"] == "context_length_exceeded"
    assert raw(mesh.base, b"{}", "/v1/nothing")[0] == 404


def sessions(base: str) -> int:
    """Sessions held by nodes that are alive; of a silent one only the past is known."""
    nodes = ApiClient(base).get("/mesh/v1/nodes")["nodes"]
    return sum(r["sessions"] for n in nodes if n["state"] == "alive" for r in n["replicas"])


def settle(base: str, wanted: int = 0, within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while sessions(base) != wanted:
        assert time.monotonic() < deadline, f"{sessions(base)} sessions are still held"
        time.sleep(0.05)


def test_a_client_that_disconnects_frees_its_session(mesh: RunningMesh, client: Any) -> None:
    settle(mesh.base)
    stream = ask(client, stream=True, max_tokens=1500, logit_bias={"2": -100})
    for _ in range(3):
        next(iter(stream))
    settle(mesh.base, 3)
    stream.close()
    settle(mesh.base, within_s=2.0)
    # The same before the first token, without streaming.
    host, port = mesh.base.removeprefix("http://").split(":")
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1500, "logit_bias": {"2": -100}}).encode()
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        settle(mesh.base, 3)
    settle(mesh.base, within_s=2.0)


def test_eight_together_say_what_each_says_alone(client: Any) -> None:
    prompts = [f"Count from {i} to {i + 9}." for i in range(8)]

    def answer(prompt: str) -> str:
        content = ask(client, messages=[{"role": "user", "content": prompt}], max_tokens=40)
        return str(content.choices[0].message.content)

    alone = [answer(p) for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, prompts)) == alone


def test_every_agent_answers_and_the_text_is_the_same(mesh: RunningMesh) -> None:
    nodes = ApiClient(mesh.base).get("/mesh/v1/nodes")["nodes"]
    assert [n["state"] for n in nodes] == ["alive"] * 3
    texts = set()
    for node in nodes:
        with openai.OpenAI(
            base_url=f"http://{node['api_address']}/v1", api_key="none", max_retries=0
        ) as each:
            texts.add(ask(each).choices[0].message.content)
    assert len(texts) == 1


def test_the_trace_tells_the_route(mesh: RunningMesh, client: Any) -> None:
    answer = ask(client)
    trace = ApiClient(mesh.base).get(f"/mesh/v1/sessions/{answer.id}")
    assert [s["layers"] for s in trace["stages"]] == [[0, 10], [10, 20], [20, 30]]
    assert len({s["node"] for s in trace["stages"]}) == 3
    assert all(s["compute_ms"] > 0 for s in trace["stages"])
    assert trace["ttft_ms"] > 0
    assert trace["tpot_ms"] > 0
    assert trace["outcome"] == "stop"


def test_metrics_carry_their_labels(mesh: RunningMesh, client: Any) -> None:
    ask(client)
    with urllib.request.urlopen(f"{mesh.base}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    for name in (
        "onnx_inference_latency_seconds_count",
        "mesh_hop_latency_seconds_count",
        "mesh_kv_budget_bytes",
        "mesh_sessions",
    ):
        line = re.search(rf"^{name}\{{(.*)\}} ", text, re.MULTILINE)
        assert line, name
        assert f'model_version="{MODEL}@' in line[1]
        assert 'node_id="n-' in line[1]
        assert f'shard_id="{MODEL}:' in line[1]
    assert "mesh_ttft_seconds_count" in text
    assert "mesh_tpot_seconds_count" in text


def test_commands_against_a_running_mesh(mesh: RunningMesh) -> None:
    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "mesh", *arguments, "--api", mesh.base]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    shown = run("ask", "What is the capital of France?")
    assert "Paris" in shown
    assert re.search(r"TTFT \d+ ms +TPOT [\d.]+ ms", shown)
    answer = json.loads(run("ask", "--json", "What is the capital of France?"))
    assert "Paris" in answer["answer"]
    assert len(answer["route"]["stages"]) == 3
    assert run("nodes").count("serving") == 3
    assert len(json.loads(run("nodes", "--json"))["nodes"]) == 3


def test_tokens_are_in_the_log_of_the_agent_that_owned_them(starter: Starter, tmp_path: Path) -> None:
    # Its own mesh: the log is read after the agent has let go of it.
    from node_agent.adapters.rocksdb_store import RocksTokenLog
    from node_agent.ingress.chat import TextModel

    running = starter("--nodes", "1", "--set", f"data_dir={tmp_path / 'data'}")
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0) as own:
        answer = ask(own)
    assert running.stop() == 0
    log = RocksTokenLog(tmp_path / "data" / "tokens")
    kept = log.read(answer.id.removeprefix("chatcmpl-"))
    log.close()
    assert kept is not None
    store = ModelStore(default_home())
    text = TextModel(store.card(MODEL), store.tokenizer_json(MODEL))
    tokens = [t.token for t in kept.tokens]
    assert b"".join(map(text.bytes_of, tokens)).decode() == answer.choices[0].message.content
    assert len(tokens) == answer.usage.completion_tokens


def test_a_killed_stage_that_nobody_can_replace_is_an_error_and_not_a_hang(starter: Starter) -> None:
    # Nobody has room for what is lost.
    running = starter("--nodes", "3", "--set", "recovery_timeout=1", "--set", "memory=300")
    api = ApiClient(running.base)
    nodes = api.get("/mesh/v1/nodes")
    victim = next(n for n in nodes["nodes"] if n["replicas"][0]["layers"] == [10, 20])
    port = int(victim["api_address"].split(":")[1])
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = ask(client, stream=True, max_tokens=1500, logit_bias={"2": -100})
        shown = [next(iter(stream)) for _ in range(5)]
        os.kill(listener(port), signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(openai.APIError, match=r"stage 1 \(layers 10-20 .* was lost"):
            shown.extend(stream)
        assert 1.0 < time.monotonic() - begin < 3.0
        time.sleep(1.0)
        with pytest.raises(openai.InternalServerError, match="no node serves the layers 10-20") as caught:
            ask(client)
        assert caught.value.status_code == 503
        assert int(caught.value.response.headers["retry-after"]) >= 1
    settle(running.base)
    assert running.stop() == 0


def listener(port: int) -> int:
    """Process id of whoever listens on a loopback port."""
    inode = None
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        parts = line.split()
        if int(parts[1].split(":")[1], 16) == port and parts[3] == "0A":
            inode = parts[9]
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(link.readlink()) == f"socket:[{inode}]":
                return int(link.parts[2])
        except OSError:
            continue
    raise AssertionError(f"nobody listens on {port}")


def test_a_full_agent_refuses_with_retry_after(starter: Starter) -> None:
    running = starter("--nodes", "2", "--set", "slots=1")
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = ask(client, stream=True, max_tokens=1500, logit_bias={"2": -100})
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="all 1 session slots are taken") as caught:
            ask(client)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        stream.close()
        settle(running.base)
        assert "Paris" in ask(client).choices[0].message.content
    assert running.stop() == 0


def test_ctrl_c_lets_a_running_answer_end(starter: Starter) -> None:
    running = starter("--nodes", "3")
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = ask(client, stream=True, max_tokens=120, logit_bias={"2": -100})
        next(iter(stream))
        running.process.send_signal(signal.SIGINT)
        reasons = [c.choices[0].finish_reason for c in stream]
    assert reasons[-1] == "length"
    assert running.stop() == 0


def test_ctrl_c_leaves_no_process_and_no_lock(starter: Starter) -> None:
    running = starter("--nodes", "2")
    children = [
        int(p)
        for p in Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    ]
    assert len(children) == 2
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = ask(client, stream=True, max_tokens=1500, logit_bias={"2": -100})
        next(iter(stream))
        assert running.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    starter("--nodes", "2").stop()


def test_a_second_ctrl_c_does_not_wait(starter: Starter) -> None:
    running = starter("--nodes", "2")
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = ask(client, stream=True, max_tokens=1500, logit_bias={"2": -100})
        next(iter(stream))
        running.process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        begin = time.monotonic()
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(30) == 0
        assert time.monotonic() - begin < 3


def test_agents_end_with_whoever_started_them(starter: Starter) -> None:
    running = starter("--nodes", "2")
    children = [
        int(p)
        for p in Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text().split()
    ]
    running.process.kill()
    running.process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_while_starting(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "mesh", "up", "--api-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=os.environ | {"MESH_HOME": str(default_home())},
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output.decode()
    assert b"Traceback" not in output


def test_a_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for flag, words in (("--port", "is taken or not ours"), ("--api-port", "the API cannot listen")):
            other = {"--port": "--api-port", "--api-port": "--port"}[flag]
            command = [
                sys.executable,
                "-m",
                "mesh",
                "agent",
                flag,
                str(port),
                other,
                "0",
                "--log",
                "off",
            ]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            assert answer.returncode == 2
            assert words in answer.stderr
            assert f"choose another with {flag}" in answer.stderr


def test_a_conversations_next_turn_goes_on_from_the_kept_cache(starter: Starter) -> None:
    running = starter("--nodes", "2", "--set", "prefix_cache=on")
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0) as client:
        talk: list[Any] = [
            {
                "role": "system",
                "content": "You are a helpful assistant who knows a lot about ships and the sea.",
            },
            {"role": "user", "content": "Name three kinds of ships, please, and say what each is for."},
        ]
        said: list[str] = []
        cached: list[int] = []
        for turn in range(3):
            answer: Any = client.chat.completions.create(
                model=MODEL,
                messages=talk,
                max_tokens=24,
                temperature=0,
            )
            said.append(answer.choices[0].message.content)
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
            assert answer.usage.prompt_tokens > cached[-1]
            talk += [
                {"role": "assistant", "content": said[-1]},
                {"role": "user", "content": f"And number {turn + 4}?"},
            ]
        assert cached[0] == 0
        assert cached[1] >= 40
        assert cached[2] >= cached[1] + 24
    assert running.stop() == 0


def test_fixed_texts_do_not_depend_on_what_ran_before(client: openai.OpenAI) -> None:
    """By default a request at temperature 0 or with a seed takes nothing of another but whole chunks of its prompt."""
    prompt = "The old harbour was quiet that morning, and the boats lay side by side while the gulls" * 2

    def complete(**how: Any) -> Any:
        return client.completions.create(model=MODEL, prompt=prompt, max_tokens=12, **how)

    for how in ({"temperature": 0}, {"temperature": 1, "seed": 5}):
        one, two = complete(**how), complete(**how)
        assert one.choices[0].text == two.choices[0].text
        assert two.usage.prompt_tokens_details.cached_tokens == 0
    assert complete(temperature=1).usage.prompt_tokens_details.cached_tokens > 30


@pytest.mark.parametrize("form", [("onnx", "int8"), ("litert", "int4")], ids="-".join)
def test_prompts_that_begin_alike_are_computed_once_and_texts_stay_as_they_are(
    starter: Starter, form: tuple[str, str]
) -> None:
    """Whole chunks of a prompt have the same bits in any session; where nobody can tell, all that is shared is copied."""
    runtime, quantization = form
    story = (
        "The old harbour was quiet that morning, and the boats lay side by side while the gulls slept. " * 8
    )
    asked = [story + end for end in ("What came next? It", "Then a storm came, and", "Nobody saw that")]
    told: dict[str, list[Any]] = {}
    cached: dict[str, list[int]] = {}
    for cache in ("off", "auto"):
        running = starter(
            *("--nodes", "3", "--runtime", runtime, "--quantization", quantization),
            *("--set", f"prefix_cache={cache}"),
        )
        with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0) as client:

            def complete(prompt: str, **how: Any) -> Any:
                return client.completions.create(model=MODEL, prompt=prompt, max_tokens=16, **how)

            with ThreadPoolExecutor(3) as pool:
                greedy = list(pool.map(lambda p: complete(p, temperature=0, logprobs=2), asked))
            again = complete(asked[0], temperature=0, logprobs=2)
            seeded = complete(asked[0], temperature=1, seed=7, n=4)
            free = complete(asked[1], temperature=1, n=4)
        assert running.stop() == 0
        assert len({c.text for c in free.choices}) > 1
        told[cache] = [
            [c.model_dump() for answer in (*greedy, again, seeded) for c in answer.choices],
        ]
        answers = (*greedy, again, seeded, free)
        cached[cache] = [a.usage.prompt_tokens_details.cached_tokens for a in answers]
    assert told["auto"] == told["off"]
    assert cached["off"] == [0] * 6
    assert cached["auto"][3] == cached["auto"][4] >= 128
    assert all(count % 64 == 0 for count in cached["auto"][:5])
    assert cached["auto"][5] > cached["auto"][4]


def test_guessed_tokens_are_those_that_would_have_come(starter: Starter) -> None:
    """In float32; other forms round a step of several positions otherwise than single ones. A conversation that goes on
    from a cache full of guesses gets the answer that it gets without."""
    running = starter("--nodes", "2", "--quantization", "fp32", "--set", "prefix_cache=on")
    line = "The red boat lies beside the old pier, and the blue boat lies beside the new pier. "
    how: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 60,
        "temperature": 0,
        "logit_bias": {"0": -100, "2": -100},
    }
    with openai.OpenAI(base_url=f"{running.base}/v1", api_key="none", max_retries=0) as client:

        def complete(prompt: str) -> Any:
            return client.completions.create(prompt=prompt, extra_body={"speculation": True}, **how)

        first = complete(line * 4)
        guesses = first.usage.completion_tokens_details
        assert guesses.accepted_prediction_tokens > 0
        assert guesses.rejected_prediction_tokens > 0
        onward = line * 4 + first.choices[0].text + " A green boat"
        second = complete(onward)
        assert second.usage.prompt_tokens_details.cached_tokens > 80
    assert running.stop() == 0
    plainly = starter("--nodes", "1", "--quantization", "fp32", "--set", "prefix_cache=off")
    with openai.OpenAI(base_url=f"{plainly.base}/v1", api_key="none", max_retries=0) as client:
        for prompt, said in ((line * 4, first), (onward, second)):
            plain = client.completions.create(prompt=prompt, **how)
            assert plain.choices[0].text == said.choices[0].text
            assert plain.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert plainly.stop() == 0
