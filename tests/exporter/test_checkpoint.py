"""Reading checkpoints: every format by value, mapped memory, and each failure's message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mvlm_export.engines.errors import CheckpointError
from mvlm_export.exporter.checkpoint import Checkpoint
from tests.helpers import (
    FORMATS,
    published_shapes,
    random_tensor,
    tiny_config_json,
    write_random_checkpoint,
)

SINGLE = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def save(tensors: dict, path: Path) -> None:
    if path.suffix == ".bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)


def write_shards(folder: Path, shards: dict[str, dict], weight_map: dict[str, str]) -> None:
    stem = next(iter(shards))
    base = "pytorch_model.bin" if stem.endswith(".bin") else "model.safetensors"
    for name, tensors in shards.items():
        save(tensors, folder / name)
    (folder / f"{base}.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("fmt", FORMATS)
def test_every_format_reads_back_by_value(tmp_path, fmt, dtype):
    config = write_random_checkpoint(tmp_path, tiny_config_json(), fmt, dtype, seed=3)
    checkpoint = Checkpoint.open(tmp_path)
    shapes = published_shapes(config)
    assert set(checkpoint.names) == set(shapes)
    assert len(checkpoint.names) == len(shapes)
    for name, shape in shapes.items():
        wanted = random_tensor(name, shape, config, dtype, seed=3)
        info = checkpoint.info(name)
        assert (info.shape, info.dtype) == (shape, wanted.dtype), name
        assert info.file.parent == tmp_path
        assert torch.equal(checkpoint.load(name), wanted), name
    files = {checkpoint.info(name).file for name in checkpoint.names}
    assert len(files) >= 3 if "sharded" in fmt else len(files) == 1
    assert checkpoint.unmapped_files == ()


@pytest.mark.parametrize("fmt", FORMATS)
def test_counts_and_bytes(tmp_path, fmt):
    config = write_random_checkpoint(tmp_path, tiny_config_json(), fmt)
    checkpoint = Checkpoint.open(tmp_path)
    tensors = [
        random_tensor(name, shape, config, torch.bfloat16, 0)
        for name, shape in published_shapes(config).items()
    ]
    assert checkpoint.total_bytes == sum(t.numel() * t.element_size() for t in tensors)
    counts = checkpoint.dtype_counts()
    assert counts[torch.int64] == 1  # position_ids
    assert counts[torch.float32] == 2  # one inv_freq a layer
    assert counts[torch.bfloat16] == len(tensors) - 3


@pytest.mark.parametrize("fmt", SINGLE)
def test_scalars_and_empty_tensors(tmp_path, fmt):
    save({"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3)}, tmp_path / SINGLE[fmt])
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.load("scalar").item() == 2.5
    assert checkpoint.load("none").shape == (0, 3)


def test_safetensors_go_before_bin(tmp_path):
    save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert Checkpoint.open(tmp_path).load("a").item() == 1


def test_parameters_and_ordered_dicts_are_tensors_too(tmp_path):
    module = torch.nn.Linear(3, 2)
    torch.save(dict(module.named_parameters()), tmp_path / "pytorch_model.bin")
    loaded = Checkpoint.open(tmp_path).load("weight")
    assert torch.equal(loaded, module.weight)
    assert not loaded.requires_grad


def test_the_old_torch_format_is_read_whole(tmp_path):
    values = {"a": torch.randn(4, 5), "b": torch.randn(3).bfloat16()}
    path = tmp_path / "pytorch_model.bin"
    torch.save(values, path, _use_new_zipfile_serialization=False)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.unmapped_files == (path,)
    assert all(torch.equal(checkpoint.load(name), values[name]) for name in values)


def test_one_old_file_at_a_time_is_held(tmp_path):
    names = [f"pytorch_model-{i}.bin" for i in (1, 2)]
    for i, name in enumerate(names):
        content = {f"t{i}": torch.full((4,), float(i))}
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=False)
    index = {"weight_map": {f"t{i}": name for i, name in enumerate(names)}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint.open(tmp_path)
    assert len(checkpoint.unmapped_files) == 2
    assert [checkpoint.load(t)[0].item() for t in ("t0", "t1", "t0")] == [0.0, 1.0, 0.0]
    held = [file for file in checkpoint._unmapped if file._state is not None]
    assert [file.path.name for file in held] == [names[0]]


@pytest.mark.parametrize("fmt", SINGLE)
def test_writing_into_a_loaded_tensor_never_changes_the_file(tmp_path, fmt):
    path = tmp_path / SINGLE[fmt]
    save({"a": torch.ones(5000)}, path)
    before = path.read_bytes()
    Checkpoint.open(tmp_path).load("a").fill_(7.0)
    assert path.read_bytes() == before
    assert Checkpoint.open(tmp_path).load("a").sum().item() == 5000


MEASURE = """
import sys
from pathlib import Path
import torch
from mvlm_export.exporter.checkpoint import Checkpoint

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key + ":"))) / 1024

