"""What shortcut_jax needs. Ranges here; one tested set of exact versions in constraints/."""

from setuptools import find_packages, setup

setup(
    name="shortcut_jax",
    version="0.1.0",
    description="One Step Diffusion via Shortcut Models, in JAX and Flax",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["shortcut_jax", "shortcut_jax.*"]),
    package_data={"shortcut_jax": ["metrics/weights/*"]},
    # Neither TensorFlow nor PyTorch, on purpose: everything below runs without them.
    install_requires=[
        "absl-py>=2",  # flags and logging of the commands
        "array-record>=0.8.1",  # the file format of prepared data sets (random access)
        "clu>=0.0.12",  # metrics.Average of what is logged, parameter_overview
        "flax>=0.12.8,<0.13",  # linen modules; 0.x: a minor release may break
        "grain>=0.2.18",  # input pipeline whose position is checkpointed; its `import grain` API
        "importlib_resources>=5",  # used by tensorflow-datasets to prepare data, undeclared there
        "jax>=0.10,<0.13",  # the versions tests run on; 0.x: a minor release may break
        "matplotlib>=3.8",  # the curve that eval draws
        "ml_collections>=1",  # config files, locked and overridable as --config.KEY=VALUE
        "ml_dtypes>=0.5",  # bfloat16 arrays of weight files; jax needs it anyway
        "numpy>=2",  # host-side arrays, float64 statistics of the metrics; what jax 0.10 needs
        "optax>=0.2.5",  # AdamW and learning-rate schedules
        "orbax-checkpoint>=0.12.8,<0.13",  # asynchronous sharded checkpoints; 0.x as above
        "pillow>=10",  # decodes images, writes sample grids
        "safetensors>=0.5",  # reads published weight files; no PyTorch needed, runs no code
        "scikit-learn>=1.5",  # ships the digits data set: a real run without any download
        "tensorboard>=2.18",  # event files written and read without TensorFlow
        "tensorflow-datasets>=4.9.10",  # data sets as random-access sources (works without TF)
        "tqdm>=4.60",  # the progress bar of shortcut_jax.prepare
    ],
    extras_require={
        # One accelerator runtime per machine; each fixes its runtime to the jax that is installed.
        "tpu": ["jax[tpu]"],  # libtpu
        "cuda": ["jax[cuda12]"],  # CUDA 12: offered by jax 0.10 to 0.12, and runs on older drivers
        "tfds-prepare": [  # to prepare TFDS's own image sets, once; nothing of it runs afterwards
            "apache-beam>=2.60",  # the `tfds` command imports it
            "mlcroissant>=1",  # the `tfds` command imports it
            "tensorflow>=2.16",  # those builders read their sources with it
        ],
        # Makes golden outputs (tests/golden/make_*.py); the tests read them and need neither.
        "parity": [
            "diffusers>=0.30",  # its AutoencoderKL is what ours must equal
            "torch>=2.2",  # runs it; and the code in docs/pytorch.md, which a test runs, too
        ],
        "test": [
            "hypothesis>=6.100",  # properties over many shapes and values
            "mypy>=1.11",  # types
            "packaging>=24",  # compares this file with constraints/
            "pytest>=8.2",  # test runner
            "pytest-timeout>=2.3",  # a hanging test fails instead of hanging the run
            "pytest-xdist>=3.6",  # `-n`
            "ruff>=0.8",  # lint and format
        ],
    },
)
