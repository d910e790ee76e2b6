"""The pair of files whose numbers ADM's README gives: for whoever has them; an hour on a CPU.

ADM_FILES names the folder of both, INCEPTION the published weights of the FID's network.
"""

import json
import os
from pathlib import Path

import pytest

FOLDER, INCEPTION = Path(os.environ.get("ADM_FILES", "absent")), os.environ.get("INCEPTION", "")
REFERENCE = FOLDER / "VIRTUAL_imagenet256_labeled.npz"
SAMPLES = FOLDER / "admnet_guided_upsampled_imagenet256.npz"
EXPECTED = {"fid": 3.9426, "sfid": 6.1404, "is": 215.84, "precision": 0.8265, "recall": 0.5309}


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.skipif(
    not (REFERENCE.exists() and SAMPLES.exists() and INCEPTION),
    reason="needs the two files of ADM's evaluations in ADM_FILES, and INCEPTION",
)
def test_the_numbers_are_those_of_adm_s_readme(run_python, tmp_path):
    networks = [f"--metrics={','.join(EXPECTED)}", f"--inception_weights={INCEPTION}"]
    stored, found = tmp_path / "adm.npz", tmp_path / "found.json"
    for verb, flags in {
        "ref": [f"--images={REFERENCE}", "--protocols=adm", f"--out={stored}"],
        "calc": [f"--images={SAMPLES}", f"--reference={stored}", f"--out={found}"],
    }.items():
        args = ["-m", "shortcut_jax.eval", verb, *flags, *networks]
        done = run_python(args, timeout=3 * 3600)
        assert done.returncode == 0, done.stderr
    values = {record["metric"]: record["value"] for record in json.loads(found.read_text())}
    assert values == pytest.approx(EXPECTED, rel=1e-3)
