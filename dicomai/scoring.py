"""What scoring needs of the settings: the decoding processes, what they are asked for, a device."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pydicom.dataset import Dataset

from dicomai.errors import Rejected
from dicomai.prepare import image
from dicomai.prepare.pool import MEGABYTE, Pool
from dicomai.settings import Settings
from dicomai.study import Instance, Limits, Model

if TYPE_CHECKING:
    from dicomai.infer.engine import Engine


def limits(settings: Settings) -> Limits:
    """What one object may ask for."""
    most = settings.prepare
    return Limits(most.max_pixels, most.max_megabytes * MEGABYTE, most.max_frames)


def decoding_pool(settings: Settings) -> Pool:
    """The decoding processes; they start when they are needed."""
    how = settings.prepare
    return Pool(how.workers, how.timeout_seconds, how.memory_megabytes)


def open_engine(settings: Settings, model: Model) -> "Engine":
    """A model on the device of the settings."""
    from dicomai.infer import engine

    return engine.open_engine(model, settings.infer.device, settings.data_dir / "engines")


def preparer(
    settings: Settings, pool: Pool, model: Model
) -> Callable[[tuple[Instance, ...]], Iterator[list[Any] | Rejected]]:
    """Prepare a study's images for a model, several at a time."""

    def prepare(instances: tuple[Instance, ...]) -> Iterator[list[Any] | Rejected]:
        return pool.map(image.prepare, [(item, model, limits(settings)) for item in instances])

    return prepare


def header_reader(settings: Settings, pool: Pool) -> Callable[[Instance], Dataset | Rejected]:
    """Read the header of one stored object, in a decoding process."""

    def read(instance: Instance) -> Dataset | Rejected:
        (done,) = pool.map(image.read_header, [(instance, limits(settings))])
        return done if isinstance(done, Rejected) else done[0]

    return read
