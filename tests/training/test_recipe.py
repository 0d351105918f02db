import tomllib
from pathlib import Path

import pytest

import detachnet
from detachnet.training.recipe import load_recipe, parse_recipe, parse_text

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.toml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads_and_round_trips(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe


def test_the_papers_protocol() -> None:
    recipe = load_recipe(QUICKSTART.with_name("vgg16_cifar10.toml"))
    assert recipe.model.name == "detachnet:vgg16_cifar"
    assert recipe.family.cuts == ("features.6", "features.23")
    assert recipe.family.norm == "shared"
    assert (recipe.data.name, recipe.data.pad, recipe.data.flip) == ("cifar10", 4, True)
    assert (recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.momentum) == ("momentum", 0.01, 0.9)
    assert (recipe.schedule.name, recipe.schedule.milestones) == ("multistep", (50, 100, 150))
    assert (recipe.schedule.decay, recipe.schedule.warmup_epochs) == (0.1, 1)
    assert (recipe.train.epochs, recipe.train.batch_size) == (300, 32)
    assert (recipe.loss.weights, recipe.train.precision) == ({}, "float32")


def test_the_papers_way_in_one_word() -> None:
    full = load_recipe(QUICKSTART.with_name("vgg16_cifar10.toml"), ["optimizer.weight_decay_alone={}"])
    tables = {
        "description": full.description,
        "preset": "paper",
        "model": {"name": "detachnet:vgg16_cifar"},
        "family": {"cuts": ["features.6", "features.23"]},
        "data": {"name": "cifar10", "pad": 4, "flip": True},
    }
    assert parse_recipe(tables | {"preset": "paper"}).model_dump() == full.model_dump() | {"preset": "paper"}
    other = parse_recipe(
        tables | {"schedule": {"name": "cosine"}, "train": {"epochs": 30}, "optimizer": {"lr": 0.1}}
    )
    assert (other.schedule.milestones, other.schedule.warmup_epochs) == ((), 0)
    assert (other.train.epochs, other.train.batch_size) == (30, 32)
    assert (other.optimizer.lr, other.optimizer.momentum, other.family.norm) == (0.1, 0.9, "shared")
    assert parse_recipe(other.model_dump(mode="json")) == other


@pytest.mark.parametrize("preset", ["papers", 7, ["paper"]])
def test_no_preset(preset: object) -> None:
    with pytest.raises(detachnet.RecipeError, match="preset"):
        parse_recipe({"description": "x", "preset": preset, "model": {"name": "detachnet:vgg16_cifar"}})


def test_overrides() -> None:
    recipe = load_recipe(
        QUICKSTART,
        ["train.epochs=3", 'train.models=["sub1", "base"]', "family.norm=shared", "loss.weights.sub0=0.3"],
    )
    assert recipe.train.epochs == 3
    assert recipe.models == ("base", "sub1")
    assert recipe.family.norm == "shared"
    assert recipe.loss.weights == {"sub0": 0.3}


def test_weight_decay_of_a_model_alone() -> None:
    options = ["optimizer.weight_decay=1e-4", "optimizer.weight_decay_alone={base = 5e-4}"]
    assert load_recipe(QUICKSTART, options).weight_decay == 1e-4
    assert load_recipe(QUICKSTART, [*options, 'train.models=["base"]']).weight_decay == 5e-4
    assert load_recipe(QUICKSTART, [*options, 'train.models=["sub1"]']).weight_decay == 1e-4


def test_loss_weights_are_those_of_the_trained_models() -> None:
    options = ["loss.weights={base = 0.5, sub1 = 0.2}"]
    assert load_recipe(QUICKSTART, options).loss_weights == {"base": 0.5, "sub1": 0.2}
    assert load_recipe(QUICKSTART, [*options, 'train.models=["base", "sub0"]']).loss_weights == {"base": 0.5}
    assert load_recipe(QUICKSTART, [*options, 'train.models=["sub1"]']).loss_weights == {}


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "marked.toml").write_bytes(b"\xef\xbb\xbf" + QUICKSTART.read_bytes())
    assert load_recipe(tmp_path / "marked.toml") == load_recipe(QUICKSTART)


