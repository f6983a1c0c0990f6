"""`tidegate demo`: a whole fleet on one machine, without a card or a model.

It starts an emulated local appliance with few slots, two emulated remote sites and the proxy in front of them,
and prints how to talk to it. With `--traffic` a rush hour goes over it and the terminal shows where the requests
went. All of it ends with Ctrl-C.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.demo_fleet import (
    CURRENCY,
    FLEET,
    MODEL,
    DemoError,
    DemoSettings,
    Fleet,
    afterwards,
    greeting,
    start_fleet,
)
from proxy.tasks import Tasks

if TYPE_CHECKING:
    import aiohttp

    from proxy.demo_view import View

SAMPLE_S = 0.5
"""Between two looks at the proxy's state."""
LINE_S = 2.0
"""Between two lines where standard output is not a terminal."""


async def ride(fleet: Fleet, settings: DemoSettings, tasks: Tasks) -> str:
    """Send the rush hour, showing how it goes. The summary."""
    import aiohttp
    from rich.console import Console
    from rich.live import Live

    from proxy.demo_traffic import MEAN_ANSWER_TOKENS, Traffic, rush_hour
    from proxy.demo_view import View

    capacity = FLEET[0].capacity(MEAN_ANSWER_TOKENS)
    traffic = Traffic(fleet.url, MODEL, rush_hour(settings.duration_s, capacity, settings.seed))
    view = View(traffic, CURRENCY)
    console = Console()
    sending = tasks.spawn(traffic.run(), "rush hour")
    next_line_s = 0.0
    async with aiohttp.ClientSession() as session:
        with ExitStack() as screen:
            live = None
            if console.is_terminal:
                live = screen.enter_context(Live(console=console, auto_refresh=False))
            while not sending.done():
                await asyncio.wait([sending], timeout=SAMPLE_S)
                await _sample(session, fleet, view)
                if live is not None:
                    live.update(view.table(console.width), refresh=True)
                elif traffic.now_s() >= next_line_s:
                    typer.echo(view.line())
                    next_line_s += LINE_S
    await sending
    return view.summary()


async def _sample(session: aiohttp.ClientSession, fleet: Fleet, view: View) -> None:
    import aiohttp

    try:
        async with session.get(f"{fleet.admin}/state") as response:
            view.sample(await response.json())
    except aiohttp.ClientError:
        pass  # a look that was missed; if the proxy has ended, its watcher says so


async def _main(settings: DemoSettings) -> None:
    tasks = Tasks()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-demo-")))
        stack.push_async_callback(tasks.cancel_all)
        typer.echo("Starting three emulated backends and the proxy ...\n")
        fleet = await start_fleet(settings, stack, directory)
        typer.echo(greeting(fleet.url, fleet.admin, fleet.config))
        ends = {tasks.spawn(child.ended(), child.name): child for child in fleet.children}
        if settings.traffic:
            work = tasks.spawn(ride(fleet, settings, tasks), "traffic")
        else:
            work = tasks.spawn(asyncio.Event().wait(), "until stopped")
        done, _ = await asyncio.wait([work, *ends], return_when=asyncio.FIRST_COMPLETED)
        if work not in done:
            raise ends[done.pop()].failure()
        typer.echo(f"\n{work.result()}")
    if settings.state is not None:
        typer.echo(afterwards(fleet.config), nl=False)


def run_demo(settings: DemoSettings) -> int:
    """Run until stopped, or until the rush hour is over. The exit code."""

    async def main() -> int:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        # The second signal cancels the wait for children: they are killed.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        try:
            await _main(settings)
        except asyncio.CancelledError:
            typer.echo("\nStopped.")
        except DemoError as error:
            typer.echo(f"tidegate demo: {error}", err=True)
            return 1
        return 0

    return asyncio.run(main())


def demo(
    traffic: Annotated[
        bool, typer.Option(help="Send a rush hour, show where it goes, end with a summary.")
    ] = False,
    duration: Annotated[float, typer.Option(help="Seconds the rush hour lasts.", min=1)] = 60.0,
    port: Annotated[int, typer.Option(help="Port of the API; 0 takes a free one.", min=0, max=65535)] = 8080,
    admin_port: Annotated[
        int, typer.Option(help="Port of the admin pages; 0 takes a free one.", min=0, max=65535)
    ] = 8081,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Keep keys, ledger and configuration (demo.yaml) in this directory. Default: gone with the demo."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="One seed, one rush hour.")] = 0,
) -> None:
    """Run an emulated fleet with the proxy in front of it: nothing else is needed.

    Example: tidegate demo --traffic
    """
    settings = DemoSettings(
        port=port, admin_port=admin_port, state=state, traffic=traffic, duration_s=duration, seed=seed
    )
    raise typer.Exit(run_demo(settings))
