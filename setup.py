"""Packaging. The rooms are top-level packages; an editable install serves them from the checkout."""

from setuptools import setup

setup(
    name="glam-pretrain",
    version="0.1.0",
    description="Pretrain GLaM-like sparse language models over tensor, pipeline, expert and data parallelism",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["configs", "model", "parallel", "data_prep", "slurm", "pretrain"],
    package_data={"configs": ["*.yaml"], "slurm": ["templates/*.sh", "clusters/*.yaml"]},
    install_requires=[
        "torch>=2.11,<=2.13.0",  # wider, and pip fetches gigabytes of CUDA for a build we have not measured
        "deepspeed==0.19.8",  # its private parts are worked around by name; tests say when they move
        "megatron-core==0.16.1",
        "sentencepiece>=0.2",
        "datasets>=3.0",
        "pyyaml>=6.0",
        "mpi4py>=4.0",
        "pyarrow>=17",  # parquet, and zstandard that notices a truncated file
        "orjson>=3.10",
        "xxhash>=3.4",
        "rensa>=0.4",  # MinHash
        "scikit-learn>=1.5",  # the quality classifier
        "tokenizers>=0.20",
        "pydantic>=2.8",
        "typing_extensions>=4.10",
        "numpy>=1.26",
        "safetensors>=0.5",
        "psutil>=5.9",
        "packaging>=23",
        "rich>=13.7",
        "tensorboard>=2.16",
        "matplotlib>=3.8",
    ],
    extras_require={
        "mpi": ["mpich>=4.2"],  # an MPI for `mpiexec -n N glam prep`, where the machine has none
        "language": ["py3langid>=0.4"],  # the filter `language`
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "types-psutil",
            "mpich>=4.2",
            "zstandard>=0.22",  # writes the archives that tests read
            "py3langid>=0.4",
            "transformers>=5.0,<6",  # peer of the benchmarks, and the twin `configs/modern.yaml` is tested against
        ],
    },
    entry_points={"console_scripts": ["glam=pretrain.cli:main"]},
)
