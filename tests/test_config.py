"""The configuration tree: unknown keys with the nearest real one, overrides at any depth, a round trip by --show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from sci_gpt.config import DataConfig, PretrainConfig, TokenizerConfig
from sci_gpt.config_file import load_config, parse_config, show_config
from sci_gpt.errors import ConfigError
from sci_gpt.recipes.studies import SweepConfig, TransferConfig
from sci_tokenizers.quantizer import Quantizer, QuantizerError

ROOT = Path(__file__).resolve().parents[1]


def pretrain_tree() -> dict[str, Any]:
    """A small complete tree."""
    return {
        "name": "small",
        "output": "runs/small",
        "data": "data/small",
        "seed": 1,
        "phases": [
            {
                "until_step": 10,
                "row_length": 64,
                "rows_per_step": 2,
                "mixture": [
                    {
                        "source": "co2",
                        "weight": 1.0,
                        "frames": 12,
                        "stride": 4,
                        "context_frames": [4, 6],
                        "leads": [1, 2],
                    },
                    {"source": "sst", "weight": 0.5, "frames": 6, "stride": 1, "context_frames": [2, 3]},
                ],
            }
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
        (("phases", 0), "row_lenght", "phases.0.row_lenght", "row_length"),
        (("phases", 0, "mixture", 1), "wieght", "phases.0.mixture.1.wieght", "weight"),
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
            ("phases", 0, "mixture", 0, "context_frames"),
            [7, 12],
            r"phases\.0\.mixture\.0: context_frames .* fewer than 12 frames, got \[7, 12\]",
        ),
        (
            ("phases", 0, "mixture", 0, "leads"),
            [2, 1],
            r"phases\.0\.mixture\.0: leads are ascending and positive, got \[2, 1\]",
        ),
        (
            ("phases", 0, "mixture", 0, "leads"),
            [7],
            r"phases\.0\.mixture\.0: 12 frames hold no target 7 ahead of 6 context frames",
        ),
        (("phases", 0, "mixture", 1, "source"), "co2", r"phases\.0: mixture source 'co2' stands 2 times"),
        (("parallel",), {"dtype": "bf16", "zero_stage": 0}, r"parallel: dtype bf16 with zero_stage 0"),
        (("optimizer", "learning_rate"), float("nan"), r"optimizer\.learning_rate: .*finite number"),
        (("model",), {}, r"missing key 'model\.size'"),
        (
            ("tokenizer",),
            {"series_ids": 1000000},
            r"tokenizer\.series_ids: .*less than or equal to 262144, got 1000000",
        ),
        (("tokenizer",), {"series_ids": 7}, r"tokenizer\.series_ids: .*greater than or equal to 8, got 7"),
        (
            ("tokenizer",),
            {"series_limit": 1e30},
            r"tokenizer\.series_limit: .*less than or equal to 1000.*, got 1e",
        ),
        (("tokenizer",), {"series_limit": 0.0}, r"series_limit: .*greater than or equal to 0\.000.*, got 0\.0"),
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


def test_the_tokenizers_bounds_are_those_of_the_quantizer() -> None:
    """What the configuration takes makes a quantizer, and what it refuses does not."""
    for ids, limit in ((8, 1e-30), (2**18, 1e19)):
        config = TokenizerConfig(series_ids=ids, series_limit=limit)
        assert Quantizer(config.series_ids, config.series_limit).num_ids == ids
    for ids, limit in ((7, 15.0), (2**18 + 1, 15.0), (4096, 0.99e-30), (4096, 1.01e19)):
        with pytest.raises(QuantizerError):
            Quantizer(ids, limit)
        with pytest.raises(ValidationError):
            TokenizerConfig(series_ids=ids, series_limit=limit)


def test_a_password_in_the_tracking_address_is_refused_and_not_repeated(tmp_path: Path) -> None:
    tree = pretrain_tree()
    tree["tracking"]["uri"] = "https://me:hush@host.example"
    with pytest.raises(ConfigError, match="tracking: uri holds a password.*MLFLOW_TRACKING_PASSWORD") as refused:
        load_config(write(tmp_path, tree), PretrainConfig)
    assert "hush" not in str(refused.value)


def test_overrides_reach_into_lists_by_number_and_by_name_and_into_absent_parts(tmp_path: Path) -> None:
    overrides = (
        "phases.0.row_length=512",
        "phases.0.mixture.1.weight=2",
        "phases.0.mixture.co2.leads=[1, 3]",
        "parallel.processes=4",  # the file has no `parallel`
        "optimizer.learning_rate=1e-3",  # a word to YAML 1.1, a number to us
        "tracking.registered_model=null",
        "evaluate.windows_by_source={co2: 5}",
    )
    config = load_config(write(tmp_path, pretrain_tree()), PretrainConfig, overrides=overrides)
    assert (config.mixture[1].weight, config.mixture[0].leads) == (2.0, (1, 3))
    assert config.phases[0].row_length == 512
    assert (config.parallel.processes, config.optimizer.learning_rate) == (4, 1e-3)
    assert (config.tracking.registered_model, config.evaluate.windows_by_source) == (None, {"co2": 5})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"--set wants key\.subkey=value, got 'seed'"),
        ("=3", r"--set wants key\.subkey=value, got '=3'"),
        ("sede=3", r"unknown key 'sede'; nearest: 'seed'"),
        ("optimizer.beta=[0.9, 0.9]", r"unknown key 'optimizer\.beta'; nearest: 'betas'"),
        ("phases.0.mixture.2.weight=1", r"'2' is no entry of a list of 2; use 0\.\.1, or a name; nearest:"),
        ("phases.0.mixture.c02.weight=1", r"'c02' is no entry of a list.*nearest: 'co2'"),
        ("phases.0.mixture.-1.weight=1", r"'-1' is no entry"),
        ("phases.1.row_length=1", r"'1' is no entry of a list of 1; use 0$"),
        ("phases.row_length=1", r"'row_length' is no entry of a list of 1; use 0$"),
        ("phases.\N{SUPERSCRIPT TWO}.row_length=1", r"'\N{SUPERSCRIPT TWO}' is no entry"),
        ("row_length=1", r"'row_length'; it belongs to an entry of 'phases', as 'phases\.0\.row_length'"),
        ("mixture.co2.weight=2", r"'mixture'; it belongs to an entry of 'phases', as 'phases\.0\.mixture'"),
        ("seed.x=1", r"'seed' holds 1, which has no keys"),
        ("seed.x.y=1", r"'x' is looked for in 1, which has no keys"),
        ("phases.0.mixture.0.wait=1", r"unknown key 'phases\.0\.mixture\.0\.wait'; nearest: 'weight'"),
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
    del tree["phases"][0]["mixture"][1]
    tree["phases"][0]["mixture"][0]["wieght"] = 1.0
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, tree), PretrainConfig)
    assert str(caught.value).endswith("unknown key 'phases.0.mixture.0.wieght'; nearest: 'weight'")


def every_configuration() -> list[tuple[Path, type[Any]]]:
    kinds: dict[str, type[Any]] = {
        "data": DataConfig,
        "pretrain": PretrainConfig,
        "sweeps": SweepConfig,
        "transfer": TransferConfig,
    }
    return [(path, kinds[path.parent.name]) for path in sorted((ROOT / "configs").glob("*/*.yaml"))]


@pytest.mark.parametrize(("path", "kind"), every_configuration(), ids=lambda value: getattr(value, "name", None))
def test_every_configuration_of_the_repository_loads_and_what_show_prints_loads_to_an_equal_tree(
    tmp_path: Path, path: Path, kind: type[Any]
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


def two_phases() -> dict[str, Any]:
    """A tree whose second phase has longer rows, other windows of one source, and a source more."""
    tree = pretrain_tree()
    (first,) = tree["phases"]
    co2, sst = first["mixture"]
    soil = sst | {"source": "soil"}
    second = first | {"row_length": 128, "mixture": [soil, co2 | {"frames": 24, "weight": 3.0}]}
    tree["phases"] = [first | {"until_step": 4}, second]
    return tree


def test_a_source_of_several_phases_counts_as_its_last_phase_has_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, two_phases()), PretrainConfig)
    assert [(entry.source, entry.frames) for entry in config.mixture] == [("co2", 24), ("sst", 6), ("soil", 6)]
    assert config.mixture[0].weight == 3.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("phases.0.until_step=10", r"until_step must rise from phase to phase, got \[10, 10\]"),
        ("phases.0.until_step=11", r"until_step must rise from phase to phase, got \[11, 10\]"),
        ("phases.1.until_step=9", r"phases\.1\.until_step is 9, schedule\.steps is 10: the last phase ends with"),
        ("schedule.steps=12", r"phases\.1\.until_step is 10, schedule\.steps is 12"),
        ("phases=[]", r"phases: .*at least 1 item"),
        (
            "phases.0.mixture.co2.leads=[1]",
            r"phases\.0: source 'co2' is asked for leads \[1\], in a later phase for \[1, 2\].*the same in all phases",
        ),
        ("evaluate.windows_by_source.soli=3", r"unknown source 'soli'; nearest in the mixture: 'soil'"),
    ],
)
def test_phases_that_contradict_each_other_are_refused(tmp_path: Path, override: str, message: str) -> None:
    path = write(tmp_path, two_phases())
    load_config(path, PretrainConfig)
    with pytest.raises(ConfigError, match=message):
        load_config(path, PretrainConfig, overrides=(override,))


def test_an_override_into_an_empty_list_says_that_it_is_empty(tmp_path: Path) -> None:
    tree = pretrain_tree() | {"phases": []}
    with pytest.raises(ConfigError, match=r"'0' is no entry of a list of 0; it is empty"):
        load_config(write(tmp_path, tree), PretrainConfig, overrides=("phases.0.row_length=3",))


def test_real_weather_is_not_split_by_runs(tmp_path: Path, root: Path) -> None:
    """Its dates would escape the corpus calendar: it could train on what another source is tested on."""
    override = "sources.cmip6_daily_ta.nature=analysis"
    with pytest.raises(ConfigError, match="'cmip6_daily_ta': split by run is for simulations.*split it by time or"):
        load_config(root / "configs/data/quickstart.yaml", DataConfig, overrides=(override,))
