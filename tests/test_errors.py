"""What a command line says of a mistake: one line, whoever finds it."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from bnext.cli.run_command import run_command
from bnext.errors import ConfigError, DatasetError


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise DatasetError("An image must be readable; got nothing: at all (x.png). Restore the file.")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_message_of_a_process_that_loads_images_is_one_line_too(num_workers, capsys):
    loader = DataLoader(Broken(), num_workers=num_workers, generator=torch.Generator())
    assert run_command(lambda: list(loader)) == 2
    line = "error: An image must be readable; got nothing: at all (x.png). Restore the file.\n"
    assert capsys.readouterr().err == line


def test_a_message_is_one_short_line_whatever_a_user_has_named():
    """No terminal takes a name for a command, and no value hides the remedy."""
    name = "a\nb\x1b[31m%s {} $"
    error = ConfigError.of(name, "be short", got="9" * 10_000, where=name * 1000, remedy="Shorten it.")
    assert str(error).isprintable()
    assert str(error).startswith("a\\nb\\x1b[31m%s {} $ must be short")
    assert str(error).endswith("Shorten it.")
    assert len(str(error)) < 3000
