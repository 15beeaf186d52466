"""Nomad's HTTP API: python-nomad for what it can do, its session for what it lacks. Blocking; every call has a deadline.

What goes wrong is told with the address, the status and what Nomad said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import nomad
import requests
from nomad.api.exceptions import BaseNomadException, TimeoutNomadException, URLNotFoundNomadException

from mesh.errors import InputError, PeerError, Unavailable

_TIMEOUT_S = 10
_STREAM_QUIET_S = 30
"""Nomad sends an empty line every ten seconds."""
_OLDEST = (1, 1)
_SAID_MAX = 300
TOPICS = ("Node", "Allocation", "Deployment")


@dataclass(frozen=True, slots=True)
class NomadAccess:
    """Where Nomad is and who we are. TLS is verified, against ``ca`` where that is given."""

    url: str
    token: str = ""
    namespace: str = ""
    region: str = ""
    ca: str = ""
    cert: str = ""
    key: str = ""


def nomad_access(environment: Mapping[str, str], address: str | None = None) -> NomadAccess:
    """From ``NOMAD_*`` as the ``nomad`` command reads them; raises ``InputError``."""
    url = address or environment.get("NOMAD_ADDR") or "http://127.0.0.1:4646"
    if not re.fullmatch(r"https?://[^\s/:]+(:[0-9]{1,5})?/?", url):
        raise InputError(
            f"Nomad's address is {url!r}; write http://host:4646 or https://host:4646 (NOMAD_ADDR)"
        )
    cert, key = environment.get("NOMAD_CLIENT_CERT", ""), environment.get("NOMAD_CLIENT_KEY", "")
    if bool(cert) != bool(key):
        raise InputError("NOMAD_CLIENT_CERT and NOMAD_CLIENT_KEY go together")
    return NomadAccess(
        url.rstrip("/"),
        environment.get("NOMAD_TOKEN", ""),
        environment.get("NOMAD_NAMESPACE", ""),
        environment.get("NOMAD_REGION", ""),
        environment.get("NOMAD_CACERT", ""),
        cert,
        key,
    )


class NomadApi:
    """One Nomad server or client agent. Raises ``Unavailable`` when it does not answer, ``InputError`` for what it
    refuses, ``PeerError`` for answers that are none."""

    def __init__(self, access: NomadAccess) -> None:
        self._access = access
        self._session = requests.Session()
        # python-nomad drops a False here, and urllib3 verifies by default: this is for the calls of our own.
        self._session.verify = access.ca or True
        self._client = nomad.Nomad(
            address=access.url,
            token=access.token or None,
            namespace=access.namespace or None,
            region=access.region or None,
            timeout=_TIMEOUT_S,
            verify=access.ca or True,
            cert=(access.cert, access.key),
            session=self._session,
        )

    def close(self) -> None:
        """Let go of connections."""
        self._session.close()

    def check_version(self) -> str:
        """Nomad's version; raises ``InputError`` for one older than 1.1."""
        answer = self._call("agent/self", self._client.agent.get_agent)
        version = str(((answer.get("config") or {}).get("Version") or {}).get("Version", ""))
        match = re.match(r"([0-9]+)\.([0-9]+)", version)
        if not match:
            raise PeerError(f"{self._access.url} does not say which version of Nomad it is ({version!r})")
        if (int(match[1]), int(match[2])) < _OLDEST:
            raise InputError(f"{self._access.url} is Nomad {version}; 1.1 or newer is needed")
        return version

    def job(self, name: str) -> dict[str, Any] | None:
        """A job as Nomad has it, or ``None``."""
        try:
            return self._call(f"job/{name}", lambda: self._client.job.get_job(name))
        except _NotFound:
            return None

    def plan(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        """Nomad's dry run of a job, with its differences."""
        name = str(spec["ID"])
        return self._call(
            f"job/{name}/plan", lambda: self._client.job.plan_job(name, {"Job": spec}, diff=True)
        )

    def register(self, spec: Mapping[str, Any], index: int, keep_counts: bool) -> dict[str, Any]:
        """Register a job, unless it has changed since ``index`` (0: unless there is one)."""
        body: dict[str, Any] = {"Job": spec, "EnforceIndex": True, "JobModifyIndex": index}
        if keep_counts:
            body["PreserveCounts"] = True
        return self._call("jobs", lambda: self._client.jobs.register_job(body))

    def stop(self, name: str) -> dict[str, Any]:
        """Stop a job; its history stays until Nomad collects it."""
        return self._call(f"job/{name}", lambda: self._client.job.deregister_job(name))

    def scale(self, name: str, group: str, count: int, message: str) -> dict[str, Any]:
        """Set a group's count; python-nomad has no such call."""
        body = {"Target": {"Group": group}, "Count": count, "Message": message}
        return self._plain("POST", f"/v1/job/{name}/scale", body)

    def deployment(self, name: str) -> dict[str, Any] | None:
        """A job's latest deployment, or ``None``."""
        return (
            self._call(f"job/{name}/deployment", lambda: self._client.job.get_deployment(name) or {}) or None
        )

    def allocations(self, name: str) -> list[dict[str, Any]]:
        """A job's allocations, in short."""
        found = self._call(f"job/{name}/allocations", lambda: {"all": self._client.job.get_allocations(name)})
        return list(found["all"] or ())

    def nodes(self, index: int = 0, wait_s: int = 0) -> tuple[list[dict[str, Any]], int]:
        """All clients in short, and the index that this is of; with ``wait_s``, once something changed after ``index``."""
        asked = {"index": index, "wait": f"{wait_s}s"} if wait_s else {}
        response = self._send("GET", "/v1/nodes", asked, timeout=wait_s * 1.1 + _TIMEOUT_S)
        return list(self._json(response, list)), _index(response)

    def work(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """All allocations and all deployments of the namespace, in short."""
        paths = ("/v1/allocations", "/v1/deployments")
        allocations, deployments = (list(self._json(self._send("GET", path), list)) for path in paths)
        return allocations, deployments

    def node(self, node: str) -> dict[str, Any]:
        """A client in full."""
        return self._call(f"node/{node}", lambda: self._client.node.get_node(node))

    def events(self, index: int) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """What happens from ``index`` on, as it comes; empty lists while nothing does. Ends when Nomad ends it."""
        parameters: dict[str, Any] = {"topic": list(TOPICS), "index": index}
        with self._send("GET", "/v1/event/stream", parameters, stream=True) as response:
            for line in self._lines(response):
                try:
                    batch = json.loads(line)
                except ValueError:
                    raise PeerError(f"{self._access.url}/v1/event/stream sent {line[:80]!r}") from None
                yield int(batch.get("Index") or 0), list(batch.get("Events") or ())

    # -- errors ----------------------------------------------------------------------------------

    def _lines(self, response: requests.Response) -> Iterator[bytes]:
        try:
            yield from (line for line in response.iter_lines(chunk_size=1) if line)
        except requests.RequestException as error:
            raise self._away(error) from None

    def _call(self, what: str, call: Callable[[], Any]) -> dict[str, Any]:
        try:
            answer = call()
        except URLNotFoundNomadException as error:
            raise _NotFound(self._said(what, error.nomad_resp)) from None
        except BaseNomadException as error:
            if isinstance(error.nomad_resp, requests.Response):
                raise self._refused(what, error.nomad_resp) from None
            raise self._away(error.nomad_resp) from None
        except (TimeoutNomadException, requests.RequestException) as error:
            if isinstance(error, requests.JSONDecodeError):
                raise PeerError(
                    f"{self._access.url}/v1/{what} did not answer in JSON: is it Nomad's?"
                ) from None
            raise self._away(error) from None
        except ValueError:
            raise PeerError(f"{self._access.url}/v1/{what} did not answer in JSON: is it Nomad's?") from None
        if not isinstance(answer, dict):
            raise PeerError(f"{self._access.url}/v1/{what} answered {str(answer)[:80]!r}: is it Nomad's?")
        return answer

    def _plain(self, method: str, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._json(self._send(method, path, body=body), dict))

    def _send(
        self,
        method: str,
        path: str,
        parameters: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        stream: bool = False,
        timeout: float = _TIMEOUT_S,
    ) -> requests.Response:
        access = self._access
        asked = dict(parameters or {})
        asked |= {k: v for k, v in (("namespace", access.namespace), ("region", access.region)) if v}
        try:
            response = self._session.request(
                method,
                access.url + path,
                params=asked,
                json=body,
                headers={"X-Nomad-Token": access.token} if access.token else {},
                cert=(access.cert, access.key) if access.cert else None,
                verify=access.ca or True,
                stream=stream,
                timeout=(_TIMEOUT_S, _STREAM_QUIET_S) if stream else timeout,
                allow_redirects=False,
            )
        except requests.RequestException as error:
            raise self._away(error) from None
        if not response.ok:
            raise self._refused(path.removeprefix("/v1/"), response)
        return response

    def _json(self, response: requests.Response, kind: type) -> Any:
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, kind):
            raise PeerError(f"{response.url} did not answer in JSON: is it Nomad's?")
        return answer

    def _refused(self, what: str, response: requests.Response) -> Exception:
        said = self._said(what, response)
        if response.status_code == 403:
            hint = "set NOMAD_TOKEN" if not self._access.token else "the token lacks a right"
            return InputError(f"{said} ({hint})")
        if response.status_code == 404:
            return _NotFound(said)
        # Nomad tells what is wrong with a request as 500 with text; only a server's own trouble is to be tried again.
        own_trouble = response.status_code >= 500 and re.search(
            r"leader|rpc error|timeout", response.text, re.I
        )
        return Unavailable(said) if own_trouble else InputError(said)

    def _said(self, what: str, response: requests.Response) -> str:
        text = " ".join(response.text.split())[:_SAID_MAX]
        if text.startswith("<"):
            text = "(a page of HTML: is this Nomad's address?)"
        return f"{self._access.url}/v1/{what}: {response.status_code} {text}"

    def _away(self, error: object) -> Unavailable:
        return Unavailable(
            f"Nomad does not answer at {self._access.url}: {str(error)[:_SAID_MAX]} (NOMAD_ADDR names it)"
        )


class _NotFound(InputError):
    """Nomad knows no such thing."""


def _index(response: requests.Response) -> int:
    text = response.headers.get("X-Nomad-Index", "")
    return int(text) if text.isdecimal() else 0
