"""The commands ``mvlm-export`` and ``mvlm``; heavy packages load inside a command only."""