def test_of_several_problems_the_known_names_are_shown() -> None:
    text = QUICKSTART.read_text().replace('name = "detachnet:vgg16_cifar"', 'nam = "detachnet:vgg16_cifar"')
    with pytest.raises(detachnet.RecipeError, match=r"model.name is missing[\s\S]*'nam' in[\s\S]*nearest  'name'"):
        parse_text(text, QUICKSTART)


def test_a_problem_is_of_the_file_and_what_overrides_it() -> None:
    with pytest.raises(detachnet.RecipeError, match=r"where    .*quickstart\.toml with --set train\.epochs=0"):
        load_recipe(QUICKSTART, ["train.epochs=0"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lerning_rate=1", r"unknown key 'lerning_rate' in \[optimizer\]"),
        ("train.epoch=1", r"unknown key 'epoch' in \[train\][\s\S]*nearest  'epochs'"),
        ("trian.epochs=1", r"unknown key 'trian' in the recipe[\s\S]*nearest  'train'"),
        ("optimizer.lr=-1", r"optimizer.lr = -1: it must be above 0"),
        ("optimizer.lr=fast", r'optimizer.lr = "fast": it must be a number'),
        ("optimizer.lr=inf", r"optimizer.lr = Infinity: it must be a finite number"),
        ("optimizer.momentum=1", r"optimizer.momentum = 1: it must be below 1"),
        ("train.epochs=3.5", r"train.epochs = 3.5: it must be a whole number"),
        ("train.epochs=true", r"train.epochs = true: it must be a whole number"),
        ("train.epochs=0", r"train.epochs = 0: it must be above 0"),
        ("train=3", r"train = 3: it must be a table"),
        (
            "data.name=cifar11",
            r"data.name = \"cifar11\": it must be one of 'cifar10', 'cifar10-mini' or 'mnist'; or 'folder'",
        ),
        (
            "family.cuts=[1]",
            r"family.cuts = \[1\]: give names of nodes, .*'auto', a number from 1 to 1000, or shares",
        ),
        ("family.cuts=1000000000", r"family.cuts = 1000000000: give .*, a number from 1 to 1000, or shares"),
        ("family.sub_models=17", r"family.sub_models = 17: give 'auto', a number from 1 to 16, or shares"),
        ('train.models=["sub7"]', r"train.models names 'sub7', but the models are base, sub0, sub1"),
        ('train.models=["base", "base"]', r"train.models names a model twice"),
        ("loss.weights.sub9=1", r"loss.weights names 'sub9'"),
        ("train.freeze_base=true", r"train.freeze_base needs a trained base-model"),
        ("schedule.milestones=[3]", r"schedule.milestones is for 'multistep' only"),
        ("schedule.name=multistep", r"schedule.milestones is needed for 'multistep'"),
        ("schedule.warmup_epochs=999", r"schedule.warmup_epochs is longer than train.epochs"),
        ("data.name=nope", r"data.name = \"nope\": it must be one of 'cifar10'.*\n  where"),
        ("data.flip=1", r"data.flip = 1: it must be true, false or 'alternating'\n  where"),
        ("optimizer.norm_bias_lr=0", r"optimizer.norm_bias_lr = 0: it must be above 0"),
        ("data.pad=33", r"data.pad = 33: it must be at most 32"),
        (
            "train.epochs=10000000000000",
            r"train.epochs = 10000000000000: it must be at most 1000000",
        ),
        ("train.batch_size=1000001", r"train.batch_size = 1000001: it must be at most"),
        ("model.kwargs.width=1e9", r"model.kwargs.width = 1000000000.0: it must be above 0 and at most 64"),
        ("model.kwargs.depth=2001", r"model.kwargs.depth = 2001: it must be above 0 and at most 2000"),
        ("family.stem.depth=101", r"family.stem.depth = 101: it must be at most 100"),
        ("family.stem.width=65", r"family.stem.width = 65: it must be at most 64"),
        ('family.cuts={base="features.6"}', r"'base' is the base-model: a sub-model of family.cuts needs"),
        ("nonsense", r"--set takes table.key=value, not 'nonsense'"),
        ("train.epochs.x=1", r"'epochs' is a value, not a table"),
    ],
)
def test_wrong_values(override: str, message: str) -> None:
    with pytest.raises(detachnet.RecipeError, match=message) as error:
        load_recipe(QUICKSTART, [override])
    assert len(str(error.value).splitlines()) < 8
    if "--set" not in str(error.value):
        assert "quickstart.toml" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.pad=4", r"data.pad is for data sets in memory, not for image files"),
        ("data.num_train=4", r"data.num_train is for data sets in memory, not for image files"),
        ("data.num_worker=4", r"unknown key 'num_worker' in \[data\][\s\S]*nearest  'num_workers'"),
        ("data.image_size=0", r"data.image_size = 0: it must be above 0"),
        ("data.crop_pct=0", r"data.crop_pct = 0: it must be above 0"),
        ("data.crop_pct=1.5", r"data.crop_pct = 1.5: it must be at most 1"),
        ("data.reprob=2", r"data.reprob = 2: it must be at most 1"),
        ("data.mixup=-1", r"data.mixup = -1: it must be at least 0"),
        ("data.cutmix=-1", r"data.cutmix = -1: it must be at least 0"),
        ("data.num_workers=-1", r"data.num_workers = -1: it must be at least 0"),
        ("data.name=wds/", r"data.name = \"wds/\": it must be 'folder', 'FILE.csv'"),
        ("train.ema_decay=1", r"train.ema_decay = 1: it must be below 1"),
    ],
)
def test_wrong_values_of_image_files(override: str, message: str) -> None:
    with pytest.raises(detachnet.RecipeError, match=message):
        load_recipe(QUICKSTART.with_name("resnet50_imagenet.toml"), [override])


