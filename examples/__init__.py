"""Two models, each trained with torch's cross entropy and with this one: `python -m examples`."""

import sys
from importlib.util import find_spec

NEEDED = {"matplotlib": "matplotlib", "rich": "rich", "sklearn": "scikit-learn"}

missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
if missing:
    sys.exit(f"The examples need {', '.join(missing)}; install with: pip install .[examples]")
