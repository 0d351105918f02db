import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

import detachnet
from detachnet.data import folders as files, shards
from detachnet.data.datasets import is_files, load_data
from detachnet.data.folders import Held, open_files
from detachnet.data.images import SUFFIXES
from detachnet.facts import DataInfo
from detachnet.training.data import hold
from detachnet.training.recipe import load_recipe
from tests.folders import CLASSES, make_shards, write_folder

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "pictures")


def test_a_folder(folder: Path) -> None:
    train = open_files("folder", folder, "train")
    test = open_files("folder", folder, "validation", train.classes)
    assert train.classes == ("9", "10", "cat", "dog")
    assert (train.num_images, test.num_images, train.shards) == (48, 12, ())
    for opened in (train, test):
        for index in range(opened.num_images):
            image, label = opened.read(index)
            assert image.mode == "RGB"
            assert f"/{opened.classes[label]}/" in opened.reader.filename(index, absolute=True)


def test_a_class_that_only_the_training_images_have(folder: Path) -> None:
    for file in (folder / "val" / "9").iterdir():
        file.unlink()
    (folder / "val" / "9").rmdir()
    test = open_files("folder", folder, "val", open_files("folder", folder, "train").classes)
    assert sorted({test.read(i)[1] for i in range(test.num_images)}) == [1, 2, 3]


def test_a_class_that_the_training_images_do_not_have(folder: Path) -> None:
    (folder / "val" / "dog").rename(folder / "val" / "dogs")
    with pytest.raises(detachnet.DataError, match=r"has a class 'dogs' that[\s\S]*nearest  'dog'"):
        open_files("folder", folder, "validation", CLASSES)


def test_what_can_be_wrong_with_a_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        detachnet.DataError,
        match=r"there is no folder of train images; none does not exist\n  what     looked for none",
    ):
        open_files("folder", "none", "train")
    with pytest.raises(detachnet.DataError, match=r"there is no folder of test images\n[\s\S]*CLASS/\*.jpg$"):
        open_files("folder", folder, "test")
    with pytest.raises(detachnet.DataError, match=r"no folder of test images; [\s\S]*CLASS/\*.jpg, or DIR/CLASS"):
        open_files("folder", "none", "test", held=Held("test", 0.2, 0))
    (folder / "train" / "empty").mkdir()
    with pytest.raises(
        detachnet.DataError, match=r"the class 'empty' is empty: there is no image in .*train.empty"
    ):
        open_files("folder", folder, "train")
    (folder / "val" / "stray.png").write_bytes((folder / "val" / "cat" / "0.png").read_bytes())
    with pytest.raises(detachnet.DataError, match=r"there are images in .*val itself[\s\S]*stray.png"):
        open_files("folder", folder, "val")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(
        detachnet.DataError, match=r"there is no folder of a class in bare.train\n  try +it has bare"
    ):
        open_files("folder", "bare", "train")