torch.set_num_threads(1)
float(torch.ones(1000).double().sum())
checkpoint = Checkpoint.open(Path(sys.argv[1]), mapped_limit=int(sys.argv[2]))
anonymous, mapped = status("RssAnon"), status("RssFile")
peak_anonymous = peak_mapped = 0.0
for name in checkpoint.names:
    assert float(checkpoint.load(name).sum()) != 0
    peak_anonymous = max(peak_anonymous, status("RssAnon") - anonymous)
    peak_mapped = max(peak_mapped, status("RssFile") - mapped)
print(peak_anonymous, peak_mapped)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("fmt", "sharded"), [("bin", False), ("safetensors", True)])
def test_tensors_are_mapped_and_mappings_dropped(tmp_path, fmt, sharded):
    """128 MiB in 16 tensors: none of it copied, and 24 MiB of it mapped at most."""
    tensors = {f"t{i}": torch.ones(2 << 20) for i in range(16)}
    if sharded:
        shards = {f"{i}-{SINGLE[fmt]}": {f"t{i}": tensors[f"t{i}"]} for i in range(16)}
        write_shards(tmp_path, shards, {f"t{i}": f"{i}-{SINGLE[fmt]}" for i in range(16)})
    else:
        save(tensors, tmp_path / SINGLE[fmt])
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(16 << 20)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    )
    anonymous, mapped = map(float, output.stdout.split())
    assert anonymous < 6, "a tensor of 8 MiB was copied instead of mapped"
    assert 7 < mapped < 40, "the file is not mapped, or its mapping is never dropped"


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    write_random_checkpoint(tmp_path, tiny_config_json(), "safetensors-sharded")
    monkeypatch.setattr("mvlm_export.exporter.checkpoint.torch.load", None)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint._handed_out == 0
    assert len(checkpoint.names) > 60


# ---------------------------------------------------------------- failures


