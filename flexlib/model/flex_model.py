"""The flexible model: latent coordinates -> mesh displacements, and the canonical map that rides on the mesh."""

from __future__ import annotations

import io
import itertools
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.tetra.tetmesh import TetraMesh

MODEL_FILE = "model.pt"
FORMAT_VERSION = 1


class FlowGenerator(nn.Module):
    """Latent coordinates (b, K) to displacements of the mesh vertices (b, nv, 3) in Angstrom.

    A multilayer perceptron (3DFlex: 6 layers of 64 units) plus a linear path from z, both onto a basis of smooth
    displacement fields: the mesh's elastic modes, each scaled so that one unit costs the same strain, and the six
    rigid-body motions. The linear path carries the spectral start; the perceptron starts at zero.
    """

    basis_A: torch.Tensor
    input_matrix: torch.Tensor
    input_offset: torch.Tensor

    def __init__(self, basis_A: torch.Tensor, latent_dims: int, layers: int, hidden_units: int):
        """``basis_A`` (m, nv, 3): displacement in Angstrom per unit coefficient."""
        super().__init__()
        num_fields = len(basis_A)
        self.register_buffer("basis_A", basis_A)
        # the standardised latents are mapped back to the scale that the network first saw (see ``rescale_latents``)
        self.register_buffer("input_matrix", torch.eye(latent_dims))
        self.register_buffer("input_offset", torch.zeros(latent_dims))
        widths = [latent_dims] + [hidden_units] * layers
        blocks: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(widths):
            blocks += [nn.Linear(fan_in, fan_out), nn.SiLU()]
        self.hidden = nn.Sequential(*blocks)
        self.output = nn.Linear(hidden_units, num_fields)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)
        self.linear = nn.Parameter(torch.zeros(latent_dims, num_fields))

    def coefficients(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, m) basis coefficients."""
        raw = z @ self.input_matrix.T + self.input_offset
        return raw @ self.linear + self.output(self.hidden(raw))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, nv, 3) displacements in Angstrom."""
        coefficients = self.coefficients(z)
        return (coefficients @ self.basis_A.flatten(1)).view(len(z), -1, 3)

    def assembled(self) -> AssembledFlow:
        """The same flow with its last layer multiplied by the basis once, for as long as the parameters stay."""
        last = torch.cat([self.output.weight.T, self.linear, self.output.bias[None]])
        return AssembledFlow(self, last @ self.basis_A.flatten(1))

    @torch.no_grad()
    def stand_still(self) -> None:
        """Make every displacement zero."""
        self.linear.zero_()
        self.output.weight.zero_()
        self.output.bias.zero_()

    @torch.no_grad()
    def rescale_latents(self, matrix: torch.Tensor, offset: torch.Tensor) -> None:
        """Keep every displacement while latents change by ``z_old = matrix @ z_new + offset``."""
        self.input_offset += self.input_matrix @ offset
        self.input_matrix.copy_(self.input_matrix @ matrix)


@dataclass(frozen=True)
class AssembledFlow:
    """A flow as a sum of few fields: a batch's displacements cost a fraction of what the whole basis does."""

    flow: FlowGenerator
    fields_A: torch.Tensor  # (hidden units + K + 1, 3 nv)

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """(b, K) latents to (b, nv, 3) displacements in Angstrom."""
        raw = z @ self.flow.input_matrix.T + self.flow.input_offset
        factors = torch.cat([self.flow.hidden(raw), raw, raw.new_ones((len(raw), 1))], dim=1)
        return (factors @ self.fields_A).view(len(z), -1, 3)


