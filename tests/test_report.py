"""The objects that go back: whose they are, who made them, and that they come out the same."""

import io
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import cv2
import make
import numpy as np
import pydicom
import pytest
from peers import complaints, shared
from pydicom.dataset import Dataset
from pydicom.uid import (
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from dicomai.analyze import (
    Context,
    Scorer,
    analyze,
    find,
    score_frames,
    write_overlay,
    write_report,
)
from dicomai.demo.radiographs import set_pixels
from dicomai.infer import package
from dicomai.infer.engine import Engine
from dicomai.receive.inbox import read_file
from dicomai.report.sr import Predecessor
from dicomai.roles import decoding_pool, preparer
from dicomai.settings import Settings, shipped
from dicomai.study import Analysis, Float32, Frame, Study

NOW = datetime(2026, 3, 29, 0, 30, tzinfo=UTC)
NAME = "Yamada^Tarou=山田^太郎=やまだ^たろう"
JAPANESE = ["", "ISO 2022 IR 87"]


@pytest.fixture(scope="module")
def scorer() -> Iterator[Scorer]:
    """The shipped model on the processor."""
    model = package.read(shipped("config/models/chest-starter/1"))
    engine = Engine(model, "cpu")
    settings = Settings()
    with decoding_pool(settings) as pool:
        prepare = preparer(settings, pool, model)
        yield Scorer(model, prepare, engine.name, engine.biases, engine.score)


def study_of(folder: Path, datasets: list[Dataset]) -> Study:
    """A study as the inbox holds it."""
    instances = tuple(read_file(file)[1] for file in make.save(folder / "in", datasets))
    return Study(str(datasets[0].StudyInstanceUID), 1, instances)


def run(scorer: Scorer, folder: Path, *datasets: Dataset, **known: Any) -> Analysis:
    """Analyze one study; known: fields of Context."""
    context = Context(**{"scores": {}, "predecessor": None, "now": NOW, **known}, out=folder)
    return analyze(study_of(folder, list(datasets)), scorer, context)


def read(done: Analysis, kind: str) -> list[Dataset]:
    """The result files of a kind."""
    return [pydicom.dcmread(result.path) for result in done.results if result.kind == kind]


def scores(done: Analysis) -> dict[tuple[str, int], Any]:
    """What the database keeps."""
    return {(p.frame.source.digest, p.frame.number): p.score for p in done.predictions}


def refuse(_: Float32) -> tuple[Float32, Float32]:
    """A network that must not be asked."""
    raise AssertionError("scored twice")


def raw(file: Path | io.BytesIO, keyword: str) -> Any:
    """An element's value as it is encoded."""
    return pydicom.dcmread(file).get_item(keyword).value


def encoded(ds: Dataset) -> io.BytesIO:
    """A dataset as a file."""
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, ds, enforce_file_format=True)
    buffer.seek(0)
    return buffer


def tree(item: Dataset) -> Iterator[Dataset]:
    """All content items below an item."""
    for child in item.get("ContentSequence", []):
        yield child
        yield from tree(child)


def two_of_one_study() -> list[Dataset]:
    """Two radiographs of one patient."""
    study = generate_uid()
    return [make.chest_radiograph(n, study, instance_number=n + 1) for n in range(2)]


# What is made


def test_each_image_gets_one_overlay_and_the_study_one_report(
    scorer: Scorer, tmp_path: Path
) -> None:
    sources = two_of_one_study()
    done = run(scorer, tmp_path, *sources)
    overlays, (report,) = read(done, "sc"), read(done, "sr")
    uids = [ds.SOPInstanceUID for ds in sources]
    assert [ds.SourceImageSequence[0].ReferencedSOPInstanceUID for ds in overlays] == uids
    assert {ds.SOPClassUID for ds in overlays} == {SecondaryCaptureImageStorage}
    assert report.SOPClassUID == EnhancedSRStorage
    evidence = report.CurrentRequestedProcedureEvidenceSequence[0]
    (series,) = {item.SeriesInstanceUID for item in evidence.ReferencedSeriesSequence}
    assert series == sources[0].SeriesInstanceUID
    everything = [*overlays, report]
    assert {ds.StudyInstanceUID for ds in everything} == {sources[0].StudyInstanceUID}
    assert len({ds.SeriesInstanceUID for ds in everything} | {series}) == 3
    assert len({ds.SOPInstanceUID for ds in everything}) == 3
    for result in done.results:
        assert pydicom.dcmread(result.path).file_meta.TransferSyntaxUID == ExplicitVRLittleEndian