def refuse(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(folder)


def test_folder_missing_or_a_file(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere does not exist: give the folder")
    path = tmp_path / "model.safetensors"
    save({"a": torch.ones(1)}, path)
    refuse(path, "model.safetensors is a file: give the folder")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refuse(tmp_path, r"holds no weights.*model\.safetensors.*It holds config\.json")


def test_adapter_alone(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    refuse(tmp_path, "LoRA adapter.*merge it")


@pytest.mark.parametrize("fmt", SINGLE)
def test_unknown_tensor(tmp_path, fmt):
    save({"a": torch.ones(1)}, tmp_path / SINGLE[fmt])
    checkpoint = Checkpoint.open(tmp_path)
    for read in (checkpoint.info, checkpoint.load):
        with pytest.raises(CheckpointError, match=r"holds no tensor b\.c among its 1\. Check"):
            read("b.c")


def test_unknown_tensor_names_the_nearest(tmp_path):
    save({"lm_head.weight": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"the nearest name is lm_head\.weight"):
        Checkpoint.open(tmp_path).load("model.lm_head.weight")


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
class TestShards:
    def write(self, folder, suffix, weight_map, first=("a",), second=("b",)):
        def tensors(names):
            return {name: torch.ones(2) for name in names}

        shards = {f"s1{suffix}": tensors(first), f"s2{suffix}": tensors(second)}
        named = {tensor: f"{shard}{suffix}" for tensor, shard in weight_map.items()}
        write_shards(folder, shards, named)

    def test_shard_missing(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s1", "b": "s2", "c": "s3", "d": "s4"})
        refuse(tmp_path, rf"s3\{suffix}, s4\{suffix}.*incomplete; fetch them")

    def test_tensor_in_index_but_in_no_shard(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s1", "b": "s2", "w.x": "s2"})
        refuse(tmp_path, rf"puts w\.x into s2\{suffix}, which does not hold it.*fetch both")

    def test_tensor_in_another_shard_than_the_index_says(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s2", "b": "s1"})
        refuse(tmp_path, "puts a into s2.*which does not hold it")

    def test_tensor_in_two_shards(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s1", "b": "s2"}, second=("a", "b"))
        refuse(tmp_path, rf"a is in two files, s1\{suffix} and s2\{suffix}.*remove")

    def test_shard_outside_the_folder(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s1", "b": "../s2"})
        refuse(tmp_path, r"puts b into '\.\./s2.*no file of that folder")

    def test_tensor_that_the_index_leaves_out_is_still_seen(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s1", "b": "s2"}, second=("b", "c"))
        assert set(Checkpoint.open(tmp_path).names) == {"a", "b", "c"}

    def test_shard_cut_short(self, tmp_path, suffix):
        self.write(tmp_path, suffix, {"a": "s1", "b": "s2"})
        path = tmp_path / f"s2{suffix}"
        path.write_bytes(path.read_bytes()[:-9])
        refuse(tmp_path, rf"s2\{suffix} is cut short or damaged.*download it again")

    def test_index_with_a_name_twice(self, tmp_path, suffix):
        base = {".bin": "pytorch_model.bin", ".safetensors": "model.safetensors"}[suffix]
        text = f'{{"weight_map": {{"a": "s1{suffix}", "a": "s2{suffix}"}}}}'
        (tmp_path / f"{base}.index.json").write_text(text)
        refuse(tmp_path, "names a more than once")

    def test_index_without_map(self, tmp_path, suffix):
        base = {".bin": "pytorch_model.bin", ".safetensors": "model.safetensors"}[suffix]
        (tmp_path / f"{base}.index.json").write_text('{"metadata": {}}')
        refuse(tmp_path, "has no 'weight_map'")


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("fmt", [*SINGLE, "old"])
def test_truncated_file(tmp_path, fmt, kept):
    path = tmp_path / SINGLE.get(fmt, "pytorch_model.bin")
    values = {"a": torch.randn(500), "b": torch.randn(500)}
    if fmt == "old":
        torch.save(values, path, _use_new_zipfile_serialization=False)
    else:
        save(values, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuse(tmp_path, "damaged.*(download it again|Get the weights)")


@pytest.mark.parametrize("fmt", SINGLE)
def test_empty_file(tmp_path, fmt):
    (tmp_path / SINGLE[fmt]).touch()
    refuse(tmp_path, "is empty: download it again")


@pytest.mark.parametrize("fmt", SINGLE)
def test_git_lfs_pointer(tmp_path, fmt):
    (tmp_path / SINGLE[fmt]).write_bytes(POINTER)
    refuse(tmp_path, "git-lfs pointer.*run `git lfs pull` in ")


def test_git_lfs_pointer_as_a_shard(tmp_path):
    write_random_checkpoint(tmp_path, tiny_config_json(), "bin-sharded")
    shard = sorted(tmp_path.glob("pytorch_model-*.bin"))[1]
    shard.write_bytes(POINTER)
    refuse(tmp_path, f"{shard.name} is a git-lfs pointer.*git lfs pull")


def test_html_page_instead_of_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"<!doctype html><html>" * 9)
    refuse(tmp_path, "not a PyTorch weight file.*doctyp.*download it again")


@pytest.mark.parametrize("fmt", SINGLE)
def test_permission_denied(tmp_path, fmt, monkeypatch):
    path = tmp_path / SINGLE[fmt]
    save({"a": torch.ones(1)}, path)

    def deny(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    refuse(tmp_path, "permission denied.*chmod u\\+r")


def test_folder_that_cannot_be_searched(tmp_path, monkeypatch):
    def deny(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "exists", deny)
    refuse(tmp_path, "cannot be searched, permission denied.*chmod u\\+rx")


class Evil:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_never_runs(tmp_path, zipped):
    trace = tmp_path / "ran"
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": Evil(trace)}, path, _use_new_zipfile_serialization=zipped)
    refuse(tmp_path, "not loaded.*code meant to run here.*from their authors")
    assert not trace.exists()


def test_training_checkpoint(tmp_path):
    torch.save({"epoch": 3, "w": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "holds a int as 'epoch', not a tensor.*training checkpoint")


def test_list_instead_of_dict(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "pytorch_model.bin")
    refuse(tmp_path, "holds a list, not tensors by name")


def test_sparse_tensor(tmp_path):
    torch.save({"s.w": torch.eye(3).to_sparse()}, tmp_path / "pytorch_model.bin")
    refuse(tmp_path, r"s\.w in .* is a sparse or quantised tensor")


def test_a_file_replaced_after_opening(tmp_path):
    path = tmp_path / "model.safetensors"
    save({"a": torch.ones(8)}, path)
    checkpoint = Checkpoint.open(tmp_path, mapped_limit=1)
    path.unlink()
    path.write_bytes(POINTER)
    with pytest.raises(CheckpointError, match="git lfs pull"):
        checkpoint.load("a")
