"""The configuration tree: unknown keys with the nearest real one, overrides at any depth, a round trip by --show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from sci_gpt.config import Config, DataConfig, PretrainConfig, load_config, parse_config, show_config
from sci_gpt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]


def pretrain_tree() -> dict[str, Any]:
    """A small complete tree."""
    return {
        "name": "small",
        "output": "runs/small",
        "data": "data/small",
        "seed": 1,
        "row_length": 64,
        "rows_per_step": 2,
        "mixture": [
            {"source": "co2", "weight": 1.0, "frames": 12, "stride": 4, "context_frames": [4, 6], "leads": [1, 2]},
            {"source": "sst", "weight": 0.5, "frames": 6, "stride": 1, "context_frames": [2, 3]},
        ],
        "loss_factor": {"grid": 1.0, "series": 1.0, "trace": 1.0},
        "model": {"size": "tiny"},
        "optimizer": {"learning_rate": 0.001},
        "schedule": {"steps": 10, "warmup_steps": 2, "cooldown_steps": 4},
        "checkpoint": {"every": 5},
        "validation": {"every": 5},
        "tracking": {"experiment": "tests", "registered_model": None},
        "evaluate": {"windows": 8},
    }


def write(tmp_path: Path, tree: dict[str, Any]) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_a_complete_tree_loads_with_its_types(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, pretrain_tree()), PretrainConfig)
    assert config.mixture[0].context_frames == (4, 6)
    assert config.mixture[1].leads == (1,)
    assert config.data == Path("data/small")


@pytest.mark.parametrize(
    ("place", "wrong", "path", "nearest"),
    [
        ((), "shedule", "shedule", "schedule"),
        (("optimizer",), "lerning_rate", "optimizer.lerning_rate", "learning_rate"),
        (("mixture", 1), "wieght", "mixture.1.wieght", "weight"),
        (("tracking",), "experimant", "tracking.experimant", "experiment"),
        (("loss_factor",), "serie", "loss_factor.serie", "series"),
    ],
)
def test_a_misspelt_key_is_named_with_its_place_and_the_nearest_real_one(
    tmp_path: Path, place: tuple[Any, ...], wrong: str, path: str, nearest: str
) -> None:
    tree = pretrain_tree()
    node: Any = tree
    for part in place:
        node = node[part]
    node[wrong] = node.pop(nearest)  # misspelt, so that the real key is missing too: the misspelling must come first
    with pytest.raises(ConfigError, match=rf"config\.yaml: unknown key '{path}'; nearest: '{nearest}'"):
        load_config(write(tmp_path, tree), PretrainConfig)


def test_a_misspelt_key_in_a_list_of_a_data_configuration_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load((ROOT / "configs/data/quickstart.yaml").read_text(encoding="utf-8"))
    tree["sources"][2]["split"]["bye"] = tree["sources"][2]["split"].pop("by")
    with pytest.raises(ConfigError, match=r"unknown key 'sources\.2\.split\.bye'; nearest: 'by'"):
        load_config(write(tmp_path, tree), DataConfig)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("seed",), "one", r"seed: .*valid integer.*got 'one'"),
        (
            ("schedule", "warmup_steps"),
            9,
            r"schedule: warmup_steps \+ cooldown_steps must fit in steps, got 9 \+ 4 > 10",
        ),
        (
            ("mixture", 0, "context_frames"),
            [7, 12],
            r"mixture\.0: context_frames .* fewer than 12 frames, got \[7, 12\]",
        ),
        (("mixture", 0, "leads"), [2, 1], r"mixture\.0: leads are ascending and positive, got \[2, 1\]"),
        (("mixture", 0, "leads"), [7], r"mixture\.0: 12 frames hold no target 7 ahead of 6 context frames"),
        (("mixture", 1, "source"), "co2", r"mixture source 'co2' stands 2 times"),
        (("parallel",), {"dtype": "bf16", "zero_stage": 0}, r"parallel: dtype bf16 with zero_stage 0"),
        (("optimizer", "learning_rate"), float("nan"), r"optimizer\.learning_rate: .*finite number"),
        (("model",), {}, r"missing key 'model\.size'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_what_came(
    tmp_path: Path, place: tuple[Any, ...], value: object, message: str
) -> None:
    tree = pretrain_tree()
    node: Any = tree
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, tree), PretrainConfig)


def test_overrides_reach_into_lists_by_number_and_by_name_and_into_absent_parts(tmp_path: Path) -> None:
    overrides = (
        "mixture.1.weight=2",
        "mixture.co2.leads=[1, 3]",
        "parallel.processes=4",  # the file has no `parallel`
        "optimizer.learning_rate=1e-3",  # a word to YAML 1.1, a number to us
        "tracking.registered_model=null",
        "evaluate.windows_by_source={co2: 5}",
    )
    config = load_config(write(tmp_path, pretrain_tree()), PretrainConfig, overrides=overrides)
    assert (config.mixture[1].weight, config.mixture[0].leads) == (2.0, (1, 3))
    assert (config.parallel.processes, config.optimizer.learning_rate) == (4, 1e-3)
    assert (config.tracking.registered_model, config.evaluate.windows_by_source) == (None, {"co2": 5})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set wants key\.subkey=value, got 'seed'"),
        ("=3", r"--set wants key\.subkey=value, got '=3'"),
        ("sede=3", r"unknown key 'sede'; nearest: 'seed'"),
        ("optimizer.beta=[0.9, 0.9]", r"unknown key 'optimizer\.beta'; nearest: 'betas'"),
        ("mixture.2.weight=1", r"'2' is no entry of a list of 2; use 0\.\.1, or a name; nearest:"),
        ("mixture.c02.weight=1", r"'c02' is no entry of a list.*nearest: 'co2'"),
        ("mixture.-1.weight=1", r"'-1' is no entry"),
        ("seed.x=1", r"'seed' holds 1, which has no keys"),
        ("seed.x.y=1", r"'x' is looked for in 1, which has no keys"),
        ("mixture.0.wait=1", r"unknown key 'mixture\.0\.wait'; nearest: 'weight'"),
        ("seed=[1", r"the value is not YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, pretrain_tree()), PretrainConfig, overrides=(override,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nseed: 2\n", r"key 'seed' stands twice"),
        ("seed: [1\n", r"is not YAML"),
        ("- 1\n", r"must hold a mapping of keys, got list"),
        ("", r"must hold a mapping of keys, got NoneType"),
        ("a: !!python/object/apply:os.getcwd []\n", r"is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path, PretrainConfig)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no configuration file '.*nowhere\.yaml'; the examples are in configs/"):
        load_config(tmp_path / "nowhere.yaml", PretrainConfig)


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        load_config(tmp_path / "config.yaml", PretrainConfig)


def test_the_error_names_at_most_three_places(tmp_path: Path) -> None:
    tree = pretrain_tree() | {"a": 1, "b": 2, "c": 3, "d": 4}
    with pytest.raises(ConfigError) as caught:
        parse_config(tree, PretrainConfig, where="here")
    assert str(caught.value).count("unknown key") == 3


def test_a_misspelt_key_in_the_only_entry_of_a_list_is_said_once(tmp_path: Path) -> None:
    tree = pretrain_tree()
    del tree["mixture"][1]
    tree["mixture"][0]["wieght"] = 1.0
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, tree), PretrainConfig)
    assert str(caught.value).endswith("unknown key 'mixture.0.wieght'; nearest: 'weight'")


def every_configuration() -> list[tuple[Path, type[Config]]]:
    kinds: dict[str, type[Config]] = {"data": DataConfig, "pretrain": PretrainConfig}  # type: ignore[dict-item]
    return [(path, kinds[path.parent.name]) for path in sorted((ROOT / "configs").glob("*/*.yaml"))]


@pytest.mark.parametrize(("path", "kind"), every_configuration(), ids=lambda value: getattr(value, "name", None))
def test_every_configuration_of_the_repository_loads_and_what_show_prints_loads_to_an_equal_tree(
    tmp_path: Path, path: Path, kind: type[Config]
) -> None:
    config = load_config(path, kind)
    shown = tmp_path / "shown.yaml"
    shown.write_text(show_config(config), encoding="utf-8")
    assert load_config(shown, kind) == config


def test_a_small_tree_survives_show(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, pretrain_tree()), PretrainConfig)
    shown = tmp_path / "shown.yaml"
    shown.write_text(show_config(config), encoding="utf-8")
    assert load_config(shown, PretrainConfig) == config
    assert "learning_rate: 0.001" in show_config(config)
    assert "clip: 1.0" in show_config(config), "a default must be shown too"


def test_a_source_that_is_not_in_the_mixture_and_a_missing_factor_are_refused() -> None:
    path = Path(__file__).resolve().parents[1] / "configs" / "pretrain" / "quickstart.yaml"
    with pytest.raises(ConfigError, match="'cmip6_dayly'; nearest in the mixture: 'cmip6_daily_ta'"):
        load_config(path, PretrainConfig, overrides=("evaluate.windows_by_source.cmip6_dayly=3",))
    with pytest.raises(ConfigError, match=r"loss_factor: missing \['series', 'trace'\]"):
        load_config(path, PretrainConfig, overrides=("loss_factor={grid: 1.0}",))
