"""The devices of this host, and the checks of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.devices import ascend, engine, gpu, variables
from megatron_sorted.doctor.devices.names import library_versions
from megatron_sorted.doctor.finding import Finding
from megatron_sorted.doctor.probes import Probe, training_path
from megatron_sorted.platform.transformer_engine import installed_engine

Check = tuple[str, Callable[[], list[Finding]]]


@dataclass(frozen=True)
class LocalDevices:
    """The devices of a host according to the system and the libraries.

    Attributes:
        probes: The results of importing the libraries, by name.
        gpus: The GPUs according to the system.
        npus: The NPUs according to the system.
    """

    probes: Mapping[str, Probe]
    gpus: gpu.GpuHost
    npus: ascend.NpuHost

    @property
    def torch(self) -> Mapping[str, Any] | None:
        """Return the facts about torch; None if it cannot be imported."""
        return self.probes["torch"].facts

    @property
    def names(self) -> dict[str, list[str]]:
        """Return the names of the devices that torch can use, by kind."""
        npu_facts = self.probes.get("torch_npu", Probe()).facts
        facts = {"cuda": self.torch, "npu": npu_facts}
        return {kind: list((known or {}).get("devices", [])) for kind, known in facts.items()}

    @property
    def present(self) -> bool:
        """Return whether the host has accelerators, whether or not the libraries see them."""
        return bool(self.gpus.device_files or self.npus.device_files)

    def chosen(self, device: str) -> str:
        """Return the kind of device that a run with ``--device device`` uses here."""
        if device != "auto":
            return device
        return next((kind for kind, names in self.names.items() if names), "cpu")

    def has_bf16(self, device: str) -> bool:
        """Return whether a kind of device computes in bfloat16 here."""
        if device == "cuda":
            return gpu.supports_bf16(self.torch or {})
        return ascend.supports_bf16(self.names.get(device, []))

    def checks(
        self, device: str, installed: Mapping[str, str], environment: Mapping[str, str]
    ) -> list[Check]:
        """Return the checks of devices, their libraries and their variables, by name.

        Args:
            device: ``--device``.
            installed: Versions of distributions, by name in lower case.
            environment: The process's environment.
        """
        npu, imported = self.probes.get("torch_npu"), self.probes.get("transformer_engine")
        path = training_path()
        versions = {**installed, **library_versions(installed)}
        has_npu = self.npus.device_files > 0
        # as in a run, the system's NPUs count here whether or not the libraries see them
        kind = "npu" if device == "auto" and has_npu else self.chosen(device)
        return [
            ("GPU", lambda: gpu.check_gpus(self.gpus, self.torch, device, environment)),
            ("NPU", lambda: ascend.check_npus(self.npus, versions, npu, device)),
            (
                engine.NAME,
                lambda: engine.check_transformer_engine(
                    imported, installed_engine(path), kind, path
                ),
            ),
            ("variables", lambda: variables.check_variables(environment, has_npu)),
        ]


def read_devices(probes: Mapping[str, Probe], environment: Mapping[str, str]) -> LocalDevices:
    """Return the devices of this host, given the results of importing libraries."""
    root = Path("/")
    return LocalDevices(probes, gpu.read_gpu_host(root), ascend.read_npu_host(root, environment))
