"""The one table of bnext's config keys: what each means, its default, its values, and what gives it an effect.

From it come the nodes of a config (`add_bnext_config`), the checks (`bnext.config.check`) and the tables of
configs/README.md (`format_keys`). A new answer of `NormSpec` is a row of `_ANSWERS`, which every place has.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from detectron2.config import CfgNode

import bnext
from bnext.config.places import BATCH_NORMS, LAZY_ARCHITECTURE, PLACES, RCNN_ARCHITECTURES, RESNET_BACKBONES
from bnext.data.sampling.domain_batches import DomainBatches
from bnext.kernels import Kind
from bnext.layers.build import NORM_NAMES
from bnext.layers.spec import OWNED, NormSpec, Unseen
from bnext.numbers import is_count, is_number
from bnext.repair.averaged_weights import BufferRule
from bnext.statistics.recompute import Estimator
from bnext.surgery.freezing import Freezable

__all__ = ["KEYS", "PLACE_KEYS", "Key", "Need", "Values", "add_bnext_config", "format_keys"]


@dataclasses.dataclass(frozen=True)
class Values:
    """A set of values.

    Args:
        words: the set, as it follows "must be".
        accepts: whether a value is in it.
        remedy: for any other value that is near none of the names.
        names: those of the values that are words.
    """

    words: str
    accepts: Callable[[Any], bool]
    remedy: str = "Choose one of them."
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Need:
    """Other keys, without which a value of a key has no effect, or contradicts them.

    Args:
        conditions: key -> values. One of the keys must have one of its values; without a dot it is of the same node.
        of: the values in need, of those that are not the default; None: all.
        reason: that the keys do not say themselves.
        is_said: whether the key, without them, is left out and said, where others are refused: so that one config runs
            with every norm.
    """

    conditions: Mapping[str, Values]
    of: Values | None = None
    reason: str = ""
    is_said: bool = False


@dataclasses.dataclass(frozen=True)
class Key:
    """A row of the table.

    Args:
        name: such as "SOLVER.BNEXT.VIRTUAL_IMAGES".
        default: leaves detectron2's behaviour as it is.
        help: one line, as it stands in configs/README.md.
        values: the allowed ones; None: whoever takes the key checks it.
        needs: all of them are to be met.
    """

    name: str
    default: Any
    help: str
    values: Values | None = None
    needs: tuple[Need, ...] = ()


def _one_of(*values: Any) -> Values:
    names = ", ".join(repr(value) for value in values)
    words = names if len(values) == 1 else f"one of {names}"
    return Values(
        words, lambda value: value in values, names=tuple(value for value in values if isinstance(value, str))
    )


def _none_of(*values: Any) -> Values:
    names = ", ".join(repr(value) for value in values)
    return Values(f"not {names}" if len(values) == 1 else f"none of {names}", lambda value: value not in values)


def _at_least_0(remedy: str) -> Values:
    return Values("0 or more", lambda value: 0 <= value < math.inf, remedy)


_IS_TRUE = _one_of(True)
_NOT_EMPTY = Values("not empty", lambda value: len(value) > 0)
_SEVERAL_LEVELS = Values("several levels", lambda value: len(value) > 1)
_SEVERAL_GROUPS = Values("2 or more", lambda value: is_count(value, 2))


# ---- the keys of every place


def _answer(name: str, help: str, **changes: Any) -> Key:
    """A field of `NormSpec` as a key, with its default and its choices."""
    hint, default = get_type_hints(NormSpec)[name.lower()], getattr(NormSpec(), name.lower())
    choices = _one_of(*get_args(hint)) if get_origin(hint) is Literal else None
    return dataclasses.replace(Key(name, default, help, choices), **changes)


# Answers that a place gives for all together, or for each level, domain, or both.
_OWNED = tuple(name.upper() for name in OWNED)

_NORM = Key("NORM", "", "name of the norm; detectron2 has no such key, and no norm there", _one_of(*NORM_NAMES))
_WORKERS = Values(
    "one of 'one', 'node', 'all', a number of workers, or None",
    lambda value: value in (None, "one", "node", "all") or is_count(value, 1),
)
_RENORM = Need({"TRAINING": _one_of("renorm")})
_MOVING = Need({"AVERAGE": _one_of("moving")})

_ANSWERS = (
    _answer("STATISTICS", "over what the mini-batch statistics of SGD are computed: all together, or each alone"),
    _answer(
        "NORMALIZATION_BATCH_SIZE",
        "at most so many samples of a worker are normalized together (Ghost BN); 0: its whole batch",
        default=0,
        needs=(Need({"NORM": _none_of("SyncBN"), "WORKERS": _one_of("one", 1)}, is_said=True),),
    ),
    _answer("WORKERS", "who shares a mini-batch; None: as the norm's name says", default=None, values=_WORKERS),
    _answer("TRAINING", "what normalizes in training; `renorm` is in between"),
    _answer("R_MAX", "limit of renorm's correction of the scale; 1 or more", needs=(_RENORM,)),
    _answer("D_MAX", "limit of renorm's correction of the mean; 0 or more", needs=(_RENORM,)),
    _answer("POPULATION", "which population statistics are remembered: one set, one of each, or none"),
    _answer("AVERAGE", "how they take in a mini-batch"),
    _answer("MOMENTUM", "weight of the mini-batch in the moving average, in torch's sense", needs=(_MOVING,)),
    _answer("INFERENCE", "what normalizes at inference; in a RoI head the mini-batch is that of each image's RoIs"),
    _answer("AFFINE", "who owns scale and shift: all together, each alone, or nobody"),
    _answer("FROZEN", "what no longer changes"),
    _answer("SINGLE_ELEMENT", "what a mini-batch of one element per channel gives in training"),
    _answer("EPS", "added to the variance"),
)

_IS_PER_LEVEL = _one_of("per_level", "per_level_and_domain")
_LEVEL_GROUPS = _answer(
    "LEVEL_GROUPS",
    "levels that go together where something is per level, `[[p3, p4], [p5, p6, p7]]`; empty: each is alone",
    default=[],
    needs=(Need(dict.fromkeys(_OWNED, _IS_PER_LEVEL)),),
)

_FEATURES = _one_of("features")
_LOST = "RoIs move to workers that do not know their domain"
_SHUFFLE = (
    Key(
        "SHUFFLE",
        "none",
        "RoI heads only: whether RoIs are dealt out at random, so that no mini-batch is of one image; only their "
        "`statistics` travel, or their `features`",
        _one_of("none", "statistics", "features"),
        needs=(
            # What would make a deal superfluous,
            Need({"NORMALIZATION_BATCH_SIZE": _one_of(0)}),
            Need({"TRAINING": _none_of("population")}),
            Need({"FROZEN": _none_of("statistics", "both")}),
            # of statistics,
            Need({"WORKERS": _none_of("one", 1), "SHUFFLE_GROUPS": _SEVERAL_GROUPS}, of=_one_of("statistics")),
            # or of features, and what would make that one wrong.
            Need({"WORKERS": _one_of(None, "one", 1)}, of=_FEATURES),
            Need({"NORM": _none_of("SyncBN")}, of=_FEATURES, is_said=True),  # all RoIs share one mini-batch
            *(Need({owned: _none_of("per_domain")}, of=_FEATURES, reason=_LOST) for owned in _OWNED),
        ),
    ),
    Key(
        "SHUFFLE_GROUPS",
        0,
        "RoI heads only: groups over all workers of a deal of statistics; 0: one for each worker",
        Values(
            "2 or more, or 0 for one per worker",
            lambda value: is_count(value, 0) and value != 1,
            "Choose a number; one group over all workers is a SyncBN without a shuffle.",
        ),
        needs=(Need({"SHUFFLE": _one_of("statistics")}, reason="features move to as many workers as there are"),),
    ),
)


def _make_place_keys(name: str) -> tuple[Key, ...]:
    """The keys of one place: the same for all, but for what the place is."""
    place, node = PLACES[name], f"MODEL.BNEXT.{name}"
    rows = [*([_NORM] if place.has_norm_of_ours else []), *_ANSWERS]
    rows += [_LEVEL_GROUPS] if place.levels else []
    rows += _SHUFFLE if place.sees_rois else []

    keys = []
    for row in rows:
        default, values = row.default, row.values
        if row.name in _OWNED:
            values = _one_of(*place.answers, *([] if row.name == "STATISTICS" else ["none"]))
        if row.name in ("STATISTICS", "POPULATION") and place.levels:
            default = "per_level"

        needs = (*_name_needs(row, name), *_find_place_needs(row, name))
        keys.append(Key(f"{node}.{row.name}", default, row.help, values, needs))
    return tuple(keys)


def _name_needs(row: Key, name: str) -> list[Need]:
    """The needs of a row with whole names of keys."""
    names = {"NORM": PLACES[name].norm}
    needs = []
    for need in row.needs:
        conditions = {
            names.get(other, f"MODEL.BNEXT.{name}.{other}"): values for other, values in need.conditions.items()
        }
        needs.append(dataclasses.replace(need, conditions=conditions))
    return needs


def _find_place_needs(row: Key, name: str) -> list[Need]:
    """Needs of every key of a place: the model has it, with a batch norm, and a choice of levels has several."""
    place = PLACES[name]

    needs = [Need({"MODEL.META_ARCHITECTURE": _one_of(*place.architectures)})]
    if place.switch:
        needs.append(Need({place.switch: _IS_TRUE}))

    if row.name != "NORM":
        conditions = {place.norm: _one_of(*BATCH_NORMS)}
        if name == "RESNETS":
            conditions["MODEL.BACKBONE.NAME"] = _none_of(*RESNET_BACKBONES)
        # What couples RoIs whose features move is seen when the head is built.
        needs.append(Need(conditions, of=_none_of("features"), is_said=True))

    if row.name in _OWNED and place.levels:
        needs.append(Need({place.levels: _SEVERAL_LEVELS}, of=_none_of("none", "per_domain")))
    return needs


PLACE_KEYS = {name: _make_place_keys(name) for name in PLACES}


# ---- the keys of domains, of what changes during a training, and of what is estimated and measured beside it

_DOMAINS = (
    Key(
        "MODEL.BNEXT.DOMAINS.NAMES",
        (),
        "names of the domains, in every place where something is `per_domain` or `per_level_and_domain`; (): those of "
        "the training sets, see `DATASETS.DOMAINS`",
        Values(
            "names",
            lambda value: isinstance(value, (tuple, list)) and all(isinstance(name, str) and name for name in value),
            "Write them as ('day', 'night').",
        ),
    ),
    Key(
        "MODEL.BNEXT.DOMAINS.UNSEEN",
        "error",
        "what normalizes images of another domain, or of none, at inference: nothing (`error`), the domain FALLBACK, "
        "the `mixture` of all, each image's `mini_batch`, a `blend` of both, the mixture as it follows the `stream` of "
        "such images, or the `nearest` domain",
        _one_of(*get_args(Unseen)),
        needs=(Need({"MODEL.BNEXT.DOMAINS.FALLBACK": _NOT_EMPTY}, of=_one_of("fallback")),),
    ),
    Key(
        "MODEL.BNEXT.DOMAINS.FALLBACK",
        "",
        "domain that UNSEEN `fallback` takes such images for, which is said",
        needs=(Need({"MODEL.BNEXT.DOMAINS.UNSEEN": _one_of("fallback")}),),
    ),
    Key(
        "MODEL.BNEXT.DOMAINS.SOURCE_IMAGES",
        None,
        "in a `blend` or `stream` the mixture counts as so many images; None: as many as fit how far the images' "
        "statistics have moved from it",
        Values(
            "a number of 0 or more, or None",
            lambda value: value is None or (isinstance(value, (int, float)) and value is not True and value >= 0),
            "Use 16, or None.",
        ),
        needs=(Need({"MODEL.BNEXT.DOMAINS.UNSEEN": _one_of("blend", "stream")}),),
    ),
)

_IS_FROZEN = Need({"SOLVER.BNEXT.FREEZE.ITER": Values("0 or more", lambda value: value >= 0)})
_SCHEDULES = (
    Key("SOLVER.BNEXT.FREEZE.ITER", -1, "first iteration with frozen norms, as FrozenBN; -1: never"),
    Key(
        "SOLVER.BNEXT.FREEZE.WHAT",
        "both",
        "what is frozen: population `statistics` (which then normalize in training), `affine`, or both",
        _one_of(*get_args(Freezable)),
        needs=(_IS_FROZEN,),
    ),
    Key(
        "SOLVER.BNEXT.FREEZE.WARMUP_ITERS",
        0,
        "for so many iterations from ITER on the learning rate rises linearly to that of its schedule",
        _at_least_0("Use 0 for none."),
        needs=(_IS_FROZEN,),
    ),
    Key(
        "SOLVER.BNEXT.MOMENTUM",
        [],
        "momentum of the running statistics: `[[iteration, value], ...]`, linear between; empty: as the norms have it",
    ),
    Key("SOLVER.BNEXT.RENORM.R_MAX", [], "limit of renorm, likewise; in its paper `[[5000, 1], [40000, 3]]`"),
    Key("SOLVER.BNEXT.RENORM.D_MAX", [], "limit of renorm, likewise; in its paper `[[5000, 0], [25000, 5]]`"),
    Key(
        "SOLVER.BNEXT.VIRTUAL_IMAGES",
        0,
        "Virtual BN: so many more images per step, over all workers, are run forward only and enlarge the mini-batches",
        needs=(
            Need(
                {"DATALOADER.BNEXT.BATCHES": _one_of("mixed", "composed")},
                reason="they would be of another domain than the batch",
            ),
        ),
    ),
    Key(
        "SOLVER.BNEXT.ACCUMULATE",
        1,
        "micro-batches of an SGD step, whose gradients are added up; each is a normalization batch of its own, "
        "`SOLVER.IMS_PER_BATCH` is all of them together",
        Values("a whole number of 1 or more", lambda value: is_count(value, 1), "Use 1 for one batch a step."),
    ),
    Key(
        "SOLVER.OPTIMIZER",
        "SGD",
        "name and values as in other projects on Detectron2",
        _one_of("SGD", "ADAMW"),
    ),
    Key(
        "SOLVER.BNEXT.KERNELS",
        "torch",
        "how the norms' passes over features are run: by `torch`'s operators, or, where it pays, `compiled` at the "
        "first steps for all sizes of images",
        _one_of(*get_args(Kind)),
    ),
)

_IS_MADE = Need({"SOLVER.BNEXT.AUXILIARY.KIND": _none_of("none")})
_IS_ATTACKED = Need({"SOLVER.BNEXT.AUXILIARY.KIND": _one_of("adversarial")})
_AUXILIARY = (
    Key(
        "SOLVER.BNEXT.AUXILIARY.KIND",
        "none",
        "each step trains on copies of its images, too: `adversarial` ones, which raise the loss, or strongly "
        "`augmented` ones",
        _one_of("none", "adversarial", "augmented"),
    ),
    Key(
        "SOLVER.BNEXT.AUXILIARY.DOMAIN",
        "",
        "domain of the copies; empty: the name of their KIND. Images of sets without a domain are then of `clean`",
        needs=(_IS_MADE,),
    ),
    Key(
        "SOLVER.BNEXT.AUXILIARY.WEIGHT",
        1.0,
        "weight of the loss of the copies, which is added to that of the images",
        Values("a number above 0", lambda value: is_number(value) and value > 0, "Use 1.0, or KIND none."),
        needs=(_IS_MADE,),
    ),
    Key(
        "SOLVER.BNEXT.AUXILIARY.EPSILON",
        4.0,
        "bound of the change of each pixel, of 255",
        Values("a number above 0, at most 255", lambda value: is_number(value) and 0 < value <= 255, "Use 4.0."),
        needs=(_IS_ATTACKED,),
    ),
    Key(
        "SOLVER.BNEXT.AUXILIARY.STEPS",
        1,
        "steps of gradient ascent (PGD); 1 is FGSM",
        Values("a whole number of 1 or more", lambda value: is_count(value, 1), "Use 1."),
        needs=(_IS_ATTACKED,),
    ),
    Key(
        "SOLVER.BNEXT.AUXILIARY.STEP_SIZE",
        0.0,
        "size of a step, of 255; 0: EPSILON with one step, else 1.25 EPSILON / STEPS",
        _at_least_0("Use 0 to have it chosen."),
        needs=(_IS_ATTACKED,),
    ),
    Key(
        "SOLVER.BNEXT.AUXILIARY.LOSS",
        "total",
        "loss that the attack raises; `stronger`: `classification` or `localization`, whichever raises the total loss "
        "of a worker's batch more, at twice the cost",
        _one_of("total", "classification", "localization", "stronger"),
        needs=(_IS_ATTACKED,),
    ),
)

_IS_AVERAGED = Need({"SOLVER.BNEXT.EMA.ENABLED": _IS_TRUE})
_AVERAGES = (
    Key(
        "SOLVER.BNEXT.EMA.ENABLED",
        False,
        "an exponential moving average of the weights: in `model_ema.pth`, evaluated beside the weights as `ema/...`",
        _one_of(True, False),
    ),
    Key(
        "SOLVER.BNEXT.EMA.DECAY",
        0.999,
        "weight of the average so far; about 1 / (1 - DECAY) steps count",
        Values("from 0 to below 1", lambda value: is_number(value) and 0 <= value < 1, "Use 0.999."),
        needs=(_IS_AVERAGED,),
    ),
    Key(
        "SOLVER.BNEXT.EMA.WARM_UP",
        True,
        "the decay of step t is at most (1 + t) / (10 + t), so that the first weights are forgotten",
        _one_of(True, False),
        needs=(_IS_AVERAGED,),
    ),
    Key(
        "SOLVER.BNEXT.EMA.BUFFERS",
        "averaged",
        "running statistics of the average: `copied` from the model, `averaged` as the weights, or `re_estimated` for "
        "it on training images, as by PreciseBN",
        _one_of(*get_args(BufferRule)),
        needs=(_IS_AVERAGED,),
    ),
)

_IS_IN_WANDB = Need({"SOLVER.BNEXT.WANDB.ENABLED": _IS_TRUE})
_METRICS = (
    Key(
        "SOLVER.BNEXT.NORM_METRICS.PERIOD",
        100,
        "every so many iterations, metrics `norms/...` of what each group of norms sees; 0: never",
        Values("a whole number of 0 or more", is_count, "Use 0 for never."),
    ),
    Key(
        "SOLVER.BNEXT.WANDB.ENABLED",
        False,
        "metrics in Weights & Biases, too (`pip install wandb`), set up by its environment variables",
        _one_of(True, False),
    ),
    Key("SOLVER.BNEXT.WANDB.PROJECT", "", "of the run; empty: as W&B chooses", needs=(_IS_IN_WANDB,)),
    Key("SOLVER.BNEXT.WANDB.NAME", "", "of the run; empty: as W&B chooses", needs=(_IS_IN_WANDB,)),
)

_DOCTOR = (
    Key(
        "SOLVER.BNEXT.DOCTOR.WARN",
        True,
        "when a model is built, warn once of what the doctor finds wrong with its norms, without running it",
        _one_of(True, False),
    ),
    Key(
        "SOLVER.BNEXT.DOCTOR.PERIOD",
        1000,
        "every so many iterations of a training, after the first 20 and at the end, warn of what the doctor finds; 0: "
        "never",
        Values("a whole number of 0 or more", is_count, "Use 0 for never."),
    ),
)

_IS_EVALUATED = Need({"TEST.EVAL_PERIOD": Values("1 or more", lambda value: value >= 1)})
_HAS_METRIC = Need({"TEST.BNEXT.BEST.METRIC": _NOT_EMPTY})
_BEST = (
    Key(
        "TEST.BNEXT.BEST.METRIC",
        "",
        "metric by which the best weights are kept as `model_best.pth`, such as `bbox/AP`; of averaged weights "
        "`ema/bbox/AP`; empty: none",
        needs=(Need({"DATASETS.TEST": _NOT_EMPTY}), _IS_EVALUATED),
    ),
    Key(
        "TEST.BNEXT.BEST.MODE",
        "auto",
        "which value is best: `max`, `min`, or `auto`, the least of a loss and the largest of everything else",
        _one_of("auto", "max", "min"),
        needs=(_HAS_METRIC,),
    ),
    Key(
        "TEST.BNEXT.BEST.PATIENCE",
        0,
        "after so many evaluations that are no better than the best one the training ends; 0: never",
        Values("a whole number of 0 or more", is_count, "Use 0 for never."),
        needs=(
            _HAS_METRIC,
            Need(
                {"TEST.BNEXT.SMART_BATCH_NORM": _one_of(False)},
                reason="its last evaluation uses the population, the others do not",
            ),
        ),
    ),
)

_ENABLED = {"TEST.PRECISE_BN.ENABLED": _IS_TRUE}
_RE_ESTIMATED = Need({**_ENABLED, "TEST.BNEXT.SMART_BATCH_NORM": _IS_TRUE})
_IS_MEASURED = Need({"TEST.BNEXT.VALIDATION_LOSS.PERIOD": Values("1 or more", lambda value: value >= 1)})
_ESTIMATES = (
    Key(
        "TEST.BNEXT.PRECISE_BN.ROIS",
        "sampled",
        "RoIs on which the statistics of R-CNN heads are re-estimated: as SGD samples them, or as at test",
        _one_of("sampled", "top_scored"),
        needs=(Need({"MODEL.META_ARCHITECTURE": _one_of(*RCNN_ARCHITECTURES, LAZY_ARCHITECTURE)}),),
    ),
    Key(
        "TEST.BNEXT.PRECISE_BN.TOLERANCE",
        0.0,
        "stop as soon as the standard errors of all statistics are below it, `0.01` for 1 %; 0: never",
        _at_least_0("Use 0.01 for 1 %, or 0 for never."),
        needs=(
            _RE_ESTIMATED,
            Need(
                {"TEST.BNEXT.PRECISE_BN.ESTIMATOR": _none_of("layer_by_layer")},
                reason="layer by layer, every layer sees the same images",
            ),
        ),
    ),
    Key(
        "TEST.BNEXT.PRECISE_BN.ESTIMATOR",
        "pooled",
        "see `recompute_population_statistics`; the moving average has fixed weights",
        _one_of(*get_args(Estimator)),
        needs=(_RE_ESTIMATED,),
    ),
    Key(
        "TEST.BNEXT.PRECISE_BN.BEFORE_CHECKPOINTS",
        True,
        "re-estimate before every checkpoint (`SOLVER.CHECKPOINT_PERIOD`), too",
        needs=(Need(_ENABLED),),
    ),
    Key(
        "TEST.BNEXT.SMART_BATCH_NORM",
        False,
        "mini-batches normalize in training and in its evaluations; one epoch over `DATASETS.TRAIN` then estimates the "
        "population",
        needs=(
            Need(
                {"TEST.PRECISE_BN.ENABLED": _one_of(False)},
                reason="no evaluation but the last uses the population",
            ),
            Need(
                {"SOLVER.BNEXT.FREEZE.ITER": _one_of(-1), "SOLVER.BNEXT.FREEZE.WHAT": _one_of("affine")},
                reason="frozen statistics normalize in training",
            ),
        ),
    ),
    Key(
        "TEST.BNEXT.VALIDATION_LOSS.PERIOD",
        0,
        "every so many iterations, and after the last one, compute the losses on the labelled images of "
        "`DATASETS.TEST`; 0: never",
        _at_least_0("Use 0 for never."),
        needs=(Need({"DATASETS.TEST": _NOT_EMPTY}),),
    ),
    Key(
        "TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES",
        0,
        "on the first so many batches of `SOLVER.IMS_PER_BATCH` images; 0: on all",
        _at_least_0("Use 0 for all."),
        needs=(_IS_MEASURED,),
    ),
    Key(
        "TEST.BNEXT.VALIDATION_LOSS.STATISTICS",
        "population",
        "what normalizes in it",
        _one_of("population", "mini_batch"),
        needs=(_IS_MEASURED,),
    ),
    Key(
        "TEST.BNEXT.FAST_EVAL",
        True,
        "COCO's metrics are computed by faster-coco-eval where it is installed (`pip install faster-coco-eval`), with "
        "the numbers of pycocotools; `False`: by pycocotools itself",
    ),
)

_HAS_DOMAIN_BATCHES = Need({"DATALOADER.BNEXT.BATCHES": _none_of("mixed")})
_HAS_NO_RATIOS = Need({"DATALOADER.BNEXT.RATIOS": Values("empty", lambda value: len(value) == 0)})


def _are_ratios(value: Any) -> bool:
    pairs = [pair for pair in value if isinstance(pair, (list, tuple)) and len(pair) == 2]
    names = {name for name, number in pairs if isinstance(name, str) and name and is_count(number, 1)}
    return len(names) == len(pairs) == len(value)


_SAMPLING = (
    Key(
        "DATALOADER.BNEXT.BATCHES",
        "mixed",
        "domains of a batch: `mixed` as images come, `composed` of each its share, or a single one, `alternating` or "
        "drawn (`random_domain`); without domains, data sets",
        _one_of("mixed", *get_args(DomainBatches)),
        needs=(Need({"DATALOADER.SAMPLER_TRAIN": _one_of("TrainingSampler")}),),
    ),
    Key(
        "DATALOADER.BNEXT.RATIOS",
        [],
        "share of each domain, such as `[[day, 6], [night, 2]]`; empty: by TEMPERATURE",
        Values(
            "a list of pairs, each of a domain and a whole number of 1 or more, and each domain once",
            _are_ratios,
            "Write it as [[day, 6], [night, 2]].",
        ),
        needs=(_HAS_DOMAIN_BATCHES,),
    ),
    Key(
        "DATALOADER.BNEXT.TEMPERATURE",
        1.0,
        "T: a domain of n images has a share in proportion to n^(1/T); 1: as many as it has, large: all the same",
        Values(
            "above 0", lambda value: value > 0, "Use 1 for shares in proportion to the images, more for evener ones."
        ),
        needs=(_HAS_DOMAIN_BATCHES, _HAS_NO_RATIOS),
    ),
    Key(
        "DATALOADER.BNEXT.BALANCE",
        "images",
        "what TEMPERATURE balances: the `images` of a domain that are seen, or their `annotations`",
        _one_of("images", "annotations"),
        needs=(
            _HAS_DOMAIN_BATCHES,
            _HAS_NO_RATIOS,
            Need({"DATALOADER.BNEXT.TEMPERATURE": _none_of(1.0)}, reason="all images are seen equally often anyway"),
        ),
    ),
)

_DATASETS = (
    Key(
        "DATASETS.DOMAINS.TRAIN",
        (),
        "domain of each set of `DATASETS.TRAIN`, such as `('day', 'night')`; (), or '' for one: as its registration "
        "says; sets may share one",
    ),
    Key("DATASETS.DOMAINS.TEST", (), "domain of each set of `DATASETS.TEST`, likewise"),
    Key(
        "DATASETS.BNEXT.COCO",
        [],
        "data sets in COCO format: `[{name: my_train, json: my/train.json, folder: my/train}]`, and the `domain` of "
        "their images, if they have one; with `corruption: fog, severity: 3` all pictures are changed when they are "
        "read; see datasets/README.md",
    ),
    Key(
        "DATASETS.BNEXT.CLASSES",
        (),
        "the classes of the model, in their order, among which the categories of all sets are found by name; images of "
        "a set are no negatives for a class that it does not annotate; empty: the categories of `DATASETS.TRAIN`, "
        "which are then the same in all of its sets",
    ),
    Key(
        "DATASETS.BNEXT.CLASS_MAP",
        [],
        'classes of categories by other names: `[{my_night_train: {pedestrian: person, tram: "", rider: "?"}}]`; '
        '`""`: none of the classes, `"?"`: perhaps one of them, so that the losses ignore the region',
    ),
)

_TABLES = (
    *PLACE_KEYS.values(),
    _DOMAINS,
    _SCHEDULES,
    _AUXILIARY,
    _AVERAGES,
    _METRICS,
    _DOCTOR,
    _ESTIMATES,
    _BEST,
    _SAMPLING,
    _DATASETS,
)
KEYS = {key.name: key for key in itertools.chain(*_TABLES)}


def add_bnext_config(cfg: CfgNode) -> None:
    """Add the keys of bnext to a config, between `get_cfg()` and `merge_from_file`.

    The defaults leave detectron2's behaviour as it is: everything is shared, but a BN in a RetinaNet head has
    statistics per level and a shared affine, as its `CycleBatchNormList` (row 4 of the paper's Table 5). What the keys
    choose among is registered with detectron2.
    """
    bnext.register()
    for key in KEYS.values():
        *path, name = key.name.split(".")
        node = cfg
        for part in path:
            node = node.setdefault(part, CfgNode())

        is_there = key.name == "SOLVER.OPTIMIZER" and name in node  # added by another project
        if not is_there:
            node[name] = copy.deepcopy(key.default)


def format_keys(keys: Iterable[Key], prefix: str = "") -> list[str]:
    """Rows of a Markdown table: key, default, values, meaning.

    Args:
        keys: of the table.
        prefix: left out of the names.
    """
    rows = []
    for key in keys:
        default = key.default if isinstance(key.default, str) and key.default else repr(key.default)
        values = key.values.words.replace("'", "`") if key.values else ""
        rows.append(f"| `{key.name.removeprefix(prefix)}` | `{default}` | {values} | {key.help} |")
    return rows
