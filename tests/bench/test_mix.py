"""Mix files, and what is drawn from them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from encoder_svc.bench.mix import DEFAULT_MIX, Mix, MixEntry, read_mix
from encoder_svc.errors import ConfigError

ROOT = Path(__file__).parents[2]
TINY = MixEntry(size=(8, 8), format="raw")


def mix_of(*entries: MixEntry, images: tuple[int, int] = (1, 1), unique: bool = True, seed: int = 0) -> Mix:
    return Mix(entries, images_per_request=images, unique=unique, seed=seed)


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "mix.json").write_text(
        json.dumps([{"weight": 2, "photo": "a.jpg"}, {"size": [640, 480], "images": [1, 4], "format": "png"}])
    )
    (tmp_path / "mix.yaml").write_text(
        "- {weight: 2, photo: a.jpg}\n- size: [640, 480] # pixels\n  images: [1, 4]\n  format: png\n"
    )
    entries = read_mix(tmp_path / "mix.json")
    assert entries == read_mix(tmp_path / "mix.yaml")
    assert entries == (
        MixEntry(weight=2.0, photo=tmp_path / "a.jpg"),
        MixEntry(size=(640, 480), images=(1, 4), format="png"),
    )


def test_the_mix_in_configs_is_the_default() -> None:
    assert read_mix(ROOT / "configs/bench-mix.yaml") == DEFAULT_MIX


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a list of entries"),
        ('{"size": [8, 8]}', "must be a list of entries"),
        ("[3]", "entry 1 must have keys"),
        ('[{"size": [8, 8]}, {"size": [8, 8], "wieght": 1}]', "entry 2: unknown key wieght; the keys are weight, "),
        ('[{"weight": 1}]', "either photo or size"),
        ('[{"photo": "a.jpg", "size": [8, 8]}]', "either photo or size"),
        ('[{"photo": 3}]', "photo must be a path"),
        ('[{"size": [8]}]', r"size must be \[width, height\]"),
        ('[{"size": [8, 1]}]', r"size must be \[width, height\]"),
        ('[{"size": [8.0, 8]}]', r"size must be \[width, height\]"),
        ('[{"size": [true, 8]}]', r"size must be \[width, height\]"),
        ('[{"size": [100000, 100000]}]', "at most 134217728 in all"),
        ('[{"size": [8, 8], "weight": 0}]', "weight must be a number above 0"),
        ('[{"size": [8, 8], "weight": NaN}]', "weight must be a number above 0"),
        ('[{"size": [8, 8], "weight": Infinity}]', "weight must be a number above 0"),
        ('[{"size": [8, 8], "weight": true}]', "weight must be a number above 0"),
        ('[{"size": [8, 8], "images": 0}]', "images must be a number from 1"),
        ('[{"size": [8, 8], "images": [3, 2]}]', "images must be a number from 1"),
        ('[{"size": [8, 8], "format": "gif"}]', "format must be one of jpeg, png, raw, not 'gif'"),
        ('[{"size": [8, 8], "format": ["raw"]}]', "format must be one of"),
        ('[{"size": [8, 8], "weight": 1%s}]' % ("0" * 400), "at most 1,000,000,000"),
        ('[{"size": [8, 8], "weight": 1%s}]' % ("0" * 5000), "neither JSON nor YAML"),
        ("[" * 5000, "neither JSON nor YAML"),
        ("- size: [8, 8\n", "neither JSON nor YAML"),
        ("- photo: 2024-13-45\n", "neither JSON nor YAML"),
        ("- photo: !!timestamp soon\n", "neither JSON nor YAML"),
        ("- photo: !!bool perhaps\n", "neither JSON nor YAML"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mix").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_mix(tmp_path / "mix")


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file"):
        read_mix(tmp_path / "no.yaml")
    (tmp_path / "mix.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read_mix(tmp_path / "mix.yaml")
    (tmp_path / "mix.json").write_text("- size: [8, 8]")
    with pytest.raises(ConfigError, match=r"not JSON \(line 1"):
        read_mix(tmp_path / "mix.json")


def test_without_pyyaml_json_is_read_and_yaml_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    (tmp_path / "mix").write_text('[{"size": [8, 8]}]')
    assert read_mix(tmp_path / "mix") == (MixEntry(size=(8, 8)),)
    (tmp_path / "mix").write_text("- size: [8, 8]")
    with pytest.raises(ConfigError, match="pip install PyYAML"):
        read_mix(tmp_path / "mix")


def test_a_photo_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.jpg: No such file"):
        mix_of(MixEntry(photo=tmp_path / "no.jpg"))


def test_draws_follow_the_weights_and_the_seed() -> None:
    entries = (MixEntry(weight=3, size=(8, 8), format="raw"), MixEntry(weight=1, size=(9, 9), format="raw"))
    sequences = [[mix.draw()[0].shape[0] for _ in range(2000)] for mix in (mix_of(*entries), mix_of(*entries))]
    assert sequences[0] == sequences[1]
    assert Counter(sequences[0])[8] == pytest.approx(1500, abs=100)
    assert sequences[0] != [mix.draw()[0].shape[0] for mix in [mix_of(*entries, seed=1)] for _ in range(2000)]
    assert [share.share for share in mix_of(*entries).shares] == [0.75, 0.25]


def test_images_in_a_request_are_the_entrys_or_else_the_command_lines() -> None:
    own, general = (
        mix_of(MixEntry(size=(8, 8), format="raw", images=(3, 3)), images=(1, 2)),
        mix_of(TINY, images=(1, 2)),
    )
    assert {len(own.draw()) for _ in range(20)} == {3}
    assert {len(general.draw()) for _ in range(50)} == {1, 2}
    assert general.shares[0].images == (1, 2)


def test_unique_images_differ_within_a_run_and_between_runs() -> None:
    runs = [mix_of(TINY, images=(4, 4)) for _ in range(2)]
    drawn = [image.tobytes() for mix in runs for _ in range(25) for image in mix.draw()]
    assert len(set(drawn)) == 200


def test_repeated_images_are_the_same() -> None:
    mix = mix_of(TINY, images=(2, 2), unique=False)
    first, *others = [image for _ in range(5) for image in mix.draw()]
    assert all(np.array_equal(first, other) for other in others)
