"""The flexible model as a file: mesh, flow, latents, and the canonical map that rides on the mesh."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flexlib.errors import InputError
from flexlib.files import atomic_path
from flexlib.layout import TrainFolder
from flexlib.model.flow import FlowGenerator
from flexlib.particles.pose_change import PoseChange
from flexlib.runtime import load_saved
from flexlib.tetra.tetmesh import TetraMesh

FORMAT_VERSION = 1
_ARRAYS = ("latent_covariance", "probability", "parts", "occupancy", "occupancy_share")  # that a model may lack


@dataclass
class FlexModel:
    """What a training finds: mesh, flow, latents and canonical map, as generate and reconstruct use them."""

    mesh: TetraMesh
    flow: FlowGenerator
    latents: np.ndarray  # (n, K) float32, rows as those of the prepared particles
    canonical: np.ndarray  # (box, box, box) float32, consensus density units
    box: int
    pixel_size_A: float
    settings: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    # what refinement made of the input's poses and contrasts, in the order of the latents, under this model and under
    # the rigid map of the same particles; None where they were not refined
    pose: PoseChange | None = None
    rigid_pose: PoseChange | None = None
    # rows as those of the latents; None where training did not ask, or is under way
    latent_covariance: np.ndarray | None = None  # (n, K, K) float32, of the posteriors; the latents are their means
    probability: np.ndarray | None = None  # (n,) float32, posterior probability that the image shows a particle
    parts: np.ndarray | None = None  # (box, box, box) uint8, 0 what is always there, 1 to S parts that may be missing
    occupancy: np.ndarray | None = None  # (n, S) float32, posterior probability that the part is there
    occupancy_share: np.ndarray | None = None  # (S,) float32, the share of particles that have it

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
        """Move the flow to ``device`` and return self."""
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
            "pose": _packed(self.pose),
            "rigid_pose": _packed(self.rigid_pose),
            **{name: _tensor(getattr(self, name)) for name in _ARRAYS},
        }
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)

    @classmethod
    def load(cls, train_dir: str | Path, device: torch.device | str = "cpu") -> FlexModel:
        """Read the model of a training folder (or a model file itself).

        Raises
        ------
        InputError
            There is none, it is damaged, or its format is of another version.
        """
        path = Path(train_dir)
        path = TrainFolder(path).model if path.is_dir() else path
        if not path.exists():
            raise InputError(f"{path}: no trained model there; run the training of this sweep point first")
        content = load_saved(path)
        if not isinstance(content, dict) or "format_version" not in content:
            raise InputError(f"{path}: not a model of ours")
        if content["format_version"] != FORMAT_VERSION:
            raise InputError(
                f"{path}: model format {content['format_version']}, this version reads {FORMAT_VERSION}: train again"
            )
        state = content["flow"]
        size = content["latents"].shape[1], content["layers"], content["hidden_units"]
        flow = FlowGenerator(state["basis_A"], *size, frame="frame.weight" in state)
        flow.load_state_dict(state)
        mesh = TetraMesh(**{name: tensor.numpy() for name, tensor in content["mesh"].items()})
        return cls(
            mesh=mesh,
            flow=flow.to(device),
            latents=content["latents"].numpy(),
            canonical=content["canonical"].numpy(),
            box=content["box"],
            pixel_size_A=content["pixel_size_A"],
            settings=content["settings"],
            epoch=content["epoch"],
            pose=_unpacked(content.get("pose")),
            rigid_pose=_unpacked(content.get("rigid_pose")),
            **{name: _array(content.get(name)) for name in _ARRAYS},
        )


def _packed(change: PoseChange | None) -> dict[str, torch.Tensor] | None:
    if change is None:
        return None
    return {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in asdict(change).items()}


def _unpacked(saved: dict[str, torch.Tensor] | None) -> PoseChange | None:
    return None if saved is None else PoseChange(**{name: values.numpy() for name, values in saved.items()})


def _tensor(values: np.ndarray | None) -> torch.Tensor | None:
    return None if values is None else torch.from_numpy(np.ascontiguousarray(values))


def _array(saved: torch.Tensor | None) -> np.ndarray | None:
    return None if saved is None else saved.numpy()