def test_a_finding_is_positive_from_its_threshold_on(scorer: Scorer, tmp_path: Path) -> None:
    source = make.chest_radiograph()
    first = run(scorer, tmp_path, source)
    probability = np.float32(first.findings[0].probability)
    for threshold in (probability, np.nextafter(probability, np.float32(1))):
        label = replace(scorer.model.labels[0], threshold=float(threshold))
        other = replace(scorer, model=replace(scorer.model, labels=(label,)))
        (finding,) = run(other, tmp_path, source, scores=scores(first)).findings
        assert finding.positive is bool(threshold == probability)


def test_the_report_states_probability_and_presence(scorer: Scorer, tmp_path: Path) -> None:
    done = run(scorer, tmp_path, make.chest_radiograph())
    (finding,), (report,) = done.findings, read(done, "sr")
    items = list(tree(report))
    (number,) = [i for i in items if i.ConceptNameCodeSequence[0].CodeMeaning == "Probability"]
    percent = float(number.MeasuredValueSequence[0].NumericValue)
    assert percent == pytest.approx(finding.probability * 100, abs=0.01)
    named = {i.ConceptCodeSequence[0].CodeMeaning for i in items if i.ValueType == "CODE"}
    assert ("Present" in named) is finding.positive
    assert ("Absent" in named) is not finding.positive


def test_the_overlay_holds_the_image_above_its_legend(scorer: Scorer, tmp_path: Path) -> None:
    done = run(scorer, tmp_path, make.chest_radiograph())
    (overlay,) = read(done, "sc")
    frame = done.predictions[0].frame
    rows, columns = frame.display.shape
    picture = overlay.pixel_array
    assert picture.shape[0] > rows
    assert picture.shape[1:] == (columns, 3)
    # At most half of the light is the heat map's.
    assert (picture[:rows].max(axis=2) >= np.floor(frame.display * 0.5)).all()
    assert overlay.BurnedInAnnotation == "YES"


def test_each_frame_gets_its_own_overlay(scorer: Scorer, tmp_path: Path) -> None:
    ds = make.computed_radiograph(NumberOfFrames=2)
    ds.PixelData = ds.PixelData + ds.PixelData[::-1]
    done = run(scorer, tmp_path, ds)
    numbers = [x.SourceImageSequence[0].ReferencedFrameNumber for x in read(done, "sc")]
    assert numbers == [1, 2]
    assert len({result.sop_instance_uid for result in done.results}) == 3


@pytest.mark.parametrize("build", [make.chest_radiograph, make.computed_radiograph])
def test_an_image_that_states_its_one_frame_is_like_any_other(
    scorer: Scorer, tmp_path: Path, build: Callable[..., Dataset]
) -> None:
    done = run(scorer, tmp_path, build(NumberOfFrames=1))
    assert [result.kind for result in done.results] == ["sc", "sr"]
    assert complaints([result.path for result in done.results]) == []


# The same again


def test_results_made_again_from_stored_scores_are_the_same_bytes(
    scorer: Scorer, tmp_path: Path
) -> None:
    sources = two_of_one_study()
    first = run(scorer, tmp_path / "first", *sources)
    time.sleep(1.1)  # so that whatever looks at the clock gives itself away
    later = NOW + timedelta(days=100)
    careful = replace(scorer, predict=refuse)
    again = run(careful, tmp_path / "again", *sources, scores=scores(first), now=later)
    assert [r.sop_instance_uid for r in again.results] == [
        r.sop_instance_uid for r in first.results
    ]
    for old, new in zip(first.results, again.results, strict=True):
        assert old.path.read_bytes() == new.path.read_bytes()


