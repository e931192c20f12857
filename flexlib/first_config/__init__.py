"""The command ``flex-init``: a first config from the user's own files."""
