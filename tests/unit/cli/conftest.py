import pytest

from pixart_sigma.cli.commands import main


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Runs `pixart-sigma` in `tmp_path` -> (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        status = main([*map(str, options)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
