"""Virtual environments of the loader's peers, made by pip on top of the running one: torch is not installed again."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Peer:
    """What a peer's environment holds beside the running one.

    Attributes:
        packages: exact versions, installed without what they depend on; the first is the peer.
        stand_ins: {file: content} of modules that the peer imports and this benchmark does not use.
    """

    packages: tuple[str, ...]
    stand_ins: dict[str, str] = field(default_factory=dict)


PEERS = {
    "mosaicml-streaming": Peer(
        packages=(
            "mosaicml-streaming==0.13.0",
            "brotli==1.2.1",
            "catalogue==2.0.10",
            "cramjam==2.14.0",
            "filelock==3.20.0",  # a later one refuses locks that were made before a fork, as the peer's are
            "python-snappy==0.7.3",
            "zstd==1.5.7.2",
        ),
        stand_ins={
            "torchvision/__init__.py": "",
            "torchvision/datasets.py": "VisionDataset = object\n",
            "torchvision/transforms/__init__.py": "",
            "torchvision/transforms/functional.py": "to_tensor = None\n",
            "transformers/__init__.py": "",
            "transformers/feature_extraction_utils.py": "class BatchFeature: ...\n",
            "transformers/tokenization_utils_base.py": "class BatchEncoding: ...\n",
            "transformers/models/__init__.py": "",
            "transformers/models/auto/__init__.py": "",
            "transformers/models/auto/tokenization_auto.py": "AutoTokenizer = None\n",
        },
    ),
    "litdata": Peer(
        packages=(
            "litdata==0.2.76",
            "boto3==1.44.5",
            "lightning-utilities==0.15.3",
            "obstore==0.12.1",
            "s3transfer==0.19.3",
            "tifffile==2026.3.3",
        ),
    ),
}


def python_of(peer: str, folder: Path) -> Path:
    """The interpreter of a peer's environment in `folder`; made where it is not there.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    home = folder / peer
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    venv.create(home, with_pip=False, clear=True)
    packages = home / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # The peer's own packages come first on the path, the running environment's (torch, NumPy) after them.
    (packages / "running.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages)]
    subprocess.run([*install, *PEERS[peer].packages], check=True)
    for name, content in PEERS[peer].stand_ins.items():
        path = packages / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (home / "complete").touch()
    return python


def versions() -> str:
    """The peers with their versions, for the results."""
    return ", ".join(peer.packages[0].replace("==", " ") for peer in PEERS.values())
