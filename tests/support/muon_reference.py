"""Muon in plain PyTorch, from the published formulas; it shares no code with Megatron's.

Sources: Jordan et al., kellerjordan.github.io/posts/muon (momentum, Newton-Schulz, ``simple``); Liu
et al., arXiv 2502.16982 (weight decay, ``spectral``); modded-nanogpt (``quintic``); Amsel et al.,
arXiv 2505.16932, algorithm 1 (``polar_express``). Matrices of one row a token, and vectors, are
AdamW's.
"""

import itertools

import torch

from megatron_sorted.settings.run import Settings

PAPER_OF_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
COEFFICIENTS = {
    "simple": [(3.4445, -4.7750, 2.0315)],
    "quintic": [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ],
    "polar_express": [
        *((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in PAPER_OF_POLAR_EXPRESS),
        (1.875, -1.25, 0.375),
    ],
}
LOOKUPS = ("embedding.", "output_layer.", "exit_output_layers.")


def is_muons(name: str, parameter: torch.Tensor) -> bool:
    """Return whether Muon updates the parameter of this global name."""
    return parameter.dim() == 2 and not name.startswith(LOOKUPS)


def orthogonal(matrix: torch.Tensor, kind: str, steps: int) -> torch.Tensor:
    """Return the matrix after Newton-Schulz steps, which bring its singular values near 1."""
    x = matrix.double()
    x = x / x.norm().clamp(min=1e-7)
    if wide := x.size(0) > x.size(1):
        x = x.t()
    for a, b, c in itertools.islice(itertools.cycle(COEFFICIENTS[kind]), steps):
        square = x @ x.t()
        x = a * x + (b * square + c * square @ square) @ x
    return (x.t() if wide else x).float()


def factor(rows: int, columns: int, mode: str) -> float:
    """Return the factor of an update."""
    return {
        "spectral": max(rows, columns),
        "unit_rms_norm": rows / columns,
        "shape_scaling": max(1.0, rows / columns),
    }[mode] ** 0.5


class MuonAndAdam:
    """The optimizer of ``--optimizer muon`` on whole parameters.

    Args:
        settings: The run.
        parameters: {global name: trained parameter}.
    """

    def __init__(self, settings: Settings, parameters: dict[str, torch.Tensor]):
        self.settings = settings
        self.matrices = {n: p for n, p in parameters.items() if is_muons(n, p)}
        self.momenta = {name: torch.zeros_like(p) for name, p in self.matrices.items()}
        rest = [p for name, p in parameters.items() if name not in self.matrices]
        self.parameters = list(parameters.values())
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.dim() > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
        )

    def zero_grad(self, set_to_none: bool) -> None:
        """Set every gradient to zero, or to none."""
        for parameter in self.parameters:
            parameter.grad = None if set_to_none else torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter."""
        s = self.settings
        for name, parameter in self.matrices.items():
            momentum = self.momenta[name]
            momentum.mul_(s.muon_momentum).add_(parameter.grad, alpha=1 - s.muon_momentum)
            update = momentum
            if s.muon_nesterov:
                update = (1 - s.muon_momentum) * parameter.grad + s.muon_momentum * momentum
            parameter.mul_(1 - s.lr * s.weight_decay)
            parameter.sub_(s.lr * s.muon_extra_scale_factor * self._scaled(name, update))
        self.adam.step()

    def _scaled(self, name: str, update: torch.Tensor) -> torch.Tensor:
        """Return the scaled orthogonal update of a whole matrix."""
        ranks = self.settings.tensor_model_parallel_size
        if self.settings.muon_tp_mode != "blockwise" or ranks == 1 or "adapters" in name:
            return self._whole(name, update)
        if name.endswith("linear_fc1.weight"):  # every rank has its rows of the gate and of up
            gates, ups = (half.chunk(ranks) for half in update.chunk(2))
            done = [
                self._whole(name, torch.cat(pair)).chunk(2) for pair in zip(gates, ups, strict=True)
            ]
            return torch.cat([half[index] for index in (0, 1) for half in done])
        dim = 0 if name.endswith("linear_qkv.weight") else 1
        return torch.cat([self._whole(name, part) for part in update.chunk(ranks, dim)], dim)

    def _whole(self, name: str, update: torch.Tensor) -> torch.Tensor:
        s = self.settings

        def scaled(matrix: torch.Tensor) -> torch.Tensor:
            step = orthogonal(matrix, s.muon_coefficient_type, s.muon_num_ns_steps)
            return step * factor(*matrix.shape, s.muon_scale_mode)

        if not (s.muon_split_qkv and name.endswith("linear_qkv.weight")):
            return scaled(update)
        queries = s.num_attention_heads // s.num_query_groups
        width = update.size(1)
        # per group: its queries, a key, a value
        grouped = update.view(-1, queries + 2, s.hidden_size // s.num_attention_heads, width)
        parts = grouped.split((queries, 1, 1), dim=1)
        done = [scaled(part.reshape(-1, width)).view(part.shape) for part in parts]
        return torch.cat(done, 1).view(update.shape)
