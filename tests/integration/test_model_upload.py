"""`tunedrop drop --model DIR`: the bucket has exactly the folder's model, by content."""

from pathlib import Path

import pytest
from fake_stack import DATA

from local_app.stack import StackError
from tunedrop_cli.model_upload import upload_model

FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "LICENSE": b"MIT"}
OTHERS = {".env": b"SECRET=1", "train.py": b"", "pytorch_model.bin": b"pickle", "notes.docx": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "my-model"
    folder.mkdir()
    for name, content in (FILES | OTHERS).items():
        (folder / name).write_bytes(content)
    (folder / ".git").mkdir()
    (folder / ".git/config.json").write_text("{}")
    return folder


def stored(world) -> dict[str, bytes]:
    listed = world.aws.s3.list_objects_v2(Bucket=DATA, Prefix="models/my-model/").get("Contents", [])
    return {item["Key"].rpartition("/")[2]: world.aws.read(DATA, item["Key"]) for item in listed}


def times(world):
    listed = world.aws.s3.list_objects_v2(Bucket=DATA, Prefix="models/my-model/")["Contents"]
    return {item["Key"]: world.aws.s3.head_object(Bucket=DATA, Key=item["Key"])["VersionId"] for item in listed}


def test_only_the_models_files_are_uploaded_and_each_content_once(world, folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert upload_model(world.aws.s3, DATA, Path()) == "my-model"
    assert stored(world) == FILES
    before = times(world)
    upload_model(world.aws.s3, DATA, folder)
    assert times(world) == before


def test_other_content_of_the_same_size_is_uploaded_and_removed_files_go(world, folder):
    upload_model(world.aws.s3, DATA, folder)
    (folder / "model.safetensors").write_bytes(b"WEIGHTS")
    (folder / "LICENSE").unlink()
    upload_model(world.aws.s3, DATA, folder)
    assert stored(world) == {name: content for name, content in FILES.items() if name != "LICENSE"} | {
        "model.safetensors": b"WEIGHTS"
    }


def test_a_link_out_of_the_folder_and_a_folder_without_a_model_are_refused(world, folder, tmp_path):
    (tmp_path / "secret.json").write_text("{}")
    (folder / "generation_config.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(StackError, match="outside the model's folder"):
        upload_model(world.aws.s3, DATA, folder)
    with pytest.raises(StackError, match="is no model"):
        upload_model(world.aws.s3, DATA, tmp_path)
    assert stored(world) == {}
