"""What tiny instances of some architectures need, and those of which there is none."""

from __future__ import annotations

from typing import Any

OVERRIDES: dict[str, dict[str, Any]] = {}
