"""Folders of classes without splits, and tables of paths and labels."""

import json
from pathlib import Path

import pytest

import detachnet
from detachnet.data.folders import Held, open_files
from detachnet.training.data import FileSource, open_test_files
from detachnet.training.tables import FilesTable
from detachnet.training.trainer import train
from tests.folders import recipe
from tests.photographs import CLASSES, write_photographs, write_table

HELD = Held("validation", 0.25, 7)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photographs(tmp_path / "photos", per_class=8)


def paths(name: str, root: Path, split: str, held: Held | None = HELD) -> list[str]:
    opened = open_files(name, root, split, held=held)
    return [
        str(Path(opened.reader.filename(i, absolute=True)).relative_to(root)) for i in range(opened.num_images)
    ]


@pytest.mark.parametrize("name", ["folder", "labels.csv"])
def test_images_without_splits_are_divided_class_by_class(photos: Path, name: str) -> None:
    write_table(photos)
    train, test = (open_files(name, photos, split, held=HELD) for split in ("train", "validation"))
    assert train.classes == test.classes == CLASSES
    for opened, count in ((train, 6), (test, 2)):
        assert opened.held == HELD
        assert [label for _, label in opened.reader.samples] == [0] * count + [1] * count + [2] * count
        for index in range(opened.num_images):
            image, label = opened.read(index)
            assert image.mode == "RGB"
            assert Path(opened.reader.filename(index, absolute=False)).parts[0] == CLASSES[label]
    everything = {str(path.relative_to(photos)) for path in photos.glob("*/*.jpg")}
    assert {*paths(name, photos, "train"), *paths(name, photos, "validation")} == everything


def test_a_folder_and_a_table_of_it_are_divided_alike(photos: Path) -> None:
    write_table(photos)
    assert paths("folder", photos, "validation") == paths("labels.csv", photos, "validation")


def test_the_seed_divides_and_nothing_else(photos: Path) -> None:
    first = paths("folder", photos, "validation")
    moved = photos.rename(photos.with_name("elsewhere"))
    assert paths("folder", moved, "validation") == first
    assert paths("folder", moved, "validation", Held("validation", 0.25, 8)) != first
    (moved / "coin" / "z.jpg").write_bytes((moved / "coin" / "coin_00.jpg").read_bytes())
    others = [path for path in first if not path.startswith("coin")]
    assert [path for path in paths("folder", moved, "validation") if not path.startswith("coin")] == others


def test_every_class_has_images_of_both_splits(photos: Path) -> None:
    for share, count in ((0.01, 1), (0.99, 7)):
        held = Held("validation", share)
        assert open_files("folder", photos, "validation", held=held).num_images == 3 * count
    for path in list((photos / "leaf").iterdir())[1:]:
        path.unlink()
    with pytest.raises(detachnet.DataError, match=r"a class has one image, .*leaf.*\n  try +add another"):
        open_files("folder", photos, "train", held=HELD)


def test_splits_that_are_there_are_taken(photos: Path) -> None:
    write_table(photos, splits=True)
    test = open_files("labels.csv", photos, "validation", held=HELD)
    assert (test.num_images, test.held) == (5, None)
    assert open_files("labels.csv", photos, "train").num_images == 19
    (photos / "train").mkdir()
    with pytest.raises(detachnet.DataError, match="there is no folder of validation images"):
        open_files("folder", photos, "validation", held=HELD)


