"""`pick: {policy: NAME, PARAMETER: VALUE}`: what is wrong with it, key by key.

What a policy takes is read from its constructor by the registry, so a policy from somebody else's package is
checked like one of ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

import policies
from policies import REQUIRED, PolicyError
from policies.yamlproblems import Finding, closest, explain


def check(name: str, given: Mapping[str, Any]) -> Iterator[Finding]:
    """Findings about a policy's name and parameters; their paths start at the pick."""
    known = policies.names()
    if name not in known and ":" not in name:
        suggestion = closest(name, known)
        choices = "" if suggestion else f"; there are {', '.join(known)}, and package.module:Class"
        yield Finding(("policy",), f"unknown policy '{name}'{choices}", suggestion)
        return
    try:
        takes = {parameter.name: parameter for parameter in policies.parameters(name)}
    except PolicyError as error:
        yield Finding(("policy",), str(error))
        return
    for key in given:
        if key not in takes:
            suggestion = closest(key, takes.keys() - given.keys())
            choices = f"; it takes {', '.join(takes)}" if takes else "; it takes none"
            message = f"{name} has no such parameter{'' if suggestion else choices}"
            yield Finding((key,), message, suggestion, at_key=True)
    fields: dict[str, Any] = {
        key: (parameter.annotation, ... if parameter.default is REQUIRED else None)
        for key, parameter in takes.items()
    }
    values = {key: value for key, value in given.items() if key in takes}
    config = ConfigDict(strict=True, arbitrary_types_allowed=True)
    try:
        model: type[BaseModel] = create_model("Parameters", __config__=config, **fields)
    except Exception as error:  # somebody else's names and annotations
        yield Finding(("policy",), f"the parameters of {name} cannot be checked: {error}")
        return
    try:
        model.model_validate(values)
    except ValidationError as error:
        yield from explain(error, model, values)
