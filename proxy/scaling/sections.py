"""What the configuration says of standbys and of scaling: `backends[].standby` and `scaling`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from policies.siteschema import Name, SiteName
from policies.units import BadValueError, Duration, Fraction
from policies.yamlfile import FileModel
from proxy.config_values import NetworkText, Url, Variable
from proxy.scaling.images import Task

ModelName = Annotated[str, Field(min_length=1, max_length=200)]

Money = Annotated[float, Field(ge=0)]
"""In the ledger's currency."""


def _over_http(url: str) -> None:
    if url.startswith("unix:"):
        raise BadValueError("this one is called over HTTP: http:// or https://", at=("url",))


class VllmRecipe(FileModel):
    """How `vllm serve` is launched."""

    model: str = Field(
        description="Model that it loads: a name of a hub, or a folder, as in `./models/qwen3`."
    )
    executable: str = Field("vllm", description="The command, or a path to it.")
    arguments: list[str] = Field(
        default_factory=list, description="Further arguments: `[--max-model-len, '16384']`."
    )


class ProcessSection(FileModel):
    """A command on this machine, launched and watched."""

    command: list[str] | None = Field(
        None,
        min_length=1,
        description="What to run, an argument each. `{host}` and `{port}` are those of the backend's URL.",
    )
    vllm: VllmRecipe | None = Field(None, description="Instead of `command`: a vLLM.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables besides our own.")
    directory: Path | None = Field(None, description="Where it runs. Default: the state directory.")
    grace: Duration = Field(30.0, ge=0, description="Between SIGTERM and SIGKILL.")

    @model_validator(mode="after")
    def _check(self) -> ProcessSection:
        if (self.command is None) == (self.vllm is None):
            raise BadValueError("give `command` or `vllm`, one of them", at=("command",))
        return self

    def resolved(self, base: Path) -> ProcessSection:
        """With absolute paths; a command or a model without any `/` in it is none, nor is `org/model`."""
        changes: dict[str, object] = {}
        if self.directory is not None:
            changes["directory"] = base / self.directory
        if self.command is not None and "/" in self.command[0]:
            changes["command"] = [str(base / self.command[0]), *self.command[1:]]
        if (recipe := self.vllm) is not None:
            paths = {}
            if "/" in recipe.executable:
                paths["executable"] = str(base / recipe.executable)
            if recipe.model.startswith(("./", "../")):
                paths["model"] = str(base / recipe.model)
            changes["vllm"] = recipe.model_copy(update=paths)
        return self.model_copy(update=changes)


class SleepSection(FileModel):
    """A vLLM that runs and sleeps: `/sleep` frees its GPU memory, `/wake_up` brings it back."""

    level: Literal[1, 2] = Field(
        1, description="1: weights stay in main memory. 2: they are read again at wake-up."
    )


class CommandSection(FileModel):
    """A script that starts and stops it: called with `prepare`, `start`, `stop` or `status`, and the run."""

    command: list[str] = Field(min_length=1, description="The script and its first arguments.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables besides our own.")
    timeout: Duration | None = Field(
        None,
        gt=0,
        description="One call that takes longer has failed. Default: `prepare_timeout` and so on.",
    )

    def resolved(self, base: Path) -> CommandSection:
        """With an absolute path; a script without any `/` in it is looked for in PATH."""
        if "/" not in self.command[0]:
            return self
        return self.model_copy(update={"command": [str(base / self.command[0]), *self.command[1:]]})


class WebhookSection(FileModel):
    """An HTTP endpoint that starts and stops it."""

    url: Url = Field(description="Gets a POST for each operation.")
    secret_env: Variable | None = Field(
        None, description="Environment variable with the secret that signs each call (HMAC-SHA256)."
    )
    timeout: Duration = Field(10.0, gt=0, description="One call that takes longer is tried again.")

    @model_validator(mode="after")
    def _check(self) -> WebhookSection:
        _over_http(self.url)
        return self


class SchedulerSection(FileModel):
    """A placement of the scheduling platform in `scaling.scheduler`."""

    placement: Name = Field(description="Its id there.")


