"""Settings of an agent: one frozen value, read once, from file, environment and flags.

Later sources win: defaults, TOML file, ``MESH_*`` variables, flags. Every setting says what it
trades; the README's table is made from here (and a test holds it to that).
"""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.errors import ConfigError, InputError
from mesh.forms import AUTO, parse_form
from node_agent.lease import ShardKey


def setting(default: Any, about: str, *, unit: str = "", low: float = -math.inf, bare: str = "") -> Any:
    """A documented field; ``low`` is the least value that a number may have, ``bare`` what the flag
    means without a value (empty: it needs one)."""
    return field(default=default, metadata={"about": about, "unit": unit, "low": low, "bare": bare})


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """What ``mesh agent`` can be told."""

    data_dir: str = setting(
        "", "Where this node keeps its identity, token log and packed weights. Empty: MESH_HOME/agent."
    )
    home: str = setting("", "Where models and shards are. Empty: ~/.local/share/inference-mesh.")
    name: str = setting("", "Name of the node for people. Empty: the host's name.")
    cluster: str = setting("default", "Agents of another cluster are strangers: links to them are refused.")
    host: str = setting(
        "127.0.0.1", "Address that peers connect to. Beyond loopback, anyone who reaches it can use the node."
    )
    port: int = setting(7070, "Port for peers (gRPC). 0: any free one.", low=0)
    advertise: str = setting("", "Address that peers are told, where it differs from host.")
    api_host: str = setting("127.0.0.1", "Address of the OpenAI API.")
    api_port: int = setting(8080, "Port of the OpenAI API. 0: any free one.", low=0)
    peers: tuple[str, ...] = setting((), "Other agents as host:port. One is enough: it knows the rest.")
    mdns: str = setting("on", "on: find agents on this network by multicast DNS and be found. off: neither.")
    consul: str = setting(
        "",
        "Address of a Consul agent: register there and find agents. Empty: CONSUL_HTTP_ADDR, or no Consul. The flag alone means http://127.0.0.1:8500.",
        bare="http://127.0.0.1:8500",
    )
    consul_token: str = setting("", "ACL token for Consul. Empty: CONSUL_HTTP_TOKEN.")
    consul_ca: str = setting("", "File with the CA of Consul's HTTPS. Empty: CONSUL_CACERT, or the system's.")
    consul_cert: str = setting("", "Client certificate for Consul's HTTPS. Empty: CONSUL_CLIENT_CERT.")
    consul_key: str = setting("", "Key of the client certificate. Empty: CONSUL_CLIENT_KEY.")
    consul_datacenter: str = setting("", "Consul datacenter. Empty: that of the Consul agent.")
    consul_namespace: str = setting("", "Consul namespace (Enterprise). Leave empty on open source.")
    consul_service: str = setting("inference-mesh", "Name of the service that agents register in Consul.")
    consul_prefix: str = setting("inference-mesh", "Folder of Consul's key-value store that is ours.")
    nomad: str = setting(
        "",
        "Address of Nomad's API: while this agent leads, clients that Nomad drains get no shards. Empty: NOMAD_ADDR, or no Nomad. The flag alone means http://127.0.0.1:4646; NOMAD_TOKEN, NOMAD_CACERT and the like are read.",
        bare="http://127.0.0.1:4646",
    )
    profile: str = setting(
        "lan",
        "How closely peers are probed: lan (a loss is seen in a second), wan (some seconds), radio (half a minute, few bytes).",
    )
    scheduler: str = setting(
        "on",
        "on: this agent may place models for the cluster (the longest-lived one leads, or whoever holds Consul's lock). off: never.",
    )
    moves: int = setting(
        12, "Shards that the scheduler loads in a minute at most, while this agent leads it.", low=1
    )
    region: str = setting(
        "",
        "Site of the node. Views are full within a region; other regions are summarised when large. Empty: consul_datacenter.",
    )
    labels: tuple[str, ...] = setting((), "Labels for placement and people, as key=value.")
    shards: tuple[str, ...] = setting(
        (),
        "Shards to hold from the start, as MODEL:START-END or MODEL:START-END/FORM: int8, fp32, litert-int4 and the like. Without a form, or with auto, it is what is measured to be fastest here; that is done once, and kept beside the models.",
    )
    providers: tuple[str, ...] = setting(
        ("CPUExecutionProvider",),
        "ONNX Runtime execution providers in order of preference; the first that loads is used and named in 'mesh nodes'.",
    )
    delegate: tuple[str, ...] = setting(
        (),
        "TFLite delegates for LiteRT shards in order of preference, as PATH:KEY=VALUE, for example libedgetpu.so.1:device=usb. Each is tried in a process of its own; the first that computes what a shard's test vector wants is used and named in 'mesh nodes', else XNNPACK is, with the reason.",
    )
    threads: int = setting(
        0,
        "Threads of one run. 0: all cores. More is faster for one session until replicas on the node compete.",
        low=0,
    )
    slots: int = setting(
        16, "Sessions a replica holds at once. More batch better and share the KV memory.", low=1
    )
    context: int = setting(
        2048,
        "Most positions of a session (prompt and answer), within the model's own limit.",
        unit="positions",
        low=16,
    )
    kv_memory: int = setting(
        0,
        "KV memory of a replica. 0: what all slots at full context take, at most half of the memory that is free.",
        unit="MiB",
        low=0,
    )
    memory: int = setting(
        0,
        "Memory for shards and KV that the node offers. 0: what is free, within the cgroup's limit, less a tenth.",
        unit="MiB",
        low=0,
    )
    sessions: int = setting(64, "Sessions this agent runs as an ingress; beyond it answers 429.", low=1)
    chunk: int = setting(
        64,
        "Positions of a prefill frame. Larger is faster alone; smaller overlaps stages better and yields sooner to decode steps.",
        unit="positions",
        low=1,
    )
    window: int = setting(8, "Frames of a session that may be unacknowledged on a hop.", low=1)
    request_timeout: float = setting(600.0, "A session ends everywhere after this.", unit="s", low=0.1)
    step_timeout: float = setting(
        30.0, "A session fails when no stage makes progress for so long.", unit="s", low=0.1
    )
    recovery_timeout: float = setting(
        20.0,
        "How long a session that lost a stage waits for another route before it fails. 0: it fails at once.",
        unit="s",
        low=0.0,
    )
    replay: str = setting(
        "auto",
        "How a session that lost a stage is brought back. exact: step by step as it first ran, so that its text is what it would have been. fast: in large chunks. auto: exact where the text is fixed (temperature 0 or a seed).",
    )
    recovery: str = setting(
        "warm",
        "warm: when a stage is lost, the stage before replays to another replica. hot: another replica of every stage computes all along and takes over at once, for requests that come in here; a policy can ask for it by model or class.",
    )
    speculation: str = setting(
        "off",
        "on: where a text repeats what stands in the prompt or the answer, tokens are guessed and several are checked in one step, as far as that is measured to pay, mostly over slow links. Such steps round differently: a text may differ where two tokens are nearly as likely, and 'replay' is fast. off: only for requests with \"speculation\": true.",
    )
    prefix_cache: str = setting(
        "auto",
        "Whether a prompt that begins as another one's goes on from that one's KV cache: on, off, or auto: where its text should not depend on what ran before (temperature 0 or a seed), only from whole chunks of its prompt, which have the same bits in any session.",
    )
    log: str = setting(
        "async",
        "What RocksDB keeps of sessions. async: every token before its bytes reach the client, activations a moment after they are sent; survives a killed process. sync: also written through to the disk, activations every 50 ms; survives a power cut. off: nothing; a lost stage is then replayed from the prompt, and no answer outlives its agent.",
    )
    log_limit: int = setting(
        512,
        "Most that the hop log takes. Beyond it the session that would need more keeps none, says so, and is replayed from further up if a stage is lost.",
        unit="MiB",
        low=1,
    )
    keep: float = setting(600.0, "How long a session's tokens are kept.", unit="s", low=0.0)
    battery_floor: int = setting(
        0,
        "Charge below which a discharging node hands its sessions over and takes no new ones. 0: never.",
        unit="percent",
        low=0,
    )
    drain_timeout: float = setting(
        10.0, "How long a stopping agent waits for its sessions.", unit="s", low=0.0
    )
    log_level: str = setting("info", "debug, info, warning or error.")
    log_format: str = setting("auto", "json, text, or auto: text on a terminal, JSON elsewhere.")


