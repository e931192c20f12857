"""What a run was: checksums of its inputs, and one file with versions, config, inputs, outputs and command."""

from flexlib.provenance.checksums import checksum_inputs
from flexlib.provenance.write import write_provenance

__all__ = ["checksum_inputs", "write_provenance"]
