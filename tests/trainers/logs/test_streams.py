"""A run outlives its output's reader; a command that only prints ends without a word."""

import io
import os
import subprocess
import sys
import textwrap

import pytest

from logratio.trainers import cli
from logratio.trainers.logs.streams import Lasting, lasting_streams

WORDS = ["train", "sft", "--lora_r", "2", "--batch_size", "2", "--max_steps", "3", "--dataset_name", "rows.jsonl"]


def run(tmp_path, code, *, stdout, stderr):
    """The exit status of a new interpreter that runs `code`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, env=environment, stdout=stdout, stderr=stderr
    ).returncode


@pytest.fixture
def nobody():
    """The writing end of a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.slow
def test_training_goes_on_without_its_reader(tmp_path, nobody):
    """Neither the log, nor what a user's code prints, nor a warning ends it."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 2)
    code = f"""
        import sys, warnings
        from logratio.trainers import cli, loop
        inner = loop.train
        def train(*given):
            for number in range(3):
                print("a line that a reward prints", flush=True)
                print("another", file=sys.stderr)
                warnings.warn("careful")
            return inner(*given)
        loop.train = train
        sys.exit(cli.main({[*WORDS, "--output_dir", "out"]!r}))
    """
    assert run(tmp_path, code, stdout=nobody, stderr=nobody) == 0
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_librarys_user_without_a_reader_goes_on_as_well(tmp_path, nobody):
    code = """
        from logratio.trainers.logs.runlog import RunLog
        with RunLog("out", {}, total_steps=2) as log:
            for step in (1, 2):
                log.say("hello")
                log.step({"step": step})
        open("done", "w").close()
    """
    with open(tmp_path / "errors", "w") as errors:
        assert run(tmp_path, code, stdout=nobody, stderr=errors) == 0
    assert (tmp_path / "done").exists() and (tmp_path / "errors").read_text() == ""
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_command_that_only_prints_ends_without_a_word(tmp_path, nobody):
    code = "import sys; from logratio.trainers import cli; sys.exit(cli.main(['--help']))"
    with open(tmp_path / "errors", "w") as errors:
        assert run(tmp_path, code, stdout=nobody, stderr=errors) == 141
    assert "Traceback" not in (said := (tmp_path / "errors").read_text()) and "BrokenPipe" not in said


class Broken:
    encoding = "ascii"

    def __init__(self, error):
        self.error = error

    def write(self, text=""):
        raise self.error

    flush = fileno = write

    def isatty(self):
        return True


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_a_stream_that_fails_swallows_what_is_written(error):
    stream = Lasting(Broken(error))
    assert stream.write("abc") == 3 and stream.isatty()
    with pytest.raises(ValueError):
        Lasting(Broken(ValueError("a fault of ours"))).write("abc")


def test_names_that_the_terminal_cannot_show_are_written_escaped():

    inner = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    Lasting(inner).write("a é \udcff")
    assert inner.buffer.getvalue() == b"a \\xe9 \\udcff"


def test_the_streams_are_given_back(capsys):
    kept = sys.stdout, sys.stderr
    with pytest.raises(KeyError), lasting_streams():
        print("seen")
        raise KeyError
    assert (sys.stdout, sys.stderr) == kept and capsys.readouterr().out == "seen\n"
    assert cli.main(["train", "nope"]) == 1 and "unknown method" in capsys.readouterr().err


def test_what_a_terminal_cannot_show_ends_no_command(monkeypatch):
    """As a minus sign of `logratio compare` where the locale is C."""
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    monkeypatch.setattr(cli, "dispatch", lambda words: print("a \u2212 b") or 0)
    assert cli.main(["compare"]) == 0 and shown.getvalue() == b"a \\u2212 b\n"
