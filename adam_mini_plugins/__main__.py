"""``python -m adam_mini_plugins`` is ``adam-mini``."""

from .cli import main

if __name__ == "__main__":
    main()