def test_keys_of_image_files_are_not_for_data_in_memory() -> None:
    with pytest.raises(detachnet.RecipeError, match=r"data.mixup is for image files, not for data sets in memory"):
        load_recipe(QUICKSTART, ["data.mixup=0.1"])
    with pytest.raises(detachnet.RecipeError, match=r"not for image files\n  what     also: data.flip is for"):
        load_recipe(QUICKSTART, ["data.name=folder"])


def test_weights_that_are_not_asked_for_are_none() -> None:
    options = ["train.freeze_base=true", "model.kwargs.pretrained"]
    with pytest.raises(detachnet.RecipeError, match=r"train.freeze_base needs a trained base-model"):
        load_recipe(QUICKSTART, [options[0], f"{options[1]}=false"])
    assert load_recipe(QUICKSTART, [options[0], f"{options[1]}=true"]).train.freeze_base


def test_milestones_rise() -> None:
    with pytest.raises(detachnet.RecipeError, match=r"schedule\.milestones must rise"):
        load_recipe(QUICKSTART, ["schedule.name=multistep", "schedule.milestones=[5, 2]"])


def test_a_missing_table(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text('description = "x"\n[model]\nname = "timm:resnet18"\n')
    with pytest.raises(detachnet.RecipeError, match=r"family is missing[\s\S]*data is missing"):
        load_recipe(tmp_path / "short.toml")


def test_no_toml_no_file_no_text(tmp_path: Path) -> None:
    (tmp_path / "broken.toml").write_text("[model\n")
    with pytest.raises(detachnet.RecipeError, match="is not valid TOML"):
        load_recipe(tmp_path / "broken.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(detachnet.RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "binary.toml")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.toml").touch()
    with pytest.raises(detachnet.RecipeError, match=r"the folder of a run, not a recipe\n.*run/recipe.toml --out"):
        load_recipe(tmp_path / "run")
    with pytest.raises(detachnet.RecipeError, match="there is no recipe"):
        load_recipe(tmp_path / "nothing.toml")


@pytest.mark.parametrize("lever", ["loss.distillation=1", "loss.hint=1"])
def test_a_teacher_must_be_there(lever: str) -> None:
    with pytest.raises(detachnet.RecipeError, match="need 'base' among"):
        load_recipe(QUICKSTART, [lever, 'train.models=["sub0", "sub1"]'])
    assert load_recipe(QUICKSTART, [lever, 'train.models=["sub1"]']).models == ("sub1",)


def test_sub_models_that_leave_out_spans() -> None:
    options = ['family.cuts={front="features.6"}', 'family.models.late.drop=["features.16:features.22"]']
    family = load_recipe(QUICKSTART, options).family
    assert family.names == ("base", "front", "late")
    assert family.routes == {
        "front": "features.6",
        "late": detachnet.SubModel(drop=["features.16:features.22"]),
    }
    with pytest.raises(detachnet.RecipeError, match=r"front is in family\.cuts and in family\.models"):
        load_recipe(QUICKSTART, [options[0], 'family.models.front.drop=["features.16:features.22"]'])
    with pytest.raises(detachnet.RecipeError, match="it must be a text"):
        load_recipe(QUICKSTART, ["family.models.late.drop=[1]"])
    with pytest.raises(detachnet.RecipeError, match="this is the base-model"):
        load_recipe(QUICKSTART, ["family.models.late.drop=[]"])


def test_sub_models_with_fewer_filters() -> None:
    options = [
        "family.models.half.width=0.5",
        'family.models.some={width={"features.0"=0.25}, filters="important"}',
    ]
    recipe = load_recipe(QUICKSTART, options)
    assert recipe.family.models["half"] == detachnet.SubModel(width=0.5)
    assert recipe.family.models["some"].width == {"features.0": 0.25}
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe
    with pytest.raises(detachnet.RecipeError, match=r"width=1\.5: a width is a share of the filters, in \(0, 1\]"):
        load_recipe(QUICKSTART, ["family.models.half.width=1.5"])
    with pytest.raises(
        detachnet.RecipeError,
        match=r"family.models.half.filters = .best.: it must be one of 'first' or 'important'",
    ):
        load_recipe(QUICKSTART, ["family.models.half.width=0.5", "family.models.half.filters=best"])
    with pytest.raises(detachnet.RecipeError, match="this is the base-model"):
        load_recipe(QUICKSTART, ["family.models.half.width=1"])


def test_widths() -> None:
    recipe = load_recipe(
        QUICKSTART,
        ["family.cuts=[]", "family.models={}", "family.widths=[0.75, 0.5]", "family.models.both.width=0.3"],
    )
    assert recipe.family.names == recipe.models == ("base", "sub0", "sub1", "both")
    assert recipe.family.routes == {
        "sub0": detachnet.SubModel(width=0.75),
        "sub1": detachnet.SubModel(width=0.5),
        "both": detachnet.SubModel(width=0.3),
    }
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["family.widths=[0.5]"], "give either family.cuts, family.sub_models or family.widths"),
        (["family.cuts=[]", "family.widths=[0.5, 0.5]"], r"family\.widths = \[0\.5, 0\.5\]: each width once"),
        (["family.cuts=[]", "family.widths=[1.5]"], r"family\.widths\.0 = 1\.5: it must be below 1"),
        (["family.cuts=[]", "family.widths=0.5"], r"family\.widths = 0\.5: it must be a list"),
        (
            ["family.cuts=[]", "family.widths=[0.5]", "family.models.sub0.width=0.3"],
            r"sub0 is in family\.widths and in family\.models",
        ),
    ],
)
def test_refused_widths(overrides: list[str], message: str) -> None:
    with pytest.raises(detachnet.RecipeError, match=message):
        load_recipe(QUICKSTART, overrides)
