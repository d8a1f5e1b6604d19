"""What an image costs whose model has 1, 2, 4, 8 labels: from the file to its results on disk."""

import hashlib
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import make
import torch
from safetensors.torch import load_file, save_file

from dicomai.analyze import Context, Scorer, analyze
from dicomai.infer import package
from dicomai.infer.batcher import Batcher
from dicomai.receive import inbox
from dicomai.roles import outputs, reporting
from dicomai.scoring import decoding_pool, header_reader, open_engine, preparer
from dicomai.settings import Destination, Infer, Settings
from dicomai.study import Algorithm, Model, Study

LABELS = (1, 2, 4, 8)
THRESHOLDS = {"all absent": 0.999999, "all present": 0.000001}
LABEL = """[[labels]]
key = "finding_{number}"
threshold = {threshold:.6f}
code = ["{number}", "99BENCH", "Finding {number}"]

"""


def starter_with(folder: Path, labels: int, threshold: float) -> Model:
    """The starter with its one label so many times, under other names."""
    shutil.copytree(make.STARTER, folder)
    weights = folder / "weights.safetensors"
    state = load_file(weights)
    for name in ("resnet.fc.weight", "resnet.fc.bias"):
        state[name] = torch.cat([state[name]] * labels)
    weights.unlink()  # it may be a link
    save_file(state, weights)
    file = folder / "model.toml"
    before, _, after = file.read_text().partition("[[labels]]")
    made = "".join(LABEL.format(number=n + 1, threshold=threshold) for n in range(labels))
    text = before + made + after[after.index("[provenance]") :]
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    file.write_text(text.replace(package.read(make.STARTER).sha256, sha256))
    return package.read(folder)


def settings(root: Path) -> Settings:
    """One destination that gets overlays and reports."""
    pacs = Destination(name="pacs", ae_title="PACS", host="127.0.0.1", port=104)
    return Settings(data_dir=root / "data", destinations=(pacs,), infer=Infer(device="openvino"))


@contextmanager
def analyzed_by(root: Path, model: Model) -> Iterator[Any]:
    """Yields what analyzes a study, as the worker does, with neither database nor network."""
    chosen = settings(root)
    engine = open_engine(chosen, model)
    batcher = Batcher(engine.score, chosen.infer.batch_size)
    with decoding_pool(chosen) as pool:
        scorer = Scorer(
            Algorithm(model, engine.name, reporting(chosen)),
            preparer(chosen, pool, model),
            header_reader(chosen, pool),
            engine.biases,
            batcher.predict,
        )

        def act(study: Study, out: Path) -> Any:
            now = datetime.now(UTC)
            return analyze(study, scorer, Context({}, (), outputs(chosen), now, out))

        yield act
    batcher.close()


def radiograph(root: Path) -> Study:
    """A study of one image of 2500 x 2048 pixels."""
    (file,) = make.save(root / "image", [make.large_radiograph("1.2.3")])
    header, item, _ = inbox.read_file(file)
    return Study(header.study_instance_uid, 1, datetime.now(UTC), (item,))


def milliseconds(root: Path, rounds: int) -> Iterator[tuple[str, int, float]]:
    """What is found, how many labels, and what the image cost, in turn."""
    study, out = radiograph(root), root / "results"
    kinds = [(name, labels) for name in THRESHOLDS for labels in LABELS]
    with ExitStack() as open_engines:
        acts = {}
        for name, labels in kinds:
            model = starter_with(root / f"{name} {labels}", labels, THRESHOLDS[name])
            acts[name, labels] = open_engines.enter_context(analyzed_by(root, model))
        for turn in range(rounds + 1):
            for name, labels in kinds:
                began = time.perf_counter()
                done = acts[name, labels](study, out)
                cost = (time.perf_counter() - began) * 1000
                assert len(done.findings) == labels
                shutil.rmtree(out)
                if turn:  # in the first, processes start
                    yield name, labels, cost
