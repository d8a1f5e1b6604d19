"""Makes the results of a study again, from what the database and the inbox keep of it.

python tests/rebuild.py SETTINGS STUDY_INSTANCE_UID OUT NOW
The network is not asked; NOW (ISO 8601) is what the clock shows.
"""

import sys
from datetime import datetime
from pathlib import Path

from dicomai.analyze import Context, Scorer, analyze
from dicomai.infer.engine import Engine
from dicomai.roles import choose_model, connect, outputs, reporting
from dicomai.scoring import decoding_pool, header_reader, preparer
from dicomai.settings import load
from dicomai.store import queries
from dicomai.study import Algorithm, Float32, Instance, Study


def refuse(_: Float32) -> tuple[Float32, Float32]:
    """A network that must not be asked."""
    raise AssertionError("scored twice")


def main(config: Path, uid: str, out: Path, now: datetime) -> None:
    """Write the results below out; print what they would replace."""
    settings = load(config)
    database = connect(settings)
    model = choose_model(settings, database)
    engine = Engine(model, "cpu")
    row = queries.one_study(database, uid)
    assert row is not None
    instances = tuple(
        Instance(
            item["sop_instance_uid"],
            item["sop_class_uid"],
            item["series_instance_uid"],
            item["transfer_syntax_uid"],
            settings.data_dir / item["path"],
            item["digest"],
        )
        for item in queries.instances(database, uid)
        if item["analyzable"]
    )
    study = Study(uid, row["revision"], row["last_received_at"], instances)
    scores = queries.scores(database, instances, model.name, model.version, engine.name)
    with decoding_pool(settings) as pool:
        scorer = Scorer(
            Algorithm(model, engine.name, reporting(settings)),
            preparer(settings, pool, model),
            header_reader(settings, pool),
            engine.biases,
            refuse,
        )
        context = Context(scores, queries.sent(database, uid), outputs(settings), now, out)
        done = analyze(study, scorer, context)
    print([result.replaces for result in done.results if result.replaces])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), datetime.fromisoformat(sys.argv[4]))