class StandbySection(FileModel):
    """How a backend that need not run is started and stopped. One of the five providers is given."""

    process: ProcessSection | None = Field(None, description="A command on this machine.")
    sleep: SleepSection | None = Field(None, description="A vLLM that is put to sleep.")
    command: CommandSection | None = Field(None, description="A script.")
    webhook: WebhookSection | None = Field(None, description="An HTTP endpoint.")
    scheduler: SchedulerSection | None = Field(None, description="The scheduling platform.")
    card: str | None = Field(
        None,
        min_length=1,
        description="Card that it runs on: `H20`. Default: what its label `card` or its profile says.",
    )
    cards: int = Field(1, ge=1, description="How many of them.")
    task: Task = Field("generate", description="What it is for; with model and card it chooses the image.")
    image: str | None = Field(
        None,
        min_length=1,
        description="Image that runs there. Default: by model, card and task (`tidegate images`).",
    )
    cost_per_hour: Money | None = Field(
        None, description="What an hour costs while it runs, in the ledger's currency. Default: unknown."
    )
    cold_start: Duration = Field(
        180.0, gt=0, description="From start to its first answer, until that has been measured."
    )
    prepare_timeout: Duration = Field(1800.0, gt=0, description="Preparing that takes longer has failed.")
    start_timeout: Duration = Field(900.0, gt=0, description="A start that takes longer has failed.")
    stop_timeout: Duration = Field(120.0, gt=0, description="A stop that takes longer is asked for again.")
    drain: Duration = Field(
        300.0, ge=0, description="How long running requests may take to end before it is stopped."
    )
    min_on: Duration = Field(300.0, ge=0, description="It is not stopped sooner after it became ready.")
    min_off: Duration = Field(60.0, ge=0, description="It is not started sooner after it was stopped.")

    @property
    def kind(self) -> str:
        """Name of the provider."""
        return next(name for name in PROVIDERS if getattr(self, name) is not None)

    @model_validator(mode="after")
    def _check(self) -> StandbySection:
        given = [name for name in PROVIDERS if getattr(self, name) is not None]
        if len(given) != 1:
            names = ", ".join(f"`{name}`" for name in PROVIDERS)
            said = f"got {' and '.join(given)}" if given else "got none"
            raise BadValueError(f"give one of {names}: {said}", at=(given[1],) if given else ())
        return self


PROVIDERS = ("process", "sleep", "command", "webhook", "scheduler")
"""In the order of the documentation."""


class Objective(FileModel):
    """What answers are to keep: capacity is started before they miss it."""

    ttft: Duration | None = Field(None, gt=0, description="Mean time to the first token.")
    tpot: Duration | None = Field(None, gt=0, description="Mean time per token after the first.")


class SchedulerPlatform(FileModel):
    """The scheduling platform: asked for capacity, and pushing what it has placed."""

    url: Url = Field(description="Gets scale requests.")
    secret_env: Variable = Field(
        description="Environment variable with the secret that signs both directions (HMAC-SHA256). Two secrets, "
        "divided by a blank, while one is replaced."
    )
    api_key_env: Variable | None = Field(
        None, description="Environment variable with the key that engines of its placements want."
    )
    models: list[ModelName] = Field(
        default_factory=list,
        max_length=100,
        description="Models that always have a placement, so that the first request finds one to wake.",
    )
    networks: list[NetworkText] = Field(
        default_factory=list,
        description="Networks that are not public and in which placements may be all the same: `[10.8.0.0/16]`.",
    )
    timeout: Duration = Field(10.0, gt=0, description="One call that takes longer is tried again.")

    @model_validator(mode="after")
    def _check(self) -> SchedulerPlatform:
        _over_http(self.url)
        return self


class NoticeSection(FileModel):
    """An HTTP endpoint that is told something."""

    url: Url = Field(description="Gets a POST, signed as Standard Webhooks says.")
    secret_env: Variable = Field(
        description="Environment variable with the secret that signs notices and their answers (HMAC-SHA256)."
    )


class BudgetsSection(FileModel):
    """Ceilings of a calendar month, tokens and hours of capacity together, in the ledger's currency."""

    month: Money | None = Field(None, description="All remote sites together.")
    sites: dict[SiteName, Money] = Field(default_factory=dict, description="Single sites.")
    webhook: NoticeSection | None = Field(None, description="Told at 50, 80 and 100 % of each.")


class ScalingConfig(FileModel):
    """When standbys start and stop."""

    mode: Literal["auto", "confirm"] = Field(
        "auto", description="`auto`: plans are executed within budget. `confirm`: each waits for approval."
    )
    up: Fraction = Field(0.8, gt=0, description="Of capacity in use; more is started above.")
    down: Fraction = Field(0.4, ge=0, description="Of capacity in use; some is given back below.")
    least_use: Fraction = Field(
        0.02,
        ge=0,
        lt=1,
        description="Of a standby. It runs while so much of it would be in use, once it is known what is offered.",
    )
    settle: Duration = Field(300.0, ge=0, description="Nothing is given back for so long after a start.")
    most_at_once: int = Field(
        1,
        ge=1,
        description="Starts, and stops, of one model at a time. As many as run, or half of them, may always.",
    )
    forecast: Fraction = Field(
        0.95,
        ge=0,
        lt=1,
        description="Of the forecast's own errors that its margin covers. 0: nothing is forecast.",
    )
    objective: Objective = Field(default_factory=Objective, description="Times to keep.")
    approval: Duration = Field(900.0, gt=0, description="A plan that nobody has approved expires after this.")
    approval_webhook: NoticeSection | None = Field(
        None, description="Told of each plan that waits; it may answer (`POST /plans/ID/answer`)."
    )
    images: Path | None = Field(
        None, description="File of images that goes before the shipped one. Default: that alone."
    )
    budgets: BudgetsSection = Field(default_factory=BudgetsSection, description="Ceilings.")
    keep: bool = Field(
        False, description="Standbys go on running when the proxy stops. Default: they are stopped with it."
    )
    most: dict[SiteName, int] = Field(
        default_factory=dict, description="Standbys of a site that may run at once."
    )
    scheduler: SchedulerPlatform | None = Field(None, description="The scheduling platform.")

    @model_validator(mode="after")
    def _check(self) -> ScalingConfig:
        if self.down >= self.up:
            raise BadValueError("down must be below up", at=("down",))
        return self
