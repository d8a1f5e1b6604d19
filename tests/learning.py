"""The shared collection of radiographs as data to learn from, without a database."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import make
from peers import shared

from dicomai.infer import package
from dicomai.scoring import decoding_pool, limits
from dicomai.settings import Settings
from dicomai.store.truth import Candidate
from dicomai.train.dataset import Data, gather
from dicomai.train.examples import read_examples
from dicomai.train.recipe import Recipe


def collection(recipe: Recipe, sources: Sequence[str] = ()) -> Data:
    """Images of the collection with their own split; sources: only these, or all."""
    folder = shared() / "data/cxr"
    found = read_examples(folder, folder / "labels.csv", recipe.keys, None, "cxr", _quietly)
    candidates = [
        Candidate(
            name=Path(item.path).name,
            path=item.path,
            digest=item.digest,
            patient=item.patient_id,
            source=item.source,
            split=item.split,
            said={key: [("file", value)] for key, value in item.labels.items()},
            facts={"sex": item.sex, "age_years": item.age_years, "view": item.view},
        )
        for item in found.examples
        if not sources or item.source in sources
    ]
    settings = Settings()
    with decoding_pool(settings) as pool:
        return gather(
            candidates,
            recipe.keys,
            recipe.size,
            package.read(make.STARTER).accepts,
            lambda item: Path(item.path),
            pool,
            limits(settings),
            {},
            (),
            (),
            lambda items, _: items,
        ).data


def _quietly(paths: Sequence[Path], _words: str) -> Iterable[Path]:
    return paths
