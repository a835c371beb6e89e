"""The ops, one sub-package each. In a checkout they live in `kernels/` beside `rlhf_fast/`."""

from pathlib import Path

# `kernels/` has no __init__.py, so that it never shadows Hugging Face's package of that name; a
# wheel maps its folders to rlhf_fast.kernels.<op>, a checkout finds them through this path.
_root = Path(__file__).resolve().parents[2]
if (_root / "setup.py").exists() and (_root / "kernels").is_dir():
    __path__.append(str(_root / "kernels"))
