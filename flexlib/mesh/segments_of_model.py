"""Segments of the mask from an atomic model: chains, or ranges of residues."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from flexlib.atoms.model import AtomicModel, read_atomic_model
from flexlib.atoms.placement import check_placement
from flexlib.errors import InputError
from flexlib.imaging.maps import Map
from flexlib.runtime import kd_tree
from flexlib.workflow_support.connections import SegmentPart, parse_segments

logger = logging.getLogger(__name__)

_KEY = "mesh.segments"


def labels_of_model(path: Path, consensus: Map, mask: np.ndarray, segments: tuple[str, ...]) -> np.ndarray:
    """(N, N, N) int32: in the mask the segment of the nearest atom, from 1; -1 outside.

    Parameters
    ----------
    path
        The model, in the frame of the consensus map's header.
    consensus
        The map.
    mask : (N, N, N) bool
        The voxels to label.
    segments
        As in ``parse_segments``; none makes one of each chain.

    Raises
    ------
    InputError
        The model does not lie in the map, or the segments do not fit it.
    """
    model = read_atomic_model(path)
    masked = Map(np.where(mask, consensus.data, 0), consensus.pixel_size_A, consensus.origin_A, consensus.nstart)
    centred_A = check_placement(model, masked, "mesh.segmentation")
    segment = atom_segments(model, segments)
    of_atom = np.flatnonzero(segment > 0)
    place_A = (np.argwhere(mask)[:, ::-1] - consensus.box // 2) * consensus.pixel_size_A
    nearest = kd_tree(centred_A[of_atom]).query(place_A)[1]
    labels = np.full(mask.shape, -1, np.int32)
    labels[mask] = segment[of_atom[nearest]]
    return labels


def atom_segments(model: AtomicModel, segments: tuple[str, ...]) -> np.ndarray:
    """(na,) int32: the segment of each atom, from 1; 0 of those in none.

    Raises
    ------
    InputError
        A chain or a range has no atoms, or two segments have the same.
    """
    chain, number = model.chain, np.array([one.sequence for one in model.residues])[model.residue]
    texts = segments or tuple(dict.fromkeys(one.chain for one in model.residues))
    parts = parse_segments(segments) if segments else [[SegmentPart(text, None)] for text in texts]
    found = np.zeros(len(model), np.int32)
    for at, (text, listed) in enumerate(zip(texts, parts, strict=True), 1):
        for part in listed:
            own = chain == part.chain
            if not own.any():
                known = ", ".join(dict.fromkeys(one.chain for one in model.residues))
                raise InputError(f"{_KEY}: {text!r}: {model.path} has no chain {part.chain}; its chains are {known}")
            if part.residues is not None:
                first, last = part.residues
                own &= (number >= first) & (number <= last)
            if not own.any():
                raise InputError(f"{_KEY}: {text!r}: chain {part.chain} of {model.path} has no residue {first}-{last}")
            if (twice := own & (found > 0)).any():
                atom = int(np.argmax(twice))
                other, residue = texts[found[atom] - 1], model.residues[model.residue[atom]]
                raise InputError(f"{_KEY}: {text!r} and {other!r} both have residue {residue} of {model.path}")
            found[own] = at
        logger.info("segment %d: %s, %d atoms", at, text, int((found == at).sum()))
    if not (found == 0).any():
        return found
    logger.info("%d atoms are in no segment: what is near them goes to the nearest", int((found == 0).sum()))
    return found
