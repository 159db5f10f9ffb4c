"""Output folders that cannot take a run, and those that hold another one's: said before anything is loaded."""

import os

import pytest

TRAIN = "train sft --dataset_name rows.jsonl --max_steps 1 --batch_size 2"


def test_a_file_in_its_place(refused, tmp_path):
    (tmp_path / "out").write_text("kept")
    refused(f"{TRAIN} --output_dir out", "--output_dir")
    assert (tmp_path / "out").read_text() == "kept"


def test_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("kept")
    refused(f"{TRAIN} --output_dir file/out", "--output_dir")


def test_below_a_place_that_takes_no_folder(refused):
    refused(f"{TRAIN} --output_dir /proc/out", "--output_dir")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_is_read_only(refused, tmp_path):
    (tmp_path / "out").mkdir(mode=0o500)
    refused(f"{TRAIN} --output_dir out", "--output_dir")


def test_a_name_longer_than_the_file_system_takes(refused):
    refused(f"{TRAIN} --output_dir {'x' * 300}", "--output_dir")


def test_another_runs_model_is_not_mixed_with(run, refused, tmp_path):
    """An adapter beside a whole model: from_pretrained would take either."""
    assert run(f"{TRAIN} --output_dir out").status == 0
    kept = (tmp_path / "out" / "model.safetensors").read_bytes()
    refused(f"{TRAIN} --output_dir out --lora_r 2", "--overwrite_output_dir")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == kept
    assert run(f"{TRAIN} --output_dir out --lora_r 2 --overwrite_output_dir").status == 0
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
