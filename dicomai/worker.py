"""The scoring process: threads that claim studies, one batcher that owns the device."""

import dataclasses
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime

import cv2
import structlog
from sqlalchemy.exc import SQLAlchemyError

from dicomai import durable
from dicomai.ahead import Ahead, Made, discard
from dicomai.analyze import Context, Scorer, analyze, refuse
from dicomai.errors import DicomaiError, LeaseLost, Retryable
from dicomai.infer.batcher import Batcher
from dicomai.prepare.pool import Pool
from dicomai.roles import (
    FINISH_SECONDS,
    TROUBLE_SECONDS,
    choose_model,
    first_line,
    join,
    outputs,
    reporting,
    wait_for,
    work_until,
)
from dicomai.scoring import decoding_pool, header_reader, open_engine, preparer
from dicomai.settings import Settings
from dicomai.store import queries, queue, registry
from dicomai.store.database import Database
from dicomai.store.queue import CRASHES_IN_COMPANY, Claim
from dicomai.study import Algorithm, Analysis, Instance, Model

log = structlog.get_logger()

FOLLOW_SECONDS = 2.0


def infer(settings: Settings, stop: threading.Event) -> None:
    """Score studies until told to stop."""
    cv2.setNumThreads(1)  # studies are the parallelism: more threads cost a tenth of the processor
    database = join(settings)
    Worker(settings, database, choose_model(settings, database)).run(stop)


class Loaded:
    """A model on its device: what scores with it, and the one thread that owns the device."""

    def __init__(self, settings: Settings, database: Database, pool: Pool, model: Model) -> None:
        engine = open_engine(settings, model)
        self.model = model
        self._batcher = Batcher(engine.score, settings.infer.batch_size)
        self.scorer = Scorer(
            Algorithm(model, engine.name, reporting(settings)),
            preparer(settings, pool, model),
            header_reader(settings, pool),
            engine.biases,
            self._batcher.predict,
        )
        self.ahead = Ahead(database, self.scorer, settings.data_dir, outputs(settings))
        self.stat_scorer = dataclasses.replace(self.scorer, predict=self._batcher.predict_first)
        self.users = 0

    def tell(self) -> None:
        """Log what scores from now on."""
        log.info(
            "scoring",
            model=self.model.name,
            version=self.model.version,
            engine=self.scorer.algorithm.engine,
        )

    def close(self) -> None:
        """End the thread; nobody scores with it any more."""
        self.ahead.close()
        self._batcher.close()


