"""The model card says what the run's files say, names no place of this machine, and never takes a person's work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, ModelCardData

from logratio.benchmarks.pages.card import card, write_card
from logratio.benchmarks.pages.runs import read_run

from ._folders import folder, options, preference


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = folder(tmp_path / "runs" / "one", [preference(step) for step in range(1, 41)])
    (path / "adapter_config.json").write_text("{}")
    return path


def written(path: Path) -> str:
    return write_card(read_run(path, path.name))


def test_the_hub_reads_what_the_run_says(run: Path):
    assert written(run) == str(run / "README.md")
    found = ModelCard.load(run / "README.md")
    assert found.data.to_dict() == {
        "base_model": "Qwen/Qwen2.5-0.5B",
        "library_name": "peft",
        "datasets": ["trl-lib/ultrafeedback_binarized"],
        "pipeline_tag": "text-generation",
        "tags": ["logratio", "dpo", "sigmoid", "lora"],
    }
    for told in ("trained by `logratio train dpo` from `Qwen/Qwen2.5-0.5B`", "for 40 steps", "| `loss` | 0.025 |"):
        assert told in found.text
    assert "| `rewards/margins` | 4 |" in found.text and "| `lora_r` | `16` |" in found.text
    assert "| torch | 2.13.0 |" in found.text and "AutoPeftModelForCausalLM.from_pretrained('one')" in found.text


def test_a_whole_model_of_files_here_names_none_of_the_hub(run: Path, tmp_path: Path):
    (run / "adapter_config.json").unlink()
    (run / "config.json").write_text("{}")
    config = options()
    config["model"] |= {"model_name_or_path": "start/model", "lora_r": 0}  # written like a name of the hub
    config["data"]["dataset_name"] = ["/home/somebody/data/rows.jsonl"]
    (run / "run_config.json").write_text(json.dumps(config))
    assert "base_model: start/model" in card(read_run(run, "one"))
    (tmp_path / "start" / "model").mkdir(parents=True)  # where the run began: its output_dir is runs/one
    text = card(read_run(run, "one"))
    assert "base_model" not in text and "datasets:" not in text and "somebody" not in text
    assert "library_name: transformers" in text and "`rows.jsonl`" in text


def test_what_somebody_wrote_stays_and_what_is_ours_is_renewed(run: Path):
    written(run)
    (run / "metrics.jsonl").write_text(json.dumps(preference(50)) + "\n")
    assert written(run) == str(run / "README.md") and "for 50 steps" in (run / "README.md").read_text()
    for mine in ((run / "README.md").read_text() + "\nMy notes.\n", "# Mine\n"):
        (run / "README.md").write_text(mine)
        assert written(run) == f"{run / 'README.md'} was written or changed by hand, and is left as it is"
        assert (run / "README.md").read_text() == mine
    (run / "README.md").write_text("\n")
    assert written(run) == str(run / "README.md")


def test_the_empty_form_that_peft_leaves_is_filled(run: Path):
    form = ModelCard.from_template(ModelCardData(library_name="peft"))
    form.text += "\n### Framework versions\n\n- PEFT 0.19.0"
    form.save(run / "README.md")
    assert written(run) == str(run / "README.md")
    form.text = form.text.replace("[More Information Needed]", "Somebody", 1)
    form.save(run / "README.md")
    assert "left as it is" in written(run)


def test_a_run_has_no_card_until_it_is_written(tmp_path: Path):
    from logratio.benchmarks.report import main
    from logratio.trainers.cli import main as logratio

    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}) + "\n")
    out = tmp_path / "out"
    words = ["train", "dpo", "--dataset_name", str(tmp_path / "rows.jsonl"), "--output_dir", str(out)]
    assert logratio([*words, "--max_steps", "2", "--lora_r", "2"]) == 0
    assert not (out / "README.md").exists(), "PEFT's, with nothing filled in, is not left there"
    assert main([str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "More Information Needed" not in text and "for 2 steps" in text and "- `rows.jsonl`: 1 example" in text
    assert "data card is there" not in (out / "report.html").read_text()


def test_without_a_model_there_is_no_card(run: Path):
    (run / "adapter_config.json").unlink()
    assert written(run) == "no model card: no model is saved there yet"
    assert not (run / "README.md").exists()
