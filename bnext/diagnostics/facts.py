"""The facts that checks read: one frozen record of a model, its training and its data, absent where nobody knows them.

Here are the records alone. `bnext.diagnostics.collecting` fills in what a torch model says of itself; what a config, a
checkpoint, an evaluation or a training know, the rooms above fill in by `dataclasses.replace`.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from bnext.diagnostics.inventory import NormRecord
from bnext.diagnostics.lazy_keys import name_lazily
from bnext.functional import Moments

__all__ = [
    "Affine",
    "Call",
    "EvaluationFacts",
    "Facts",
    "ForwardFacts",
    "LayerFacts",
    "NormFacts",
    "Origin",
    "Population",
    "StandardErrors",
    "StepFacts",
    "TrainingFacts",
    "WeightsFacts",
]


# ---- a norm


@dataclasses.dataclass(frozen=True, eq=False)
class Population:
    """One set of population statistics.

    Args:
        owner: level or domain that it is of; "": all.
        mean, var: running statistics [C], float64 on the CPU; the variance has correction 1.
        num_updates: mini-batches that it has taken in; None: nobody counts.
    """

    owner: str
    mean: Tensor
    var: Tensor
    num_updates: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """One scale and shift.

    Args:
        owner: level or domain that it is of; "": all.
        weight, bias: [C], float64 on the CPU; None: there is none.
        is_trained: whether it is a parameter that takes gradients.
    """

    owner: str
    weight: Tensor | None
    bias: Tensor | None
    is_trained: bool


@dataclasses.dataclass(frozen=True)
class LayerFacts:
    """The layer whose output a norm gets.

    Args:
        path: its place in the model.
        has_bias: whether it adds one, which the norm takes away again.
    """

    path: str
    has_bias: bool


@dataclasses.dataclass(frozen=True, eq=False)
class NormFacts:
    """One norm of a model.

    Args:
        record: its answers to "which batch?"; `record.path` is its name in every other fact.
        type_name: module and class, as "torch.nn.modules.batchnorm.BatchNorm2d".
        is_training: its mode.
        reason: why it is frozen or in a mode other than the model's; "": it is not.
        populations: its running statistics, those of each level or domain.
        affines: its scale and shift, likewise.
        place: where it is in a detector, as "RETINANET" of MODEL.BNEXT; "": not known.
        levels: features that it is called on in one forward, where that is known without one.
        sees_rois: whether its samples are RoIs; None: not known.
        layer_before: the layer whose output it gets; None: not known.
        norm_key: config key that names the norms of its place; "": there is none.
        shuffle: how its samples are dealt out at random: "statistics", "features"; "": they are not.
        num_groups: of a deal of statistics, over the workers that share; None: one for each worker.
        single_element: what a mini-batch of one element per channel gives in training: "error", or the "population"'s
            output.
        is_after_trained: whether the last layer with weights before it, in the order of modules, takes gradients;
            None: there is none.
        has_own_forward: whether its class computes something that no form describes, as with an activation in it.
        extras: names of parameters, buffers and modules that it holds besides a norm's state, and "hooks".
        dtype: of its statistics or its affine, as "float16"; "": it has none.
    """

    record: NormRecord
    type_name: str
    is_training: bool
    reason: str = ""
    populations: tuple[Population, ...] = ()
    affines: tuple[Affine, ...] = ()
    place: str = ""
    levels: tuple[str, ...] = ()
    sees_rois: bool | None = None
    layer_before: LayerFacts | None = None
    norm_key: str = ""
    shuffle: str = ""
    num_groups: int | None = None
    single_element: str = "error"
    is_after_trained: bool | None = None
    has_own_forward: bool = False
    extras: tuple[str, ...] = ()
    dtype: str = ""

    @property
    def path(self) -> str:
        return self.record.path

    @property
    def is_batch_norm(self) -> bool:
        """Whether it normalizes by a batch or by a population, and not each sample alone."""
        return self.record.statistics != "sample"

    @property
    def is_by_mini_batch(self) -> bool:
        """Whether mini-batches normalize in training, as far as its configuration says."""
        return self.is_batch_norm and self.record.training != "population"


# ---- what was run


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A feature that a norm got.

    Args:
        level: its name, where the call says it; else "".
        size: [N, C, ...].
        samples: moments of each of its N samples: count [N], mean and var [N, C], float64 on the CPU.
        is_joint: whether it came in one call with the one before, so that both are one mini-batch or may be.
    """

    level: str
    size: tuple[int, ...]
    samples: Moments
    is_joint: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardFacts:
    """A forward of the model on one batch, which left the model as it was.

    Args:
        num_images: of the batch; 0: not known.
        normalized_by: what the norms used meanwhile: "population", as at inference, or "mini_batch", as in training.
        calls: path -> every call of the norm, in their order; norms that were not called are absent.
        is_noise: whether the images were made up; then only the calls and their sizes say something.
        domain: of all images; "": not known.
        image_size: height and width of all images; (): not known.
        is_alone: whether it is of one image taken out of a batch, to be compared with those: no training has it so.
    """

    num_images: int
    normalized_by: Literal["population", "mini_batch"]
    calls: Mapping[str, tuple[Call, ...]]
    is_noise: bool = False
    domain: str = ""
    image_size: tuple[int, ...] = ()
    is_alone: bool = False


