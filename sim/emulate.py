"""`tidegate emulate`: emulated vLLMs on the command line (`sim/emulator.py`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sim.command_errors import error_text, fail

if TYPE_CHECKING:
    from policies.profile import Profile
    from sim.emulator import Emulator, EmulatorSettings


def emulate(
    port: Annotated[
        list[int] | None,
        typer.Option(
            help="Port to listen on, default 8000; 0 takes a free one. Repeat it for more backends."
        ),
    ] = None,
    backends: Annotated[
        int | None, typer.Option(help="So many backends, on --port and those that follow it.", min=1)
    ] = None,
    fleet: Annotated[
        Path | None, typer.Option(help="YAML file with a list of backends, each with a port and a profile.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[
        list[str] | None,
        typer.Option(help="Served model name; repeat for aliases. NAME-reasoning reasons first."),
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="Name or YAML file of the profile that the engine has.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option(help="Without a profile: sequences served at once, default 8.")
    ] = None,
    ttft: Annotated[
        float | None,
        typer.Option(help="Without a profile: seconds to the first token after 1000 of prompt, default 0.2."),
    ] = None,
    tpot: Annotated[
        float | None,
        typer.Option(help="Without a profile: seconds per further token of one sequence, default 0.02."),
    ] = None,
    slowdown: Annotated[
        float | None,
        typer.Option(help="Without a profile: share by which each further sequence slows tokens, default 0."),
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(help="Longest prompt plus answer, tokens. Default: the profile's, or 8192.", min=1),
    ] = None,
    rtt: Annotated[
        float, typer.Option(help="Seconds of network round trip, added before every reply.")
    ] = 0.0,
    speed: Annotated[float, typer.Option(help="Run this many times faster than real time.")] = 1.0,
    api_key: Annotated[list[str] | None, typer.Option(help="Key to accept; repeat for several.")] = None,
    seed: Annotated[int, typer.Option(help="Changes the answers and which requests fail.")] = 0,
    enable_prompt_tokens_details: Annotated[
        bool,
        typer.Option("--enable-prompt-tokens-details", help="Usage says how much of a prompt was cached."),
    ] = False,
    max_num_queued_reqs: Annotated[
        int | None,
        typer.Option(help="Sequences running and waiting at most; more are refused with 503.", min=1),
    ] = None,
    runner: Annotated[
        str,
        typer.Option(
            help="`generate`; or in place of text `pooling`: embeddings, scores and classes, or `media`: sound "
            "and pictures."
        ),
    ] = "generate",
    fault: Annotated[
        list[str] | None,
        typer.Option(help="KIND or KIND,NAME=VALUE,...: what goes wrong from the start; repeat for several."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Take faults at POST /emulator/fault while running.")
    ] = False,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that open streams have when stopped.")
    ] = 5.0,
) -> None:
    """Serve emulated vLLMs: their API, errors, metrics and pace, without a model or a card.

    Example: tidegate emulate --port 8000 --model demo --slots 4 --ttft 0.3 --tpot 0.02 --fault cut,share=0.1
    """
    from policies.yamlfile import FileProblems
    from sim.emulator import EmulatorSettings
    from sim.faults import parse_fault
    from sim.fleet import read_fleet

    plain = {"slots": slots, "ttft_s": ttft, "tpot_s": tpot, "slowdown": slowdown}
    in_fleet: dict[str, object] = {"port": port, "backends": backends, "profile": profile, "slots": slots}
    in_fleet |= {"ttft": ttft, "tpot": tpot, "slowdown": slowdown}
    idle = [f"--{option}" for option, value in in_fleet.items() if value is not None]
    try:
        if fleet is not None and idle:
            raise ValueError(f"a fleet's file says what its backends are: no {', '.join(idle)}")
        common = EmulatorSettings(
            host=host,
            models=tuple(model or ("demo",)),
            profile=_profile(profile, plain, max_model_len if fleet is None else None),
            rtt_s=rtt,
            speed=speed,
            api_keys=tuple(api_key or ()),
            seed=seed,
            prompt_tokens_details=enable_prompt_tokens_details,
            max_num_queued_reqs=max_num_queued_reqs,
            pooling=_checked(runner) == "pooling",
            media=runner == "media",
            faults=tuple(map(parse_fault, fault or ())),
            control=control,
            shutdown_timeout_s=shutdown_timeout,
        )
        if fleet is not None:
            many = read_fleet(fleet, common, max_model_len)
        else:
            many = _on_ports(common, port or [8000], backends or 1)
    except (OSError, FileProblems) as error:
        fail(error_text(error), 1)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    hint = "choose another with --port" if fleet is None else f"choose another in {fleet}"
    run(many, hint)


def run(many: list[EmulatorSettings], hint: str) -> None:
    """`hint`: what to do where a port is taken.

    Serve until SIGINT or SIGTERM, saying where on standard output; SIGUSR1 ends all faults."""
    import asyncio
    import signal

    import uvloop

    from sim.emulator import serve_emulators

    serving: list[Emulator] = []

    def ready(servers: list[Emulator]) -> None:
        serving.extend(servers)
        for server, settings in zip(servers, many, strict=True):
            typer.echo(f"listening on {server.url} as {', '.join(settings.models)}")

    def revive() -> None:
        for server in serving:
            server.faults.take_back()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        # The second signal cancels the wait for open streams.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        # Who is dead cannot be asked over HTTP.
        loop.add_signal_handler(signal.SIGUSR1, revive)
        try:
            await serve_emulators(many, ready)
        except asyncio.CancelledError:
            pass

    try:
        uvloop.run(main())
    except OSError as error:
        where, reason = error.filename or many[0].host, (error.strerror or str(error)).lower()
        fail(f"cannot listen on {where}: {reason}; {hint}", 1)


def _profile(name: str | None, plain: dict[str, float | None], max_model_len: int | None) -> Profile:
    """The profile that the options describe. Raises ValueError, OSError and FileProblems."""
    from sim.emulator import plain_profile
    from sim.profile import load_profile, with_max_model_len

    given = {option: value for option, value in plain.items() if value is not None}
    if name is None:
        profile = plain_profile(**given)  # type: ignore[arg-type]
    elif given:
        raise ValueError("a profile says what the engine can do: no --slots, --ttft, --tpot, --slowdown")
    else:
        profile = load_profile(name)
    return with_max_model_len(profile, max_model_len)


def _checked(runner: str) -> str:
    """Raises ValueError."""
    if runner not in ("generate", "pooling", "media"):
        raise ValueError(f"--runner is generate, pooling or media, not {runner}")
    return runner


def _on_ports(common: EmulatorSettings, ports: list[int], backends: int) -> list[EmulatorSettings]:
    """One backend on each port. Raises ValueError."""
    from dataclasses import replace

    if backends > 1:
        if len(ports) > 1:
            raise ValueError("either --port several times or --backends")
        ports = [ports[0] + number if ports[0] else 0 for number in range(backends)]
    if twice := [port for port in ports if port and ports.count(port) > 1]:
        raise ValueError(f"--port {twice[0]} is given twice; 0 takes a free one")
    if not all(0 <= port <= 65535 for port in ports):
        raise ValueError("ports are between 0 and 65535")
    return [replace(common, port=port) for port in ports]


if __name__ == "__main__":
    typer.run(emulate)