class Worker:
    """Analyzes what is due, several studies at a time."""

    def __init__(self, settings: Settings, database: Database, model: Model) -> None:
        self._settings = settings
        self._database = database
        self._pool = decoding_pool(settings)
        self._loaded = Loaded(settings, database, self._pool, model)
        self._outputs = outputs(settings)
        self._held: dict[str, Claim] = {}
        self._steps_ahead = 0  # under way
        self._lock = threading.Lock()

    def run(self, stop: threading.Event) -> None:
        """Work until told to stop; then finish within seconds, or give back what is held."""
        threads = [
            threading.Thread(
                target=work_until,
                args=(stop, self._database, self._step, self._seconds_to_due),
                daemon=True,
            )
            for _ in range(self._settings.infer.workers)
        ]
        threads.append(threading.Thread(target=self._renew, args=(stop,), daemon=True))
        threads.append(threading.Thread(target=self._follow, args=(stop,), daemon=True))
        for thread in threads:
            thread.start()
        self._loaded.tell()
        wait_for(stop)
        deadline = time.monotonic() + FINISH_SECONDS
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        try:
            for claim in list(self._held.values()):
                queue.release_study(self._database, claim)
        finally:
            self._loaded.ahead.close()
            self._pool.close()  # only now: what it ends is nobody's any more

    def _step(self) -> bool:
        claim = self._claim()
        loaded = self._taken()
        try:
            if claim is None:
                return self._work_ahead(loaded.ahead)
            ready = loaded.ahead.take(claim.study.instances)
            try:
                scorer = loaded.stat_scorer if claim.stat else loaded.scorer
                self._work(claim, scorer, ready)
            finally:
                discard(ready.values())
        finally:
            self._give_back(loaded)
            if claim is not None:
                with self._lock:
                    self._held.pop(claim.lease, None)
                self._clear(claim)
        return True

    def _work_ahead(self, ahead: Ahead) -> bool:
        """What fails here is done again, and accounted for, when the study is due.

        Not while a study that has crashed its worker is in hand, or waits for nothing else to be:
        one crash is not to count against two.
        """
        with self._lock:
            if self._holds_a_suspect() or queries.due_study_attempts(self._database) is not None:
                return False
            self._steps_ahead += 1
        try:
            return ahead.step()
        except (SQLAlchemyError, OSError):
            raise
        except Exception:
            log.exception("not_made_ahead")
            return False
        finally:
            with self._lock:
                self._steps_ahead -= 1

    def _seconds_to_due(self) -> float:
        return queries.seconds_to_due_study(self._database)

    def _taken(self) -> Loaded:
        """The model that a study is analyzed with, from its beginning to its end."""
        with self._lock:
            self._loaded.users += 1
            return self._loaded

    def _give_back(self, loaded: Loaded) -> None:
        with self._lock:
            loaded.users -= 1
            is_done = loaded.users == 0 and loaded is not self._loaded
        if is_done:
            loaded.close()

    def _follow(self, stop: threading.Event) -> None:
        """Take another version of the model when it becomes the active one; studies go on."""
        refused = None

        def step() -> bool:
            nonlocal refused
            active = registry.active_version(self._database, self._settings.infer.model)
            if active in {self._loaded.model.version, refused}:
                return False
            try:
                model = choose_model(self._settings, self._database)
                if model.version == self._loaded.model.version:  # the active one is not here
                    refused = active
                else:
                    self._take_over(Loaded(self._settings, self._database, self._pool, model))
            except SQLAlchemyError:
                raise
            except Exception as error:  # noqa: BLE001 - the version that works goes on working
                refused = active
                log.error("model_not_taken", version=active, reason=first_line(error))
            return False

        longest = queries.longest_seconds(self._database)
        work_until(stop, self._database, step, lambda: longest, FOLLOW_SECONDS)

    def _take_over(self, loaded: Loaded) -> None:
        with self._lock:
            before, self._loaded = self._loaded, loaded
            is_done = before.users == 0
        loaded.tell()
        if is_done:
            before.close()

    def _clear(self, claim: Claim) -> None:
        """Take away what was not published."""
        folder = self._settings.data_dir / "results" / claim.study.study_instance_uid
        for file in folder.glob(f"*{draft(claim)}"):
            file.unlink(missing_ok=True)

    def _claim(self) -> Claim | None:
        """A study that crashed its worker before waits until nothing else is in hand."""
        with self._lock:
            attempts = queries.due_study_attempts(self._database)
            if attempts is None:
                return None
            alone = attempts >= CRASHES_IN_COMPANY
            if (alone and (self._held or self._steps_ahead)) or self._holds_a_suspect():
                return None
            limits = self._settings.infer
            claim = queue.claim_study(
                self._database,
                self._settings.data_dir,
                limits.lease_seconds,
                limits.max_attempts,
                alone,
            )
            if claim is not None:
                self._held[claim.lease] = claim
            return claim

    def _holds_a_suspect(self) -> bool:
        return any(claim.attempts > CRASHES_IN_COMPANY for claim in self._held.values())

    def _work(self, claim: Claim, scorer: Scorer, ready: Mapping[Instance, Made]) -> None:
        uid = claim.study.study_instance_uid
        started = time.monotonic()
        if claim.hopeless is not None:
            log.error("failed", study=uid, reason=claim.hopeless)
            self._fail(claim, claim.hopeless, scorer)
            return
        try:
            context = dataclasses.replace(self._context(claim, scorer.algorithm), ready=ready)
            done = analyze(claim.study, scorer, context)
            queue.complete(
                self._database, claim, done, self._settings.data_dir, self._outputs, publish
            )
        except LeaseLost as error:
            log.info("lease_lost", study=uid, reason=str(error))
        except (Retryable, OSError, SQLAlchemyError) as error:
            self._put_off(claim, error)
        except Exception as error:
            log.exception("failed", study=uid)
            words = str(error) if isinstance(error, DicomaiError) else type(error).__name__
            self._fail(claim, f"the analysis failed: {words}", scorer)
        else:
            log.info(
                "analyzed",
                study=uid,
                revision=claim.study.revision,
                findings=len(done.findings),
                not_analyzed=len(done.exclusions),
                seconds=round(time.monotonic() - started, 3),
            )

    def _put_off(self, claim: Claim, error: Exception) -> None:
        """The disk or the database: the study is not to blame and waits."""
        words, uid = first_line(error), claim.study.study_instance_uid
        log.error("put_off", study=uid, error=type(error).__name__, detail=words)
        queue.release_study(self._database, claim, TROUBLE_SECONDS, words)

    def _fail(self, claim: Claim, reason: str, scorer: Scorer) -> None:
        study = claim.study
        try:
            done = refuse(study, reason, scorer, self._context(claim, scorer.algorithm))
        except (OSError, SQLAlchemyError) as error:
            self._put_off(claim, error)
            return
        except Exception:  # what failed the study may fail this, too
            log.exception("not_reported", study=study.study_instance_uid)
            done = Analysis(study, scorer.algorithm.model, (), (), (), ())
        try:
            queue.fail_study(
                self._database, claim, reason, done, self._settings.data_dir, self._outputs, publish
            )
        except LeaseLost:
            log.info("lease_lost", study=claim.study.study_instance_uid)

    def _context(self, claim: Claim, algorithm: Algorithm) -> Context:
        study, model = claim.study, algorithm.model
        return Context(
            scores=queries.scores(
                self._database, study.instances, model.name, model.version, algorithm.engine
            ),
            sent=queries.sent(self._database, study.study_instance_uid),
            outputs=self._outputs,
            now=datetime.now(UTC),
            out=self._settings.data_dir / "results" / study.study_instance_uid,
            suffix=draft(claim),
        )

    def _renew(self, stop: threading.Event) -> None:
        lease_seconds = self._settings.infer.lease_seconds
        while not stop.wait(lease_seconds / 3):
            for claim in list(self._held.values()):
                try:
                    queue.renew_study(self._database, claim, lease_seconds)
                except SQLAlchemyError as error:
                    log.error("not_renewed", detail=first_line(error))


def draft(claim: Claim) -> str:
    """How the files of a claim end until its analysis is committed.

    A worker that was thought dead, and wakes up, must not touch what another has made of the same
    study since: it was sent.
    """
    return f".{claim.lease}{durable.TEMPORARY}"


def publish(done: Analysis) -> Analysis:
    """Give the results the names of their SOP Instance UIDs."""
    results = []
    for item in done.results:
        path = item.path.with_name(f"{item.sop_instance_uid}.dcm")
        item.path.rename(path)
        results.append(dataclasses.replace(item, path=path))
    for folder in {item.path.parent for item in results}:
        durable.sync_folder(folder)
    return dataclasses.replace(done, results=tuple(results))
