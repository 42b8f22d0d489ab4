"""The tools, each asked in the way that its own documentation shows, and what of their answers counts as which fault.

A peer has found a fault if one of its rules that is about this kind of fault speaks, at whatever layer: the mapping is
generous, as none of them names a fault of norms by code. Rules about other matters are no false alarm.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bench.doctor.case import Case
from bnext import diagnose, load_config
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.evaluation.doctor import examine_detector

__all__ = ["TOOLS", "find_version"]

Tool = Callable[[Case], set[str]]


def ask_bnext(case: Case) -> set[str]:
    """Codes of errors, warnings and notes; "alarm" where there is an error or a warning."""
    if case.diagnose is not None:
        diagnosis = case.diagnose()
    elif case.config is not None:
        file, pairs = case.config
        cfg = load_config(file, ["MODEL.DEVICE", "cpu", *pairs])
        facts, model = examine_detector(cfg, Origin("config", file, pairs, cfg.MODEL.WEIGHTS))
        diagnosis = examine_facts(facts)
    else:
        optimizer, options = case.optimizer, dict(case.options)
        diagnosis = diagnose(case.model, case.data or None, optimizer=optimizer, **options)

    codes = {finding.code for finding in diagnosis.findings}
    return codes | ({"alarm"} if diagnosis.select("warning") else set())


# ---- torch-audit: rules -> faults

_TORCH_AUDIT = {
    "TA100": ("BN011",),
    "TA103": ("BN032",),
    "TA304": ("BN008", "BN009", "BN010", "BN003"),
    "TA400": ("BN031",),
    "TA402": ("BN027",),
    "TA405": ("BN032",),
    "TA500": ("BN013", "BN016"),
    "TA501": ("BN001", "BN015"),
}


def ask_torch_audit(case: Case) -> set[str]:
    """Its Auditor around a forward and a backward pass, and a static audit."""
    from torch_audit import Auditor

    model = copy.deepcopy(case.model)
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if case.optimizer is not None and len(case.optimizer.param_groups) > 1:
        optimizer = _copy_optimizer(case.optimizer, case.model, model)

    auditor = Auditor(model, optimizer=optimizer, every_n_steps=1)
    with auditor:
        auditor.audit_static()
        auditor.audit_init()
        if case.data:
            with contextlib.suppress(Exception):  # a detector that is given no targets, a norm that refuses its batch
                outputs = auditor.forward(case.data[0])
                if case.labels:
                    auditor.backward(nn.functional.cross_entropy(outputs, case.labels[0]))
    result = auditor.finish()
    return _translate([finding.rule_id for finding in result.findings], _TORCH_AUDIT)


def _copy_optimizer(optimizer: Any, model: nn.Module, copied: nn.Module) -> torch.optim.Optimizer:
    names = {parameter: name for name, parameter in model.named_parameters()}
    parameters = dict(copied.named_parameters())
    groups = []
    for group in optimizer.param_groups:
        of_copy = [parameters[names[parameter]] for parameter in group["params"]]
        groups.append({"params": of_copy, "weight_decay": group["weight_decay"]})
    return torch.optim.SGD(groups, lr=0.01)


def _translate(rules: Sequence[str], faults: Mapping[str, Sequence[str]]) -> set[str]:
    codes = {code for rule in rules for code in faults.get(rule, ())}
    return codes | ({"alarm"} if codes else set())


# ---- model-clinic: conditions -> faults

_MODEL_CLINIC = {
    "nan_inf": ("BN011",),
    "dead_neurons": ("BN032",),
    "exploding_norm": ("BN033",),
    "vanishing_norm": ("BN012", "BN032"),
    "norm_drift": ("BN033", "BN012", "BN019"),
    "heavy_tails": ("BN033",),
}
_NORM_WORDS = ("bn", "norm", "running_", "body.1", "body.4", "body.7", "downsample.1", "tower.1")


def ask_model_clinic(case: Case) -> set[str]:
    """Its diagnosis of the state dict; findings on the tensors of norms count."""
    import model_clinic

    findings = model_clinic.diagnose(dict(case.model.state_dict()))
    of_norms = [finding for finding in findings if any(word in finding.param_name for word in _NORM_WORDS)]
    return _translate([finding.condition for finding in of_norms], _MODEL_CLINIC)


# ---- neural-net-checklist: assertions -> faults


def ask_checklist(case: Case) -> set[str]:
    """Its assertion that an output of evaluation mode depends on its own image alone, on classifiers."""
    from neural_net_checklist import torch_diagnostics

    if not case.labels:
        return set()
    batch = (case.data[0], case.labels[0])
    try:
        torch_diagnostics.assert_forward_batch_independence(lambda: copy.deepcopy(case.model), batch)
    except Exception:
        return {"BN034", "alarm"}
    return set()


# ---- torch itself


def ask_torch(case: Case) -> set[str]:
    """A step of training: what torch raises or warns of, in words that name a norm or its batch."""
    model = copy.deepcopy(case.model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if case.data:
                model(case.data[0])
        except Exception as error:
            caught_text = str(error)
        else:
            caught_text = ""

    texts = [caught_text, *(str(warning.message) for warning in caught)]
    if any("more than 1 value per channel" in text for text in texts):
        return {"BN010", "alarm"}
    return {"alarm"} if any("norm" in text.lower() and "batch" in text.lower() for text in texts) else set()


TOOLS: Mapping[str, Tool] = {
    "bnext": ask_bnext,
    "torch-audit": ask_torch_audit,
    "model-clinic": ask_model_clinic,
    "neural-net-checklist": ask_checklist,
    "torch": ask_torch,
}


def find_version(tool: str) -> str:
    """The version of a tool; "" where it is not installed."""
    try:
        return importlib.metadata.version(tool)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def silent() -> Any:
    """Nothing that a tool prints is shown in this scope: it is not for the table."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
