"""Packages from site to site: as one file, verified, and nothing but data."""

import hashlib
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import blobs
import make
import pytest
from daemon import command

from dicomai.errors import DicomaiError, Misuse
from dicomai.infer import package
from dicomai.packing import pack, unpack
from dicomai.settings import load
from dicomai.store import registry
from dicomai.store.database import open_database

SHIPPED = make.STARTER


def nobody(_name: str, _version: str) -> None:
    """No version is known."""


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """The shipped model, exported."""
    file = tmp_path / "chest.zip"
    pack(package.read(SHIPPED), file)
    return file


def test_what_was_exported_comes_back_byte_for_byte(packed: Path, tmp_path: Path) -> None:
    model = unpack(packed, tmp_path / "models", nobody)
    assert model.path == tmp_path / "models/chest-starter/2"
    for file in SHIPPED.iterdir():
        assert (model.path / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["chest-starter"]


def test_a_file_that_exists_is_not_written_over(packed: Path) -> None:
    with pytest.raises(Misuse, match="exists already"):
        pack(package.read(SHIPPED), packed)


def test_a_version_that_is_installed_is_not_replaced(packed: Path, tmp_path: Path) -> None:
    unpack(packed, tmp_path / "models", nobody)
    with pytest.raises(Misuse, match="chest-starter 2 is installed already"):
        unpack(packed, tmp_path / "models", nobody)


def refused(file: Path, folder: Path, known: Callable[[str, str], str | None] = nobody) -> str:
    """The one line with which a file is refused; nothing is left of it."""
    with pytest.raises(DicomaiError) as caught:
        unpack(file, folder / "models", known)
    assert "\n" not in str(caught.value)
    assert list((folder / "models").glob("**/*")) == []
    return str(caught.value)


def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.zip"
    assert "there is no file" in refused(file, tmp_path)
    file.write_bytes(b"no zip file")
    assert "is no package, or damaged" in refused(file, tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../etc/model.toml", "name = 1")
    assert "it holds ../../etc/model.toml" in refused(file, tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights.py", "print()")
    assert "it holds weights.py" in refused(file, tmp_path)


def test_damaged_weights_are_refused(packed: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(work)
    weights = work / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = shutil.make_archive(str(tmp_path / "again"), "zip", work)
    assert "is damaged (SHA-256" in refused(Path(again), tmp_path)


def test_weights_that_cannot_be_loaded_are_refused(packed: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(work)
    (work / "weights.safetensors").write_bytes(b"no weights")
    before = package.read(SHIPPED).sha256
    after = hashlib.sha256(b"no weights").hexdigest()
    toml = work / "model.toml"
    toml.write_text(toml.read_text().replace(before, after))
    again = shutil.make_archive(str(tmp_path / "again"), "zip", work)
    assert "weights.safetensors does not fit" in refused(Path(again), tmp_path)


def test_a_damaged_archive_and_another_package_of_the_same_name_are_refused(
    packed: Path, tmp_path: Path
) -> None:
    assert "is not the chest-starter 2 that was here before" in refused(
        packed, tmp_path, lambda _name, _version: "0" * 64
    )
    work = tmp_path / "work"
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(work)
    again = Path(shutil.make_archive(str(tmp_path / "again"), "zip", work))
    data = bytearray(again.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 64] = b"\xff" * 64
    again.write_bytes(data)
    assert "again.zip is no package, or damaged" in refused(again, tmp_path)


def test_the_commands_install_a_candidate_that_a_person_activates(tmp_path: Path) -> None:
    config = blobs.site(tmp_path)
    work = Path(shutil.copytree(SHIPPED, tmp_path / "work"))
    toml = work / "model.toml"
    toml.write_text(toml.read_text().replace('version = "2"', 'version = "7"', 1))
    file = tmp_path / "seven.zip"
    pack(package.read(work), file)
    done = command(config, "model", "import", str(file))
    assert done.returncode == 0, done.stderr
    assert "chest-starter 7 is installed" in done.stdout
    database = open_database(load(config).database.url)
    assert registry.active_version(database, "chest-starter") == "2"
    assert command(config, "model", "activate", "chest-starter", "7").returncode == 0
    assert registry.active_version(database, "chest-starter") == "7"
    out = tmp_path / "out.zip"
    assert command(config, "model", "export", "chest-starter", "7", str(out)).returncode == 0
    with zipfile.ZipFile(file) as one, zipfile.ZipFile(out) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {
            i.filename: i.CRC for i in other.infolist()
        }
    unknown = command(config, "model", "activate", "chest-starter", "9")
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
