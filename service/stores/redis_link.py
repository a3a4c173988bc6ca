"""The way to Redis: what the URL says, calls of scripts within a time limit, and errors that say what to do.

Rule: a call is repeated until it is answered or its time is over, which is safe because every script is (see
`redis_scripts.py`). It knows nothing of sessions, and no message of it has a password.
"""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from redis import exceptions as failures
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from service.errors import SettingsInvalid, StoreUnavailable

_PORT = 6379
_TIMEOUT_MS = 2000
_CALLS = 64  # in flight, each on a connection of its own
_FIRST_PAUSE = 0.02
_FORM = (
    "the address is redis://[user:password@]host[:port][/db], rediss:// for TLS, or "
    "redis+cluster://host[:port],host[:port],..., with ?timeout_ms=1 to 600000, ?replicas=0 to 9, "
    "?ca=file, ?cert=file and ?key=file for TLS, and ?tls=true for a cluster"
)

# The last is uvloop's, where something is written to a connection that the other side has closed.
_FAILURES = (failures.RedisError, failures.RedisClusterException, OSError, RuntimeError)

# Failures that mend themselves within seconds: a restart, a failover, slots that move.
_PASSING = (
    failures.ConnectionError,
    failures.TimeoutError,
    failures.ReadOnlyError,
    failures.ClusterError,
    failures.TryAgainError,
    failures.AskError,
    failures.RedisClusterException,
    OSError,  # and TimeoutError with it
)
_LASTING = (failures.AuthenticationError, failures.AuthorizationError)

_PERMIT = "does not permit a call to this user: give it +@all on keys latch:* (ACL SETUSER)"
# The first that fits: a class, or a part of the message.
_ADVICE: Sequence[tuple[type[Exception] | str, str]] = (
    (_LASTING[0], "refuses the user or the password: set LATCH_STORE_URL to ...//user:password@host"),
    (failures.AuthenticationWrongNumberOfArgsError, "wants a user name too: ...//user:password@host"),
    (failures.NoPermissionError, _PERMIT),
    (failures.ReadOnlyError, "is a read-only replica: name the primary, or wait for the failover"),
    (
        failures.OutOfMemoryError,
        "is out of memory: raise its maxmemory, or end sessions by calls to a service itself, which a proxy does not "
        "pass on while it is not ready",
    ),
    (failures.BusyLoadingError, "is still loading its data: try again in a moment"),
    (failures.MaxConnectionsError, "is asked too much at once: try again in a moment"),
    (failures.ClusterDownError, "is down as a cluster: see CLUSTER INFO on its nodes"),
    (failures.AskError, "belongs to a cluster: name it redis+cluster://"),
    (failures.TryAgainError, "moves slots between its nodes: try again in a moment"),
    ("Cluster mode is not enabled", "is no cluster: name it redis://"),
    ("This instance has cluster support disabled", "is no cluster: name it redis://"),
    ("All slots are not covered", "misses a part of its cluster: see CLUSTER INFO on its nodes"),
    ("MISCONF", "cannot write to its disk: see its log"),
    ("NOREPLICAS", "has fewer replicas than its min-replicas-to-write: see INFO replication"),
    ("Error compiling script", "is too old: it must be Redis 7, Valkey 7.2, or newer"),
    ("can't run this command", _PERMIT),
    ("mismatch, certificate is not valid for", "has a certificate for other names: name it by one of those"),
    ("CERTIFICATE_VERIFY_FAILED", "has a certificate that is not trusted: name its authority with ?ca=file"),
    (TimeoutError, "did not answer in time: is it reachable and not overloaded? (?timeout_ms= gives it longer)"),
    (failures.TimeoutError, "did not answer in time: is it reachable and not overloaded?"),
    (failures.ConnectionError, "cannot be reached: is it running, and is LATCH_STORE_URL right?"),
    (OSError, "cannot be reached: is it running, and is LATCH_STORE_URL right?"),
)


class Call(NamedTuple):
    """One run of a script; all keys in one slot, where the store is a cluster."""

    keys: Sequence[str]
    arguments: Sequence[bytes | str | int | float] = ()


