"""Test modules here share `attention_cases`, which pytest's importlib mode finds only on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
