"""try: analyze files without database or network."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from sqlalchemy.exc import SQLAlchemyError

from dicomai import durable, logs
from dicomai.cli.options import Config, Format, FormatOption, load, show
from dicomai.cli.results import COLUMNS
from dicomai.errors import DicomaiError, Misuse, NotDicom, Rejected
from dicomai.roles import connect, installed_versions, reporting
from dicomai.settings import Settings
from dicomai.store import registry
from dicomai.study import Algorithm, Analysis, Instance, Model, Study

if TYPE_CHECKING:
    from dicomai.prepare.pool import Pool


def try_files(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="files and folders")],
    config: Config = None,
    out: Annotated[Path, typer.Option(help="folder for overlays and reports")] = Path(
        "dicomai-out"
    ),
    render: Annotated[
        Path | None,
        typer.Option(help="write every frame as displayed, 8 bits, full size, to this folder"),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="also write the map of every label, and what the network's channels respond to",
        ),
    ] = False,
    how: FormatOption = Format.TABLE,
) -> None:
    """Analyze DICOM files; writes overlays (also as PNG) and reports, needs no daemon.

    By the active version of the model; where there is no database, by the newest that ships.

    With --render, what the model does not accept is rendered, too.
    """
    from dicomai.scoring import decoding_pool

    settings = load(config)
    logs.configure("try")
    named = _files(paths)
    files = list(named)
    if not files:
        raise Misuse("there is no file in " + ", ".join(map(str, paths)))
    with decoding_pool(settings) as pool:
        if render is not None:
            _render(settings, pool, named, render)
        rows = _analyze(settings, pool, files, out, explain)
    columns = ["source", *COLUMNS, "reason_code", "reason"]
    if how is Format.TABLE:
        columns = ["source", "label", "probability", "threshold", "positive", "reason"]
    show(rows, columns, how, "nothing")
    if all(row["label"] is None for row in rows):
        raise NotDicom(f"nothing could be analyzed: {rows[0]['source']}: {rows[0]['reason']}")


def _files(paths: list[Path]) -> dict[Path, Path]:
    """Each file, and its name below the path that was given."""
    found: dict[Path, Path] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            found |= {file: file.relative_to(path) for file in inside}
        elif path.is_file():
            found[path] = Path(path.name)
        else:
            raise Misuse(f"there is no file or folder {path}")
    return found


def _render(settings: Settings, pool: "Pool", files: dict[Path, Path], folder: Path) -> None:
    """NAME.N.png for frame N of each file."""
    from dicomai.prepare import image
    from dicomai.scoring import limits

    if len(set(files.values())) < len(files):
        raise Misuse("--render: two of these files have the same name; give their folder instead")
    calls = [(file, folder / name, limits(settings)) for file, name in files.items()]
    for file, done in zip(files, pool.map(image.render, calls), strict=True):
        if isinstance(done, Rejected):
            typer.echo(f"not rendered: {file}: {done}", err=True)
            continue
        for frame in done:
            if frame.reason is not None:
                typer.echo(f"not rendered: {file}, frame {frame.number}: {frame.reason}", err=True)


def _analyze(
    settings: Settings, pool: "Pool", files: list[Path], out: Path, explain: bool
) -> list[dict[str, Any]]:
    from dicomai.prepare import pixels
    from dicomai.receive import inbox
    from dicomai.scoring import limits

    rows: list[dict[str, Any]] = []
    studies: dict[str, list[Instance]] = {}
    for file in files:
        try:
            pixels.require_size(file, limits(settings))
            header, instance, _ = inbox.read_file(file)
        except Rejected as error:
            rows.append(_refused(file, error))
        else:
            studies.setdefault(header.study_instance_uid, []).append(instance)
    return rows + (_score(settings, pool, studies, out, explain) if studies else [])


def _score(
    settings: Settings, pool: "Pool", studies: dict[str, list[Instance]], out: Path, explain: bool
) -> list[dict[str, Any]]:
    from dicomai.analyze import Context, Scorer, analyze  # torch, only where it is needed
    from dicomai.explain import write_channels, write_label_maps
    from dicomai.infer.engine import load_network
    from dicomai.scoring import header_reader, open_engine, preparer

    model = _model(settings)
    engine = open_engine(settings, model)
    prepare = preparer(settings, pool, model)
    algorithm = Algorithm(model, engine.name, reporting(settings))
    read_header = header_reader(settings, pool)
    scorer = Scorer(algorithm, prepare, read_header, engine.biases, engine.score)
    rows = []
    for uid, instances in studies.items():
        now = datetime.now(UTC)
        study = Study(uid, 1, now, tuple(instances))
        context = Context({}, (), {}, now, out / uid)
        done = analyze(study, scorer, context)
        for result in done.results:
            if result.kind == "sc":
                write_png(result.path)
        if explain:
            write_label_maps(done, scorer, out / uid)
        rows += _rows(done)
    if explain:
        typer.echo("looking for what the network's channels respond to", err=True)
        write_channels(load_network(model), model, out)
    return rows


def _model(settings: Settings) -> Model:
    """The active version, or where no database knows one, that with which a daemon would begin."""
    found = installed_versions(settings)
    if not found:
        raise Misuse(f"infer.model: there is no model '{settings.infer.model}'")
    try:
        active = registry.active_version(connect(settings), settings.infer.model)
    except (DicomaiError, SQLAlchemyError):
        active = None
    return next((model for model in found if model.version == active), found[0])


def write_png(capture: Path) -> Path:
    """An overlay as PNG beside its DICOM file."""
    import cv2
    import pydicom

    png = capture.with_suffix(".png")
    picture = cv2.cvtColor(pydicom.dcmread(capture).pixel_array, cv2.COLOR_RGB2BGR)
    durable.write(png, [cv2.imencode(".png", picture)[1].data])
    return png


def _rows(done: Analysis) -> list[dict[str, Any]]:
    rows = [
        {
            "source": str(item.frame.source.path),
            "study_instance_uid": done.study.study_instance_uid,
            "series_instance_uid": item.frame.source.series_instance_uid,
            "sop_instance_uid": item.frame.source.sop_instance_uid,
            "label": item.label.key,
            "code": item.label.code.value,
            "probability": item.probability,
            "threshold": item.label.threshold,
            "positive": item.positive,
            "model_name": done.model.name,
            "model_version": done.model.version,
            "analyzed_at": item.analyzed_at,
            "reason_code": None,
            "reason": None,
        }
        for item in done.findings
    ]
    return rows + [
        _refused(item.instance.path, Rejected(item.reason, item.code)) for item in done.exclusions
    ]


def _refused(file: Path, error: Rejected) -> dict[str, Any]:
    empty = dict.fromkeys(COLUMNS)
    return {"source": str(file), **empty, "reason_code": error.code, "reason": str(error)}