def copies(picture: Path, folder: Path, *names: str) -> None:
    """The same picture under several names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture.read_bytes())


def listed(root: Path, split: str = "train") -> dict[str, str]:
    """Path of each image and the class that it is of."""
    opened = open_files("folder", root, split)
    return {Path(p).relative_to(root / split).as_posix(): opened.classes[i] for p, i in opened.reader.samples}


def test_the_class_is_the_first_folder(folder: Path, tmp_path: Path) -> None:
    """Whatever folders there are in it; timm takes the last one for it."""
    names = [f"{pet}/{place}/{i}.png" for pet in ("cat", "dog") for place in ("indoor", "outdoor") for i in (0, 1)]
    copies(folder / "val" / "cat" / "0.png", tmp_path / "train", *names, "dog/2.png")
    assert listed(tmp_path) == {name: name[:3] for name in (*names, "dog/2.png")}


def test_names_that_begin_with_a_dot_are_left_out(folder: Path, tmp_path: Path) -> None:
    hidden = ("cat/.ipynb_checkpoints/0-checkpoint.png", "cat/._0.png", ".trash/0.png", ".0.png")
    copies(folder / "val" / "cat" / "0.png", tmp_path / "train", "cat/0.png", "dog/0.png", *hidden)
    assert listed(tmp_path) == {"cat/0.png": "cat", "dog/0.png": "dog"}


def test_a_folder_has_images_of_all_formats_that_are_read(tmp_path: Path) -> None:
    names = [f"{pet}/{i}{suffix}" for pet in ("cat", "dog") for i, suffix in enumerate(SUFFIXES)]
    for name in (*names, "dog/12.JPG"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        mode = "1" if name.endswith(".pbm") else "RGB"
        Image.new(mode, (8, 8)).save(tmp_path / "train" / name, SUFFIXES[Path(name).suffix.lower()])
    (tmp_path / "train" / "dog" / "about.txt").write_text("no image")
    assert set(listed(tmp_path)) == {*names, "dog/12.JPG"}
    opened = open_files("folder", tmp_path, "train")
    assert {opened.read(i)[0].mode for i in range(opened.num_images)} == {"RGB"}


def test_labels_and_order_are_those_of_timms_reader(folder: Path, tmp_path: Path) -> None:
    """A family that was trained before keeps its classes, a training its order."""
    names = [f"{pet}/{i}.png" for pet in ("b2", "b10", "b", "A", "c d") for i in (10, 9, "x")]
    copies(folder / "val" / "cat" / "0.png", tmp_path / "train", *names)
    (tmp_path / "train" / "linked").symlink_to(folder / "train" / "cat", target_is_directory=True)
    ours, theirs = open_files("folder", tmp_path, "train"), ReaderImageFolder(str(tmp_path / "train"))
    assert ours.classes == tuple(theirs.class_to_idx) == ("A", "b", "b2", "b10", "c d", "linked")
    assert ours.reader.samples == theirs.samples


def test_links_that_lead_back_are_passed_over(folder: Path) -> None:
    train = folder / "train"
    expected = open_files("folder", folder, "train").num_images
    (train / "cat" / "all").symlink_to("..", target_is_directory=True)
    (train / "cat" / "more").mkdir()
    (train / "cat" / "more" / "dogs").symlink_to(train / "dog", target_is_directory=True)
    (train / "dog" / "cats").symlink_to(train / "cat" / "more", target_is_directory=True)
    dogs = len(list((train / "dog").glob("*.*")))
    assert open_files("folder", folder, "train").num_images == expected + dogs


def test_a_folder_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(detachnet.DataError, match=r"the folder .*train.dog cannot be read\n  what .*denied"):
        open_files("folder", folder, "train")
    monkeypatch.setattr(Path, "iterdir", lambda self: refuse(self / "dog"))
    with pytest.raises(detachnet.DataError, match=r"the folder .*train.dog cannot be read\n  what .*denied"):
        open_files("folder", folder, "train")


def test_images_are_held_out(folder: Path) -> None:
    train = open_files("folder", folder, "train")
    rest, held = train.without(12)
    assert (rest.num_images, held.num_images) == (36, 12)
    held_labels = [held.read(i)[1] for i in range(12)]
    assert held_labels == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert sorted([*rest.numbers, *held.numbers]) == list(range(48))
    again, fewer = rest.without(4)
    assert (again.num_images, [fewer.read(i)[1] for i in range(4)]) == (32, [0, 1, 2, 3])
    assert not {*again.numbers, *fewer.numbers} & {*held.numbers}
    for wrong in (0, 48):
        with pytest.raises(detachnet.DataError, match=f"48 train images are not enough to hold out {wrong}"):
            train.without(wrong)


def test_whole_shards_are_held_out(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    train = open_files("wds/x", make_shards(folder, tmp_path / "shards", 10), "train")
    rest, held = train.without(9)  # of 10, 10, 10, 10 and 8
    assert (rest.num_images, held.num_images) == (30, 18)
    assert (rest.shards, held.shards) == (train.shards[:3], train.shards[3:])
    assert len(list(held.some(100))) == 18
    with pytest.raises(detachnet.DataError, match="5 shards are not enough to hold out 39 images: whole ones are"):
        train.without(39)
    named = open_files("wds/x", tmp_path / "shards", "train-{000000..000004}.tar|48")
    with pytest.raises(detachnet.DataError, match="not known how many images each of the shards"):
        named.without(9)


def test_a_broken_image_is_named(folder: Path) -> None:
    broken = folder / "train" / "cat" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    opened = open_files("folder", folder, "train")
    index = next(i for i in range(48) if opened.reader.filename(i, absolute=True) == str(broken))
    with pytest.raises(detachnet.DataError, match=r"train/cat/1.jpg cannot be read: it is truncated or damaged"):
        opened.read(index)
    broken.unlink()
    with pytest.raises(detachnet.DataError, match=r"train/cat/1.jpg cannot be read\n  what     .*No such file"):
        opened.read(index)


@pytest.mark.parametrize("name", ["folder", "wds/x", "hfds/a/b", "cifar10", "wds", "folder2"])
def test_recipes_and_commands_agree_on_what_is_read_from_files(name: str) -> None:
    recipe = ROOT / "recipes" / ("resnet50_imagenet.toml" if is_files(name) else "quickstart.toml")
    if is_files(name) or name == "cifar10":
        assert load_recipe(recipe, [f"data.name={name}"]).data.name == name
    else:
        with pytest.raises(detachnet.RecipeError, match="it must be one of 'cifar10'"):
            load_recipe(recipe, [f"data.name={name}"])


def test_files_are_not_held_in_memory() -> None:
    with pytest.raises(detachnet.DataError, match="folder is read image by image"):
        load_data("folder")


@pytest.mark.parametrize(("name", "package"), [("wds/x", "webdataset"), ("hfds/a/b", "datasets")])
def test_a_missing_package(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda _: None)
    extra = name.partition("/")[0]
    with pytest.raises(detachnet.DataError, match=rf"need the package {package}\n.*'detachnet\[{extra}\]'"):
        open_files(name, None, "train")


def write_shard(path: Path, **members: bytes) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name.replace("_", "."))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def png() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((32, 32), 50).save(file, "PNG")
    return file.getvalue()


def test_what_can_be_wrong_with_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("webdataset")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        detachnet.DataError, match=r"there are no shards of wds/x\n  what     looked for \*.tar in"
    ):
        open_files("wds/x", tmp_path, "train")
    write_shard(tmp_path / "t-0.tar", a_png=png(), a_cls=b"1", b_png=png(), b_cls=b"2", c_cls=b"0", d_png=png())
    with pytest.raises(
        detachnet.DataError, match=r"the split 'train' of wds/x cannot be opened in .*\n.*not found in"
    ):
        open_files("wds/x", tmp_path, "train")
    unknown = r"not known how many images[\s\S]*t-0.tar\|COUNT, or have python -m detachnet.data.shards make"
    with pytest.raises(detachnet.DataError, match=unknown):
        open_files("wds/x", tmp_path, "t-0.tar")
    with pytest.raises(detachnet.DataError, match=r"do not say their classes[\s\S]*classes.txt, one a line"):
        open_files("wds/x", tmp_path, "t-0.tar|4")
    (tmp_path / "classes.txt").write_text("no\nyes\n")
    with pytest.raises(detachnet.DataError, match=r"1 of 2 shards are missing\n.*t-1.tar"):
        open_files("wds/x", tmp_path, "t-{0..1}.tar|4")
    opened = open_files("wds/x", tmp_path, "t-0.tar|4")
    good, label, image, cls = opened.samples(opened.shards)
    assert opened.decode(good)[1] == 1
    turned = open_files("wds/x", tmp_path, "t-0.tar|4", ("yes", "no"))
    assert turned.decode(good)[1] == 0
    with pytest.raises(detachnet.DataError, match=r"b of .*t-0.tar has the label 2, but there are 2 classes"):
        opened.decode(label)
    with pytest.raises(detachnet.DataError, match=r"c of .*t-0.tar has no image"):
        opened.decode(image)
    with pytest.raises(detachnet.DataError, match=r"d of .*t-0.tar has no label"):
        opened.decode(cls)
    with pytest.raises(detachnet.DataError, match=r"a of .*t-0.tar cannot be read: it is truncated"):
        opened.decode({**good, "png": good["png"][:300]})
    (tmp_path / "t-0.tar").write_bytes((tmp_path / "t-0.tar").read_bytes()[:1000])
    with pytest.raises(detachnet.DataError, match=r"the shard .*t-0.tar cannot be read"):
        list(opened.samples(opened.shards))


def test_shards_hold_the_images_of_folders(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    out = make_shards(folder, tmp_path / "shards", 20)
    info = json.loads((out / "_info.json").read_text())
    assert info["splits"]["train"]["shard_lengths"] == [20, 20, 8]
    plain, packed = (open_files(name, root, "train") for name, root in (("folder", folder), ("wds/x", out)))
    assert packed.classes == plain.classes
    assert (packed.num_images, len(packed.shards)) == (48, 3)
    for sample in packed.samples(packed.shards):
        image, label = packed.decode(sample)
        expected, truth = plain.read(int(str(sample["__key__"]).rpartition("/")[2]))
        assert (label, image.tobytes()) == (truth, expected.tobytes())


def test_shards_through_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards.main([str(folder), str(tmp_path / "shards"), "--per-shard", "7"])
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 7 + 2
    with pytest.raises(SystemExit):
        shards.main([str(folder), str(tmp_path / "shards")])
    assert "cannot be made for shards" in capsys.readouterr().err


def test_shards_that_cannot_be_made(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(detachnet.DataError, match="0 images are no shard"):
        shards.make_shards(folder, tmp_path / "shards", 0)
    with pytest.raises(detachnet.DataError, match="there is no folder of train images"):
        shards.make_shards(tmp_path / "nothing", tmp_path / "shards")
    assert not (tmp_path / "shards").exists()
    with pytest.raises(detachnet.DataError, match=r"the folder .* cannot be made for shards"):
        shards.make_shards(folder, folder)


@pytest.mark.slow
def test_a_data_set_of_hugging_faces(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "hub"
    plain = open_files("folder", folder, "train")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=plain.classes)})
    columns = {
        "image": [{"bytes": Path(path).read_bytes(), "path": None} for path, _ in plain.reader.samples[:20]],
        "label": [label for _, label in plain.reader.samples[:20]],
    }
    out.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(out / "train.parquet")
    opened = open_files(f"hfds/{out}", tmp_path / "cache", "train")
    assert (opened.classes, opened.num_images) == (plain.classes, 20)
    for index in range(20):
        (image, label), (expected, truth) = opened.read(index), plain.read(index)
        assert (label, image.tobytes()) == (truth, expected.tobytes())
    with pytest.raises(detachnet.DataError, match=r"the split 'test' of hfds/.* cannot be opened"):
        open_files(f"hfds/{out}", tmp_path / "cache", "test")


def test_images_in_memory_are_not_class_by_class(folder: Path) -> None:
    """Statistics that are measured batch by batch would be of one class each."""
    files = open_files("folder", folder, "train")
    info = DataInfo(name="folder", classes=files.classes, mean=(0.5,) * 3, std=(0.5,) * 3)
    held = hold(files, info, (8, 8), files.num_images)
    assert held.labels.tolist() != sorted(held.labels.tolist())
    assert sorted(held.labels.tolist()) == [label for _, label in files.some(files.num_images)]
    assert torch.equal(held.images, hold(files, info, (8, 8), files.num_images).images)
