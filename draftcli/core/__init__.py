"""The method: schedule and loop, guidance, gradient modes, loading, adapters. Start with draftp.py."""

import logging

# Where bitsandbytes is installed, peft imports it, and on some processors it then says that it lacks a 4-bit kernel.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
