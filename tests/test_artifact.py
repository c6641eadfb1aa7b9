"""A run folder is whole or refused in one sentence, whatever somebody did to it."""

import hashlib
import json
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bkd_fast.artifact import FORMAT, MANIFEST, _digest, category_folders, load_trained, read_category
from bkd_fast.errors import BKDError
from bkd_fast.inference.detector import Detector

ODD = (
    None, True, -1, 0, 1e308, 10**400, 2**63, "", ".", "..", "../../victim", "/etc/passwd", "a/b", "a\\b", "C:x", "\0",
    "\ud800", "x" * 10_000, [], {}, [[]], [1, 2, 3], {"": None}, [100_000, 100_000], float("nan"), float("inf"), "nan",
)  # fmt: skip


def places(value, path=()):
    """Yield the path of each value inside nested dictionaries and lists."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield (*path, key)
        if isinstance(value[key], (dict, list)):
            yield from places(value[key], (*path, key))


def odd_json(value, chance):
    """Change one or two values, keys or the nesting."""
    for _ in range(chance.randint(1, 2)):
        spots = list(places(value))
        if not spots:
            return value
        *parents, key = chance.choice(spots)
        holder = value
        for parent in parents:
            holder = holder[parent]
        change = chance.randrange(4)
        if change == 0:
            del holder[key]
        elif change == 1 and isinstance(holder, dict):
            holder[str(chance.choice(ODD))] = holder.pop(key)
        elif change == 2:
            holder[key] = {"a": holder[key]} if chance.random() < 0.5 else [holder[key]] * chance.randint(1, 3)
        else:
            holder[key] = chance.choice(ODD)
    return value


def odd_bytes(data, chance):
    """Flip, cut, repeat or insert bytes."""
    data, start = bytearray(data), chance.randrange(max(1, min(len(data), chance.choice((16, 500, len(data))))))
    change = chance.randrange(4)
    if change == 0:
        for _ in range(chance.randint(1, 8)):
            data[(start + chance.randrange(8)) % len(data)] = chance.randrange(256)
    elif change == 1:
        del data[start:]
    elif change == 2:
        data[start:start] = data[start : start + chance.randint(1, 100)]
    else:
        data[start:start] = chance.randbytes(chance.randint(1, 20))
    return bytes(data)


def odd_header(data, chance):
    """Change the header of a safetensors file."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(odd_json(json.loads(data[8 : 8 + size]), chance)).encode()
    length = chance.choice((len(header), len(header), len(header), 2**40, 0, 2**63))
    return struct.pack("<Q", length) + header + data[8 + size :]


def odd_config(data, chance):
    """Change a line of the configuration."""
    lines = data.decode().splitlines()
    index = chance.randrange(len(lines))
    key = lines[index].split("=")[0]
    value = chance.choice(
        ("-1", "nan", "inf", "1e308", "1" * 400, "[100000, 100000]", "[4096, 4096]", "100000", "[" * 5000, "true",
         '"convnext_xxlarge"', '"regnety_1280"', '"vit_base_patch16_224"', '"wide_resnet101_2"', '"\\u0000"')
    )  # fmt: skip
    lines[index] = chance.choice((f"{key} = {value}", lines[index] * 2, "", f"[{key}]", value))
    return "\n".join(lines).encode(errors="surrogatepass")


def sign(run, content):
    """Write a manifest whose own checksum fits."""
    try:
        content = {"format": FORMAT, **content}
        text = json.dumps({**content, "sha256": _digest(content)})
    except (TypeError, ValueError, UnicodeEncodeError):
        return
    (run / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))