def test_an_image_that_arrives_later_leaves_the_earlier_overlay_as_it_was(
    scorer: Scorer, tmp_path: Path
) -> None:
    sources = two_of_one_study()
    first = run(scorer, tmp_path / "first", sources[0])
    later = NOW + timedelta(hours=1)
    both = run(scorer, tmp_path / "both", *sources, scores=scores(first), now=later)
    before, after = first.results[0], both.results[0]
    assert before.path.read_bytes() == after.path.read_bytes()
    assert first.results[-1].sop_instance_uid != both.results[-1].sop_instance_uid
    assert first.results[-1].series_instance_uid == both.results[-1].series_instance_uid


def test_other_content_under_the_same_uid_gets_other_results(
    scorer: Scorer, tmp_path: Path
) -> None:
    ds = make.chest_radiograph()
    first = run(scorer, tmp_path / "first", ds)
    ds.PixelData = ds.PixelData[::-1]
    second = run(scorer, tmp_path / "second", ds)
    uids = [{r.sop_instance_uid for r in done.results} for done in (first, second)]
    assert not uids[0] & uids[1]


# What fails


def test_a_damaged_image_fails_alone(scorer: Scorer, tmp_path: Path) -> None:
    good, bad = two_of_one_study()
    bad.PixelData = bad.PixelData[:1000]
    done = run(scorer, tmp_path, bad, good)
    (exclusion,) = done.exclusions
    assert exclusion.code == "truncated"
    assert exclusion.instance.sop_instance_uid == bad.SOPInstanceUID
    assert [r.source_sop_instance_uid for r in done.results] == [good.SOPInstanceUID, None]


def test_an_image_whose_file_is_gone_is_named_and_the_others_are_analyzed(
    scorer: Scorer, tmp_path: Path
) -> None:
    study = study_of(tmp_path, two_of_one_study())
    study.instances[0].path.unlink()
    context = Context({}, None, NOW, tmp_path / "out")
    done = analyze(study, scorer, context)
    assert "send it again" in done.exclusions[0].reason
    assert len(done.findings) == 1


def test_an_image_with_float_pixels_does_not_take_its_study_with_it(
    scorer: Scorer, tmp_path: Path
) -> None:
    good, other = two_of_one_study()
    pixels = np.frombuffer(other.PixelData, np.uint8).astype(np.float32)
    del other.PixelData
    other.FloatPixelData, other.BitsAllocated = pixels.tobytes(), 32
    for keyword in ("BitsStored", "HighBit", "PixelRepresentation"):
        del other[keyword]
    done = run(scorer, tmp_path, other, good)
    assert good.SOPInstanceUID in [r.source_sop_instance_uid for r in done.results]


def test_where_no_image_is_accepted_nothing_is_made(scorer: Scorer, tmp_path: Path) -> None:
    done = run(scorer, tmp_path, make.chest_radiograph(ViewPosition="LL"))
    assert [e.code for e in done.exclusions] == ["wrong-view"]
    assert done.results == done.findings == ()
    assert not list(tmp_path.glob("*.dcm"))


# Whose it is

VERBATIM: dict[str, Any] = {
    "SpecificCharacterSet": JAPANESE,
    "PatientName": NAME,
    "PatientID": "00012 3",
    "IssuerOfPatientID": "HOSPITAL",
    "PatientSex": "O",
    "PatientBirthDate": "19700228",
    "TimezoneOffsetFromUTC": "+0900",
    "AccessionNumber": "A-1",
    "StudyDate": "20240131",
    "StudyTime": "235959.123456",
    "StudyID": "7",
    "StudyDescription": "胸部",
    "ReferringPhysicianName": "Suzuki^Hanako=鈴木^花子",
}


def test_identity_is_copied_verbatim(scorer: Scorer, tmp_path: Path) -> None:
    source = make.chest_radiograph(**VERBATIM)
    done = run(scorer, tmp_path, source)
    for result in done.results:
        for keyword in VERBATIM:
            wanted = raw(encoded(source), keyword)
            assert raw(result.path, keyword) == wanted, f"{result.kind} {keyword}"
        read_back = pydicom.dcmread(result.path)
        assert read_back.PatientName.ideographic == "山田^太郎"
        assert read_back.SpecificCharacterSet == JAPANESE


