"""A model package as one file, from site to site."""

import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from dicomai import durable
from dicomai.errors import Misuse, ModelDamaged
from dicomai.infer import package
from dicomai.infer.engine import try_out
from dicomai.study import Model
from dicomai.train import ancestry

# What a package may hold: data, and no folders.
FILES = {
    "model.toml",
    package.WEIGHTS,
    *package.INT8,
    "evaluation.json",
    "learnt.json",
    "README.md",
    "LICENSE",
}
MOST_BYTES = 4 << 30


def pack(model: Model, file: Path) -> None:
    """Write a package into a new zip file. Raises Misuse where there is one already."""
    package.verify(model)
    if file.exists():
        raise Misuse(f"{file} exists already: name a new file")
    with zipfile.ZipFile(file, "x", zipfile.ZIP_STORED) as archive:
        for part in sorted(model.path.iterdir()):
            if part.name in FILES:
                archive.write(part, part.name)


def unpack(file: Path, models: Path, known: Callable[[str, str], str | None]) -> Model:
    """Install a packed package below models, all or nothing, verified and loaded once.

    known: the SHA-256 that a name and version are known by. Raises Misuse where it is no package,
    or its version is another one here, ModelDamaged where it is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            return _install(archive, file, models, known)
    except FileNotFoundError:
        raise Misuse(f"there is no file {file}") from None
    # What zipfile makes of damage, encryption and methods that it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise ModelDamaged(f"{file} is no package, or damaged: export it again") from error


def _install(
    archive: zipfile.ZipFile, file: Path, models: Path, known: Callable[[str, str], str | None]
) -> Model:
    parts = archive.infolist()
    foreign = [part.filename for part in parts if part.filename not in FILES]
    if foreign or not parts:
        raise Misuse(
            f"{file} is no exported package: it holds {foreign[0] if foreign else 'nothing'}"
        )
    if sum(part.file_size for part in parts) > MOST_BYTES:
        raise Misuse(f"{file} would take more than {MOST_BYTES >> 30} GB")
    durable.make_folder(models)
    # Deeper than packages are looked for.
    around = models / f"{file.stem}{durable.TEMPORARY}"
    work = around / "new" / "package"
    shutil.rmtree(around, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        for part in parts:
            with archive.open(part) as source, (work / part.filename).open("wb") as target:
                shutil.copyfileobj(source, target)
            durable.sync_file(work / part.filename)
        model = package.read(work)
        try_out(model)
        ancestry.read(work)
        folder = models / model.name / model.version
        if folder.exists():
            raise Misuse(f"{model.name} {model.version} is installed already: {folder}")
        if known(model.name, model.version) not in {None, model.digest}:
            raise Misuse(
                f"{file} is not the {model.name} {model.version} that was here before: export it "
                "under another version"
            )
        durable.make_folder(folder.parent)
        work.rename(folder)
        durable.sync_folder(folder.parent)
    finally:
        shutil.rmtree(around, ignore_errors=True)
    return package.read(folder)