@dataclass
class FlexModel:
    """A trained point: mesh, flow, latents and canonical map, as the generator and the reconstruction use it."""

    mesh: TetraMesh
    flow: FlowGenerator
    latents: np.ndarray  # (n, K) float32, rows as in the prepared particles.star
    canonical: np.ndarray  # (box, box, box) float32, consensus density units
    box: int
    pixel_size_A: float
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0

    @property
    def latent_dims(self) -> int:
        """Number of latent coordinates K."""
        return self.latents.shape[1]

    @torch.no_grad()
    def displacements_A(self, z: torch.Tensor | np.ndarray) -> torch.Tensor:
        """(b, K) latents to (b, nv, 3) float32 vertex displacements in Angstrom."""
        device = self.flow.basis_A.device
        return self.flow(torch.as_tensor(z, dtype=torch.float32, device=device))

    def to(self, device: torch.device | str) -> FlexModel:
        """Move the flow to ``device`` (in place) and return self."""
        self.flow.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write to ``path`` atomically: tensors, numbers and text only, readable with ``weights_only=True``."""
        content = {
            "format_version": FORMAT_VERSION,
            "mesh": {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in asdict(self.mesh).items()},
            "flow": self.flow.state_dict(),
            "layers": len(self.flow.hidden) // 2,
            "hidden_units": self.flow.output.in_features,
            "latents": torch.from_numpy(self.latents),
            "canonical": torch.from_numpy(self.canonical),
            "box": self.box,
            "pixel_size_A": self.pixel_size_A,
            "settings": self.settings,
            "epoch": self.epoch,
        }
        with atomic_path(path) as temporary:
            torch.save(content, temporary)

    @classmethod
    def load(cls, train_dir: str | Path, device: torch.device | str = "cpu") -> FlexModel:
        """Read the model of a training folder (or a model file itself).

        Raises InputError where there is none or its format is of another version.
        """
        path = Path(train_dir)
        path = path / MODEL_FILE if path.is_dir() else path
        if not path.exists():
            raise InputError(f"{path}: no trained model there; run the training of this point first")
        content = torch.load(io.BytesIO(path.read_bytes()), map_location="cpu", weights_only=True)
        if content["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{path}: model format {content['format_version']}, this version reads {FORMAT_VERSION}: train again"
            )
        state = content["flow"]
        flow = FlowGenerator(state["basis_A"], content["latents"].shape[1], content["layers"], content["hidden_units"])
        flow.load_state_dict(state)
        mesh = TetraMesh(**{name: tensor.numpy() for name, tensor in content["mesh"].items()})
        return cls(
            mesh,
            flow.to(device),
            content["latents"].numpy(),
            content["canonical"].numpy(),
            content["box"],
            content["pixel_size_A"],
            content["settings"],
            content["epoch"],
        )


def rigid_modes_A(vertices_A: np.ndarray) -> np.ndarray:
    """Six rigid-body displacement fields of the mesh, (6, nv, 3), each of unit rms displacement in Angstrom.

    Three translations along x, y, z, then three infinitesimal rotations about the vertices' mean.
    """
    centred = vertices_A - vertices_A.mean(0)
    fields = [np.broadcast_to(axis, centred.shape) for axis in np.eye(3)]
    fields += [np.cross(axis, centred) for axis in np.eye(3)]
    return np.stack([f / np.sqrt((f**2).sum(1).mean()) for f in fields])


def displacement_basis_A(modes: np.ndarray, stiffness: np.ndarray, vertices_A: np.ndarray) -> np.ndarray:
    """Basis of the flow's output, (m + 6, nv, 3) float32.

    ``modes`` (m, nv, 3) have unit rms displacement and ``stiffness`` (m,) is their strain energy; a unit coefficient
    moves the softest mode by one Angstrom rms and a stiffer one by ``sqrt(softest / stiffness)`` of it. Modes that cost
    (nearly) nothing, such as the swing of a cell that hangs on one vertex, are scaled like the softest elastic one.
    """
    softest = stiffness[stiffness > 1e-4 * stiffness.mean()].min()
    scale = np.sqrt(softest / np.maximum(stiffness, softest))
    return np.concatenate([modes * scale[:, None, None], rigid_modes_A(vertices_A)]).astype(np.float32)
