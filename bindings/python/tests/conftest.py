import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

# Before jax starts its backend: test_jax.py spreads arrays over four devices of the host.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

ROOT = Path(__file__).resolve().parents[3]


def pytest_configure() -> None:
    """Under tests/isa.py no test may run with another instruction set than it says."""
    import blockem

    info = blockem.build_info()
    wanted = os.environ.get("BLOCKEM_TEST_ISA", info["cpu_isa"])
    if info["cpu_isa"] != wanted:
        pytest.exit(f"{info['path']} uses {info['cpu_isa']}, not {wanted}: run this by tests/isa.py", 1)


@pytest.fixture
def sae_folder(tmp_path: Path) -> Path:
    """A SAELens folder: jumprelu, d = 8, F = 32, layer 2."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    folder = tmp_path / "sae"
    folder.mkdir()
    config = {
        "architecture": "jumprelu",
        "d_in": 8,
        "d_sae": 32,
        "dtype": "float32",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.2.hook_resid_post", "sae_lens_version": "6.54.12"},
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(
        {
            "W_enc": rng.standard_normal((8, 32)).astype(np.float32),
            "b_enc": rng.standard_normal(32).astype(np.float32),
            "W_dec": rng.standard_normal((32, 8)).astype(np.float32),
            "b_dec": np.zeros(8, np.float32),
            "threshold": np.full(32, 0.1, np.float32),
        },
        folder / "sae_weights.safetensors",
    )
    return folder
