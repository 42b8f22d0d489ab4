"""LazyConfigs of detectron2: a file read, overridden and checked, and its nodes. `config.lazy` says what they mean."""

from bnext.lazy_config.nodes import copy_node, find_target, is_lazy, name_target
from bnext.lazy_config.read import is_lazy_file, read_lazy_file

__all__ = ["copy_node", "find_target", "is_lazy", "is_lazy_file", "name_target", "read_lazy_file"]