_CHOICES = {
    "log": ("async", "sync", "off"),
    "mdns": ("on", "off"),
    "scheduler": ("on", "off"),
    "prefix_cache": ("auto", "on", "off"),
    "recovery": ("warm", "hot"),
    "speculation": ("off", "on"),
    "replay": ("auto", "exact", "fast"),
    "profile": ("lan", "wan", "radio"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": ("auto", "json", "text"),
}
_TRUE_PORT_MAX = 65535
_EVERYWHERE = ("", "0.0.0.0", "::")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}=[A-Za-z0-9._/-]{0,63}")
_URL = re.compile(r"(https?://)?(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?/?")
_PATH = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,126}")
_SHARD = re.compile(r"([A-Za-z0-9._-]+):(\d+)-(\d+)(?:/([a-z0-9-]+))?")


def fields() -> tuple[dataclasses.Field[Any], ...]:
    """The settings in order."""
    return dataclasses.fields(AgentConfig)


def variable(name: str) -> str:
    """The environment variable of a setting."""
    return f"MESH_{name.upper()}"


def load_config(
    file_text: str | None,
    file_name: str,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
) -> AgentConfig:
    """Merge the sources and check every value; raises ``ConfigError`` naming source and setting."""
    values: dict[str, Any] = {}
    known = {f.name: f for f in fields()}
    if file_text is not None:
        try:
            document = tomllib.loads(file_text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{file_name} is no TOML: {error}") from None
        for name, value in document.items():
            if name not in known:
                close = ", ".join(n for n in known if n[:3] == name[:3]) or ", ".join(known)
                raise ConfigError(f"{file_name}: there is no setting {name!r}; did you mean one of {close}?")
            values[name] = _coerce(known[name], value, f"{file_name}: {name}")
    for name, known_field in known.items():
        text = environment.get(variable(name))
        if text is not None and text != "":
            values[name] = _coerce(known_field, text, variable(name))
    for name, value in flags.items():
        if value is not None:
            values[name] = _coerce(known[name], value, "--" + name.replace("_", "-"))
    config = AgentConfig(**values)
    _check(config)
    return config


def _coerce(target: dataclasses.Field[Any], value: Any, where: str) -> Any:
    """``value`` in the type of ``target``'s default; lists may come as comma-separated text."""
    default = target.default
    if isinstance(default, tuple):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(i, str) for i in items):
            raise ConfigError(f"{where} is {value!r}; it must be a list of texts")
        return tuple(i.strip() for i in items if i.strip())
    if isinstance(default, str):
        if not isinstance(value, str):
            raise ConfigError(f"{where} is {value!r}; it must be a text")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"{where} is {value!r}; it must be a number")
    try:
        number = int(value) if isinstance(default, int) else float(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"{where} is {value!r}; it must be a number") from None
    if isinstance(default, int) and isinstance(value, float) and number != value:
        raise ConfigError(f"{where} is {value!r}; it must be a whole number")
    return number


