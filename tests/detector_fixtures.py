"""Fixtures: the tiny data set, made once; one finished training for all tests that read its files."""

import logging

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from bnext.data.catalog import register_datasets
from bnext.engine import train
from tests import saved, tiny

# Otherwise the trainer would set up console handlers, on a stream that pytest closes after the test.
for name in ("bnext", "detectron2"):
    logging.getLogger(name).setLevel(logging.INFO)


@pytest.fixture(scope="module", autouse=True)
def loggers():
    """Console handlers that a test sets up write to a stream that pytest closes: they end with the module."""
    kept = [logging.getLogger(name) for name in ("bnext", "detectron2", "fvcore")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in kept]
    yield
    for logger, (handlers, level, propagate) in zip(kept, before, strict=True):
        for handler in set(logger.handlers) - set(handlers):
            handler.close()
        logger.handlers = handlers
        logger.setLevel(level)
        logger.propagate = propagate


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of the tiny digits set, registered until the session ends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", "")
        root = tmp_path_factory.mktemp("datasets")
        tiny.prepare(root)
        yield root
    register_datasets()


@pytest.fixture(scope="session")
def finished(digits, tmp_path_factory):
    """Config and results of a finished training; its files are not to be changed."""
    cfg = tiny.load(tmp_path_factory.mktemp("finished"))
    return cfg, train(cfg)


@pytest.fixture
def bnext_log(caplog):
    """What bnext logs; its logger passes nothing on to the root's handlers once it is set up."""
    logger = logging.getLogger("bnext")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def weights(digits, tmp_path_factory):
    return saved.save(tmp_path_factory.mktemp("weights") / "in.pth")


@pytest.fixture(scope="module")
def unlabelled(digits):
    """The validation images without their labels, as a target data set."""
    records = [{k: v for k, v in r.items() if k != "annotations"} for r in DatasetCatalog.get("digits_val")]
    DatasetCatalog.register("digits_unlabelled", lambda: records)
    yield "digits_unlabelled"
    DatasetCatalog.remove("digits_unlabelled")
    MetadataCatalog.pop("digits_unlabelled", None)