def mutate(run, whole, chance):
    """Change a run in one way; most changes come with checksums that fit them."""
    manifest = {key: value for key, value in json.loads(whole[MANIFEST]).items() if key not in ("sha256", "format")}
    kind = chance.randrange(10)
    if kind < 4:
        sign(run, odd_json(manifest, chance))
        return
    if kind == 4:
        (run / MANIFEST).write_bytes(odd_bytes(whole[MANIFEST], chance))
        return
    if kind == 5:
        deep = chance.choice(('{"format": ', "[", '{"format": 5, "files": {"a": '))
        (run / MANIFEST).write_text(deep * chance.choice((100, 100_000)))
        return
    name = chance.choice([name for name in whole if name != MANIFEST])
    path = run / name
    if kind == 6:
        change = chance.randrange(3)
        path.unlink()
        if change:
            path.symlink_to(chance.choice(("/etc/passwd", "/dev/zero", "/dev/null", ".", "nowhere", run / MANIFEST)))
        return
    change = odd_bytes
    if name == "config.toml":
        change = odd_config
    elif name.endswith("safetensors") and chance.random() < 0.8:
        change = odd_header
    path.write_bytes(change(whole[name], chance))
    if chance.random() < 0.95:
        manifest["files"][name] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    sign(run, manifest)


def fuzz(run, seed, count):
    """Load changed runs; return how many were refused, and the peak memory in MB beyond the start's."""
    whole = {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    outside = sorted(run.parent.rglob("*"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = silent = 0
    for index in range(count):
        chance = random.Random(f"{seed} {index}")
        mutate(run, whole, chance)
        try:
            category_folders(run)
            load_trained(run)
        except BKDError as error:
            refused += 1
            silent += not str(error)
        except BaseException as error:
            raise AssertionError(f"mutation {seed} {index}: {error!r}") from error
        for name, data in whole.items():
            path = run / name
            if path.is_symlink() or not path.is_file() or path.stat().st_size != len(data) or path.read_bytes() != data:
                path.unlink(missing_ok=True)
                path.write_bytes(data)
    assert not silent
    assert sorted(run.parent.rglob("*")) == outside
    return refused, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize("count", [300, pytest.param(2_000, marks=pytest.mark.slow)])
def test_whatever_is_wrong_with_a_run_is_one_error_and_little_memory(count, tiny_default_run, tmp_path):
    """In a process of its own, whose peak memory is the loading's."""
    run = shutil.copytree(tiny_default_run, tmp_path / "run")
    code = f"import test_artifact; print(*test_artifact.fuzz(test_artifact.Path({str(run)!r}), {count}, {count}))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    refused, megabytes = map(float, done.stdout.split())
    assert refused > 0.7 * count
    assert megabytes < 1000, megabytes


def test_a_run_that_was_copied_is_the_same(tiny_default_run, tmp_path, tiny_data):
    copied = shutil.copytree(tiny_default_run, tmp_path / "elsewhere")
    image = tiny_data / "test/hole/000.png"
    assert Detector.load(copied)(image).score == Detector.load(tiny_default_run)(image).score


def test_a_manifest_says_which_files_were_used_for_what(tiny_default_run, tiny_data):
    source = read_category(tiny_default_run).source
    files = {path.name: path for path in (tiny_data / "train/good").iterdir()}
    assert source.used.keys() == files.keys()
    assert not source.train_files.keys() & source.validation_files.keys()
    for name, record in source.used.items():
        assert record == (files[name].stat().st_size, hashlib.sha256(files[name].read_bytes()).hexdigest())


def test_changing_any_byte_of_the_manifest_is_noticed(tiny_default_run, tmp_path):
    run = shutil.copytree(tiny_default_run, tmp_path / "run")
    text = (run / MANIFEST).read_text()
    threshold = re.search(r'"threshold": (\S+),', text)
    (run / MANIFEST).write_text(text.replace(threshold.group(1), "0.125"))
    with pytest.raises(BKDError, match="SHA-256 differs"):
        load_trained(run)


def test_a_link_to_a_run_folder_is_the_run(tiny_run, tmp_path):
    (tmp_path / "latest").symlink_to(tiny_run)
    assert load_trained(tmp_path / "latest").calibration == load_trained(tiny_run).calibration
