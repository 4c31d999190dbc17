"""The doctor's check of Transformer Engine, on made-up installations."""

import sys
from pathlib import Path

import pytest

from megatron_sorted.doctor.devices import engine, gpu
from megatron_sorted.doctor.devices.ascend import NpuHost
from megatron_sorted.doctor.devices.local import LocalDevices
from megatron_sorted.doctor.finding import FAIL, OK, WARN
from megatron_sorted.doctor.probes import Probe
from megatron_sorted.platform.transformer_engine import TRIAL, InstalledEngine
from tests.support.engines import write_distribution, write_engine

NVIDIA = InstalledEngine(Path("/site/transformer_engine"), for_npus=False)
TENPU = InstalledEngine(Path("/site/transformer_engine"), for_npus=True)
BOTH = InstalledEngine(Path("/site/transformer_engine"), True, "the distribution te_torch 2.9")
BOUNDS = 'Requires-Dist: transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"'
NO_BOUNDS = 'Requires-Dist: transformer-engine[core_cu13,pytorch]; extra == "te"'


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    monkeypatch.delenv(TRIAL, raising=False)


def checked(probe, installed, device="cuda", path=()):
    [finding] = engine.check_transformer_engine(probe, installed, device, path)
    return finding


def site(folder: Path, requirement: str) -> list[str]:
    write_distribution(folder, "megatron-core", "0.16.1", "Requires-Dist: torch>=2.6", requirement)
    return [str(folder)]


@pytest.mark.parametrize(
    ("probe", "verdict", "remedy"),
    [
        (Probe({"version": "2.9.0"}), OK, ""),
        (Probe({"version": "2.9.0+70f5366"}), OK, ""),
        (Probe({"version": "2.9.0a0"}), OK, ""),
        (Probe({"version": "2.11.0"}), OK, ""),
        (Probe({"version": "2.12.0"}), WARN, "megatron-core 0.16.1 was made for <2.12.0,>=2.9.0a0"),
        (Probe({"version": "2.8.0"}), WARN, "'transformer-engine[pytorch]<2.12.0,>=2.9.0a0'"),
        (Probe({"version": "unknown"}), WARN, "--transformer-impl local"),
        (
            Probe(errors=("ImportError: x.so: undefined symbol: _ZN3c10",)),
            FAIL,
            "built for another torch",
        ),
        (
            Probe(errors=("ModuleNotFoundError: No module named 'transformer_engine_torch'",)),
            FAIL,
            "Reinstall it",
        ),
        (Probe(errors=("ImportError: libcuda.so.1",)), FAIL, "pip uninstall transformer-engine"),
    ],
)
def test_bounds_are_those_of_the_installed_megatron(probe, verdict, remedy, tmp_path):
    finding = checked(probe, NVIDIA, path=site(tmp_path, BOUNDS))
    assert finding.verdict == verdict and remedy in finding.remedy


@pytest.mark.parametrize("requirement", [NO_BOUNDS, "Requires-Dist: numpy"])
def test_a_megatron_that_names_no_bounds_takes_every_version(requirement, tmp_path):
    assert checked(Probe({"version": "2.15.0"}), NVIDIA, path=site(tmp_path, requirement)) == (
        checked(Probe({"version": "2.15.0"}), NVIDIA, path=[])
    )
    assert checked(Probe({"version": "2.15.0"}), NVIDIA, path=[]).verdict == OK


@pytest.mark.parametrize(
    ("installed", "device", "verdict", "value"),
    [
        (None, "npu", OK, "not installed (optional)"),
        (TENPU, "npu", FAIL, "has not been tried with it"),
        (NVIDIA, "npu", FAIL, "NVIDIA's Transformer Engine, which needs a GPU"),
        (BOTH, "npu", FAIL, "the distribution te_torch 2.9"),
        (BOTH, "cuda", FAIL, "two packages have the name"),
        (TENPU, "cuda", WARN, "does not count"),
        (TENPU, "cpu", WARN, "does not count"),
    ],
)
def test_whose_it_is_decides_by_device(installed, device, verdict, value):
    probe = installed and Probe({"version": "2.13.0"})
    finding = checked(probe, installed, device)
    assert finding.verdict == verdict and value in finding.value
    assert bool(finding.remedy) == (verdict != OK)


def test_a_trial_of_tenpu_is_a_warning(monkeypatch):
    monkeypatch.setenv(TRIAL, "1")
    finding = checked(Probe({"version": "2.13.0"}), TENPU, "npu")
    assert finding.verdict == WARN and "2.13.0" in finding.value


@pytest.mark.parametrize(
    ("device", "npus", "verdict"),
    [("npu", 0, FAIL), ("auto", 8, FAIL), ("auto", 0, WARN), ("cpu", 8, WARN)],
)
def test_the_doctor_finds_tenpu_on_the_path(device, npus, verdict, tmp_path, monkeypatch):
    folder = write_engine(tmp_path, for_npus=True)
    own = "the folder of the program that runs, which a training run does not import from"
    monkeypatch.setattr(sys, "path", [own, str(tmp_path)])
    host = LocalDevices(
        {"torch": Probe({"devices": []}), "transformer_engine": Probe({"version": "2.13.0"})},
        gpu.GpuHost("", 0),
        NpuHost(npus, "", "", "", False),
    )
    checks = dict(host.checks(device, {}, {}))
    [finding] = checks[engine.NAME]()
    assert finding.verdict == verdict and str(folder) in finding.value
