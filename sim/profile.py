"""The profiles that come along (`sim/profiles/`), profiles as files, and the engines they describe."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from policies.profile import Profile, read_profile
from sim.engine import EngineSettings, StepCost


def engine_settings(profile: Profile, prefix_unit_tokens: int = 0) -> EngineSettings:
    """The engine that a profile describes. `prefix_unit_tokens`: of the hashes in the workload, 0 for none."""
    step, limits = profile.step, profile.limits
    return EngineSettings(
        cost=StepCost(step.alpha_us, step.beta_us, step.gamma_us, step.delta_us),
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_num_seqs=limits.max_num_seqs,
        kv_tokens=limits.kv_tokens,
        prefix_unit_tokens=prefix_unit_tokens if limits.prefix_cache else 0,
    )


def load_profile(name: str | Path) -> Profile:
    """A profile by its name in `sim/profiles/`, or a file by its path.

    Raises FileProblems, which says what is wrong where, and OSError; FileNotFoundError lists the names
    there are.
    """
    text = str(name)
    if isinstance(name, Path) or text.endswith((".yaml", ".yml")):
        return read_profile(Path(name).read_text(encoding="utf-8"), text)
    file = resources.files("sim").joinpath("profiles", f"{text}.yaml")
    if not file.is_file():
        known = ", ".join(profile_names())
        raise FileNotFoundError(f"no profile is named {text!r}; there are {known}; a path ends in .yaml")
    return read_profile(file.read_text(encoding="utf-8"), f"{text}.yaml")


def with_max_model_len(profile: Profile, max_model_len: int | None) -> Profile:
    """The profile with another longest sequence, tokens; None: as it is."""
    if max_model_len is None:
        return profile
    limits = profile.limits.model_copy(update={"max_model_len": max_model_len})
    return profile.model_copy(update={"limits": limits})


def profile_names() -> list[str]:
    """Names in `sim/profiles/`, sorted."""
    folder = resources.files("sim").joinpath("profiles")
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def dump_profile(profile: Profile) -> str:
    """The profile as a YAML file, its keys in the order of `policies/profile.py`; `load_profile` reads it back."""
    from io import StringIO

    from ruamel.yaml import YAML

    yaml = YAML()
    yaml.width = 110
    out = StringIO()
    yaml.dump(profile.model_dump(mode="json", exclude_none=True), out)
    return out.getvalue()
