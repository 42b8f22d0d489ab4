"""Diagnoses that tests of reports share."""

import dataclasses

import torch
from torch import nn

from bnext.diagnostics import diagnose
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.diagnostics.findings import Evidence, Finding, Remedy
from bnext.diagnostics.registry import find_checks

__all__ = ["NASTY", "Head", "diagnose_ill", "diagnose_nasty", "find_something", "make_ill", "place_in"]

NASTY = '<script>alert(1)</script>\x1b[31m\n"]($)`|\ud800\u202e'  # a name of a module


class Head(nn.Module):
    """A tower that is called on two features whose means are apart."""

    def __init__(self, norm, name="tower"):
        super().__init__()
        self.add_module(name, nn.Sequential(nn.Conv2d(3, 4, 1), norm))
        self.name = name

    def forward(self, features):
        return [getattr(self, self.name)(feature) for feature in features]


def make_ill(name="tower"):
    """A model with two errors, and data for it."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((2, 3, 8, 8), (2, 3, 4, 4))
    features = [torch.randn(size, generator=generator) + 3 * level for level, size in enumerate(sizes)]
    model = Head(nn.BatchNorm2d(4, momentum=0.99), name)
    for parameter in getattr(model, name)[0].parameters():
        nn.init.constant_(parameter, 0.5)
    return model, [features]


def diagnose_ill(name="tower"):
    """BN001 and BN017, both errors, whatever else other checks see."""
    diagnosis = diagnose(*make_ill(name))
    findings = [finding for finding in diagnosis.findings if finding.code in ("BN001", "BN017")]
    return dataclasses.replace(diagnosis, findings=tuple(findings))


def diagnose_nasty():
    """The same of a model whose module has a name with markup, codes of terminals and half a letter."""
    return diagnose_ill(NASTY)


def find_something(facts, *severities, **changes):
    """A diagnosis with a finding of each severity, whatever is true of the facts."""
    check = find_checks()["BN001"]
    layers = tuple(norm.path for norm in facts.norms)
    evidence = {"layers": layers, "text": "Seen.", "remedy": Remedy("Do it."), **changes}
    findings = [Finding(check, Evidence(severity, **evidence)) for severity in severities]
    return dataclasses.replace(examine_facts(facts), findings=tuple(findings))


def place_in(diagnosis, config_file, weights="", kind="config"):
    """The diagnosis as that of a config, or of a checkpoint alone."""
    origin = Origin(kind, str(config_file), ("SEED", "1"), weights)
    return dataclasses.replace(diagnosis, facts=dataclasses.replace(diagnosis.facts, origin=origin))
