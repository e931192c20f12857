"""The operator: moved voxels to projected images, and its exact adjoint. One face, one file per backend."""
