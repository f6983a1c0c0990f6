"""`tidegate policies`: what there is to choose from, and what for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import typer

from proxy.cli_common import fail


def policies(
    name: Annotated[
        str | None, typer.Argument(help="A policy, or a file of the library. Default: a list of all.")
    ] = None,
) -> None:
    """List policies and ready policy files, or show one.

    Of a policy, its parameters; of a file, its text, to be copied and changed.

    Example: tidegate policies local-first > my-policy.yaml
    """
    from policies import PolicyError, names
    from policies.files import library_names, library_policy
    from policies.yamlproblems import closest

    if name is None:
        typer.echo("\n".join(_all()))
        return
    files = library_names()
    if name in files:
        typer.echo(library_policy(name), nl=False)
        return
    known = (*files, *names())
    if name not in known and ":" not in name:
        meant = closest(name, known)
        hint = f"did you mean '{meant}'?" if meant else "`tidegate policies` lists what there is"
        fail(f"no policy and no file of the library is called '{name}'; {hint}")
    try:
        typer.echo("\n".join(_policy(name)))
    except PolicyError as error:
        fail(str(error))


def _all() -> Iterator[str]:
    from policies import PolicyError, guide, names, summary

    yield "Ready files: `policy: NAME` in the configuration, or `tidegate serve --policy NAME`. If you want"
    yield from _listed(guide.FILES)
    yield ""
    yield "Policies: `pick: NAME` in a rule of a policy file. If you want"
    yield from _listed(guide.POLICIES)
    added = {}
    for name in names():
        if name not in guide.POLICIES:
            try:
                added[name] = summary(name)
            except PolicyError as error:
                added[name] = str(error)
    if added:
        yield from ["", "Policies of other packages", *_listed(added)]
    yield ""
    yield "`tidegate policies NAME` shows the parameters of a policy, or the text of a file."


def _listed(texts: Mapping[str, str]) -> Iterator[str]:
    width = max(map(len, texts))
    for name, text in texts.items():
        yield f"  {name:{width}}  {text}"


def _policy(name: str) -> Iterator[str]:
    """Raises PolicyError."""
    from policies import guide, parameters, summary

    takes = parameters(name)
    yield f"{name}: {summary(name).rstrip('.:')}."
    if name in guide.POLICIES:
        yield f"If you want {guide.POLICIES[name]}."
    if not takes:
        yield "It takes no parameters."
        return
    yield f"Parameters, beside the name, as in `pick: {{policy: {name}, {takes[0].name}: ...}}`:"
    for one in takes:
        yield f"  {one.name} ({one.takes})"
        yield f"      {one.doc}"
