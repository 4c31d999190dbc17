"""The devices of this host, with what is wrong with them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sorted.doctor.devices import ascend, extras, gpu, variables
from megatron_sorted.doctor.devices.names import library_versions
from megatron_sorted.doctor.finding import Finding
from megatron_sorted.doctor.probes import Probe

Check = tuple[str, Callable[[], list[Finding]]]


@dataclass(frozen=True)
class LocalDevices:
    """What a host has, and what the libraries say of it.

    Attributes:
        probes: What became of importing the libraries.
        torch: What torch said, alone if need be; None if it cannot be imported.
        gpus: What the system says of GPUs.
        npus: What it says of NPUs.
    """

    probes: Mapping[str, Probe]
    torch: Mapping[str, Any] | None
    gpus: gpu.GpuHost
    npus: ascend.NpuHost

    @property
    def names(self) -> dict[str, list[str]]:
        """Return the names of the devices that can be computed on, by kind."""
        said = self.probes.get("torch_npu", Probe()).facts or {}
        return {
            "cuda": list((self.torch or {}).get("devices", [])),
            "npu": list(said.get("devices", [])),
        }

    @property
    def present(self) -> bool:
        """Return whether the host has accelerators, whatever the libraries make of them."""
        return bool(self.gpus.device_files or self.npus.device_files)

    def chosen(self, wanted: str) -> str:
        """Return the device a run with ``--device wanted`` takes here."""
        return (
            wanted
            if wanted != "auto"
            else next((kind for kind, names in self.names.items() if names), "cpu")
        )

    def count(self, device: str, environment: Mapping[str, str]) -> int:
        """Return how many devices of a kind a process may see; 0 for cpu, which has cores instead."""
        visible = variables.visible_devices(environment, device)
        found = len(self.names.get(device, []))
        return found if visible is None else min(found, visible)

    def has_bf16(self, device: str) -> bool:
        """Return whether a kind of device computes in bfloat16 here."""
        return (
            gpu.knows_bf16(self.torch or {})
            if device == "cuda"
            else ascend.knows_bf16(self.names.get(device, []))
        )

    def checks(
        self, wanted: str, installed: Mapping[str, str], environment: Mapping[str, str]
    ) -> list[Check]:
        """Return the checks of devices, their libraries and their variables, by name.

        Args:
            wanted: ``--device``.
            installed: Versions of distributions, by name in small letters.
            environment: The process's environment.
        """
        npu, has_npu, num_gpus = (
            self.probes.get("torch_npu"),
            bool(self.npus.device_files),
            len(self.names["cuda"]),
        )
        versions = {**installed, **library_versions(installed)}
        return [
            ("GPU", lambda: gpu.check_gpus(self.gpus, self.torch, wanted, environment)),
            ("NPU", lambda: ascend.check_npus(self.npus, versions, npu, wanted)),
            ("kinds of devices", lambda: ascend.check_both_kinds(self.torch, num_gpus, npu)),
            (
                "Transformer Engine",
                lambda: extras.check_transformer_engine(
                    self.probes.get("transformer_engine"), num_gpus
                ),
            ),
            ("Apex", lambda: extras.check_apex(self.probes.get("apex"), installed)),
            ("variables", lambda: variables.check_variables(environment, has_npu)),
        ]


def read_devices(probes: Mapping[str, Probe], environment: Mapping[str, str]) -> LocalDevices:
    """Return the devices of this host, given what became of importing libraries."""
    torch = probes["torch"].facts or probes.get("torch alone", Probe()).facts
    return LocalDevices(
        probes, torch, gpu.read_gpu_host(Path("/")), ascend.read_npu_host(Path("/"), environment)
    )