def test_a_folder_without_splits_is_not_divided_unasked(photos: Path) -> None:
    write_table(photos)
    with pytest.raises(detachnet.DataError, match="there is no folder of train images"):
        open_files("folder", photos, "train")
    with pytest.raises(detachnet.DataError, match=r"labels.csv names no train images\n  what +it has no column"):
        open_files("labels.csv", photos, "train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"has no column 'path'\n  what +its first line is missing\n  try +the first line is path,label"),
        ("coin/coin_00.jpg,coin\n", r"has no column 'path'\n  what +its first line is coin/coin_00.jpg,coin"),
        ("path;label\ncoin/coin_00.jpg;coin\n", r"has no column 'path'"),
        ("path,label\ncoin/coin_00.jpg\n", "line 2 of .* has no label"),
        ("path,label\n,coin\n", "line 2 of .* has no path"),
        ("path,label,split\ncoin/coin_00.jpg,coin,\n", "line 2 of .* has no split"),
        ("path,label\ncoin/9.jpg,coin\n", r"names an image that is not there: .*9.jpg\n  try +paths are relative"),
        ("path,label\n" + 2 * "coin/coin_00.jpg,coin\n", "lines 2 and 3 of .* name the same image"),
        (
            "path,label,split\ncoin/coin_00.jpg,coin,train\nleaf/.././coin/coin_00.jpg,coin,val\n",
            r"lines 2 and 3 of .* name the same image, leaf/\.\./",
        ),
        (
            "path,label,split\ncoin/coin_00.jpg,coin,test\n",
            r"names no validation images\n  what +its splits are test",
        ),
        ("path,label,split\n", r"labels.csv names no images\n  what +nothing follows its header"),
        ('path,label\n"coin/coin_00.jpg,coin\n', "is no table"),
        ("path,label\ncoin/\xff.jpg,coin\n", "is no table"),
    ],
)
def test_what_can_be_wrong_with_a_table(photos: Path, text: str, said: str) -> None:
    (photos / "labels.csv").write_text(text, encoding="latin-1")
    with pytest.raises(detachnet.DataError, match=said):
        open_files("labels.csv", photos, "validation", held=HELD)


def test_a_table_as_spreadsheets_write_it(photos: Path) -> None:
    text = "\ufeffLabel,Path,Remark\r\n0,coin/coin_00.jpg,x\r\n0,coin/coin_01.jpg,\r\n10,leaf/leaf_00.jpg,\r\n"
    (photos / "labels.csv").write_bytes((text + "10,leaf/leaf_01.jpg,\r\n2,screw/screw_00.jpg,\r\n").encode())
    with pytest.raises(detachnet.DataError, match="one image"):
        open_files("labels.csv", photos, "train", held=HELD)
    (photos / "labels.csv").write_bytes((text + "10,leaf/leaf_01.jpg,\r\n").encode())
    train = open_files("labels.csv", photos, "train", held=HELD)
    assert train.classes == ("0", "10")


def test_classes_of_a_table_in_capitals_have_an_order(photos: Path) -> None:
    names = ("Coin", "coin", "COIN", "CoIn")
    lines = [f"coin/coin_{i:02}.jpg,{names[i % 4]}\n" for i in range(8)]
    (photos / "labels.csv").write_text("path,label\n" + "".join(lines))
    assert open_files("labels.csv", photos, "train", held=HELD).classes == ("COIN", "CoIn", "Coin", "coin")