@dataclasses.dataclass(frozen=True)
class StandardErrors:
    """Errors of one set of statistics as a pass over images knows it, from the differences between its mini-batches.

    Args:
        mean: standard error of the mean in standard deviations, 95th percentile over channels; infinite for fewer than
            two mini-batches.
        var: standard error of the variance relative to it, likewise.
        num_batches: mini-batches that reached the norm.
    """

    mean: float
    var: float
    num_batches: int


@dataclasses.dataclass(frozen=True)
class EvaluationFacts:
    """The model with one set of weights and several kinds of statistics, on the same images.

    Args:
        losses: kind -> mean loss. Kinds are "population" (those of the model), "mini_batch", "precise"
            (re-estimated on training images).
        ap: kind -> box AP from 0 to 100, or another score of this range; the higher the better.
        dataset: on which.
    """

    losses: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ap: Mapping[str, float] = dataclasses.field(default_factory=dict)
    dataset: str = ""


# ---- how it is trained


@dataclasses.dataclass(frozen=True)
class TrainingFacts:
    """A training that is planned, running, or over.

    Args:
        num_workers: processes; None: not known.
        images_per_worker: that go through the model of a worker together; None: not known.
        accumulation: micro-batches of an SGD step.
        weight_decay: path of a norm -> decay of its affine; empty: not known.
        ddp: settings of DistributedDataParallel: broadcast_buffers, find_unused_parameters, static_graph; None: it is
            not wrapped, or not known.
        mixes_domains: whether images of several domains come in one mini-batch; None: not known, or there are none.
        virtual_images: of a worker, that enlarge its mini-batches by a forward alone.
    """

    num_workers: int | None = None
    images_per_worker: int | None = None
    accumulation: int = 1
    weight_decay: Mapping[str, float] = dataclasses.field(default_factory=dict)
    ddp: Mapping[str, bool] | None = None
    mixes_domains: bool | None = None
    virtual_images: int = 0


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """Steps of a training as a hook has seen them.

    Args:
        num_steps: that were watched.
        num_forwards: forwards of the model in training mode in them; 0: not known.
        updates: path -> times that its running statistics took in a mini-batch in them, of several populations the
            most; norms that do not count are absent.
        changed_between: path of each norm whose running statistics changed between two steps (validation, warm-up)
            -> after which iteration first; -1: before the first one.
        calls: path -> calls of the norm in one forward, the most; empty: not known.
    """

    num_steps: int
    num_forwards: int
    updates: Mapping[str, int]
    changed_between: Mapping[str, int] = dataclasses.field(default_factory=dict)
    calls: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class WeightsFacts:
    """The weights of the model.

    Args:
        source: file or address; "": a random initialization.
        is_loaded: whether the facts of the norms are of these weights; False: they are named, but were not read.
        iteration: that the file says; None: it says none.
        missing: paths of norms to which the file gave nothing.
        unexpected: names in the file that the model has no place for.
        eps: path -> eps that the file says of its norm.
        is_folded: whether statistics are folded into the affine or the convolutions; None: not known.
        folded: paths of norms whose statistics are folded into the affine that the file gave, or would give, them.
        without_statistics: paths of norms to which the file gave an affine, and no statistics.
        statistics: path -> over what the file says mini-batch statistics were computed in its training: "shared", ...
        populations: path -> whose population statistics the file says that it has: "shared", "per_level", ...
    """

    source: str = ""
    is_loaded: bool = False
    iteration: int | None = None
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    eps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    is_folded: bool | None = None
    folded: tuple[str, ...] = ()
    without_statistics: tuple[str, ...] = ()
    statistics: Mapping[str, str] = dataclasses.field(default_factory=dict)
    populations: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The way by which the user came to the model, so that a remedy can be written as something to run.

    Args:
        kind: a model in Python, a config, or a checkpoint alone.
        config_file: of the command line.
        opts: KEY VALUE pairs of the command line; MODEL.WEIGHTS among them is left out of commands.
        weights: MODEL.WEIGHTS, or the checkpoint.
        imports: modules of the user's that the command line imports, without which the config builds no model.
        num_workers: that the command line said train the model, which the doctor is to be told again.
    """

    kind: Literal["model", "config", "checkpoint"] = "model"
    config_file: str = ""
    opts: tuple[str, ...] = ()
    weights: str = ""
    imports: tuple[str, ...] = ()
    num_workers: int | None = None

    def write_command(self, command: str, *options: str, pairs: tuple[str, ...] = ()) -> str:
        """A command line of `bnext` on this config and these weights.

        Args:
            command: as "reestimate".
            options: of it, as "--population", "per_level".
            pairs: KEY VALUE pairs besides those that the user gave.

        Example:
            >>> Origin("config", "a.yaml", weights="b.pth").write_command("evaluate")
            'bnext evaluate --config-file a.yaml MODEL.WEIGHTS b.pth'
        """
        weights = ("MODEL.WEIGHTS", self.weights) if self.weights else ()
        opts = list(self.opts)
        while "MODEL.WEIGHTS" in opts:
            place = opts.index("MODEL.WEIGHTS")
            del opts[place : place + 2]
        modules = [word for module in self.imports for word in ("--import", module)]
        workers = ("--num-gpus", str(self.num_workers)) if self.num_workers and command == "doctor" else ()
        options = (*modules, *workers, *options)
        if self.config_file.endswith(".py"):
            pairs = tuple(name_lazily(word) or word for word in pairs)
        return shlex.join(["bnext", command, "--config-file", self.config_file, *options, *weights, *opts, *pairs])


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """Everything that is known of a model, in one record.

    Args:
        norms: of the model, in the order of its modules.
        model_name: class of the model; of a checkpoint alone its file.
        is_training: the mode of the model.
        num_parameters: of the whole model.
        origin: how the user came by it.
        config: key -> value of the whole config, as "MODEL.RETINANET.NORM"; None: there is none.
        weights: None: nothing is known of them.
        training: None: nothing is known of it.
        forwards: what was run, in its order.
        population: (path, owner) -> statistics of a pass over training images; empty: there was none.
        evaluation: None: there was none.
        worker_differences: path -> largest distance of the running means of two workers, mean over channels in standard
            deviations; None: one worker, or not known.
        domains: domain -> path -> moments [C] of what the norm gets of that domain's images.
        steps: of a running training; None: nobody watched.
        averaged: the norms of an average of the weights (EMA, SWA, teacher); None: there is none.
        before: the norms of the model before a conversion, or as it was saved; None: not given.
        failures: what could not be found out, and why, in sentences.
        num_trained: parameters, of `num_parameters`, that take gradients; None: not known.
        folded: paths of modules that do nothing in the place of a norm: folded ones, and where a norm of `before` was.
        population_errors: of the statistics in `population`.
        domain_errors: domain -> path -> standard error of the mean in `domains` [C], from the differences between
            samples; infinite for fewer than two.
        images: "train" and "test" -> moments of each image as the model gets it, count [N], mean and var [N, C], in the
            channels' order.
    """

    norms: tuple[NormFacts, ...]
    model_name: str = ""
    is_training: bool = True
    num_parameters: int = 0
    origin: Origin = Origin()
    config: Mapping[str, object] | None = None
    weights: WeightsFacts | None = None
    training: TrainingFacts | None = None
    forwards: tuple[ForwardFacts, ...] = ()
    population: Mapping[tuple[str, str], Moments] = dataclasses.field(default_factory=dict)
    evaluation: EvaluationFacts | None = None
    worker_differences: Mapping[str, float] | None = None
    domains: Mapping[str, Mapping[str, Moments]] = dataclasses.field(default_factory=dict)
    steps: StepFacts | None = None
    averaged: tuple[NormFacts, ...] | None = None
    before: tuple[NormFacts, ...] | None = None
    failures: tuple[str, ...] = ()
    num_trained: int | None = None
    folded: tuple[str, ...] = ()
    population_errors: Mapping[tuple[str, str], StandardErrors] = dataclasses.field(default_factory=dict)
    domain_errors: Mapping[str, Mapping[str, Tensor]] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Moments] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def batch_norms(self) -> tuple[NormFacts, ...]:
        """Norms that normalize by a batch or by a population."""
        return tuple(norm for norm in self.norms if norm.is_batch_norm)

    def find_norm(self, path: str) -> NormFacts | None:
        """The norm at a path."""
        return self._by_path.get(path)

    @functools.cached_property
    def _by_path(self) -> dict[str, NormFacts]:
        return {norm.path: norm for norm in self.norms}

    def get_config(self, key: str, default: object = None) -> object:
        """The value of a config key; `default` where there is no config, or no such key."""
        return default if self.config is None else self.config.get(key, default)

    @functools.cached_property
    def is_trained(self) -> bool:
        """Whether weights of a training are there: they were loaded, or a counter or an affine has moved.

        A model that nobody has trained has every norm at its initial values, which is no fault.
        """
        if self.weights is not None and self.weights.is_loaded:
            return True
        return any(_has_moved(norm) for norm in self.batch_norms)


def _has_moved(norm: NormFacts) -> bool:
    if any(population.num_updates for population in norm.populations):
        return True
    return any(affine.bias is not None and bool(affine.bias.count_nonzero()) for affine in norm.affines)
