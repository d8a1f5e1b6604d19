"""Settings: every key is explained in the shipped file, and a wrong one is named in one line."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from daemon import command
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dicomai import settings
from dicomai.errors import Misuse
from dicomai.settings import Settings, as_toml_like, shipped

SHIPPED = shipped("config/dicomai.toml").read_text()
DESTINATION = '[[destinations]]\nname = "{}"\nae_title = "A"\nhost = "h"\nport = 104\n'
SECRET = "s3cret"


@pytest.fixture(autouse=True)
def as_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what the other tests set."""
    monkeypatch.delenv("DICOMAI_INFER__DEVICE")


def keys(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the settings with its default, the sections' and destinations' included."""
    for name, field in section.model_fields.items():
        inner = next(
            (
                kind
                for kind in (field.annotation, *get_args(field.annotation))
                if isinstance(kind, type) and issubclass(kind, BaseModel)
            ),
            None,
        )
        if inner is None:
            yield prefix + name, field.default
        else:
            yield from keys(inner, f"{prefix}{name}.")


def written(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a TOML file with its value; of an array of tables, those of the first."""
    for name, value in values.items():
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict):
            yield from written(first, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def uncommented() -> dict[str, Any]:
    """The shipped file with the example of a destination in force."""
    return tomllib.loads(re.sub(r"(?m)^# (?=\[\[|\w+ = )", "", SHIPPED))


def load(folder: Path, text: str) -> Settings:
    """Settings from a file with this text."""
    file = folder / "dicomai.toml"
    file.write_text(text)
    return settings.load(file)


def complaint(folder: Path, text: str) -> str:
    """The one line that refuses a file with this text."""
    with pytest.raises(Misuse) as caught:
        load(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_key_is_in_the_shipped_file_with_its_default() -> None:
    in_file = dict(written(uncommented()))
    in_code = dict(keys(Settings))
    assert in_file.keys() == in_code.keys()
    for key, default in in_code.items():
        if (
            default is not PydanticUndefined and default is not None
        ):  # None: an example stands there
            plain = list(default) if isinstance(default, tuple) else default
            assert in_file[key] == (str(plain) if isinstance(plain, Path) else plain), key


def test_the_shipped_file_says_the_same_as_no_file(tmp_path: Path) -> None:
    assert load(tmp_path, SHIPPED) == load(tmp_path, "") == Settings()


def test_the_example_of_a_destination_can_be_used_as_it_stands() -> None:
    (destination,) = Settings(**uncommented()).destinations
    assert (destination.name, destination.outputs) == ("pacs", ("sc", "sr"))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('data_dri = "var"', "'data_dri'"),
        ("[receive]\nprot = 104", "'receive.prot'"),
        ("[recieve]\nport = 104", "'recieve'"),
        ("receive.port = 104\n[receive.port]", "line 2"),
        (DESTINATION.format("a") + "aet = 'B'", "'destinations.0.aet'"),
        ("[[destinations]]\nname = 'a'", "'destinations.0.ae_title'"),
        ("[destinations]\nname = 'a'", "'destinations'"),
        ('[receive]\nport = "dicom"', "'receive.port'"),
        ("[receive]\nport = 0", "'receive.port'"),
        ("[receive]\nport = 65536", "'receive.port'"),
        ("[receive]\nquiet_seconds = -1", "'receive.quiet_seconds'"),
        ("[receive]\nae_title = 'SEVENTEEN_LETTERS'", "'receive.ae_title'"),
        ("[receive]\nae_title = 'A\\B'", "'receive.ae_title'"),
        ("[receive]\nae_title = '  '", "'receive.ae_title'"),
        ("[receive]\nae_title = 'MÜNCHEN'", "'receive.ae_title'"),
        ("[receive]\ncalling_ae_titles = ['CT1', '']", "'receive.calling_ae_titles.1'"),
        ("[infer]\ndevice = 'gpu'", "'infer.device'"),
        ("[infer]\nworkers = 0", "'infer.workers'"),
        (DESTINATION.format("a") + "outputs = ['png']", "'destinations.0.outputs.0'"),
        (DESTINATION.format("a b"), "'destinations.0.name'"),
        (DESTINATION.format("a") + DESTINATION.format("a"), "destinations"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(tmp_path: Path, text: str, key: str) -> None:
    assert key in complaint(tmp_path, text)


def test_the_ae_title_loses_its_padding(tmp_path: Path) -> None:
    assert load(tmp_path, "[receive]\nae_title = ' DICOMAI '").receive.ae_title == "DICOMAI"


def test_the_environment_overrides_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_RECEIVE__PORT", "104")
    monkeypatch.setenv("DICOMAI_DATA_DIR", "/srv/dicomai")
    found = load(tmp_path, "data_dir = 'here'\n[receive]\nport = 4242\nae_title = 'KEPT'")
    assert (found.data_dir, found.receive.port) == (Path("/srv/dicomai"), 104)
    assert found.receive.ae_title == "KEPT"


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("DICOMAI_RECEIVE__PROT", "104", "DICOMAI_RECEIVE__PROT"),
        ("DICOMAI_RECIEVE__PORT", "104", "DICOMAI_RECIEVE__PORT"),
        ("DICOMAI_RECEIVE__PORT__NUMBER", "104", "DICOMAI_RECEIVE__PORT__NUMBER"),
        ("DICOMAI_DESTINATIONS__0__PORT", "104", "DICOMAI_DESTINATIONS__0__PORT"),
        ("DICOMAI_DATA_DRI", "/srv", "DICOMAI_DATA_DRI"),
        ("DICOMAI_RECEIVE__PORT", "dicom", "'receive.port'"),
        ("DICOMAI_RECEIVE", '{"prot": 104}', "'receive.prot'"),
        ("DICOMAI_DESTINATIONS", "[", "destinations"),
    ],
)
def test_a_wrong_variable_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, named: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert named in complaint(tmp_path, "")


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql+psycopg://user:{SECRET}@db:5432/dicomai",
        f"postgresql+psycopg://:{SECRET}@db/dicomai",
        f"postgresql+psycopg://user:{SECRET}%40home@db/dicomai",
        f"postgresql+psycopg://user:{SECRET}//more@db/dicomai",
        f"postgresql+psycopg://user@db/dicomai?password={SECRET}",
    ],
)
def test_the_password_is_hidden_and_the_rest_of_the_url_is_not(url: str) -> None:
    shown = as_toml_like(Settings(database=settings.Database(url=url)))["database"]["url"]
    assert SECRET not in shown
    assert "db" in shown


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    for url in ("sqlite:///var/dicomai.db", "postgresql+psycopg://user@db:5432/dicomai"):
        shown = as_toml_like(Settings(database=settings.Database(url=url)))["database"]["url"]
        assert shown == url


def test_config_show_prints_what_is_in_force_without_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DICOMAI_DATABASE__URL", f"postgresql+psycopg://user:{SECRET}@db/dicomai")
    monkeypatch.setenv("DICOMAI_RECEIVE__PORT", "10404")
    file = tmp_path / "dicomai.toml"
    file.write_text("[receive]\nae_title = 'HERE'")
    done = command(file, "config", "show")
    assert (done.returncode, done.stderr) == (0, "")
    assert SECRET not in done.stdout
    for words in ("postgresql+psycopg://user:***@db/dicomai", "10404", "HERE"):
        assert words in done.stdout
