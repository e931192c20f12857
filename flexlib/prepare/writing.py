"""What prepare writes: training images, maps at both boxes, the particles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from flexlib.files import atomic_path
from flexlib.images.digest import digest_texts
from flexlib.images.normalisation import Normalisation
from flexlib.images.sources import FullImages
from flexlib.images.stack import ImageStackWriter
from flexlib.imaging.fourier import fourier_crop_map
from flexlib.imaging.image_transforms import centred_irfft2, fourier_resample
from flexlib.imaging.maps import Map, crop_or_pad_real, write_map
from flexlib.imaging.masks import resample_mask
from flexlib.layout import ParticlesFolder
from flexlib.particles.star_write import relion_tables, write_star
from flexlib.particles.table import OpticsGroup, Particles
from flexlib.prepare.noise import CHUNK_PIXELS


def write_training_stack(source: FullImages, path: Path, train_box: int) -> None:
    """Whiten, Fourier-crop and write all images of ``source``, chunk by chunk, as a float32 stack."""
    pixel_size_A = source.pixel_size_A * source.box / train_box
    step = max(1, CHUNK_PIXELS // source.box**2)
    with atomic_path(path) as temporary, ImageStackWriter(temporary, len(source), train_box, pixel_size_A) as stack:
        for start in tqdm(range(0, len(source), step), desc="training images", unit="chunk", disable=None):
            rows = np.arange(start, min(start + step, len(source)))
            stack.append(_training_images(source, rows, train_box))


def _training_images(source: FullImages, rows: np.ndarray, train_box: int) -> np.ndarray:
    """(b, train_box, train_box) whitened images at ``rows``."""
    return centred_irfft2(fourier_resample(source.whitened(rows), train_box)).numpy()


def write_maps(
    folder: ParticlesFolder, consensus: Map, soft_mask: np.ndarray, like: Map, crop_box: int, train_box: int
) -> float:
    """Write consensus and mask at the reconstruction box and at the training box.

    Parameters
    ----------
    folder
        Where to write.
    consensus
        On the images' full grid.
    soft_mask
        (N, N, N) on the same grid.
    like
        The user's map; those written lie in space where it does.
    crop_box, train_box
        In voxels: of the reconstruction and of the training.

    Returns
    -------
    mask_share
        Of the training box's voxels, those where the mask is above 0: what a mesh covers.
    """
    pixel_size_A = consensus.pixel_size_A
    density, soft_mask = crop_or_pad_real(consensus.data, crop_box), crop_or_pad_real(soft_mask, crop_box)
    train_pixel_size_A = pixel_size_A * crop_box / train_box
    write_map(folder.full_consensus, density, pixel_size_A, like)
    write_map(folder.full_mask, soft_mask, pixel_size_A, like)
    write_map(folder.consensus, fourier_crop_map(density, train_box), train_pixel_size_A, like)
    training_mask = resample_mask(soft_mask, train_box)
    write_map(folder.mask, training_mask, train_pixel_size_A, like)
    return float((training_mask > 0).mean())


def write_particles(
    folder: ParticlesFolder,
    particles: Particles,
    optics: tuple[OpticsGroup, ...],
    rotations: np.ndarray,
    normalisation: Normalisation,
    digest: np.ndarray,
) -> None:
    """Write particles.star: training images with poses and CTFs, and where each came from.

    Each particle has a row for every rotation of the symmetry group, all of the same image and half-set: a map that
    looks the same turned by g is seen by an image of pose R under R g too.

    Parameters
    ----------
    folder
        Where to write.
    particles
        Those kept.
    optics
        Their optics groups as the training images have them.
    rotations
        (m, 3, 3) of the symmetry group, the identity first.
    normalisation
        Of the original images.
    digest
        (n,) uint64 their checksums (``digest.image_digests``).
    """
    count, copies = len(particles), len(rotations)
    expanded = particles.subset(np.repeat(np.arange(count), copies))
    training = replace(
        expanded,
        rotation=(particles.rotation[:, None] @ rotations).reshape(-1, 3, 3),
        optics=optics,
        contrast_sign=np.ones(count * copies),
        stack_index=np.zeros(count * copies, np.int32),
        image_index=np.repeat(np.arange(count), copies),
    )
    blocks = relion_tables(training, [folder.images.name])
    table = blocks["particles"]
    stacks = [str(stack.absolute()) for stack in particles.stack_paths]
    table["flexImageName"] = [
        f"{index + 1:06d}@{stacks[stack]}"
        for index, stack in zip(expanded.image_index, expanded.stack_index, strict=True)
    ]
    table["flexImageDigest"] = np.repeat(digest_texts(digest), copies)
    table["flexInputRow"] = expanded.source_row
    table["flexInputSign"] = expanded.contrast_sign.astype(int)
    if expanded.micrograph is not None:
        table["flexMicrograph"] = expanded.micrograph + 1
    for name, values in normalisation.columns().items():
        table[name] = np.repeat(values, copies)
    if copies > 1:
        table["flexSymmetryCopy"] = np.tile(np.arange(copies), count)
    write_star(blocks, folder.particles)
