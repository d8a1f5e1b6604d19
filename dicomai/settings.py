"""Settings: one TOML file, frozen sections, overrides from the environment."""

import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from dicomai.errors import Misuse
from dicomai.study import Kind

PREFIX = "DICOMAI_"
SHARED = "DICOMAI_SHARED"  # where the tests find real data; no setting
DEFAULT_FILE = Path("config/dicomai.toml")


def shipped(name: str) -> Path:
    """A file or folder that travels with the program: from the wheel, or from the repository."""
    package = Path(__file__).parent
    inside = package / "shipped" / name
    return inside if inside.exists() else package.parent / name


def _ae_title(value: str) -> str:
    # PS3.5 6.2, VR AE: at most 16 characters of the default repertoire, not only spaces, no "\".
    if not value.strip() or len(value) > 16 or "\\" in value or not value.isascii():
        raise ValueError("an AE title has 1 to 16 ASCII characters and no backslash")
    return value.strip()


def _network(value: str) -> str:
    try:
        return str(ipaddress.ip_network(value, strict=False))
    except ValueError:
        raise ValueError(
            f"'{value}' is neither an address nor a network like 10.1.0.0/16"
        ) from None


AETitle = Annotated[str, AfterValidator(_ae_title)]
Network = Annotated[str, AfterValidator(_network)]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Database(_Section):
    """Where the rows live."""

    url: str = "sqlite:///var/dicomai.db"


class Receive(_Section):
    """The Storage SCP."""

    ae_title: AETitle = "DICOMAI"
    host: str = "0.0.0.0"  # a PACS is another machine
    port: Port = 11112
    calling_ae_titles: tuple[AETitle, ...] = ()
    stat_calling_ae_titles: tuple[AETitle, ...] = ()
    addresses: tuple[Network, ...] = ()
    max_associations: int = Field(default=20, ge=1)
    idle_seconds: float = Field(default=60.0, gt=0)
    max_megabytes: int = Field(default=2048, ge=1)
    min_free_megabytes: int = Field(default=1024, ge=0)
    quiet_seconds: Seconds = 10.0
    release_quiet_seconds: Seconds = 2.0
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> "Receive":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: set both or neither")
        if self.tls_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_ca needs tls_certificate and tls_key")
        return self


class Prepare(_Section):
    """Decoding, and what it may cost."""

    workers: int = Field(default=2, ge=1)
    timeout_seconds: float = Field(default=60.0, gt=0)
    memory_megabytes: int = Field(default=1536, ge=256)
    max_megabytes: int = Field(default=512, ge=1)
    max_pixels: int = Field(default=64_000_000, ge=1)
    max_frames: int = Field(default=2000, ge=1)