def test_where_a_table_is_looked_for(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(photos)
    monkeypatch.chdir(tmp_path)
    for name, root in (("photos/labels.csv", None), (str(photos / "labels.csv"), None), ("labels.csv", "photos")):
        assert open_files(name, root, "train", held=HELD).num_images == 18
        source = FileSource(recipe(data__name=name).data, root, "timm:resnet18")  # type: ignore[arg-type]
        assert open_test_files(source.info, source.place).num_images == source.test.num_images == 6
    with pytest.raises(
        detachnet.DataError, match=r"there is no file nothing.csv\n  what +looked for photos/nothing"
    ):
        open_files("nothing.csv", "photos", "train", held=HELD)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images of others, where one looks if no folder is given: `./data`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETACHNET_DATA", raising=False)
    for split in ("train", "val"):
        write_table(write_photographs(tmp_path / "data" / split, per_class=4))
    (tmp_path / "data" / "labels.csv").write_bytes((tmp_path / "data" / "val" / "labels.csv").read_bytes())
    (tmp_path / "data" / "0.tar").touch()
    return tmp_path / "data"


def test_images_are_those_of_the_folder_that_is_given(photos: Path, elsewhere: Path) -> None:
    assert len(paths("folder", photos, "train")) == 18
    source = FileSource(recipe(data__split_seed=1).data, photos, "timm:resnet18")  # type: ignore[arg-type]
    assert (source.num_train, source.test.num_images, source.place) == (18, 6, photos)
    for name, said in (("folder", "no folder of train images"), ("labels.csv", "no file")):
        for root in ("nothing", elsewhere.parent / "empty"):
            (elsewhere.parent / "empty").mkdir(exist_ok=True)
            with pytest.raises(detachnet.DataError, match=f"there is {said}") as refused:
                open_files(name, root, "train", held=HELD)
            assert "data/" not in str(refused.value)


def test_shards_are_those_of_the_folder_that_is_given(elsewhere: Path) -> None:
    pytest.importorskip("webdataset")
    with pytest.raises(detachnet.DataError, match=r"there are no shards of wds/x\n  what .*\.tar in nothing\n"):
        open_files("wds/x", "nothing", "train")


def test_both_splits_are_of_one_place(photos: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half = photos.rename(photos.parent / "half")
    (half / "train").mkdir()
    for name in CLASSES:
        (half / name).rename(half / "train" / name)
    table: FilesTable = recipe().data  # type: ignore[assignment]
    assert FileSource(table, None, "timm:resnet18").place == Path("data")
    with pytest.raises(
        detachnet.DataError, match=r"no folder of validation images\n  what +looked for .*half/val"
    ):
        FileSource(table, half, "timm:resnet18")
    monkeypatch.setenv("DETACHNET_DATA", str(half))
    for given in (table, FilesTable(name="folder", train_split="training", val_split="val")):
        with pytest.raises(detachnet.DataError, match=r"no folder of val[\s\S]*half/val") as refused:
            FileSource(given, None, "timm:resnet18")
        assert "data/" not in str(refused.value)
    with pytest.raises(detachnet.DataError, match=r"no folder of validation images"):
        open_files("folder", None, "validation", CLASSES)


def test_a_place_without_images_is_passed_over(
    photos: Path, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (elsewhere.parent / "sets" / "cifar-10-batches-py").mkdir(parents=True)
    monkeypatch.setenv("DETACHNET_DATA", str(elsewhere.parent / "sets"))
    assert open_files("folder", None, "train", held=HELD).place == Path("data")
    monkeypatch.setenv("DETACHNET_DATA", str(photos))
    assert open_files("folder", None, "train", held=HELD).place == photos
    assert open_files("folder", None, "train").place == Path("data")


@pytest.mark.parametrize("names", [("Train", "Val"), ("one", "two"), ("pets/train", "plants/training")])
def test_splits_and_data_sets_are_no_classes(photos: Path, names: tuple[str, str]) -> None:
    for name in names:
        (photos.parent / "sets" / name).parent.mkdir(parents=True, exist_ok=True)
        (photos.parent / "sets" / name).symlink_to(photos, target_is_directory=True)
    with pytest.raises(detachnet.DataError, match="there is no folder of train images"):
        open_files("folder", photos.parent / "sets", "train", held=Held("two", 0.25))


def test_a_run_notes_where_its_images_were(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations look there, and nowhere else."""
    (elsewhere.parent / "sets").mkdir()
    monkeypatch.setenv("DETACHNET_DATA", "sets")
    chosen = recipe(train__epochs=1, model__kwargs={"depth": 8, "width": 0.25}, train__batch_size=4)
    done = train(chosen, elsewhere.parent / "run")
    assert json.loads(done.folder.info.read_text())["data_root"] == str(elsewhere)


def test_some_images(photos: Path) -> None:
    opened = open_files("folder", photos, "train", held=HELD)
    assert [label for _, label in opened.some(6)] == [0, 0, 1, 1, 2, 2]
    assert len(list(opened.some(1000))) == 18
