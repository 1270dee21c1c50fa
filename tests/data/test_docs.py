"""The code of docs/data.md runs in its order, on fewer images."""

from tests.docs import blocks, commands
from vr_jax.cli.main import main
from vr_jax.settings import DataSettings


def test_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    write_set = blocks("data.md", "console")[0].strip()
    assert write_set.startswith('python -c "')
    exec(write_set.removeprefix('python -c "').removesuffix('"').replace("200", "12"), {})
    prepare, check = commands("data.md")
    assert main(prepare) == 0
    assert main(check) == 0
    assert "12 records: 12 can be used" in capsys.readouterr().out
    assert (tmp_path / "check.html").is_file()
    sources, example = blocks("data.md", "python")
    exec(example, {})
    assert "12 samples used, 0 skipped" in capsys.readouterr().out
    exec(sources, several := {})
    assert [one.path for one in DataSettings.from_dict(several["data"]).all_sources][1:] == ["ai2d", "charts/*.json"]
