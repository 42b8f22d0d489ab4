"""One check a file: `CHECK`, and the function that reads the facts. They are found by `bnext.diagnostics.registry`."""