def test_dates_are_in_the_time_zone_of_the_source(scorer: Scorer, tmp_path: Path) -> None:
    done = run(scorer, tmp_path, make.chest_radiograph(TimezoneOffsetFromUTC="-0330"))
    for ds in (pydicom.dcmread(result.path) for result in done.results):
        assert (ds.InstanceCreationDate, ds.InstanceCreationTime) == ("20260328", "210000")
        assert (ds.ContentDate, ds.ContentTime) == ("20260328", "210000")


@pytest.mark.parametrize("offset", ["+2500", "Z", "+09:00"])
@pytest.mark.filterwarnings("ignore:The value length:UserWarning")
def test_an_impossible_time_zone_does_not_fail_the_study(
    scorer: Scorer, tmp_path: Path, offset: str
) -> None:
    done = run(scorer, tmp_path, make.chest_radiograph(TimezoneOffsetFromUTC=offset))
    assert [result.kind for result in done.results] == ["sc", "sr"]


TYPE_2 = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime",
    "StudyID", "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


@pytest.mark.parametrize("how", ["missing", "empty"])
def test_what_the_source_leaves_out_is_present_and_empty(
    scorer: Scorer, tmp_path: Path, how: str
) -> None:
    value = None if how == "missing" else ""
    bare = ("SpecificCharacterSet", "TimezoneOffsetFromUTC")
    source = make.computed_radiograph(**dict.fromkeys(TYPE_2, value))
    del source.SpecificCharacterSet
    done = run(scorer, tmp_path, source)
    for ds in (pydicom.dcmread(result.path) for result in done.results):
        for keyword in TYPE_2:
            assert keyword in ds, keyword
            assert not ds[keyword].value, keyword
        assert not [keyword for keyword in bare if keyword in ds]


# Who made it


def test_the_scanner_is_named_only_as_acquisition_equipment(scorer: Scorer, tmp_path: Path) -> None:
    source = make.chest_radiograph(
        Manufacturer="SCANNER-MAKER",
        ManufacturerModelName="SCANNER-MODEL",
        DeviceSerialNumber="SCANNER-SERIAL",
        SoftwareVersions="SCANNER-SOFTWARE",
        StationName="SCANNER-STATION",
        DeviceUID="1.2.3.4444",
    )
    for result in run(scorer, tmp_path, source).results:
        ds = pydicom.dcmread(result.path)
        assert ds.Manufacturer == "dicomai"
        assert scorer.model.version in ds.SoftwareVersions[1]
        contributed = {
            item.PurposeOfReferenceCodeSequence[0].CodeMeaning: item
            for item in ds.ContributingEquipmentSequence
        }
        assert contributed["Processing Equipment"].Manufacturer == "dicomai"
        del contributed["Acquisition Equipment"]
        ds.ContributingEquipmentSequence = list(contributed.values())
        assert b"SCANNER-" not in encoded(ds).getvalue()
        assert b"1.2.3.4444" not in encoded(ds).getvalue()


def test_the_device_changes_with_the_version_of_the_model(scorer: Scorer, tmp_path: Path) -> None:
    source = make.chest_radiograph()
    newer = replace(scorer, model=replace(scorer.model, version="2"))
    first, second = run(scorer, tmp_path / "1", source), run(newer, tmp_path / "2", source)
    for old, new in zip(first.results, second.results, strict=True):
        assert old.sop_instance_uid != new.sop_instance_uid
        assert old.series_instance_uid != new.series_instance_uid
        assert pydicom.dcmread(old.path).DeviceUID != pydicom.dcmread(new.path).DeviceUID


def test_a_report_names_the_one_that_it_replaces(scorer: Scorer, tmp_path: Path) -> None:
    source = make.chest_radiograph()
    earlier = Predecessor(generate_uid(), generate_uid())
    done = run(scorer, tmp_path, source, predecessor=earlier)
    (report,) = read(done, "sr")
    (named,) = report.PredecessorDocumentsSequence
    assert named.StudyInstanceUID == source.StudyInstanceUID
    (series,) = named.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == earlier.series_instance_uid
    (before,) = series.ReferencedSOPSequence
    assert before.ReferencedSOPInstanceUID == earlier.sop_instance_uid
    assert before.ReferencedSOPClassUID == EnhancedSRStorage
    assert report.SOPInstanceUID != read(run(scorer, tmp_path, source), "sr")[0].SOPInstanceUID


