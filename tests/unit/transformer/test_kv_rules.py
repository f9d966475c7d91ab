"""What a setting of KV compression says, where it acts, and what is refused."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from pixart_sigma.errors import SigmaError
from pixart_sigma.transformer import kv_rules
from pixart_sigma.transformer.config import KVWeights
from pixart_sigma.transformer.kv_rules import OFF, KVCompression, acting, parse, resolve, spell


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("off", OFF),
        ("mean:2:14-27", (KVCompression("mean", 2, tuple(range(14, 28))),)),
        ("mean:3:all", (KVCompression("mean", 3, tuple(range(28))),)),
        (" Conv:2:Deep ", (KVCompression("conv", 2, tuple(range(14, 28))),)),
        ("ave:4:27,0-1,1", (KVCompression("ave", 4, (0, 1, 27)),)),
        ("uniform:2:5:20-80%", (KVCompression("uniform", 2, (5,), 0.2, 0.8),)),
        (
            "mean:4:20-27+mean:2:14-27:0-50%",
            (
                KVCompression("mean", 4, tuple(range(20, 28))),
                KVCompression("mean", 2, tuple(range(14, 28)), 0, 0.5),
            ),
        ),
    ],
)
def test_parse(text, expected):
    assert parse(text, 28) == expected
    assert parse(spell(expected), 28) == expected


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("mean:0:all", "'0'"),
        ("mean:1:all", "'1'"),
        ("mean:7:all", "'7'"),
        ("mean:-2:all", "'-2'"),
        ("mean:2.0:all", "'2.0'"),
        ("mean:two:all", "'two'"),
        ("mean:2:28", "'28'"),
        ("mean:2:20-40", "'20-40'"),
        ("mean:2:27-14", "'27-14'"),
        ("mean:2:-1", "'-1'"),
        ("mean:2:", "''"),
        ("mean:2:1,,2", "'1,,2'"),
        ("pool:2:all", "'pool'"),
        ("mean:2", "'mean:2'"),
        ("", "''"),
        ("auto", "'auto'"),
        ("mean:2:all:80-20%", "'80-20%'"),
        ("mean:2:all:0-101%", "'0-101%'"),
        ("mean:2:all:half", "'half'"),
        ("mean:2:all+", "''"),
        ("mean:2:all+off", "'off'"),
        ("mean:2:all:0-50%:x", "'mean:2:all:0-50%:x'"),
    ],
)
def test_parse_errors_name_the_value(text, seen):
    with pytest.raises(SigmaError) as error:
        parse(text, 28)
    assert seen in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ("pool", 2, (0,)),
        ("mean", 1, (0,)),
        ("mean", True, (0,)),
        ("mean", 2, (-1,)),
        ("mean", 2, ()),
        ("mean", 2, (0,), 0.5, 0.5),
        ("mean", 2, (0,), 0.0, float("nan")),
    ],
)
def test_settings_refuse_nonsense(arguments):
    with pytest.raises(SigmaError):
        KVCompression(*arguments)


def test_resolve_without_trained_weights():
    config = SimpleNamespace(num_layers=28, kv_compression=None)
    deep, first = KVCompression("mean", 2, tuple(range(14, 28))), KVCompression("mean", 2, (0,))
    assert resolve(None, config, 4096, 4096) == OFF
    assert resolve("off", config, 4096, 4096) == OFF
    assert resolve("auto", config, 1024, 1024) == OFF
    assert resolve("auto", config, 2048, 512) == OFF
    assert resolve("auto", config, 1024, 1024, calibrated=(first,)) == OFF
    assert resolve("auto", config, 1024, 1040) == (deep,)
    assert resolve("auto", config, 1024, 1040, calibrated=(first,)) == (first,)
    assert resolve("auto", config, 1024, 1040, calibrated=OFF) == OFF
    assert resolve("mean:2:0", config, 64, 64, calibrated=(deep,)) == (first,)
    with pytest.raises(SigmaError, match="has none"):
        resolve("conv:2:all", config, 1024, 1024)
    with pytest.raises(SigmaError, match="layer 28"):
        resolve((first, KVCompression("mean", 2, (27, 28))), config, 1024, 1024)


def test_resolve_with_trained_weights():
    config = SimpleNamespace(num_layers=28, kv_compression=KVWeights(ratio=2, layers=(14, 15)))
    trained = (KVCompression("conv", 2, (14, 15)),)
    for size in (256, 4096):
        assert resolve(None, config, size, size) == trained
        assert resolve("auto", config, size, size) == trained
    assert resolve("off", config, 256, 256) == OFF
    assert resolve("mean:2:0", config, 256, 256) == (KVCompression("mean", 2, (0,)),)
    assert resolve("conv:2:15", config, 256, 256) == (KVCompression("conv", 2, (15,)),)
    for other in ("conv:4:14-15", "conv:2:13-15"):
        with pytest.raises(SigmaError, match="conv:2:14-15"):
            resolve(other, config, 256, 256)


def test_auto_says_once_that_it_was_not_measured(caplog):
    config = SimpleNamespace(num_layers=28, kv_compression=None)
    kv_rules._say_not_measured.cache_clear()
    for _ in range(2):
        resolve("auto", config, 2048, 2048)
    (message,) = caplog.messages
    assert "mean:2:14-27" in message and "not measured" in message


def test_the_first_rule_that_acts_on_a_layer_counts():
    early, late = KVCompression("mean", 4, (1, 2), 0.0, 0.5), KVCompression("mean", 2, (2, 3))
    rules = (early, late)
    assert [acting(rules, layer, 999) for layer in range(4)] == [None, early, early, late]
    assert [acting(rules, layer, 0) for layer in range(4)] == [None, None, late, late]


def test_window_is_a_part_of_the_noise_schedule():
    setting = KVCompression("mean", 2, (0,), 0.2, 0.8)
    assert [setting.acts_at(t) for t in (999, 900, 700, 300, 100, 0)] == [
        False,
        False,
        True,
        True,
        False,
        False,
    ]
    late = KVCompression("mean", 2, (0,), 0.5, 1.0)
    assert late.acts_at(0) and not late.acts_at(999)
    assert KVCompression("mean", 2, (0,), 0.0, 0.5).acts_at(999)


def test_reading_a_setting_needs_no_torch():
    code = "import sys, pixart_sigma.transformer.kv_rules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
