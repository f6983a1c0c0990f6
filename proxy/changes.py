"""What a reload changed, in words for the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from proxy.build import Built


def changes(old: Built, new: Built, without: Sequence[str] = ()) -> list[str]:
    """Such as `backend nj added`, `timeouts.drain 30 -> 60`; empty: all is as it was.

    Of values that may be long, such as aliases, only the name is said. `without`: keys that did not take effect.
    """
    return list(_changes(old, new, without))


def _changes(old: Built, new: Built, without: Sequence[str]) -> Iterator[str]:
    before = {section.name: section for section in old.config.backends}
    after = {section.name: section for section in new.config.backends}
    slots_before, slots_after = (
        {target.name: target.slots for target in built.targets} for built in (old, new)
    )
    yield from (f"backend {name} added" for name in after if name not in before)
    yield from (f"backend {name} removed" for name in before if name not in after)
    for name in after:
        if name not in before:
            continue
        keys = [key for key in type(after[name]).model_fields if _differ(before[name], after[name], key)]
        endpoints = old.endpoints[name], new.endpoints[name]
        if not keys and (endpoints[0] is not endpoints[1] or slots_before[name] != slots_after[name]):
            keys = ["what its files hold"]
        if keys:
            yield f"backend {name} changed ({', '.join(keys)})"
    if old.policy.name != new.policy.name:
        yield f"policy {old.policy.name} -> {new.policy.name}"
    elif old.policy.text_hash != new.policy.text_hash:
        yield f"policy {new.policy.name} changed"
    if old.config.tls == new.config.tls and old.certificates != new.certificates:
        yield "certificates renewed"
    for key in type(new.config).model_fields:
        if key not in ("backends", "policy"):
            yield from _setting(key, getattr(old.config, key), getattr(new.config, key), without)


def _setting(path: str, old: Any, new: Any, without: Sequence[str]) -> Iterator[str]:
    if old == new or path in without:
        return
    if isinstance(new, BaseModel):
        for key in type(new).model_fields:
            yield from _setting(f"{path}.{key}", getattr(old, key), getattr(new, key), without)
    elif isinstance(new, str | int | float) and isinstance(old, str | int | float):
        yield f"{path} {_shown(old)} -> {_shown(new)}"
    else:
        yield f"{path} changed"


def _shown(value: str | int | float) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _differ(old: BaseModel, new: BaseModel, key: str) -> bool:
    return bool(getattr(old, key) != getattr(new, key))
