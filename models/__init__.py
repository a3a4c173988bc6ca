"""The model repository. A package only so that `manifest.schema.json` is installed with both sides of the contract."""
