"""The names of bnext: `__init__.py` imports each of them when it is first used."""

from . import heads as heads
from .cli.from_python import evaluate as evaluate
from .cli.from_python import train as train
from .config import add_bnext_config as add_bnext_config
from .config import load_config as load_config
from .config.files import get_config_file as get_config_file
from .diagnostics import Diagnosis as Diagnosis
from .diagnostics import TrainingWatch as TrainingWatch
from .diagnostics import diagnose as diagnose
from .diagnostics import find_norm_groups as find_norm_groups
from .diagnostics import format_norm_groups as format_norm_groups
from .errors import BNextError as BNextError
from .errors import CheckpointError as CheckpointError
from .errors import ConfigError as ConfigError
from .errors import DatasetError as DatasetError
from .errors import DomainError as DomainError
from .errors import LaunchError as LaunchError
from .errors import StatisticsError as StatisticsError
from .errors import WorkerError as WorkerError
from .evaluation.adversarial import make_adversarial as make_adversarial
from .kernels import use_kernels as use_kernels
from .layers import BatchNorm2d as BatchNorm2d
from .layers import CycleBatchNormList as CycleBatchNormList
from .layers import LevelBatchNorm2d as LevelBatchNorm2d
from .layers import NormSpec as NormSpec
from .layers import Shuffled as Shuffled
from .layers import build_norm as build_norm
from .layers import deal_statistics as deal_statistics
from .layers import use_groups as use_groups
from .layers import virtual_samples as virtual_samples
from .probes import activations_by_depth as activations_by_depth
from .probes import gradient_histogram as gradient_histogram
from .probes import highest_learning_rate as highest_learning_rate
from .probes import loss_along_gradient as loss_along_gradient
from .probes import output_gradients as output_gradients
from .repair import AveragedWeights as AveragedWeights
from .repair import accumulate_gradients as accumulate_gradients
from .repair import compare_statistics as compare_statistics
from .repair import repair as repair
from .scope import count_levels as count_levels
from .scope import frozen_statistics as frozen_statistics
from .scope import use_domain as use_domain
from .scope import use_level as use_level
from .statistics import following_stream as following_stream
from .statistics import recompute_population_statistics as recompute_population_statistics
from .surgery import add_domain as add_domain
from .surgery import check_norm_state as check_norm_state
from .surgery import convert_norm as convert_norm
from .surgery import convert_norm_state as convert_norm_state
from .surgery import copy_norm_state as copy_norm_state
from .surgery import drop_domain as drop_domain
from .surgery import fold_norms as fold_norms
from .surgery import freeze_norms as freeze_norms
from .surgery import merge_domains as merge_domains
from .surgery import select_domain as select_domain
from .surgery import unfreeze_norms as unfreeze_norms

__version__: str

def register() -> None: ...