def _check(config: AgentConfig) -> None:
    for item in fields():
        value, low = getattr(config, item.name), item.metadata["low"]
        if isinstance(value, int | float) and not (math.isfinite(value) and low <= value < 2**40):
            raise ConfigError(f"{item.name} is {value}; it must be at least {low:g}")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            raise ConfigError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(choices)}")
    for name in ("port", "api_port"):
        if getattr(config, name) > _TRUE_PORT_MAX:
            raise ConfigError(f"{name} is {getattr(config, name)}; ports end at {_TRUE_PORT_MAX}")
    if not _NAME.fullmatch(config.cluster):
        raise ConfigError(f"cluster is {config.cluster!r}; use letters, digits, '.', '_' and '-'")
    if config.host in _EVERYWHERE and not config.advertise:
        raise ConfigError(
            f"host is {config.host}, which peers cannot connect to; say with advertise which address they should use"
        )
    for address in config.peers:
        match = _ADDRESS.fullmatch(address)
        if not match or int(match[2]) > _TRUE_PORT_MAX:
            raise ConfigError(f"peers has {address!r}; write host:port")
    for shard in config.shards:
        parse_shard(shard)
    if config.region and not _NAME.fullmatch(config.region):
        raise ConfigError(f"region is {config.region!r}; use letters, digits, '.', '_' and '-'")
    for label in config.labels:
        if not _LABEL.fullmatch(label):
            raise ConfigError(f"labels has {label!r}; write key=value, of letters, digits and ._/-")
    if config.consul and not _URL.fullmatch(config.consul):
        raise ConfigError(f"consul is {config.consul!r}; write it as http://127.0.0.1:8500")
    for name in ("consul_service", "consul_prefix"):
        if not _PATH.fullmatch(getattr(config, name)):
            raise ConfigError(f"{name} is {getattr(config, name)!r}; use letters, digits, '-' and '/'")
    if bool(config.consul_cert) != bool(config.consul_key):
        raise ConfigError("consul_cert and consul_key go together; one of them is empty")
    for delegate in config.delegate:
        parse_delegate(delegate)
    if not config.providers:
        raise ConfigError("providers is empty; name at least CPUExecutionProvider")


def join_address(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def parse_shard(text: str) -> ShardKey:
    """``MODEL:START-END[/FORM]``, the form being ``int8``, ``litert`` or ``litert-int4``; ``auto``, or none, stands for a
    runtime that is still to be chosen."""
    match = _SHARD.fullmatch(text)
    if not match or int(match[2]) >= int(match[3]):
        raise ConfigError(f"{text!r} names no shard; write MODEL:START-END, for example smollm2-135m:0-10")
    try:
        runtime, quantization = (AUTO, "") if match[4] in (None, AUTO) else parse_form(match[4])
    except InputError as error:
        raise ConfigError(f"{text!r}: {error}") from None
    return ShardKey(match[1], int(match[2]), int(match[3]), runtime, quantization)


def parse_delegate(told: str) -> tuple[str, dict[str, str]]:
    """``PATH:KEY=VALUE:...`` as path and options; raises ``ConfigError``."""
    path, *pairs = told.split(":")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"the delegate {told!r} has the option {pair!r}; write PATH:KEY=VALUE:KEY=VALUE"
            )
        options[key] = value
    if not path:
        raise ConfigError(f"the delegate {told!r} names no library; write PATH:KEY=VALUE")
    return path, options


def settings_table() -> str:
    """The settings as a Markdown table, for the README."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for item in fields():
        default = ", ".join(item.default) if isinstance(item.default, tuple) else str(item.default)
        unit = f" ({item.metadata['unit']})" if item.metadata["unit"] else ""
        lines.append(
            f"| `{item.name}` | {f'`{default}`' if default else ''} | {item.metadata['about']}{unit} |"
        )
    return "\n".join(lines)