class Infer(_Section):
    """Scoring."""

    model: str = "chest-starter"
    device: Literal["auto", "cpu", "cuda", "openvino"] = "auto"
    workers: int = Field(default=2, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lease_seconds: float = Field(default=60.0, ge=3)
    max_attempts: int = Field(default=3, ge=1)


class Deliver(_Section):
    """Sending results, and when to try again."""

    timeout_seconds: float = Field(default=30.0, gt=0)
    first_retry_seconds: float = Field(default=5.0, gt=0)
    longest_retry_seconds: float = Field(default=900.0, gt=0)
    max_attempts: int = Field(default=300, ge=1)
    batch_size: int = Field(default=50, ge=1)


class Report(_Section):
    """What results say and look like."""

    layout: Literal["overlay", "side-by-side"] = "overlay"
    undetermined_margin: float = Field(default=0.0, ge=0, le=0.5)
    largest_side: int = Field(default=1536, ge=256)


class Destination(_Section):
    """A PACS that gets results."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    ae_title: AETitle
    host: str
    port: Port
    outputs: tuple[Kind, ...] = ("sc", "sr")
    withdraw: Literal["key-object", "nothing"] = "key-object"
    associations: int = Field(default=1, ge=1, le=16)
    commit: bool = False
    tls_ca: Path | None = None
    tls_name: str | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None

    @model_validator(mode="after")
    def _certificate_has_its_key(self) -> "Destination":
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: set both or neither")
        if self.tls_ca is None and (self.tls_certificate or self.tls_name):
            raise ValueError("tls_certificate and tls_name need tls_ca, which switches TLS on")
        return self


class Retention(_Section):
    """What may be removed once it was sent; 0: nothing."""

    days: int = Field(default=0, ge=0)
    max_gigabytes: float = Field(default=0.0, ge=0)


class Audit(_Section):
    """Where audit events go beside the database."""

    syslog: str = Field(default="", pattern=r"^(|/.+|(udp|tcp|tls)://[^/:]+:[0-9]+)$")
    tls_ca: Path | None = None


class Retrain(_Section):
    """Learning: when, from how much, and what a candidate has to prove.

    cron: "" never by itself; hours: "20-6" only then (local time), "" always
    """

    cron: str = ""
    hours: str = Field(default="", pattern=r"^(([01]?[0-9]|2[0-3])-([01]?[0-9]|2[0-3]))?$")
    min_new_labels: int = Field(default=100, ge=1)
    recipe: Path | None = None
    min_gain: float = Field(default=0.0, ge=0, lt=1)
    margin: float = Field(default=0.03, ge=0, lt=1)


class Schedule(_Section):
    """What happens by the clock (cron: minute hour day month weekday)."""

    sweep: str = "*/10 * * * *"
    retention: str = "30 1 * * *"
    labels: str = "*/5 * * * *"


class Settings(BaseSettings):
    """All settings; config/dicomai.toml explains each key."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__"
    )

    data_dir: Path = Path("var")
    database: Database = Database()
    receive: Receive = Receive()
    prepare: Prepare = Prepare()
    infer: Infer = Infer()
    report: Report = Report()
    deliver: Deliver = Deliver()
    retention: Retention = Retention()
    audit: Audit = Audit()
    schedule: Schedule = Schedule()
    retrain: Retrain = Retrain()
    destinations: tuple[Destination, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> "Settings":
        names = [destination.name for destination in self.destinations]
        if len(set(names)) < len(names):
            raise ValueError("two destinations have the same name")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment wins over the file."""
        return env_settings, init_settings


def load(path: Path | None) -> Settings:
    """Read the settings file, or config/dicomai.toml here, or the one that the program ships.

    Raises Misuse with the key that is wrong.
    """
    if path is None:
        path = DEFAULT_FILE if DEFAULT_FILE.is_file() else shipped("config/dicomai.toml")
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise Misuse(f"there is no settings file {path}: name one with --config") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Misuse(f"cannot read the settings file {path}: {error}") from error
    _refuse_unknown_overrides()
    try:
        return Settings(**values)
    except ValidationError as error:
        raise Misuse(f"settings ({path}): {_first(error)}") from error
    except ValueError as error:  # an override that should be JSON and is not
        raise Misuse(f"settings in the environment: {error}") from error


def _first(error: ValidationError) -> str:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or "settings"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}': correct or remove it"
    return f"'{key}': {problem['msg'].removeprefix('Value error, ')}"


def _refuse_unknown_overrides() -> None:
    # pydantic-settings passes over variables that name no key; a misspelt one must not go unseen.
    for name in os.environ:
        if not name.startswith(PREFIX) or name == SHARED:
            continue
        section, _, key = name.removeprefix(PREFIX).lower().partition("__")
        field = Settings.model_fields.get(section)
        kind = field.annotation if field else None
        keys = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
        if field is None or (key and key not in keys):
            raise Misuse(f"the environment variable {name} names no setting: correct or unset it")


def as_toml_like(settings: Settings) -> dict[str, Any]:
    """Plain values for printing, the password of the database URL hidden."""
    values: dict[str, Any] = settings.model_dump(mode="json")
    url = re.sub(r"(://[^:/@]*:).*@", r"\1***@", values["database"]["url"])
    values["database"]["url"] = re.sub(r"(password=)[^&]*", r"\1***", url)
    return values
