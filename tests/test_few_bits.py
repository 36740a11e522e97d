"""lab/few_bits.py: its table, of a short run on a random checkpoint."""

import pytest

import train_inpo
from lab import few_bits


@pytest.mark.slow
def test_the_table_has_each_base_and_its_error(argv, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    train_inpo.main(argv(lora_rank=4, method="dpo", lr=1e-2))
    capsys.readouterr()
    few_bits.main([str(tmp_path / "run"), "--pairs=20", "--rounds=1"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    found = {name: [float(value) for value in values] for name, *values in rows}
    sizes, errors = ([values[i] for values in found.values()] for i in (0, 2))
    assert list(found) == ["fp32", "bf16", "int8", "nf4"] and found["bf16"][1] == 1
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1.5 * sizes[1]
    assert errors[0] == 0 < min(errors[1:])


def test_a_folder_without_a_lora_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        few_bits.main([str(tmp_path)])
    assert "is not a LoRA: it has no pytorch_lora_weights.safetensors" in capsys.readouterr().err