# Referees

SHAPES = {
    "DX": make.chest_radiograph,
    "CR": make.computed_radiograph,
    "large": make.large_radiograph,
    "Japanese": lambda: make.chest_radiograph(**VERBATIM),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_referees_have_nothing_to_say(scorer: Scorer, tmp_path: Path, shape: str) -> None:
    source = SHAPES[shape]()
    done = run(scorer, tmp_path, source)
    assert complaints([result.path for result in done.results]) == []


def test_the_referees_accept_a_report_of_several_images_with_a_predecessor(
    scorer: Scorer, tmp_path: Path
) -> None:
    earlier = Predecessor(generate_uid(), generate_uid())
    done = run(scorer, tmp_path, *two_of_one_study(), predecessor=earlier)
    assert complaints([result.path for result in done.results]) == []


@pytest.mark.parametrize("shape", [(3, 3), (10, 400), (400, 10)])
def test_the_smallest_image_has_an_overlay_whose_legend_fits(
    tmp_path: Path, shape: tuple[int, int], scorer: Scorer
) -> None:
    ds = make.chest_radiograph()
    set_pixels(ds, np.zeros(shape, np.uint8), bits_stored=8)
    anything = replace(scorer.model, accepts=make.accepts(min_size=1))
    settings = Settings()
    with decoding_pool(settings) as pool:
        prepare = preparer(settings, pool, anything)
        (overlay,) = read(run(replace(scorer, model=anything, prepare=prepare), tmp_path, ds), "sc")
    assert overlay.Columns == max(256, shape[1])
    assert overlay.Rows > shape[0]


def test_overlay_and_report_of_a_large_image_are_built_in_a_fraction_of_a_second(
    scorer: Scorer, tmp_path: Path
) -> None:
    study = study_of(tmp_path, [make.large_radiograph()])
    context = Context({}, None, NOW, tmp_path / "out")
    ((header, frame),) = scorer.prepare(study.instances)  # type: ignore[misc]
    assert isinstance(frame, Frame)
    (prediction,) = score_frames([frame], scorer, context)
    findings = find(prediction, scorer.model)
    headers = {frame.source.sop_instance_uid: header}
    threads, best = cv2.getNumThreads(), float("inf")
    cv2.setNumThreads(1)
    try:
        for _ in range(5):
            started = time.perf_counter()
            write_overlay(headers, findings, scorer, context)
            write_report(headers, tuple(findings), scorer, context)
            best = min(best, time.perf_counter() - started)
    finally:
        cv2.setNumThreads(threads)
    print(f"\noverlay and report of 2500 x 2048 pixels: {best * 1e3:.0f} ms")
    assert best < 0.4  # 0.2 measured; the rest is for what else runs here


NAMED = (
    "SpecificCharacterSet",
    "PatientName",
    "PatientID",
    "PatientSex",
    "PatientBirthDate",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def test_every_character_set_of_the_real_files_comes_back_verbatim(
    scorer: Scorer, tmp_path: Path
) -> None:
    files = sorted((shared() / "data/dicom").glob("*/chr*.dcm"))
    sets = set()
    for number, file in enumerate(files):
        named = pydicom.dcmread(file)
        if "PatientName" not in named:
            continue
        ds = make.chest_radiograph()
        for keyword in NAMED:
            if keyword in named:
                ds[keyword] = named[keyword]
        sets.add(str(named.SpecificCharacterSet))
        done = run(scorer, tmp_path / str(number), ds)
        written = [result.path for result in done.results]
        for path in written:
            result = pydicom.dcmread(path)
            untouched = pydicom.dcmread(done.study.instances[0].path)
            assert result.SpecificCharacterSet == untouched.SpecificCharacterSet, file
            for keyword in NAMED[1:]:  # the bytes, before anything has decoded them
                if keyword in named:
                    wanted = untouched.get_item(keyword).value or b""
                    assert (result.get_item(keyword).value or b"").strip() == wanted.strip(), file
        assert complaints(written) == [], file
    assert len(sets) >= 12
