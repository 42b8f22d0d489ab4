"""Commands: `bnext <command>` and each file of `tools/` parse here, and call one function of this room."""
