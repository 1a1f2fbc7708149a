"""The toy task by its shipped recipe: DPO must make answers better by the true reward, on every seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import quickstart
from running import ROOT

from tinydpo.errors import UserError


def test_another_seed_does_not_replace_the_data_of_trained_models(tmp_path: Path):
    for file in ("base/model.safetensors", "data/test.jsonl"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text("of seed 0")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/run_config.yaml").write_text("seed: 0")
    with pytest.raises(UserError, match="holds a run of seed 0; choose another --output_dir"):
        quickstart.main(["--seed", "1", "--output_dir", str(tmp_path)])
    assert (tmp_path / "data/test.jsonl").read_text() == "of seed 0"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_dpo_raises_the_gold_reward(seed: int, tmp_path: Path):
    command = [sys.executable, str(ROOT / "scripts/quickstart.py"), "--seed", str(seed), "--output_dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"make quickstart fails:\n{done.stdout}\n{done.stderr}"
    results = json.loads((tmp_path / "run/evaluation/eval_results.json").read_text())
    gain = results["reward_policy"] - results["reward_ref"]
    print(f"seed {seed}: win {results['win_rate_vs_ref']:.3f}, acc {results['reward_accuracy']:.3f}, +{gain:.2f}")
    assert results["win_rate_vs_ref"] >= 0.75, f"DPO beats SFT on too few held-out prompts: {results}"
    assert results["reward_accuracy"] > 0.70, f"DPO does not learn the preferences: {results}"
    assert gain > 0.5, f"the mean gold reward does not rise clearly: {results}"
    assert "DPO beats SFT by gold reward on" in done.stdout and "Done in" in done.stdout, (
        "the closing table is missing"
    )