class Link:
    """Runs scripts on one server or on a cluster.

    Args:
        url: see `_FORM`.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if "@" in parts.path + parts.query + parts.fragment:  # the rest of a password, which no message shall show
            raise SettingsInvalid(
                f"store {parts.scheme}://...: percent-encode / ? # @ in a user and a password; {_FORM}"
            )
        login, _, hosts = parts.netloc.rpartition("@")
        user, _, password = map(unquote, login.partition(":"))
        self.is_cluster = parts.scheme == "redis+cluster"
        self.address = f"{parts.scheme}://{hosts}{parts.path}"
        options = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        try:
            nodes = [_host_and_port(each) for each in hosts.split(",")]
            db = int(parts.path.strip("/") or "0")
            self._timeout = _bounded(options.pop("timeout_ms", _TIMEOUT_MS), 1, 600_000) / 1000
            self._replicas = _bounded(options.pop("replicas", 0), 0, 9)
            tls = _switch(options.pop("tls", "false")) if self.is_cluster else parts.scheme == "rediss"
            files = {name: _file(options.pop(name)) for name in ("ca", "cert", "key") if tls and name in options}
        except ValueError as error:
            raise SettingsInvalid(f"store {self.address!r}: {error}; {_FORM}") from None
        if options:
            raise SettingsInvalid(f"store {self.address!r}: unknown option {min(options)!r}; {_FORM}")
        if (db and self.is_cluster) or (len(nodes) > 1 and not self.is_cluster):
            raise SettingsInvalid(
                f"store {self.address!r}: a cluster has no databases, and one server one name; {_FORM}"
            )
        common: dict[str, Any] = {
            "username": user or None,
            "password": password or None,
            "protocol": 2,
            "socket_timeout": None,  # `run` limits the time
            "socket_connect_timeout": self._timeout / 4,
            "retry": Retry(NoBackoff(), 0),  # `run` tries again
            "max_connections": 2 * _CALLS,
            "ssl": tls,
            "ssl_ca_certs": files.get("ca"),
            "ssl_certfile": files.get("cert"),
            "ssl_keyfile": files.get("key"),
            "ssl_check_hostname": True,
        }
        self._client: Any = (
            RedisCluster(startup_nodes=[ClusterNode(*node) for node in nodes], **common)
            if self.is_cluster
            else Redis(host=nodes[0][0], port=nodes[0][1], db=db, **common)
        )
        self._turns = asyncio.Semaphore(_CALLS)

    async def run(
        self, script: str, calls: Sequence[Call], is_unsure: Callable[[list[Any]], bool] = lambda _: False
    ) -> list[Any]:
        """What the script gives for each call; all go out together, and those to one server are run in order.

        Args:
            script: what to run.
            calls: its keys and arguments.
            is_unsure: whether replies to a second try do not tell if the first one was done.

        Raises:
            StoreUnavailable: no answer in time, a refusal, or fewer replicas than asked that confirm; what was called
                may or may not be done.
        """
        clock = asyncio.get_running_loop().time
        end, pause, failure = clock() + self._timeout, _FIRST_PAUSE, None
        while True:
            try:
                # Half of the time: a connection that died without a word leaves a try with a fresh one.
                async with asyncio.timeout_at(min(end, clock() + self._timeout / 2)), self._turns:
                    if failure is not None:
                        await self._look_again()
                    replies = await self._try(script, calls)
                    if failure is not None and is_unsure(replies):
                        raise StoreUnavailable(
                            f"the session store {self.address} broke off, and others have moved a session meanwhile"
                        ) from failure
                    return replies
            except _FAILURES as error:
                failure = _root(error)
            if isinstance(failure, _LASTING) or not isinstance(failure, _PASSING) or clock() + pause >= end:
                raise StoreUnavailable(self._advice(failure)) from failure
            await asyncio.sleep(pause)
            pause *= 2

    async def _try(self, script: str, calls: Sequence[Call]) -> list[Any]:
        if self.is_cluster:
            await self._client.initialize()
        # Not EVALSHA: it saves 4 us of 100, and a server that was started anew would have to be told its scripts.
        commands = [("EVAL", script, len(keys), *keys, *arguments) for keys, arguments in calls]
        if len(commands) == 1 and not self._replicas:  # a fifth less time than a pipeline of one
            return [await self._client.execute_command(*commands[0])]
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        options = self._ask_replicas(pipeline, calls) if self._replicas else {}
        replies = await pipeline.execute(raise_on_error=False, **options)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        confirmed = min(replies[len(calls) :], default=self._replicas)
        if confirmed < self._replicas:
            raise StoreUnavailable(
                f"the session store {self.address} has {confirmed} of {self._replicas} replicas that confirm: "
                "see INFO replication, or set ?replicas= to what there is"
            )
        return list(replies[: len(calls)])

    def _ask_replicas(self, pipeline: Any, calls: Sequence[Call]) -> dict[str, bool]:
        """Has every server that is called wait for its replicas, on the same connection; gives options of `execute`."""
        wait = ("WAIT", self._replicas, max(1, int(self._timeout * 250)))
        if not self.is_cluster:
            pipeline.execute_command(*wait)
            return {}
        for node in {self._client.get_node_from_key(call.keys[0]) for call in calls}:
            pipeline.execute_command(*wait, target_nodes=node)
        return {"allow_redirections": False}  # the replicas of the wrong server would confirm

    async def _look_again(self) -> None:
        """Asks anew where the store is: after a failover names and slots lead elsewhere."""
        if self.is_cluster:
            await self._client.nodes_manager.initialize()  # not aclose(): others' calls go on
        else:
            await self._client.connection_pool.disconnect(inuse_connections=False)

    def _advice(self, failure: BaseException) -> str:
        text = str(failure).removeprefix("ERR ")
        for sign, advice in _ADVICE:
            if sign in text if isinstance(sign, str) else isinstance(failure, sign):
                return f"the session store {self.address} {advice}" + (f" ({text})" if text else "")
        return f"the session store {self.address} failed: {text}"

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()


def _root(error: BaseException) -> BaseException:
    """What a cluster's client hides behind an error of its own, and what uvloop says instead of a broken connection."""
    while isinstance(error, failures.RedisClusterException) and (cause := error.__cause__ or error.__context__):
        error = cause
    if isinstance(error, RuntimeError) and "is closed" in str(error):
        return failures.ConnectionError(str(error))
    return error


def _host_and_port(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no host")
    return parts.hostname, parts.port or _PORT


def _switch(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"tls={text}: it is true or false")
    return text == "true"


def _file(text: str) -> str:
    if not Path(text).is_file():
        raise ValueError(f"there is no file {text!r}")
    return text


def _bounded(text: str | int, low: int, high: int) -> int:
    if not low <= (value := int(text)) <= high:
        raise ValueError(f"{value} is not in {low} to {high}")
    return value
